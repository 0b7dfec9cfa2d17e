"""Preconditioners of the Krylov solvers: approximations of (I - M)^-1 that are cheap to apply.

They are applied on the right, (I - M) P^-1 u = b with x = P^-1 u, so that the residual stays the true one,
and the transposed solve has the transposed preconditioner. A preconditioner changes the way to a
solution, not the solution: no derivative flows through it.
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax import lax

from bilevel_jax.core.arrays import PerState
from bilevel_jax.core.validation import plain, require_setting
from bilevel_jax.mdp.transitions import StateOperator


class Preconditioner(eqx.Module):
    """The protocol. `products` is the number of products with M that one application costs."""

    products: ClassVar[int] = 0

    @abc.abstractmethod
    def prepare(self, operator: StateOperator) -> Any:
        """Return what applications to M and to M' share."""

    @abc.abstractmethod
    def apply(self, data: Any, residual: PerState, transpose: bool) -> PerState:
        """P^-1 r, or its transpose, for r[S]."""


class Jacobi(Preconditioner):
    """Division by the diagonal of I - M. It pays where many states are likely to stay, and their neighbours are not.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> policy = jnp.array([[0.5, 0.5], [1.0, 0.0]])
      >>> solver = bj.BiCGStab(tolerance=1e-5, preconditioner=bj.Jacobi())
      >>> bj.policy_value(mdp, policy, solver).round(2).tolist()
      [2.75, 2.25]
    """

    def prepare(self, operator):
        return 1 / (1 - operator.diagonal())

    def apply(self, data, residual, transpose):
        del transpose  # diagonal
        return data * residual


class ConstantDeflation(Preconditioner):
    """A coarse correction by the constant vector: P^-1 r = r + (1 / l - 1) mean(r), l = mean((I - M) 1).

    With one discount, the constant vector is an eigenvector of I - M with the eigenvalue 1 - discount, the slowest one.
    The correction moves this eigenvalue to 1, and leaves what I - M does to vectors of mean 0. It costs one product, in
    `prepare`.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> policy = jnp.array([[0.5, 0.5], [1.0, 0.0]])
      >>> solver = bj.BiCGStab(tolerance=1e-5, preconditioner=bj.ConstantDeflation())
      >>> bj.policy_value(mdp, policy, solver).round(2).tolist()
      [2.75, 2.25]
    """

    def prepare(self, operator):
        # Row sums of M are below 1, so that l is above 0, but for rounding.
        ones = jnp.ones_like(operator.diagonal())
        least = jnp.finfo(ones.dtype).eps
        return 1 / jnp.maximum(1 - jnp.mean(operator.apply(ones)), least) - 1

    def apply(self, data, residual, transpose):
        del transpose  # symmetric
        return residual + data * jnp.mean(residual)


class NeumannPreconditioner(Preconditioner):
    """P^-1 = I + M + ... + M^terms: more products per step, but fewer steps, basis vectors and inner products.

    Args:
      terms: the number of products per application (static), at least 1.

    Raises:
      InputError: terms below 1.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> policy = jnp.array([[0.5, 0.5], [1.0, 0.0]])
      >>> solver = bj.BiCGStab(tolerance=1e-5, preconditioner=bj.NeumannPreconditioner(2))
      >>> bj.policy_value(mdp, policy, solver).round(2).tolist()
      [2.75, 2.25]
    """

    terms: int = eqx.field(default=2, static=True, converter=plain("terms"))

    def __check_init__(self):
        require_setting("terms", self.terms, 1, "1 to 4 is usual", whole=True)

    @property
    def products(self):
        return self.terms

    def prepare(self, operator):
        return operator.fold()

    def apply(self, data, residual, transpose):
        system = data.T if transpose else data
        return lax.fori_loop(0, self.terms, lambda _, x: residual + system.apply(x), residual)
