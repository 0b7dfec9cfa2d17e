"""PBRL: penalty-based bilevel RL. The upper variable and a policy descend on one function."""

from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from bilevel_jax.algorithms import cost
from bilevel_jax.algorithms.base import Estimate, Report
from bilevel_jax.algorithms.model.base import ModelAlgorithm
from bilevel_jax.algorithms.registry import register_algorithm
from bilevel_jax.algorithms.upper import UpperLevel, as_upper_level
from bilevel_jax.bilevel import Problem, lower_level, require_problem
from bilevel_jax.core.batching import over_batch
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import as_float, as_size, require_instance, require_positive
from bilevel_jax.linear import Direct, default_linear_solver
from bilevel_jax.mdp.bellman import action_values
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import Regularizer
from bilevel_jax.solvers import PolicyIteration, Solution, Solver, solve
from bilevel_jax.solvers.occupancy import occupancy
from bilevel_jax.solvers.policy_value import regularized_policy_value

Penalty = Literal["value", "bellman"]


class Policies(eqx.Module):
    """`inner` is the lower level's own iterate.

    `dual` y is the parameter of the penalized policy grad Omega*(y), which is softmax(y / temperature) for the
    Shannon entropy.
    """

    inner: Solution
    dual: Float[Array, "*batch S A"]


class PBRL(ModelAlgorithm):
    """See `pbrl`. Its memory is `Policies`. At the start, the lower solver finds both policies, from V = 0.

    In its info, `objective` is f(x, pi) of the penalized policy pi, `gradient` is the gradient of f + weight * penalty
    in x, and `reports["penalty"]` is the penalty: how far pi is from optimal. It is at least 0, up to the error of the
    inner policy.
    """

    problem: Problem
    upper: UpperLevel = eqx.field(converter=as_upper_level)
    weight: Float[Array, ""]
    policy_step_size: Float[Array, ""]
    solver: Solver
    penalty: Penalty = eqx.field(static=True)
    policy_updates: int = eqx.field(static=True)

    def start(self, x):
        """Return x as every algorithm does. Raises InputError also where the regularizer is not smooth."""
        x, _, regularizer = self.upper.start(self.problem, x)
        if not regularizer.smooth:
            raise InputError(
                f"regularizer: pbrl needs a policy with a derivative, that of {type(regularizer).__name__} is "
                f"piecewise constant; use ShannonEntropy(temperature) with a small temperature"
            )
        return x

    def init_memory(self, key, x):
        del key
        inner = solve(*lower_level(self.problem, x), solver=self.solver)
        return Policies(inner, inner.q)

    def estimate(self, key, state):
        del key
        problem, before = self.problem, state.memory
        mdp, regularizer = lower_level(problem, state.x)
        inner = solve(mdp, regularizer, solver=self.solver, initial_value=before.inner.value)
        weight = self.weight.astype(mdp.reward.dtype)
        depth = len(mdp.batch_shape)

        def total(x, policy):
            mdp, regularizer = lower_level(problem, x)
            value = regularized_policy_value(mdp, regularizer, policy)
            q = over_batch(action_values)(mdp, value)
            objective = problem.objective(
                x, Solution(value=value, q=q, policy=policy, result=inner.result, stats=inner.stats)
            )
            penalty = _penalty(self.penalty, mdp, regularizer, value, policy, inner.policy)
            return objective + weight * penalty, (objective, penalty)

        def descend(dual, _):
            policy = over_batch(_policy, depth)(regularizer, dual)
            slope = jax.grad(total, 1, has_aux=True)(state.x, policy)[0]
            own = jax.grad(lambda p: jnp.sum(over_batch(_omega, depth)(regularizer, p)))(policy)
            # -slope / (weight d) is Q less Omega's derivative, and f's part.
            target = own - slope / (weight * _visits(self.penalty, mdp, policy)[..., None])
            rate = self.policy_step_size.astype(dual.dtype)
            moved = (1 - rate) * dual + rate * target
            return moved if mdp.available is None else jnp.where(mdp.available, moved, -jnp.inf), None

        dual, _ = lax.scan(descend, before.dual, length=self.policy_updates)
        policy = over_batch(_policy, depth)(regularizer, dual)
        gradient, (objective, penalty) = jax.grad(total, has_aux=True)(state.x, policy)
        return Estimate(
            objective=objective,
            gradient=gradient,
            memory=Policies(inner, dual),
            transitions=self._transitions(mdp, inner),
            reports={"lower level": Report(inner.result, inner.stats), "penalty": penalty},
            value=objective + weight * penalty,
        )

    def _transitions(self, mdp: MDP, inner: Solution) -> Float[Array, ""]:
        """Return the cost of the inner policy's solve and of the evaluations of policies.

        A step of the penalized policy evaluates it and the inner policy. Where the penalty is the one of values, it
        also computes the policy's visits. The gradient in x evaluates both policies once more. The solve of an
        evaluation is not reported: it counts as a factorization where that is the default, and else as the number of
        products that the inner solve made.
        """
        evaluations = self.policy_updates * (3 if self.penalty == "value" else 2) + 2
        contexts = mdp.reward.size // cost.pairs(mdp)
        direct = isinstance(default_linear_solver(mdp.num_states), Direct)
        each = contexts * cost.factorization_sweeps(mdp) if direct else cost.total(inner.stats.products)
        return (cost.solve_sweeps(self.solver, mdp, inner.stats) + evaluations * each) * cost.pairs(mdp)


def pbrl(
    problem: Problem,
    optimizer: optax.GradientTransformation | UpperLevel,
    *,
    penalty: Penalty = "value",
    weight: Any = 100.0,
    policy_updates: int = 1,
    policy_step_size: Any = 1.0,
    solver: Solver | None = None,
) -> PBRL:
    """Penalty-based bilevel RL (Shen, Yang and Chen, ICML 2024, arXiv 2402.06886) for any smooth `Problem`.

    x and a policy pi descend together on F(x, pi) = f(x, pi) + weight * p(x, pi). pi need not be optimal, and f takes
    the value and the action values of pi. The penalties p of the paper, with rho uniform over the states, are

      value:    p = rho' (V* - V^pi),
      bellman:  p = sum_s rho[s] (V*[s] - <pi[s, :], Q*[s, :]> + Omega(pi[s, :])),

    Both are at least 0, and 0 exactly at pi*. Neither needs the derivative of pi*. The derivative of V* is that of the
    inner policy's value with this policy held fixed (the envelope theorem), and V^pi is the value of a given policy. At
    the pi that minimizes F, the gradient in x differs from the hyper-gradient by O(1 / weight).

    The inner policy plays the part of the paper's oracle. The penalized policy makes steps of mirror descent,
    preconditioned by the discounted visits d from rho (value) or by d = rho (bellman):

      y <- (1 - rate) y + rate (Q - (df/dpi) / (weight d)),   pi = grad Omega*(y),

    with Q = Q^pi (value) or Q* (bellman). Without f and at rate 1 this is policy iteration, so that one step is enough
    to follow x. The term of f makes it a fixed-point iteration. It converges where weight * temperature * d is larger
    than the curvature of f in pi; elsewhere lower `policy_step_size`. The gradient contains the error of either policy
    multiplied by `weight`: where x moves far in one iteration, 3 steps follow it and 1 does not.

    From the paper: the penalties, their gradients, and the descent in x and policy on f + weight * p, given an oracle.
    Ours: the policy's parameter and its preconditioned step; rho; x moves after the policies instead of at the same
    time; any optimizer of x; any smooth regularizer; an f that depends on value and action values, too. No equations
    are cited, because neither the authors' code nor the paper's full text was available.

    Args:
      problem: a `Problem` with a smooth regularizer; its numbers are leaves.
      optimizer: the optimizer of x, an optax transformation or an `UpperLevel`. Build it once.
      penalty: "value" or "bellman" (static).
      weight: above 0. A larger weight means a smaller bias, and smaller stable steps of x.
      policy_updates: the number of steps of the penalized policy per iteration (static).
      policy_step_size: the `rate` of these steps, in (0, 1].
      solver: the solver of the inner policy, warm-started; None is `PolicyIteration()`, exact.

    Returns:
      An `Algorithm`: `init(key, x)`, `step(key, state)`, both compiled.

    Raises:
      InputError: an argument of another type or out of its range.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> algorithm = bj.algorithms.pbrl(problem, optax.adam(0.01))
      >>> state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
      >>> state, info = algorithm.step(jax.random.key(2), state)
      >>> state.x.shape, info.objective.shape
      ((8, 3), ())
    """
    require_problem(problem)
    require_instance("solver", solver, Solver | None)
    if penalty not in get_args(Penalty):
        raise InputError(f"penalty: expected 'value' or 'bellman', got {penalty!r}")
    policy_updates = as_size("policy_updates", policy_updates)
    weight = as_float("weight", weight, float)
    policy_step_size = as_float("policy_step_size", policy_step_size, float)
    require_positive("weight", weight, "100 is usual")
    require_positive("policy_step_size", policy_step_size, "1 is usual")
    solver = PolicyIteration() if solver is None else solver
    return PBRL(problem, optimizer, weight, policy_step_size, solver, penalty, policy_updates)


def _penalty(
    kind: Penalty,
    mdp: MDP,
    regularizer: Regularizer,
    value: Float[Array, "*batch S"],
    policy: Float[Array, "*batch S A"],
    optimal: Float[Array, "*batch S A"],
) -> Float[Array, ""]:
    """p (summed over batch axes) of a policy with this value; `optimal` is the inner policy."""
    best = regularized_policy_value(mdp, regularizer, optimal)
    if kind == "bellman":
        q = over_batch(action_values)(mdp, best)
        q = q if mdp.available is None else jnp.where(mdp.available, q, 0)
        value = jnp.sum(policy * q, -1) - over_batch(_omega, len(mdp.batch_shape))(regularizer, policy)
    return jnp.sum(best - value) / mdp.num_states


def _visits(kind: Penalty, mdp: MDP, policy: Float[Array, "*batch S A"]) -> Float[Array, "*batch S"]:
    """Return the weight that the penalty gives to the policy in each state."""
    uniform = jnp.full_like(mdp.initial, 1 / mdp.num_states)
    return uniform if kind == "bellman" else jnp.sum(occupancy(mdp.replace(initial=uniform), policy), -1)


def _policy(regularizer, dual):
    return regularizer.policy(dual)


def _omega(regularizer, policy):
    return regularizer.penalty(policy)


register_algorithm("pbrl", pbrl)
