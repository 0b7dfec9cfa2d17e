"""Networks: pytrees of parameters, and adapters for the modules of other libraries.

`equinox.Equinox` adapts a module of equinox. `linen.Linen` and `nnx.NNX` need flax and are imported by name:
`import bilevel_jax.networks.linen`.
"""

from bilevel_jax.networks import equinox
from bilevel_jax.networks.convolution import NatureCNN, RewardCNN
from bilevel_jax.networks.mlp import MLP
from bilevel_jax.networks.modules import Module
from bilevel_jax.networks.one_hot import OneHot
from bilevel_jax.networks.protocol import Network, as_vector
from bilevel_jax.networks.rewards import Ensemble, RewardNetwork
from bilevel_jax.networks.scaled import Scaled

__all__ = [
    "MLP",
    "Ensemble",
    "Module",
    "NatureCNN",
    "Network",
    "OneHot",
    "RewardCNN",
    "RewardNetwork",
    "Scaled",
    "as_vector",
    "equinox",
]
