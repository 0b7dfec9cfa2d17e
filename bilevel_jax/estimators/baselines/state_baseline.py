"""A table of what is paid from each state on."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.core.batching import merge_axes
from bilevel_jax.environments import Visits
from bilevel_jax.estimators.baselines.protocol import Subtraction, require_single


class StateBaseline(Subtraction):
    """A table b[S] of the expected costs from a state on, learned from earlier batches: the advantage form.

    b moves towards the batch's mean of `costs.returns()` over the visits of a state, by `step_size` but at least by 1 /
    (number of batches that visited it). It is for losses that are discounted sums of costs of one trajectory.

    Args:
      step_size: in (0, 1].

    Raises:
      InputError: the environment is not tabular, or the loss depends on more than one trajectory.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> response, baseline = bj.estimators.OneStep(), bj.estimators.StateBaseline()
      >>> algorithm = bj.algorithms.sobirl(problem, optax.adam(0.1), response=response, baseline=baseline)
    """

    step_size: Any = 0.2

    def init(self, problem):
        environment = require_single("StateBaseline", problem)
        zeros = jnp.zeros(environment.num_states, problem.discount.dtype)
        return zeros, zeros

    def update(self, state, problem, groups, costs):
        table, batches = state
        visits = Visits.of(require_single("StateBaseline", problem), merge_axes(groups))
        count = visits.state_counts(table.dtype)
        mean = visits.state_means(costs.returns().astype(table.dtype))
        batches = batches + (count > 0).astype(batches.dtype)
        least = jnp.asarray(self.step_size, table.dtype)
        rate = jnp.where(count > 0, jnp.maximum(1 / jnp.maximum(batches, 1), least), 0)
        return table + rate * (mean - table), batches

    def values(self, state, problem, groups, costs) -> Float[Array, "N I H"]:
        del problem
        return state[0][groups.observation].astype(costs.each.dtype)
