"""The upper level's advantage, learned from earlier batches."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.bilevel.sampled_problem import require_tabular
from bilevel_jax.core.batching import merge_axes
from bilevel_jax.environments import Visits, policy_table
from bilevel_jax.estimators.baselines.protocol import Baseline, require_single
from bilevel_jax.estimators.counts import Counts


class LearnedAdvantage(Baseline):
    """The upper level's advantage Q - V instead of the costs of the trajectory: an actor-critic form.

    Q solves Q = c + discount P pi Q for the transition frequencies of all earlier batches and the mean costs c[s, a] of
    recent ones. `step_size` is the weight of a batch against those before it. The variance is far smaller than that of
    the costs of single trajectories. The estimate is consistent if a cost depends on the past only through the state
    and the action. Where a pair was never seen before, the costs of the trajectory are used.

    Args:
      step_size: in (0, 1].
      current: learn from a batch before it is used (static), as in `LearnedModel`.

    Raises:
      InputError: the environment is not tabular, or the loss depends on more than one trajectory.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> response, baseline = bj.estimators.OneStep(), bj.estimators.LearnedAdvantage()
      >>> algorithm = bj.algorithms.sobirl(problem, optax.adam(0.1), response=response, baseline=baseline)
    """

    step_size: Any = 0.2
    current: bool = eqx.field(default=True, static=True)

    @property
    def learns_first(self):
        return self.current

    def init(self, problem):
        environment = require_single("LearnedAdvantage", problem)
        counts = Counts.none(environment, problem.discount.dtype)
        return counts, jnp.zeros_like(counts.visits), jnp.zeros_like(counts.visits)

    def update(self, state, problem, groups, costs):
        counts, paid, weight = state
        environment = require_tabular(problem, "LearnedAdvantage")
        new = Counts.of(environment, groups, paid.dtype)
        total = Visits.of(environment, merge_axes(groups)).pair_sums(costs.each.astype(paid.dtype))
        keep = 1 - jnp.asarray(self.step_size, paid.dtype)
        return (
            jax.tree.map(jnp.add, counts, new),
            keep * paid + total,
            keep * weight + new.visits,
        )

    def credit(self, state, problem, policy, groups, costs) -> Float[Array, "N I H"]:
        counts, paid, weight = state
        environment = require_tabular(problem, "LearnedAdvantage")
        pi = policy_table(policy, environment.num_states).astype(paid.dtype)
        mean = jnp.where(weight > 0, paid / jnp.where(weight > 0, weight, 1), 0)
        q = counts.action_values(pi, mean.reshape(pi.shape), jnp.asarray(costs.discount, paid.dtype))
        v = jnp.sum(pi * q, -1)
        pair = environment.pair(groups.observation, groups.action)
        known = q.reshape(-1)[pair] - v[groups.observation]
        seen = counts.visits[pair] > 0
        paid_on = costs.returns()[:, None].astype(paid.dtype) - v[groups.observation]
        return jnp.where(seen, known, paid_on).astype(costs.each.dtype)
