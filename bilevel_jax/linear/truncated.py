"""The part that solvers with a given number of steps share: they have a tolerance only if one is asked for."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax

from bilevel_jax.core.arrays import PerState
from bilevel_jax.core.validation import require_setting
from bilevel_jax.linear.protocol import Attempt, LinearSolver, residual_of
from bilevel_jax.mdp.transitions import StateOperator


class TruncatedSolver(LinearSolver):
    """A solver that makes all of its steps and reports convergence, because that is what was asked for.

    With a `tolerance` (|b - A x|_2 / |b|_2) it stops as soon as that is met, and reports that it has not converged if
    it never is.
    """

    tolerance: eqx.AbstractVar[Any]

    def __check_init__(self):
        if self.tolerance is not None:
            require_setting("tolerance", self.tolerance, 0, "None takes all steps")

    def relative_tolerance(self, dtype):
        del dtype
        return jnp.inf if self.tolerance is None else self.tolerance

    def takes_rounding(self):
        return self.tolerance is None

    def repeat(
        self,
        step: Callable[[PerState, PerState], PerState],
        system: StateOperator,
        rhs: PerState,
        start: PerState,
        limit: int,
        products: int,
    ) -> Attempt:
        """x[S] <- step(x, rhs - A x) from `start`, `limit` times or to the tolerance; `products` each."""
        if self.tolerance is None:
            x = lax.fori_loop(0, limit, lambda _, x: step(x, residual_of(system, x, rhs)), start)
            return Attempt(x=x, products=jnp.asarray(products * limit, jnp.int32), stalled=jnp.asarray(False))
        target = jnp.asarray(self.tolerance, rhs.dtype) * jnp.linalg.norm(rhs)

        def unfinished(carry):
            _, gap, steps = carry
            return (jnp.linalg.norm(gap) > target) & (steps < limit)

        def body(carry):
            x, gap, steps = carry
            x = step(x, gap)
            return x, residual_of(system, x, rhs), steps + 1

        zero = jnp.asarray(0, jnp.int32)
        x, gap, steps = lax.while_loop(unfinished, body, (start, residual_of(system, start, rhs), zero))
        return Attempt(x=x, products=products * steps, stalled=jnp.asarray(False), gap=gap)
