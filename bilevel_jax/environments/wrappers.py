"""Environments made from others: one that goes on after the end, one that stops after some steps."""

from typing import Any

import jax
import jax.numpy as jnp

from bilevel_jax.environments.protocol import Environment, TimeStep
from bilevel_jax.errors import InputError
from bilevel_jax.validation import require_setting


class AutoReset(Environment):
    """Starts a new process in the step that ends one; the `TimeStep` still tells how the old one ended."""

    environment: Environment

    @property
    def num_actions(self):
        return self.environment.num_actions

    @property
    def available(self):
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
    """

    environment: Environment
    steps: jax.Array

    def __init__(self, environment: Environment, steps: Any):
        if environment.resets:
            raise InputError("environment: it resets by itself; use AutoReset(TimeLimit(environment, steps))")
        require_setting("steps", steps, 1, "give the number of steps after which to stop", whole=True)
        self.environment = environment
        self.steps = jnp.asarray(steps).astype(jnp.int32)

    @property
    def num_actions(self):
        return self.environment.num_actions

    @property
    def available(self):
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
        return (following, time), TimeStep(made.observation, made.reward, made.terminated, made.truncated | late)
