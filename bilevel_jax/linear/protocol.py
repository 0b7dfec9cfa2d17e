"""The protocol of a linear solver, and the report of each solve."""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from bilevel_jax.core.arrays import Count, Flag, PerState, Scalar
from bilevel_jax.mdp.transitions import StateOperator


class LinearStats(eqx.Module):
    """The report of a linear solve. `result` is a `Result` code; every field has one scalar per batch element.

    `products` counts products with M or M' (1 for `Direct`); the product that checks a guess is not counted. `residual`
    is |b - A x|. `error_bound` bounds |x - x*| by (residual + rounding) / (1 - discount), where `rounding` allows for
    the error of the computed residual. Both are in the sup norm for a value and in the 1-norm for an adjoint (a signed
    occupancy), because in these norms the bound holds.
    """

    result: Int[Array, "*batch"]
    products: Int[Array, "*batch"]
    residual: Float[Array, "*batch"]
    error_bound: Float[Array, "*batch"]


class Attempt(NamedTuple):
    """The return value of a solver: `x`[S], the number of products, and whether rounding or stagnation ended it early.

    `gap` is b - A x [S] where the solver knows it exactly rather than by a recursion. If it is None, it is computed.
    """

    x: PerState
    products: Count
    stalled: Flag
    gap: PerState | None = None


class LinearSolver(eqx.Module):
    """The protocol: `prepare` once per operator, `solve` for each right-hand side."""

    def prepare(self, operator: StateOperator) -> Any:
        """Return what solves with M and with M' share, e.g. a factorization."""
        del operator

    @abc.abstractmethod
    def solve(
        self, operator: StateOperator, prepared: Any, rhs: PerState, guess: PerState | None, transpose: bool
    ) -> Attempt:
        """x[S] with (I - M) x = rhs, or (I - M') x = rhs if transpose.

        `prepared` is what `prepare` returned, or None if it was not called; `guess` None stands for zeros.
        """

    @abc.abstractmethod
    def relative_tolerance(self, dtype: Any) -> Any:
        """Return the largest residual that counts as converged, as a fraction of |b| (2-norm)."""

    def takes_rounding(self) -> bool:
        """Whether a residual at the level of rounding counts as converged where the tolerance is below it."""
        return True


def residual_of(system: StateOperator, x: PerState, rhs: PerState) -> PerState:
    """rhs - (I - M) x, all [S].

    Example:
      >>> operator = bj.DenseTransition(jnp.full((2, 1, 2), 0.5)).under(jnp.full((2, 1), 0.9))  # M = 0.9 P
      >>> bj.linear.residual_of(operator, jnp.zeros(2), jnp.ones(2)).tolist()
      [1.0, 1.0]
    """
    return rhs - x + system.apply(x)


def default_tolerance(tolerance: Any, dtype: Any) -> Any:
    """Return the tolerance; for None, 1e-10 in float64 and 1e-5 in float32."""
    if tolerance is None:
        return 1e-10 if dtype == jnp.float64 else 1e-5
    return tolerance


def power_of_two(*arrays: Float[Array, "..."]) -> Scalar:
    """Return a power of two near the largest absolute entry, 1 if there is none.

    Arrays that are divided by it have squares that are in range.
    """
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(array), initial=0) for array in arrays]))
    tiny = jnp.finfo(largest.dtype).tiny
    usable = jnp.isfinite(largest) & (largest > 4 * tiny)
    exponent = jnp.frexp(jnp.where(usable, largest, 1))[1] - 1
    return lax.stop_gradient(jnp.ldexp(jnp.ones_like(largest), exponent))
