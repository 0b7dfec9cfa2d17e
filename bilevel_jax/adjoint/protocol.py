"""What every linear solver keeps to, and how each solve reports."""

import abc
from typing import Any

import equinox as eqx
import jax

from bilevel_jax.transitions import StateOperator


class LinearStats(eqx.Module):
    """How a linear solve went. `result` is a `Result` code, all fields are scalars a batch element.

    `residual` is |b - A x|; `error_bound` bounds |x - x*| by residual / (1 - discount). Both are in the
    sup norm for a value and in the 1-norm for an adjoint (a signed occupancy): the norms in which the
    bound holds.
    """

    result: jax.Array
    steps: jax.Array
    residual: jax.Array
    error_bound: jax.Array


class LinearSolver(eqx.Module):
    """The protocol: `prepare` once an operator, `solve` for each right-hand side."""

    def prepare(self, operator: StateOperator) -> Any:
        """What solves with M and with M' share, e.g. a factorization."""
        del operator

    @abc.abstractmethod
    def solve(
        self,
        operator: StateOperator,
        prepared: Any,
        rhs: jax.Array,
        guess: jax.Array,
        transpose: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """x[S] with (I - M) x = rhs, or (I - M') x = rhs if transpose, and the number of steps taken.

        `prepared` is what `prepare` returned, or None if it was not called.
        """

    @abc.abstractmethod
    def relative_tolerance(self, dtype: Any) -> Any:
        """A residual above this fraction of |b| (2-norm) is reported as not converged."""


def residual_of(system: StateOperator, x: jax.Array, rhs: jax.Array) -> jax.Array:
    """rhs - (I - M) x, all [S]."""
    return rhs - x + system.apply(x)
