"""The value of a given policy."""

import equinox as eqx
import jax
import jax.numpy as jnp

from bilevel_jax.adjoint import LinearSolver, default_linear_solver, linear_solve
from bilevel_jax.bellman import discounted_operator
from bilevel_jax.captures import jit
from bilevel_jax.mdp import MDP, over_batch
from bilevel_jax.validation import as_float, require_instance, require_numbers


def policy_value(mdp: MDP, policy: jax.Array, adjoint: LinearSolver | None = None) -> jax.Array:
    """The value V[S] of a policy[S, A] for the MDP's own reward, without regularization.

    Solves V = sum_a pi (r + discount P V). Differentiable in policy and every leaf of the MDP; batch
    axes first, as in the MDP. NaN where the linear solve did not converge, and where a policy that is
    not known (under jit) has probability on an action that is not available.

    Raises:
      InputError: the policy's shape is not that of the reward, it is known and no distribution by far, it has
        probability on an action that is not available, or an argument of another type.
    """
    require_instance("mdp", mdp, MDP)
    require_instance("adjoint", adjoint, LinearSolver | None)
    require_numbers("adjoint", adjoint)
    policy = as_float("policy", policy, mdp.reward.dtype, mdp.reward.shape)
    mdp.require_available(policy)
    return _policy_value(mdp, _NoRegularizer(), policy, adjoint=adjoint)


@jit
@over_batch
def _policy_value(mdp, regularizer, policy, *, adjoint):
    del regularizer
    solver = default_linear_solver(mdp.num_states) if adjoint is None else adjoint
    allowed = policy if mdp.available is None else jnp.where(mdp.available, policy, 0)
    rewards = jnp.sum(allowed * mdp.reward, -1)
    if mdp.available is not None:
        rewards = jnp.where(jnp.all(allowed == policy, -1), rewards, jnp.nan)
    return linear_solve(solver, discounted_operator(mdp, allowed), mdp.modulus, rewards, poison=True)[0]


class _NoRegularizer(eqx.Module):
    """Stands in where `over_batch` wants a regularizer and the function has none."""

    def event_ndim(self):
        return self
