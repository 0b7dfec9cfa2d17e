"""Regularizers Omega of the policy, by their convex conjugates Omega*.

With Q[S, A] the action values, a regularizer gives the state value and the policy that attains it:
  V[s] = Omega*(Q[s, :]) = max_p <p, Q[s, :]> - Omega(p),   pi[s, :] = grad Omega*(Q[s, :]).
(Geist, Scherrer and Pietquin 2019, "A theory of regularized Markov decision processes".)
An action that is not available has Q = -inf: its probability is 0 and nothing depends on it, to any order.

Code here never needs two computations of one number to agree to the bit: a compiler may compute Q twice and round it
differently, and at low temperatures one unit in the last place decides between a weight of 1 and of 0. The first best
action is found by its index, and is 0 below the best by construction (`_below_best`).
"""

import abc
import math
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.lax import stop_gradient
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from bilevel_jax.core.arrays import Scalar
from bilevel_jax.core.derivatives import derivative_of, without_derivative
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.promotion import with_rank
from bilevel_jax.core.reductions import argmax_last, is_first, max_last, sum_last
from bilevel_jax.core.validation import as_float, require_distribution, require_positive

# log1p of numbers below this is no better than log. XLA's in float64 is off by 120 units in the last place at -0.41.
NEAR = -0.25


# Rows of action values or of a policy, mostly [S, A], and a number per row, mostly [S].
Rows = Float[Array, "*states A"]
PerRow = Float[Array, "*states"]


class Regularizer(eqx.Module):
    """The protocol of a regularizer, and the temperature that all of them have.

    A temperature or a reference may have batch axes in front, see `core.batching.over_batch`. `smooth` says whether the
    policy has a derivative. Where it has none, users get their policy from `bellman.read_policy`, which refuses to be
    differentiated.
    """

    smooth: ClassVar[bool] = True

    temperature: Float[Array, "*#batch"]

    def __init__(self, temperature: Real[ArrayLike, "*batch"] | Any):
        self.temperature = as_float("temperature", temperature)
        self.validate()

    @abc.abstractmethod
    def conjugate(self, q: Float[Array, "*states A"]) -> Float[Array, "*states"]:
        """Omega*(Q): [S, A] -> [S], the maximum over the actions with Q above -inf."""

    @abc.abstractmethod
    def policy(self, q: Float[Array, "*states A"]) -> Float[Array, "*states A"]:
        """grad Omega*(Q): [S, A] -> [S, A], rows sum to 1; 0 where Q is -inf."""

    @abc.abstractmethod
    def penalty(self, policy: Float[Array, "*states A"]) -> Float[Array, "*states"]:
        """Omega(pi): [S, A] -> [S]. Zero-probability actions cost nothing."""

    def penalty_at(self, q: Float[Array, "*states A"]) -> Float[Array, "*states"]:
        """Return Omega(pi) of the policy at Q: [S, A] -> [S].

        By default it is computed from the policy; override it to keep more digits.
        """
        return self.penalty(self.policy(q))

    def event_ndim(self) -> "Regularizer":
        """The same tree with each array replaced by its number of axes in a single problem."""
        return eqx.tree_at(lambda r: r.temperature, self, 0)

    def linearized_policy(
        self, policy: Float[Array, "*states A"], q: Float[Array, "*states A"], value: Float[Array, "*states"]
    ) -> Float[Array, "*states A"]:
        """Return `policy` [S, A] itself, with the derivative of the optimal policy at (q, value).

        It is meant for an iterate that only approximates the optimum. Here the derivative is that of grad Omega*(q);
        the entropies use the optimality relation between policy, q and value instead.
        """
        optimal = self.policy(q)
        return stop_gradient(policy) + (optimal - stop_gradient(optimal))

    def validate(self) -> None:
        """Check values that are known. Raises InputError."""
        _require_temperature(self.temperature)

    def highest(self, q: Float[Array, "*states A"]) -> Float[Array, "*states"]:
        """Return the largest Q[S, A] of an action that may be taken, [S].

        Omega* adds the regularizer's own part to it.
        """
        return max_last(q)

    def spread(self, q: Float[Array, "*states A"], backup: Float[Array, "*states"]) -> Float[Array, "*states"]:
        """Return the size of what Omega* adds to the largest Q, [S], weighted as its rounding counts.

        `backup`[S] is Omega*(Q).
        """
        return jnp.abs(backup - self.highest(q))


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
        return stop_gradient(max_last(q)) + _usable(self.temperature, q.dtype) * jnp.log1p(excess)

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
        scaled = _below_best(q, best, _usable(self.temperature, q.dtype))
        weight = jnp.where(_is_available(q), jnp.exp(scaled), 0)
        return scaled, weight, sum_last(weight - is_first(best, q).astype(q.dtype))

    def penalty(self, policy):
        temperature = jnp.asarray(self.temperature, policy.dtype)
        return temperature * sum_last(_xlogy(policy, policy))

    def linearized_policy(self, policy, q, value):
        """d pi = pi d[(q - value) / temperature], as in Yang, Gao and Yuan 2025."""
        advantage = jnp.where(_is_available(q), q - value[..., None], 0)
        exponent = advantage / jnp.asarray(self.temperature, q.dtype)
        return stop_gradient(policy) * jnp.exp(exponent - stop_gradient(exponent))


class KLDivergence(Regularizer):
    """Omega(p) = temperature * KL(p | reference); Omega* = temperature * log sum ref exp(Q / temperature).

    An action with reference probability 0 is never taken. The reference may give probability to actions that are not
    available in a state: the sum in Omega* then leaves these actions out, and the probabilities of the others are used
    as they are, without dividing them by their sum. A whole row of the reference is divided by its sum, which may miss
    1 by rounding. Derivatives are those of the divided row: a constant that is added to a row of d Omega* / d reference
    makes no difference along the simplex, and would cost as many digits as the temperature is above the action values.

    Args:
      temperature: above 0, in units of the reward.
      reference: the policy to stay close to, [S, A], or [A] for the same one in every state.

    Raises:
      InputError: temperature not above 0, reference negative or not summing to 1 (where known).

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
        _require_temperature(self.temperature)
        require_distribution("reference", self.reference, -1, "divide each row by its sum", "[state, action]")

    def _reference(self, policy: Rows) -> Float[Array, "... A"]:
        """The reference with the axes and in the dtype of a policy or of action values."""
        return with_rank(jnp.asarray(self.reference, policy.dtype), policy.ndim)

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
        temperature = _usable(self.temperature, q.dtype)
        # The maximum over actions that the reference allows; others must not set the scale.
        allowed = reference > 0
        scaled = _below_best(q, argmax_last(jnp.where(allowed, q, -jnp.inf)), temperature, allowed)
        # Others may lie far above: they are not taken, but the derivative in their reference, temperature exp(scaled),
        # has to stay finite, and some of them added up.
        most = math.log(float(jnp.finfo(q.dtype).max)) - 4 - jnp.log(jnp.maximum(temperature, 1))
        return jnp.where(allowed, scaled, jnp.minimum(scaled, most)), temperature, reference

    def conjugate(self, q):
        return stop_gradient(self.highest(q)) + self._excess(q)

    def _excess(self, q: Rows) -> PerRow:
        """temperature * log sum ref exp((Q - max Q) / temperature), [S], at most 0."""
        scaled, temperature, reference = self._scaled(q)
        available = _is_available(q)
        # log(1 + sum) keeps its digits at high temperatures, log(sum) where one action prevails. The 1 is the sum of
        # the reference: rounding in it would be multiplied by the temperature, as its derivative would be.
        # A reference that sums to 1 + 1e-7, as one that was normalized in float32 may, is divided by its sum.
        mass = sum_last(reference)
        shortfall = sum_last(reference * jnp.where(available, jnp.expm1(scaled), -1)) / mass
        total = sum_last(reference * jnp.where(available, jnp.exp(scaled), 0)) / mass
        near = shortfall > NEAR
        log_total = jnp.where(near, jnp.log1p(jnp.where(near, shortfall, 0)), jnp.log(jnp.where(near, 1, total)))
        return temperature * log_total

    def policy(self, q):
        scaled, _, reference = self._scaled(q)
        weight = reference * jnp.where(_is_available(q), jnp.exp(scaled), 0)
        return weight / sum_last(weight)[..., None]

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
        advantage = jnp.where(_is_available(q), q - value[..., None], 0)
        exponent = advantage / jnp.asarray(self.temperature, q.dtype) + log_reference
        return stop_gradient(policy) * jnp.exp(exponent - stop_gradient(exponent))


class TsallisEntropy(Regularizer):
    """Omega(p) = temperature / 2 * (sum_a p^2 - 1): sparse policies (sparsemax).

    Lee, Choi and Oh 2018, "Sparse Markov decision processes with causal sparse Tsallis entropy
    regularization"; Martins and Astudillo 2016 for sparsemax. The policy is piecewise linear in Q:
    derivatives are those of the current support.

    Args:
      temperature: above 0, in units of the reward.

    Raises:
      InputError: temperature not above 0 (where it is known).

    Example:
      >>> bj.TsallisEntropy(1.0).policy(jnp.array([[2.0, 0.0]])).tolist()  # sparse: the second action has probability 0
      [[1.0, 0.0]]
    """

    def __init__(self, temperature: Real[ArrayLike, "*batch"] | Any):
        super().__init__(temperature)

    def conjugate(self, q):
        """Return max Q + temperature / 2 * ((1 - p_1)^2 + the sum of the other squares), where p_1 is the best action's
        probability.

        It equals max Q + <p, Q - max Q> + temperature / 2 * (1 - sum_a p^2), whose derivatives are used. The two parts
        of that form have opposite signs and cancel where the temperature is high.
        """
        temperature = _usable(self.temperature, q.dtype)
        policy, others = self._policy_and_others(q)
        first = is_first(argmax_last(q), q)
        below = jnp.where((policy > 0) & ~first, q - stop_gradient(max_last(q))[..., None], 0)
        # The best one's own term is 0, with the derivative that its probability gives it.
        below += jnp.where(first, q - stop_gradient(q), 0)
        parts = sum_last(policy * below) + temperature / 2 * (1 - sum_last(policy**2))
        excess = temperature / 2 * (others**2 + sum_last(jnp.where(first, 0, policy) ** 2))
        return stop_gradient(max_last(q) + excess) + (parts - stop_gradient(parts))

    def policy(self, q):
        return self._policy_and_others(q)[0]

    def _policy_and_others(self, q: Rows) -> tuple[Rows, PerRow]:
        """Return the policy [S, A] and 1 - p_1 [S], the probability of all actions but the best one, with all of its
        digits.
        """
        temperature, available = _usable(self.temperature, q.dtype), _is_available(q)
        below = _below(q, argmax_last(q))
        # 1 + (Q - max Q) / temperature: by this order of operations its digits are right where it is small.
        margin = jnp.where(available, (temperature + below) / temperature, -jnp.inf)
        return _sparsemax(margin, (below + derivative_of(q, available)) / temperature)

    def penalty(self, policy):
        return jnp.asarray(self.temperature, policy.dtype) / 2 * (sum_last(policy**2) - 1)


class Unregularized(Regularizer):
    """The ordinary MDP: Omega = 0, Omega* = max, and all probability on the first action that attains the maximum.

    The value is differentiable through the action that is taken. Where several actions attain the maximum, that is the
    first one, so that the derivative is one of the one-sided ones. The policy is piecewise constant: the derivative of
    `policy` is 0, and differentiating the policy of a `Solution` raises InputError (`bellman.read_policy`).

    Example:
      >>> bj.Unregularized().policy(jnp.array([[1.0, 2.0]])).tolist()
      [[0.0, 1.0]]
    """

    smooth: ClassVar[bool] = False

    temperature: float = eqx.field(static=True)  # type: ignore[assignment]

    def __init__(self):
        self.temperature = 0.0

    def conjugate(self, q):
        return _maximum(q)

    def policy(self, q):
        return stop_gradient(_first_maximum(q).astype(q.dtype))

    def penalty(self, policy):
        return jnp.zeros_like(policy[..., 0])

    def event_ndim(self):
        return self

    def linearized_policy(self, policy, q, value):
        """`policy` itself; differentiating it raises InputError, or gives NaN in forward mode."""
        del value
        return without_derivative(policy, q)

    def validate(self):
        """Nothing to check."""


# The derivative of jnp.max is shared among ties; the operator of the derivative of V takes one action.
def _maximum(q: Rows) -> PerRow:
    return stop_gradient(max_last(q)) + sum_last(derivative_of(q, _first_maximum(q)))


def _first_maximum(q: Rows) -> Bool[Array, "*states A"]:
    return is_first(argmax_last(q), q)


def _below_best(q: Rows, best: Int[Array, "*states"], temperature: Scalar, allowed: Any = True) -> Rows:
    """(Q - Q of the action best[S]) / temperature, [S, A], with its derivative; see `_below`."""
    return (_below(q, best, allowed) + derivative_of(q, _is_available(q))) / temperature


def _below(q: Rows, best: Int[Array, "*states"], allowed: Any = True) -> Rows:
    """Return Q - Q of the action best[S], [S, A], as a constant: exactly 0 at that action, at most 0 where `allowed`.

    The best action counts as constant in derivatives, because the numbers that are computed from this do not depend on
    which action is the best. The result is 0 at actions that are not available: an infinity divided by the temperature
    would have derivative NaN.
    """
    top = max_last(q if allowed is True else jnp.where(allowed, q, -jnp.inf))
    below = jnp.where(is_first(best, q), 0, q - top[..., None])
    return stop_gradient(jnp.where(_is_available(q), jnp.where(allowed, jnp.minimum(below, 0), below), 0))


def _sparsemax(margin: Rows, scaled: Rows) -> tuple[Rows, PerRow]:
    """The point of the simplex nearest to scaled[S, A], whose maximum is 0, and 1 less its largest entry, [S].

    `margin` is 1 + scaled, exactly 1 at the maximum and -inf where an action is not available.
    """
    policy, others = _nearest(stop_gradient(margin))
    policy = stop_gradient(policy)
    support = policy > 0
    moved = derivative_of(scaled, support)
    share = sum_last(moved) / sum_last(support.astype(moved.dtype))
    return policy + jnp.where(support, moved - share[..., None], 0), stop_gradient(others)


def _nearest(margin: Rows) -> tuple[Rows, PerRow]:
    """The values of `_sparsemax`. Everything is read off one sorted array, which lies in memory.

    With m_1 = 1 >= m_2 >= ... the support is the largest k with k m_k > m_2 + ... + m_k, and the threshold
    t = (m_2 + ... + m_k) / k: p_1 = 1 - t, p_i = m_i - t. All summands have one sign, so that t keeps its digits.
    """
    actions = margin.shape[-1]
    index = lax.broadcasted_iota(jnp.int32, margin.shape, margin.ndim - 1)
    ascending, order = lax.sort((-margin, index), num_keys=1)
    descending = -ascending
    rank = index + 1
    following = jnp.where((descending > 0) & (rank > 1), descending, 0)
    within = (rank == 1) | (rank.astype(margin.dtype) * descending > jnp.cumsum(following, -1))
    size = jnp.sum(within & (descending > -jnp.inf), -1, keepdims=True, dtype=jnp.int32)
    inside = rank <= size
    threshold = sum_last(jnp.where(inside, following, 0))[..., None] / size.astype(margin.dtype)
    ranked = jnp.where(inside, jnp.maximum(descending - threshold, 0), 0)
    unknown = jnp.any(jnp.isnan(margin), -1, keepdims=True)
    ranked, threshold = jnp.where(unknown, jnp.nan, ranked), jnp.where(unknown, jnp.nan, threshold)
    place = jnp.argsort(order, -1)
    return (jnp.take_along_axis(ranked, place, -1) if actions > 1 else ranked), threshold[..., 0]


def _is_available(q: Rows) -> Bool[Array, "*states A"]:
    return q != -jnp.inf  # so NaN is: it must show


def _usable(temperature: Scalar, dtype: Any) -> Scalar:
    """The temperature, NaN where it is not above 0: only those that are known can be refused."""
    temperature = jnp.asarray(temperature, dtype)
    return jnp.where(temperature > 0, temperature, jnp.nan)


def _xlogy(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """x log y, 0 where x is 0 (with a finite derivative there)."""
    taken = x > 0
    return jnp.where(taken, x * jnp.log(jnp.where(taken, y, 1)), 0)


def _require_temperature(temperature: Float[Array, "*batch"]) -> None:
    require_positive("temperature", temperature, "for temperature 0 use bilevel_jax.Unregularized()")
