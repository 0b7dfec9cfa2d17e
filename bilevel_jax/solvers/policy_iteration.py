"""Soft policy iteration: Newton's method on V = T V."""

from typing import Any

from bilevel_jax.adjoint import LinearSolver, default_linear_solver, linear_solve
from bilevel_jax.solvers.evaluation import improve, policy_operator
from bilevel_jax.solvers.loop import Stepper
from bilevel_jax.validation import require_instance


class PolicyIteration(Stepper):
    """V <- V + (I - discount P_pi)^-1 (T V - V), pi the policy at V. Quadratic near V*.

    With an exact linear solver this is policy iteration with regularized evaluation; the form above
    adds a small correction to V instead of computing V anew, so it keeps its digits.

    Args:
      tolerance: bound on |value - V*|_inf; None asks for working precision.
      max_steps: sweeps at most, each but the first with one linear solve.
      linear_solver: None chooses by the number of states, see `default_linear_solver`.

    Raises:
      InputError: tolerance below 0 or max_steps below 1, or no `LinearSolver`.
    """

    tolerance: Any = None
    max_steps: Any = 1000
    linear_solver: LinearSolver | None = None

    def __check_init__(self):
        require_instance("linear_solver", self.linear_solver, LinearSolver | None)

    def keep(self, mdp, regularizer, q):
        del mdp
        return improve(regularizer, q)

    def step(self, mdp, swept, state):
        solver = default_linear_solver(mdp.num_states) if self.linear_solver is None else self.linear_solver
        operator = policy_operator(mdp, swept.kept)
        correction, stats = linear_solve(solver, operator, mdp.modulus, swept.gap, share=False)
        return swept.value + correction, state, stats.steps
