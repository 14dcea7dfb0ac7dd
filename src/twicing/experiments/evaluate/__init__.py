"""`twicing evaluate`: attacks, corruptions and shifted test sets for models that are trained already."""
