"""Which pairs to ask about, and how many at which iteration."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int32, Integer, PRNGKeyArray, Real

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import as_float, as_integer, as_size, require_positive
from bilevel_jax.preferences.bradley_terry import preference_probability

Schedule = Literal["constant", "decaying", "at_once"]


def label_counts(
    total: int,
    iterations: int,
    schedule: Schedule = "constant",
    *,
    initial: int = 0,
    scale: float = 1.0,
) -> tuple[int, ...]:
    """Return how many labels to ask for at each iteration; they sum to `total`. Numbers of Python, for static sizes.

    Args:
      total: the budget of labels.
      iterations: T.
      schedule: "constant"; "decaying", in proportion to 1 / (1 + t / scale) as in Christiano et al. 2017 (A.1), who had
        more labels early; "at_once", all at the first iteration.
      initial: labels at the first iteration in addition to its share of the others, at most `total`.
      scale: iterations until the decaying rate has halved, above 0.

    Raises:
      InputError: numbers out of range, or an unknown schedule.

    Example:
      >>> bj.preferences.label_counts(12, 4, "decaying")
      (6, 3, 2, 1)
      >>> bj.preferences.label_counts(10, 4, initial=6)
      (7, 1, 1, 1)
    """
    total, iterations = as_size("total", total, least=0), as_size("iterations", iterations)
    initial = as_size("initial", initial, "at most the total", least=0)
    if initial > total:
        raise InputError(f"initial: expected at most the total of {total}, got {initial}")
    if schedule not in ("constant", "decaying", "at_once"):
        raise InputError(f"schedule: expected constant, decaying or at_once, got {schedule!r}")
    require_positive("scale", np.asarray(scale, np.float64), "1 has half as many labels at the second iteration")
    steps = np.arange(iterations)
    rates = {
        "constant": np.ones(iterations),
        "decaying": 1 / (1 + steps / float(scale)),
        "at_once": (steps == 0).astype(float),
    }[schedule]
    # Sums are rounded, not rates: so the total is exact, and no iteration is off by one or more.
    sums = [math.floor(part * (total - initial) + 0.5) for part in np.cumsum(rates) / rates.sum()]
    sums[-1] = total - initial
    counts = np.diff([0, *sums]).tolist()
    return (counts[0] + initial, *counts[1:])


def uniform_pairs(key: PRNGKeyArray, segments: int, count: int) -> Int32[Array, "count 2"]:
    """Draw different pairs of different segments, all equally likely, in a random order within the pair; [count, 2].

    Args:
      segments: N, how many there are.
      count: at most N (N - 1) / 2; both static.

    Raises:
      InputError: fewer than two segments, or more pairs than there are.

    Example:
      >>> bj.preferences.uniform_pairs(jax.random.key(0), 10, 4).shape
      (4, 2)
    """
    segments, count = as_size("segments", segments, least=2), as_size("count", count)
    most = segments * (segments - 1) // 2
    if count > most:
        raise InputError(f"count: there are {most} pairs of {segments} segments, got {count}")
    order, flips = jax.random.split(key)
    if most <= max(16 * count, 4096):
        number = jax.random.permutation(order, jnp.arange(most, dtype=jnp.int32))[:count]
        rows, columns = (jnp.asarray(side, jnp.int32) for side in np.triu_indices(segments, 1))
        first, second = rows[number], columns[number]
    else:
        first, second = _by_rejection(order, segments, count)
    swap = jax.random.bernoulli(flips, 0.5, (count,))
    return jnp.stack([jnp.where(swap, second, first), jnp.where(swap, first, second)], -1)


def near_on_policy_pairs(
    key: PRNGKeyArray, iteration: Integer[ArrayLike, " N"] | Any, count: int, *, newest: int
) -> Int32[Array, "count 2"]:
    """Draw pairs among the `newest` segments, those of the present policy or nearly so; [count, 2].

    Args:
      iteration: at which each segment was made, [N]. Segments of one iteration are equally new: if only some of them
        fit, the key draws which.
      count: how many pairs; `newest`: among how many segments (static).

    Raises:
      InputError: more newest segments than there are, fewer than two, or more pairs than they make.

    Example:
      >>> pairs = bj.preferences.near_on_policy_pairs(jax.random.key(0), [0, 0, 1, 2, 2], 2, newest=3)
      >>> bool((pairs >= 2).all())
      True
    """
    iteration = as_integer("iteration", iteration, "give that at which each segment was made")
    if iteration.ndim != 1:
        raise InputError(f"iteration: expected one for each segment, [N], got shape {list(iteration.shape)}")
    if as_size("newest", newest, least=2) > iteration.size:
        raise InputError(f"newest: there are {iteration.size} segments, got {newest}")
    ties, pairs = jax.random.split(key)
    latest = _highest(ties, iteration, newest)
    return latest[uniform_pairs(pairs, newest, count)]


def disagreement(gain: Real[ArrayLike, "M C"] | Any) -> Float[Array, " C"]:
    """Return how much an ensemble disagrees on each candidate: the standard deviation of P(first) over members, [C].

    Christiano et al. 2017 and B-Pref ask about the pairs on which it is largest.

    Args:
      gain: of each candidate under each member, [M, C]: `gains` times the rationality.

    Raises:
      InputError: another shape.

    Example:
      >>> bj.preferences.disagreement(jnp.array([[9.0, 9.0], [9.0, -9.0]])).round(2).tolist()
      [0.0, 0.5]
    """
    gain = as_float("gain", gain)
    if gain.ndim != 2:
        raise InputError(f"gain: expected [members, candidates], got shape {list(gain.shape)}")
    return jnp.std(preference_probability(gain, jnp.zeros_like(gain)), 0)


def select(key: PRNGKeyArray, scores: Real[ArrayLike, " C"] | Any, count: int) -> Int32[Array, " count"]:
    """Return the numbers of the `count` candidates with the highest scores, highest first.

    Candidates of equal scores come in an order that the key draws; the order in which they are given never counts.
    NaN comes last.

    Args:
      scores: such as `disagreement`, [C].
      count: at most C (static).

    Raises:
      InputError: more than there are, or another shape.

    Example:
      >>> bj.preferences.select(jax.random.key(0), jnp.array([0.1, 0.5, 0.3]), 2).tolist()
      [1, 2]
    """
    scores = as_float("scores", scores)
    if scores.ndim != 1:
        raise InputError(f"scores: expected one for each candidate, [C], got shape {list(scores.shape)}")
    if as_size("count", count) > scores.size:
        raise InputError(f"count: there are {scores.size} candidates, got {count}")
    return _highest(key, jnp.where(jnp.isnan(scores), -jnp.inf, scores), count)


def _highest(key: PRNGKeyArray, scores: Real[Array, " C"], count: int) -> Int32[Array, " count"]:
    shuffled = jax.random.permutation(key, jnp.arange(scores.size, dtype=jnp.int32))
    order = jnp.argsort(-scores[shuffled], stable=True)
    return shuffled[order[:count]]


def _by_rejection(
    key: PRNGKeyArray, segments: int, count: int
) -> tuple[Int32[Array, " count"], Int32[Array, " count"]]:
    """Draw different pairs without a list of all: draw until none of them is there twice."""

    def draw(key):
        one, two = jax.random.split(key)
        first = jax.random.randint(one, (count,), 0, segments, jnp.int32)
        other = jax.random.randint(two, (count,), 0, segments - 1, jnp.int32)
        second = other + (other >= first).astype(jnp.int32)
        return jnp.minimum(first, second), jnp.maximum(first, second)

    def repeated(first, second):
        order = jnp.lexsort((second, first))
        a, b = first[order], second[order]
        again = jnp.concatenate([jnp.zeros(1, bool), (a[1:] == a[:-1]) & (b[1:] == b[:-1])])
        return jnp.zeros(count, bool).at[order].set(again)

    def step(carry):
        key, first, second = carry
        key, now = jax.random.split(key)
        new = draw(now)
        bad = repeated(first, second)
        return key, jnp.where(bad, new[0], first), jnp.where(bad, new[1], second)

    key, now = jax.random.split(key)
    _, first, second = jax.lax.while_loop(lambda carry: jnp.any(repeated(*carry[1:])), step, (key, *draw(now)))
    return first, second
