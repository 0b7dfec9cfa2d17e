"""Regularizers of the policy: the protocol, the entropies, and none."""

from bilevel_jax.mdp.regularizers.entropies import KLDivergence, ShannonEntropy
from bilevel_jax.mdp.regularizers.protocol import Regularizer
from bilevel_jax.mdp.regularizers.tsallis import TsallisEntropy
from bilevel_jax.mdp.regularizers.unregularized import Unregularized

__all__ = ["KLDivergence", "Regularizer", "ShannonEntropy", "TsallisEntropy", "Unregularized"]
