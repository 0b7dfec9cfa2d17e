"""Tsallis entropy: sparse policies."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.lax import stop_gradient
from jaxtyping import ArrayLike, Real

from bilevel_jax.core.derivatives import derivative_of
from bilevel_jax.core.reductions import argmax_last, is_first, max_last, sum_last
from bilevel_jax.mdp.regularizers.protocol import (
    PerRow,
    Regularizer,
    Rows,
    below,
    is_available,
    over_temperature,
    usable,
)


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
        temperature = usable(self.temperature, q.dtype)
        policy, others = self._policy_and_others(q)
        first = is_first(argmax_last(q), q)
        gap = jnp.where((policy > 0) & ~first, q - stop_gradient(max_last(q))[..., None], 0)
        # The best one's own term is 0, with the derivative that its probability gives it.
        gap += jnp.where(first, q - stop_gradient(q), 0)
        parts = sum_last(policy * gap) + temperature / 2 * (1 - sum_last(policy**2))
        excess = temperature / 2 * (others**2 + sum_last(jnp.where(first, 0, policy) ** 2))
        return stop_gradient(max_last(q) + excess) + (parts - stop_gradient(parts))

    def policy(self, q):
        return self._policy_and_others(q)[0]

    def _policy_and_others(self, q: Rows) -> tuple[Rows, PerRow]:
        """Return the policy [S, A] and 1 - p_1 [S], the probability of all actions but the best one, with all of its
        digits.
        """
        temperature, available = usable(self.temperature, q.dtype), is_available(q)
        gap = below(q, argmax_last(q))
        # 1 + (Q - max Q) / temperature: by this order of operations its digits are right where it is small.
        margin = jnp.where(available, (temperature + gap) / temperature, -jnp.inf)
        return _sparsemax(margin, over_temperature(gap, q, temperature))

    def penalty(self, policy):
        return jnp.asarray(self.temperature, policy.dtype) / 2 * (sum_last(policy**2) - 1)


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
