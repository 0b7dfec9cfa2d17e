"""LU factorization."""

import jax.numpy as jnp
from jax.scipy.linalg import lu_factor, lu_solve

from bilevel_jax.adjoint.protocol import LinearSolver
from bilevel_jax.batching import one_at_a_time_on_cpu


class Direct(LinearSolver):
    """LU factorization of the S x S matrix, shared by all solves with it: O(S^3) time, O(S^2) memory."""

    def prepare(self, operator):
        return _factorize(operator)

    def solve(self, operator, prepared, rhs, guess, transpose):
        del guess
        if prepared is None:
            x = _solve_transpose(operator, rhs) if transpose else _solve(operator, rhs)
        else:
            x = _substitute_transpose(prepared, rhs) if transpose else _substitute(prepared, rhs)
        return x, jnp.asarray(1)

    def relative_tolerance(self, dtype):
        return float(jnp.finfo(dtype).eps) ** 0.5


def _lu(operator):
    matrix = operator.matrix()
    return lu_factor(jnp.eye(matrix.shape[-1], dtype=matrix.dtype) - matrix)


_factorize = one_at_a_time_on_cpu(_lu)
_substitute = one_at_a_time_on_cpu(lambda factors, rhs: lu_solve(factors, rhs))
_substitute_transpose = one_at_a_time_on_cpu(lambda factors, rhs: lu_solve(factors, rhs, trans=1))
_solve = one_at_a_time_on_cpu(lambda operator, rhs: lu_solve(_lu(operator), rhs))
_solve_transpose = one_at_a_time_on_cpu(lambda operator, rhs: lu_solve(_lu(operator), rhs, trans=1))
