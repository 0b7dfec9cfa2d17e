"""The protocol of a network: numbers for an observation, from parameters that are a pytree."""

import abc
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


class Network(eqx.Module):
    """A description of a network. Its parameters are a pytree of their own, which `init` draws.

    Everything else in the library knows a network by these two methods only. They take one observation; vmap them over
    many. Subclasses adapt modules of other libraries: `Equinox`, `Linen`, `NNX`.
    """

    @abc.abstractmethod
    def init(self, key: PRNGKeyArray, observation: Any, outputs: int) -> Any:
        """Draw parameters.

        Args:
          observation: one observation, or its shapes and dtypes (`Environment.observation_space`).
          outputs: the number of numbers that `apply` is to return.

        Returns:
          A pytree whose leaves are floating-point arrays.
        """

    @abc.abstractmethod
    def apply(self, params: Any, observation: Any) -> Float[Array, " outputs"]:
        """The network's numbers for one observation, [outputs]."""


def as_vector(observation: Any, dtype: Any) -> Float[Array, " n"]:
    """One observation, a pytree of arrays of any dtypes, as one vector [n].

    Example:
      >>> bj.networks.as_vector({"a": jnp.ones((2, 2)), "b": jnp.asarray(3)}, jnp.float32).tolist()
      [1.0, 1.0, 1.0, 1.0, 3.0]
    """
    return jnp.concatenate([jnp.reshape(leaf, (-1,)).astype(dtype) for leaf in jax.tree.leaves(observation)])


def vector_size(observation: Any) -> int:
    """The length of `as_vector`."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(observation))


def example(observation: Any) -> Any:
    """Zeros in the shapes and dtypes of an observation."""
    return jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), leaf.dtype), observation)
