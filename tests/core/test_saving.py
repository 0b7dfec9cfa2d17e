"""Files of pytrees: what comes back is what was saved, or an error says what differs."""

import os
import zipfile
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj

TREE = {
    "weights": [jnp.arange(3.0), jnp.zeros((2, 0), jnp.float32)],
    "key": jax.random.key(3),
    "frames": jnp.arange(6, dtype=jnp.uint8),
    "flag": jnp.asarray(True),
    "half": jnp.ones(2, jnp.bfloat16),
}


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize("like", [TREE, shapes(TREE)], ids=["arrays", "shapes"])
def test_what_comes_back_is_what_was_saved(like, tmp_path):
    bj.save(tmp_path / "tree.npz", TREE)
    back = bj.load(tmp_path / "tree.npz", like)
    assert jax.tree.structure(back) == jax.tree.structure(TREE)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(TREE), strict=True):
        assert got.dtype == want.dtype
        if jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "tree.npz"
    bj.save(path, {"x": jnp.zeros(2)})

    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            bj.save(path, {"x": jnp.ones(2)})
    assert os.listdir(tmp_path) == ["tree.npz"]
    assert bj.load(path, {"x": jnp.ones(2)})["x"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"x": jnp.zeros(3)}, r"like\['x'\]: expected float64\[3\], the file has float64\[2\]"),
        ({"x": jnp.zeros(2, jnp.float32)}, r"like\['x'\]: expected float32\[2\]"),
        ({"y": jnp.zeros(2)}, r"like\['y'\]: the file has no such array; it has \['x'\]"),
        ({"x": jnp.zeros(2), "y": jnp.zeros(2)}, r"like\['y'\]: the file has no such array"),
        ({}, r"the file has the array \['x'\]"),
        (
            {"x": jax.random.key(0)},
            r"like\['x'\]: expected random keys of .*fry.*, uint32\[2\], .* has float64\[2\]",
        ),
    ],
)
def test_other_arrays_are_refused(like, message, tmp_path):
    bj.save(tmp_path / "tree.npz", {"x": jnp.zeros(2)})
    with pytest.raises(bj.InputError, match=message):
        bj.load(tmp_path / "tree.npz", like)


def test_what_is_no_array_is_refused(tmp_path):
    with pytest.raises(bj.InputError, match=r"tree\['f'\]: expected an array, got function"):
        bj.save(tmp_path / "tree.npz", {"f": shapes})
    assert not list(tmp_path.iterdir())


def test_a_file_of_something_else_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    with pytest.raises(bj.InputError, match=r"like\['x'\]: the file has no such array; it has none"):
        bj.load(tmp_path / "other.npz", {"x": jnp.zeros(2)})
    (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:40])
    with pytest.raises((ValueError, OSError, zipfile.BadZipFile)):
        bj.load(tmp_path / "cut.npz", {"x": jnp.zeros(2)})
    np.savez(tmp_path / "pickled.npz", names=np.array(["['x']"]), **{"leaf 0": np.array([None], object)})
    with pytest.raises(ValueError, match="allow_pickle"):
        bj.load(tmp_path / "pickled.npz", {"x": jnp.zeros(2)})


def test_arrays_are_found_by_their_names(tmp_path):
    """An OrderedDict keeps its own order, a dictionary is sorted."""
    path = tmp_path / "x.npz"
    bj.save(path, OrderedDict(b=jnp.full(2, 2.0), a=jnp.full(2, 1.0)))
    for like in ({"a": jnp.zeros(2), "b": jnp.zeros(2)}, OrderedDict(a=jnp.zeros(2), b=jnp.zeros(2))):
        found = bj.load(path, like)
        assert (found["a"].tolist(), found["b"].tolist()) == ([1.0, 1.0], [2.0, 2.0])
    with pytest.raises(bj.InputError, match=r"like\['a'\]: expected an array or its shape and dtype, got float"):
        bj.load(path, {"a": 1.0, "b": jnp.zeros(2)})
