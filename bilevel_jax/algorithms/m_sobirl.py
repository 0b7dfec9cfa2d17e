"""M-SoBiRL: model-based bilevel RL with value and adjoint carried from iteration to iteration."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from bilevel_jax.adjoint import Descent, LinearSolver
from bilevel_jax.algorithms.protocol import ModelInfo, jit_step
from bilevel_jax.algorithms.upper import UpperLevel, as_upper_level, at_iteration
from bilevel_jax.bellman import greedy
from bilevel_jax.captures import jit
from bilevel_jax.hypergradient import Problem, implicit_gradient, lower_level, require_problem
from bilevel_jax.mdp import over_batch
from bilevel_jax.results import Result
from bilevel_jax.solvers import Solution, Solver, SolveStats, ValueIteration, read_out, solve
from bilevel_jax.validation import as_float, require_instance


class MSoBiRLState(eqx.Module):
    """What one iteration hands to the next.

    `x`: upper variable. `solution`: the lower level's iterate at x. `adjoint`: w[S], the iterate of
    (I - discount P_pi)' w = df/dV, with the sign and scale of `Hypergradient.adjoint`. `iteration`: how
    many were made.
    """

    x: Any
    solution: Solution
    adjoint: jax.Array
    optimizer_state: Any
    iteration: jax.Array


class MSoBiRL(eqx.Module):
    """See `m_sobirl`."""

    problem: Problem
    upper: UpperLevel = eqx.field(converter=as_upper_level)
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
        x, mdp, _ = self.upper.start(self.problem, x)
        pairs, states = mdp.reward.shape, mdp.reward.shape[:-1]
        starts = (("value", value, states), ("policy", policy, pairs), ("adjoint", adjoint, states))
        # As `step` returns them: a state of another type would compile it twice.
        given = {name: as_float(name, a, mdp.reward.dtype, shape) for name, a, shape in starts if a is not None}
        return _init(self, x, **given)

    def step(self, key: jax.Array, state: MSoBiRLState) -> tuple[MSoBiRLState, ModelInfo]:
        """One upper iteration: adjoint, hyper-gradient, x, then the lower level at the new x."""
        del key
        return _step(self, state)


def m_sobirl(
    problem: Problem,
    optimizer: optax.GradientTransformation | UpperLevel,
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
      optimizer: an optax transformation, or an `UpperLevel`. Build it once: a new one is a new structure. Its
        numbers are leaves of the state with `optax.inject_hyperparams`.
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


@jit
def _init(algorithm, x, value=None, policy=None, adjoint=None):
    start = jnp.asarray(0, jnp.int32)
    algorithm = at_iteration(algorithm, start)
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
    return MSoBiRLState(x, solution, w, algorithm.upper.init(x), start)


@jit_step
def _step(algorithm, state):
    problem, solution = at_iteration(algorithm, state.iteration).problem, state.solution

    def read(mdp, regularizer, value):
        # The carried policy, with the derivative that the paper's optimality relation gives it.
        q, _ = over_batch(greedy)(mdp, regularizer, value)
        policy = over_batch(_linearized_policy)(mdp, regularizer, solution.policy, q, value)
        return Solution(value, q, policy, solution.result, solution.stats)

    estimate = implicit_gradient(problem, state.x, solution, algorithm.adjoint, state.adjoint, read)
    x, optimizer_state, stationarity = algorithm.upper.update(
        estimate.gradient, state.optimizer_state, state.x, estimate.value
    )
    following = at_iteration(algorithm, state.iteration + 1).problem
    improved = solve(*lower_level(following, x), solver=algorithm.lower, initial_value=solution.value)
    info = ModelInfo(
        estimate.value,
        estimate.gradient,
        optax.tree.norm(estimate.gradient),
        stationarity,
        solution.result,
        solution.stats,
        estimate.stats,
    )
    return MSoBiRLState(x, improved, estimate.adjoint, optimizer_state, state.iteration + 1), info


def _linearized_policy(mdp, regularizer, policy, q, value):
    del mdp
    return regularizer.linearized_policy(policy, q, value)
