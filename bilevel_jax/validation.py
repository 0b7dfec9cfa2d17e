"""Checks of values that are known, i.e. outside jit. Traced values pass unchecked.

Shapes are always known and are checked by the containers themselves.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel_jax.errors import InputError


def is_known(*arrays: Any) -> bool:
    """Whether every array holds concrete numbers, so that its values can be checked."""
    return all(isinstance(a, jax.Array | np.ndarray) and not isinstance(a, Tracer) for a in arrays)


def as_float(name: str, value: Any, dtype: Any = None) -> jax.Array:
    """`value` as a floating-point array; a clear error if it is not one."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: expected an array of numbers, got {type(value).__name__} ({error})") from None
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise InputError(f"{name}: expected real numbers, got {array.dtype}; take the real part")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(dtype or jnp.result_type(float))
    return array if dtype is None else array.astype(dtype)


def _first(where: np.ndarray) -> str:
    return str([int(i) for i in np.argwhere(where)[0]])


def require_finite(name: str, array: jax.Array) -> None:
    """Raise if a known array holds NaN or infinity, naming the first bad entry."""
    if is_known(array) and not bool(jnp.all(jnp.isfinite(array))):
        bad = ~np.isfinite(np.asarray(array))
        raise InputError(
            f"{name}{_first(bad)} is {np.asarray(array)[bad][0]} ({bad.sum()} of {bad.size} entries are not "
            f"finite); replace NaN and infinities before building the MDP"
        )


def require_positive(name: str, array: jax.Array) -> None:
    """Raise if a known array has an entry that is not a finite number above 0."""
    require_finite(name, array)
    if is_known(array) and not bool(jnp.all(array > 0)):
        raise InputError(
            f"{name} must be above 0, got {float(jnp.min(array)):g}; a small one (1e-3) comes close to the "
            f"unregularized problem"
        )


def require_distribution(name: str, array: jax.Array, axis: int, remedy: str) -> None:
    """Raise if a known array has negative entries, or sums along `axis` that are not 1."""
    if not is_known(array) or array.size == 0:
        return
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
