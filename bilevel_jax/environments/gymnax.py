"""Simulators with the interface of gymnax as environments. gymnax itself is not needed."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.promotion import usual_promotion
from bilevel_jax.core.validation import as_array
from bilevel_jax.environments.protocol import Environment, TimeStep
from bilevel_jax.environments.spaces import Discrete, Space, as_count, as_space


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

    A single `done` means truncated where `environment.is_truncated(state, parameters)` says so. Without that method it
    means truncated where `state.time` has reached `parameters.max_steps_in_episode`. A process that ends by itself in
    its last permitted step then counts as truncated, because nothing distinguishes the two. Some environments only
    have a `step` that resets by itself (gymnax's wrappers). The observation of the end is then
    `info["final_observation"]` if there is one. Otherwise it is that of the new process, and every `done` means
    terminated.

    `environment` is static: the same object compiles once, another object of its class compiles again.

    Raises:
      InputError: no reset or step; actions that are neither numbered nor a box; an environment that has no hash; a
        step that returns another number of values.

    Example:
      >>> class Counter:  # with gymnax's methods: count up to 3
      ...     num_actions = 2
      ...     def reset(self, key, parameters):
      ...         return jnp.zeros(()), jnp.zeros(())
      ...     def step(self, key, state, action, parameters):
      ...         state = state + action
      ...         return state, state, jnp.ones(()), state >= 3, {}
      >>> environment = bj.environments.GymnaxEnvironment(Counter())
      >>> environment.num_actions
      2
    """

    environment: Any = eqx.field(static=True)
    parameters: Any
    space: Space

    def __init__(self, environment: Any, parameters: Any = None):
        _require_usable(environment)
        if parameters is None:
            parameters = getattr(environment, "default_params", None)
        self.environment = environment
        self.parameters = jax.tree_util.tree_map_with_path(_as_leaf, parameters)
        self.space = _action_space(environment, parameters)

    @property
    def action_space(self):
        return self.space

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
        return following, TimeStep(
            observation=jax.tree.map(_cast, observation, state[1]),
            reward=reward,
            terminated=terminated,
            truncated=truncated,
        )

    def _tell_apart(self, done: Bool[Array, ""], state: Any) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
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


def _action_space(environment: Any, parameters: Any) -> Space:
    try:
        # The space comes first: environments with continuous actions give their dimension as num_actions.
        space = environment.action_space(parameters)
    except (NotImplementedError, AttributeError):
        return Discrete(as_count("environment", getattr(environment, "num_actions", None)))
    return as_space("environment", space)


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
