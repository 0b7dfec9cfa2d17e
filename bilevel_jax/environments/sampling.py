"""Draws from finite distributions, and random numbers that depend on a key and a step alone."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Integer, Key, PRNGKeyArray, UInt32

from bilevel_jax.core.promotion import with_rank

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def uniform(key: PRNGKeyArray) -> Float32[Array, ""]:
    """A number in [0, 1), float32 with 24 random bits."""
    return jax.random.uniform(key, dtype=jnp.float32)


def choose(number: Float[Array, "*batch"], probabilities: Float[Array, " N"]) -> Int32[Array, "*batch"]:
    """Return the index that each uniform number in [0, 1) picks from probabilities, by the inverse distribution
    function.

    It is never an index with probability 0, whatever the rounding.
    """
    return pick(number, thresholds(probabilities))


@jax.jit
def thresholds(probabilities: Float[Array, "*batch N"]) -> Float32[Array, "*batch N"]:
    """Return the cumulative sums of probabilities[..., N] in float32, infinite from the last possible index on.

    The probabilities need not sum to 1. The sums never decrease, and an index with probability 0 repeats the one before
    it.
    """
    possible = probabilities > 0
    sums = jnp.cumsum(probabilities, -1)
    # A parallel sum rounds each entry in its own way: what is 0 may add something, and sums may decrease.
    sums = jax.lax.cummax(jnp.where(possible, sums / sums[..., -1:], -jnp.inf), sums.ndim - 1)
    count = probabilities.shape[-1]
    last = count - 1 - jnp.argmax(jnp.flip(possible, -1), -1)
    ends = jax.lax.broadcasted_iota(last.dtype, sums.shape, sums.ndim - 1) >= last[..., None]
    return jnp.where(ends, jnp.inf, sums).astype(jnp.float32)


def pick(number: Float[Array, "*#batch"], thresholds: Float[Array, "*#batch N"]) -> Int32[Array, "*batch"]:
    """Return how many of thresholds[..., N] are at most the number, int32."""
    rank = max(number.ndim + 1, thresholds.ndim)
    return jnp.sum(with_rank(number[..., None], rank) >= with_rank(thresholds, rank), -1, dtype=jnp.int32)


@jax.jit
def two_numbers(
    keys: Key[Array, "*batch"] | UInt32[Array, "*batch 2"], count: Integer[Array, ""] | int
) -> tuple[Float32[Array, "*batch"], Float32[Array, "*batch"]]:
    """Return two numbers in [0, 1) for each of keys[...], float32 with 24 random bits: the words of `fold_in(key,
    count)`.

    The words of a folded key are random bits themselves, so that one hash serves two draws. The hash is written out
    here, because the CPU's own `fold_in` is a loop over its rounds, which costs more than the rest of a step. A key of
    another kind than threefry is used as if it were of that kind.
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


def _fraction(word: UInt32[Array, "*batch"]) -> Float32[Array, "*batch"]:
    return (word >> np.uint32(8)).astype(jnp.float32) * np.float32(2.0**-24)
