"""What is subtracted from a loss before it is credited to actions: less variance, the same mean."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from bilevel_jax.environments import Trajectory
from bilevel_jax.errors import InputError
from bilevel_jax.estimators.costs import Costs
from bilevel_jax.estimators.problem import SampledProblem, require_tabular


class Baseline(eqx.Module):
    """The protocol. `values` may depend on a step's own past and on other groups, never on its own future."""

    def init(self, problem: SampledProblem) -> Any:
        """The state before anything was learned; None for baselines that learn nothing."""
        del problem

    def update(self, state: Any, problem: SampledProblem, groups: Trajectory, costs: Costs) -> Any:
        """Learn from a batch, for later ones."""
        del problem, groups, costs
        return state

    @abc.abstractmethod
    def values(self, state: Any, problem: SampledProblem, groups: Trajectory, costs: Costs) -> jax.Array:
        """[N, I, H], in the terms of `costs.returns()`, from groups [N, I, H] and what each paid, [N, H]."""


class NoBaseline(Baseline):
    """Zero."""

    def values(self, state, problem, groups, costs):
        del state, problem, groups
        return jnp.zeros_like(costs.each)[:, None]


class LeaveOneOut(Baseline):
    """The mean over the other groups of the batch, at the same step. With one group only, zero."""

    def values(self, state, problem, groups, costs):
        del state, problem, groups
        to_go = costs.returns()
        others = max(1, to_go.shape[0] - 1)
        return ((jnp.sum(to_go, 0) - to_go) / others)[:, None]


class StateBaseline(Baseline):
    """A table b[S] of what is paid from a state on, learned from earlier batches: the advantage form.

    b moves towards the batch's mean of `costs.returns()` over the visits of a state by `step_size`, at
    least by 1 / (batches that visited it). For losses that are discounted sums of costs of one trajectory.

    Args:
      step_size: in (0, 1].

    Raises:
      InputError: the environment is not tabular, or the loss looks at more than one trajectory.
    """

    step_size: Any = 0.2

    def init(self, problem):
        environment = require_tabular(problem, "StateBaseline")
        if problem.trajectories != 1:
            raise InputError(
                f"trajectories: StateBaseline is for losses of one trajectory, the problem has "
                f"{problem.trajectories}; use LeaveOneOut()"
            )
        zeros = jnp.zeros(environment.num_states, problem.discount.dtype)
        return zeros, zeros

    def update(self, state, problem, groups, costs):
        del problem
        table, batches = state
        states = groups.observation[:, 0]
        weight = groups.valid[:, 0].astype(table.dtype)
        ahead = costs.returns().astype(table.dtype)
        count = jnp.zeros_like(table).at[states].add(weight)
        mean = jnp.zeros_like(table).at[states].add(weight * ahead) / jnp.maximum(count, 1)
        batches = batches + (count > 0).astype(batches.dtype)
        rate = jnp.where(count > 0, jnp.maximum(1 / jnp.maximum(batches, 1), self.step_size), 0)
        return table + rate * (mean - table), batches

    def values(self, state, problem, groups, costs):
        del problem
        return state[0][groups.observation].astype(costs.each.dtype)
