"""Measurements of the library: README.md says which script answers which question."""
