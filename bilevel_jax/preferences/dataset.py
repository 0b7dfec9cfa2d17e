"""Labelled pairs of segments as a data set in memory, and as a buffer of a fixed size for use inside jit."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int32, Integer, PRNGKeyArray, Real

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import (
    as_float,
    as_integer,
    as_size,
    require_at_least,
    require_finite,
    require_index,
    require_probability,
)
from bilevel_jax.preferences.bradley_terry import TIE
from bilevel_jax.preferences.segments import Segments
from bilevel_jax.replay.ring import Ring, add, init, latest


class Preferences(eqx.Module):
    """Pairs of segments, and which of the two is better.

    Args:
      segments: N segments.
      pairs: the numbers of the first and the second segment of each pair, [P, 2].
      label: 1 where the first is better, 1/2 for equally good, 0 where the second is, or anything between, [P]. None:
        not labelled yet, which is 1/2 with weight 0.
      weight: how much a label counts, at least 0; 0 where the pair was skipped or is not labelled yet, [P]. None is 1
        for all, or 0 without labels.
      source: for each pair the place of its kind in `sources`, [P], or one number for all.
      iteration: at which each pair was made, [P], or one number for all.
      sources: names of kinds of pairs, such as "uniform" or "disagreement" (static).

    Raises:
      InputError: shapes that do not fit, or (where they are known) a number of a segment or a source that there is
        not, a label outside [0, 1], a negative weight.

    Example:
      >>> segments = bj.preferences.Segments(jnp.zeros((3, 5, 2)), jnp.zeros((3, 5)), valid=jnp.ones((3, 5), bool))
      >>> data = bj.preferences.Preferences(segments, [[0, 1], [1, 2]], label=[1.0, 0.5])
      >>> data.count, data.weight.tolist()
      (2, [1.0, 1.0])
    """

    segments: Segments
    pairs: Int32[Array, "*batch 2"]
    label: Float[Array, "*batch"]
    weight: Float[Array, "*batch"]
    source: Int32[Array, "*batch"]
    iteration: Int32[Array, "*batch"]
    sources: tuple[str, ...] = eqx.field(static=True)

    def __init__(
        self,
        segments: Segments,
        pairs: Integer[ArrayLike, "P 2"] | Any,
        label: Real[ArrayLike, " P"] | Any | None = None,
        weight: Real[ArrayLike, " P"] | Any | None = None,
        source: Integer[ArrayLike, "..."] | Any = 0,
        iteration: Integer[ArrayLike, "..."] | Any = 0,
        sources: tuple[str, ...] = ("pairs",),
    ):
        self.segments = segments
        self.pairs = as_integer("pairs", pairs, "give numbers of segments")
        if self.pairs.ndim != 2 or self.pairs.shape[1] != 2:
            raise InputError(f"pairs: expected [P, 2], two segments a pair, got shape {list(self.pairs.shape)}")
        require_index("pairs", self.pairs, segments.count)
        count = self.pairs.shape[:1]
        if label is None:
            if weight is not None:
                raise InputError("weight: there are no labels to weigh; give both or none")
            label, weight = jnp.full(count, TIE), jnp.zeros(count)
        self.label = as_float("label", label, None, count)
        require_probability("label", self.label, "1 where the first segment is better, 0 where the second is")
        weight = jnp.ones_like(self.label) if weight is None else weight
        self.weight = as_float("weight", weight, self.label.dtype, count)
        require_finite("weight", self.weight)
        require_at_least("weight", self.weight, 0, "0 is a pair that was not judged")
        self.sources = tuple(sources)
        if not all(isinstance(name, str) for name in self.sources) or len(set(self.sources)) != len(self.sources):
            raise InputError(f"sources: expected different names, got {sources!r}")
        self.source = _per_pair("source", source, count)
        require_index("source", self.source, len(self.sources))
        self.iteration = _per_pair("iteration", iteration, count)

    @classmethod
    def paired(
        cls,
        first: Any,
        second: Any,
        label: Real[ArrayLike, " P"] | Any | None = None,
        weight: Real[ArrayLike, " P"] | Any | None = None,
        *,
        source: str = "pairs",
        iteration: Integer[ArrayLike, ""] | Any = 0,
        hidden: bool = True,
    ) -> "Preferences":
        """The pairs of two batches of trajectories or segments [P, H]: number p of the one and number p of the other.

        `hidden` keeps the reward of trajectories as that of a synthetic teacher (static).
        """
        one, two = Segments.of(first, hidden=hidden), Segments.of(second, hidden=hidden)
        if one.valid.shape != two.valid.shape:
            raise InputError(
                f"second: expected segments {list(one.valid.shape)} as in first, got {list(two.valid.shape)}"
            )
        number = jnp.arange(one.count, dtype=jnp.int32)
        pairs = jnp.stack([number, number + one.count], -1)
        return cls(_joined([one, two]), pairs, label, weight, 0, iteration, (source,))

    @property
    def count(self) -> int:
        """P, pairs that were not judged included."""
        return self.pairs.shape[0]

    @property
    def first(self) -> Segments:
        """The first segment of each pair, [P, H]."""
        return self._side(0)

    @property
    def second(self) -> Segments:
        """The second segment of each pair, [P, H]."""
        return self._side(1)

    def _side(self, side: int) -> Segments:
        return jax.tree.map(lambda leaf: leaf[self.pairs[:, side]], self.segments)


def concatenate(*parts: Preferences) -> Preferences:
    """Return one data set with the segments and pairs of all, in their order.

    Raises:
      InputError: none is given; segments of other lengths, structures or dtypes.

    Example:
      >>> segments = bj.preferences.Segments(jnp.zeros((2, 5)), jnp.zeros((2, 5)), valid=jnp.ones((2, 5), bool))
      >>> old = bj.preferences.Preferences(segments, [[0, 1]], [1.0], sources=("old",))
      >>> new = bj.preferences.Preferences(segments, [[0, 1]], sources=("new",))
      >>> both = bj.preferences.concatenate(old, new)
      >>> both.pairs.tolist(), both.sources
      ([[0, 1], [2, 3]], ('old', 'new'))
    """
    if not parts:
        raise InputError("parts: expected at least one data set")
    sources = tuple(dict.fromkeys(name for part in parts for name in part.sources))
    starts = np.cumsum([0, *(part.segments.count for part in parts)])
    made = [
        (part.pairs + np.int32(start), part.label, part.weight, _renamed(part, sources), part.iteration)
        for part, start in zip(parts, starts, strict=False)
    ]
    dtypes = sorted({part.label.dtype.name for part in parts})
    if len(dtypes) > 1:
        raise InputError(f"parts: their labels are of {' and '.join(dtypes)}; convert them to one")
    pairs, label, weight, source, iteration = (jnp.concatenate(column) for column in zip(*made, strict=True))
    segments = _joined([part.segments for part in parts])
    return Preferences(segments, pairs, label, weight, source, iteration, sources)


def subset(preferences: Preferences, index: Integer[ArrayLike, " K"] | Any) -> Preferences:
    """Return the pairs of these numbers; all segments stay. It works inside jit, for a minibatch, and on booleans [P]
    outside.

    Raises:
      InputError: numbers that are known to be out of range; traced ones are moved into it.

    Example:
      >>> segments = bj.preferences.Segments(jnp.zeros((3, 5)), jnp.zeros((3, 5)), valid=jnp.ones((3, 5), bool))
      >>> data = bj.preferences.Preferences(segments, [[0, 1], [1, 2], [0, 2]])
      >>> bj.preferences.subset(data, [2, 0]).pairs.tolist()
      [[0, 2], [0, 1]]
    """
    if getattr(index, "dtype", None) == np.dtype(bool):
        if np.shape(index) != (preferences.count,):
            raise InputError(f"index: expected booleans [{preferences.count}], got shape {list(np.shape(index))}")
        index = np.flatnonzero(np.asarray(index))
    index = as_integer("index", np.zeros(0, np.int32) if np.size(index) == 0 else index, "give numbers of pairs")
    require_index("index", index, preferences.count)
    taken = [jnp.take(column, index, axis=0, mode="clip") for column in _columns(preferences)]
    return eqx.tree_at(_columns, preferences, tuple(taken))


def compacted(preferences: Preferences) -> Preferences:
    """Return the same pairs without segments that are in none of them. Not for use inside jit: the sizes change.

    Example:
      >>> segments = bj.preferences.Segments(jnp.zeros((3, 5)), jnp.zeros((3, 5)), valid=jnp.ones((3, 5), bool))
      >>> data = bj.preferences.compacted(bj.preferences.Preferences(segments, [[2, 1]]))
      >>> data.segments.count, data.pairs.tolist()
      (2, [[1, 0]])
    """
    used, places = np.unique(np.asarray(preferences.pairs), return_inverse=True)
    segments = jax.tree.map(lambda leaf: leaf[used], preferences.segments)
    pairs = jnp.asarray(places.reshape(-1, 2), jnp.int32)
    return eqx.tree_at(lambda data: (data.segments, data.pairs), preferences, (segments, pairs))


def split(key: PRNGKeyArray, preferences: Preferences, held_out: float | int) -> tuple[Preferences, Preferences]:
    """Draw pairs to hold out; return those to train on, and those held out.

    The split is by pair. Pairs that share a segment may lie on both sides: where segments are in many pairs, what is
    held out says how well *labels* are predicted, not how well new segments are.

    Args:
      held_out: how many, an integer from 1 to P - 1, or which part of all, a number above 0 and below 1 (static).

    Raises:
      InputError: a side would be empty.

    Example:
      >>> segments = bj.preferences.Segments(jnp.zeros((3, 5)), jnp.zeros((3, 5)), valid=jnp.ones((3, 5), bool))
      >>> data = bj.preferences.Preferences(segments, [[0, 1], [1, 2], [0, 2]])
      >>> train, held_out = bj.preferences.split(jax.random.key(0), data, 1)
      >>> train.count, held_out.count
      (2, 1)
    """
    count = preferences.count
    fraction = isinstance(held_out, float) and 0 < held_out < 1
    size = round(held_out * count) if fraction else as_size("held_out", held_out, "or give a part of all, below 1")
    if not 1 <= size < count:
        raise InputError(f"held_out: {held_out} of {count} pairs leave a side empty; give an integer from 1 to P - 1")
    order = jax.random.permutation(key, jnp.arange(count, dtype=jnp.int32))
    return subset(preferences, jnp.sort(order[size:])), subset(preferences, jnp.sort(order[:size]))


def minibatches(key: PRNGKeyArray, preferences: Preferences, size: int) -> Int32[Array, "batches size"]:
    """Return the numbers of the pairs of each minibatch of one epoch, in a random order, for `subset`.

    There are P // size minibatches; the P % size pairs that are left over are others in each epoch.

    Raises:
      InputError: size is not an integer from 1 to P.

    Example:
      >>> segments = bj.preferences.Segments(jnp.zeros((3, 5)), jnp.zeros((3, 5)), valid=jnp.ones((3, 5), bool))
      >>> data = bj.preferences.Preferences(segments, [[0, 1], [1, 2], [0, 2]])
      >>> bj.preferences.minibatches(jax.random.key(0), data, 2).shape
      (1, 2)
    """
    if as_size("size", size) > preferences.count:
        raise InputError(f"size: expected 1 to the {preferences.count} pairs that there are, got {size}")
    batches = preferences.count // size
    order = jax.random.permutation(key, jnp.arange(preferences.count, dtype=jnp.int32))
    return order[: batches * size].reshape(batches, size)


class PreferenceBuffer(eqx.Module):
    """The last `capacity` pairs that were added, each with its two segments; all methods work inside jit.

    Args:
      like: a data set whose segments and dtypes the pairs have; nothing of it is stored.
      capacity: how many pairs there is room for (static). The oldest are overwritten first.
      sources: the names of all kinds of pairs that will come (static); None: those of `like`.

    Example:
      >>> segments = bj.preferences.Segments(jnp.zeros((3, 5)), jnp.zeros((3, 5)), valid=jnp.ones((3, 5), bool))
      >>> data = bj.preferences.Preferences(segments, [[0, 1], [1, 2]], [1.0, 0.0])
      >>> buffer = bj.preferences.PreferenceBuffer(data, capacity=3).add(data).add(data)
      >>> buffer.preferences().label.tolist()  # the newest first
      [0.0, 1.0, 0.0]
    """

    ring: Ring
    sources: tuple[str, ...] = eqx.field(static=True)

    def __init__(self, like: Preferences, capacity: int, sources: tuple[str, ...] | None = None):
        self.sources = like.sources if sources is None else tuple(sources)
        items = jax.eval_shape(lambda like: _items(like, self.sources), like)
        self.ring = init(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), items), capacity)

    def add(self, preferences: Preferences, when: Bool[Array, ""] | bool = True) -> "PreferenceBuffer":
        """Return the buffer with more pairs, 1 to `capacity`; the last one is the newest. Where `when` is False, which
        may be traced, nothing is added.

        Raises:
          InputError: segments of another kind, too many pairs, or a source that the buffer does not know.
        """
        return eqx.tree_at(lambda buffer: buffer.ring, self, add(self.ring, _items(preferences, self.sources), when))

    @property
    def judged(self) -> Int32[Array, ""]:
        """The number of pairs that have a weight."""
        return jnp.sum(self.ring.items["weight"] > 0, dtype=jnp.int32)

    def draw(self, key: PRNGKeyArray, count: int) -> Preferences:
        """Return `count` pairs (static) drawn from those that have a weight, with replacement; only these are copied.
        If there are none, they have weight 0.

        Example:
          >>> segments = bj.preferences.Segments(jnp.zeros((3, 5)), jnp.zeros((3, 5)), valid=jnp.ones((3, 5), bool))
          >>> data = bj.preferences.Preferences(segments, [[0, 1], [1, 2]], [1.0, 0.0])
          >>> buffer = bj.preferences.PreferenceBuffer(data, capacity=100).add(data)
          >>> buffer.draw(jax.random.key(0), 4).count
          4
        """
        places = _places(key, self.ring.items["weight"], count)
        return self._of(jax.tree.map(lambda leaf: leaf[places], self.ring.items))

    def preferences(self) -> Preferences:
        """All places as a data set of `capacity` pairs, newest first; those not yet filled have weight 0."""
        items, here = latest(self.ring)
        label, weight = jnp.where(here, items["label"], TIE), jnp.where(here, items["weight"], 0)
        return self._of({**items, "label": label, "weight": weight})

    def _of(self, items: dict[str, Any]) -> Preferences:
        count = items["label"].shape[0]
        number = jnp.arange(count, dtype=jnp.int32)
        return Preferences(
            _joined([items["first"], items["second"]]),
            jnp.stack([number, number + count], -1),
            items["label"],
            items["weight"],
            items["source"],
            items["iteration"],
            self.sources,
        )


def draw(key: PRNGKeyArray, preferences: Preferences, count: int) -> Preferences:
    """Return `count` pairs (static) drawn from those that have a weight, with replacement, and only their segments.

    Pair p is of segments p and count + p. If no pair has a weight, those that are drawn have none. It works inside jit.

    Example:
      >>> segments = bj.preferences.Segments(jnp.zeros((3, 5)), jnp.zeros((3, 5)), valid=jnp.ones((3, 5), bool))
      >>> data = bj.preferences.Preferences(segments, [[0, 1], [1, 2]], [1.0, 0.0])
      >>> bj.preferences.draw(jax.random.key(0), data, 4).pairs.tolist()
      [[0, 4], [1, 5], [2, 6], [3, 7]]
    """
    drawn = subset(preferences, _places(key, preferences.weight, count))
    sides = jnp.concatenate([drawn.pairs[:, 0], drawn.pairs[:, 1]])
    segments = jax.tree.map(lambda leaf: leaf[sides], drawn.segments)
    number = jnp.arange(count, dtype=jnp.int32)
    pairs = jnp.stack([number, number + count], -1)
    return eqx.tree_at(lambda data: (data.segments, data.pairs), drawn, (segments, pairs))


def _places(key: PRNGKeyArray, weight: Float[Array, " P"], count: int) -> Int32[Array, " count"]:
    """Places [count], drawn evenly from those that have a weight, or from all if none has."""
    chance = (weight > 0).astype(weight.dtype)
    chance = jnp.where(jnp.any(chance > 0), chance, 1)
    index = jax.random.choice(key, weight.shape[0], (count,), p=chance / jnp.sum(chance))
    return index.astype(jnp.int32)


def _items(preferences: Preferences, sources: tuple[str, ...]) -> dict[str, Any]:
    return {
        "first": preferences.first,
        "second": preferences.second,
        "label": preferences.label,
        "weight": preferences.weight,
        "source": _renamed(preferences, sources),
        "iteration": preferences.iteration,
    }


def _columns(preferences: Preferences) -> tuple[Any, ...]:
    """The arrays that have an entry for each pair."""
    return (
        preferences.pairs,
        preferences.label,
        preferences.weight,
        preferences.source,
        preferences.iteration,
    )


def _renamed(preferences: Preferences, sources: tuple[str, ...]) -> Int32[Array, " P"]:
    """Each pair's source as its place in other names."""
    unknown = [name for name in preferences.sources if name not in sources]
    if unknown:
        raise InputError(f"sources: {unknown[0]!r} is none of {', '.join(sources)}; name all when you make the buffer")
    table = jnp.asarray([sources.index(name) for name in preferences.sources], jnp.int32)
    return table[preferences.source]


def _joined(parts: list[Segments]) -> Segments:
    structures = [jax.tree.structure(part) for part in parts]
    for other in structures[1:]:
        if other != structures[0]:
            raise InputError(f"segments: their structures differ, {structures[0]} and {other}; make them alike")
    for paths in zip(*(jax.tree_util.tree_leaves_with_path(part) for part in parts), strict=True):
        kinds = sorted({f"{leaf.dtype}{['N', *leaf.shape[1:]]}".replace("'", "") for _, leaf in paths})
        if len(kinds) > 1:
            name = jax.tree_util.keystr(paths[0][0])
            raise InputError(f"segments{name}: {' and '.join(kinds)} cannot be joined; convert one")
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _per_pair(name: str, value: Any, count: tuple[int, ...]) -> Int32[Array, " P"]:
    array = as_integer(name, value, "give one for each pair, or one for all")
    if array.shape not in ((), count):
        raise InputError(f"{name}: expected one for each pair, {list(count)}, or one, got shape {list(array.shape)}")
    return jnp.broadcast_to(array, count)
