"""Batches of trajectories, and segments of them."""

from typing import Any

import jax
import jax.numpy as jnp

from bilevel_jax.environments.protocol import Environment, Trajectory
from bilevel_jax.errors import InputError
from bilevel_jax.functions import ActionFunction
from bilevel_jax.validation import as_integer, as_size, require_computable, require_index


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
        `batch=8` gives the bits of `batch=4` and of `batch=4, first=4` after it; only what a policy or a
        simulator computes in floating point may differ in its last digit, as XLA sees fit.
      policy: observation -> probabilities of the actions [A]; a `Table`, or any function or module.
      batch, horizon: B and H (static).
      first: number of the first trajectory.

    Raises:
      InputError: batch or horizon is not an integer of at least 1; the policy has other sizes than the
        environment.
    """
    require_computable("environment", environment, any_floats=True)
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
      actions: the first action of each, integers [B]; None draws it from the policy, too. Steps after the
        first, given the same keys, draw from the same numbers either way.

    Raises:
      InputError: horizon is not an integer of at least 1; keys, states and actions are not of one length;
        actions are not integers in 0 to A - 1; the policy has other sizes than the environment.
    """
    require_computable("environment", environment, any_floats=True)
    keys = _typed(keys)
    if keys.ndim != 1:
        raise InputError(f"keys: expected one key a trajectory, [B], got shape {list(keys.shape)}")
    for leaf in jax.tree.leaves(states):
        if jnp.shape(leaf)[:1] != keys.shape:
            raise InputError(f"states: expected a leading axis [B] = {list(keys.shape)}, got {list(jnp.shape(leaf))}")
    if actions is not None:
        actions = _first_actions(actions, keys.shape, environment.num_actions)
    return environment.run(keys, states, policy, _count("horizon", horizon), actions)


def trajectory_keys(key: jax.Array, batch: int, first: Any = 0) -> jax.Array:
    """One key a trajectory, [B]."""
    key = _typed(key)
    first = as_integer("first", first, "trajectories are numbered from 0 on", jnp.uint32)
    numbers = first + jnp.arange(_count("batch", batch), dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)


def segments(trajectories: Trajectory, starts: jax.Array, length: int) -> Trajectory:
    """From each trajectory [B, H] the `length` steps from starts[B] on, [B, length].

    Raises:
      InputError: length is not an integer in 1 to H. A start that is out of bounds is moved to 0 or H - length.
    """
    horizon = trajectories.action.shape[1]
    if _count("length", length) > horizon:
        raise InputError(f"length: expected 1 to the horizon {horizon}, got {length}")
    starts = as_integer("starts", starts, f"give steps from 0 to {horizon - length}")
    starts = jnp.clip(starts, 0, horizon - length)

    def cut(leaf: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(leaf, start, length)

    return jax.tree.map(lambda leaf: jax.vmap(cut)(leaf, starts), trajectories)


def random_segments(key: jax.Array, trajectories: Trajectory, length: int) -> Trajectory:
    """One segment of each trajectory [B, H], its start drawn uniformly among those that keep it valid, [B, length].

    A trajectory with N valid steps has N - length + 1 such starts, 0 to N - length. One that ended sooner, N < length,
    gives its whole episode, from step 0; the steps of the segment after that are not `valid`.

    Raises:
      InputError: length is not an integer in 1 to H.
    """
    batch, horizon = trajectories.action.shape[:2]
    ended = jnp.argmax(jnp.flip(trajectories.valid.astype(bool), 1), 1)  # steps after the last valid one
    starts = jnp.maximum(1, horizon - ended - _count("length", length) + 1)
    return segments(trajectories, jax.random.randint(key, (batch,), 0, starts), length)


def _typed(keys: jax.Array) -> jax.Array:
    """Keys made by `jax.random.PRNGKey`, arrays of words, as arrays of keys, so that shapes count keys."""
    return keys if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(keys)


def _first_actions(actions: Any, shape: tuple[int, ...], num_actions: int) -> jax.Array:
    actions = as_integer("actions", actions, "give one action a trajectory")
    if actions.shape != shape:
        raise InputError(f"actions: expected integers, one a trajectory, {list(shape)}, got {list(actions.shape)}")
    require_index("actions", actions, num_actions)
    return actions


def _count(name: str, value: int) -> int:
    return as_size(name, value)
