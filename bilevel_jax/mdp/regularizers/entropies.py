"""Shannon entropy and the divergence from a reference policy: softmax policies."""

import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from bilevel_jax.core import rounding
from bilevel_jax.core.arrays import Scalar
from bilevel_jax.core.derivatives import derivative_of
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.promotion import with_rank
from bilevel_jax.core.quotients import quotient
from bilevel_jax.core.reductions import argmax_last, is_first, is_subnormal, max_last, sum_last
from bilevel_jax.core.validation import as_float, is_known, require_distribution
from bilevel_jax.mdp.regularizers.protocol import (
    PerRow,
    Regularizer,
    Rows,
    below_best,
    is_available,
    require_temperature,
    usable,
)

# log1p of numbers below this is no better than log. XLA's in float64 is off by 120 units in the last place at -0.41.
NEAR = -0.25


class ShannonEntropy(Regularizer):
    """Omega(p) = temperature * sum_a p log p; Omega* = temperature * logsumexp(Q / temperature).

    Args:
      temperature: above 0, in units of the reward.

    Raises:
      InputError: temperature not above 0 (where it is known).

    Example:
      >>> bj.ShannonEntropy(1.0).policy(jnp.array([[0.0, 0.0]])).tolist()
      [[0.5, 0.5]]
    """

    def __init__(self, temperature: Real[ArrayLike, "*batch"] | Any):
        super().__init__(temperature)

    def conjugate(self, q):
        _, _, excess = self._weights(q)
        return stop_gradient(max_last(q)) + usable(self.temperature, q.dtype) * jnp.log1p(excess)

    def policy(self, q):
        _, weight, excess = self._weights(q)
        return weight / (1 + excess)[..., None]

    def penalty_at(self, q):
        """Return <pi, Q - max Q> - (Omega* - max Q), which needs no logarithm other than that of Omega*."""
        scaled, weight, excess = self._weights(q)
        temperature = jnp.asarray(self.temperature, q.dtype)
        return temperature * (sum_last(jnp.where(weight > 0, weight * scaled, 0)) / (1 + excess) - jnp.log1p(excess))

    def _weights(self, q: Rows) -> tuple[Rows, Rows, PerRow]:
        """(Q - max Q) / temperature, its exponential, [S, A], and their sum without the best one's 1, [S].

        Sums of one sign keep their digits. The best one's term in the sum has the value 0, and a derivative.
        """
        best = argmax_last(q)
        scaled = below_best(q, best, usable(self.temperature, q.dtype))
        weight = jnp.where(is_available(q), jnp.exp(scaled), 0)
        return scaled, weight, sum_last(weight - is_first(best, q).astype(q.dtype))

    def penalty(self, policy):
        temperature = jnp.asarray(self.temperature, policy.dtype)
        return temperature * sum_last(_xlogy(policy, policy))

    def linearized_policy(self, policy, q, value):
        """d pi = pi d[(q - value) / temperature], as in Yang, Gao and Yuan 2025."""
        advantage = jnp.where(is_available(q), q - value[..., None], 0)
        exponent = quotient(advantage, jnp.asarray(self.temperature, q.dtype))
        return stop_gradient(policy) * jnp.exp(exponent - stop_gradient(exponent))


class KLDivergence(Regularizer):
    """Omega(p) = temperature * KL(p | reference); Omega* = temperature * log sum ref exp(Q / temperature).

    An action with reference probability 0 is never taken. The reference may give probability to actions that are not
    available in a state: the sum in Omega* then leaves these actions out, and the probabilities of the others are used
    as they are, without dividing them by their sum. The sum of a row over all actions may miss 1 by rounding, and is
    divided out. The gradient in a row of the reference is defined up to a constant, since probabilities sum to 1. It is
    that of reference / sum(reference): compare it along directions that sum to 0. The gradient without this division
    would lose digits where the temperature is far above the action values.

    Args:
      temperature: above 0, in units of the reward.
      reference: the policy to stay close to, [S, A], or [A] for the same one in every state.

    Raises:
      InputError: temperature not above 0; reference negative, not summing to 1, or above 0 and below the smallest
        normal number (where known).

    Example:
      >>> regularizer = bj.KLDivergence(1.0, jnp.array([0.25, 0.75]))
      >>> regularizer.policy(jnp.array([[0.0, 0.0]])).tolist()
      [[0.25, 0.75]]
    """

    reference: Float[Array, " A"] | Float[Array, "*#batch S A"]

    def __init__(
        self,
        temperature: Real[ArrayLike, "*#batch"] | Any,
        reference: Real[ArrayLike, " A"] | Real[ArrayLike, "*#batch S A"] | Any,
    ):
        self.temperature = as_float("temperature", temperature)
        self.reference = as_float("reference", reference)
        if self.reference.ndim == 0:
            raise InputError("reference: expected probabilities of shape [S, A] or [A], got a number")
        self.validate()

    def validate(self):
        require_temperature(self.temperature)
        require_distribution("reference", self.reference, -1, "divide each row by its sum", "[state, action]")
        _require_normal(self.reference)

    def _reference(self, policy: Rows) -> Float[Array, "... A"]:
        """The reference with the axes and in the dtype of a policy or of action values.

        Subnormal numbers are 0: a device may take one for 0 in one place of a program and not in another.
        """
        reference = with_rank(jnp.asarray(self.reference, policy.dtype), policy.ndim)
        normal = ~(reference < float(jnp.finfo(policy.dtype).tiny))  # NaN, too
        return jnp.where(normal, reference, derivative_of(reference, ~normal))

    def highest(self, q):
        return max_last(jnp.where(self._reference(q) > 0, q, -jnp.inf))

    def spread(self, q, backup):
        """Return the spread of two sums, one over the actions and one of the reference.

        A logarithm of them that is not near 1 adds their rounding.
        """
        added, temperature = super().spread(q, backup), jnp.asarray(self.temperature, q.dtype)
        return 2 * added + jnp.where(added > -NEAR * temperature, 2.5 * temperature, 0)

    def _scaled(self, q: Rows) -> tuple[Rows, Scalar, Float[Array, "... A"]]:
        """(Q - max Q) / temperature, the temperature and the reference in q's dtype."""
        reference = self._reference(q)
        temperature = usable(self.temperature, q.dtype)
        # The maximum over actions that the reference allows; others must not set the scale.
        allowed = reference > 0
        scaled = below_best(q, argmax_last(jnp.where(allowed, q, -jnp.inf)), temperature, allowed)
        # Others may lie far above. Two derivatives in the temperature of the square root of exp(scaled) have to stay
        # finite, since they are multiplied by 0. Nothing is cut that is in the range of the derivative in `_others`.
        largest, below_one = math.log(float(jnp.finfo(q.dtype).max)), jnp.log(jnp.minimum(temperature, 1))
        most = jnp.minimum(2 * largest - 1, jnp.maximum(2 * (largest - 11 + 2 * below_one), largest - below_one))
        return jnp.where(allowed, scaled, jnp.minimum(scaled, most)), temperature, reference

    def conjugate(self, q):
        return stop_gradient(self.highest(q)) + self._excess(q)

    def _excess(self, q: Rows) -> PerRow:
        """temperature * log sum ref exp((Q - max Q) / temperature), [S], at most 0."""
        scaled, temperature, reference = self._scaled(q)
        available = is_available(q)
        # log(1 + sum) keeps its digits at high temperatures, log(sum) where one action prevails. The 1 is the sum of
        # the reference: rounding in it would be multiplied by the temperature, as its derivative would be.
        # A reference that sums to 1 + 1e-7, as one that was normalized in float32 may, is divided by its sum.
        mass = sum_last(reference)
        allowed, root = reference > 0, _root(scaled, available)
        others = sum_last(_others(root, reference, temperature))
        usual = available & allowed
        below = jnp.where(usual, jnp.expm1(jnp.where(usual, scaled, 0)), -1)
        shortfall = (sum_last(reference * below) + others) / mass
        weights, total = _weights(root, reference, temperature)
        near = shortfall > NEAR
        # The weights sum to 1, so that no derivative leaves the range on the way from the temperature to itself.
        log_far = stop_gradient(jnp.log(total / mass)) + derivative_of(jnp.log(sum_last(weights) / mass), ~near)
        log_total = jnp.where(near, jnp.log1p(jnp.where(near, shortfall, 0)), log_far)
        return temperature * log_total

    def policy(self, q):
        scaled, _, reference = self._scaled(q)
        weights, _ = _weights(_root(scaled, is_available(q)), reference, jnp.ones((), q.dtype))
        return weights / sum_last(weights)[..., None]

    def lost(self, q):
        """Return also what each action's part of the sum may lose, and what actions would add whose reference only a
        device takes for 0.
        """
        tiny, actions, reference = float(jnp.finfo(q.dtype).tiny), q.shape[-1], self._reference(q)
        best = argmax_last(jnp.where(reference > 0, q, -jnp.inf))
        least = sum_last(jnp.where(is_first(best, q), reference, 0))  # of the sum, whose parts were raised
        parts = 2 * actions * tiny + actions * tiny / _raised(q.dtype) / jnp.maximum(least, tiny)
        own = with_rank(self.reference, q.ndim)
        hidden = (is_subnormal(own) | (own > 0) & (own < tiny)) & is_available(q)
        above = jnp.where(hidden, q - self.highest(q)[..., None], -jnp.inf)
        exponent = max_last(above) / usable(self.temperature, q.dtype) + math.log(actions * tiny)
        return super().lost(q) + parts + jnp.logaddexp(0, exponent)

    def penalty(self, policy):
        temperature = jnp.asarray(self.temperature, policy.dtype)
        reference = self._reference(policy)
        surplus = jnp.log(sum_last(reference))
        return temperature * (sum_last(_xlogy(policy, policy) - _xlogy(policy, reference)) + surplus)

    def penalty_at(self, q):
        """Return <pi, Q - max Q> - (Omega* - max Q), where no summand has the temperature's size if pi is near the
        reference.
        """
        scaled, temperature, _ = self._scaled(q)
        policy = self.policy(q)
        return temperature * sum_last(jnp.where(policy > 0, policy * scaled, 0)) - self._excess(q)

    def event_ndim(self):
        own = min(self.reference.ndim, 2)
        return eqx.tree_at(lambda r: (r.temperature, r.reference), self, (0, own))

    def linearized_policy(self, policy, q, value):
        """d pi = pi d[(q - value) / temperature + log reference], the reference being divided by its sum."""
        reference = self._reference(q)
        log_reference = jnp.log(jnp.where(reference > 0, reference, 1)) - jnp.log(sum_last(reference))[..., None]
        advantage = jnp.where(is_available(q), q - value[..., None], 0)
        exponent = quotient(advantage, jnp.asarray(self.temperature, q.dtype)) + log_reference
        return stop_gradient(policy) * jnp.exp(exponent - stop_gradient(exponent))


def _raised(dtype: Any) -> float:
    """A power of two by which weights are multiplied, so that beside the smallest normal number they keep digits."""
    return 8 / rounding.unit_roundoff(dtype)


def _root(scaled: Rows, available: Bool[Array, "*states A"]) -> Rows:
    """The square root of exp(scaled), [S, A], 0 where an action is not available.

    The best action may be one that the reference hardly ever takes. Exponentials of others whose weights are as large
    may be below the smallest normal number; those of actions that the reference does not allow, beyond the largest.
    """
    return jnp.where(available, jnp.exp(scaled / 2), 0)


def _weights(root: Rows, reference: Float[Array, "*#states A"], times: Scalar) -> tuple[Rows, PerRow]:
    """reference exp(scaled), divided by their sum, [S, A], and that sum, [S], as a constant; see `_root`.

    Those of actions that the reference does not allow are 0 and have a derivative, which will be multiplied by `times`.
    Near the smallest normal number the sum is one of large numbers.
    """
    allowed, most = reference > 0, _raised(root.dtype)
    raised = sum_last(stop_gradient(jnp.where(allowed, reference * most * root * root, 0)))
    inverse = (most / raised)[..., None]
    others = _others(root, reference, times, inverse)
    return jnp.where(allowed, reference * inverse * root * root, others), raised / most


def _others(root: Rows, reference: Float[Array, "*#states A"], times: Scalar, factor: Any = 1.0) -> Rows:
    """factor reference exp(scaled), [S, A], of actions that the reference does not allow: 0, with a derivative.

    `times` this derivative is cut where it would be out of range: it has to be finite, since 0 times it must be 0.
    """
    largest = math.sqrt(0.9 * float(jnp.finfo(root.dtype).max))
    within = jnp.minimum(root, stop_gradient(largest / (jnp.sqrt(times) * jnp.sqrt(factor))))
    return derivative_of(reference * factor * within * within, reference <= 0)


def _xlogy(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """x log y, 0 where x is 0 (with a finite derivative there)."""
    taken = x > 0
    return jnp.where(taken, x * jnp.log(jnp.where(taken, y, 1)), 0)


def _require_normal(reference: Float[Array, "*shape"]) -> None:
    """Raise InputError if a known probability is above 0 but below the smallest normal number."""
    if not is_known(reference):
        return
    known, least = np.asarray(reference), float(jnp.finfo(reference.dtype).tiny)
    bad = (known > 0) & (known < least)
    if bad.any():
        raise InputError(
            f"reference{[int(i) for i in np.argwhere(bad)[0]]} is {known[bad][0]:g}, which devices take for 0: it is "
            f"below {least:g}, the smallest normal number of {known.dtype}; give 0 to an action that is never taken"
        )
