"""Modules of equinox that a function builds."""

from collections.abc import Callable
from typing import Any

import equinox as eqx

from bilevel_jax.networks.modules import Module


class Equinox(Module):
    """The network that `function(key, observation, outputs)` returns, an `equinox.Module` that is called with one
    observation. A dropout is off.

    Args:
      function: called with a key, zeros in the shape of an observation, and the number of outputs (static). Two
        networks of the same function compile once.

    Raises:
      InputError: in `init`, the module has an array that is not floating-point, or another number of outputs.

    Example:
      >>> import equinox as eqx
      >>> def build(key, observation, outputs):
      ...     return eqx.nn.MLP(observation.size, outputs, width_size=8, depth=1, key=key)
      >>> network = bj.networks.equinox.Equinox(build)
      >>> params = network.init(jax.random.key(0), jnp.zeros(3), 2)
      >>> network.apply(params, jnp.ones(3)).shape
      (2,)
    """

    function: Callable[..., Any] = eqx.field(static=True)

    def build(self, key, observation, outputs):
        return eqx.nn.inference_mode(self.function(key, observation, outputs))
