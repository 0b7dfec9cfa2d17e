"""Restarted GMRES."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.scipy.sparse.linalg import gmres

from bilevel_jax.adjoint.protocol import LinearSolver, residual_of
from bilevel_jax.batching import one_at_a_time_on_cpu
from bilevel_jax.validation import require_setting


class GMRES(LinearSolver):
    """Restarted GMRES (`jax.scipy.sparse.linalg.gmres`, one cycle at a time, the true residual checked).

    Args:
      tolerance: |b - A x|_2 / |b|_2 at which to stop; None means 1e-10 in float64, 1e-5 in float32.
      restart: Krylov dimension of a cycle (static).
      max_cycles: cycles at most.

    Raises:
      InputError: restart below 1, tolerance or max_cycles below 0.
    """

    tolerance: Any = None
    restart: int = eqx.field(default=30, static=True)
    max_cycles: Any = 100

    def __check_init__(self):
        if self.tolerance is not None:
            require_setting("tolerance", self.tolerance, 0, "None chooses by the dtype")
        require_setting("restart", self.restart, 1, "20 to 50 is usual", whole=True)
        require_setting("max_cycles", self.max_cycles, 0, "100 is usual", whole=True)

    def relative_tolerance(self, dtype):
        if self.tolerance is None:
            return 1e-10 if dtype == jnp.float64 else 1e-5
        return self.tolerance

    def solve(self, operator, prepared, rhs, guess, transpose):
        del prepared
        return _restarted_gmres(self, operator.T if transpose else operator, rhs, guess)


@one_at_a_time_on_cpu
def _restarted_gmres(solver, system, rhs, guess):
    system = system.fold()
    target = jnp.asarray(solver.relative_tolerance(rhs.dtype), rhs.dtype) * jnp.linalg.norm(rhs)

    def cycle(carry):
        x, gap, _, cycles = carry
        update, _ = gmres(
            lambda v: v - system.apply(v),
            gap,
            tol=0.0,
            atol=target / 2,  # its own count of the residual runs a little ahead of the true one
            restart=solver.restart,
            maxiter=1,
            solve_method="incremental",
        )
        new = residual_of(system, x + update, rhs)
        # A cycle that gains nothing will not gain later either: rounding, or a breakdown.
        gained = jnp.linalg.norm(new) < jnp.linalg.norm(gap)
        return jnp.where(gained, x + update, x), jnp.where(gained, new, gap), gained, cycles + 1

    def unfinished(carry):
        _, gap, gained, cycles = carry
        return gained & (jnp.linalg.norm(gap) > target) & (cycles < max_cycles)

    max_cycles = jnp.asarray(solver.max_cycles, jnp.int32)
    start = (guess, residual_of(system, guess, rhs), jnp.asarray(True), jnp.asarray(0, jnp.int32))
    x, _, _, cycles = lax.while_loop(unfinished, cycle, start)
    return x, cycles
