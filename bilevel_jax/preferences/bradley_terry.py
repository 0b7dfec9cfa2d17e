"""The Bradley-Terry model (1952) of a preference: P(first over second) = sigmoid(return_1 - return_2)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from bilevel_jax.core.validation import as_float

# 1: the first is better; 1/2: a tie; 0: the second is better
FIRST, TIE, SECOND = 1.0, 0.5, 0.0


def segment_return(
    rewards: Real[ArrayLike, "*batch H"] | Any, valid: Bool[ArrayLike, "*batch H"]
) -> Float[Array, "*batch"]:
    """Return the undiscounted sum of rewards over valid steps.

    Steps that are not valid may hold anything, NaN too.

    Example:
      >>> float(bj.preferences.segment_return(jnp.array([1.0, 2.0, 4.0]), jnp.array([True, True, False])))
      3.0
    """
    return jnp.sum(jnp.where(valid, as_float("rewards", rewards), 0), -1)


def preference_probability(
    return_1: Real[ArrayLike, "*#batch"] | Any, return_2: Real[ArrayLike, "*#batch"] | Any
) -> Float[Array, "*batch"]:
    """Return P(first over second), [...], from returns [...].

    Example:
      >>> float(bj.preferences.preference_probability(jnp.asarray(1.0), jnp.asarray(1.0)))
      0.5
    """
    return jax.nn.sigmoid(gain_of(return_1, return_2))


def log_likelihood(
    return_1: Real[ArrayLike, "*#batch"] | Any,
    return_2: Real[ArrayLike, "*#batch"] | Any,
    label: Real[ArrayLike, "*#batch"] | Any,
) -> Float[Array, "*batch"]:
    """Return label log P(first over second) + (1 - label) log P(second over first), [...]; at most 0.

    It is exact where the probabilities round to 0 or 1, and as smooth at equal returns as elsewhere.

    Args:
      return_1, return_2: [...], the returns under the reward model.
      label: 1, 1/2 (a tie) or 0, [...], or any number between. Since the likelihood is linear in the label, a mean
        label gives the mean likelihood.

    Example:
      >>> round(float(bj.preferences.log_likelihood(2.0, 2.0, 1.0)), 3)  # -log 2
      -0.693
    """
    gain = gain_of(return_1, return_2)
    return _log_likelihood(*jnp.broadcast_arrays(gain, as_float("label", label, gain.dtype)))


def gain_of(
    return_1: Real[ArrayLike, "*#batch"] | Any, return_2: Real[ArrayLike, "*#batch"] | Any
) -> Float[Array, "*batch"]:
    """Return how much larger the first of two returns is, [...]."""
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
