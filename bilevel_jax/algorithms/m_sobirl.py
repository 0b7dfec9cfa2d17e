"""M-SoBiRL: model-based bilevel RL with value and adjoint carried from iteration to iteration."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from bilevel_jax.adjoint import Descent, LinearSolver, LinearStats
from bilevel_jax.bellman import greedy
from bilevel_jax.hypergradient import Problem, as_upper_variable, implicit_gradient, lower_level, require_problem
from bilevel_jax.mdp import over_batch
from bilevel_jax.results import Outcome, Result
from bilevel_jax.solvers import Solution, Solver, SolveStats, ValueIteration, read_out, solve
from bilevel_jax.validation import as_float, require_instance


class MSoBiRLState(eqx.Module):
    """What one iteration hands to the next.

    `x`: upper variable. `solution`: the lower level's iterate at x. `adjoint`: w[S], the iterate of
    (I - discount P_pi)' w = df/dV, with the sign and scale of `Hypergradient.adjoint`.
    """

    x: Any
    solution: Solution
    adjoint: jax.Array
    optimizer_state: Any


class MSoBiRLInfo(eqx.Module):
    """What one iteration reports, all at the x it started from.

    `objective` f(x, pi); `gradient`, the estimate of the hyper-gradient, and its 2-norm; result and
    stats of the lower level and of the adjoint. An inexact lower level reports `MAX_STEPS`: as asked.
    """

    objective: jax.Array
    gradient: Any
    gradient_norm: jax.Array
    lower_result: jax.Array
    lower_stats: SolveStats
    adjoint_stats: LinearStats

    def outcomes(self) -> tuple[Outcome, ...]:
        return (
            Outcome("lower level", self.lower_result, self.lower_stats.error_bound),
            Outcome("adjoint", self.adjoint_stats.result, self.adjoint_stats.error_bound),
        )


class MSoBiRL(eqx.Module):
    """See `m_sobirl`."""

    problem: Problem
    optimizer: optax.GradientTransformation = eqx.field(static=True)
    lower: Solver
    adjoint: LinearSolver

    def init(
        self,
        key: jax.Array,
        x: Any,
        *,
        value: jax.Array | None = None,
        policy: jax.Array | None = None,
        adjoint: jax.Array | None = None,
    ) -> MSoBiRLState:
        """The state at x.

        Args:
          key: unused; every algorithm takes one.
          x: upper variable, a pytree of floats.
          value: V[S] to start from, taken as it is; None runs the lower level at x from zeros.
          policy: pi[S, A] to start from; None is the policy at V.
          adjoint: w[S] to start from; None is zeros.

        Raises:
          InputError: x is not floating point, or a start of another shape; outside jit, if the MDP or the
            regularizer at x is not valid.
        """
        del key
        x = as_upper_variable(x)
        mdp, _ = lower_level(self.problem, x)  # outside jit this looks at the values
        pairs, states = mdp.reward.shape, mdp.reward.shape[:-1]
        starts = (("value", value, states), ("policy", policy, pairs), ("adjoint", adjoint, states))
        # As `step` returns them: a state of another type would compile it twice.
        given = {name: as_float(name, a, mdp.reward.dtype, shape) for name, a, shape in starts if a is not None}
        return _init(self, x, **given)

    def step(self, key: jax.Array, state: MSoBiRLState) -> tuple[MSoBiRLState, MSoBiRLInfo]:
        """One upper iteration: adjoint, hyper-gradient, x, then the lower level at the new x."""
        del key
        return _step(self, state)


def m_sobirl(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    *,
    lower: Solver | None = None,
    adjoint: LinearSolver | None = None,
) -> MSoBiRL:
    """M-SoBiRL (Yang, Gao and Yuan, AISTATS 2025, Algorithm 1) for any `Problem`.

    An iteration takes the adjoint one step on, estimates the hyper-gradient at the current V, pi and
    w, updates x by the optimizer, and improves V by a few sweeps from where it stood. First-order
    information only; each iteration costs a few sweeps whatever the accuracy.

    Args:
      problem: a `Problem`; its numbers are leaves and may be changed or vmapped.
      optimizer: an optax transformation. Build it once: a new one is a new structure. Its numbers
        are leaves of the state with `optax.inject_hyperparams`.
      lower: None is `ValueIteration(max_steps=10, centred=False)`, warm-started. `PolicyIteration()` is exact.
      adjoint: None is `Descent(step_size=0.5, steps=1)`. `Direct()` or `GMRES()` is exact.

    Returns:
      An `Algorithm`: `init(key, x)`, `step(key, state)`, both compiled.

    Raises:
      InputError: an argument of another type.
    """
    require_problem(problem)
    require_instance("lower", lower, Solver | None)
    require_instance("adjoint", adjoint, LinearSolver | None)
    return MSoBiRL(
        problem,
        optimizer,
        ValueIteration(max_steps=10, centred=False) if lower is None else lower,
        Descent() if adjoint is None else adjoint,
    )


@jax.jit
def _init(algorithm, x, value=None, policy=None, adjoint=None):
    mdp, regularizer = lower_level(algorithm.problem, x)
    if value is None:
        solution = solve(mdp, regularizer, solver=algorithm.lower)
    else:
        unknown = jnp.full(mdp.batch_shape, jnp.inf, value.dtype)
        result = jnp.full(mdp.batch_shape, Result.MAX_STEPS, jnp.int32)
        stats = SolveStats(jnp.zeros_like(result), jnp.zeros_like(result), unknown, unknown, unknown)
        solution = read_out(mdp, regularizer, value, result, stats)
    if policy is not None:
        solution = eqx.tree_at(lambda s: s.policy, solution, policy)
    w = jnp.zeros_like(solution.value) if adjoint is None else adjoint
    return MSoBiRLState(x, solution, w, algorithm.optimizer.init(x))


@jax.jit
def _step(algorithm, state):
    problem, solution = algorithm.problem, state.solution

    def read(mdp, regularizer, value):
        # The carried policy, with the derivative that the paper's optimality relation gives it.
        q, _ = over_batch(greedy)(mdp, regularizer, value)
        policy = over_batch(_linearized_policy)(mdp, regularizer, solution.policy, q, value)
        return Solution(value, q, policy, solution.result, solution.stats)

    estimate = implicit_gradient(problem, state.x, solution, algorithm.adjoint, state.adjoint, read)
    updates, optimizer_state = algorithm.optimizer.update(estimate.gradient, state.optimizer_state, state.x)
    x = optax.apply_updates(state.x, updates)
    improved = solve(*lower_level(problem, x), solver=algorithm.lower, initial_value=solution.value)
    info = MSoBiRLInfo(
        estimate.value,
        estimate.gradient,
        optax.tree.norm(estimate.gradient),
        solution.result,
        solution.stats,
        estimate.stats,
    )
    return MSoBiRLState(x, improved, estimate.adjoint, optimizer_state), info


def _linearized_policy(mdp, regularizer, policy, q, value):
    del mdp
    return regularizer.linearized_policy(policy, q, value)
