"""A pendulum that a motor swings up; its actions are continuous."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.core.validation import as_float
from bilevel_jax.environments.protocol import Environment, TimeStep
from bilevel_jax.environments.spaces import Box


class Pendulum(Environment):
    """Turn a pendulum upright by a torque in [-2, 2], which is too weak to do it at once.

    The state is (angle, angular velocity), the observation (cosine, sine, angular velocity). A step earns
    -(angle^2 + 0.1 velocity^2 + 0.001 torque^2), the angle taken from -pi to pi. It never terminates: the usual task,
    Pendulum-v1, stops after 200 steps, `TimeLimit(Pendulum(), 200)`.

    Args:
      gravity, mass, length: in SI units.
      interval: seconds between two steps.

    Example:
      >>> environment = bj.environments.classic.Pendulum()
      >>> state, step = environment.step(jax.random.key(1), environment.reset(jax.random.key(0)), jnp.zeros(1))
      >>> step.observation.shape, bool(step.reward <= 0)
      ((3,), True)
    """

    gravity: Float[Array, ""]
    mass: Float[Array, ""]
    length: Float[Array, ""]
    interval: Float[Array, ""]

    def __init__(self, *, gravity: Any = 10.0, mass: Any = 1.0, length: Any = 1.0, interval: Any = 0.05):
        self.gravity = as_float("gravity", gravity, float)
        self.mass = as_float("mass", mass, float)
        self.length = as_float("length", length, float)
        self.interval = as_float("interval", interval, float)

    @property
    def action_space(self):
        return Box(-2.0, 2.0, (1,))

    def reset(self, key):
        spread = jnp.asarray([jnp.pi, 1.0])
        return jax.random.uniform(key, (2,), spread.dtype, -1, 1) * spread

    def observe(self, state):
        return jnp.stack([jnp.cos(state[0]), jnp.sin(state[0]), state[1]])

    def step(self, key, state, action):
        del key
        angle, velocity = state
        torque = jnp.clip(action[0].astype(state.dtype), -2, 2)
        lean = jnp.mod(angle + jnp.pi, 2 * jnp.pi) - jnp.pi
        reward = -(lean**2 + 0.1 * velocity**2 + 0.001 * torque**2)
        pull = 3 * self.gravity / (2 * self.length) * jnp.sin(angle)
        drive = 3 / (self.mass * self.length**2) * torque
        velocity = jnp.clip(velocity + (pull + drive) * self.interval, -8, 8)
        moved = jnp.stack([angle + velocity * self.interval, velocity])
        never = jnp.zeros((), bool)
        return moved, TimeStep(self.observe(moved), reward, never, never)
