"""Checks of values that are known, i.e. outside jit. Traced values pass unchecked.

Shapes are always known and are checked by the containers themselves.
"""

import functools
from collections.abc import Callable
from types import NoneType
from typing import Any, get_args

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


def as_float(name: str, value: Any, dtype: Any = None, shape: tuple[int, ...] | None = None) -> jax.Array:
    """`value` as a floating-point array, of a dtype and a shape if given; a clear error if it is not one."""
    array = as_array(name, value)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise InputError(f"{name}: expected real numbers, got {array.dtype}; take the real part")
    if shape is not None and array.shape != shape:
        raise InputError(f"{name}: expected shape {list(shape)}, got {list(array.shape)}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(dtype or jnp.result_type(float))
    return array if dtype is None else array.astype(dtype)


def require_instance(name: str, value: Any, kind: Any) -> None:
    """Raise if `value` is no instance of `kind`, a class or a union such as `Solver | None`."""
    is_class = isinstance(value, type)
    if is_class or not isinstance(value, kind):
        wanted = " or ".join("None" if k is NoneType else k.__name__ for k in get_args(kind) or (kind,))
        got = f"the class {value.__name__} itself; make one of it" if is_class else type(value).__name__
        raise InputError(f"{name}: expected {wanted}, got {got}")


def require_setting(name: str, value: Any, least: int, remedy: str, *, whole: bool = False) -> None:
    """Raise if a solver's setting, a number or an array of them, is no number or known to be below `least`."""
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    kinds = (jnp.integer,) if whole else (jnp.integer, jnp.floating)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise InputError(f"{name}: expected a {'whole ' if whole else ''}number, got {value!r}; {remedy}")
    require_at_least(name, array, least, remedy)


def require_stopping(tolerance: Any, max_steps: Any) -> None:
    """Raise if an iteration's tolerance, a number or None, is below 0, or its max_steps below 1."""
    if tolerance is not None:
        require_setting("tolerance", tolerance, 0, "None asks for working precision")
    require_setting("max_steps", max_steps, 1, "1000 is usual", whole=True)


def _first(where: np.ndarray) -> str:
    index = [int(i) for i in np.argwhere(where)[0]]
    return str(index) if index else ""  # a number has no index


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
def require_at_least(name: str, array: Any, least: float, remedy: str) -> None:
    """Raise if an entry is below `least` or NaN."""
    smallest = np.min(np.asarray(array))  # numpy: making a solver starts no backend
    if not smallest >= least:
        raise InputError(f"{name} must be at least {least}, got {float(smallest):g}; {remedy}")


@_where_known
def require_fraction(name: str, array: jax.Array, remedy: str) -> None:
    """Raise if an entry is not in [0, 1)."""
    if not bool(jnp.all((array >= 0) & (array < 1))):
        bad = ~np.asarray((array >= 0) & (array < 1))
        raise InputError(f"{name} must be at least 0 and below 1, got {np.asarray(array)[bad][0]:g}; {remedy}")


@_where_known
def require_probability(name: str, array: jax.Array, remedy: str) -> None:
    """Raise if an entry is not in [0, 1]."""
    if not bool(jnp.all((array >= 0) & (array <= 1))):
        bad = ~np.asarray((array >= 0) & (array <= 1))
        raise InputError(f"{name} must be from 0 to 1, got {np.asarray(array)[bad][0]:g}; {remedy}")


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
        where = f" at {_first(bad)}" if bad.ndim else ""
        raise InputError(
            f"{name}: probabilities{where} sum to {np.asarray(total)[bad][0]:.9g}, not 1 "
            f"({bad.sum()} of {bad.size} do not); {remedy}"
        )
