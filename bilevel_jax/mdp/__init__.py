"""The regularized Markov decision process: arrays, transition kernels, regularizers, Bellman operator."""

from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import KLDivergence, Regularizer, ShannonEntropy, TsallisEntropy, Unregularized

__all__ = ["MDP", "KLDivergence", "Regularizer", "ShannonEntropy", "TsallisEntropy", "Unregularized"]
