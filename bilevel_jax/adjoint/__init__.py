"""Linear solvers of (I - M) x = b and its transpose, M = discount * P_pi: policy evaluation and the adjoint.

One solver a file, behind the protocol of `protocol.py`. `linear_solve` is differentiable in the operator
and the right-hand side; each solve reports its own result, so that an adjoint that failed cannot pass for
a gradient.
"""

from bilevel_jax.adjoint.adaptive import AdaptiveKrylov
from bilevel_jax.adjoint.bicgstab import BiCGStab
from bilevel_jax.adjoint.descent import Descent
from bilevel_jax.adjoint.direct import Direct
from bilevel_jax.adjoint.gmres import GMRES
from bilevel_jax.adjoint.neumann import Neumann
from bilevel_jax.adjoint.preconditioners import ConstantDeflation, Jacobi, NeumannPreconditioner, Preconditioner
from bilevel_jax.adjoint.protocol import Attempt, LinearSolver, LinearStats, residual_of
from bilevel_jax.adjoint.solve import DIRECT_LIMIT, default_linear_solver, linear_solve, zero_tangents

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
