"""Environments that wrap others: one that goes on after the end, and one that stops after some steps."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Int32, Integer

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import require_setting
from bilevel_jax.environments.protocol import Environment, TimeStep


class AutoReset(Environment):
    """Starts a new process in the step that ends one. The `TimeStep` still says how the old one ended.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> environment = bj.environments.TabularEnvironment(mdp)
      >>> bj.environments.AutoReset(environment).resets
      True
    """

    environment: Environment

    @property
    def action_space(self):
        return self.environment.action_space

    @property
    def available(self) -> Bool[Array, "S A"] | None:
        return self.environment.available

    @property
    def resets(self):
        return True

    def reset(self, key):
        return self.environment.reset(key)

    def observe(self, state):
        return self.environment.observe(state)

    def step(self, key, state, action):
        for_step, for_reset = jax.random.split(key)
        following, made = self.environment.step(for_step, state, action)
        fresh = self.environment.reset(for_reset)
        ended = made.terminated | made.truncated
        return jax.tree.map(lambda new, old: jax.lax.select_n(ended, old, new), fresh, following), made


class TimeLimit(Environment):
    """Truncates a process after `steps` steps (a number, which may be traced).

    The state is (state of the inner environment, steps made). To go on after the limit, put `AutoReset`
    around it.

    Raises:
      InputError: steps is not a whole number of at least 1; the environment resets by itself, so that a
        limit around it would go on counting.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> environment = bj.environments.TabularEnvironment(mdp)
      >>> limited = bj.environments.TimeLimit(environment, 1)
      >>> state, step = limited.step(jax.random.key(1), limited.reset(jax.random.key(0)), jnp.asarray(0))
      >>> bool(step.truncated)
      True
    """

    environment: Environment
    steps: Int32[Array, ""]

    def __init__(self, environment: Environment, steps: Integer[ArrayLike, ""] | Any):
        if environment.resets:
            raise InputError("environment: it resets by itself; use AutoReset(TimeLimit(environment, steps))")
        require_setting("steps", steps, 1, "give the number of steps after which to stop", whole=True)
        self.environment = environment
        self.steps = jnp.asarray(steps).astype(jnp.int32)

    @property
    def action_space(self):
        return self.environment.action_space

    @property
    def available(self) -> Bool[Array, "S A"] | None:
        return self.environment.available

    def reset(self, key):
        return self.environment.reset(key), jnp.zeros((), jnp.int32)

    def observe(self, state):
        return self.environment.observe(state[0])

    def step(self, key, state, action):
        inner, time = state
        following, made = self.environment.step(key, inner, action)
        time = time + 1
        late = (time >= self.steps) & ~made.terminated
        return (following, time), TimeStep(
            observation=made.observation,
            reward=made.reward,
            terminated=made.terminated,
            truncated=made.truncated | late,
        )
