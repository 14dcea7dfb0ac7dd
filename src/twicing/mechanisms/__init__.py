"""Published mechanisms, one file each."""
