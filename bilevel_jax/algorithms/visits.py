"""Monte Carlo tables over the visits of a batch, which HPGD and BC-HG build on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from bilevel_jax.environments import TabularEnvironment, Trajectory
from bilevel_jax.estimators.costs import returns
from bilevel_jax.estimators.problem import SampledProblem


class Visits(NamedTuple):
    """Which state and pair each step [B, H] visits, and how many there are of each."""

    state: jax.Array
    pair: jax.Array
    valid: jax.Array
    num_states: int
    num_actions: int

    @classmethod
    def of(cls, environment: TabularEnvironment, trajectories: Trajectory) -> "Visits":
        state = trajectories.observation
        pair = state * environment.num_actions + trajectories.action
        return cls(state, pair, trajectories.valid, environment.num_states, environment.num_actions)

    def state_means(self, values: jax.Array) -> jax.Array:
        """Mean of values [B, H] over the visits of each state, [S]; 0 where there is none."""
        return self._means(values, self.state, self.num_states)

    def pair_means(self, values: jax.Array) -> jax.Array:
        """Mean of values [B, H] over the visits of each pair, [S A]; 0 where there is none."""
        return self._means(values, self.pair, self.num_states * self.num_actions)

    def _means(self, values: jax.Array, index: jax.Array, size: int) -> jax.Array:
        total = jnp.zeros(size, values.dtype).at[index].add(jnp.where(self.valid, values, 0))
        count = jnp.zeros(size, values.dtype).at[index].add(self.valid.astype(values.dtype))
        return total / jnp.maximum(count, 1)


def reward_returns(problem: SampledProblem, x: Any, trajectories: Trajectory) -> jax.Array:
    """Discounted sums of r_x from each step on, [B, H], differentiable in x; the invalid steps count nothing."""
    reward = problem.reward(x)
    taken = jax.vmap(jax.vmap(lambda observation, action: reward(observation)[action]))(
        trajectories.observation, trajectories.action
    )
    taken = jnp.where(trajectories.valid, taken, 0)
    return returns(taken, problem.discount.astype(taken.dtype))


def policy_term(advantage: jax.Array, answer: jax.Array, visits: Visits, factors: jax.Array) -> jax.Array:
    """mean over trajectories of sum_h factors[h] advantage answer, [B, H] both; `advantage` is a constant."""
    weighted = stop_gradient(jnp.where(visits.valid, factors[None] * advantage, 0)) * answer
    return jnp.sum(weighted) / advantage.shape[0]
