"""Solves and linear systems: time, memory, against other packages."""
