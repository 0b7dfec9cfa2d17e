"""The protocol of a method for a hyper-gradient, and its result."""

import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float

from bilevel_jax.bilevel.problem import Problem
from bilevel_jax.core.arrays import Scalar
from bilevel_jax.core.results import Outcome, finite_outcome
from bilevel_jax.linear import LinearStats
from bilevel_jax.solvers import Solution


class Hypergradient(eqx.Module):
    """The hyper-gradient at one x.

    `value` is f(x, pi*(x)), a scalar. `gradient` is a pytree like x. `solution` is that of the lower level. `adjoint`
    is w[S] with (I - discount P_pi)' w = df/dV (batch axes as in the MDP), a signed discounted occupancy; `stats` is
    the report of its solve. `error` is an estimate of the 2-norm, over all leaves, of the gradient minus the true
    hyper-gradient: a bound to first order, no proof. Each method documents how it is computed. It is infinite where
    value or gradient are not finite, and None where it was not asked for. `adjoint` and `stats` are None from methods
    without an adjoint. `bj.check(hypergradient)` raises where solution or adjoint did not converge, or where value or
    gradient is not finite.
    """

    value: Scalar
    gradient: Any
    solution: Solution
    # Or None, as said above; Any, because whoever chose the method knows which.
    adjoint: Float[Array, "*batch S"] | Any
    stats: LinearStats | Any
    error: Scalar | Any

    def outcomes(self) -> tuple[Outcome, ...]:
        adjoint = () if self.stats is None else (Outcome("adjoint", self.stats.result, self.stats.error_bound),)
        return (*self.solution.outcomes(), *adjoint, finite_outcome(self.value, self.gradient, self.error))


class Method(eqx.Module):
    """A method for a hyper-gradient."""

    @abc.abstractmethod
    def estimate(
        self,
        problem: Problem,
        x: Any,
        initial_value: Float[Array, "*batch S"] | None,
        initial_adjoint: Float[Array, "*batch S"] | None,
        with_error: bool,
    ) -> Hypergradient:
        """Return value and gradient at x from warm starts (V[S] and w[S], or None). `with_error` is static."""
