"""Two links that hang from a joint, with a motor between them (Sutton 1996)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.core.validation import as_float, require_positive
from bilevel_jax.environments.protocol import Environment, TimeStep
from bilevel_jax.environments.spaces import Discrete

MOST_TURNING = (4 * jnp.pi, 9 * jnp.pi)


class Acrobot(Environment):
    """Swing the tip of two links above a line by a torque of -1 (0), 0 (1) or 1 (2) at the joint between them.

    The state is (angle of the first link from hanging, angle of the second from the first, and how fast the two turn),
    each drawn from [-0.1, 0.1] at the start. The observation is (cos and sin of the first angle, cos and sin of the
    second, the two speeds). Each step earns -1, the last one 0. The process terminates where the tip is more than
    `height` above the upper joint. The usual task, Acrobot-v1, stops after 500 steps: `TimeLimit(Acrobot(), 500)`.

    Args:
      gravity, masses, lengths, inertia, torque: in SI units; masses and lengths are pairs, one for each link. Centres
        of mass are in the middle of the links. The end is measured with links of length 1.
      interval: seconds between two steps, one step of Runge and Kutta's fourth-order method.
      height: of the line.

    Raises:
      InputError: a mass, length, inertia or interval that is not above 0.

    Example:
      >>> environment = bj.environments.classic.Acrobot()
      >>> state = environment.reset(jax.random.key(0))
      >>> state, step = environment.step(jax.random.key(1), state, jnp.asarray(2))
      >>> step.observation.shape, float(step.reward)
      ((6,), -1.0)
    """

    gravity: Float[Array, ""]
    masses: Float[Array, "2"]
    lengths: Float[Array, "2"]
    inertia: Float[Array, ""]
    torque: Float[Array, ""]
    interval: Float[Array, ""]
    height: Float[Array, ""]

    def __init__(
        self,
        *,
        gravity: Any = 9.8,
        masses: Any = (1.0, 1.0),
        lengths: Any = (1.0, 1.0),
        inertia: Any = 1.0,
        torque: Any = 1.0,
        interval: Any = 0.2,
        height: Any = 1.0,
    ):
        self.gravity = as_float("gravity", gravity, float)
        self.masses = as_float("masses", masses, float, (2,))
        self.lengths = as_float("lengths", lengths, float, (2,))
        self.inertia = as_float("inertia", inertia, float)
        self.torque = as_float("torque", torque, float)
        self.interval = as_float("interval", interval, float)
        self.height = as_float("height", height, float)
        units = {"masses": "kilograms", "lengths": "metres", "inertia": "kilograms times square metres"}
        for name, unit in (units | {"interval": "seconds"}).items():
            require_positive(name, getattr(self, name), f"it is a number of {unit}")

    @property
    def action_space(self):
        return Discrete(3)

    def reset(self, key):
        return jax.random.uniform(key, (4,), jnp.result_type(float), -0.1, 0.1)

    def observe(self, state):
        first, second = state[0], state[1]
        angles = jnp.stack([jnp.cos(first), jnp.sin(first), jnp.cos(second), jnp.sin(second)])
        return jnp.concatenate([angles, state[2:]])

    def step(self, key, state, action):
        del key
        push = (action - 1).astype(state.dtype) * self.torque
        h = self.interval
        one = self._change(state, push)
        two = self._change(state + h / 2 * one, push)
        three = self._change(state + h / 2 * two, push)
        four = self._change(state + h * three, push)
        moved = state + h / 6 * (one + 2 * two + 2 * three + four)
        most = jnp.asarray(MOST_TURNING, moved.dtype)
        around = jnp.mod(moved[:2] + jnp.pi, 2 * jnp.pi) - jnp.pi
        moved = jnp.concatenate([around, jnp.clip(moved[2:], -most, most)])
        ended = -jnp.cos(moved[0]) - jnp.cos(moved[0] + moved[1]) > self.height
        reward = jnp.where(ended, jnp.zeros((), moved.dtype), -1)
        return moved, TimeStep(self.observe(moved), reward, ended, jnp.zeros_like(ended))

    def _change(self, state: Float[Array, "4"], push: Float[Array, ""]) -> Float[Array, "4"]:
        """The time derivative of the state (Sutton and Barto 1998, chapter 11)."""
        first, second, turn_1, turn_2 = state
        mass_1, mass_2 = self.masses
        length, centre_1, centre_2 = self.lengths[0], self.lengths[0] / 2, self.lengths[1] / 2
        coupling = mass_2 * length * centre_2
        d_1 = (
            mass_1 * centre_1**2
            + mass_2 * (length**2 + centre_2**2)
            + 2 * coupling * jnp.cos(second)
            + 2 * self.inertia
        )
        d_2 = mass_2 * centre_2**2 + coupling * jnp.cos(second) + self.inertia
        weight_2 = mass_2 * centre_2 * self.gravity * jnp.sin(first + second)
        weight_1 = (
            -coupling * (turn_2**2 + 2 * turn_1 * turn_2) * jnp.sin(second)
            + (mass_1 * centre_1 + mass_2 * length) * self.gravity * jnp.sin(first)
            + weight_2
        )
        rest = push + d_2 / d_1 * weight_1 - coupling * turn_1**2 * jnp.sin(second) - weight_2
        change_2 = rest / (mass_2 * centre_2**2 + self.inertia - d_2**2 / d_1)
        change_1 = -(d_2 * change_2 + weight_1) / d_1
        return jnp.stack([turn_1, turn_2, change_1, change_2])
