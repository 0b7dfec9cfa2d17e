"""Linear solvers of (I - M) x = b and its transpose, where M = discount * P_pi: policy evaluation and the adjoint.

One solver per file, behind the protocol of `protocol.py`. `linear_solve` is differentiable in the operator and the
right-hand side. Each solve reports its own result, so that an adjoint that failed is not mistaken for a gradient.
"""

from bilevel_jax.linear.adaptive import AdaptiveKrylov
from bilevel_jax.linear.bicgstab import BiCGStab
from bilevel_jax.linear.descent import Descent
from bilevel_jax.linear.direct import Direct
from bilevel_jax.linear.gmres import GMRES
from bilevel_jax.linear.neumann import Neumann
from bilevel_jax.linear.preconditioners import ConstantDeflation, Jacobi, NeumannPreconditioner, Preconditioner
from bilevel_jax.linear.protocol import Attempt, LinearSolver, LinearStats, residual_of
from bilevel_jax.linear.solve import DIRECT_LIMIT, default_linear_solver, linear_solve, zero_tangents

__all__ = [
    "DIRECT_LIMIT",
    "GMRES",
    "AdaptiveKrylov",
    "Attempt",
    "BiCGStab",
    "ConstantDeflation",
    "Descent",
    "Direct",
    "Jacobi",
    "LinearSolver",
    "LinearStats",
    "Neumann",
    "NeumannPreconditioner",
    "Preconditioner",
    "default_linear_solver",
    "linear_solve",
    "residual_of",
    "zero_tangents",
]
