"""The implicit function theorem at the solved lower level, or at an iterate of it."""

from typing import Any

import jax

from bilevel_jax.adjoint import LinearSolver, default_linear_solver
from bilevel_jax.errors import InputError
from bilevel_jax.hypergradient.error import error_bound
from bilevel_jax.hypergradient.lagrangian import Lagrangian, ReadOut
from bilevel_jax.hypergradient.problem import Problem, lower_level
from bilevel_jax.hypergradient.protocol import Hypergradient, Method
from bilevel_jax.solvers import Auto, Solution, Solver, read_out, solve
from bilevel_jax.validation import as_float, require_instance, require_setting


class Implicit(Method):
    """The hyper-gradient formula at the V that `solver` finds and the w that `adjoint` finds.

    Exact solvers make it exact. `Implicit(adjoint=Neumann(k))` truncates the series of the adjoint;
    `Implicit(ValueIteration(max_steps=10, centred=False), Descent())`, called again with the last
    `solution.value` and `adjoint` as starts, is the approximate implicit differentiation of M-SoBiRL.

    Args:
      solver: of the lower level; None is `Auto(tolerance)`.
      adjoint: linear solver of the adjoint; None chooses by the number of states, with the tolerance if it has one.
      tolerance: of the solvers that are not given: bound on |V - V*|_inf, and residual of the adjoint relative to
        |df/dV|. None asks both for working precision. `Hypergradient.error` says what it came to.

    Raises:
      InputError: an argument of another type, a tolerance below 0, or one beside two solvers that have theirs.
    """

    solver: Solver | None = None
    adjoint: LinearSolver | None = None
    tolerance: Any = None

    def __check_init__(self):
        require_instance("solver", self.solver, Solver | None)
        require_instance("adjoint", self.adjoint, LinearSolver | None)
        if self.tolerance is not None:
            require_setting("tolerance", self.tolerance, 0, "1e-6 to 1e-8 is usual; None is working precision")
            if self.solver is not None and self.adjoint is not None:
                raise InputError(
                    f"tolerance: {self.tolerance} goes to solvers that are not given, and both are; give it to them"
                )

    def estimate(self, problem, x, initial_value, initial_adjoint, with_error):
        mdp, regularizer = lower_level(problem, x)
        if initial_value is not None:
            initial_value = as_float("initial_value", initial_value, mdp.reward.dtype, mdp.reward.shape[:-1])
        if initial_adjoint is not None:
            initial_adjoint = as_float("initial_adjoint", initial_adjoint, mdp.reward.dtype, mdp.reward.shape[:-1])
        solver = Auto(self.tolerance) if self.solver is None else self.solver
        adjoint = default_linear_solver(mdp.num_states, self.tolerance) if self.adjoint is None else self.adjoint
        solution = solve(mdp, regularizer, solver=solver, adjoint=self.adjoint, initial_value=initial_value)

        def read(mdp, regularizer, value):
            return read_out(mdp, regularizer, value, solution.result, solution.stats)

        return implicit_gradient(problem, x, solution, adjoint, initial_adjoint, read, with_error)


def implicit_gradient(
    problem: Problem,
    x: Any,
    solution: Solution,
    adjoint: LinearSolver,
    guess: jax.Array | None,
    read: ReadOut,
    with_error: bool = False,
) -> Hypergradient:
    """The hyper-gradient formula at a given V[S] and pi[S, A], exact or not.

    With `read` giving the solution as a function of (mdp, regularizer, V) and T the Bellman operator:
      (I - discount P_pi)' w = df/dV,   grad = df/dx + w' dT(V; x)/dx   (V fixed in both).

    Args:
      solution: value and policy at which to linearize.
      adjoint: linear solver for w, from `guess` [S] (zeros if None).
    """
    here = Lagrangian(problem, x, read)
    paid = here.paid(solution.value)
    w, stats = here.solve_adjoint(adjoint, solution.policy, paid.of_value, guess)
    gradient = here.gradient(paid, solution.value, w)
    error = error_bound(problem, x, gradient, solution.value, w) if with_error else None
    return Hypergradient(paid.objective, gradient, solution, w, stats, error)
