"""What the library raises: bad input, and results that are not what was asked for."""


class InputError(ValueError):
    """An argument that cannot be used. The message names it, its value and the remedy."""


class ConvergenceError(RuntimeError):
    """Raised by `bilevel_jax.check` for a result that did not reach what was asked."""
