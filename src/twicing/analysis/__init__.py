"""What a model does inside."""
