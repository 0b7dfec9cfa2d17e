"""A bound on the error of a hyper-gradient: compare it with one that is computed at a better V and w."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from bilevel_jax.bilevel.problem import Problem
from bilevel_jax.core import rounding
from bilevel_jax.core.arrays import PerPair, PerState, Scalar
from bilevel_jax.core.batching import over_batch
from bilevel_jax.core.results import Result
from bilevel_jax.hypergradient.lagrangian import Lagrangian, scattered_signs
from bilevel_jax.linear import DIRECT_LIMIT, AdaptiveKrylov, LinearSolver, default_linear_solver, linear_solve
from bilevel_jax.linear.protocol import power_of_two
from bilevel_jax.mdp.bellman import discounted_operator, sizes_of
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import Regularizer
from bilevel_jax.solvers import Auto, Solution, solution_at, solve

# How many times closer to V* the better V is to be, where |V - V*| is at least |T V - V| / 2.
CLOSER = 100
# The correction of w is computed to one digit; the factor SAFETY allows for the rest of it.
DIGIT = 10
SAFETY = 2


def error_bound(
    problem: Problem, x: Any, gradient: Any, value: Float[Array, "*batch S"], adjoint: Float[Array, "*batch S"] | None
) -> Scalar:
    """Return a bound on |gradient - grad phi(x)|_2, to first order, for a gradient that was computed at V[S] and w[S].

    The lower level is solved further, until V is a hundred times closer to V*. The adjoint equation at the better V is
    solved for the correction of w, to one digit. Both are then moved by what rounding may have done to them, with
    either sign: where large numbers cancel in V or in df/dV, it may be much of what is left, and nothing else would
    tell. The bound is twice the distance between `gradient` and the gradient at these V and w, plus an allowance for
    the rounding of the sums that it is made of. If w is None, the whole adjoint is solved for, to its solver's own
    tolerance. The bound costs a few sweeps, two linear solves to one digit, one more evaluation of the gradient formula
    and one of f's gradient; three more of that where x moves a number that many states share, such as the discount. It
    is not differentiated.

    The bound is infinite where the further solve ended with MAX_ITERATIONS or NOT_FINITE. After PRECISION_LIMIT the V
    that was reached is used.
    """
    problem, x, gradient, value, adjoint = stop_gradient((problem, x, gradient, value, adjoint))

    def read(mdp, regularizer, value):
        return solution_at(mdp, regularizer, value, better.result, better.stats)

    here = Lagrangian(problem, x, read)
    mdp, regularizer = here.lower()
    left = jnp.min(jnp.max(jnp.abs(here.residual(value)), -1))
    better = solve(mdp, regularizer, solver=Auto(tolerance=left / (2 * CLOSER)), initial_value=value)
    # The error of the solution may be 1 / (1 - discount) times as large as the residual.
    rough = AdaptiveKrylov(tolerance=(1 - jnp.max(mdp.modulus)) / DIGIT)
    rough = default_linear_solver(mdp.num_states) if mdp.num_states <= DIRECT_LIMIT else rough
    moved = better.value + _left_by_rounding(mdp, regularizer, better, linear_solver=rough)
    policy = read(mdp, regularizer, moved).policy
    objective = here.objective_at(moved)
    rounded = rounding.of_right_hand_side(here.size_of_right_hand_side(moved))
    of_value = objective.of_value + scattered_signs(rounded) * rounded
    if adjoint is None:
        w, _ = here.solve_adjoint(default_linear_solver(mdp.num_states), policy, of_value, None)
    else:
        rest = here.adjoint_residual(policy, of_value, adjoint)
        w = adjoint + here.solve_adjoint(rough, policy, rest, None)[0]
    parts = here.parts(objective, moved, w)
    distance = _norm(jax.tree.map(jnp.subtract, gradient, parts.total()), value.dtype)
    scale = sum((_norm(part, value.dtype) for part in parts), start=jnp.zeros((), value.dtype))
    known = jnp.all((better.result == Result.CONVERGED) | (better.result == Result.PRECISION_LIMIT))
    spread = over_batch(lambda regularizer, q, value: regularizer.spread(q, value), value.ndim - 1)
    spread = spread(regularizer, better.q, better.value)
    relative = rounding.of_gradient(better.value, spread, _largest_logit(regularizer, better), mdp.modulus)
    return jnp.where(known, SAFETY * distance + scale * relative, jnp.inf)


@over_batch
def _left_by_rounding(
    mdp: MDP, regularizer: Regularizer, solution: Solution, *, linear_solver: LinearSolver
) -> PerState:
    """Return how far V[S] may be from V*, as rounding of each state's equation, of either sign, moves it."""
    sizes = sizes_of(mdp, regularizer, solution.value, solution.q, solution.value)
    each = rounding.of_backup(sizes.expected(), sizes.q, sizes.spread) + sizes.lost
    operator = discounted_operator(mdp, solution.policy)
    return linear_solve(linear_solver, operator, mdp.modulus, scattered_signs(each) * each, share=False)[0]


def _largest_logit(regularizer: Regularizer, solution: Solution) -> Scalar:
    """Return the size of the numbers whose differences, divided by the temperature, the policy is made of."""
    if not regularizer.smooth:
        return jnp.zeros((), solution.value.dtype)

    def below_best(regularizer: Regularizer, q: PerPair, policy: PerPair) -> PerState:
        return jnp.max(jnp.where(policy > 0, regularizer.highest(q)[..., None] - q, 0), -1)

    gap = over_batch(below_best, solution.value.ndim - 1)(regularizer, solution.q, solution.policy)
    size = jnp.maximum(jnp.max(jnp.abs(solution.value)), jnp.max(gap))
    least = rounding.full_precision(size.dtype)
    return jnp.maximum(size, least) / jnp.min(regularizer.temperature).astype(size.dtype)


def _norm(tree: Any, dtype: Any) -> Scalar:
    """The 2-norm over all leaves, which may have several dtypes."""
    leaves = [leaf.astype(dtype) for leaf in jax.tree.leaves(tree)]
    scale = power_of_two(*leaves)  # squares of numbers divided by it neither overflow nor underflow
    return scale * optax.tree.norm([leaf / scale for leaf in leaves])
