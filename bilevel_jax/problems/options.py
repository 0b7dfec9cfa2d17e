"""Checks of options that several problems have: sizes, seeds and numbers."""

import math
from typing import Any

import jax
import numpy as np

from bilevel_jax.errors import InputError
from bilevel_jax.validation import (
    as_float,
    is_known,
    require_at_least,
    require_finite,
    require_fraction,
    require_positive,
)

MOST = 10_000


def require_size(options: Any, name: str, *, least: int = 1, most: int = MOST, why: str = "") -> None:
    """Raise InputError if the option is no whole number from `least` to `most`; `why` explains the limits."""
    size = getattr(options, name)
    if not isinstance(size, int | np.integer) or not least <= size <= most:
        raise InputError(f"{name} must be a whole number from {least} to {most}{why and f' ({why})'}, got {size!r}")


def require_seed(options: Any) -> None:
    """Raise InputError if the option `seed` is known to be none; a traced one passes."""
    if isinstance(options.seed, int) and not 0 <= options.seed < 2**32:
        raise InputError(f"seed must be at least 0 and below 2^32, got {options.seed}")


def as_number(options: Any, name: str, least: float, remedy: str, *, most: float = math.inf) -> jax.Array:
    """The option as an array []. Raises InputError if it is known not to be a finite number from `least` to `most`."""
    number = as_float(name, getattr(options, name), float, ())
    require_finite(name, number)
    require_at_least(name, number, least, remedy)
    if is_known(number) and not number <= most:
        raise InputError(f"{name} must be at most {most:g}, got {number:g}; {remedy}")
    return number


def as_positive(options: Any, name: str, remedy: str) -> jax.Array:
    """The option as an array []. Raises InputError if it is known not to be a finite number above 0."""
    number = as_float(name, getattr(options, name), float, ())
    require_positive(name, number, remedy)
    return number


def as_fraction(options: Any, name: str, remedy: str) -> jax.Array:
    """The option as an array []. Raises InputError if it is known not to be in [0, 1)."""
    number = as_float(name, getattr(options, name), float, ())
    require_fraction(name, number, remedy)
    return number
