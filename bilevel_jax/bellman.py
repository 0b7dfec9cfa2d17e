"""The regularized Bellman operator and what is read off a value function. For one MDP; see `over_batch`."""

import jax
import jax.numpy as jnp

from bilevel_jax.errors import InputError
from bilevel_jax.mdp import MDP
from bilevel_jax.regularizers import Regularizer
from bilevel_jax.transitions import PolicyOperator, StateOperator


def action_values(mdp: MDP, value: jax.Array) -> jax.Array:
    """Q = r + discount * P V: [S] -> [S, A]."""
    return mdp.reward + mdp.discount * mdp.transition.expect(value)


def backup(mdp: MDP, regularizer: Regularizer, value: jax.Array) -> jax.Array:
    """(T V)[s] = Omega*(Q[s, :]): [S] -> [S], a contraction with modulus `mdp.modulus`."""
    return regularizer.conjugate(action_values(mdp, value))


def greedy(mdp: MDP, regularizer: Regularizer, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(Q[S, A], grad Omega*(Q)[S, A]) at V[S]."""
    q = action_values(mdp, value)
    return q, regularizer.policy(q)


def discounted_operator(mdp: MDP, policy: jax.Array) -> StateOperator:
    """M[s, s'] = sum_a discount pi[s, a] P[s, a, s'], the derivative of T at a V with this policy."""
    return PolicyOperator(mdp.transition, mdp.discount * policy)


def check_compatible(mdp: MDP, regularizer: Regularizer) -> None:
    """Raise InputError where a regularizer's arrays do not fit the MDP's states and actions."""
    reference = getattr(regularizer, "reference", None)
    if reference is None:
        return
    expected = (mdp.num_states, mdp.num_actions)
    if reference.shape[-1] != expected[1] or (reference.ndim > 1 and reference.shape[-2] != expected[0]):
        raise InputError(
            f"reference: expected shape [S, A] = {list(expected)} or [A] = [{expected[1]}], got {list(reference.shape)}"
        )


def sup_norm(x: jax.Array) -> jax.Array:
    """max |x|, a scalar."""
    return jnp.max(jnp.abs(x))
