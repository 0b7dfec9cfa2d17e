"""Regularizers Omega of the policy, by their convex conjugates Omega*.

With Q[S, A] the action values, a regularizer gives the state value and the policy that attains it:
  V[s] = Omega*(Q[s, :]) = max_p <p, Q[s, :]> - Omega(p),   pi[s, :] = grad Omega*(Q[s, :]).
(Geist, Scherrer and Pietquin 2019, "A theory of regularized Markov decision processes".)
An action that is not available has Q = -inf: its probability is 0 and nothing depends on it, to any order.

Code here never needs two computations of one number to agree to the bit: a compiler may compute Q twice and round it
differently, and at low temperatures one unit in the last place decides between a weight of 1 and of 0. The first best
action is found by its index, and is 0 below the best by construction (`below_best`).
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from bilevel_jax.core.arrays import Scalar
from bilevel_jax.core.derivatives import derivative_of
from bilevel_jax.core.quotients import quotient
from bilevel_jax.core.reductions import is_first, max_last
from bilevel_jax.core.validation import as_float, require_positive

# An action so many temperatures below the best is not taken: exp(-745) is 0 in float64, in float32 exp(-104) is.
FAR_BELOW = 1e4

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
        require_temperature(self.temperature)

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

    def lost(self, q: Float[Array, "*states A"]) -> Float[Array, "*states"]:
        """Return what Omega* may lose below the smallest normal number, which a device takes for 0, as a part of the
        temperature, [S].

        Here it is that of (Q - max Q) / temperature.
        """
        return jnp.full_like(q[..., 0], 2 * float(jnp.finfo(q.dtype).tiny))


def is_available(q: Rows) -> Bool[Array, "*states A"]:
    """Return which actions may be taken, [S, A]."""
    return q != -jnp.inf  # so NaN is: it must show


def usable(temperature: Scalar, dtype: Any) -> Scalar:
    """The temperature, NaN where it is not above 0: only those that are known can be refused."""
    temperature = jnp.asarray(temperature, dtype)
    return jnp.where(temperature > 0, temperature, jnp.nan)


def below_best(q: Rows, best: Int[Array, "*states"], temperature: Scalar, allowed: Any = True) -> Rows:
    """(Q - Q of the action best[S]) / temperature, [S, A], with its derivative; see `below`."""
    return over_temperature(below(q, best, allowed), q, temperature)


def over_temperature(gap: Rows, q: Rows, temperature: Scalar) -> Rows:
    """gap / temperature, [S, A], where gap is that of `below`, with the derivative of q / temperature.

    It is at least -10^4, where all weights are 0: at -inf their derivatives would be NaN.
    """
    gap = jnp.maximum(gap, -FAR_BELOW * stop_gradient(temperature))
    return quotient(gap + derivative_of(q, is_available(q)), temperature)


def below(q: Rows, best: Int[Array, "*states"], allowed: Any = True) -> Rows:
    """Return Q - Q of the action best[S], [S, A], as a constant: exactly 0 at that action, at most 0 where `allowed`.

    The best action counts as constant in derivatives, because the numbers that are computed from this do not depend on
    which action is the best. The result is 0 at actions that are not available: an infinity divided by the temperature
    would have derivative NaN.
    """
    top = max_last(q if allowed is True else jnp.where(allowed, q, -jnp.inf))
    gap = jnp.where(is_first(best, q), 0, q - top[..., None])
    return stop_gradient(jnp.where(is_available(q), jnp.where(allowed, jnp.minimum(gap, 0), gap), 0))


def require_temperature(temperature: Float[Array, "*batch"]) -> None:
    """Raise InputError where a temperature is known not to be above 0."""
    require_positive("temperature", temperature, "for temperature 0 use bilevel_jax.Unregularized()")
