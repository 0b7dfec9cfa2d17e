"""Modules of flax nnx as networks. Importing this needs flax (`pip install 'bilevel_jax[deep]'`)."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.promotion import usual_promotion
from bilevel_jax.networks.flat import numbers
from bilevel_jax.networks.protocol import Network, example


class NNX(Network):
    """The module of flax nnx that `build(rngs)` returns, called with one observation.

    Its parameters are the state of its `nnx.Param`s. A dropout is off.

    Args:
      build: called with `nnx.Rngs` (static). The module has to return as many numbers as are asked for.

    Raises:
      InputError: in `init`, the module has other state than parameters, e.g. running statistics, or returns another
        number of outputs.

    Example:
      >>> from flax import nnx
      >>> network = bj.networks.nnx.NNX(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
      >>> params = network.init(jax.random.key(0), jnp.zeros(3), 2)
      >>> network.apply(params, jnp.ones(3)).shape
      (2,)
    """

    build: Callable[[Any], Any] = eqx.field(static=True)

    def init(self, key: PRNGKeyArray, observation: Any, outputs: int) -> Any:
        with usual_promotion():
            _, params, _, rest = nnx.split(self._module(key), nnx.Param, nnx.RngState, ...)
        if jax.tree.leaves(rest):
            names = ", ".join(".".join(map(str, path)) for path, _ in nnx.to_flat_state(rest))
            raise InputError(f"build: its module has the state {names}, which is no parameter; use layers without one")
        numbers("build", jax.eval_shape(self.apply, params, example(observation)), outputs)
        return params

    def apply(self, params: Any, observation: Any) -> Float[Array, " outputs"]:
        with usual_promotion():
            graph, _, random, _ = nnx.split(self._module(jax.random.key(0)), nnx.Param, nnx.RngState, ...)
            return jax.numpy.reshape(nnx.merge(graph, params, random)(observation), (-1,))

    def _module(self, key: PRNGKeyArray) -> Any:
        module = self.build(nnx.Rngs(key))
        module.eval()
        return module
