"""Transition kernels P[s, a, s'], one representation a file, behind the protocol of `protocol.py`."""

from bilevel_jax.transitions.dense import DenseOperator, DenseTransition
from bilevel_jax.transitions.matrix_free import MatrixFreeOperator, MatrixFreeTransition
from bilevel_jax.transitions.predecessor import PredecessorLists, PredecessorOperator
from bilevel_jax.transitions.protocol import PolicyOperator, StateOperator, Transition, TransposedOperator
from bilevel_jax.transitions.stencil import StencilOperator, StencilTransition
from bilevel_jax.transitions.successor import SuccessorOperator, SuccessorTransition

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
