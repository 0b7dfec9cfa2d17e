"""The Lagrangian of a bilevel problem at one x, whose derivatives are all that a hyper-gradient is made of.

  L(x, V, w) = f(x, solution read off V) + w' (T_x V - V)

dL/dw = 0 is the lower level, dL/dV = 0 the adjoint equation (I - discount P_pi)' w = df/dV, and at the V* and w* that
solve them dL/dx is the hyper-gradient. Anywhere else it is the estimate that V and w allow.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from bilevel_jax.adjoint import LinearSolver, LinearStats, linear_solve
from bilevel_jax.bellman import backup, discounted_operator
from bilevel_jax.errors import InputError
from bilevel_jax.hypergradient.problem import Problem, lower_level
from bilevel_jax.mdp import MDP, over_batch
from bilevel_jax.regularizers import Regularizer
from bilevel_jax.solvers import Solution
from bilevel_jax.validation import as_float

ReadOut = Callable[[MDP, Regularizer, jax.Array], Solution]


class Paid(NamedTuple):
    """f at one V and its derivatives: in x directly, in the leaves of MDP and regularizer, in V[S]."""

    objective: jax.Array
    of_x: Any
    of_theta: Any
    of_value: jax.Array


class Parts(NamedTuple):
    """The summands of dL/dx, pytrees as x: df/dx directly, df/dtheta by what is read off V, and w' dT/dtheta.

    `mixed`, the size of what the latter two are sums of: each of their terms with an arbitrary sign.
    """

    direct: Any
    read: Any
    backup: Any
    mixed: Any

    def total(self) -> Any:
        return jax.tree.map(lambda a, b, c: a + b + c, self.direct, self.read, self.backup)


class Lagrangian:
    """See the module. x is pulled back once through the leaves of MDP and regularizer, theta.

    Args:
      read: the solution as a function of (mdp, regularizer, V), with the derivative that f shall see.
    """

    def __init__(self, problem: Problem, x: Any, read: ReadOut):
        def leaves_at(x):
            return eqx.partition(lower_level(problem, x), eqx.is_inexact_array)

        self._theta, self._pull, self._rest = jax.vjp(leaves_at, x, has_aux=True)
        self._problem, self._x, self._read = problem, x, read

    def lower(self, theta: Any = None) -> tuple[MDP, Regularizer]:
        """MDP and regularizer, of other floating-point leaves if given."""
        return eqx.combine(self._theta if theta is None else theta, self._rest)

    def paid(self, value: jax.Array) -> Paid:
        """f at V[S] and its derivatives. Raises InputError if f is no scalar."""

        def upper(x, theta, value):
            made = self._problem.objective(x, self._read(*self.lower(theta), value))
            objective = as_float("objective(x, solution)", made)
            if objective.shape != ():
                raise InputError(f"objective(x, solution) must return a scalar, got shape {list(objective.shape)}")
            return objective

        objective, pull = jax.vjp(upper, self._x, self._theta, value)
        return Paid(objective, *pull(jnp.ones_like(objective)))

    def gradient(self, paid: Paid, value: jax.Array, w: jax.Array) -> Any:
        """dL/dx at V and w, both [S]."""
        of_theta = jax.tree.map(jnp.add, paid.of_theta, self._of_backup(value, w))
        return jax.tree.map(jnp.add, paid.of_x, *self._pull(of_theta))

    def parts(self, paid: Paid, value: jax.Array, w: jax.Array) -> Parts:
        """The summands of `gradient`."""

        def stacked(read, backup):
            return jnp.stack([read, backup, _signs(read) * (jnp.abs(read) + jnp.abs(backup))])

        each = jax.tree.map(stacked, paid.of_theta, self._of_backup(value, w))
        (pulled,) = jax.vmap(self._pull)(each)  # at once: what x's derivatives are made of is read once
        return Parts(paid.of_x, *(jax.tree.map(lambda leaf, i=i: leaf[i], pulled) for i in range(3)))

    def _of_backup(self, value: jax.Array, w: jax.Array) -> Any:
        _, pull = jax.vjp(lambda theta: over_batch(backup)(*self.lower(theta), value), self._theta)
        return pull(w)[0]

    def residual(self, value: jax.Array) -> jax.Array:
        """dL/dw = T V - V, [S]."""
        return over_batch(backup)(*self.lower(), value) - value

    def adjoint_residual(self, policy: jax.Array, of_value: jax.Array, w: jax.Array) -> jax.Array:
        """dL/dV = df/dV - (I - discount P_pi)' w, [S], under a policy[S, A]."""
        return of_value - w + over_batch(_push)(*self.lower(), policy, w)

    def solve_adjoint(
        self, solver: LinearSolver, policy: jax.Array, rhs: jax.Array, guess: jax.Array | None
    ) -> tuple[jax.Array, LinearStats]:
        """w[S] with (I - discount P_pi)' w = rhs, from `guess` (zeros if None)."""
        return _solve_adjoint(*self.lower(), policy, rhs, guess, solver=solver)


def _signs(like: jax.Array) -> jax.Array:
    """1 and -1 without a pattern, of the shape of `like`: a bit of a multiplicative hash of the place."""
    place = lax.iota(jnp.uint32, like.size) * jnp.uint32(2654435769)
    bit = (place ^ (place >> 15)) * jnp.uint32(2246822519) >> 31
    return (1 - 2 * bit.astype(like.dtype)).reshape(like.shape)


def _push(mdp, regularizer, policy, w):
    del regularizer
    return discounted_operator(mdp, policy).apply_transpose(w)


@over_batch
def _solve_adjoint(mdp, regularizer, policy, rhs, guess, *, solver):
    del regularizer
    operator = discounted_operator(mdp, policy)
    return linear_solve(solver, operator, mdp.modulus, rhs, transpose=True, guess=guess, share=False)


@over_batch
def sweep(mdp: MDP, regularizer: Regularizer, value: jax.Array, shift: jax.Array, *, count: int) -> jax.Array:
    """V <- T V + shift, `count` times, all [S]: differentiated as what it is, a loop."""
    return lax.scan(lambda v, _: (backup(mdp, regularizer, v) + shift, None), value, length=count)[0]
