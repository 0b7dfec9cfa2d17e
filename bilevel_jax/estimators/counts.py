"""What was counted of a simulator, and values under these frequencies."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from bilevel_jax.adjoint import default_linear_solver, linear_solve
from bilevel_jax.environments import TabularEnvironment, Trajectory
from bilevel_jax.reductions import einsum, matmul
from bilevel_jax.transitions import DenseOperator


class Counts(eqx.Module):
    """`moves`[S A, S]: steps that led somewhere without ending; `visits`[S A]: all steps of a pair."""

    moves: jax.Array
    visits: jax.Array

    @classmethod
    def none(cls, environment: TabularEnvironment, dtype: Any) -> "Counts":
        """Nothing seen yet."""
        pairs = environment.num_states * environment.num_actions
        return cls(jnp.zeros((pairs, environment.num_states), dtype), jnp.zeros(pairs, dtype))

    @classmethod
    def of(cls, environment: TabularEnvironment, groups: Trajectory, dtype: Any) -> "Counts":
        """The valid steps of trajectories, any leading axes."""
        pair = groups.observation * environment.num_actions + groups.action
        none = cls.none(environment, dtype)
        goes_on = (groups.valid & ~groups.terminated).astype(dtype)
        return cls(
            none.moves.at[pair, groups.next_observation].add(goes_on),
            none.visits.at[pair].add(groups.valid.astype(dtype)),
        )

    def transition(self) -> jax.Array:
        """Frequencies [S A, S]; rows sum to 1 less what ended, to 0 where nothing was seen."""
        return self.moves / jnp.maximum(self.visits, 1)[:, None]

    def action_values(self, policy: jax.Array, reward: jax.Array, discount: jax.Array) -> jax.Array:
        """Q[S, A] of a policy [S, A] under the frequencies, differentiable in the reward [S, A].

        A pair that was never seen counts as the end of the process.
        """
        discount = discount.astype(reward.dtype)
        follows = discount * self.transition().astype(reward.dtype).reshape(*reward.shape, -1)
        operator = DenseOperator(einsum("sa,sat->st", policy, follows))
        solver = default_linear_solver(reward.shape[0])
        value, _ = linear_solve(solver, operator, discount, jnp.sum(policy * reward, -1), poison=True)
        return reward + matmul(follows, value)
