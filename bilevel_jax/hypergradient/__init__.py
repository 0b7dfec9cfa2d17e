"""The bilevel problem and its hyper-gradient: the gradient of f(x, solution of the MDP at x) in x.

One method a file, behind `protocol.py`; `lagrangian.py` has the function whose derivatives they all are.
"""

from bilevel_jax.hypergradient.check import Comparison, GradientCheck, check_gradient
from bilevel_jax.hypergradient.compute import hypergradient
from bilevel_jax.hypergradient.curvature import hessian_vector_product
from bilevel_jax.hypergradient.implicit import Implicit, implicit_gradient
from bilevel_jax.hypergradient.perturbation import FiniteDifferences, SimultaneousPerturbation
from bilevel_jax.hypergradient.problem import (
    BilevelProblem,
    Problem,
    as_upper_variable,
    lower_level,
    require_problem,
)
from bilevel_jax.hypergradient.protocol import Hypergradient, Method
from bilevel_jax.hypergradient.trajectories import ExpectedTrajectories
from bilevel_jax.hypergradient.unrolled import Unrolled

__all__ = [
    "BilevelProblem",
    "Comparison",
    "ExpectedTrajectories",
    "FiniteDifferences",
    "GradientCheck",
    "Hypergradient",
    "Implicit",
    "Method",
    "Problem",
    "SimultaneousPerturbation",
    "Unrolled",
    "as_upper_variable",
    "check_gradient",
    "hessian_vector_product",
    "hypergradient",
    "implicit_gradient",
    "lower_level",
    "require_problem",
]
