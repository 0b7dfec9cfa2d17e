"""Modules of flax linen as networks. Importing this needs flax (`pip install 'bilevel_jax[deep]'`)."""

from typing import Any

import equinox as eqx
import flax.errors
import flax.linen as nn
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.promotion import usual_promotion
from bilevel_jax.networks.flat import numbers
from bilevel_jax.networks.protocol import Network, example


class Linen(Network):
    """A module of flax linen that is called with one observation.

    Its parameters are those of `module.init`, all collections of it. Only "params" has derivatives; running statistics
    of a batch normalization, say, are constants. Nothing random goes in: a dropout has to be deterministic.

    Args:
      module: it has to return as many numbers as are asked for (static).

    Raises:
      InputError: in `init`, the module returns another number of outputs, asks for random numbers, or changes its
        statistics.

    Example:
      >>> import flax.linen as nn
      >>> network = bj.networks.linen.Linen(nn.Dense(2))
      >>> params = network.init(jax.random.key(0), jnp.zeros(3), 2)
      >>> network.apply(params, jnp.ones(3)).shape
      (2,)
    """

    module: nn.Module = eqx.field(static=True)

    def init(self, key: PRNGKeyArray, observation: Any, outputs: int) -> Any:
        try:
            with usual_promotion():
                params = self.module.init(key, example(observation))
            made = jax.eval_shape(self.apply, params, example(observation))
        except flax.errors.InvalidRngError as error:
            raise InputError(
                f"module: it asks for random numbers, and is given none ({error}); make dropouts deterministic=True"
            ) from None
        except flax.errors.ModifyScopeVariableError as error:
            raise InputError(
                f"module: it changes more than its parameters ({error}); make batch normalizations "
                "use_running_average=True"
            ) from None
        numbers("module", made, outputs)
        return params

    def apply(self, params: Any, observation: Any) -> Float[Array, " outputs"]:
        own = {name: part if name == "params" else jax.lax.stop_gradient(part) for name, part in params.items()}
        with usual_promotion():
            made: Any = self.module.apply(own, observation)
            return jax.numpy.reshape(made, (-1,))
