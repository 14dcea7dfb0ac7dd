"""Threat models and attacks: tensors in, tensors out."""
