"""A car that is too weak for its hill (Moore 1990)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.core.validation import as_float
from bilevel_jax.environments.protocol import Environment, TimeStep
from bilevel_jax.environments.spaces import Discrete


class MountainCar(Environment):
    """Push a car left (0), not at all (1) or right (2) until it is over the hill at 0.5. Each step earns -1.

    The state, which is the observation, is (position, velocity). The start is drawn from [-0.6, -0.4], at rest. The
    usual task, MountainCar-v0, stops after 200 steps: `TimeLimit(MountainCar(), 200)`.

    Args:
      force, gravity: the change of velocity per step by a push, and at most by the slope.
      goal: the position at which the process terminates.

    Example:
      >>> environment = bj.environments.classic.MountainCar()
      >>> state, step = environment.step(jax.random.key(1), environment.reset(jax.random.key(0)), jnp.asarray(2))
      >>> state.shape, float(step.reward)
      ((2,), -1.0)
    """

    force: Float[Array, ""]
    gravity: Float[Array, ""]
    goal: Float[Array, ""]

    def __init__(self, *, force: Any = 0.001, gravity: Any = 0.0025, goal: Any = 0.5):
        self.force = as_float("force", force, float)
        self.gravity = as_float("gravity", gravity, float)
        self.goal = as_float("goal", goal, float)

    @property
    def action_space(self):
        return Discrete(3)

    def reset(self, key):
        position = jax.random.uniform(key, (), jnp.result_type(float), -0.6, -0.4)
        return jnp.stack([position, jnp.zeros_like(position)])

    def observe(self, state):
        return state

    def step(self, key, state, action):
        del key
        position, velocity = state
        push = (action - 1).astype(state.dtype) * self.force
        velocity = jnp.clip(velocity + push - self.gravity * jnp.cos(3 * position), -0.07, 0.07)
        position = jnp.clip(position + velocity, -1.2, 0.6)
        velocity = jnp.where((position <= -1.2) & (velocity < 0), 0, velocity)
        moved = jnp.stack([position, velocity])
        ended = (position >= self.goal) & (velocity >= 0)
        return moved, TimeStep(moved, -jnp.ones_like(position), ended, jnp.zeros_like(ended))
