"""A pole on a cart (Barto, Sutton and Anderson 1983)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.core.validation import as_float, require_positive
from bilevel_jax.environments.protocol import Environment, TimeStep
from bilevel_jax.environments.spaces import Discrete


class CartPole(Environment):
    """Push a cart to the left (0) or right (1), so that the pole on it does not fall. Each step earns 1.

    The state, which is the observation, is (position, velocity, angle, angular velocity), each drawn from
    [-0.05, 0.05] at the start. The process terminates where the cart leaves `track` or the pole leans more than
    `angle`. The usual task, CartPole-v1, stops after 500 steps: `TimeLimit(CartPole(), 500)`.

    Args:
      gravity, cart_mass, pole_mass, half_length, force: in SI units. A negative gravity lets the pole hang.
      interval: seconds between two steps; the physics are integrated by Euler's method.
      track, angle: the limits, in metres and radians.

    Raises:
      InputError: a mass, length, interval or limit that is not above 0.

    Example:
      >>> environment = bj.environments.classic.CartPole()
      >>> state = environment.reset(jax.random.key(0))
      >>> state, step = environment.step(jax.random.key(1), state, jnp.asarray(1))
      >>> state.shape, float(step.reward)
      ((4,), 1.0)
    """

    gravity: Float[Array, ""]
    cart_mass: Float[Array, ""]
    pole_mass: Float[Array, ""]
    half_length: Float[Array, ""]
    force: Float[Array, ""]
    interval: Float[Array, ""]
    track: Float[Array, ""]
    angle: Float[Array, ""]

    def __init__(
        self,
        *,
        gravity: Any = 9.8,
        cart_mass: Any = 1.0,
        pole_mass: Any = 0.1,
        half_length: Any = 0.5,
        force: Any = 10.0,
        interval: Any = 0.02,
        track: Any = 2.4,
        angle: Any = 12 * 3.141592653589793 / 180,
    ):
        self.gravity = as_float("gravity", gravity, float)
        self.force = as_float("force", force, float)
        self.cart_mass = _above_zero("cart_mass", cart_mass, "kilograms")
        self.pole_mass = _above_zero("pole_mass", pole_mass, "kilograms")
        self.half_length = _above_zero("half_length", half_length, "metres")
        self.interval = _above_zero("interval", interval, "seconds")
        self.track = _above_zero("track", track, "metres")
        self.angle = _above_zero("angle", angle, "radians")

    @property
    def action_space(self):
        return Discrete(2)

    def reset(self, key):
        return jax.random.uniform(key, (4,), jnp.result_type(float), -0.05, 0.05)

    def observe(self, state):
        return state

    def step(self, key, state, action):
        del key
        position, velocity, lean, turning = state
        push = jnp.where(action == 1, self.force, -self.force)
        sine, cosine = jnp.sin(lean), jnp.cos(lean)
        mass = self.cart_mass + self.pole_mass
        moment = self.pole_mass * self.half_length
        inertial = (push + moment * turning**2 * sine) / mass
        arm = self.half_length * (4 / 3 - self.pole_mass * cosine**2 / mass)
        turn = (self.gravity * sine - cosine * inertial) / arm
        acceleration = inertial - moment * turn * cosine / mass
        moved = state + self.interval * jnp.stack([velocity, acceleration, turning, turn])
        ended = (jnp.abs(moved[0]) > self.track) | (jnp.abs(moved[2]) > self.angle)
        return moved, TimeStep(moved, jnp.ones_like(position), ended, jnp.zeros_like(ended))


def _above_zero(name: str, value: Any, unit: str) -> Float[Array, ""]:
    number = as_float(name, value, float)
    require_positive(name, number, f"it is a number of {unit}")
    return number
