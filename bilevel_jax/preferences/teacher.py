"""A teacher that compares two segments by a reward that the learner does not see."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.promotion import with_rank
from bilevel_jax.core.validation import as_float, is_known, require_at_least, require_finite
from bilevel_jax.preferences.bradley_terry import FIRST, SECOND, TIE, gain_of


class Teacher(eqx.Module):
    """A noisily rational teacher with ties (Rao and Kupper 1967) who sometimes guesses (Lee et al. 2021, B-Pref).

    With d = return_1 - return_2, and with probability 1 - noise,
      P(first) = sigmoid(rationality (d - tie_threshold)),
      P(second) = sigmoid(-rationality (d + tie_threshold)),
    and a tie otherwise; with probability noise, a fair coin between first and second. A tie_threshold of
    0 makes it the Bradley-Terry model, which never ties. The rule is smooth: the higher the rationality,
    the closer it comes to a tie where |d| < tie_threshold and to the better segment elsewhere.

    Args:
      rationality: inverse temperature, at least 0, in units of 1 / reward.
      noise: probability that the label is a guess, in [0, 1].
      tie_threshold: returns closer than this are mostly declared a tie, at least 0.

    Raises:
      InputError: a value out of range (where it is known), or one that is no number.

    Example:
      >>> teacher = bj.preferences.Teacher(rationality=1.0, noise=0.0, tie_threshold=0.0)
      >>> float(teacher.mean_label(jnp.asarray(2.0), jnp.asarray(2.0)))
      0.5
    """

    rationality: Float[Array, ""]
    noise: Float[Array, ""]
    tie_threshold: Float[Array, ""]

    def __init__(
        self,
        rationality: Real[ArrayLike, ""] | Any = 1.0,
        noise: Real[ArrayLike, ""] | Any = 0.0,
        tie_threshold: Real[ArrayLike, ""] | Any = 0.0,
    ):
        self.rationality = _number("rationality", rationality, "0 is a teacher who always guesses")
        self.noise = _number("noise", noise, "0 is none, 1 guesses only")
        self.tie_threshold = _number("tie_threshold", tie_threshold, "0 never ties")
        if is_known(self.noise) and float(self.noise) > 1:
            raise InputError(f"noise must be at most 1, got {float(self.noise):g}; 0 is none, 1 guesses only")

    def probabilities(
        self, return_1: Real[ArrayLike, "*#batch"] | Any, return_2: Real[ArrayLike, "*#batch"] | Any
    ) -> Float[Array, "*batch 3"]:
        """Return the probabilities of the labels first, tie and second, [..., 3], from returns [...] under the
        teacher's reward.
        """
        gain = self._gain(return_1, return_2)
        rationality, noise, threshold = (leaf.astype(gain.dtype) for leaf in self._leaves())
        u, v = rationality * gain, rationality * threshold
        first, second = jax.nn.sigmoid(u - v), jax.nn.sigmoid(-u - v)
        # 1 - first - second, without cancellation
        tie = -jnp.expm1(-2 * v) * jax.nn.sigmoid(u + v) * jax.nn.sigmoid(v - u)
        considered = jnp.stack([first, tie, second], -1)
        return (1 - noise) * considered + noise * with_rank(jnp.array([0.5, 0, 0.5], gain.dtype), considered.ndim)

    def mean_label(
        self, return_1: Real[ArrayLike, "*#batch"] | Any, return_2: Real[ArrayLike, "*#batch"] | Any
    ) -> Float[Array, "*batch"]:
        """P(first) + P(tie) / 2, the expected label, [...]."""
        gain = self._gain(return_1, return_2)
        rationality, noise, threshold = (leaf.astype(gain.dtype) for leaf in self._leaves())
        u, v = rationality * gain, rationality * threshold
        considered = (jax.nn.sigmoid(u - v) + jax.nn.sigmoid(u + v)) / 2
        return (1 - noise) * considered + noise / 2

    def label(
        self, key: PRNGKeyArray, return_1: Real[ArrayLike, "*#batch"] | Any, return_2: Real[ArrayLike, "*#batch"] | Any
    ) -> Float[Array, "*batch"]:
        """Draw labels [...]: 1 for first, 1/2 for a tie, 0 for second."""
        probabilities = self.probabilities(return_1, return_2)
        number = jax.random.uniform(key, probabilities.shape[:-1], probabilities.dtype)
        first, tie = probabilities[..., 0], probabilities[..., 1]
        labels = jnp.array([FIRST, TIE, SECOND], probabilities.dtype)
        return jnp.where(number < first, labels[0], jnp.where(number < first + tie, labels[1], labels[2]))

    def _gain(self, return_1: Any, return_2: Any) -> Float[Array, "*batch"]:
        return gain_of(return_1, return_2)

    def _leaves(self) -> tuple[Float[Array, ""], ...]:
        return self.rationality, self.noise, self.tie_threshold


def _number(name: str, value: Any, remedy: str) -> Float[Array, ""]:
    number = as_float(name, value, float)
    if number.shape != ():
        raise InputError(f"{name}: expected a number, got shape {list(number.shape)}; vmap over teachers instead")
    require_finite(name, number)
    require_at_least(name, number, 0, remedy)
    return number
