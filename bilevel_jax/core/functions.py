"""Functions of the observation and the action: rewards and action values."""

import abc
import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from bilevel_jax.core.arrays import PerPair, Scalar
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.indexing import gather
from bilevel_jax.core.validation import as_float


def as_pytree(name: str, function: Any) -> Callable:
    """Return `function` in a form that jit takes as an argument.

    A plain function becomes static; a function that is a pytree keeps its leaves.

    Raises:
      InputError: it is not callable.
    """
    if not callable(function):
        raise InputError(f"{name}: expected a function, got {type(function).__name__}; wrap it in a lambda")
    is_leaf = jax.tree.structure(function) == jax.tree.structure(0)
    return jax.tree_util.Partial(function) if is_leaf else function


class ActionFunction(eqx.Module):
    """The protocol of a reward or an action value: `function(observation, action)` returns a number.

    Where the actions are the numbers 0 to A - 1, `function.all(observation)` returns the numbers of all of them. Both
    methods take one observation; vmap them over many.
    """

    @abc.abstractmethod
    def __call__(self, observation: Any, action: Any) -> Scalar:
        """The number of one action, []."""

    @abc.abstractmethod
    def all(self, observation: Any) -> Float[Array, " A"]:
        """The numbers of all actions, [A]. Raises InputError where actions are no finite set."""

    def of_step(self, observation: Any, action: Any, next_observation: Any) -> Scalar:
        """The number of a step that was made, []. A reward of the next state overrides it."""
        del next_observation
        return self(observation, action)


class Table(ActionFunction):
    """values[S, A], looked up by the index of a state.

    Raises:
      InputError: values are not of the shape [S, A].

    Example:
      >>> table = bj.Table([[1.0, 2.0], [3.0, 4.0]])
      >>> float(table(1, 0)), table.all(1).tolist()
      (3.0, [3.0, 4.0])
    """

    values: PerPair

    def __init__(self, values: Real[ArrayLike, "S A"] | Any):
        self.values = as_float("values", values)
        if self.values.ndim != 2:
            raise InputError(f"values: expected shape [S, A], got {list(self.values.shape)}")

    def __call__(self, observation, action):
        return gather(self.values, (observation, action))

    def all(self, observation):
        return gather(self.values, observation)


class Linear(ActionFunction):
    """features(observation)[F] times weights[F, A].

    `features` is a function, or an array [S, F] of which the observation picks a row.

    Example:
      >>> linear = bj.Linear(lambda observation: observation, [[1.0, 0.0], [0.0, 1.0]])
      >>> linear.all(jnp.array([2.0, 3.0])).tolist()
      [2.0, 3.0]
    """

    features: Callable | Float[Array, "S F"]
    weights: Float[Array, "F A"]

    def __init__(self, features: Callable | Real[ArrayLike, "S F"] | Any, weights: Real[ArrayLike, "F A"] | Any):
        self.features = as_pytree("features", features) if callable(features) else as_float("features", features)
        self.weights = as_float("weights", weights)

    def __call__(self, observation, action):
        return self.all(observation)[action]

    def all(self, observation):
        return self.features_of(observation) @ self.weights

    def features_of(self, observation: Any) -> Float[Array, " F"]:
        """[F]."""
        return self.features[observation] if isinstance(self.features, jax.Array) else self.features(observation)


class PerAction(ActionFunction):
    """A function of the observation that gives the numbers of all actions at once, [A]: a network's outputs, say.

    Raises:
      InputError: it is not callable.

    Example:
      >>> reward = bj.PerAction(lambda observation: observation * jnp.array([1.0, -1.0]))
      >>> float(reward(2.0, 1))
      -2.0
    """

    function: Callable

    def __init__(self, function: Callable):
        self.function = as_pytree("function", function)

    def __call__(self, observation, action):
        return self.all(observation)[action]

    def all(self, observation):
        return self.function(observation)


class OfPair(ActionFunction):
    """A plain function (observation, action) -> number, with A actions; `num_actions=None`: they are no finite set.

    Raises:
      InputError: it is not callable, or does not take two arguments.
    """

    function: Callable
    num_actions: int | None = eqx.field(static=True)

    def __init__(self, name: str, function: Callable, num_actions: int | None):
        self.function = as_pytree(name, function)
        self.num_actions = num_actions
        try:
            inspect.signature(self.function).bind(None, None)
        except TypeError:
            raise InputError(
                f"{name}: expected a function of (observation, action) that gives a number; one of the observation "
                f"that gives those of all actions [A] is to be wrapped, bj.PerAction(function)"
            ) from None
        except ValueError:  # compiled ones may tell no signature
            pass

    def __call__(self, observation, action):
        return self.function(observation, action)

    def all(self, observation):
        if self.num_actions is None:
            raise InputError("reward: it is asked for all actions, but they are no finite set (the space is a Box)")
        return jax.vmap(self.function, (None, 0))(observation, jnp.arange(self.num_actions, dtype=jnp.int32))


class Zero(ActionFunction):
    """0 for all of A actions; `num_actions=None`: they are no finite set."""

    num_actions: int | None = eqx.field(static=True)

    def __call__(self, observation, action):
        del observation, action
        return jnp.zeros(())

    def all(self, observation):
        del observation
        return jnp.zeros(self.num_actions or 0)


def tabulate(function: ActionFunction, num_states: int) -> Table:
    """Any function of a state index and an action as a `Table`."""
    if isinstance(function, Table):
        return function
    return Table(jax.vmap(function.all)(jnp.arange(num_states)))
