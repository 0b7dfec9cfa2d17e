"""M-SoBiRL: model-based bilevel RL that carries value and adjoint from iteration to iteration."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

from bilevel_jax.algorithms import cost
from bilevel_jax.algorithms.base import Estimate, State, initial_state
from bilevel_jax.algorithms.model.base import ModelAlgorithm, solve_reports
from bilevel_jax.algorithms.registry import register_algorithm
from bilevel_jax.algorithms.upper import UpperLevel, as_upper_level
from bilevel_jax.bilevel import Problem, lower_level, require_problem
from bilevel_jax.core.batching import over_batch
from bilevel_jax.core.results import Result
from bilevel_jax.core.validation import as_float, require_instance
from bilevel_jax.hypergradient import implicit_gradient
from bilevel_jax.linear import Descent, LinearSolver
from bilevel_jax.mdp.bellman import greedy
from bilevel_jax.solvers import Solution, Solver, SolveStats, ValueIteration, solution_at, solve


class Iterate(eqx.Module):
    """`solution` is the lower level's iterate at x.

    `adjoint` w is the iterate of (I - discount P_pi)' w = df/dV, with the sign and scale of `Hypergradient.adjoint`.
    """

    solution: Solution
    adjoint: Float[Array, "*batch S"]


class MSoBiRL(ModelAlgorithm):
    """See `m_sobirl`. Its memory is an `Iterate`."""

    problem: Problem
    upper: UpperLevel = eqx.field(converter=as_upper_level)
    solver: Solver
    adjoint: LinearSolver

    def init(
        self,
        key: PRNGKeyArray,
        x: Any,
        *,
        initial_value: Real[ArrayLike, "*batch S"] | Any | None = None,
        initial_policy: Real[ArrayLike, "*batch S A"] | Any | None = None,
        initial_adjoint: Real[ArrayLike, "*batch S"] | Any | None = None,
    ) -> State:
        """The state at x.

        Args:
          key: unused; every algorithm takes one.
          x: upper variable, a pytree of floats.
          initial_value: V to start from, taken as it is; None runs the lower level at x from zeros.
          initial_policy: pi to start from; None is the policy at V.
          initial_adjoint: w to start from; None is zeros.

        Raises:
          InputError: x is not floating point, or a start of another shape; outside jit, if the MDP or the
            regularizer at x is not valid.
        """
        x, mdp, _ = self.upper.start(self.problem, x)
        pairs, states = mdp.reward.shape, mdp.reward.shape[:-1]
        starts = (
            ("initial_value", initial_value, states),
            ("initial_policy", initial_policy, pairs),
            ("initial_adjoint", initial_adjoint, states),
        )
        # As `step` returns them: a state of another type would compile it twice.
        given = {name: as_float(name, a, mdp.reward.dtype, shape) for name, a, shape in starts if a is not None}
        return initial_state(self, key, x, given)

    def init_memory(self, key, x, initial_value=None, initial_policy=None, initial_adjoint=None):
        del key
        mdp, regularizer = lower_level(self.problem, x)
        if initial_value is None:
            solution = solve(mdp, regularizer, solver=self.solver)
        else:
            unknown = jnp.full(mdp.batch_shape, jnp.inf, initial_value.dtype)
            result = jnp.full(mdp.batch_shape, Result.MAX_ITERATIONS, jnp.int32)
            stats = SolveStats(
                iterations=jnp.zeros_like(result),
                products=jnp.zeros_like(result),
                residual=unknown,
                error_bound=unknown,
                suboptimality=unknown,
            )
            solution = solution_at(mdp, regularizer, initial_value, result, stats)
        if initial_policy is not None:
            solution = eqx.tree_at(lambda s: s.policy, solution, initial_policy)
        return Iterate(solution, jnp.zeros_like(solution.value) if initial_adjoint is None else initial_adjoint)

    def estimate(self, key, state):
        del key
        solution = state.memory.solution

        def read(mdp, regularizer, value):
            # The carried policy, with the derivative that the paper's optimality relation gives it.
            q, _ = over_batch(greedy)(mdp, regularizer, value)
            policy = over_batch(_linearized_policy, len(mdp.batch_shape))(regularizer, solution.policy, q, value)
            return Solution(value=value, q=q, policy=policy, result=solution.result, stats=solution.stats)

        made = implicit_gradient(self.problem, state.x, solution, self.adjoint, state.memory.adjoint, read)
        mdp, _ = lower_level(self.problem, state.x)
        sweeps = cost.solve_sweeps(self.solver, mdp, solution.stats) + 1
        return Estimate(
            objective=made.value,
            gradient=made.gradient,
            memory=Iterate(solution, made.adjoint),
            transitions=(sweeps + cost.linear_sweeps(self.adjoint, mdp, made.stats)) * cost.pairs(mdp),
            reports=solve_reports(solution, made.stats),
        )

    def after_update(self, memory, x):
        """The lower level, improved at the new x."""
        value = memory.solution.value
        improved = solve(*lower_level(self.problem, x), solver=self.solver, initial_value=value)
        return Iterate(improved, memory.adjoint)


def m_sobirl(
    problem: Problem,
    optimizer: optax.GradientTransformation | UpperLevel,
    *,
    solver: Solver | None = None,
    adjoint: LinearSolver | None = None,
) -> MSoBiRL:
    """M-SoBiRL (Yang, Gao and Yuan, AISTATS 2025, Algorithm 1) for any `Problem`.

    An iteration makes one step on the adjoint, estimates the hyper-gradient at the current V, pi and w, updates x by
    the optimizer, and improves V by a few sweeps, starting from the last V. It uses only first-order information. Each
    iteration costs a few sweeps, whatever the accuracy.

    Args:
      problem: a `Problem`; its numbers are leaves and may be changed or vmapped.
      optimizer: an optax transformation, or an `UpperLevel`. Build it once: a new one is a new structure. Its
        numbers are leaves of the state with `optax.inject_hyperparams`.
      solver: the solver of the lower level; None is `ValueIteration(max_iterations=10, centred=False)`, warm-started.
        `PolicyIteration()` is exact.
      adjoint: None is `Descent(step_size=0.5, iterations=1)`. `Direct()` or `GMRES()` is exact.

    Returns:
      An `Algorithm`: `init(key, x)`, `step(key, state)`, both compiled.

    Raises:
      InputError: an argument of another type.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> algorithm = bj.algorithms.m_sobirl(problem, optax.adam(0.1))
      >>> state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
      >>> state, info = algorithm.step(jax.random.key(2), state)
      >>> state.x.shape, info.objective.shape
      ((8, 3), ())
    """
    require_problem(problem)
    require_instance("solver", solver, Solver | None)
    require_instance("adjoint", adjoint, LinearSolver | None)
    return MSoBiRL(
        problem,
        optimizer,
        ValueIteration(max_iterations=10, centred=False) if solver is None else solver,
        Descent() if adjoint is None else adjoint,
    )


def _linearized_policy(regularizer, policy, q, value):
    return regularizer.linearized_policy(policy, q, value)


register_algorithm("m_sobirl", m_sobirl)
