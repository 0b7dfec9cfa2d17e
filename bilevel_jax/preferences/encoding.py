"""Arrays and spaces as JSON, exactly: lists of numbers for small ones, base64 of their bytes for large ones."""

import base64
import binascii
import itertools
import math
from typing import Any

import jax
import numpy as np

from bilevel_jax.core.errors import InputError
from bilevel_jax.environments.spaces import Box, Discrete, Space

# Arrays of more numbers, and bytes, which images are made of, are written as base64.
MOST_IN_LISTS = 256
DTYPES = ("bool", "float32", "float64", *(f"{kind}int{bits}" for kind in ("", "u") for bits in (8, 16, 32, 64)))


class RefusedError(InputError):
    """What a line cannot hold. The message says what is wrong with it."""


def encode(name: str, array: Any) -> Any:
    """Return an array as what JSON can hold: a number, nested lists, or a dict of dtype, shape and base64.

    float32 and float64 come back with the same bits: a list has the shortest decimals that do. Bytes are little-endian.

    Raises:
      InputError: another dtype, NaN or an infinity.

    Example:
      >>> encode("x", np.array([0.1, 2.0], np.float32))
      [0.10000000149011612, 2.0]
    """
    array = np.asarray(array)
    if array.dtype.name not in DTYPES:
        raise InputError(f"{name}: {array.dtype} cannot be written; it may be {', '.join(DTYPES)}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(
            f"{name}: NaN and infinities cannot be written; replace them, also in steps that are not valid"
        )
    if array.size <= MOST_IN_LISTS and array.dtype != np.uint8:
        return array.tolist()
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    text = base64.b64encode(data).decode("ascii")
    return {"dtype": array.dtype.name, "shape": list(array.shape), "base64": text}


def decode(name: str, value: Any, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array of this dtype and shape that `encode` wrote.

    Raises:
      RefusedError: it is none; the message says why.

    Example:
      >>> decode("x", [0.5, 2], np.dtype(np.float32), (2,)).tolist()
      [0.5, 2.0]
    """
    if isinstance(value, dict):
        array = _decoded(name, value, dtype, shape)
    else:
        flat = _flattened(name, value, shape)
        _require_entries(name, flat, dtype)
        with np.errstate(over="ignore"):
            array = np.asarray(flat, dtype).reshape(shape)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise RefusedError(f"{name}: NaN, or a number beyond {dtype}")
    return array


def _decoded(name: str, value: dict[str, Any], dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    require_fields(value, ("dtype", "shape", "base64"), name=name)
    if value["dtype"] != dtype.name or value["shape"] != list(shape):
        raise RefusedError(f"{name}: expected {dtype.name}{list(shape)}, got {value['dtype']}{value['shape']}")
    try:
        data = base64.b64decode(value["base64"].encode("ascii"), validate=True)
    except (binascii.Error, AttributeError, UnicodeEncodeError):
        raise RefusedError(f"{name}: its base64 cannot be read") from None
    size = math.prod(shape) * dtype.itemsize
    if len(data) != size:
        raise RefusedError(f"{name}: expected {size} bytes of base64, got {len(data)}")
    if dtype.kind == "b" and set(data) - {0, 1}:
        raise RefusedError(f"{name}: bytes of booleans are 0 or 1")
    return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype).reshape(shape)


def _flattened(name: str, value: Any, shape: tuple[int, ...]) -> list[Any]:
    """The entries of nested lists, which must be of this shape."""
    level = [value]
    for depth, size in enumerate(shape):
        for place, part in enumerate(level):
            if type(part) is not list or len(part) != size:
                where = "".join(f"[{index}]" for index in np.unravel_index(place, shape[:depth])) if depth else ""
                got = len(part) if isinstance(part, list) else type(part).__name__
                raise RefusedError(f"{name}{where}: expected a list of {size}, got {got}")
        level = list(itertools.chain.from_iterable(level))
    return level


def _require_entries(name: str, flat: list[Any], dtype: np.dtype) -> None:
    # JSON's numbers are of these classes themselves, which a set of types tells at once.
    allowed = {"b": {bool}, "f": {float, int}}.get(dtype.kind, {int})
    # A whole number may be beyond float64, and then has no float.
    least, most = (-(2**1023), 2**1023) if dtype.kind in "bf" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    if set(map(type, flat)) <= allowed:
        whole = flat if dtype.kind in "iu" else [entry for entry in flat if type(entry) is int]
        if not whole or (least <= min(whole) and max(whole) <= most):
            return
    wrong = next(entry for entry in flat if type(entry) not in allowed or not least <= entry <= most)
    raise RefusedError(f"{name}: expected numbers of {dtype}, got {short(wrong)}")


def encode_tree(name: str, tree: Any) -> Any:
    """Return arrays, or dicts of arrays by names, as what JSON can hold.

    Example:
      >>> encode_tree("observation", {"speed": np.float32(0.5)})
      {'speed': 0.5}
    """
    if isinstance(tree, dict):
        return {key: encode_tree(f"{name}[{key!r}]", value) for key, value in tree.items()}
    return encode(name, tree)


def decode_tree(name: str, value: Any, like: Any, lead: tuple[int, ...]) -> Any:
    """Return arrays as `like`, a pytree of `jax.ShapeDtypeStruct`, with leading axes.

    Raises:
      RefusedError: they are of another kind.

    Example:
      >>> decode_tree("x", {"speed": [0.5, 1.0]}, {"speed": jax.ShapeDtypeStruct((), np.float32)}, (2,))["speed"].shape
      (2,)
    """
    if not isinstance(like, dict):
        return decode(name, value, np.dtype(like.dtype), (*lead, *like.shape))
    if not isinstance(value, dict):
        raise RefusedError(f"{name}: expected an object with {', '.join(like)}, got {short(value)}")
    require_fields(value, tuple(like), name=name)
    return {key: decode_tree(f"{name}[{key!r}]", value[key], part, lead) for key, part in like.items()}


def encode_shapes(name: str, tree: Any) -> Any:
    """Return the shapes and dtypes of an observation, an array or dicts of arrays, as what JSON can hold.

    Raises:
      InputError: another pytree, or a dtype that cannot be written.

    Example:
      >>> encode_shapes("observation", np.zeros(3, np.float32))
      {'shape': [3], 'dtype': 'float32'}
    """
    if isinstance(tree, dict):
        for key in tree:
            if not isinstance(key, str):
                raise InputError(f"{name}: expected names as keys, got {key!r}")
        return {"fields": {key: encode_shapes(f"{name}[{key!r}]", value) for key, value in tree.items()}}
    if not hasattr(tree, "dtype") or not hasattr(tree, "shape"):
        raise InputError(
            f"{name}: expected an array or a dict of arrays, got {type(tree).__name__}; turn it into dicts"
        )
    dtype = np.dtype(tree.dtype)
    if dtype.name not in DTYPES:
        raise InputError(f"{name}: {dtype} cannot be written; it may be {', '.join(DTYPES)}")
    return {"shape": list(tree.shape), "dtype": dtype.name}


def decode_shapes(name: str, value: Any) -> Any:
    """Return what `encode_shapes` wrote, as `jax.ShapeDtypeStruct` or dicts of them.

    Raises:
      RefusedError: it is none.

    Example:
      >>> decode_shapes("observation", {"shape": [3], "dtype": "uint8"}).shape
      (3,)
    """
    if isinstance(value, dict) and "fields" in value:
        require_fields(value, ("fields",), name=name)
        if not isinstance(value["fields"], dict) or not value["fields"]:
            raise RefusedError(f"{name}: its fields are an object, got {short(value['fields'])}")
        return {key: decode_shapes(f"{name}[{key!r}]", part) for key, part in value["fields"].items()}
    require_fields(value, ("shape", "dtype"), name=name)
    shape = value["shape"]
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise RefusedError(f"{name}: expected a shape, a list of sizes, got {short(shape)}")
    if value["dtype"] not in DTYPES:
        raise RefusedError(f"{name}: expected a dtype of {', '.join(DTYPES)}, got {short(value['dtype'])}")
    return jax.ShapeDtypeStruct(tuple(shape), np.dtype(value["dtype"]))


def encode_space(space: Space) -> dict[str, Any]:
    """Return an action space as what JSON can hold; a bound that is open is null.

    Example:
      >>> from bilevel_jax.environments.spaces import Discrete
      >>> encode_space(Discrete(2))
      {'discrete': 2}
    """
    if isinstance(space, Discrete):
        return {"discrete": space.n}
    bounds = [np.asarray(bound).astype(np.float64).reshape(-1).tolist() for bound in (space.low, space.high)]
    low, high = ([entry if math.isfinite(entry) else None for entry in bound] for bound in bounds)
    return {"box": {"shape": list(space.shape), "dtype": space.dtype.name, "low": low, "high": high}}


def decode_space(value: Any) -> tuple[Any, np.dtype, tuple[int, ...]]:
    """Return what `encode_space` wrote as (the number of actions or numpy's bounds, dtype, shape of an action).

    Raises:
      RefusedError: it is none.

    Example:
      >>> decode_space({"discrete": 2})[0]
      2
    """
    if isinstance(value, dict) and set(value) == {"discrete"}:
        if type(value["discrete"]) is not int or not 1 <= value["discrete"] <= np.iinfo(np.int32).max:
            raise RefusedError(f"action_space: expected a number of actions, got {short(value['discrete'])}")
        return value["discrete"], np.dtype(np.int32), ()
    if not isinstance(value, dict) or set(value) != {"box"}:
        raise RefusedError(f'action_space: expected {{"discrete": n}} or {{"box": ...}}, got {short(value)}')
    box = value["box"]
    require_fields(box, ("shape", "dtype", "low", "high"), name="action_space")
    like = decode_shapes("action_space", {"shape": box["shape"], "dtype": box["dtype"]})
    bounds = []
    for side, open_end in (("low", -np.inf), ("high", np.inf)):
        if not isinstance(box[side], list):
            raise RefusedError(f"action_space: expected {side} as a list, got {short(box[side])}")
        finite = [0 if entry is None else entry for entry in box[side]]
        bound = decode(f"action_space: {side}", finite, np.dtype(np.float64), (math.prod(like.shape),))
        bound[[entry is None for entry in box[side]]] = open_end
        bounds.append(bound.reshape(like.shape))
    if np.dtype(like.dtype).kind != "f" or (bounds[0] > bounds[1]).any():
        raise RefusedError("action_space: a box has numbers of float32 or float64, and low is at most high")
    return (bounds[0], bounds[1]), np.dtype(like.dtype), like.shape


def as_action_space(value: Any) -> Space:
    """Return a header's action space as one of the library's.

    Example:
      >>> as_action_space({"discrete": 2})
      Discrete(n=2)
    """
    space, dtype, shape = decode_space(value)
    return Discrete(space) if isinstance(space, int) else Box(space[0], space[1], shape, dtype)


def require_fields(value: Any, needed: tuple[str, ...], *, name: str) -> None:
    """Raise RefusedError if a value is no object of just these fields.

    Example:
      >>> require_fields({"a": 1}, ("a",), name="x")
    """
    if not isinstance(value, dict):
        raise RefusedError(f"{name}: expected an object, got {short(value)}")
    missing = [field for field in needed if field not in value]
    if missing:
        raise RefusedError(f"{name}: it has no {missing[0]!r}")
    unknown = [field for field in value if field not in needed]
    if unknown:
        raise RefusedError(f"{name}: unknown field {short(unknown[0])}; it has {', '.join(needed)}")


def short(value: Any) -> str:
    """Return a value for a message, cut where it is long.

    Example:
      >>> short("ab")
      "'ab'"
    """
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a very large number"
    return text if len(text) <= 60 else f"{text[:57]}..."
