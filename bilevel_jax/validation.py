"""Checks of values that are known, i.e. outside jit. Traced values pass unchecked.

Shapes are always known and are checked by the containers themselves.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel_jax.errors import InputError


def is_known(*arrays: Any) -> bool:
    """Whether every array holds concrete numbers, so that its values can be checked."""
    return all(isinstance(a, jax.Array | np.ndarray) and not isinstance(a, Tracer) for a in arrays)


def as_array(name: str, value: Any) -> jax.Array:
    """`value` as an array; a clear error if it is not one."""
    try:
        array = jnp.asarray(value)
        return array.astype(array.dtype)  # a number's weak type would be another compilation
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: expected an array of numbers, got {type(value).__name__} ({error})") from None


def as_float(name: str, value: Any, dtype: Any = None) -> jax.Array:
    """`value` as a floating-point array; a clear error if it is not one."""
    array = as_array(name, value)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise InputError(f"{name}: expected real numbers, got {array.dtype}; take the real part")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(dtype or jnp.result_type(float))
    return array if dtype is None else array.astype(dtype)


def _first(where: np.ndarray) -> str:
    return str([int(i) for i in np.argwhere(where)[0]])


def _where_known(check: Callable[..., None]) -> Callable[..., None]:
    """Run `check(name, array, ...)` on known arrays only, also while something else is being traced."""

    @functools.wraps(check)
    def run(name: str, array: jax.Array, *arguments: Any) -> None:
        if is_known(array) and array.size:
            with jax.ensure_compile_time_eval():
                check(name, array, *arguments)

    return run


@_where_known
def require_finite(name: str, array: jax.Array) -> None:
    """Raise if an entry is NaN or infinite, naming the first."""
    if not bool(jnp.all(jnp.isfinite(array))):
        bad = ~np.isfinite(np.asarray(array))
        raise InputError(
            f"{name}{_first(bad)} is {np.asarray(array)[bad][0]} ({bad.sum()} of {bad.size} entries are not "
            f"finite); replace NaN and infinities"
        )


@_where_known
def require_positive(name: str, array: jax.Array, remedy: str) -> None:
    """Raise if an entry is not a finite number above 0."""
    require_finite(name, array)
    if not bool(jnp.all(array > 0)):
        raise InputError(f"{name} must be above 0, got {float(jnp.min(array)):g}; {remedy}")


@_where_known
def require_fraction(name: str, array: jax.Array, remedy: str) -> None:
    """Raise if an entry is not in [0, 1)."""
    if not bool(jnp.all((array >= 0) & (array < 1))):
        bad = ~np.asarray((array >= 0) & (array < 1))
        raise InputError(f"{name} must be at least 0 and below 1, got {np.asarray(array)[bad][0]:g}; {remedy}")


@_where_known
def require_index(name: str, array: jax.Array, size: int) -> None:
    """Raise if an integer is not in [0, size)."""
    if not bool(jnp.all((array >= 0) & (array < size))):
        bad = ~np.asarray((array >= 0) & (array < size))
        raise InputError(
            f"{name}{_first(bad)} is {np.asarray(array)[bad][0]}, out of range; give indices from 0 to {size - 1}"
        )


@_where_known
def require_distribution(name: str, array: jax.Array, axis: int, remedy: str) -> None:
    """Raise if an entry is negative, or a sum along `axis` is not 1."""
    require_finite(name, array)
    if bool(jnp.any(array < 0)):
        bad = np.asarray(array) < 0
        raise InputError(f"{name}{_first(bad)} is {np.asarray(array)[bad][0]:g}: probabilities cannot be negative")
    # Rows normalized in float32 and then widened are still meant to sum to 1.
    tolerance = max(1e-6, 100 * float(jnp.finfo(array.dtype).eps))
    total = jnp.sum(array, axis)
    if bool(jnp.any(jnp.abs(total - 1) > tolerance)):
        bad = np.abs(np.asarray(total) - 1) > tolerance
        raise InputError(
            f"{name}: probabilities at {_first(bad)} sum to {np.asarray(total)[bad][0]:.9g}, not 1 "
            f"({bad.sum()} of {bad.size} do not); {remedy}"
        )
