"""Against published tables and the code of their authors."""
