"""How far a gradient is from the hyper-gradient, by comparison with one from a better V and w."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient

from bilevel_jax import rounding
from bilevel_jax.adjoint import DIRECT_LIMIT, AdaptiveKrylov, default_linear_solver
from bilevel_jax.hypergradient.lagrangian import Lagrangian
from bilevel_jax.hypergradient.problem import Problem
from bilevel_jax.results import Result
from bilevel_jax.solvers import Auto, read_out, solve

# The better V is to be so many times closer to V*: |V - V*| >= |T V - V| / 2.
CLOSER = 100
# The correction of w is found to one digit, which the factor 2 leaves room for.
DIGIT = 10
SAFETY = 2


def error_bound(problem: Problem, x: Any, gradient: Any, value: jax.Array, adjoint: jax.Array | None) -> jax.Array:
    """A bound on |gradient - grad phi(x)|_2, to first order, of a gradient that came with V[S] and w[S].

    V is taken on until it is a hundred times closer to V*, the adjoint equation there is solved for what
    w lacks to one digit, and `gradient` is compared with the one of the two: twice their distance, and
    what rounding may do to either. Without w (None) it is solved for as a whole, to its solver's own tolerance.
    Costs a few sweeps and products, and one more evaluation of the gradient formula. Not differentiated.

    inf where that solve ended with MAX_STEPS or NOT_FINITE. After PRECISION_LIMIT the V that was reached is used.
    """
    problem, x, gradient, value, adjoint = stop_gradient((problem, x, gradient, value, adjoint))

    def read(mdp, regularizer, value):
        return read_out(mdp, regularizer, value, better.result, better.stats)

    here = Lagrangian(problem, x, read)
    mdp, regularizer = here.lower()
    left = jnp.min(jnp.max(jnp.abs(here.residual(value)), -1))
    better = solve(mdp, regularizer, solver=Auto(tolerance=left / (2 * CLOSER)), initial_value=value)
    paid = here.paid(better.value)
    if adjoint is None:
        w, _ = here.solve_adjoint(default_linear_solver(mdp.num_states), better.policy, paid.of_value, None)
    else:
        rest = here.adjoint_residual(better.policy, paid.of_value, adjoint)
        direct = mdp.num_states <= DIRECT_LIMIT
        # A residual may hide (1 - discount)^-1 of itself in the solution.
        rough = AdaptiveKrylov(tolerance=(1 - jnp.max(mdp.modulus)) / DIGIT)
        rough = default_linear_solver(mdp.num_states) if direct else rough
        w = adjoint + here.solve_adjoint(rough, better.policy, rest, None)[0]
    parts = here.parts(paid, better.value, w)
    distance = _norm(jax.tree.map(jnp.subtract, gradient, parts.total()), value.dtype)
    scale = sum((_norm(part, value.dtype) for part in parts), start=jnp.zeros((), value.dtype))
    known = jnp.all((better.result == Result.CONVERGED) | (better.result == Result.PRECISION_LIMIT))
    temperature = regularizer.temperature if regularizer.smooth else None
    relative = rounding.of_gradient(better.value, temperature, mdp.modulus)
    return jnp.where(known, SAFETY * distance + scale * relative, jnp.inf)


def _norm(tree: Any, dtype: Any) -> jax.Array:
    """The 2-norm over all leaves, which may have several dtypes."""
    return optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(dtype), tree))
