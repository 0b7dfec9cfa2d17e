"""Agents with networks: what they reach, and how fast."""
