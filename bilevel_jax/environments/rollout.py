"""Batches of trajectories, and segments of them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Integer, Key, PRNGKeyArray, Real, UInt32

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import as_float, as_integer, as_size, require_computable, require_index
from bilevel_jax.environments.policies import as_policy
from bilevel_jax.environments.protocol import Environment, Trajectory
from bilevel_jax.environments.spaces import Box, Space


def rollout(
    key: PRNGKeyArray,
    environment: Environment,
    policy: Any,
    *,
    batch: int,
    horizon: int,
    first: Any = 0,
) -> Trajectory:
    """Return trajectories from the start of the process, [B, H].

    Args:
      key: the key of the whole batch. The randomness of trajectory number b comes from `fold_in(key, b)` alone.
        `batch=8` therefore gives the bits of `batch=4`, followed by those of `batch=4, first=4`. Only the
        floating-point results of a policy or a simulator may differ in the last digit, because XLA may compile them
        differently.
      policy: a `Policy`, probabilities [S, A], or a function of the observation that returns probabilities [A]; see
        `as_policy`.
      batch, horizon: B and H (static).
      first: the number of the first trajectory.

    Raises:
      InputError: batch or horizon is not an integer of at least 1; the policy has other sizes than the
        environment.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> environment = bj.environments.TabularEnvironment(mdp)
      >>> policy = jnp.array([[0.5, 0.5], [1.0, 0.0]])  # [S, A]
      >>> trajectory = bj.environments.rollout(jax.random.key(0), environment, policy, batch=8, horizon=5)
      >>> trajectory.action.shape
      (8, 5)
    """
    require_computable("environment", environment, any_floats=True)
    keys = trajectory_keys(key, batch, first)
    states = jax.vmap(lambda key: environment.reset(jax.random.fold_in(key, 0)))(keys)
    return environment.run(keys, states, as_policy(policy), as_size("horizon", horizon), None)[0]


def rollout_from(
    keys: Key[Array, " B"] | UInt32[Array, "B 2"],
    environment: Environment,
    policy: Any,
    states: Any,
    *,
    horizon: int,
    actions: Real[ArrayLike, "B ..."] | Any | None = None,
) -> tuple[Trajectory, Any]:
    """Return trajectories from given states, [B, H], and the states [B] that they lead to.

    Args:
      keys: one key per trajectory, [B], e.g. from `trajectory_keys`.
      states: states of the simulator, a pytree with a leading axis [B].
      actions: the first action of each trajectory, integers [B] or points of the `Box`, [B, ...]; None draws it from
        the policy, too. In both cases the later steps draw from the same random numbers, given the same keys.

    Raises:
      InputError: horizon is not an integer of at least 1; keys, states and actions are not of one length;
        actions are not of the action space; the policy has other sizes than the environment.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> environment = bj.environments.TabularEnvironment(mdp)
      >>> policy = jnp.array([[0.5, 0.5], [1.0, 0.0]])  # [S, A]
      >>> keys = bj.environments.trajectory_keys(jax.random.key(0), 4)
      >>> states = jnp.zeros(4, jnp.int32)
      >>> trajectory, ends = bj.environments.rollout_from(keys, environment, policy, states, horizon=5)
      >>> trajectory.state[:, 0].tolist(), ends.shape
      ([0, 0, 0, 0], (4,))
    """
    require_computable("environment", environment, any_floats=True)
    keys = _typed(keys)
    if keys.ndim != 1:
        raise InputError(f"keys: expected one key a trajectory, [B], got shape {list(keys.shape)}")
    for leaf in jax.tree.leaves(states):
        if jnp.shape(leaf)[:1] != keys.shape:
            raise InputError(f"states: expected a leading axis [B] = {list(keys.shape)}, got {list(jnp.shape(leaf))}")
    if actions is not None:
        actions = _first_actions(actions, keys.shape, environment.action_space)
    return environment.run(keys, states, as_policy(policy), as_size("horizon", horizon), actions)


def trajectory_keys(key: PRNGKeyArray, batch: int, first: Any = 0) -> Key[Array, " B"]:
    """Return one key per trajectory, [B].

    Example:
      >>> bj.environments.trajectory_keys(jax.random.key(0), 4).shape
      (4,)
    """
    key = _typed(key)
    first = as_integer("first", first, "trajectories are numbered from 0 on", jnp.uint32)
    numbers = first + jnp.arange(as_size("batch", batch), dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)


def segments(trajectories: Trajectory, starts: Integer[ArrayLike, " B"] | Any, length: int) -> Trajectory:
    """Cut `length` steps out of each trajectory [B, H], from step starts[B] on; the result is [B, length].

    A start that is out of bounds is moved to 0 or H - length.

    Raises:
      InputError: length is not an integer in 1 to H.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> environment = bj.environments.TabularEnvironment(mdp)
      >>> policy = jnp.array([[0.5, 0.5], [1.0, 0.0]])  # [S, A]
      >>> trajectory = bj.environments.rollout(jax.random.key(0), environment, policy, batch=2, horizon=5)
      >>> bj.environments.segments(trajectory, jnp.array([0, 2]), 3).action.shape
      (2, 3)
    """
    horizon = trajectories.action.shape[1]
    if as_size("length", length) > horizon:
        raise InputError(f"length: expected 1 to the horizon {horizon}, got {length}")
    starts = as_integer("starts", starts, f"give steps from 0 to {horizon - length}")
    starts = jnp.clip(starts, 0, horizon - length)

    def cut(leaf: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(leaf, start, length)

    return jax.tree.map(lambda leaf: jax.vmap(cut)(leaf, starts), trajectories)


def random_segments(key: PRNGKeyArray, trajectories: Trajectory, length: int) -> Trajectory:
    """Cut one random segment out of each trajectory [B, H]; the result is [B, length].

    The start is drawn uniformly among those for which all steps of the segment are valid. A trajectory with N valid
    steps has N - length + 1 such starts, 0 to N - length. A trajectory with N < length gives its whole episode, from
    step 0; the steps of the segment after its end are not `valid`.

    Raises:
      InputError: length is not an integer in 1 to H.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> environment = bj.environments.TabularEnvironment(mdp)
      >>> policy = jnp.array([[0.5, 0.5], [1.0, 0.0]])  # [S, A]
      >>> trajectory = bj.environments.rollout(jax.random.key(0), environment, policy, batch=2, horizon=5)
      >>> bj.environments.random_segments(jax.random.key(1), trajectory, 3).action.shape
      (2, 3)
    """
    batch, horizon = trajectories.action.shape[:2]
    ended = jnp.argmax(jnp.flip(trajectories.valid.astype(bool), 1), 1)  # steps after the last valid one
    starts = jnp.maximum(1, horizon - ended - as_size("length", length) + 1)
    return segments(trajectories, jax.random.randint(key, (batch,), 0, starts), length)


def _typed(keys: Key[Array, "*batch"] | UInt32[Array, "*batch 2"]) -> Key[Array, "*batch"]:
    """Keys made by `jax.random.PRNGKey`, arrays of words, as arrays of keys, so that shapes count keys."""
    return keys if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(keys)


def _first_actions(actions: Any, shape: tuple[int, ...], space: Space) -> Integer[Array, " B"] | Float[Array, "B ..."]:
    if isinstance(space, Box):
        actions = as_float("actions", actions).astype(space.dtype)
        if actions.shape != shape + space.shape:
            raise InputError(f"actions: expected shape {list(shape + space.shape)}, got {list(actions.shape)}")
        return actions
    actions = as_integer("actions", actions, "give one action a trajectory")
    if actions.shape != shape:
        raise InputError(f"actions: expected integers, one a trajectory, {list(shape)}, got {list(actions.shape)}")
    require_index("actions", actions, space.n)
    return actions
