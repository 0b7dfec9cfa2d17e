"""Vector environments with the interface of gymnasium, stepped in numpy. gymnasium itself is not needed."""

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jaxtyping import Bool, Float, Integer, Real

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import as_size
from bilevel_jax.environments.protocol import Environment
from bilevel_jax.environments.spaces import Space, as_space

NEXT_STEP, SAME_STEP, DISABLED = "NextStep", "SameStep", "Disabled"  # the values of gymnasium's AutoresetMode


class HostSpaces(Environment):
    """The environment of a problem whose steps are made by a `HostEnvironment`: it knows the two spaces alone.

    Agents can be started with it. What a process sees and does is not known here: `observe` and `step` raise
    InputError, and so do rollouts, and agents' `improve`.

    Args:
      action_space: a `Discrete` or a `Box`, or an argument of `as_space`.
      observation_space: a pytree of `jax.ShapeDtypeStruct`.

    Raises:
      InputError: actions that are neither numbered nor a box.

    Example:
      >>> spaces = bj.environments.HostSpaces(bj.environments.Discrete(2), jax.ShapeDtypeStruct((4,), jnp.float32))
      >>> spaces.num_actions, spaces.observation_space.shape
      (2, (4,))
    """

    space: Space
    _shapes: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)
    _structure: Any = eqx.field(static=True)

    def __init__(self, action_space: Any, observation_space: Any):
        self.space = as_space("action_space", action_space)
        leaves, self._structure = jax.tree.flatten(observation_space)
        self._shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)

    @property
    def action_space(self):
        return self.space

    @property
    def observation_space(self):
        return jax.tree.unflatten(self._structure, self._shapes)

    @property
    def resets(self):
        return True

    def reset(self, key):
        """Return a placeholder: the states are those of the `HostEnvironment`."""
        del key
        return jnp.zeros((), bool)

    def observe(self, state):
        del state
        _refuse()

    def step(self, key, state, action):
        del key, state, action
        _refuse()


def _refuse() -> NoReturn:
    raise InputError(
        "environment: its steps are made outside of JAX, by a HostEnvironment, which a compiled loop cannot call; use "
        "improve_on_host(key, agent, state, environment, problem, x) to learn, and collect_on_host for trajectories"
    )


class HostStep(NamedTuple):
    """The result of one step of B processes, in numpy: the fields of a `TimeStep`, [B].

    `next_observation` is the one before any reset. `valid` is False where the step was only a reset; `reward` is 0
    there, and the action was ignored. The arrays may be overwritten in the next step.
    """

    next_observation: Any
    reward: Float[np.ndarray, " B"]
    terminated: Bool[np.ndarray, " B"]
    truncated: Bool[np.ndarray, " B"]
    valid: Bool[np.ndarray, " B"]


class HostEnvironment:
    """B processes of an object with the methods of gymnasium's vector environments (`SyncVectorEnv`, `AsyncVectorEnv`,
    `AtariVectorEnv`, what `gymnasium.make_vec` returns, ...), which continue from call to call.

    It is not a pytree, and it changes when it is stepped: keep it outside of jit. `spaces` goes into the problem.

    The processes start again where they end, in each of gymnasium's three ways, and the record of their steps is the
    same in all but one: by "NextStep", gymnasium's default, the step after an end only resets. Such steps are not
    `valid`, and those who learn have to leave them out. "SameStep" has no such steps and is to be preferred.

    Actions of a `Box` are passed on as they are, also where they lie outside of it. A step that both terminates and
    truncates counts as terminated.

    Args:
      vector_env: the vector environment. Whoever made it closes it.
      seed: of the first reset, explicit so that runs can be repeated: a number, from which gymnasium makes one for each
        process (seed, seed + 1, ...), or a list of them. Later resets go on with the same generators.
      autoreset: "NextStep", "SameStep" or "Disabled", the value of gymnasium's `AutoresetMode`; None is
        `vector_env.metadata["autoreset_mode"]`. For "Disabled" the environment has to know the option `reset_mask`.

    Raises:
      InputError: no vector environment, spaces of other kinds than numbers, arrays, and dictionaries and tuples of
        them, or a way of resetting that is not known. In `step`, an end without its observation.

    Example:
      >>> class Clocks:  # with gymnasium's methods: two processes of three steps
      ...     num_envs, metadata = 2, {"autoreset_mode": "NextStep"}
      ...     single_action_space = single_observation_space = bj.environments.Discrete(4)
      ...     def reset(self, *, seed=None, options=None):
      ...         self.time = np.zeros(2, int)
      ...         return self.time, {}
      ...     def step(self, actions):
      ...         self.time = np.where(self.time == 3, 0, self.time + 1)
      ...         return self.time, np.ones(2), self.time == 3, np.zeros(2, bool), {}
      >>> environment = bj.environments.HostEnvironment(Clocks(), seed=0)
      >>> steps = [environment.step(np.zeros(2, int)) for _ in range(5)]
      >>> [int(step.next_observation[0]) for step in steps]
      [1, 2, 3, 0, 1]
      >>> [bool(step.valid[0]) for step in steps]
      [True, True, True, False, True]
    """

    def __init__(self, vector_env: Any, *, seed: int | list[int], autoreset: str | None = None):
        for name in ("num_envs", "single_observation_space", "single_action_space", "reset", "step"):
            if getattr(vector_env, name, None) is None:
                raise InputError(
                    f"vector_env: {type(vector_env).__name__} has no {name}; give a vector environment, such as "
                    f"gymnasium.make_vec makes"
                )
        self.vector_env = vector_env
        self.num_envs = as_size("vector_env.num_envs", vector_env.num_envs)
        self.autoreset = _autoreset(vector_env, autoreset)
        self.spaces = HostSpaces(
            as_space("single_action_space", vector_env.single_action_space),
            _shapes("single_observation_space", vector_env.single_observation_space),
        )
        self.reset(seed)

    @property
    def action_space(self) -> Space:
        """The action space of one process: `Discrete(A)`, or a `Box`."""
        return self.spaces.action_space

    @property
    def observation_space(self) -> Any:
        """The shapes and dtypes of one process's observation: a pytree of `jax.ShapeDtypeStruct`. States that are
        numbered are int32, and 64-bit numbers are what JAX has.
        """
        return self.spaces.observation_space

    @property
    def observation(self) -> Any:
        """What the processes see now, [B]. The arrays may be overwritten in the next step."""
        return self._observation

    def reset(self, seed: int | list[int]) -> None:
        """Start all processes anew."""
        observation, _ = self.vector_env.reset(seed=seed)
        self._observation = self._read(observation)
        self._ended = np.zeros(self.num_envs, bool)
        for leaf, one in zip(jax.tree.leaves(self._observation), jax.tree.leaves(self.observation_space), strict=True):
            if leaf.shape != (self.num_envs, *one.shape):
                raise InputError(
                    f"vector_env: expected observations of shape {[self.num_envs, *one.shape]}, got {list(leaf.shape)}"
                )

    def step(self, actions: Integer[np.ndarray, " B"] | Real[np.ndarray, "B ..."]) -> HostStep:
        """Act in all processes, and reset those that end (or, by "NextStep", that have ended)."""
        dtype = getattr(self.vector_env.single_action_space, "dtype", None) or self.action_space.dtype
        seen, reward, terminated, truncated, infos = self.vector_env.step(np.asarray(actions).astype(dtype))
        following = current = self._read(seen)
        valid = ~self._ended if self.autoreset == NEXT_STEP else np.ones(self.num_envs, bool)
        terminated = np.asarray(terminated, bool) & valid
        ended = (terminated | np.asarray(truncated, bool)) & valid
        if ended.any() and self.autoreset == SAME_STEP:
            following = _with_ends(current, ended, infos)
        elif ended.any() and self.autoreset == DISABLED:
            following = jax.tree.map(np.array, current)  # a reset may write into the environment's own arrays
            current = self._read(self.vector_env.reset(options={"reset_mask": ended.copy()})[0])
        self._observation, self._ended = current, ended
        dtype = dtypes.canonicalize_dtype(float)
        return HostStep(
            next_observation=following,
            reward=np.where(valid, reward, 0).astype(dtype),
            terminated=terminated,
            truncated=ended & ~terminated,
            valid=valid,
        )

    def _read(self, observation: Any) -> Any:
        """As numpy arrays of the dtypes of the observation space, copied only where they have others."""
        return jax.tree.map(lambda one, leaf: np.asarray(leaf, one.dtype), self.observation_space, _plain(observation))


def _autoreset(vector_env: Any, given: str | None) -> str:
    """The way of resetting. Raises InputError."""
    mode = (getattr(vector_env, "metadata", None) or {}).get("autoreset_mode") if given is None else given
    mode = getattr(mode, "value", mode)
    if mode is None:
        raise InputError(
            f"vector_env: {type(vector_env).__name__} does not say how it resets, metadata['autoreset_mode']; give "
            f"autoreset, {NEXT_STEP!r} (as all of gymnasium 1.0), {SAME_STEP!r} or {DISABLED!r}"
        )
    if mode not in (NEXT_STEP, SAME_STEP, DISABLED):
        raise InputError(f"autoreset: expected {NEXT_STEP!r}, {SAME_STEP!r} or {DISABLED!r}, got {mode!r}")
    return mode


def _shapes(name: str, space: Any) -> Any:
    """The observations of a space of gymnasium, or one of ours, as a pytree of `jax.ShapeDtypeStruct`."""
    parts = getattr(space, "spaces", None)
    if isinstance(parts, Mapping):
        return {key: _shapes(f"{name}[{key!r}]", part) for key, part in parts.items()}
    if isinstance(parts, tuple | list):
        return tuple(_shapes(f"{name}[{k}]", part) for k, part in enumerate(parts))
    shape, dtype = getattr(space, "shape", None), getattr(space, "dtype", None)
    if shape is None or dtype is None or np.dtype(dtype).kind not in "biuf":
        raise InputError(
            f"{name}: its observations are a {type(space).__name__}, neither arrays nor dictionaries or tuples of "
            f"arrays; wrap the environment so that they are"
        )
    numbered = shape == () and getattr(space, "n", None) is not None
    return jax.ShapeDtypeStruct(shape, np.int32 if numbered else dtypes.canonicalize_dtype(dtype))


def _plain(observation: Any) -> Any:
    """With dictionaries and tuples of whatever kind as Python's own."""
    if isinstance(observation, Mapping):
        return {key: _plain(part) for key, part in observation.items()}
    if isinstance(observation, tuple):
        return tuple(_plain(part) for part in observation)
    return observation


def _with_ends(observation: Any, ended: Bool[np.ndarray, " B"], infos: Mapping[str, Any]) -> Any:
    """A copy of observations [B], with those of the ends in place of those after the reset. Raises InputError."""
    ends = infos.get("final_obs")
    if ends is None:
        raise InputError(
            "vector_env: a process ended and was reset, but infos has no 'final_obs', the observation of the end; "
            "make the environment with an autoreset mode that keeps it"
        )
    following = jax.tree.map(np.array, observation)

    def put(where: Any, values: Any) -> None:
        jax.tree.map(lambda out, value: out.__setitem__(where, value), following, _plain(values))

    if isinstance(ends, np.ndarray) and ends.dtype == object:  # one observation for each process, or None
        for b in np.flatnonzero(ended):
            put(b, ends[b])
    else:
        put(ended, jax.tree.map(lambda leaf: np.asarray(leaf)[ended], _plain(ends)))
    return following
