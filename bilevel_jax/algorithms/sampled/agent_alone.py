"""The lower level alone: an agent that learns at the x it is given."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax

from bilevel_jax.agents import Agent
from bilevel_jax.algorithms.registry import register_algorithm
from bilevel_jax.algorithms.sampled.base import SampledAlgorithm, SampledEstimate, as_agent, batch_steps
from bilevel_jax.algorithms.upper import UpperLevel
from bilevel_jax.bilevel import SampledProblem
from bilevel_jax.core.sizes import size
from bilevel_jax.estimators import group_costs, sample_groups


class AgentAlone(SampledAlgorithm):
    """See `agent_alone`."""

    improvements: int = eqx.field(static=True, converter=size("improvements"))
    batch: int = eqx.field(static=True, converter=size("batch"))

    def improve_agent(self, key, state):
        def improve(agent, key):
            return self.agent.improve(key, agent, self.problem, state.x), None

        return lax.scan(improve, state.memory.agent, jax.random.split(key, self.improvements))[0]

    def estimate_from_samples(self, key, state):
        for_groups, for_loss = jax.random.split(key)
        groups = sample_groups(for_groups, self.problem, self.policy(state), self.batch)
        costs = group_costs(for_loss, self.problem, state.x, groups)
        return SampledEstimate(
            value=jnp.sum(costs.factors[None] * costs.each) / self.batch,
            gradient=optax.tree.zeros_like(state.x),
            memory=None,
            effective_sample_size=jnp.asarray(float(self.batch)),
        )

    @property
    def environment_steps(self):
        learning = self.improvements * self.agent.environment_steps(self.problem)
        return learning + batch_steps(self.problem, self.batch)


def agent_alone(
    problem: SampledProblem,
    optimizer: optax.GradientTransformation | UpperLevel | None = None,
    *,
    agent: Agent | None = None,
    improvements: int = 10,
    batch: int = 8,
) -> AgentAlone:
    """Train the agent at the x of the start. The gradient is zero, so x stays where it is.

    Use it to train an agent by a config, e.g. on the problem `task`. In a program of your own, `agents.train` does the
    same.

    Args:
      optimizer: of no effect; every algorithm has one. None is `optax.sgd(0)`.
      agent: None is `default_agent(problem)`.
      improvements: the number of `Agent.improve` per iteration (static).
      batch: groups of trajectories per iteration, whose mean loss is the objective (static).

    Raises:
      InputError: improvements or batch below 1.

    Example:
      >>> task = bj.problems.make("task", environment="cart_pole", horizon=200)
      >>> agent = bj.agents.SoftPQN(bj.networks.MLP(width=16), processes=4, steps=8)
      >>> algorithm = bj.algorithms.agent_alone(task, agent=agent, improvements=2, batch=2)
      >>> state = algorithm.init(jax.random.key(0), task.start(jax.random.key(1)))
      >>> state, info = algorithm.step(jax.random.key(2), state)
      >>> info.objective.shape, float(info.gradient_norm)
      ((), 0.0)
    """
    optimizer = optax.sgd(0.0) if optimizer is None else optimizer
    return AgentAlone(problem, optimizer, as_agent(problem, agent), improvements, batch)


register_algorithm("agent_alone", agent_alone)
