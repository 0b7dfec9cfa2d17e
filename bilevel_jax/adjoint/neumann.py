"""The truncated Neumann series."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax

from bilevel_jax.adjoint.protocol import Attempt, LinearSolver, residual_of
from bilevel_jax.validation import require_setting


class Neumann(LinearSolver):
    """The truncated series sum_k M^k b, with `terms` products after the first term (static).

    Args:
      terms: products at most.
      tolerance: |b - A x|_2 / |b|_2 at which to stop earlier, and above which the solve is reported as
        not converged. None takes all terms and always reports convergence, since it does what was
        asked; the residual is in the stats.

    Raises:
      InputError: terms or tolerance below 0.
    """

    terms: int = eqx.field(static=True)
    tolerance: Any = None

    def __check_init__(self):
        require_setting("terms", self.terms, 0, "0 keeps the first term alone", whole=True)
        if self.tolerance is not None:
            require_setting("tolerance", self.tolerance, 0, "None takes all terms")

    def relative_tolerance(self, dtype):
        del dtype
        return jnp.inf if self.tolerance is None else self.tolerance

    def takes_rounding(self):
        return self.tolerance is None

    def solve(self, operator, prepared, rhs, guess, transpose):
        del prepared, guess
        system = (operator.T if transpose else operator).fold()
        if self.tolerance is None:
            x = lax.fori_loop(0, self.terms, lambda _, x: rhs + system.apply(x), rhs)
            return Attempt(x, jnp.asarray(self.terms, jnp.int32), jnp.asarray(False))
        return until(
            lambda x, gap: x + gap, system, rhs, rhs, self.terms, jnp.asarray(self.tolerance, rhs.dtype), products=1
        )


def until(step, system, rhs, start, limit, tolerance, products) -> Attempt:
    """x <- step(x, rhs - A x) from `start` until the residual is at most `tolerance` of |rhs|_2, or `limit` steps."""
    target = tolerance * jnp.linalg.norm(rhs)

    def unfinished(carry):
        _, gap, steps = carry
        return (jnp.linalg.norm(gap) > target) & (steps < limit)

    def body(carry):
        x, gap, steps = carry
        x = step(x, gap)
        return x, residual_of(system, x, rhs), steps + 1

    zero = jnp.asarray(0, jnp.int32)
    x, gap, steps = lax.while_loop(unfinished, body, (start, residual_of(system, start, rhs), zero))
    return Attempt(x, products * steps, jnp.asarray(False), gap)
