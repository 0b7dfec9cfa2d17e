"""What steps that evaluate a policy share: the policy at Q, its operator, and sweeps of evaluation."""

import jax
import jax.numpy as jnp
from jax import lax

from bilevel_jax.bellman import discounted_operator
from bilevel_jax.mdp import MDP
from bilevel_jax.reductions import argmax_last, min_max
from bilevel_jax.regularizers import Regularizer
from bilevel_jax.transitions import StateOperator


def improve(regularizer: Regularizer, q: jax.Array) -> jax.Array:
    """The policy at Q[S, A]: probabilities [S, A], or the chosen action int32[S] where there is no more to it."""
    return regularizer.policy(q) if regularizer.smooth else argmax_last(q)


def policy_operator(mdp: MDP, improved: jax.Array) -> StateOperator:
    """M = discount P_pi of what `improve` returned."""
    if not jnp.issubdtype(improved.dtype, jnp.integer):
        return discounted_operator(mdp, improved)
    discount = jnp.broadcast_to(mdp.discount, mdp.reward.shape)
    chosen = jnp.take_along_axis(discount, improved[:, None], -1)[:, 0] if mdp.discount.ndim else discount[:, 0]
    return mdp.transition.select(improved, chosen)


def span(values: jax.Array) -> jax.Array:
    """max - min, a scalar."""
    low, high = min_max(values)
    return high - low


def fold_where_it_pays(mdp: MDP, operator: StateOperator) -> StateOperator:
    """Fold the policy into the transition where that makes a product smaller."""
    return operator.fold() if mdp.transition.folding_shrinks else operator


def sweep_policy(
    operator: StateOperator, total: jax.Array, term: jax.Array, stop: jax.Array, most: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """total + M term + M^2 term + ... until the span of the last is at most `stop`, or `most` products.

    With total = term = T V - V at first. Returns the sum [S], the last term [S] and the number of products:
    V + sum is what as many sweeps of evaluation make of V, and M times the last term is
    T_pi (V + sum) - (V + sum).
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
