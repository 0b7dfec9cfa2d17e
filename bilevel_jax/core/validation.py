"""Checks of values that are known, i.e. outside jit; traced values pass. The containers themselves check shapes."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from types import NoneType
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jax.core import Tracer
from jaxtyping import Array, Float, Integer, Shaped

from bilevel_jax.core.errors import InputError

# What numbers may come in as. Half precision is widened; JAX computes in float32 and, if asked to, float64.
NUMBERS = (
    "bool",
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    *("float16", "bfloat16", "float32", "float64"),
)
HALF_PRECISION = 0.02  # what rows that were divided by their sum in half precision may be off
LARGEST = 2**31 - 1  # what is counted and what is looked up is int32


def is_known(*arrays: Any) -> bool:
    """Whether every array holds concrete numbers, so that its values can be checked."""
    return all(isinstance(a, jax.Array | np.ndarray) and not isinstance(a, Tracer) for a in arrays)


def as_array(name: str, value: Any) -> Shaped[Array, "..."]:
    """Return `value` as an array of real numbers or booleans: the way in for all numbers that users give.

    Floating-point numbers get the type of `as_float`. Whole numbers keep theirs, at most as wide as JAX's own, and
    booleans stay booleans.

    Raises:
      InputError: no real numbers, or some that the array's type cannot hold.
    """
    array = _as_numpy(name, value)
    if array.dtype == bool:
        return _moved(array, array.dtype)
    if _is_whole(array):
        default = np.dtype(np.int64) if _holds_objects(array) else array.dtype
        return _as_whole(name, array, dtypes.canonicalize_dtype(default), "give floating-point numbers")
    return _narrowed(name, array, _float_type(array.dtype))


def as_float(name: str, value: Any, dtype: Any = None, shape: tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """`value` as a floating-point array, of a dtype and a shape if given.

    Without a dtype float32 and float64 stay what they are (float64 where JAX has it), float16 and bfloat16 become
    float32, and whole numbers and booleans JAX's own floating-point type, whatever their size.

    Raises:
      InputError: no real numbers, another shape, or numbers beyond the dtype's largest.
    """
    array = _without_objects(name, _as_numpy(name, value))
    if shape is not None and array.shape != shape:
        raise InputError(f"{name}: expected shape {list(shape)}, got {list(array.shape)}")
    return _narrowed(name, array, _float_type(array.dtype) if dtype is None else dtypes.canonicalize_dtype(dtype))


def as_numpy(name: str, value: Any) -> Float[np.ndarray, "..."]:
    """`value` as numpy's float32 or float64, by the rule of `as_float`. Raises InputError, also where it is traced."""
    array = _without_objects(name, _as_numpy(name, value))
    if isinstance(array, Tracer):
        raise InputError(f"{name}: expected an array of numbers, got traced ones; call this outside jit and vmap")
    if jnp.issubdtype(array.dtype, jnp.floating):
        return np.asarray(array).astype(np.float32 if array.dtype.itemsize <= 4 else np.float64, copy=False)
    return np.asarray(array).astype(np.float64)


def as_integer(
    name: str, value: Any, remedy: str, dtype: Any = jnp.int32, *, expected: str = "integers"
) -> Integer[Array, "..."]:
    """`value`, indices or counts, as an array of whole numbers of a dtype.

    Raises:
      InputError: no whole numbers (booleans are none), or some that are known and beyond the dtype.
    """
    array = _as_numpy(name, value)
    if not _is_whole(array):
        raise InputError(f"{name}: expected {expected}, got {array.dtype if array.ndim else repr(value)}; {remedy}")
    return _as_whole(name, array, np.dtype(dtype), remedy)


def as_size(name: str, value: Any, remedy: str = "it is a static size", *, least: int = 1) -> int:
    """`value` as an int that is known, from `least` to the largest int32. Raises InputError."""
    try:
        size = operator.index(value)
    except TypeError:
        size = None
    if size is None or isinstance(value, bool | np.bool_) or size < least:
        raise InputError(f"{name}: expected an integer of at least {least}, got {value!r}; {remedy}")
    if size > LARGEST:
        raise InputError(f"{name}: {size} is above {LARGEST}, the largest int32; {remedy}")
    return size


def plain(name: str) -> Callable[[Any], Any]:
    """Return a converter for the static field of this name: it turns a number of numpy or JAX into Python's.

    It raises InputError for an array of several numbers, because a static value is a part of the program.
    """

    def convert(value: Any) -> Any:
        _require_one(name, value, "it is a part of the program, make one for each")
        is_scalar = isinstance(value, np.integer | np.bool_) or (is_known(value) and not value.ndim)
        return value.item() if is_scalar else value

    return convert


def _as_numpy(name: str, value: Any) -> Any:
    """`value` as it is: a JAX array, or a numpy one in the machine's byte order (of objects: Python's large ints)."""
    kind = type(value).__name__
    if hasattr(type(value), "__jax_array__") and not isinstance(value, jax.Array):
        value = value.__jax_array__()
    if not isinstance(value, jax.Array):
        inside = value[0] if isinstance(value, list | tuple) and value else value
        if hasattr(type(inside), "todense"):
            raise InputError(
                f"{name}: expected an array of numbers, got sparse matrices ({type(inside).__name__}); a process of "
                f"scipy's comes in by interchange.from_scipy, else use toarray()"
            )
        if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
            raise InputError(f"{name}: some numbers are masked; say what is meant, e.g. by filled(0)")
        try:
            try:
                value = np.asarray(value)
            except jax.errors.TracerArrayConversionError:  # traced, or a list that has traced numbers
                value = jnp.asarray(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{name}: expected an array of numbers, got {kind} ({error})") from None
    dtype = value.dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise InputError(
            f"{name}: expected real numbers, got {dtype}; give real and imaginary parts as two, or the real part alone"
        )
    if _holds_objects(value) and all(type(entry) is int for entry in np.ravel(value)):
        return value
    if dtype.name not in NUMBERS and dtype != np.longdouble:
        raise InputError(
            f"{name}: expected an array of numbers, got {kind} of {dtype}; the types that numbers may have are "
            f"{', '.join(NUMBERS)}"
        )
    return value.astype(dtype.newbyteorder("=")) if isinstance(value, np.ndarray) and not dtype.isnative else value


def _without_objects(name: str, array: Any) -> Any:
    if not _holds_objects(array):
        return array
    try:
        return array.astype(np.float64)
    except OverflowError:
        raise InputError(f"{name}: a whole number is beyond float64; use smaller units") from None


def _is_whole(array: Any) -> bool:
    return _holds_objects(array) or jnp.issubdtype(array.dtype, jnp.integer)


def _holds_objects(array: Any) -> bool:
    """Whether numpy has no type that is wide enough for the whole numbers."""
    return isinstance(array, np.ndarray) and array.dtype.kind == "O"


def _float_type(dtype: Any) -> np.dtype:
    """What numbers of a dtype are computed in."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return dtypes.canonicalize_dtype(float)
    wide = np.float32 if dtype.itemsize < 4 else np.float64 if dtype.itemsize > 8 else dtype
    return dtypes.canonicalize_dtype(wide)


def _narrowed(name: str, array: Any, dtype: np.dtype) -> Float[Array, "..."]:
    """Numbers in a floating-point dtype; an error where one that is finite would become infinite."""
    with np.errstate(over="ignore"):
        made = _moved(array, dtype)
    if jnp.issubdtype(array.dtype, jnp.floating) and jnp.finfo(array.dtype).max > jnp.finfo(dtype).max:
        _require_kept(name, made, array)
    return made


def _as_whole(name: str, array: Any, dtype: np.dtype, remedy: str) -> Integer[Array, "..."]:
    """Whole numbers in an integer dtype; an error where one would become another."""
    least, most = int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max)
    if _holds_objects(array) or int(jnp.iinfo(array.dtype).max) > most or int(jnp.iinfo(array.dtype).min) < least:
        _require_between(name, array, least, most, dtype, remedy)
    return _moved(array, dtype)


def _moved(array: Any, dtype: np.dtype) -> Shaped[Array, "..."]:
    """As a JAX array of a dtype."""
    if isinstance(array, np.ndarray):
        # With a dtype, JAX takes numpy's memory over where it can: a copy, which nobody else writes to. Without one
        # JAX 0.10 compiles a program for each shape.
        return jnp.asarray(np.array(array, dtype), dtype)
    return array.astype(dtype)  # also where it has it: a weak type would be another compilation


def require_instance(name: str, value: Any, kind: Any, *, any_floats: bool = False) -> None:
    """Raise if `value` is no instance of `kind`, a class or a union such as `Solver | None`, or not computable."""
    require_kind(name, value, kind)
    require_computable(name, value, any_floats=any_floats)


def require_kind(name: str, value: Any, kind: Any) -> None:
    """Raise if `value` is no instance of `kind`. Functions that are called often check more once per compilation."""
    is_class = isinstance(value, type)
    if is_class or not isinstance(value, kind):
        wanted = " or ".join("None" if k is NoneType else k.__name__ for k in get_args(kind) or (kind,))
        got = f"the class {value.__name__} itself; make one of it" if is_class else type(value).__name__
        raise InputError(f"{name}: expected {wanted}, got {got}")


def require_computable(name: str, tree: Any, *, any_floats: bool = False) -> None:
    """Raise if an array in a pytree is float64 while JAX computes in float32, or, but for `any_floats`, below float32.

    Constructors make sure that there is none, but JAX's settings and the leaves may have changed since.
    """
    computable = {np.dtype(np.float32), dtypes.canonicalize_dtype(np.float64)}
    for leaf in jax.tree.leaves(tree):
        if not isinstance(leaf, jax.Array) or leaf.dtype in computable or not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        dtype = leaf.dtype
        if dtype != np.float64 and any_floats:
            continue
        where = next(path for path, other in jax.tree_util.tree_leaves_with_path(tree) if other is leaf)
        remedy = (
            "it was made while jax_enable_x64 was on, which is off now; set jax.config.update('jax_enable_x64', True), "
            "or make it anew in float32"
            if dtype == np.float64
            else "make it of float32 or float64"
        )
        raise InputError(f"{name}{jax.tree_util.keystr(where)} is {dtype}; {remedy}")


def require_setting(name: str, value: Any, least: int, remedy: str, *, whole: bool = False) -> None:
    """Raise if a solver's setting, a number or an array of numbers, is no number or is known to be below `least`.

    Also raise for a whole number that is known not to fit its type: int32 if `whole`, else JAX's own.
    """
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if array.dtype.name in ("float16", "bfloat16"):
        raise InputError(f"{name}: {array.dtype.name} has too few digits for a setting; make it of float32 or float64")
    integer = type(value) is int or jnp.issubdtype(array.dtype, jnp.integer)
    if not integer and (whole or array.dtype == bool or array.dtype.name not in NUMBERS):
        raise InputError(f"{name}: expected a {'whole ' if whole else ''}number, got {value!r}; {remedy}")
    if integer:
        dtype = np.dtype(np.int32) if whole else dtypes.canonicalize_dtype(np.int64)
        _require_between(name, array, int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max), dtype, remedy)
    require_at_least(name, array, least, remedy)


def require_stopping(tolerance: Any, max_iterations: Any) -> None:
    """Raise if an iteration's tolerance, a number or None, is below 0, or its max_iterations below 1."""
    if tolerance is not None:
        require_setting("tolerance", tolerance, 0, "None asks for working precision")
    require_setting("max_iterations", max_iterations, 1, "1000 is usual", whole=True)


def require_numbers(owner: str, settings: Any) -> None:
    """Raise if a setting of a solver or a method, or of one within it, is several numbers instead of one.

    Only the library's own classes are checked: a user's solver may hold anything. Under vmap each element sees one
    number.
    """
    if not dataclasses.is_dataclass(settings) or type(settings).__module__.split(".")[0] != __name__.split(".")[0]:
        return
    for field in dataclasses.fields(settings):
        name, value = f"{owner}.{field.name}", getattr(settings, field.name)
        require_numbers(name, value)
        _require_one(name, value, "for several, jax.vmap over a function of the number")


def _require_one(name: str, value: Any, remedy: str) -> None:
    is_list = isinstance(value, list | tuple)
    if is_list or getattr(value, "ndim", 0):
        shape = [len(value)] if is_list else list(value.shape)
        raise InputError(f"{name}: expected one number, got shape {shape}; {remedy}")


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
def _require_kept(name: str, made: Any, given: Any) -> None:
    """Raise if a number of `given` that is finite is infinite in `made`."""
    infinite = made.__array_namespace__().isinf(made)
    if infinite.any():
        given = np.asarray(given)
        lost = np.asarray(infinite) & np.isfinite(given)
        if lost.any():
            raise InputError(
                f"{name}{_first(lost)} is {_entry(given, lost):g}, beyond {made.dtype} (at most "
                f"{jnp.finfo(made.dtype).max:.2g}); use smaller units, or float64 (jax_enable_x64)"
            )


@_where_known
def _require_between(name: str, array: Any, least: int, most: int, dtype: Any, remedy: str) -> None:
    """Raise if a whole number is not from `least` to `most`, those of a dtype."""
    if int(array.min()) < least or int(array.max()) > most:
        array = np.asarray(array)
        beyond = np.array([not least <= int(entry) <= most for entry in array.flat]).reshape(array.shape)
        raise InputError(
            f"{name}{_first(beyond)} is {_entry(array, beyond)}, beyond {dtype} ({least} to {most}); {remedy}"
        )


@_where_known
def require_finite(name: str, array: Any, remedy: str = "replace NaN and infinities") -> None:
    """Raise if an entry is NaN or infinite, naming the first."""
    finite = array.__array_namespace__().isfinite(array)
    if not finite.all():
        bad = ~finite
        raise InputError(
            f"{name}{_first(bad)} is {_entry(array, bad)} ({bad.sum()} of {bad.size} entries are not finite); {remedy}"
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
        # 0.99999999 is 1 in float32.
        kind = " in float32" if array.dtype == np.float32 else ""
        raise InputError(f"{name} must be at least 0 and below 1, got {_entry(array, ~inside):g}{kind}; {remedy}")


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


# Differences of functions of a policy are taken at points that are off the simplex by less.
OFF_THE_SIMPLEX = 0.1


@_where_known
def require_policy(name: str, policy: Any) -> None:
    """Raise where a known policy[..., S, A] is far from a distribution: counts, logits, or swapped axes."""
    require_finite(name, policy)
    wrong = policy < -OFF_THE_SIMPLEX
    if wrong.any():
        raise InputError(f"{name}{_first(wrong)} is {_entry(policy, wrong):g}: probabilities cannot be negative")
    total = policy.sum(-1)
    wrong = abs(total - 1) > OFF_THE_SIMPLEX
    if wrong.any():
        raise InputError(
            f"{name}: the probabilities at {_first(wrong)} sum to {_entry(total, wrong):g}, not to 1; divide each row "
            f"by its sum, the order is [state, action]"
        )


@_where_known
def require_distribution(name: str, array: Any, axis: int, remedy: str, order: str = "[action]") -> None:
    """Raise if an entry is negative, or if a sum along `axis`, counted from the last, is not 1.

    `order` names the axes after the batch axes. Where the sums along another of these axes are 1, the message says so.
    """
    require_finite(name, array)
    negative = array < 0
    if negative.any():
        raise InputError(f"{name}{_first(negative)} is {_entry(array, negative):g}: probabilities cannot be negative")
    # Rows normalized in float32 and then widened are still meant to sum to 1.
    tolerance = max(1e-6, 100 * float(jnp.finfo(array.dtype).eps))
    total = array.sum(axis)
    bad = abs(total - 1) > tolerance
    if bad.any():
        axes = min(len(order.split(",")), array.ndim)
        others = [other for other in range(-axes, 0) if other != axis and array.shape[other]]
        right = [other for other in others if (abs(array.sum(other) - 1) <= tolerance).all()]
        if right:
            remedy = (
                f"those along axis {right[0]} do, and the order is {order}: if that axis is meant, use "
                f"numpy.moveaxis(p, {right[0]}, {axis})"
            )
        elif (abs(total - 1) < HALF_PRECISION).all():
            remedy += ", in float32 or float64"
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
