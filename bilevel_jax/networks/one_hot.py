"""Networks on the states of a table."""

import equinox as eqx
import jax
import jax.numpy as jnp

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.sizes import size
from bilevel_jax.core.validation import is_known
from bilevel_jax.networks.mlp import MLP
from bilevel_jax.networks.protocol import Network


class OneHot(Network):
    """A network on one-hot vectors of observations that are the states 0 to S - 1.

    Args:
      states: S (static).
      network: what the vectors go into. None is a linear function that begins with zeros: a table.

    Raises:
      InputError: states below 1; an observation out of 0 to S - 1, where its value is known. Where it is not, the
        outputs are NaN.

    Example:
      >>> network = bj.networks.OneHot(8)
      >>> params = network.init(jax.random.key(0), jnp.asarray(0), 3)
      >>> network.apply(params, jnp.asarray(5)).tolist()
      [0.0, 0.0, 0.0]
    """

    states: int = eqx.field(static=True, converter=size("states"))
    network: Network

    def __init__(self, states: int, network: Network | None = None):
        self.states = states
        self.network = MLP(depth=0, output_scale=0.0) if network is None else network

    def init(self, key, observation, outputs):
        del observation
        return self.network.init(key, jnp.zeros(self.states), outputs)

    def apply(self, params, observation):
        state = jnp.asarray(observation)
        number = state.astype(jnp.int32)  # narrow integers cannot be compared with S
        valid = (number >= 0) & (number < self.states) & (number.astype(state.dtype) == state)
        if is_known(valid) and not bool(jnp.all(valid)):
            raise InputError(f"observation: expected a state from 0 to {self.states - 1}, got {observation}")
        return self.network.apply(params, jnp.where(valid, jax.nn.one_hot(number, self.states), jnp.nan))
