"""What every linear solver keeps to, and how each solve reports."""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from bilevel_jax.transitions import StateOperator


class LinearStats(eqx.Module):
    """How a linear solve went. `result` is a `Result` code, all fields are scalars a batch element.

    `steps` counts products with M or M' beyond the check of a guess (1 for `Direct`). `residual` is
    |b - A x|; `error_bound` bounds |x - x*| by (residual + rounding) / (1 - discount), where `rounding`
    allows for the error with which the residual itself is computed. Both are in the sup norm for a value
    and in the 1-norm for an adjoint (a signed occupancy): the norms in which the bound holds.
    """

    result: jax.Array
    steps: jax.Array
    residual: jax.Array
    error_bound: jax.Array


class Attempt(NamedTuple):
    """What a solver returns: `x`[S], the products made, whether rounding or stagnation ended it before its limit.

    `gap` is b - A x [S] where the solver knows it truly, not by a recursion; None has it computed.
    """

    x: jax.Array
    steps: jax.Array
    stalled: jax.Array
    gap: jax.Array | None = None


class LinearSolver(eqx.Module):
    """The protocol: `prepare` once an operator, `solve` for each right-hand side."""

    def prepare(self, operator: StateOperator) -> Any:
        """What solves with M and with M' share, e.g. a factorization."""
        del operator

    @abc.abstractmethod
    def solve(
        self, operator: StateOperator, prepared: Any, rhs: jax.Array, guess: jax.Array | None, transpose: bool
    ) -> Attempt:
        """x[S] with (I - M) x = rhs, or (I - M') x = rhs if transpose.

        `prepared` is what `prepare` returned, or None if it was not called; `guess` None stands for zeros.
        """

    @abc.abstractmethod
    def relative_tolerance(self, dtype: Any) -> Any:
        """A residual above this fraction of |b| (2-norm) is reported as not converged."""

    def takes_rounding(self) -> bool:
        """Whether a residual at the level of rounding counts as converged where the tolerance is below it."""
        return True


def residual_of(system: StateOperator, x: jax.Array, rhs: jax.Array) -> jax.Array:
    """rhs - (I - M) x, all [S]."""
    return rhs - x + system.apply(x)


def default_tolerance(tolerance: Any, dtype: Any) -> Any:
    """None is 1e-10 in float64 and 1e-5 in float32."""
    if tolerance is None:
        return 1e-10 if dtype == jnp.float64 else 1e-5
    return tolerance


def power_of_two(*arrays: jax.Array) -> jax.Array:
    """A power of two near the largest absolute entry, 1 if there is none: divided by it, squares stay in range."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(array)) for array in arrays]))
    tiny = jnp.finfo(largest.dtype).tiny
    usable = jnp.isfinite(largest) & (largest > 4 * tiny)
    exponent = jnp.frexp(jnp.where(usable, largest, 1))[1] - 1
    return lax.stop_gradient(jnp.ldexp(jnp.ones_like(largest), exponent))
