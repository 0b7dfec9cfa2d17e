"""BiCGStab with restarts."""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax import lax

from bilevel_jax.core.arrays import Count, Flag, PerState, Scalar
from bilevel_jax.core.validation import require_setting
from bilevel_jax.linear.krylov import KrylovSolver
from bilevel_jax.linear.preconditioners import Preconditioner

# A residual that grew by this factor since the last restart has lost its digits.
GROWTH = 1e4


class Walk(NamedTuple):
    """Where the iteration stands: iterate u, residual r, direction p, all [S]; rho, the product of r and the first r.

    `best` [S] and `least`, the iterate with the smallest residual and its 2-norm; `length` of r; the products made;
    whether a division broke down.
    """

    u: PerState
    r: PerState
    p: PerState
    rho: Scalar
    best: PerState
    least: Scalar
    length: Scalar
    products: Count
    broken: Flag


class BiCGStab(KrylovSolver):
    """BiCGStab (van der Vorst 1992), preconditioned on the right: seven vectors, two products per iteration.

    The recursion may break down, lose its digits or claim convergence. Then the true residual of its best iterate
    decides: either it has converged, or the method restarts from there. Where a restart gained nothing, sweeps x <- b +
    M x come first, which always contract. The result is finite wherever the input is.

    Args:
      tolerance: |b - A x|_2 / |b|_2 at which to stop. None means 1e-10 in float64, 1e-5 in float32, or the residual
        that rounding leaves if that is larger. A tolerance that is given and cannot be reached is reported.
      max_iterations: the largest number of products, apart from a few of the last restart.
      preconditioner: None, `Jacobi()`, `ConstantDeflation()` or `NeumannPreconditioner(terms)`.
      fall_back: whether an LU factorization follows where products gain too little, up to 5,000 states (static).

    Raises:
      InputError: tolerance or max_iterations below 0, tolerance from 1 on, no `Preconditioner`.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> policy = jnp.array([[0.5, 0.5], [1.0, 0.0]])
      >>> bj.policy_value(mdp, policy, bj.BiCGStab(tolerance=1e-5)).round(2).tolist()
      [2.75, 2.25]
    """

    tolerance: Any = None
    max_iterations: Any = 5000
    preconditioner: Preconditioner | None = None
    fall_back: bool = eqx.field(default=False, static=True)

    def __check_init__(self):
        require_setting("max_iterations", self.max_iterations, 0, "5000 is usual", whole=True)

    def limits(self):
        return jnp.iinfo(jnp.int32).max, self.max_iterations

    def segment(self, contraction, gap, norm, target, budget):
        eps = jnp.finfo(gap.dtype).eps

        def image(v):
            return v - contraction(v)

        def body(now: Walk) -> Walk:
            v = image(now.p)
            slope = jnp.sum(gap * v)
            alpha = now.rho / jnp.where(slope == 0, 1, slope)
            half = now.r - alpha * v
            t = image(half)
            square = jnp.sum(t * t)
            omega = jnp.sum(t * half) / jnp.where(square == 0, 1, square)
            u = now.u + alpha * now.p + omega * half
            r = half - omega * t
            length = jnp.linalg.norm(r)
            next_rho = jnp.sum(gap * r)
            better = length < now.least
            broken = (slope == 0) | (omega == 0) | (jnp.abs(next_rho) <= eps * norm * length)
            # NaN compares false.
            broken |= ~((length <= GROWTH * norm) & jnp.isfinite(next_rho))
            beta = (next_rho / now.rho) * (alpha / jnp.where(omega == 0, 1, omega))
            return Walk(
                u=u,
                r=r,
                p=r + beta * (now.p - omega * v),
                rho=next_rho,
                best=jnp.where(better, u, now.best),
                least=jnp.where(better, length, now.least),
                length=length,
                products=now.products + 2,
                broken=broken,
            )

        def unfinished(now: Walk) -> Flag:
            return (now.length > 0.95 * target) & ~now.broken & (now.products < budget)

        zeros = jnp.zeros_like(gap)
        start = Walk(
            u=zeros,
            r=gap,
            p=gap,
            rho=norm * norm,
            best=zeros,
            least=norm,
            length=norm,
            products=jnp.asarray(0, jnp.int32),
            broken=jnp.asarray(False),
        )
        end = lax.while_loop(unfinished, body, start)
        return end.best, end.products
