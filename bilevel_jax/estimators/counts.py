"""Counts of a simulator's steps, and values under their frequencies."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.core.reductions import einsum, matmul
from bilevel_jax.environments import TabularEnvironment, Trajectory, Visits
from bilevel_jax.linear import default_linear_solver, linear_solve
from bilevel_jax.mdp.transitions import DenseOperator


class Counts(eqx.Module):
    """`moves`[S A, S] counts the steps of a pair that led to each state without ending; `visits`[S A] counts all its
    steps.
    """

    moves: Float[Array, "pairs S"]
    visits: Float[Array, " pairs"]

    @classmethod
    def none(cls, environment: TabularEnvironment, dtype: Any) -> "Counts":
        """Return the counts before any step."""
        pairs = environment.num_pairs
        return cls(jnp.zeros((pairs, environment.num_states), dtype), jnp.zeros(pairs, dtype))

    @classmethod
    def of(cls, environment: TabularEnvironment, groups: Trajectory, dtype: Any) -> "Counts":
        """Return the counts of the valid steps of trajectories with any leading axes."""
        visits = Visits.of(environment, groups)
        none = cls.none(environment, dtype)
        goes_on = (groups.valid & ~groups.terminated).astype(dtype)
        return cls(
            none.moves.at[visits.pair, groups.next_observation].add(goes_on),
            visits.pair_counts(dtype),
        )

    def transition(self) -> Float[Array, "pairs S"]:
        """Return the frequencies [S A, S].

        A row sums to 1 minus the fraction of steps that ended, and to 0 for a pair that was never visited.
        """
        return self.moves / jnp.maximum(self.visits, 1)[:, None]

    def action_values(
        self, policy: Float[Array, "S A"], reward: Float[Array, "S A"], discount: Float[Array, ""]
    ) -> Float[Array, "S A"]:
        """Q of a policy under the frequencies, differentiable in the reward.

        A pair that was never seen counts as the end of the process.
        """
        discount = discount.astype(reward.dtype)
        follows = discount * self.transition().astype(reward.dtype).reshape(*reward.shape, -1)
        operator = DenseOperator(einsum("sa,sat->st", policy, follows))
        solver = default_linear_solver(reward.shape[0])
        value, _ = linear_solve(solver, operator, discount, jnp.sum(policy * reward, -1), poison=True)
        return reward + matmul(follows, value)
