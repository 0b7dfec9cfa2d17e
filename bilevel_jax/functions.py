"""Functions of the observation that give one number for each action: rewards, action values, policies."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from bilevel_jax.errors import InputError
from bilevel_jax.indexing import gather
from bilevel_jax.validation import as_float

ActionFunction = Callable[[Any], jax.Array]
"""observation -> [A]. One observation at a time; vmap it over many."""


def as_pytree(name: str, function: Any) -> Callable:
    """A function that jit takes as an argument: plain ones become static, those that are pytrees keep their leaves.

    Raises:
      InputError: it is not callable.
    """
    if not callable(function):
        raise InputError(f"{name}: expected a function, got {type(function).__name__}; wrap it in a lambda")
    is_leaf = jax.tree.structure(function) == jax.tree.structure(0)
    return jax.tree_util.Partial(function) if is_leaf else function


class Table(eqx.Module):
    """values[S, A], looked up by the index of a state.

    Raises:
      InputError: values are not of the shape [S, A].
    """

    values: jax.Array

    def __init__(self, values: Any):
        self.values = as_float("values", values)
        if self.values.ndim != 2:
            raise InputError(f"values: expected shape [S, A], got {list(self.values.shape)}")

    def __call__(self, observation: Any) -> jax.Array:
        return gather(self.values, observation)


class Linear(eqx.Module):
    """features(observation)[F] times weights[F, A].

    `features` is a function, or an array [S, F] of which the observation picks a row.
    """

    features: Any
    weights: jax.Array

    def __init__(self, features: Any, weights: Any):
        self.features = as_pytree("features", features) if callable(features) else as_float("features", features)
        self.weights = as_float("weights", weights)

    def __call__(self, observation: Any) -> jax.Array:
        return self.features_of(observation) @ self.weights

    def features_of(self, observation: Any) -> jax.Array:
        """[F]."""
        return self.features[observation] if isinstance(self.features, jax.Array) else self.features(observation)


def tabulate(function: ActionFunction, num_states: int) -> Table:
    """Any function of a state index as a `Table`."""
    if isinstance(function, Table):
        return function
    return Table(jax.vmap(function)(jnp.arange(num_states)))
