"""Draws from finite distributions, and random numbers that depend on a key and a step alone."""

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.promotion import with_rank

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def uniform(key: jax.Array) -> jax.Array:
    """A number in [0, 1), float32 with 24 random bits."""
    return jax.random.uniform(key, dtype=jnp.float32)


def choose(number: jax.Array, probabilities: jax.Array) -> jax.Array:
    """The index that a uniform number in [0, 1) picks from probabilities[N]: the inverse distribution function.

    Never one of probability 0, whatever the rounding.
    """
    return pick(number, thresholds(probabilities))


@jax.jit
def thresholds(probabilities: jax.Array) -> jax.Array:
    """The cumulative sums of probabilities[..., N] in float32, infinite from the last possible index on.

    They need not sum to 1. Never decreasing, and an index of probability 0 repeats the threshold before it.
    """
    possible = probabilities > 0
    sums = jnp.cumsum(probabilities, -1)
    # A parallel sum rounds each entry in its own way: what is 0 may add something, and sums may decrease.
    sums = jax.lax.cummax(jnp.where(possible, sums / sums[..., -1:], -jnp.inf), sums.ndim - 1)
    count = probabilities.shape[-1]
    last = count - 1 - jnp.argmax(jnp.flip(possible, -1), -1)
    ends = jax.lax.broadcasted_iota(last.dtype, sums.shape, sums.ndim - 1) >= last[..., None]
    return jnp.where(ends, jnp.inf, sums).astype(jnp.float32)


def pick(number: jax.Array, thresholds: jax.Array) -> jax.Array:
    """How many of thresholds[..., N] the number reaches, int32."""
    rank = max(number.ndim + 1, thresholds.ndim)
    return jnp.sum(with_rank(number[..., None], rank) >= with_rank(thresholds, rank), -1, dtype=jnp.int32)


@jax.jit
def two_numbers(keys: jax.Array, count: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Two numbers in [0, 1) for each of keys[...], float32 with 24 random bits: the words of `fold_in(key, count)`.

    The words of a folded key are random bits themselves, so that one hash serves two draws. Written out,
    because the CPU's own `fold_in` is a loop over its rounds, which costs more than the rest of a step.
    Keys of another kind than threefry serve as one of threefry.
    """
    words = jax.random.key_data(keys)
    key = words[..., 0], words[..., 1]
    schedule = (*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    left, right = schedule[0], schedule[1] + jnp.asarray(count, jnp.uint32)
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            left = left + right
            right = (right << np.uint32(rotation)) | (right >> np.uint32(32 - rotation))
            right = right ^ left
        left = left + schedule[(group + 1) % 3]
        right = right + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return _fraction(left), _fraction(right)


def _fraction(word: jax.Array) -> jax.Array:
    return (word >> np.uint32(8)).astype(jnp.float32) * np.float32(2.0**-24)
