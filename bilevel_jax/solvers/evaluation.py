"""The part that steps which evaluate a policy share: the policy at Q, its operator, and sweeps of evaluation."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from bilevel_jax.core.arrays import Count, PerPair, PerState, Scalar
from bilevel_jax.core.reductions import argmax_last, min_max
from bilevel_jax.mdp.bellman import discounted_operator
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import Regularizer
from bilevel_jax.mdp.transitions import StateOperator


def improve(regularizer: Regularizer, q: PerPair) -> PerPair | Int[Array, " S"]:
    """Return the policy at Q[S, A]: probabilities [S, A], or the chosen action int32[S] where the policy is
    deterministic.
    """
    return regularizer.policy(q) if regularizer.smooth else argmax_last(q)


def policy_operator(mdp: MDP, improved: PerPair | Int[Array, " S"]) -> StateOperator:
    """Return M = discount P_pi for the policy that `improve` returned."""
    if not jnp.issubdtype(improved.dtype, jnp.integer):
        return discounted_operator(mdp, improved)
    discount = jnp.broadcast_to(mdp.discount, mdp.reward.shape)
    chosen = jnp.take_along_axis(discount, improved[:, None], -1)[:, 0] if mdp.discount.ndim else discount[:, 0]
    return mdp.transition.select(improved, chosen)


def span(values: PerState) -> Scalar:
    """max - min, a scalar."""
    low, high = min_max(values)
    return high - low


def fold_where_it_pays(mdp: MDP, operator: StateOperator) -> StateOperator:
    """Fold the policy into the transition where that makes a product smaller."""
    return operator.fold() if mdp.transition.folding_shrinks else operator


def sweep_policy(
    operator: StateOperator, total: PerState, term: PerState, stop: Scalar, most: Count
) -> tuple[PerState, PerState, Count]:
    """Return total + M term + M^2 term + ..., until the span of the last term is at most `stop`, or after `most`
    products.

    At first, total = term = T V - V. The function returns the sum [S], the last term [S] and the number of products. V
    + sum is the value after as many sweeps of evaluation, and M times the last term is T_pi (V + sum) - (V + sum).
    """

    # The span is taken in the condition, of an array that lies in memory; see `loop.iterate`.
    def unfinished(carry):
        _, term, products = carry
        return (products < most) & (span(term) > stop)

    def body(carry):
        total, term, products = carry
        term = operator.apply(term)
        return total + term, term, products + 1

    return lax.while_loop(unfinished, body, (total, term, jnp.asarray(0, jnp.int32)))
