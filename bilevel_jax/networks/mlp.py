"""Fully connected networks."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from bilevel_jax.core.cpu import one_at_a_time_on_cpu
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.sizes import size
from bilevel_jax.networks.modules import Module
from bilevel_jax.networks.protocol import as_vector, vector_size

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "gelu": jax.nn.gelu, "silu": jax.nn.silu}
GAINS = {"relu": np.sqrt(2.0), "tanh": 5 / 3, "gelu": np.sqrt(2.0), "silu": np.sqrt(2.0)}


class MLP(Module):
    """A fully connected network, on the observation as one vector.

    Weights are orthogonal, those of the last layer times `output_scale`. Biases are zero.

    Args:
      width: of each hidden layer (static).
      depth: the number of hidden layers (static); 0 is a linear function.
      layer_norm: whether layers are normalized before the activation (static).
      activation: of the hidden layers (static).
      output_scale: of the weights of the last layer (static); 0 begins with zeros. It should be small beside the
        temperature of a policy that the network is for, which then begins nearly uniform.

    Raises:
      InputError: a width below 1, a negative depth, another activation.

    Example:
      >>> network = bj.networks.MLP(width=16, depth=1)
      >>> params = network.init(jax.random.key(0), jnp.zeros(3), 2)
      >>> network.apply(params, jnp.ones(3)).shape
      (2,)
    """

    width: int = eqx.field(default=64, static=True, converter=size("width"))
    depth: int = eqx.field(default=2, static=True)
    layer_norm: bool = eqx.field(default=True, static=True)
    activation: Literal["relu", "tanh", "gelu", "silu"] = eqx.field(default="relu", static=True)
    output_scale: float = eqx.field(default=0.1, static=True)

    def __check_init__(self):
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 0:
            raise InputError(f"depth: expected a whole number of hidden layers, got {self.depth!r}")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")

    def build(self, key, observation, outputs):
        keys = jax.random.split(key, self.depth + 1)
        sizes = (vector_size(observation), *(self.width for _ in range(self.depth)))
        layers: list[Any] = [eqx.nn.Lambda(_flat)]
        for k in range(self.depth):
            layers.append(linear(keys[k], sizes[k], self.width, GAINS[self.activation]))
            if self.layer_norm:
                layers.append(eqx.nn.LayerNorm(self.width))
            layers.append(eqx.nn.Lambda(ACTIVATIONS[self.activation]))
        layers.append(linear(keys[-1], sizes[-1], outputs, self.output_scale))
        return eqx.nn.Sequential(layers)


def linear(key: PRNGKeyArray, inputs: int, outputs: int, scale: float) -> eqx.nn.Linear:
    """A layer with orthogonal weights times `scale`, and zero biases."""
    layer = eqx.nn.Linear(inputs, outputs, key=key)
    weight = scale * _orthogonal(
        jax.random.normal(key, (max(outputs, inputs), min(outputs, inputs)), layer.weight.dtype)
    )
    weight = weight if outputs >= inputs else weight.T
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (weight, jnp.zeros(outputs, weight.dtype)))


def _orthonormal_columns(matrix: jax.Array) -> jax.Array:
    """Q of a QR factorization whose R has a positive diagonal: uniformly distributed where the entries are normal."""
    q, r = jnp.linalg.qr(matrix)
    return q * jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(q.dtype)[None]


# Networks of several seeds are drawn in one program, and layers are independent: batched QRs would hang on a CPU.
_orthogonal = one_at_a_time_on_cpu(_orthonormal_columns)


def _flat(observation: Any) -> jax.Array:
    return as_vector(observation, jnp.result_type(float))
