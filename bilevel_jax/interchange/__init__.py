"""Finite MDPs from and to the formats of other libraries, one format per file.

The functions use numpy and scipy, outside jit. They import none of those libraries.
"""

from bilevel_jax.interchange.common import with_end_state
from bilevel_jax.interchange.gymnasium import from_gymnasium
from bilevel_jax.interchange.mdptoolbox import from_mdptoolbox, to_mdptoolbox
from bilevel_jax.interchange.quantecon import from_quantecon, to_quantecon
from bilevel_jax.interchange.scipy_csr import from_scipy, to_scipy

__all__ = [
    "from_gymnasium",
    "from_mdptoolbox",
    "from_quantecon",
    "from_scipy",
    "to_mdptoolbox",
    "to_quantecon",
    "to_scipy",
    "with_end_state",
]
