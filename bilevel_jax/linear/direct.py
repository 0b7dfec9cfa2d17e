"""LU factorization."""

import jax
import jax.numpy as jnp
from jax.scipy.linalg import lu_factor, lu_solve

from bilevel_jax.core.cpu import one_at_a_time_on_cpu
from bilevel_jax.core.errors import InputError
from bilevel_jax.linear.protocol import Attempt, LinearSolver

# A matrix of so many states is 3.2 GB in float64, and some 5e12 operations to factorize.
MOST_STATES = 20_000


class Direct(LinearSolver):
    """LU factorization of the S x S matrix, shared by all solves with it: O(S^3) time, O(S^2) memory.

    Raises:
      InputError: from `solve`, for more than 20,000 states.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> policy = jnp.array([[0.5, 0.5], [1.0, 0.0]])
      >>> bj.policy_value(mdp, policy, bj.Direct()).round(2).tolist()
      [2.75, 2.25]
    """

    def prepare(self, operator):
        _require_few_states(operator)
        return _factorize(operator)

    def solve(self, operator, prepared, rhs, guess, transpose):
        del guess
        _require_few_states(operator)
        if prepared is None:
            x = _solve_transpose(operator, rhs) if transpose else _solve(operator, rhs)
        else:
            x = _substitute_transpose(prepared, rhs) if transpose else _substitute(prepared, rhs)
        return Attempt(x=x, products=jnp.asarray(1, jnp.int32), stalled=jnp.asarray(True))

    def relative_tolerance(self, dtype):
        return float(jnp.finfo(dtype).eps) ** 0.5


def _require_few_states(operator):
    states = jax.eval_shape(operator.matrix).shape[-1]
    if states > MOST_STATES:
        raise InputError(
            f"Direct: the MDP has {states} states and the factorization needs a matrix [S, S]; above {MOST_STATES} "
            f"use BiCGStab() or GMRES()"
        )


def _lu(operator):
    matrix = operator.matrix()
    return lu_factor(jnp.eye(matrix.shape[-1], dtype=matrix.dtype) - matrix)


_factorize = one_at_a_time_on_cpu(_lu)
_substitute = one_at_a_time_on_cpu(lambda factors, rhs: lu_solve(factors, rhs))
_substitute_transpose = one_at_a_time_on_cpu(lambda factors, rhs: lu_solve(factors, rhs, trans=1))
_solve = one_at_a_time_on_cpu(lambda operator, rhs: lu_solve(_lu(operator), rhs))
_solve_transpose = one_at_a_time_on_cpu(lambda operator, rhs: lu_solve(_lu(operator), rhs, trans=1))
