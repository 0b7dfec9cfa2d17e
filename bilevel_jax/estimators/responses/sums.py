"""What responses share: credits summed over the visits of a pair, rewards summed along trajectories."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from bilevel_jax.bilevel.sampled_problem import SampledProblem, discounts
from bilevel_jax.environments import TabularEnvironment, Trajectory, Visits


def pair_weights(
    environment: TabularEnvironment, trajectories: Trajectory, credit: Float[Array, "B H"]
) -> Float[Array, "S A"]:
    """W: the credits summed over the visits of each pair."""
    return Visits.of(environment, trajectories).pair_sums(credit).reshape(environment.num_states, -1)


def centred_weights(
    environment: TabularEnvironment, pi: Float[Array, "S A"], trajectories: Trajectory, credit: Float[Array, "B H"]
) -> Float[Array, "S A"]:
    """w = W - pi sum_a W, so that sum credit (dQ - dV) = <w, dQ>."""
    weights = pair_weights(environment, trajectories, credit)
    return stop_gradient(weights - pi.astype(weights.dtype) * jnp.sum(weights, -1, keepdims=True))


def sampled_returns(problem: SampledProblem, x: Any, sampled: Trajectory) -> Float[Array, " B"]:
    """The discounted sum of r_x along trajectories [B, H], differentiable in x."""
    reward = problem.reward(x)
    taken = jax.vmap(jax.vmap(reward.of_step))(sampled.observation, sampled.action, sampled.next_observation)
    # A simulator that resets itself goes on after the end: not with what this process earned.
    ended = jnp.cumsum((sampled.terminated | sampled.truncated).astype(jnp.int32), 1)
    before = jnp.pad(ended, ((0, 0), (1, 0)))[:, :-1] > 0
    return jnp.sum(jnp.where(sampled.valid & ~before, taken * discounts(problem, taken.shape[1])[None], 0), 1)
