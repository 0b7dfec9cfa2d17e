"""Zero-order: two values of the objective along a random direction."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.agents import Agent
from bilevel_jax.algorithms.registry import register_algorithm
from bilevel_jax.algorithms.sampled.base import SampledAlgorithm, SampledEstimate, as_agent, batch_steps
from bilevel_jax.algorithms.upper import UpperLevel
from bilevel_jax.bilevel import SampledProblem
from bilevel_jax.core.validation import as_float, as_size, require_positive
from bilevel_jax.estimators import group_costs, sample_groups


class ZeroOrder(SampledAlgorithm):
    """See `zero_order`. The agent's state is that of two agents, and the direction z that parts them."""

    radius: Float[Array, ""]
    batch: int = eqx.field(static=True)

    def init_agent(self, key, x):
        above, below = (self.agent.init(side, self.problem, x) for side in jax.random.split(key))
        return above, below, jax.tree.map(jnp.zeros_like, x)

    def improve_agent(self, key, state):
        for_direction, for_agents = jax.random.split(key)
        leaves, structure = jax.tree.flatten(state.x)
        keys = jax.random.split(for_direction, len(leaves))
        drawn = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
        direction = jax.tree.unflatten(structure, drawn)
        above, below, _ = state.memory.agent
        # The same key on both sides, so that what they share cancels.
        above = self.agent.improve(for_agents, above, self.problem, self._moved(state.x, direction, 1))
        below = self.agent.improve(for_agents, below, self.problem, self._moved(state.x, direction, -1))
        return above, below, direction

    def report_agent(self, agent):
        return self.agent.report(agent[0])

    def policy(self, state):
        return self.agent.policy(state.memory.agent[0], self.problem, state.x)

    def estimate_from_samples(self, key, state):
        above, below, direction = state.memory.agent
        value_above = self._value(key, above, self._moved(state.x, direction, 1))
        value_below = self._value(key, below, self._moved(state.x, direction, -1))
        slope = (value_above - value_below) / (2 * self.radius.astype(value_above.dtype))
        gradient = jax.tree.map(lambda z: slope.astype(z.dtype) * z, direction)
        return SampledEstimate(
            value=(value_above + value_below) / 2,
            gradient=gradient,
            memory=None,
            effective_sample_size=jnp.asarray(float(self.batch)),
        )

    def _moved(self, x: Any, direction: Any, sign: int) -> Any:
        return jax.tree.map(lambda leaf, z: leaf + sign * self.radius.astype(leaf.dtype) * z, x, direction)

    def _value(self, key: PRNGKeyArray, agent: Any, x: Any) -> Float[Array, ""]:
        """The mean loss of a batch at x."""
        for_groups, for_loss = jax.random.split(key)
        groups = sample_groups(for_groups, self.problem, self.agent.policy(agent, self.problem, x), self.batch)
        costs = group_costs(for_loss, self.problem, x, groups)
        return jnp.sum(costs.factors[None] * costs.each) / self.batch

    @property
    def environment_steps(self):
        return 2 * (self.agent.environment_steps(self.problem) + batch_steps(self.problem, self.batch))


def zero_order(
    problem: SampledProblem,
    optimizer: optax.GradientTransformation | UpperLevel,
    *,
    agent: Agent | None = None,
    batch: int = 64,
    radius: Any = 0.1,
) -> ZeroOrder:
    """The two-point estimator (phi(x + u z) - phi(x - u z)) / (2 u) z, z normal, u = radius.

    (Nesterov and Spokoiny 2017, "Random gradient-free minimization of convex functions", in its
    symmetric form.) The published runs (Thoma et al. 2024, `train_zero_order.py`) take exact values and one side,
    (phi(x + u z) - phi(x)) / u z, with u proportional to 1 / iteration. Here values are sample means, both sides are
    drawn with the same random numbers, and u is constant, because a smaller u would increase the noise.

    Args:
      agent: the lower level; None is `default_agent(problem)`.
      radius: u, in units of x.

    Raises:
      InputError: batch below 1, radius not above 0.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> algorithm = bj.algorithms.zero_order(problem, optax.adam(0.1), batch=8)
      >>> state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
      >>> state, info = algorithm.step(jax.random.key(2), state)
      >>> state.x.shape, info.objective.shape
      ((8, 3), ())
    """
    radius = as_float("radius", radius)
    require_positive("radius", radius, "0.1 is usual")
    return ZeroOrder(problem, optimizer, as_agent(problem, agent), radius, as_size("batch", batch))


register_algorithm("zero_order", zero_order)
