"""A bound on the error of a hyper-gradient: compare it with one that is computed at a better V and w."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from bilevel_jax.bilevel.problem import Problem
from bilevel_jax.core import rounding
from bilevel_jax.core.arrays import Scalar
from bilevel_jax.core.batching import over_batch
from bilevel_jax.core.results import Result
from bilevel_jax.hypergradient.lagrangian import Lagrangian
from bilevel_jax.linear import DIRECT_LIMIT, AdaptiveKrylov, default_linear_solver
from bilevel_jax.linear.protocol import power_of_two
from bilevel_jax.solvers import Auto, solution_at, solve

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
    solved for the correction of w, to one digit. The bound is twice the distance between `gradient` and the gradient at
    the better V and w, plus an allowance for the rounding of both. If w is None, the whole adjoint is solved for, to
    its solver's own tolerance. The bound costs a few sweeps and products, and one more evaluation of the gradient
    formula; three more of f and its gradient where x moves a number that many states share, such as the discount.
    It is not differentiated.

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
    objective = here.objective_at(better.value)
    if adjoint is None:
        w, _ = here.solve_adjoint(default_linear_solver(mdp.num_states), better.policy, objective.of_value, None)
    else:
        rest = here.adjoint_residual(better.policy, objective.of_value, adjoint)
        direct = mdp.num_states <= DIRECT_LIMIT
        # The error of the solution may be 1 / (1 - discount) times as large as the residual.
        rough = AdaptiveKrylov(tolerance=(1 - jnp.max(mdp.modulus)) / DIGIT)
        rough = default_linear_solver(mdp.num_states) if direct else rough
        w = adjoint + here.solve_adjoint(rough, better.policy, rest, None)[0]
    parts = here.parts(objective, better.value, w)
    distance = _norm(jax.tree.map(jnp.subtract, gradient, parts.total()), value.dtype)
    scale = sum((_norm(part, value.dtype) for part in parts), start=jnp.zeros((), value.dtype))
    known = jnp.all((better.result == Result.CONVERGED) | (better.result == Result.PRECISION_LIMIT))
    temperature = regularizer.temperature if regularizer.smooth else None
    spread = over_batch(lambda regularizer, q, value: regularizer.spread(q, value), value.ndim - 1)
    spread = spread(regularizer, better.q, better.value)
    relative = rounding.of_gradient(better.value, spread, temperature, mdp.modulus)
    return jnp.where(known, SAFETY * distance + scale * relative, jnp.inf)


def _norm(tree: Any, dtype: Any) -> Scalar:
    """The 2-norm over all leaves, which may have several dtypes."""
    leaves = [leaf.astype(dtype) for leaf in jax.tree.leaves(tree)]
    scale = power_of_two(*leaves)  # squares of numbers divided by it neither overflow nor underflow
    return scale * optax.tree.norm([leaf / scale for leaf in leaves])
