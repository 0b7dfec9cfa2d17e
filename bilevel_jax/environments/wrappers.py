"""Environments that wrap others: two that go on after the end, one that stops after some steps, one that earns
differently.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Int32, Integer

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.functions import as_pytree
from bilevel_jax.core.validation import as_float, require_setting
from bilevel_jax.environments.protocol import Environment, TimeStep


class Wrapper(Environment):
    """The base of environments around another one, `environment`: all but `step` is that of the inner one.

    A subclass with a state of its own overrides `reset` and `observe`, too.
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
        return self.environment.resets

    def reset(self, key):
        return self.environment.reset(key)

    def observe(self, state):
        return self.environment.observe(state)


class AutoReset(Wrapper):
    """Starts a new process in the step that ends one. The `TimeStep` still says how the old one ended.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> environment = bj.environments.TabularEnvironment(mdp)
      >>> bj.environments.AutoReset(environment).resets
      True
    """

    @property
    def resets(self):
        return True

    def step(self, key, state, action):
        for_step, for_reset = jax.random.split(key)
        following, made = self.environment.step(for_step, state, action)
        fresh = self.environment.reset(for_reset)
        ended = made.terminated | made.truncated
        return jax.tree.map(lambda new, old: jax.lax.select_n(ended, old, new), fresh, following), made


class TimeLimit(Wrapper):
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

    steps: Int32[Array, ""]

    def __init__(self, environment: Environment, steps: Integer[ArrayLike, ""] | Any):
        if environment.resets:
            raise InputError("environment: it resets by itself; use AutoReset(TimeLimit(environment, steps))")
        require_setting("steps", steps, 1, "give the number of steps after which to stop", whole=True)
        self.environment = environment
        self.steps = jnp.asarray(steps).astype(jnp.int32)

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


class Continuing(Wrapper):
    """A process that never ends: the end is a state like others, and any action in it leads to a new start.

    The lengths of episodes then tell nothing of a reward, and a constant that is added to every reward changes no
    policy. The step out of an end earns 0 from this environment; put `Rewarded` around it to give each state its own.

    The state is (state of the inner environment, whether it has ended).

    Raises:
      InputError: the environment resets by itself: its ends are never seen.

    Example:
      >>> environment = bj.environments.Continuing(bj.environments.classic.CartPole())
      >>> fallen = (jnp.array([0.0, 0.0, 1.0, 0.0]), jnp.asarray(True))
      >>> state, step = environment.step(jax.random.key(0), fallen, jnp.asarray(1))
      >>> bool(jnp.abs(state[0][2]) < 0.1), bool(step.terminated)
      (True, False)
    """

    def __check_init__(self):
        if self.environment.resets:
            raise InputError("environment: it resets by itself; wrap the one inside, Continuing(environment)")

    def reset(self, key):
        return self.environment.reset(key), jnp.zeros((), bool)

    def observe(self, state):
        return self.environment.observe(state[0])

    def step(self, key, state, action):
        inner, ended = state
        for_step, for_reset = jax.random.split(key)
        following, made = self.environment.step(for_step, inner, action)
        fresh = self.environment.reset(for_reset)

        def either(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda one, other: jax.lax.select_n(ended, other, one), new, old)

        ends = (made.terminated | made.truncated) & ~ended
        step = TimeStep(
            observation=either(self.environment.observe(fresh), made.observation),
            reward=jnp.where(ended, 0, made.reward),
            terminated=jnp.zeros_like(ends),
            truncated=jnp.zeros_like(ends),
        )
        return (either(fresh, following), ends), step


class Rewarded(Wrapper):
    """An environment that emits another reward, a function of the step.

    Args:
      environment: the dynamics.
      function: (observation, action, next observation) -> reward, a number. A function that is a pytree keeps its
        leaves, another one is static.

    Raises:
      InputError: it is no function, or (in `step`) gives anything but a number.

    Example:
      >>> def upright(observation, action, next_observation):
      ...     return jnp.cos(next_observation[2])
      >>> environment = bj.environments.Rewarded(bj.environments.classic.CartPole(), upright)
      >>> state, step = environment.step(jax.random.key(0), jnp.zeros(4), jnp.asarray(1))
      >>> float(step.reward)
      1.0
    """

    function: Callable

    def __init__(self, environment: Environment, function: Callable):
        self.environment = environment
        self.function = as_pytree("function", function)

    def step(self, key, state, action):
        before = self.environment.observe(state)
        following, made = self.environment.step(key, state, action)
        reward = as_float("function", self.function(before, action, made.observation), None, ())
        return following, made._replace(reward=reward)
