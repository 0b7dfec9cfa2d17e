"""What every method of making a hyper-gradient keeps to, and what it returns."""

import abc
from typing import Any

import equinox as eqx
import jax

from bilevel_jax.hypergradient.problem import Problem
from bilevel_jax.results import Outcome, finite_outcome
from bilevel_jax.solvers import Solution


class Hypergradient(eqx.Module):
    """The hyper-gradient at one x.

    `value` f(x, pi*(x)), a scalar; `gradient`, a pytree as x; `solution` of the lower level; `adjoint`
    w[S] with (I - discount P_pi)' w = df/dV (batch axes as in the MDP), a signed discounted occupancy;
    `stats` of the adjoint solve. `error` bounds the 2-norm, over all leaves, of gradient minus the true
    hyper-gradient, to first order: each method says where it has it from; None where it was not
    asked for. `adjoint` and `stats` are None from methods that do without. `bj.check(hypergradient)` raises where
    solution or adjoint did not converge, or value or gradient is not finite.
    """

    value: jax.Array
    gradient: Any
    solution: Solution
    adjoint: Any  # jax.Array, or None; the same for LinearStats and error
    stats: Any
    error: Any

    def outcomes(self) -> tuple[Outcome, ...]:
        adjoint = () if self.stats is None else (Outcome("adjoint", self.stats.result, self.stats.error_bound),)
        return (*self.solution.outcomes(), *adjoint, finite_outcome(self.value, self.gradient, self.error))


class Method(eqx.Module):
    """How a hyper-gradient is made."""

    @abc.abstractmethod
    def estimate(
        self,
        problem: Problem,
        x: Any,
        initial_value: jax.Array | None,
        initial_adjoint: jax.Array | None,
        with_error: bool,
    ) -> Hypergradient:
        """Value and gradient at x from warm starts (V[S] and w[S], or None); `with_error` is static."""
