"""`twicing analyze`: what the attention of trained models is like inside."""
