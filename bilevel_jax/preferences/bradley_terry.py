"""The Bradley-Terry model (1952) of a preference: P(first over second) = sigmoid(return_1 - return_2)."""

from typing import Any

import jax
import jax.numpy as jnp

from bilevel_jax.validation import as_float

# 1: the first is better; 1/2: a tie; 0: the second is better
FIRST, TIE, SECOND = 1.0, 0.5, 0.0


def segment_return(rewards: jax.Array, valid: jax.Array) -> jax.Array:
    """The undiscounted sum of rewards [..., H] over valid steps [..., H], [...]. Others may hold anything, NaN too."""
    return jnp.sum(jnp.where(valid, as_float("rewards", rewards), 0), -1)


def preference_probability(return_1: jax.Array, return_2: jax.Array) -> jax.Array:
    """P(first over second), [...], from returns [...]."""
    return jax.nn.sigmoid(gain_of(return_1, return_2))


def log_likelihood(return_1: Any, return_2: Any, label: Any) -> jax.Array:
    """label log P(first over second) + (1 - label) log P(second over first), [...]; at most 0.

    Args:
      return_1, return_2: [...], of the reward model.
      label: 1, 1/2 (a tie) or 0, [...], or anything between: since the likelihood is linear in it, a
        mean label gives the mean likelihood.

    Exact where the probabilities round to 0 or 1, and as smooth at equal returns as elsewhere.
    """
    gain = gain_of(return_1, return_2)
    return _log_likelihood(*jnp.broadcast_arrays(gain, as_float("label", label, gain.dtype)))


def gain_of(return_1: Any, return_2: Any) -> jax.Array:
    """What the first of two segments has more than the second, [...]."""
    first, second = jnp.broadcast_arrays(as_float("return_1", return_1), as_float("return_2", return_2))
    return first - second


# One exponential and one logarithm a pair, where two log-sigmoids would take twice that.
@jax.custom_jvp
def _log_likelihood(gain, label):
    lost = label * jnp.maximum(-gain, 0) + (1 - label) * jnp.maximum(gain, 0)
    return -(lost + jnp.log1p(jnp.exp(-jnp.abs(gain))))


@_log_likelihood.defjvp
def _log_likelihood_jvp(primals, tangents):
    gain, label = primals
    gain_dot, label_dot = tangents
    slope = label * jax.nn.sigmoid(-gain) - (1 - label) * jax.nn.sigmoid(gain)
    return _log_likelihood(gain, label), slope * gain_dot + gain * label_dot
