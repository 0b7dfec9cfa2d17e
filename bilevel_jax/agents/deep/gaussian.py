"""Distributions over the actions of a box: a Gaussian, its image under tanh, and the uniform one."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Real

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import is_known
from bilevel_jax.environments import Box, Distribution

NODES = np.linspace(-7, 7, 129)
WEIGHTS = np.exp(-(NODES**2) / 2)
HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)
LOG_STD = (-5.0, 2.0)


class Gaussian(Distribution):
    """Independent normal entries, for boxes without bounds.

    Example:
      >>> gaussian = bj.agents.Gaussian(jnp.zeros(2), jnp.zeros(2))
      >>> round(float(gaussian.entropy()), 3)
      2.838
    """

    mean: Float[Array, "*shape"]
    log_std: Float[Array, "*shape"]

    def sample(self, key) -> Float[Array, "*shape"]:
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(self.log_std) * noise

    def sample_with_log_prob(self, key: PRNGKeyArray) -> tuple[Float[Array, "*shape"], Float[Array, ""]]:
        """Draw an action, with derivatives in the mean and the deviation, and the logarithm of its density."""
        action = self.sample(key)
        return action, self.log_prob(action)

    def log_prob(self, action: Real[Array, "*shape"]) -> Float[Array, ""]:
        return jnp.sum(self.log_densities(action))

    def log_densities(self, action: Real[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The logarithm of each entry's density."""
        distance = (action.astype(self.mean.dtype) - self.mean) * jnp.exp(-self.log_std)
        return -(distance**2 / 2 + self.log_std + HALF_LOG_TAU)

    def entropy(self) -> Float[Array, ""]:
        return jnp.sum(self.log_std + HALF_LOG_TAU + 0.5)

    def mode(self) -> Float[Array, "*shape"]:
        return self.mean


class TanhGaussian(Distribution):
    """The points mid + half tanh(u) of a box, u independent normal entries; mid and half are those of [low, high].

    Its density is with respect to the actions, not to u:

      log p(a) = log N(u; mean, std) - log half - log(1 - tanh(u)^2),   summed over the entries.

    Where 1 - |tanh(u)| is below 8 of the spacings of numbers at 1, or of actions at the bounds, the action is the
    bound, and u cannot be read off it. The density of a bound is then the probability of all these u, divided by the
    length that they stand for: ratios of the densities of two policies are those of the probabilities of what was seen.

    Args:
      mean, log_std: of u.
      low, high: bounds of the box, finite, low below high. Actions have their dtype.

    Example:
      >>> bounds = jnp.array([0.0]), jnp.array([2.0])
      >>> squashed = bj.agents.TanhGaussian(jnp.zeros(1), jnp.zeros(1), *bounds)
      >>> bool(jnp.isfinite(squashed.log_prob(jnp.array([2.0]))))
      True
    """

    mean: Float[Array, "*shape"]
    log_std: Float[Array, "*shape"]
    low: Float[Array, "*shape"]
    high: Float[Array, "*shape"]

    def sample(self, key) -> Float[Array, "*shape"]:
        return self._action(self._before.sample(key))

    def sample_with_log_prob(self, key: PRNGKeyArray) -> tuple[Float[Array, "*shape"], Float[Array, ""]]:
        """Draw an action, with derivatives in the mean and the deviation, and the logarithm of its density by the
        formula, computed from u: where the action is a bound, too.
        """
        u = self._before.sample(key)
        return self._action(u), jnp.sum(self._log_densities(u))

    def log_prob(self, action: Real[Array, "*shape"]) -> Float[Array, ""]:
        mid, half = self._mid_half()
        margin = self._margin()
        place = (action.astype(half.dtype) - mid) / half
        at_bound = jnp.abs(place) > 1 - margin / 2
        last = _arctanh_from_one(margin)
        u = jnp.where(at_bound, 0, jnp.arctanh(jnp.clip(place, margin - 1, 1 - margin)))
        beyond = jax.scipy.special.log_ndtr((jnp.sign(place) * self.mean - last) * jnp.exp(-self.log_std))
        return jnp.sum(jnp.where(at_bound, beyond - jnp.log(margin) - jnp.log(half), self._log_densities(u)))

    def entropy(self) -> Float[Array, ""]:
        """That of u, plus the mean of log(1 - tanh(u)^2), for which there is no formula: it is a trapezoidal sum of 129
        nodes up to 7 deviations of u away, for each entry. Its error is below 1e-9 for deviations of u up to 4, and
        below 1e-5 up to e^2, the largest that a network's outputs stand for.
        """

        def at(node: Float[Array, ""]) -> Float[Array, "*shape"]:
            return _log_slope(self.mean + jnp.exp(self.log_std) * node)

        nodes, weights = jnp.asarray(NODES, self.mean.dtype), jnp.asarray(WEIGHTS / WEIGHTS.sum(), self.mean.dtype)
        slopes = jnp.tensordot(weights, jax.vmap(at)(nodes), 1)
        return self._before.entropy() + jnp.sum(jnp.log(self._mid_half()[1]) + slopes)

    def mode(self) -> Float[Array, "*shape"]:
        """The image of the mean of u, which is the median of each entry."""
        return self._action(self.mean)

    @property
    def _before(self) -> Gaussian:
        """The distribution of u."""
        return Gaussian(self.mean, self.log_std)

    def _mid_half(self) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
        low, high = self.low.astype(self.mean.dtype), self.high.astype(self.mean.dtype)
        return low / 2 + high / 2, high / 2 - low / 2

    def _action(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        mid, half = self._mid_half()
        inner = jnp.clip((mid + half * jnp.tanh(u)).astype(self.low.dtype), self.low, self.high)
        last = _arctanh_from_one(self._margin())
        return jnp.where(u > last, self.high, jnp.where(u < -last, self.low, inner))

    def _margin(self) -> Float[Array, "*shape"]:
        """1 - |tanh(u)| from which on the action is the bound."""
        _, half = self._mid_half()
        largest = jnp.maximum(jnp.abs(self.low), jnp.abs(self.high)).astype(half.dtype)
        spacing = max(float(jnp.finfo(dtype).eps) for dtype in (half.dtype, self.low.dtype))
        return jnp.minimum(8 * spacing * jnp.maximum(1, largest / half), 0.5)

    def _log_densities(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return self._before.log_densities(u) - jnp.log(self._mid_half()[1]) - _log_slope(u)


class Uniform(Distribution):
    """The uniform distribution on a bounded box.

    Example:
      >>> uniform = Uniform(jnp.zeros(2), jnp.full(2, 2.0))
      >>> round(float(uniform.entropy()), 3)
      1.386
    """

    low: Float[Array, "*shape"]
    high: Float[Array, "*shape"]

    def sample(self, key) -> Float[Array, "*shape"]:
        part = jax.random.uniform(key, self.low.shape, self.low.dtype)
        return jnp.clip(self.low + part * (self.high - self.low), self.low, self.high)

    def log_prob(self, action: Real[Array, "*shape"]) -> Float[Array, ""]:
        inside = jnp.all((action >= self.low) & (action <= self.high))
        return jnp.where(inside, -self.entropy(), -jnp.inf)

    def entropy(self) -> Float[Array, ""]:
        return jnp.sum(jnp.log(self.high - self.low))


def of_numbers(numbers: Float[Array, " n"], space: Box, *, squash: bool) -> Gaussian | TanhGaussian:
    """The distribution that a network's outputs [2 d] stand for: means, and then logarithms of deviations, which are
    kept from -5 to 2 by a tanh.
    """
    mean, raw = jnp.reshape(numbers, (2, *space.shape))
    least, most = LOG_STD
    log_std = least + (most - least) / 2 * (jnp.tanh(raw) + 1)
    return TanhGaussian(mean, log_std, space.low, space.high) if squash else Gaussian(mean, log_std)


def require_box(space: Any, who: str, *, squash: bool) -> Box:
    """Return the action space, if it is a box that is bounded, or without `squash` one that is open on all sides.
    Raises InputError.
    """
    if not isinstance(space, Box):
        raise InputError(
            f"environment: {who} needs actions that are a Box, got {space}; use SoftActorCritic or SoftPQN"
        )
    if not is_known(space.low, space.high):
        return space
    low, high = np.asarray(space.low), np.asarray(space.high)
    if squash and not (np.isfinite(low) & np.isfinite(high) & (low < high)).all():
        raise InputError(
            f"environment: the actions are from {low} to {high}, but the policy's need finite bounds, low below high; "
            f"give bounds, or where there are none squash=False"
        )
    if not squash and (np.isfinite(low) | np.isfinite(high)).any():
        raise InputError(
            f"environment: the actions are from {low} to {high}, and a Gaussian knows no bounds; use squash=True"
        )
    return space


def _arctanh_from_one(margin: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """arctanh(1 - margin)."""
    return jnp.log((2 - margin) / margin) / 2


def _log_slope(u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """log(1 - tanh(u)^2), to all digits."""
    size = jnp.abs(u)
    return 2 * (math.log(2.0) - size - jnp.log1p(jnp.exp(-2 * size)))
