"""PBRL: penalty-based bilevel RL, upper variable and policy descending on one function."""

from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax

from bilevel_jax.algorithms.protocol import ModelInfo, jit_step
from bilevel_jax.algorithms.upper import UpperLevel, as_upper_level, at_iteration
from bilevel_jax.bellman import action_values
from bilevel_jax.captures import jit
from bilevel_jax.errors import InputError
from bilevel_jax.hypergradient import Problem, lower_level, require_problem
from bilevel_jax.mdp import MDP, over_batch
from bilevel_jax.occupancy import occupancy, regularized_policy_value
from bilevel_jax.regularizers import Regularizer
from bilevel_jax.solvers import PolicyIteration, Solution, Solver, solve
from bilevel_jax.validation import as_float, as_size, require_instance, require_positive

Penalty = Literal["value", "bellman"]


class PBRLState(eqx.Module):
    """What one iteration hands to the next.

    `x`: upper variable. `inner`: the lower level's own iterate. `dual`: the penalized policy's parameter
    y[S, A], the policy being grad Omega*(y): softmax(y / temperature) for the Shannon entropy. `iteration`:
    how many were made.
    """

    x: Any
    inner: Solution
    dual: jax.Array
    optimizer_state: Any
    iteration: jax.Array


class PBRLInfo(ModelInfo):
    """`ModelInfo` of the penalized policy: `objective` is f(x, pi), and `gradient` that of f + weight * penalty in x.

    `penalty`: how far pi is from optimal, at least 0 up to the inner policy's own distance.
    """

    penalty: jax.Array


class PBRL(eqx.Module):
    """See `pbrl`."""

    problem: Problem
    upper: UpperLevel = eqx.field(converter=as_upper_level)
    weight: jax.Array
    rate: jax.Array
    lower: Solver
    penalty: Penalty = eqx.field(static=True)
    steps: int = eqx.field(static=True)

    def init(self, key: jax.Array, x: Any) -> PBRLState:
        """The state at x (projected): both policies as the lower solver finds them from V = 0. The key is not used.

        Raises:
          InputError: x is not floating point; a regularizer that is not smooth; outside jit, if the MDP or the
            regularizer at x is not valid.
        """
        del key
        x, _, regularizer = self.upper.start(self.problem, x)
        if not regularizer.smooth:
            raise InputError(
                f"regularizer: pbrl needs a policy with a derivative, that of {type(regularizer).__name__} is "
                f"piecewise constant; use ShannonEntropy(temperature) with a small temperature"
            )
        return _init(self, x)

    def step(self, key: jax.Array, state: PBRLState) -> tuple[PBRLState, PBRLInfo]:
        """One upper iteration: the inner policy at x, the penalized policy's steps, the gradient in x, and x."""
        del key
        return _step(self, state)


def pbrl(
    problem: Problem,
    optimizer: optax.GradientTransformation | UpperLevel,
    *,
    penalty: Penalty = "value",
    weight: Any = 100.0,
    steps: int = 1,
    rate: Any = 1.0,
    lower: Solver | None = None,
) -> PBRL:
    """Penalty-based bilevel RL (Shen, Yang and Chen, ICML 2024, arXiv 2402.06886) for any smooth `Problem`.

    x and a policy of their own descend on F(x, pi) = f(x, pi) + weight * p(x, pi). f takes the value and
    the action values that pi has, whatever pi is. The penalties of the paper, with rho uniform over the states:

      value:    p = rho' (V* - V^pi),
      bellman:  p = sum_s rho[s] (V*[s] - <pi[s, :], Q*[s, :]> + Omega(pi[s, :])),

    both at least 0, and 0 exactly at pi*. Neither needs the derivative of pi*: dV* is that of the value of
    the inner policy, held fixed (the envelope theorem), and V^pi is a policy's own value. The gradient in x at
    the pi that minimizes F differs from the hyper-gradient by O(1 / weight).

    The inner policy is the paper's oracle. The penalized policy's step is mirror descent, preconditioned by the
    discounted visits d of rho (value) or by rho (bellman):

      y <- (1 - rate) y + rate (Q - (df/dpi) / (weight d)),   pi = grad Omega*(y),

    with Q = Q^pi (value) or Q* (bellman). At rate 1 and without f it is policy iteration, so that one
    step follows x; f's part is a fixed-point iteration, which converges where weight * temperature * d is
    above f's curvature in pi (else lower `rate`). An error of either policy counts weight times in the
    gradient: where x moves far at once, 3 steps follow it and 1 does not.

    From the paper: the penalties, their gradients, and descent in x and policy on f + weight * p beside an
    oracle. Ours: the policy's parameter and its preconditioned step, rho, that x moves after the policies
    instead of at once, any optimizer of x, any smooth regularizer, f of value and action values too. No
    equations are cited: neither the authors' code nor the paper's full text was at hand.

    Args:
      problem: a `Problem` with a smooth regularizer; its numbers are leaves.
      optimizer: of x, an optax transformation or an `UpperLevel`. Build it once.
      penalty: "value" or "bellman" (static).
      weight: above 0. The larger, the smaller the bias, and the smaller x's stable steps.
      steps: of the penalized policy an iteration (static).
      rate: its step size, in (0, 1].
      lower: of the inner policy, warm-started; None is `PolicyIteration()`, exact.

    Returns:
      An `Algorithm`: `init(key, x)`, `step(key, state)`, both compiled.

    Raises:
      InputError: an argument of another type or out of its range.
    """
    require_problem(problem)
    require_instance("lower", lower, Solver | None)
    if penalty not in get_args(Penalty):
        raise InputError(f"penalty: expected 'value' or 'bellman', got {penalty!r}")
    steps = as_size("steps", steps)
    weight, rate = as_float("weight", weight, float), as_float("rate", rate, float)
    require_positive("weight", weight, "100 is usual")
    require_positive("rate", rate, "1 is usual")
    lower = PolicyIteration() if lower is None else lower
    return PBRL(problem, optimizer, weight, rate, lower, penalty, steps)


@jit
def _init(algorithm, x):
    start = jnp.asarray(0, jnp.int32)
    x = jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), x)  # as `step` returns it
    problem = at_iteration(algorithm, start).problem
    inner = solve(*lower_level(problem, x), solver=algorithm.lower)
    return PBRLState(x, inner, inner.q, algorithm.upper.init(x), start)


@jit_step
def _step(algorithm, state):
    problem = at_iteration(algorithm, state.iteration).problem
    mdp, regularizer = lower_level(problem, state.x)
    inner = solve(mdp, regularizer, solver=algorithm.lower, initial_value=state.inner.value)
    weight = algorithm.weight.astype(mdp.reward.dtype)

    def total(x, policy):
        mdp, regularizer = lower_level(problem, x)
        value = regularized_policy_value(mdp, regularizer, policy)
        q = over_batch(_action_values)(mdp, regularizer, value)
        objective = problem.objective(x, Solution(value, q, policy, inner.result, inner.stats))
        penalty = _penalty(algorithm.penalty, mdp, regularizer, value, policy, inner.policy)
        return objective + weight * penalty, (objective, penalty)

    def descend(dual, _):
        policy = over_batch(_policy)(mdp, regularizer, dual)
        slope = jax.grad(total, 1, has_aux=True)(state.x, policy)[0]
        own = jax.grad(lambda p: jnp.sum(over_batch(_omega)(mdp, regularizer, p)))(policy)
        # -slope / (weight d) is Q less Omega's derivative, and f's part.
        target = own - slope / (weight * _visits(algorithm.penalty, mdp, policy)[..., None])
        rate = algorithm.rate.astype(dual.dtype)
        moved = (1 - rate) * dual + rate * target
        return moved if mdp.available is None else jnp.where(mdp.available, moved, -jnp.inf), None

    dual, _ = lax.scan(descend, state.dual, length=algorithm.steps)
    policy = over_batch(_policy)(mdp, regularizer, dual)
    gradient, (objective, penalty) = jax.grad(total, has_aux=True)(state.x, policy)
    x, optimizer_state, stationarity = algorithm.upper.update(
        gradient, state.optimizer_state, state.x, objective + weight * penalty
    )
    info = PBRLInfo(
        objective,
        gradient,
        optax.tree.norm(gradient),
        stationarity,
        inner.result,
        inner.stats,
        adjoint_stats=None,
        penalty=penalty,
    )
    return PBRLState(x, inner, dual, optimizer_state, state.iteration + 1), info


def _penalty(
    kind: Penalty, mdp: MDP, regularizer: Regularizer, value: jax.Array, policy: jax.Array, optimal: jax.Array
) -> jax.Array:
    """p, [] (summed over batch axes), of a policy[S, A] with this value[S]; `optimal` is the inner policy."""
    best = regularized_policy_value(mdp, regularizer, optimal)
    if kind == "bellman":
        q = over_batch(_action_values)(mdp, regularizer, best)
        q = q if mdp.available is None else jnp.where(mdp.available, q, 0)
        value = jnp.sum(policy * q, -1) - over_batch(_omega)(mdp, regularizer, policy)
    return jnp.sum(best - value) / mdp.num_states


def _visits(kind: Penalty, mdp: MDP, policy: jax.Array) -> jax.Array:
    """What the penalty weighs a state's policy by, [S]."""
    uniform = jnp.full_like(mdp.initial, 1 / mdp.num_states)
    return uniform if kind == "bellman" else jnp.sum(occupancy(mdp.replace(initial=uniform), policy), -1)


def _action_values(mdp, regularizer, value):
    del regularizer
    return action_values(mdp, value)


def _policy(mdp, regularizer, dual):
    del mdp
    return regularizer.policy(dual)


def _omega(mdp, regularizer, policy):
    del mdp
    return regularizer.penalty(policy)
