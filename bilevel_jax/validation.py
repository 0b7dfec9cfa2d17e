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
from jax import dtypes
from jax.core import Tracer

from bilevel_jax.errors import InputError


def is_known(*arrays: Any) -> bool:
    """Whether every array holds concrete numbers, so that its values can be checked."""
    return all(isinstance(a, jax.Array | np.ndarray) and not isinstance(a, Tracer) for a in arrays)


def as_array(name: str, value: Any) -> jax.Array:
    """`value` as an array; a clear error if it is not one."""
    try:
        if isinstance(value, np.ndarray | np.generic | bool | int | float):
            # With a dtype, JAX takes numpy's memory over where it can: a copy, which nobody else writes to. Without one
            # JAX 0.10 compiles a program for each shape.
            value = np.array(value, dtypes.canonicalize_dtype(np.asarray(value).dtype))
            return jnp.asarray(value, value.dtype)
        array = jnp.asarray(value)
        return array.astype(array.dtype)  # a weak type would be another compilation
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


def _in_reach(array: Any) -> bool:
    """Whether numpy can read the array where it lies."""
    if isinstance(array, np.ndarray):
        return True
    return array.is_fully_addressable and all(device.platform == "cpu" for device in array.devices())


def _where_known(check: Callable[..., None]) -> Callable[..., None]:
    """Run `check(name, array, ...)` on known arrays only, also while something else is being traced.

    `check` gets a numpy array where numpy can read it: JAX would compile each of its operations for each shape. An
    accelerator's arrays are looked at where they are.
    """

    @functools.wraps(check)
    def run(name: str, array: Any, *arguments: Any) -> None:
        if is_known(array) and array.size:
            with jax.ensure_compile_time_eval():
                check(name, np.asarray(array) if _in_reach(array) else array, *arguments)

    return run


@_where_known
def require_finite(name: str, array: Any) -> None:
    """Raise if an entry is NaN or infinite, naming the first."""
    finite = array.__array_namespace__().isfinite(array)
    if not finite.all():
        bad = ~finite
        raise InputError(
            f"{name}{_first(bad)} is {_entry(array, bad)} ({bad.sum()} of {bad.size} entries are not "
            f"finite); replace NaN and infinities"
        )


@_where_known
def require_positive(name: str, array: Any, remedy: str) -> None:
    """Raise if an entry is not a finite number above 0."""
    require_finite(name, array)
    if not (array > 0).all():
        raise InputError(f"{name} must be above 0, got {float(array.min()):g}; {remedy}")


@_where_known
def require_at_least(name: str, array: Any, least: float, remedy: str) -> None:
    """Raise if an entry is below `least` or NaN."""
    smallest = float(array.min())
    if not smallest >= least:
        raise InputError(f"{name} must be at least {least}, got {smallest:g}; {remedy}")


@_where_known
def require_fraction(name: str, array: Any, remedy: str) -> None:
    """Raise if an entry is not in [0, 1)."""
    inside = (array >= 0) & (array < 1)
    if not inside.all():
        raise InputError(f"{name} must be at least 0 and below 1, got {_entry(array, ~inside):g}; {remedy}")


@_where_known
def require_probability(name: str, array: Any, remedy: str) -> None:
    """Raise if an entry is not in [0, 1]."""
    inside = (array >= 0) & (array <= 1)
    if not inside.all():
        raise InputError(f"{name} must be from 0 to 1, got {_entry(array, ~inside):g}; {remedy}")


@_where_known
def require_index(name: str, array: Any, size: int) -> None:
    """Raise if an integer is not in [0, size)."""
    inside = (array >= 0) & (array < size)
    if not inside.all():
        raise InputError(
            f"{name}{_first(~inside)} is {_entry(array, ~inside)}, out of range; give indices from 0 to {size - 1}"
        )


@_where_known
def require_distribution(name: str, array: Any, axis: int, remedy: str) -> None:
    """Raise if an entry is negative, or a sum along `axis` is not 1."""
    require_finite(name, array)
    negative = array < 0
    if negative.any():
        raise InputError(f"{name}{_first(negative)} is {_entry(array, negative):g}: probabilities cannot be negative")
    # Rows normalized in float32 and then widened are still meant to sum to 1.
    tolerance = max(1e-6, 100 * float(jnp.finfo(array.dtype).eps))
    total = array.sum(axis)
    bad = abs(total - 1) > tolerance
    if bad.any():
        where = f" at {_first(bad)}" if bad.ndim else ""
        raise InputError(
            f"{name}: probabilities{where} sum to {_entry(total, bad):.9g}, not 1 "
            f"({bad.sum()} of {bad.size} do not); {remedy}"
        )


def _first(where: Any) -> str:
    index = [int(i) for i in np.argwhere(np.asarray(where))[0]]
    return str(index) if index else ""  # a number has no index


def _entry(array: Any, where: Any) -> Any:
    """The first entry of `array` where `where` is True."""
    return np.asarray(array)[np.asarray(where)][0]
