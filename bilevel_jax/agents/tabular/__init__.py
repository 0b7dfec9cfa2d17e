"""Agents that keep a number per state and action, or one per feature and action."""
