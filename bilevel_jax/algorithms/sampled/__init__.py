"""Algorithms that learn from a simulator, one per file; `base.py` has the loop that they share."""
