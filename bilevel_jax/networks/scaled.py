"""Networks on observations that are scaled to the order of one."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import as_float, require_finite, require_positive
from bilevel_jax.networks.mlp import MLP
from bilevel_jax.networks.protocol import Network, as_vector, vector_size


class Scaled(Network):
    """A network on (observation - offset) / scale, with the observation as one vector.

    Networks see little of entries that are much smaller than one, such as the velocity of a car that is 0.01 metres a
    step.

    Args:
      scale: a number, or an array [n] in the order of `as_vector`.
      offset: likewise.
      network: what the vectors go into; None is `MLP()`.

    Raises:
      InputError: a scale that is not above 0, an offset that is not finite; in `init`, either of another length than
        observations.

    Example:
      >>> network = bj.networks.Scaled(jnp.array([0.5, 0.03]), jnp.array([-0.3, 0.0]))
      >>> params = network.init(jax.random.key(0), jnp.zeros(2), 3)
      >>> network.apply(params, jnp.array([-0.5, 0.01])).shape
      (3,)
    """

    scale: Float[Array, "*n"]
    offset: Float[Array, "*n"]
    network: Network

    def __init__(self, scale: Any = 1.0, offset: Any = 0.0, network: Network | None = None):
        self.scale = as_float("scale", scale, float)
        self.offset = as_float("offset", offset, float)
        self.network = MLP() if network is None else network
        require_positive("scale", self.scale, "give the size that the entries of observations have")
        require_finite("offset", self.offset)

    def init(self, key, observation, outputs):
        length = vector_size(observation)
        for name, given in (("scale", self.scale), ("offset", self.offset)):
            if given.shape not in ((), (1,), (length,)):
                raise InputError(
                    f"{name}: expected a number or shape [{length}], as an observation has {length} entries, got shape "
                    f"{list(given.shape)}"
                )
        return self.network.init(key, jax.ShapeDtypeStruct((length,), self.scale.dtype), outputs)

    def apply(self, params, observation):
        vector = as_vector(observation, self.scale.dtype)
        scale, offset = (jnp.broadcast_to(number, vector.shape) for number in (self.scale, self.offset))
        return self.network.apply(params, (vector - offset) / scale)
