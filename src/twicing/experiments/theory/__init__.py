"""`twicing theory`: what the papers state, computed: each statement with the numbers that it was held against."""
