"""The value of a given policy, with its penalty or without."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from bilevel_jax.core.arrays import PerPair
from bilevel_jax.core.batching import over_batch
from bilevel_jax.core.captures import jit
from bilevel_jax.core.validation import as_float, require_instance, require_numbers
from bilevel_jax.linear import LinearSolver, default_linear_solver, linear_solve
from bilevel_jax.mdp.bellman import check_compatible, discounted_operator
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import Regularizer


def policy_value(
    mdp: MDP, policy: Real[ArrayLike, "*batch S A"] | Sequence[Any], linear_solver: LinearSolver | None = None
) -> Float[Array, "*batch S"]:
    """Return the value V[S] of a policy[S, A] for the MDP's own reward, without regularization.

    It solves V = sum_a pi (r + discount P V). The result is differentiable in the policy and every leaf of the MDP;
    batch axes come first, as in the MDP. It is NaN where the linear solve did not converge, and where a policy whose
    values are not known (under jit) has probability on an action that is not available.

    Raises:
      InputError: the policy's shape is not that of the reward, it is known and far from a distribution, it has
        probability on an action that is not available, or an argument has another type.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> bj.policy_value(mdp, jnp.full((2, 2), 0.5)).round(3).tolist()
      [5.0, 5.0]
    """
    return _value(mdp, None, checked_policy(mdp, policy, linear_solver), linear_solver=linear_solver)


def regularized_policy_value(
    mdp: MDP,
    regularizer: Regularizer,
    policy: Real[ArrayLike, "*batch S A"] | Sequence[Any],
    *,
    linear_solver: LinearSolver | None = None,
) -> Float[Array, "*batch S"]:
    """Return the value V[S] of a policy[S, A] with its penalty: V = sum_a pi (r + discount P V) - Omega(pi).

    It is at most the V of `solve`, in every state. The result is differentiable in the policy and every leaf of the MDP
    and of the regularizer; batch axes come first. It is NaN in the same cases as `occupancy`.

    Raises:
      InputError: as `occupancy`, or a regularizer that does not fit the MDP.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> entropy = bj.ShannonEntropy(0.1)
      >>> value = bj.regularized_policy_value(mdp, entropy, jnp.full((2, 2), 0.5))
      >>> bool(jnp.all(value < bj.solve(mdp, entropy).value))
      True
    """
    require_instance("regularizer", regularizer, Regularizer)
    policy = checked_policy(mdp, policy, linear_solver)
    check_compatible(mdp, regularizer)
    return _value(mdp, regularizer, policy, linear_solver=linear_solver)


@jit
@over_batch
def _value(mdp, regularizer, policy, *, linear_solver):
    solver = default_linear_solver(mdp.num_states) if linear_solver is None else linear_solver
    allowed = allowed_policy(mdp, policy)
    rewards = jnp.sum(allowed * mdp.reward, -1)
    if regularizer is not None:
        rewards = rewards - regularizer.penalty(allowed)
    return linear_solve(solver, discounted_operator(mdp, allowed), mdp.modulus, rewards, poison=True)[0]


def checked_policy(mdp: MDP, policy: Any, linear_solver: Any) -> Float[Array, "*batch S A"]:
    """The policy as an array [S, A] of the reward's dtype. Raises InputError, see `policy_value`."""
    require_instance("mdp", mdp, MDP)
    require_instance("linear_solver", linear_solver, LinearSolver | None)
    require_numbers("linear_solver", linear_solver)
    policy = as_float("policy", policy, mdp.reward.dtype, mdp.reward.shape)
    mdp.require_available(policy)
    return policy


def allowed_policy(mdp: MDP, policy: PerPair) -> PerPair:
    """The policy, but NaN in states where it has probability on an action that is not available."""
    if mdp.available is None:
        return policy
    allowed = jnp.where(mdp.available, policy, 0)
    return jnp.where(jnp.all(allowed == policy, -1, keepdims=True), allowed, jnp.nan)
