"""The part that algorithms which know the model share."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, Float

from bilevel_jax.algorithms.base import Algorithm, Report, regularizer_of
from bilevel_jax.bilevel import Problem
from bilevel_jax.linear import LinearStats
from bilevel_jax.solvers import Solution


class Warm(eqx.Module):
    """V and w (None without an adjoint) from which the next iteration starts."""

    value: Float[Array, "*batch S"]
    adjoint: Float[Array, "*batch S"] | None


class ModelAlgorithm(Algorithm):
    """An algorithm for a `Problem`. `start`, outside jit, also checks the MDP and the regularizer at x."""

    @classmethod
    def requires(cls, problem: Any) -> str | None:
        if not isinstance(problem, Problem):
            return "has no model: mdp(x), regularizer(x) and objective(x, solution)"
        regularizer = regularizer_of(problem)
        if regularizer is not None and not regularizer.smooth:
            return f"has the regularizer {type(regularizer).__name__}, whose policy has no derivative"
        return None

    def start(self, x: Any) -> Any:
        return self.upper.start(self.problem, x)[0]


def solve_reports(solution: Solution, adjoint: LinearStats | None) -> dict[str, Report]:
    """Return the reports of the lower level and, if there is one, of the adjoint."""
    reports = {"lower level": Report(solution.result, solution.stats)}
    return reports if adjoint is None else reports | {"adjoint": Report(adjoint.result, adjoint)}
