"""Soft policy iteration: Newton's method on V = T V."""

from typing import Any

from bilevel_jax.core.validation import require_instance
from bilevel_jax.linear import LinearSolver, default_linear_solver, linear_solve
from bilevel_jax.solvers.evaluation import improve, policy_operator
from bilevel_jax.solvers.loop import Stepper


class PolicyIteration(Stepper):
    """V <- V + (I - discount P_pi)^-1 (T V - V), where pi is the policy at V. It converges quadratically near V*.

    With an exact linear solver this is policy iteration with regularized evaluation. The form above adds a small
    correction to V instead of computing V again, so that it keeps V's digits.

    Args:
      tolerance: bound on |value - V*|_inf; None asks for working precision.
      max_iterations: the largest number of sweeps; each but the first has one linear solve.
      linear_solver: None chooses by the number of states, see `default_linear_solver`.

    Raises:
      InputError: tolerance below 0 or max_iterations below 1, or no `LinearSolver`.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> solution = bj.solve(mdp, bj.ShannonEntropy(0.1), solver=bj.PolicyIteration())
      >>> bj.check(solution).value.shape
      (2,)
    """

    tolerance: Any = None
    max_iterations: Any = 1000
    linear_solver: LinearSolver | None = None

    def __check_init__(self):
        require_instance("linear_solver", self.linear_solver, LinearSolver | None)

    def keep(self, mdp, regularizer, q):
        del mdp
        return improve(regularizer, q)

    def step(self, mdp, swept, state):
        solver = default_linear_solver(mdp.num_states) if self.linear_solver is None else self.linear_solver
        operator = policy_operator(mdp, swept.of_q)
        correction, stats = linear_solve(solver, operator, mdp.modulus, swept.gap, share=False)
        return swept.value + correction, state, stats.products
