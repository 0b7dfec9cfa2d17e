"""One command for accelerators: what a GPU (or TPU) gains, in under nine minutes. See `__main__`."""
