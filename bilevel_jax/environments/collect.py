"""Runs processes that continue from call to call, under one policy."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Integer, PRNGKeyArray

from bilevel_jax.core.validation import as_size
from bilevel_jax.environments.policies import as_policy, require_policy
from bilevel_jax.environments.protocol import Trajectory
from bilevel_jax.environments.vector import Processes


def collect(
    key: PRNGKeyArray,
    processes: Processes,
    policy: Any,
    steps: int,
    *,
    with_states: bool = False,
    with_distributions: bool = False,
) -> tuple[Processes, Trajectory]:
    """Run `steps` steps of B processes under one policy; return the processes after them, and the trajectory [B, H =
    steps].

    Where a process ends, the next step is the first one of a new process. The last step's `next_observation` is that of
    the end, `terminated` or `truncated` says how it ended, and all steps are `valid`.

    Args:
      key: the key of this call; give each call its own.
      processes: from `start_processes`, or from the last call.
      policy: a `Policy`, or an argument of `as_policy`.
      steps: H (static).
      with_states: record the states, too (static); `trajectory.state` is None otherwise. Rollouts can start from them,
        but they may take much memory.
      with_distributions: record the policy's distributions, too (static); `trajectory.distribution` is None otherwise.

    Raises:
      InputError: steps is not an integer of at least 1; the policy's actions are not those of the environment.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> environment = bj.environments.TabularEnvironment(mdp)
      >>> policy = jnp.array([[0.5, 0.5], [1.0, 0.0]])  # [S, A]
      >>> environment = bj.environments.with_restarts(environment, every=100)
      >>> processes = bj.environments.start_processes(jax.random.key(0), environment, 8)
      >>> processes, trajectory = bj.environments.collect(jax.random.key(1), processes, policy, 16)
      >>> trajectory.action.shape
      (8, 16)
    """
    policy, steps = as_policy(policy), as_size("steps", steps)
    keys = processes.keys(key)

    def step(states: Any, h: Integer[Array, ""]) -> tuple[Any, Trajectory]:
        here = Processes(processes.environment, states)
        observation = here.observe()
        distributions = jax.vmap(policy.distribution)(observation)
        action = here.act(keys, h, distributions)
        require_policy(distributions, action, here.environment.action_space)
        there, made = here.advance(keys, h, action)
        record = Trajectory(
            state=states if with_states else None,
            observation=observation,
            action=action,
            probability=jax.vmap(lambda one, chosen: one.probability(chosen))(distributions, action),
            reward=made.reward,
            next_observation=made.observation,
            terminated=made.terminated,
            truncated=made.truncated,
            valid=jnp.ones_like(made.terminated),
            distribution=distributions if with_distributions else None,
        )
        return there.states, record

    states, records = lax.scan(step, processes.states, jnp.arange(steps, dtype=jnp.uint32))
    trajectory = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), records)
    return Processes(processes.environment, states), trajectory
