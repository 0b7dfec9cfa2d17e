"""Agents whose values and policies are networks."""
