"""Recipes and their tasks; Lightning does the loop."""
