"""Readers: pixel space, no normalisation."""
