"""Transition kernels P[s, a, s'], one representation a file, behind the protocol of `protocol.py`."""

from bilevel_jax.mdp.transitions.dense import DenseOperator, DenseTransition
from bilevel_jax.mdp.transitions.matrix_free import MatrixFreeOperator, MatrixFreeTransition
from bilevel_jax.mdp.transitions.predecessor import PredecessorLists, PredecessorOperator
from bilevel_jax.mdp.transitions.protocol import PolicyOperator, StateOperator, Transition, TransposedOperator
from bilevel_jax.mdp.transitions.stencil import StencilOperator, StencilTransition
from bilevel_jax.mdp.transitions.successor import SuccessorTransition
from bilevel_jax.mdp.transitions.successor_operator import SuccessorOperator

__all__ = [
    "DenseOperator",
    "DenseTransition",
    "MatrixFreeOperator",
    "MatrixFreeTransition",
    "PolicyOperator",
    "PredecessorLists",
    "PredecessorOperator",
    "StateOperator",
    "StencilOperator",
    "StencilTransition",
    "SuccessorOperator",
    "SuccessorTransition",
    "Transition",
    "TransposedOperator",
]
