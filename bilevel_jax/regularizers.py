"""Regularizers Omega of the policy, by their convex conjugates Omega*.

With Q[S, A] the action values, a regularizer gives the state value and the policy that attains it:
  V[s] = Omega*(Q[s, :]) = max_p <p, Q[s, :]> - Omega(p),   pi[s, :] = grad Omega*(Q[s, :]).
(Geist, Scherrer and Pietquin 2019, "A theory of regularized Markov decision processes".)
An action that is not available has Q = -inf: its probability is 0 and nothing depends on it, to any order.
"""

import abc
import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from bilevel_jax.derivatives import without_derivative
from bilevel_jax.errors import InputError
from bilevel_jax.promotion import with_rank
from bilevel_jax.reductions import UNROLLED, max_last, sum_last
from bilevel_jax.validation import as_float, require_distribution, require_positive


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

    def _scaled(self, q: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """(Q - max Q) / temperature, the maximum [S], the temperature in q's dtype, and what is available.

        0 at actions that are not: an infinity that is divided by the temperature has derivative NaN.
        """
        temperature = _usable(self.temperature, q.dtype)
        top = stop_gradient(max_last(q))
        available = _is_available(q)
        return jnp.where(available, q - top[..., None], 0) / temperature, top, temperature, available


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
        scaled, top, temperature, available = self._scaled(q)
        return top + temperature * jnp.log(sum_last(jnp.where(available, jnp.exp(scaled), 0)))

    def policy(self, q):
        scaled, _, _, available = self._scaled(q)
        weight = jnp.where(available, jnp.exp(scaled), 0)
        return weight / sum_last(weight)[..., None]

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
        count: the sum in Omega* is over the others, and ref is not normalized anew.

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

    def _shifted(self, q: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        # The maximum over actions that the reference allows; others must not set the scale.
        reference = self._reference(q)
        temperature = _usable(self.temperature, q.dtype)
        top = stop_gradient(max_last(jnp.where(reference > 0, q, -jnp.inf)))
        scaled = jnp.where(_is_available(q), q - top[..., None], 0) / temperature
        # Others may lie far above: they are not taken, but the derivative in their reference is exp(scaled).
        most = math.log(float(jnp.finfo(q.dtype).max)) / 2
        scaled = jnp.where(reference > 0, scaled, jnp.minimum(scaled, most))
        return scaled, top, temperature, reference

    def conjugate(self, q):
        scaled, top, temperature, reference = self._shifted(q)
        available = _is_available(q)
        # log(1 + sum) keeps its digits at high temperatures, log(sum) where one action prevails. The 1 is
        # the sum of the reference: rounding in it would be multiplied by the temperature, its derivative not.
        mass = sum_last(reference)
        shortfall = sum_last(reference * jnp.where(available, jnp.expm1(scaled), -1)) + (mass - stop_gradient(mass))
        total = sum_last(reference * jnp.where(available, jnp.exp(scaled), 0))
        near = shortfall > -0.5
        log_total = jnp.where(near, jnp.log1p(jnp.where(near, shortfall, 0)), jnp.log(jnp.where(near, 1, total)))
        return top + temperature * log_total

    def policy(self, q):
        scaled, _, _, reference = self._shifted(q)
        weight = reference * jnp.where(_is_available(q), jnp.exp(scaled), 0)
        return weight / sum_last(weight)[..., None]

    def penalty(self, policy):
        temperature = jnp.asarray(self.temperature, policy.dtype)
        reference = self._reference(policy)
        return temperature * sum_last(_xlogy(policy, policy) - _xlogy(policy, reference))

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
        _, top, temperature, _ = self._scaled(q)
        policy = self.policy(q)
        gain = jnp.sum(policy * jnp.where(policy > 0, q - top[..., None], 0), -1)
        return top + gain + temperature / 2 * (1 - jnp.sum(policy**2, -1))

    def policy(self, q):
        scaled, _, _, available = self._scaled(q)
        ranked = jnp.where(available, stop_gradient(scaled), -jnp.inf)
        # z_1 >= z_2 >= ...: the support is the largest k with 1 + k z_k > z_1 + ... + z_k.
        descending = -jnp.sort(-ranked, -1)
        rank = jax.lax.broadcasted_iota(q.dtype, q.shape, q.ndim - 1) + 1
        inside = 1 + rank * descending > jnp.cumsum(descending, -1)
        size = jnp.sum(inside, -1, keepdims=True)
        smallest = jnp.take_along_axis(descending, size - 1, -1)
        support = ranked >= smallest
        count = jnp.sum(support, -1, keepdims=True).astype(q.dtype)
        threshold = (jnp.sum(jnp.where(support, scaled, 0), -1, keepdims=True) - 1) / count
        return jnp.where(support, scaled - threshold, 0)

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
@jax.custom_jvp
def _maximum(q: jax.Array) -> jax.Array:
    return max_last(q)


@_maximum.defjvp
def _maximum_jvp(primals, tangents):
    (q,), (q_dot,) = primals, tangents
    return _maximum(q), sum_last(jnp.where(_first_maximum(q), q_dot, 0))


def _first_maximum(q: jax.Array) -> jax.Array:
    if q.shape[-1] > UNROLLED:
        best = jnp.argmax(q, -1, keepdims=True)
        return jax.lax.broadcasted_iota(best.dtype, q.shape, q.ndim - 1) == best
    top, found, hits = max_last(q), False, []
    for action in range(q.shape[-1]):
        hits.append((q[..., action] == top) & ~jnp.asarray(found))
        found = found | hits[-1]
    return jnp.stack(hits, -1)


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
