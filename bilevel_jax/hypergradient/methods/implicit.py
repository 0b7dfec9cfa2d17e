"""The implicit function theorem at the solved lower level, or at an iterate of it."""

from typing import Any

from jaxtyping import Array, Float

from bilevel_jax.bilevel.problem import Problem, lower_level
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import as_float, require_instance, require_setting
from bilevel_jax.hypergradient.error import error_bound
from bilevel_jax.hypergradient.lagrangian import Lagrangian, SolutionAt
from bilevel_jax.hypergradient.protocol import Hypergradient, Method
from bilevel_jax.linear import LinearSolver, default_linear_solver
from bilevel_jax.solvers import Auto, Solution, Solver, solution_at, solve


class Implicit(Method):
    """The hyper-gradient formula at the V that `solver` finds and the w that `adjoint` finds.

    Exact solvers make it exact. `Implicit(adjoint=Neumann(k))` truncates the series of the adjoint.
    `Implicit(ValueIteration(max_iterations=10, centred=False), Descent())`, called again with the last
    `solution.value` and `adjoint` as starts, is the approximate implicit differentiation of M-SoBiRL.

    Args:
      solver: the solver of the lower level; None is `Auto(tolerance)`.
      adjoint: the linear solver of the adjoint; None chooses by the number of states, with the tolerance if there is
        one.
      tolerance: the tolerance of the solvers that are not given: the bound on |V - V*|_inf, and the residual of the
        adjoint relative to |df/dV|. None asks both for working precision. `Hypergradient.error` says how exact the
        gradient is.

    Raises:
      InputError: an argument of another type, a tolerance below 0, or a tolerance although both solvers are given.

    Example:
      >>> problem = bj.problems.make("garnet")
      >>> x = problem.start(jax.random.key(0))
      >>> truncated = bj.Implicit(adjoint=bj.Neumann(20))
      >>> bj.hypergradient(problem, x, method=truncated).gradient.shape
      (8, 3)
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
            return solution_at(mdp, regularizer, value, solution.result, solution.stats)

        return implicit_gradient(problem, x, solution, adjoint, initial_adjoint, read, with_error)


def implicit_gradient(
    problem: Problem,
    x: Any,
    solution: Solution,
    adjoint: LinearSolver,
    initial_adjoint: Float[Array, "*batch S"] | None,
    read: SolutionAt,
    with_error: bool = False,
) -> Hypergradient:
    """Return the hyper-gradient formula at a given V[S] and pi[S, A], exact or not.

    `read` gives the solution as a function of (mdp, regularizer, V), and T is the Bellman operator:
      (I - discount P_pi)' w = df/dV,   grad = df/dx + w' dT(V; x)/dx   (V fixed in both).

    Args:
      solution: value and policy at which to linearize.
      adjoint: linear solver for w, which starts from `initial_adjoint` [S] (zeros if None).

    Example:
      >>> problem = bj.problems.make("garnet")
      >>> x = problem.start(jax.random.key(0))
      >>> mdp, regularizer = problem.mdp(x), problem.regularizer(x)
      >>> solution = bj.solve(mdp, regularizer)
      >>> def read(mdp, regularizer, value):
      ...     return bj.solvers.solution_at(mdp, regularizer, value, solution.result, solution.stats)
      >>> from bilevel_jax.hypergradient import implicit_gradient
      >>> implicit_gradient(problem, x, solution, bj.Direct(), None, read).gradient.shape
      (8, 3)
    """
    here = Lagrangian(problem, x, read)
    objective = here.objective_at(solution.value)
    w, stats = here.solve_adjoint(adjoint, solution.policy, objective.of_value, initial_adjoint)
    gradient = here.gradient(objective, solution.value, w)
    error = error_bound(problem, x, gradient, solution.value, w) if with_error else None
    return Hypergradient(
        value=objective.value, gradient=gradient, solution=solution, adjoint=w, stats=stats, error=error
    )
