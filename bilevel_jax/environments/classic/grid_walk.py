"""A walk on a map with walls, seen by its coordinates."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import as_float, is_known, require_fraction
from bilevel_jax.environments.protocol import Environment, TimeStep
from bilevel_jax.environments.spaces import Discrete

# Up, right, down, left, as (row, column) steps.
MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)], np.int32)


class GridWalk(Environment):
    """Move up (0), right (1), down (2) or left (3) on a map; a move into a wall stays. It never ends and earns 0.

    The state is (row, column), drawn uniformly from the free cells at the start. The observation is the same from -1 to
    1 over the whole map. Walls are numbers: maps of one shape are one program, and vmap takes several at once.

    Args:
      walls: where there is a wall, [height, width]; what is beyond the map is one. None is the four rooms of Sutton,
        Precup and Singh (1999), 11 by 11.
      slip: the probability that one of the four moves is made at random instead.

    Raises:
      InputError: walls that are not booleans [height, width], or leave no cell (where they are known); a slip outside
        [0, 1).

    Example:
      >>> environment = bj.environments.classic.GridWalk()
      >>> state, step = environment.step(jax.random.key(0), jnp.array([0, 0]), jnp.asarray(1))
      >>> state.tolist(), step.observation.tolist()
      ([0, 1], [-1.0, -0.800000011920929])
    """

    walls: Bool[Array, "height width"]
    slip: Float[Array, ""]

    def __init__(self, walls: Any = None, *, slip: Any = 0.0):
        self.walls = jnp.asarray(four_rooms() if walls is None else walls)
        if self.walls.ndim != 2 or self.walls.dtype != bool:
            raise InputError(f"walls: expected booleans [height, width], got {self.walls.dtype}{self.walls.shape}")
        if is_known(self.walls) and bool(self.walls.all()):
            raise InputError("walls: there are walls only; leave at least one cell free")
        self.slip = as_float("slip", slip, float)
        require_fraction("slip", self.slip, "0 makes every move as chosen")

    @property
    def action_space(self):
        return Discrete(len(MOVES))

    def reset(self, key):
        free = jnp.where(self.walls, -jnp.inf, 0.0).reshape(-1)
        place = jax.random.categorical(key, free).astype(jnp.int32)
        return jnp.stack(jnp.divmod(place, self.walls.shape[1]))

    def observe(self, state):
        most = jnp.maximum(jnp.asarray(self.walls.shape, jnp.result_type(float)) - 1, 1)
        return 2 * state.astype(most.dtype) / most - 1

    def step(self, key, state, action):
        slips, other = jax.random.split(key)
        random = jax.random.randint(other, (), 0, len(MOVES), jnp.int32)
        made = jnp.where(jax.random.bernoulli(slips, self.slip), random, jnp.asarray(action, jnp.int32))
        last = jnp.asarray(self.walls.shape, jnp.int32) - 1
        target = state + jnp.asarray(MOVES)[made]
        inside = jnp.clip(target, 0, last)  # a move off the map stays
        moved = jnp.where(self.walls[inside[0], inside[1]], state, inside)
        observation = self.observe(moved)
        never = jnp.zeros((), bool)
        return moved, TimeStep(observation, jnp.zeros((), observation.dtype), never, never)


def four_rooms() -> Bool[np.ndarray, "11 11"]:
    """The walls of four rooms with four doors, without those around the map."""
    walls = np.zeros((11, 11), bool)
    walls[:, 5] = True
    walls[5, :5] = walls[6, 6:] = True
    walls[[2, 9, 5, 6], [5, 5, 1, 8]] = False
    return walls
