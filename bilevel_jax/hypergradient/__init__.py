"""The hyper-gradient: the gradient of f(x, solution of the MDP at x) in x.

One method per file in methods/, behind `protocol.py`; `lagrangian.py` has the function whose derivatives they all are.
"""

from bilevel_jax.hypergradient.check import Comparison, GradientCheck, check_gradient
from bilevel_jax.hypergradient.compute import hypergradient
from bilevel_jax.hypergradient.curvature import hessian_vector_product
from bilevel_jax.hypergradient.methods import (
    ExpectedTrajectories,
    FiniteDifferences,
    Implicit,
    SimultaneousPerturbation,
    Unrolled,
    implicit_gradient,
)
from bilevel_jax.hypergradient.protocol import Hypergradient, Method

__all__ = [
    "Comparison",
    "ExpectedTrajectories",
    "FiniteDifferences",
    "GradientCheck",
    "Hypergradient",
    "Implicit",
    "Method",
    "SimultaneousPerturbation",
    "Unrolled",
    "check_gradient",
    "hessian_vector_product",
    "hypergradient",
    "implicit_gradient",
]
