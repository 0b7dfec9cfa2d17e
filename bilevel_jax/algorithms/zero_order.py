"""Zero-order: two values of the objective along a random direction."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from bilevel_jax.agents import Agent
from bilevel_jax.algorithms.sampled import SampledAlgorithm, SampledEstimate, batch_steps, require_batch
from bilevel_jax.algorithms.upper import UpperLevel
from bilevel_jax.estimators import SampledProblem, paid, sample_groups
from bilevel_jax.validation import as_float, require_positive


class ZeroOrder(SampledAlgorithm):
    """See `zero_order`. The agent's state is that of two agents, and the direction z that parts them."""

    radius: jax.Array
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
        above, below, _ = state.agent
        # The same key on both sides, so that what they share cancels.
        above = self.agent.improve(for_agents, above, self.problem, self._moved(state.x, direction, 1))
        below = self.agent.improve(for_agents, below, self.problem, self._moved(state.x, direction, -1))
        return above, below, direction

    def policy(self, state):
        return self.agent.policy(state.agent[0], self.problem, state.x)

    def estimate(self, key, state):
        above, below, direction = state.agent
        value_above = self._value(key, above, self._moved(state.x, direction, 1))
        value_below = self._value(key, below, self._moved(state.x, direction, -1))
        slope = (value_above - value_below) / (2 * self.radius.astype(value_above.dtype))
        gradient = jax.tree.map(lambda z: slope.astype(z.dtype) * z, direction)
        return SampledEstimate((value_above + value_below) / 2, gradient, None, jnp.asarray(float(self.batch)))

    def _moved(self, x: Any, direction: Any, sign: int) -> Any:
        return jax.tree.map(lambda leaf, z: leaf + sign * self.radius.astype(leaf.dtype) * z, x, direction)

    def _value(self, key: jax.Array, agent: Any, x: Any) -> jax.Array:
        """The mean loss of a batch at x."""
        for_groups, for_loss = jax.random.split(key)
        groups = sample_groups(for_groups, self.problem, self.agent.policy(agent, self.problem, x), self.batch)
        costs = paid(for_loss, self.problem, x, groups)
        return jnp.sum(costs.factors[None] * costs.each) / self.batch

    @property
    def environment_steps(self):
        return 2 * (self.agent.environment_steps(self.problem) + batch_steps(self.problem, self.batch))


def zero_order(
    problem: SampledProblem,
    optimizer: optax.GradientTransformation | UpperLevel,
    *,
    agent: Agent,
    batch: int = 64,
    radius: Any = 0.1,
) -> ZeroOrder:
    """The two-point estimator (phi(x + u z) - phi(x - u z)) / (2 u) z, z normal, u = radius.

    (Nesterov and Spokoiny 2017, "Random gradient-free minimization of convex functions", in its
    symmetric form.) The published runs (Thoma et al. 2024, `train_zero_order.py`) take exact values and
    one side, (phi(x + u z) - phi(x)) / u z with u falling as 1 / iteration; here values are sample
    means, both sides are drawn with the same random numbers, and u stays: 1 / u would grow the noise.

    Args:
      radius: u, in units of x.

    Raises:
      InputError: batch below 1, radius not above 0.
    """
    radius = as_float("radius", radius)
    require_positive("radius", radius, "0.1 is usual")
    return ZeroOrder(problem, optimizer, agent, radius, require_batch(batch))
