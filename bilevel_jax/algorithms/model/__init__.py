"""Algorithms that know the model, one per file."""
