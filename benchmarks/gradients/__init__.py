"""Hyper-gradients: time, memory, convergence."""
