"""BiCGStab with restarts."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax

from bilevel_jax.adjoint.krylov import KrylovSolver
from bilevel_jax.adjoint.preconditioners import Preconditioner
from bilevel_jax.validation import require_setting

# A residual that grew by this factor since the last restart has lost its digits.
GROWTH = 1e4


class BiCGStab(KrylovSolver):
    """BiCGStab (van der Vorst 1992), preconditioned on the right: seven vectors, two products an iteration.

    Where the recursion breaks down, loses its digits or claims convergence, the true residual of its
    best iterate decides: converged, or a restart from there; where that gained nothing, sweeps of
    x <- b + M x come first, which always contract. Its result is finite wherever its input is.

    Args:
      tolerance: |b - A x|_2 / |b|_2 at which to stop; None means 1e-10 in float64, 1e-5 in float32, or
        what rounding leaves to reach if that is more. A tolerance given and out of reach is reported.
      max_steps: products at most, but for the last restart's few.
      preconditioner: None, `Jacobi()`, `ConstantDeflation()` or `NeumannPreconditioner(terms)`.
      fall_back: whether an LU factorization follows where products gain too little, up to 5,000 states (static).

    Raises:
      InputError: tolerance or max_steps below 0, tolerance from 1 on, no `Preconditioner`.
    """

    tolerance: Any = None
    max_steps: Any = 5000
    preconditioner: Preconditioner | None = None
    fall_back: bool = eqx.field(default=False, static=True)

    def __check_init__(self):
        require_setting("max_steps", self.max_steps, 0, "5000 is usual", whole=True)

    def limits(self):
        return jnp.iinfo(jnp.int32).max, self.max_steps

    def segment(self, contraction, gap, norm, target, budget):
        eps = jnp.finfo(gap.dtype).eps

        def image(v):
            return v - contraction(v)

        def body(carry):
            u, r, p, rho, best, least, _, steps, _ = carry
            v = image(p)
            slope = jnp.sum(gap * v)
            alpha = rho / jnp.where(slope == 0, 1, slope)
            half = r - alpha * v
            t = image(half)
            square = jnp.sum(t * t)
            omega = jnp.sum(t * half) / jnp.where(square == 0, 1, square)
            u = u + alpha * p + omega * half
            r = half - omega * t
            length = jnp.linalg.norm(r)
            next_rho = jnp.sum(gap * r)
            better = length < least
            best = jnp.where(better, u, best)
            least = jnp.where(better, length, least)
            broken = (slope == 0) | (omega == 0) | (jnp.abs(next_rho) <= eps * norm * length)
            # NaN compares false.
            broken |= ~((length <= GROWTH * norm) & jnp.isfinite(next_rho))
            beta = (next_rho / rho) * (alpha / jnp.where(omega == 0, 1, omega))
            return u, r, r + beta * (p - omega * v), next_rho, best, least, length, steps + 2, broken

        def unfinished(carry):
            length, steps, broken = carry[-3:]
            return (length > 0.95 * target) & ~broken & (steps < budget)

        zeros = jnp.zeros_like(gap)
        start = (zeros, gap, gap, norm * norm, zeros, norm, norm, jnp.asarray(0, jnp.int32), jnp.asarray(False))
        out = lax.while_loop(unfinished, body, start)
        return out[4], out[7]
