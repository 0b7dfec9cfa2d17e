"""Trains an agent alone, at one upper variable."""

from typing import Any

import equinox as eqx
import jax
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.agents.protocol import Agent
from bilevel_jax.bilevel.sampled_problem import SampledProblem
from bilevel_jax.core.validation import as_size


class Training(eqx.Module):
    """The result of `train`: the agent's `state`, `history`, its reports by name after each improvement, [N], and
    `environment_steps`, the number of steps of the simulator.
    """

    state: Any
    history: dict[str, Float[Array, " N"]]
    environment_steps: int = eqx.field(static=True)


def train(
    key: PRNGKeyArray, agent: Agent, problem: SampledProblem, x: Any, improvements: int, state: Any = None
) -> Training:
    """Improve an agent `improvements` times at x, in one loop on the device.

    Use it under jit; vmap it over keys to train several seeds at once.

    Args:
      key: the key of the whole training.
      agent: any `Agent`.
      problem: a `SampledProblem`, e.g. `problems.Task`.
      x: the upper variable.
      improvements: N (static).
      state: the agent's state to go on from; None begins anew.

    Raises:
      InputError: improvements is not an integer of at least 1; see `agent.init`.

    Example:
      >>> task = bj.problems.Task(bj.environments.classic.CartPole(), scale=0.1, horizon=500)
      >>> agent = bj.agents.SoftPQN(bj.networks.MLP(width=16), processes=4, steps=8)
      >>> trained = jax.jit(lambda key: bj.agents.train(key, agent, task, jnp.zeros(()), 3))(jax.random.key(0))
      >>> trained.history["loss"].shape, trained.environment_steps
      ((3,), 96)
    """
    improvements = as_size("improvements", improvements)
    for_init, for_steps = jax.random.split(key)
    state = agent.init(for_init, problem, x) if state is None else state

    def improve(state: Any, key: PRNGKeyArray) -> tuple[Any, dict[str, Array]]:
        state = agent.improve(key, state, problem, x)
        return state, agent.report(state)

    state, history = lax.scan(improve, state, jax.random.split(for_steps, improvements))
    return Training(state, history, improvements * agent.environment_steps(problem))
