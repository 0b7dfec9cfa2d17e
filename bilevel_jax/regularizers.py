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
import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import stop_gradient

from bilevel_jax.derivatives import without_derivative
from bilevel_jax.errors import InputError
from bilevel_jax.promotion import with_rank
from bilevel_jax.reductions import argmax_last, max_last, sum_last
from bilevel_jax.validation import as_float, require_distribution, require_positive

# log1p of numbers below this is no better than log. XLA's in float64 is off by 120 units in the last place at -0.41.
NEAR = -0.25


class Regularizer(eqx.Module):
    """The protocol, and the temperature that all have.

    A temperature or a reference may have batch axes in front, see `mdp.over_batch`. `smooth` says
    whether the policy has a derivative; where not, a policy that users read is `bellman.read_policy`.
    """

    smooth: ClassVar[bool] = True

    temperature: jax.Array

    def __init__(self, temperature: Any):
        self.temperature = as_float("temperature", temperature)
        self.validate()

    @abc.abstractmethod
    def conjugate(self, q: jax.Array) -> jax.Array:
        """Omega*(Q): [S, A] -> [S], the maximum over the actions with Q above -inf."""

    @abc.abstractmethod
    def policy(self, q: jax.Array) -> jax.Array:
        """grad Omega*(Q): [S, A] -> [S, A], rows sum to 1; 0 where Q is -inf."""

    @abc.abstractmethod
    def penalty(self, policy: jax.Array) -> jax.Array:
        """Omega(pi): [S, A] -> [S]. Zero-probability actions cost nothing."""

    def penalty_at(self, q: jax.Array) -> jax.Array:
        """Omega(pi) of the policy at Q: [S, A] -> [S]. Read off the policy by default; override it to keep digits."""
        return self.penalty(self.policy(q))

    def event_ndim(self) -> "Regularizer":
        """The same tree with each array replaced by its number of axes in a single problem."""
        return eqx.tree_at(lambda r: r.temperature, self, 0)

    def linearized_policy(self, policy: jax.Array, q: jax.Array, value: jax.Array) -> jax.Array:
        """`policy` [S, A] itself, with the derivative of the optimal policy at (q, value).

        For an iterate that only approximates the optimum. Here the derivative of grad Omega*(q);
        entropies use the optimality relation between policy, q and value instead.
        """
        optimal = self.policy(q)
        return stop_gradient(policy) + (optimal - stop_gradient(optimal))

    def validate(self) -> None:
        """Check values that are known. Raises InputError."""
        _require_temperature(self.temperature)

    def highest(self, q: jax.Array) -> jax.Array:
        """The largest Q[S, A] of an action that may be taken, [S]: what Omega* adds its own part to."""
        return max_last(q)


class ShannonEntropy(Regularizer):
    """Omega(p) = temperature * sum_a p log p; Omega* = temperature * logsumexp(Q / temperature).

    Args:
      temperature: above 0, in units of the reward.

    Raises:
      InputError: temperature not above 0 (where it is known).
    """

    def __init__(self, temperature: Any):
        super().__init__(temperature)

    def conjugate(self, q):
        _, _, excess = self._weights(q)
        return stop_gradient(max_last(q)) + _usable(self.temperature, q.dtype) * jnp.log1p(excess)

    def policy(self, q):
        _, weight, excess = self._weights(q)
        return weight / (1 + excess)[..., None]

    def penalty_at(self, q):
        """<pi, Q - max Q> - (Omega* - max Q), which needs no other logarithm than Omega* does."""
        scaled, weight, excess = self._weights(q)
        temperature = jnp.asarray(self.temperature, q.dtype)
        return temperature * (sum_last(jnp.where(weight > 0, weight * scaled, 0)) / (1 + excess) - jnp.log1p(excess))

    def _weights(self, q: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(Q - max Q) / temperature, its exponential, [S, A], and their sum without the best one's 1, [S].

        Sums of one sign keep their digits. The best one's term in the sum has the value 0, and a derivative.
        """
        best = argmax_last(q)
        scaled = _below_best(q, best, _usable(self.temperature, q.dtype))
        weight = jnp.where(_is_available(q), jnp.exp(scaled), 0)
        return scaled, weight, sum_last(weight - _is_first(best, q).astype(q.dtype))

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

    Args:
      temperature: above 0, in units of the reward.
      reference: policy to stay close to, [S, A] or [A] for the same one in every state. An action
        with probability 0 is never taken. What it gives to actions that are not available does not
        count: the sum in Omega* is over the others, and ref is not normalized anew. A row whose sum is off by
        rounding is divided by it.

    Raises:
      InputError: temperature not above 0, reference negative or not summing to 1 (where known).
    """

    reference: jax.Array

    def __init__(self, temperature: Any, reference: Any):
        self.temperature = as_float("temperature", temperature)
        self.reference = as_float("reference", reference)
        if self.reference.ndim == 0:
            raise InputError("reference: expected probabilities of shape [S, A] or [A], got a number")
        self.validate()

    def validate(self):
        _require_temperature(self.temperature)
        require_distribution("reference", self.reference, -1, "divide each row by its sum", "[state, action]")

    def _reference(self, policy: jax.Array) -> jax.Array:
        """The reference with the axes and in the dtype of a policy or of action values."""
        return with_rank(jnp.asarray(self.reference, policy.dtype), policy.ndim)

    def highest(self, q):
        return max_last(jnp.where(self._reference(q) > 0, q, -jnp.inf))

    def _scaled(self, q: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(Q - max Q) / temperature, the temperature and the reference in q's dtype."""
        reference = self._reference(q)
        temperature = _usable(self.temperature, q.dtype)
        # The maximum over actions that the reference allows; others must not set the scale.
        allowed = reference > 0
        scaled = _below_best(q, argmax_last(jnp.where(allowed, q, -jnp.inf)), temperature, allowed)
        # Others may lie far above: they are not taken, but the derivative in their reference is exp(scaled).
        most = math.log(float(jnp.finfo(q.dtype).max)) / 2
        return jnp.where(allowed, scaled, jnp.minimum(scaled, most)), temperature, reference

    def conjugate(self, q):
        return stop_gradient(self.highest(q)) + self._excess(q)

    def _excess(self, q: jax.Array) -> jax.Array:
        """temperature * log sum ref exp((Q - max Q) / temperature), [S], at most 0."""
        scaled, temperature, reference = self._scaled(q)
        available = _is_available(q)
        # log(1 + sum) keeps its digits at high temperatures, log(sum) where one action prevails. The 1 is
        # the sum of the reference: rounding in it would be multiplied by the temperature, its derivative not.
        # A reference that sums to 1 + 1e-7, as one that was normalized in float32 may, is divided by its sum.
        mass = sum_last(reference)
        whole = stop_gradient(mass)
        shortfall = (sum_last(reference * jnp.where(available, jnp.expm1(scaled), -1)) + (mass - whole)) / whole
        total = sum_last(reference * jnp.where(available, jnp.exp(scaled), 0)) / whole
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
        surplus = jnp.log(stop_gradient(sum_last(reference)))
        return temperature * (sum_last(_xlogy(policy, policy) - _xlogy(policy, reference)) + surplus)

    def penalty_at(self, q):
        """<pi, Q - max Q> - (Omega* - max Q): no summand has the temperature's size where pi is near the reference."""
        scaled, temperature, _ = self._scaled(q)
        policy = self.policy(q)
        return temperature * sum_last(jnp.where(policy > 0, policy * scaled, 0)) - self._excess(q)

    def event_ndim(self):
        own = min(self.reference.ndim, 2)
        return eqx.tree_at(lambda r: (r.temperature, r.reference), self, (0, own))

    def linearized_policy(self, policy, q, value):
        """d pi = pi d[(q - value) / temperature + log reference]."""
        reference = self._reference(q)
        log_reference = jnp.log(jnp.where(reference > 0, reference, 1))
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
    """

    def __init__(self, temperature: Any):
        super().__init__(temperature)

    def conjugate(self, q):
        """max Q + temperature / 2 * ((1 - p_1)^2 + the squares of the others), p_1 the best one's probability.

        The same as max Q + <p, Q - max Q> + temperature / 2 * (1 - sum_a p^2), which derivatives are taken of: its two
        parts have opposite signs, and cancel where the temperature is high.
        """
        temperature = _usable(self.temperature, q.dtype)
        policy, others = self._policy_and_others(q)
        first = _is_first(argmax_last(q), q)
        below = jnp.where((policy > 0) & ~first, q - stop_gradient(max_last(q))[..., None], 0)
        # The best one's own term is 0, with the derivative that its probability gives it.
        below += jnp.where(first, q - stop_gradient(q), 0)
        parts = sum_last(policy * below) + temperature / 2 * (1 - sum_last(policy**2))
        excess = temperature / 2 * (others**2 + sum_last(jnp.where(first, 0, policy) ** 2))
        return stop_gradient(max_last(q) + excess) + (parts - stop_gradient(parts))

    def policy(self, q):
        return self._policy_and_others(q)[0]

    def _policy_and_others(self, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The policy [S, A], and 1 - p_1 [S], what all but the best action have, with its digits."""
        temperature, available = _usable(self.temperature, q.dtype), _is_available(q)
        below = _below(q, argmax_last(q))
        # 1 + (Q - max Q) / temperature: by this order of operations its digits are right where it is small.
        margin = jnp.where(available, (temperature + below) / temperature, -jnp.inf)
        return _sparsemax(margin, (below + _derivative_of(q, available)) / temperature)

    def penalty(self, policy):
        return jnp.asarray(self.temperature, policy.dtype) / 2 * (jnp.sum(policy**2, -1) - 1)


class Unregularized(Regularizer):
    """The ordinary MDP: Omega = 0, Omega* = max, and all probability on the first action that attains it.

    The value is differentiable, through the action that is taken (where several attain the maximum,
    through the first: one of the one-sided derivatives). The policy is piecewise constant: `policy` has
    derivative 0, and the policy of a `Solution` raises when it is differentiated (`bellman.read_policy`).
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
def _maximum(q: jax.Array) -> jax.Array:
    return stop_gradient(max_last(q)) + sum_last(_derivative_of(q, _first_maximum(q)))


def _first_maximum(q: jax.Array) -> jax.Array:
    return _is_first(argmax_last(q), q)


def _is_first(best: jax.Array, q: jax.Array) -> jax.Array:
    """Where in Q[S, A] the action with the index best[S] stands."""
    return lax.broadcasted_iota(jnp.int32, q.shape, q.ndim - 1) == best[..., None]


def _below_best(q: jax.Array, best: jax.Array, temperature: jax.Array, allowed: Any = True) -> jax.Array:
    """(Q - Q of the action best[S]) / temperature, [S, A], with its derivative; see `_below`."""
    return (_below(q, best, allowed) + _derivative_of(q, _is_available(q))) / temperature


def _below(q: jax.Array, best: jax.Array, allowed: Any = True) -> jax.Array:
    """Q - Q of the action best[S], [S, A], a constant: exactly 0 there, above 0 nowhere that is `allowed`.

    The best one counts as constant in derivatives, which what is made of it does not depend on. 0 at actions that
    are not available: an infinity that is divided by the temperature has derivative NaN.
    """
    top = max_last(q if allowed is True else jnp.where(allowed, q, -jnp.inf))
    below = jnp.where(_is_first(best, q), 0, q - top[..., None])
    return stop_gradient(jnp.where(_is_available(q), jnp.where(allowed, jnp.minimum(below, 0), below), 0))


def _derivative_of(x: jax.Array, where: jax.Array) -> jax.Array:
    """0 with the derivative of x, where it is asked for. NaN where x is not finite.

    Not a custom rule: those lose second derivatives in a scan with checkpoints. The difference of a selection and
    itself cannot be contracted into a multiply-add, which would leave its rounding.
    """
    selected = jnp.where(where, x, 0)
    return selected - stop_gradient(selected)


def _sparsemax(margin: jax.Array, scaled: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The point of the simplex nearest to scaled[S, A], whose maximum is 0, and 1 less its largest entry, [S].

    `margin` is 1 + scaled, exactly 1 at the maximum and -inf where an action is not available.
    """
    policy, others = _nearest(stop_gradient(margin))
    policy = stop_gradient(policy)
    support = policy > 0
    moved = _derivative_of(scaled, support)
    share = sum_last(moved) / sum_last(support.astype(moved.dtype))
    return policy + jnp.where(support, moved - share[..., None], 0), stop_gradient(others)


def _nearest(margin: jax.Array) -> tuple[jax.Array, jax.Array]:
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
    threshold = jnp.sum(jnp.where(inside, following, 0), -1, keepdims=True) / size.astype(margin.dtype)
    ranked = jnp.where(inside, jnp.maximum(descending - threshold, 0), 0)
    unknown = jnp.any(jnp.isnan(margin), -1, keepdims=True)
    ranked, threshold = jnp.where(unknown, jnp.nan, ranked), jnp.where(unknown, jnp.nan, threshold)
    place = jnp.argsort(order, -1)
    return (jnp.take_along_axis(ranked, place, -1) if actions > 1 else ranked), threshold[..., 0]


def _is_available(q: jax.Array) -> jax.Array:
    return q != -jnp.inf  # so NaN is: it must show


def _usable(temperature: jax.Array, dtype: Any) -> jax.Array:
    """The temperature, NaN where it is not above 0: only those that are known can be refused."""
    temperature = jnp.asarray(temperature, dtype)
    return jnp.where(temperature > 0, temperature, jnp.nan)


def _xlogy(x: jax.Array, y: jax.Array) -> jax.Array:
    """x log y, 0 where x is 0 (with a finite derivative there)."""
    taken = x > 0
    return jnp.where(taken, x * jnp.log(jnp.where(taken, y, 1)), 0)


def _require_temperature(temperature: jax.Array) -> None:
    require_positive("temperature", temperature, "for temperature 0 use bilevel_jax.Unregularized()")
