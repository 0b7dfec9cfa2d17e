"""Simulators written for gymnax, or in its manner, as environments. Needs no gymnax itself."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.environments.protocol import Environment, TimeStep
from bilevel_jax.errors import InputError
from bilevel_jax.promotion import usual_promotion
from bilevel_jax.validation import as_array, is_known


class GymnaxEnvironment(Environment):
    """An object with gymnax's methods as an `Environment`.

    Args:
      environment: has `reset(key, parameters) -> (observation, state)` and `step(key, state, action,
        parameters)`, which returns (observation, state, reward, done, info) or (observation, state, reward,
        terminated, truncated, info). `reset_env` and `step_env` are used instead where its class defines
        them, because gymnax's `step` resets by itself.
      parameters: a pytree; its numbers are leaves of this module and may be traced and mapped. None takes
        `environment.default_params`, if there are any.

    The state is (state of `environment`, observation). Its leaves keep the types that reset gives them.

    One `done` means truncated where `environment.is_truncated(state, parameters)` says so or, without that
    method, where `state.time` has reached `parameters.max_steps_in_episode`: a process that ends by itself
    in its last permitted step then counts as truncated, as nothing tells it apart. Where only a `step` that
    resets by itself is there (gymnax's wrappers), the observation of the end is `info["final_observation"]`
    if there is one; otherwise the new process's, and every `done` means terminated.

    `environment` is a static part: the same object compiles once, another one of its class again.

    Raises:
      InputError: no reset or step; actions that are no finite set; an environment that has no hash; a
        step that returns another number of values.
    """

    environment: Any = eqx.field(static=True)
    parameters: Any
    actions: int = eqx.field(static=True)

    def __init__(self, environment: Any, parameters: Any = None):
        _require_usable(environment)
        if parameters is None:
            parameters = getattr(environment, "default_params", None)
        self.environment = environment
        self.parameters = jax.tree_util.tree_map_with_path(_as_leaf, parameters)
        self.actions = _number_of_actions(environment, parameters)

    @property
    def num_actions(self):
        return self.actions

    def reset(self, key):
        method = _method(self.environment, "reset_env") or self.environment.reset
        with usual_promotion():
            observation, state = method(key, self.parameters)
        return jax.tree.map(lambda leaf: _cast(leaf, None), (state, observation))

    def observe(self, state):
        return state[1]

    def step(self, key, state, action):
        plain = _method(self.environment, "step_env")
        with usual_promotion():
            values = (plain or self.environment.step)(key, state[0], action, self.parameters)
        if not isinstance(values, tuple | list) or len(values) not in (5, 6):
            got = f"{len(values)} values" if isinstance(values, tuple | list) else type(values).__name__
            raise InputError(
                f"environment: its step returned {got}; expected (observation, state, reward, done, info) or "
                f"(observation, state, reward, terminated, truncated, info)"
            )
        observation, inner, reward, *ended, info = values
        following = jax.tree.map(_cast, (inner, observation), state)
        if plain is None and isinstance(info, dict):
            observation = info.get("final_observation", observation)
        ended = [jnp.asarray(flag).astype(bool) for flag in ended]
        terminated, truncated = ended if len(ended) == 2 else self._tell_apart(ended[0], inner)
        reward = jnp.asarray(reward)
        if not jnp.issubdtype(reward.dtype, jnp.floating):
            reward = reward.astype(jnp.result_type(float))
        return following, TimeStep(jax.tree.map(_cast, observation, state[1]), reward, terminated, truncated)

    def _tell_apart(self, done: jax.Array, state: Any) -> tuple[jax.Array, jax.Array]:
        """(terminated, truncated)."""
        asked = _method(self.environment, "is_truncated")
        if asked is not None:
            # Such an environment's step_env leaves the limit out of `done`.
            with usual_promotion():
                truncated = asked(state, self.parameters)
            return done, jnp.asarray(truncated).astype(bool) & ~done
        limit, time = getattr(self.parameters, "max_steps_in_episode", None), getattr(state, "time", None)
        if limit is None or time is None:
            return done, jnp.zeros_like(done)
        late = jnp.asarray(time) >= limit
        return done & ~late, done & late


def _method(environment: Any, name: str) -> Callable[..., Any] | None:
    """A method of the environment's own. Wrappers pass on those of what they wrap, which would get around them."""
    return getattr(environment, name) if inspect.getattr_static(environment, name, None) is not None else None


def _require_usable(environment: Any) -> None:
    if isinstance(environment, type):
        raise InputError(f"environment: got the class {environment.__name__}; make one of it")
    for name in ("reset", "step"):
        if not callable(getattr(environment, name, None)):
            hint = "; gymnax.make gives (environment, parameters)" if isinstance(environment, tuple) else ""
            raise InputError(f"environment: {type(environment).__name__} has no method {name}{hint}")
    try:
        hash(environment)
    except TypeError:
        raise InputError(
            f"environment: {type(environment).__name__} has no hash, which jit needs to tell one from another; "
            f"arrays belong into parameters"
        ) from None


def _number_of_actions(environment: Any, parameters: Any) -> int:
    try:
        space = environment.action_space(parameters)
    except (NotImplementedError, AttributeError):
        count = getattr(environment, "num_actions", None)
    else:
        # The space comes first: environments with continuous actions give their dimension as num_actions.
        count = getattr(space, "n", None)
        if count is None:
            raise InputError(f"environment: its actions are a {type(space).__name__}, not the numbers 0 to A - 1")
    count = int(count) if isinstance(count, int | np.integer) or is_known(count) else count  # type: ignore[arg-type]
    if not isinstance(count, int) or count < 1:
        raise InputError(f"environment: expected a number of actions of at least 1, known before a run, got {count}")
    return count


def _as_leaf(path: Any, value: Any) -> Any:
    """A number as an array, for jit to take; weakly typed as Python's own, so that results keep their types."""
    if not isinstance(value, bool | int | float | np.ndarray | np.generic):
        return value
    checked = as_array(f"parameters{jax.tree_util.keystr(path)}", value)
    return checked if isinstance(value, np.ndarray | np.generic) else jnp.asarray(value)


def _cast(leaf: Any, like: Any) -> jax.Array:
    """`leaf` as an array of the type of `like`, or of its own for good: loops want one type throughout."""
    array = jnp.asarray(leaf)
    dtype = array.dtype if like is None else like.dtype
    return array if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array.astype(dtype)
