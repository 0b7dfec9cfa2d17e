"""The states and pairs of a table that trajectories visit, and sums and means over the visits."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real

from bilevel_jax.environments.protocol import Trajectory
from bilevel_jax.environments.tabular import TabularEnvironment


class Visits(NamedTuple):
    """The visits of trajectories with axes [...]; values that are summed have these axes as well.

    `state` and `pair` int32[...], the pair (s, a) as the number s A + a; `valid` bool[...], False on steps that count
    nothing; the sizes S and A of the table.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> environment = bj.environments.TabularEnvironment(mdp)
      >>> policy = jnp.full((2, 2), 0.5)
      >>> trajectories = bj.environments.rollout(jax.random.key(0), environment, policy, batch=4, horizon=5)
      >>> float(bj.environments.Visits.of(environment, trajectories).pair_counts(jnp.float32).sum())
      20.0
    """

    state: Int[Array, "*steps"]
    pair: Int[Array, "*steps"]
    valid: Bool[Array, "*steps"]
    num_states: int
    num_actions: int

    @classmethod
    def of(cls, environment: TabularEnvironment, trajectories: Trajectory) -> "Visits":
        """Return the visits of trajectories in a tabular environment."""
        return cls(
            state=trajectories.observation,
            pair=environment.pair(trajectories.observation, trajectories.action),
            valid=trajectories.valid,
            num_states=environment.num_states,
            num_actions=environment.num_actions,
        )

    def state_sums(self, values: Real[Array, "*steps"]) -> Real[Array, " S"]:
        """Sum of the values over the visits of each state, [S]."""
        return self._sums(values, self.state, self.num_states)

    def pair_sums(self, values: Real[Array, "*steps"]) -> Real[Array, " pairs"]:
        """Sum of the values over the visits of each pair, [S A]."""
        return self._sums(values, self.pair, self.num_states * self.num_actions)

    def state_counts(self, dtype: Any) -> Real[Array, " S"]:
        """Number of visits of each state, [S]."""
        return self.state_sums(jnp.ones(self.state.shape, dtype))

    def pair_counts(self, dtype: Any) -> Real[Array, " pairs"]:
        """Number of visits of each pair, [S A]."""
        return self.pair_sums(jnp.ones(self.pair.shape, dtype))

    def state_means(self, values: Float[Array, "*steps"]) -> Float[Array, " S"]:
        """Mean of the values over the visits of each state, [S]; 0 where there is none."""
        return self.state_sums(values) / jnp.maximum(self.state_counts(values.dtype), 1)

    def pair_means(self, values: Float[Array, "*steps"]) -> Float[Array, " pairs"]:
        """Mean of the values over the visits of each pair, [S A]; 0 where there is none."""
        return self.pair_sums(values) / jnp.maximum(self.pair_counts(values.dtype), 1)

    def _sums(self, values: Real[Array, "*steps"], index: Int[Array, "*steps"], size: int) -> Real[Array, " N"]:
        return jnp.zeros(size, values.dtype).at[index].add(jnp.where(self.valid, values, 0))
