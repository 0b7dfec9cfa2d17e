"""Many processes of one simulator. They continue from one call to the next, and start again where they end."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Integer, Key, PRNGKeyArray

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import as_size
from bilevel_jax.environments.policies import Categorical, Distribution
from bilevel_jax.environments.protocol import Environment, TimeStep
from bilevel_jax.environments.rollout import trajectory_keys
from bilevel_jax.environments.sampling import choose, two_numbers
from bilevel_jax.environments.wrappers import AutoReset, TimeLimit


class Processes(eqx.Module):
    """B processes. `environment` resets by itself; only `states` [B] change from step to step.

    In each call, process b has its own key, from `keys(key)`. Step h of the call draws the action from
    `fold_in(key_b, 2 h)` and the rest of the step from `fold_in(key_b, 2 h + 1)`. The results of a process therefore do
    not depend on the other processes.

    Raises:
      InputError: the environment does not reset by itself.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> environment = bj.environments.with_restarts(bj.environments.TabularEnvironment(mdp), every=100)
      >>> states = jax.vmap(environment.reset)(jax.random.split(jax.random.key(0), 3))
      >>> processes = bj.environments.Processes(environment, states)
      >>> processes.count
      3
    """

    environment: Environment
    states: Any

    def __check_init__(self):
        if not self.environment.resets:
            raise InputError(
                "environment: processes that end have to start anew; wrap it, with_restarts(environment) or "
                "AutoReset(environment)"
            )

    @property
    def count(self) -> int:
        """B."""
        return jax.tree.leaves(self.states)[0].shape[0]

    def observe(self) -> Any:
        """Observations, [B]."""
        return jax.vmap(self.environment.observe)(self.states)

    def keys(self, key: PRNGKeyArray) -> Key[Array, " B"]:
        """Return one key per process, [B]. All randomness of the process in one call comes from it."""
        return trajectory_keys(key, self.count)

    def numbers(self, keys: Key[Array, " B"], step: Integer[Array, ""] | int) -> Float32[Array, " B"]:
        """Return the number in [0, 1) with which each process picks one of finitely many actions in a step, [B]."""
        return two_numbers(keys, 2 * step)[0]

    def act(
        self, keys: Key[Array, " B"], step: Integer[Array, ""] | int, distributions: Distribution
    ) -> Integer[Array, " B"] | Float[Array, "B ..."]:
        """Return the action that each process draws from its distribution in a step, [B, ...]."""
        if isinstance(distributions, Categorical):
            # One hash, where a key to sample with would take three.
            return jax.vmap(choose)(self.numbers(keys, step), distributions.probabilities)
        for_actions = jax.vmap(jax.random.fold_in, (0, None))(keys, 2 * step)
        return jax.vmap(lambda one, key: one.sample(key))(distributions, for_actions)

    def advance(
        self,
        keys: Key[Array, " B"],
        step: Integer[Array, ""] | int,
        actions: Integer[Array, " B"] | Float[Array, "B ..."],
    ) -> tuple["Processes", TimeStep]:
        """Make one step of all processes; return them after it, and the `TimeStep` [B]."""
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 2 * step + 1)
        states, made = jax.vmap(self.environment.step)(step_keys, self.states, actions)
        return Processes(self.environment, states), made


def with_restarts(environment: Environment, every: Any = None) -> Environment:
    """Return the environment with processes that start again where they end, and after `every` steps unless that is
    None.

    An environment that resets by itself is returned unchanged.

    Raises:
      InputError: every is not a whole number of at least 1.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> environment = bj.environments.TabularEnvironment(mdp)
      >>> environment.resets, bj.environments.with_restarts(environment, every=100).resets
      (False, True)
    """
    if environment.resets:
        return environment
    return AutoReset(environment if every is None else TimeLimit(environment, every))


def start_processes(key: PRNGKeyArray, environment: Environment, count: int) -> Processes:
    """`count` processes at their start.

    Under a `TimeLimit` the processes start at different times of it, so that a batch covers all times of a trajectory.

    Args:
      key: the key of all starts.
      environment: one that resets by itself, see `with_restarts`.
      count: B (static).

    Raises:
      InputError: the environment does not reset by itself; count is not an integer of at least 1.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> environment = bj.environments.with_restarts(bj.environments.TabularEnvironment(mdp), every=100)
      >>> processes = bj.environments.start_processes(jax.random.key(0), environment, 8)
      >>> processes.count
      8
    """
    count = as_size("count", count)
    states = jax.vmap(environment.reset)(jax.random.split(key, count))
    if isinstance(environment, AutoReset) and isinstance(environment.environment, TimeLimit):
        limit = environment.environment.steps
        states = states[0], jnp.arange(count, dtype=jnp.int32) * limit // count
    return Processes(environment, states)
