"""A local page on which people label pairs of clips. See docs/preferences.md."""
