"""What is subtracted from a loss before it is credited to actions: less variance, the same mean."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from bilevel_jax.environments import TabularEnvironment, Trajectory
from bilevel_jax.errors import InputError
from bilevel_jax.estimators.costs import Costs
from bilevel_jax.estimators.counts import Counts
from bilevel_jax.estimators.problem import SampledProblem, require_tabular
from bilevel_jax.functions import ActionFunction, tabulate


class Baseline(eqx.Module):
    """The protocol: what each action is charged with, so that the estimate has less variance."""

    @property
    def learns_first(self) -> bool:
        """Whether it wants to learn from a batch before it is used on it; see `LearnedAdvantage`."""
        return False

    def init(self, problem: SampledProblem) -> Any:
        """The state before anything was learned; None for baselines that learn nothing."""
        del problem

    def update(self, state: Any, problem: SampledProblem, groups: Trajectory, costs: Costs) -> Any:
        """Learn from a batch, for later ones."""
        del problem, groups, costs
        return state

    @abc.abstractmethod
    def credit(
        self, state: Any, problem: SampledProblem, policy: ActionFunction, groups: Trajectory, costs: Costs
    ) -> jax.Array:
        """[N, I, H], in the terms of `costs.returns()`, from groups [N, I, H] and what each paid, [N, H]."""


class _Subtracted(Baseline):
    """What was still paid from a step on, less `values`, which leave the mean as it is."""

    @abc.abstractmethod
    def values(self, state: Any, problem: SampledProblem, groups: Trajectory, costs: Costs) -> jax.Array:
        """[N, I, H]. They may depend on a step's own past and on other groups, never on its own future."""

    def credit(self, state, problem, policy, groups, costs):
        del policy
        return costs.returns()[:, None] - self.values(state, problem, groups, costs)


class NoBaseline(_Subtracted):
    """Zero."""

    def values(self, state, problem, groups, costs):
        del state, problem, groups
        return jnp.zeros_like(costs.each)[:, None]


class LeaveOneOut(_Subtracted):
    """The mean over the other groups of the batch, at the same step. With one group only, zero."""

    def values(self, state, problem, groups, costs):
        del state, problem, groups
        to_go = costs.returns()
        others = max(1, to_go.shape[0] - 1)
        return ((jnp.sum(to_go, 0, keepdims=True) - to_go) / others)[:, None]


class StateBaseline(_Subtracted):
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
        environment = _require_single("StateBaseline", problem)
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
        least = jnp.asarray(self.step_size, table.dtype)
        rate = jnp.where(count > 0, jnp.maximum(1 / jnp.maximum(batches, 1), least), 0)
        return table + rate * (mean - table), batches

    def values(self, state, problem, groups, costs):
        del problem
        return state[0][groups.observation].astype(costs.each.dtype)


class LearnedAdvantage(Baseline):
    """The upper level's advantage Q - V in the place of what was paid: an actor-critic form.

    Q solves Q = c + discount P pi Q for the transition frequencies of all earlier batches and the mean
    costs c[s, a] of late ones, `step_size` being the weight of a batch against those before it. Far less
    variance than what single trajectories paid; consistent, if a cost depends on the past through the
    state and action only. Where a pair was never seen before, the paid returns stand in.

    Args:
      step_size: in (0, 1].
      current: learn from a batch before it is used (static), as in `LearnedModel`.

    Raises:
      InputError: the environment is not tabular, or the loss looks at more than one trajectory.
    """

    step_size: Any = 0.2
    current: bool = eqx.field(default=True, static=True)

    @property
    def learns_first(self):
        return self.current

    def init(self, problem):
        environment = _require_single("LearnedAdvantage", problem)
        counts = Counts.none(environment, problem.discount.dtype)
        return counts, jnp.zeros_like(counts.visits), jnp.zeros_like(counts.visits)

    def update(self, state, problem, groups, costs):
        counts, paid, weight = state
        environment = require_tabular(problem, "LearnedAdvantage")
        new = Counts.of(environment, groups, paid.dtype)
        pair = (groups.observation * environment.num_actions + groups.action)[:, 0]
        each = jnp.where(groups.valid[:, 0], costs.each, 0).astype(paid.dtype)
        keep = 1 - jnp.asarray(self.step_size, paid.dtype)
        return (
            jax.tree.map(jnp.add, counts, new),
            keep * paid + jnp.zeros_like(paid).at[pair].add(each),
            keep * weight + new.visits,
        )

    def credit(self, state, problem, policy, groups, costs):
        counts, paid, weight = state
        environment = require_tabular(problem, "LearnedAdvantage")
        pi = tabulate(policy, environment.num_states).values.astype(paid.dtype)
        mean = jnp.where(weight > 0, paid / jnp.where(weight > 0, weight, 1), 0)
        q = counts.action_values(pi, mean.reshape(pi.shape), jnp.asarray(costs.discount, paid.dtype))
        v = jnp.sum(pi * q, -1)
        pair = groups.observation * environment.num_actions + groups.action
        known = q.reshape(-1)[pair] - v[groups.observation]
        seen = counts.visits[pair] > 0
        paid_on = costs.returns()[:, None].astype(paid.dtype) - v[groups.observation]
        return jnp.where(seen, known, paid_on).astype(costs.each.dtype)


def _require_single(name: str, problem: SampledProblem) -> TabularEnvironment:
    """The environment, if it is tabular and losses look at one trajectory. Raises InputError."""
    if problem.trajectories != 1:
        raise InputError(
            f"trajectories: {name} is for losses of one trajectory, the problem has {problem.trajectories}; use "
            f"LeaveOneOut()"
        )
    return require_tabular(problem, name)
