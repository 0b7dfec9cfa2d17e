"""A ring buffer: the last `capacity` items that were added, each a pytree of arrays, the oldest overwritten first."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, PRNGKeyArray

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.indexing import gather
from bilevel_jax.core.validation import as_size, is_known


class Ring(eqx.Module):
    """A ring buffer: `items` has leaves [capacity, ...], `next` is the place of the next item, `size` the number of
    items.

    Places that were never written hold zeros.

    Example:
      >>> ring = bj.replay.init(jnp.zeros(()), 3)
      >>> ring.capacity, int(ring.size)
      (3, 0)
    """

    items: Any
    next: Int32[Array, ""]
    size: Int32[Array, ""]

    @property
    def capacity(self) -> int:
        """The largest number of items."""
        return jax.tree.leaves(self.items)[0].shape[0]


def init(item: Any, capacity: int) -> Ring:
    """An empty ring.

    Args:
      item: one item, or its shapes and dtypes (`jax.ShapeDtypeStruct`). Dtypes are kept: uint8 stays uint8, keys stay
        keys.
      capacity: how many items there is room for (static).

    Raises:
      InputError: capacity is not an integer of at least 1; the item has no arrays.

    Example:
      >>> ring = bj.replay.init({"frame": jnp.zeros((84, 84), jnp.uint8), "reward": 0.0}, 1000)
      >>> ring.items["frame"].shape, str(ring.items["frame"].dtype)
      ((1000, 84, 84), 'uint8')
    """
    capacity = as_size("capacity", capacity)
    if not jax.tree.leaves(item):
        raise InputError(f"item: expected a pytree of arrays, got {item!r}")
    items = jax.tree.map(lambda leaf: jnp.zeros((capacity, *jnp.shape(leaf)), jnp.result_type(leaf)), item)
    return Ring(items, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def add(ring: Ring, items: Any, when: Bool[Array, ""] | bool = True) -> Ring:
    """The ring with N more items, a pytree with leaves [N, ...]; the last one is the newest.

    Under jit, donate the ring, or carry it through a loop: it is then written in place and not copied. Where `when` is
    False nothing is written; it may be traced, and the ring is not copied for it either.

    Raises:
      InputError: leaves of other shapes or dtypes than the ring's; no leading axis [N], N from 1 to the capacity.

    Example:
      >>> ring = bj.replay.add(bj.replay.init(jnp.zeros(()), 3), jnp.array([1.0, 2.0]))
      >>> int(ring.size), ring.items.tolist()
      (2, [1.0, 2.0, 0.0])
    """
    count = _count(ring, items)
    number = jnp.arange(count, dtype=jnp.int32)
    places = (ring.next + number) % ring.capacity
    # Places beyond the end are not written; each has a number of its own, as places are said to be unique.
    places = places if when is True else jnp.where(when, places, ring.capacity + number)

    def write(old: jax.Array, new: Any) -> jax.Array:
        return old.at[places].set(new, unique_indices=True, mode="promise_in_bounds" if when is True else "drop")

    added = count if when is True else jnp.where(when, count, 0).astype(jnp.int32)
    return Ring(
        jax.tree.map(write, ring.items, items),
        (ring.next + added) % ring.capacity,
        jnp.minimum(ring.size + added, ring.capacity),
    )


def sample(key: PRNGKeyArray, ring: Ring, batch: int) -> Any:
    """Items drawn uniformly, with replacement, from those that are there: a pytree with leaves [batch, ...].

    An empty ring has no items; the result is then zeros.

    Raises:
      InputError: batch is not an integer of at least 1; the ring is known to be empty.

    Example:
      >>> ring = bj.replay.add(bj.replay.init(jnp.zeros(()), 100), jnp.array([5.0]))
      >>> bj.replay.sample(jax.random.key(0), ring, 3).tolist()
      [5.0, 5.0, 5.0]
    """
    batch = as_size("batch", batch)
    if is_known(ring.size) and (np.asarray(ring.size) == 0).any():
        raise InputError("ring: it is empty; add items before you sample")
    places = jax.random.randint(key, (batch,), 0, jnp.maximum(ring.size, 1), jnp.int32)
    return jax.tree.map(lambda leaf: gather(leaf, places), ring.items)


def latest(ring: Ring) -> tuple[Any, Bool[Array, " capacity"]]:
    """Return all places, newest item first, leaves [capacity, ...], and which of them hold an item.

    Example:
      >>> ring = bj.replay.add(bj.replay.init(jnp.zeros(()), 3), jnp.array([1.0, 2.0]))
      >>> items, here = bj.replay.latest(ring)
      >>> items.tolist(), here.tolist()
      ([2.0, 1.0, 0.0], [True, True, False])
    """
    ages = jnp.arange(ring.capacity, dtype=jnp.int32)
    places = (ring.next - 1 - ages) % ring.capacity
    return jax.tree.map(lambda leaf: gather(leaf, places), ring.items), ages < ring.size


def _count(ring: Ring, items: Any) -> int:
    """N. Raises InputError."""
    if jax.tree.structure(items) != jax.tree.structure(ring.items):
        raise InputError(
            f"items: expected the structure {jax.tree.structure(ring.items)}, got {jax.tree.structure(items)}"
        )
    counts = set()
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(ring.items), jax.tree.leaves(items), strict=True):
        name, shape, dtype = f"items{jax.tree_util.keystr(path)}", jnp.shape(new), jnp.result_type(new)
        if shape[1:] != old.shape[1:] or not shape:
            raise InputError(f"{name}: expected shape [N, ...] with ... = {list(old.shape[1:])}, got {list(shape)}")
        if dtype != old.dtype:
            raise InputError(f"{name}: expected {old.dtype} as the ring has it, got {dtype}; convert it")
        counts.add(shape[0])
    found = " and ".join(map(str, sorted(counts)))
    if len(counts) != 1 or not 1 <= min(counts) <= ring.capacity:
        raise InputError(f"items: expected one leading axis [N], N from 1 to the capacity {ring.capacity}, got {found}")
    return counts.pop()
