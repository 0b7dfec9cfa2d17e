"""Batches of trajectories, and segments of them."""

from typing import Any

import jax
import jax.numpy as jnp

from bilevel_jax.environments.protocol import Environment, Trajectory
from bilevel_jax.errors import InputError
from bilevel_jax.functions import ActionFunction


def rollout(
    key: jax.Array,
    environment: Environment,
    policy: ActionFunction,
    *,
    batch: int,
    horizon: int,
    first: Any = 0,
) -> Trajectory:
    """Trajectories from the start of the process, [B, H].

    Args:
      key: of the whole batch. Trajectory number b is made from `fold_in(key, b)` alone, so that
        `batch=8` gives the bits of `batch=4` and of `batch=4, first=4` after it.
      policy: observation -> probabilities of the actions [A]; a `Table`, or any function or module.
      batch, horizon: B and H (static).
      first: number of the first trajectory.

    Raises:
      InputError: batch or horizon is not an integer of at least 1.
    """
    keys = trajectory_keys(key, batch, first)
    states = jax.vmap(lambda key: environment.reset(jax.random.fold_in(key, 0)))(keys)
    return environment.run(keys, states, policy, _count("horizon", horizon), None)[0]


def rollout_from(
    keys: jax.Array,
    environment: Environment,
    policy: ActionFunction,
    states: Any,
    *,
    horizon: int,
    actions: jax.Array | None = None,
) -> tuple[Trajectory, Any]:
    """Trajectories from given states, [B, H], and the states [B] that they led to.

    Args:
      keys: one a trajectory, [B], e.g. from `trajectory_keys`.
      states: states of the simulator, a pytree with a leading axis [B].
      actions: the first action of each, int32 [B]; None draws it from the policy, too. Steps after the
        first, given the same keys, draw from the same numbers either way.
    """
    return environment.run(keys, states, policy, _count("horizon", horizon), actions)


def trajectory_keys(key: jax.Array, batch: int, first: Any = 0) -> jax.Array:
    """One key a trajectory, [B]."""
    numbers = jnp.asarray(first, jnp.uint32) + jnp.arange(_count("batch", batch), dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)


def segments(trajectories: Trajectory, starts: jax.Array, length: int) -> Trajectory:
    """From each trajectory [B, H] the `length` steps from starts[B] on, [B, length].

    Raises:
      InputError: length is not in 1 to H. A start that is too late is moved forward to H - length.
    """
    horizon = trajectories.action.shape[1]
    if not 1 <= length <= horizon:
        raise InputError(f"length: expected 1 to the horizon {horizon}, got {length}")
    starts = jnp.clip(starts, 0, horizon - length)

    def cut(leaf: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(leaf, start, length)

    return jax.tree.map(lambda leaf: jax.vmap(cut)(leaf, starts), trajectories)


def random_segments(key: jax.Array, trajectories: Trajectory, length: int) -> Trajectory:
    """One segment of each trajectory [B, H], its start drawn uniformly, [B, length]."""
    batch, horizon = trajectories.action.shape[:2]
    return segments(trajectories, jax.random.randint(key, (batch,), 0, max(1, horizon - length + 1)), length)


def _count(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{name}: expected an integer of at least 1, got {value!r}; it is a static size")
    return value
