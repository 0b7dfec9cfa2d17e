"""Discounted returns of r_x along a batch, and how a policy's answer is weighted by them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from bilevel_jax.bilevel.sampled_problem import SampledProblem
from bilevel_jax.environments import Trajectory, Visits
from bilevel_jax.estimators.costs import returns


def reward_returns(problem: SampledProblem, x: Any, trajectories: Trajectory) -> Float[Array, "B H"]:
    """Return discounted sums of r_x from each step on, differentiable in x.

    Steps that are not valid count 0.
    """
    reward = problem.reward(x)
    taken = jax.vmap(jax.vmap(reward.of_step))(
        trajectories.observation, trajectories.action, trajectories.next_observation
    )
    taken = jnp.where(trajectories.valid, taken, 0)
    return returns(taken, problem.discount.astype(taken.dtype))


def policy_term(
    advantage: Float[Array, "B H"], answer: Float[Array, "B H"], visits: Visits, factors: Float[Array, " H"]
) -> Float[Array, ""]:
    """Return the mean over trajectories of sum_h factors[h] advantage answer. `advantage` is constant."""
    weighted = stop_gradient(jnp.where(visits.valid, factors[None] * advantage, 0)) * answer
    return jnp.sum(weighted) / advantage.shape[0]
