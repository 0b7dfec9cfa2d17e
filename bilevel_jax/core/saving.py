"""Pytrees of arrays as files, without pickle: a trained agent, a reward, an upper variable."""

import os
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.core.errors import InputError

PREFIX = "leaf "


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Write the arrays of a pytree to a file, in numpy's format npz. A file of this name is whole or is not there.

    Args:
      path: a file; its folder exists. A file that is there is replaced.
      tree: a pytree of arrays: parameters, the state of an agent or of an algorithm, keys.

    Raises:
      InputError: a leaf is no array.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/x.npz"
      >>> bj.save(path, {"weight": jnp.arange(3.0)})
      >>> bj.load(path, {"weight": jnp.zeros(3)})["weight"].tolist()
      [0.0, 1.0, 2.0]
    """
    for name, leaf in _named(tree):
        if not hasattr(leaf, "dtype"):
            raise InputError(f"tree{name}: expected an array, got {type(leaf).__name__}")
    names = np.asarray([name for name, _ in _named(tree)], np.str_)
    part = f"{os.fspath(path)}.part{os.getpid()}"
    try:
        with open(part, "wb") as file:
            np.savez(file, names=names, **as_arrays(tree, PREFIX))  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)


def load(path: str | os.PathLike[str], like: Any) -> Any:
    """Read what `save` wrote, as a pytree of the structure, shapes and dtypes of `like`.

    `like` is a pytree of arrays or of `jax.ShapeDtypeStruct`, e.g. `jax.eval_shape(agent.init, key, problem, x)`.

    Raises:
      InputError: the file has other arrays than `like`; the first that differs is named.
      OSError, ValueError: there is no such file, or it is damaged.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/x.npz"
      >>> bj.save(path, {"weight": jnp.arange(3.0)})
      >>> bj.load(path, {"weight": jnp.zeros(2)})
      Traceback (most recent call last):
      bilevel_jax.core.errors.InputError: like['weight']: expected float32[2], the file has float32[3]
    """
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as opened:
        arrays = dict(opened)
    wanted = _named(like)
    stored = [str(name) for name in arrays.get("names", ())]
    for name, _ in wanted:
        if name not in stored:
            raise InputError(f"like{name}: the file has no such array; it has {', '.join(stored) or 'none'}")
    if len(stored) != len(wanted):
        extra = next(name for name in stored if name not in dict(wanted))
        raise InputError(f"like: the file has the array {extra}, which is not in it")
    leaves = []
    for name, leaf in wanted:
        array = arrays[f"{PREFIX}{stored.index(name)}"]  # by its name: dictionaries may come in another order
        if not hasattr(leaf, "dtype"):
            raise InputError(f"like{name}: expected an array or its shape and dtype, got {type(leaf).__name__}")
        read = _as_leaf(array, leaf)
        if read is None:
            found = f"{array.dtype}{list(array.shape)}"
            raise InputError(f"like{name}: expected {_described(leaf)}, the file has {found}")
        leaves.append(read)
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def as_arrays(tree: Any, prefix: str) -> dict[str, np.ndarray]:
    """Return the leaves of a pytree, named by their place; random keys as their data, bfloat16 and its like as bits."""
    return {f"{prefix}{i}": _as_array(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}


def as_tree(arrays: dict[str, np.ndarray], prefix: str, like: Any) -> Any:
    """The pytree of `as_arrays`, of the structure and types of `like`; None where they do not fit."""
    leaves, structure = jax.tree.flatten(like)
    made = []
    for i, leaf in enumerate(leaves):
        array = arrays.get(f"{prefix}{i}")
        read = None if array is None else _as_leaf(array, leaf)
        if read is None:
            return None
        made.append(read)
    return jax.tree.unflatten(structure, made)


def _as_array(leaf: Any) -> np.ndarray:
    array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
    return array.view(f"u{array.dtype.itemsize}") if _is_opaque(array.dtype) else array


def _as_leaf(array: np.ndarray, like: Any) -> jax.Array | None:
    """The array as a leaf of the shape and type of `like`; None where it does not fit."""
    if _is_key(like):
        data = jax.eval_shape(jax.random.key_data, like)
        if array.shape != data.shape or array.dtype != data.dtype:
            return None
        generator = jax.random.key_impl(jnp.zeros((), like.dtype))  # of shapes alone there is none
        return jax.random.wrap_key_data(jnp.asarray(array), impl=generator)
    dtype = np.dtype(like.dtype)
    if _is_opaque(dtype) and array.dtype == np.dtype(f"u{dtype.itemsize}"):
        array = array.view(dtype)
    return jnp.asarray(array) if array.shape == like.shape and array.dtype == dtype else None


def _described(leaf: Any) -> str:
    if not _is_key(leaf):
        return f"{leaf.dtype}{list(leaf.shape)}"
    data = jax.eval_shape(jax.random.key_data, leaf)
    generator = jax.random.key_impl(jnp.zeros((), leaf.dtype))
    return f"random keys of {generator}, {data.dtype}{list(data.shape)}"


def _is_opaque(dtype: np.dtype) -> bool:
    """Whether numpy's files would forget the type: it is not one of numpy's own."""
    return dtype.kind == "V"


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", np.float64), jax.dtypes.prng_key)


def flat_names(name: str, tree: Any) -> list[str]:
    """The names of a pytree's leaves in final.npz: x, or x/weights for {"weights": ...}."""

    def label(path: tuple[Any, ...]) -> str:
        return "/".join([name, *(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)])

    return [label(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def of_run(arrays: Any, name: str, place: int, number: int) -> np.ndarray:
    """What final.npz has of a run: a row, or an array of its own where the runs' shapes differ."""
    own = f"{name}/run {number}"
    return arrays[own] if own in arrays else arrays[name][place]


def read_final(path: str | os.PathLike[str], name: str, like: Any, run: int) -> Any:
    """Read one run's pytree, such as its x, from the final.npz of a directory of results.

    Args:
      name: "x" or "best_x".
      like: a pytree of the structure, shapes and dtypes that it has.
      run: the place of the run among those that are finished.

    Raises:
      InputError: the file is no final.npz, has no such run, or has other arrays than `like`.
      OSError: there is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as opened:
            arrays = dict(opened)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{os.fspath(path)} is no final.npz of results ({error})") from None
    leaves = []
    for key, leaf in zip(flat_names(name, like), jax.tree.leaves(like), strict=True):
        if key not in arrays and f"{key}/run {run}" not in arrays:
            raise InputError(f"{os.fspath(path)} has no {key}; its x is another than {_described(leaf)}")
        if key in arrays and not 0 <= run < len(arrays[key]):
            raise InputError(f"run: {os.fspath(path)} has {len(arrays[key])} runs, there is no number {run}")
        row = of_run(arrays, key, run, run)
        read = _as_leaf(row.astype(leaf.dtype), leaf)
        if read is None:
            found = f"{row.dtype}{list(row.shape)}"
            raise InputError(f"{os.fspath(path)}: {key} is {found}, expected {_described(leaf)}")
        leaves.append(read)
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
