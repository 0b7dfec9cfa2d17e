"""Transition kernels P[s, a, s'], one representation a file, behind the protocol of `protocol.py`."""

from bilevel_jax.transitions.dense import DenseOperator, DenseTransition
from bilevel_jax.transitions.protocol import PolicyOperator, StateOperator, Transition, TransposedOperator
from bilevel_jax.transitions.successor import SuccessorOperator, SuccessorTransition

__all__ = [
    "DenseOperator",
    "DenseTransition",
    "PolicyOperator",
    "StateOperator",
    "SuccessorOperator",
    "SuccessorTransition",
    "Transition",
    "TransposedOperator",
]
