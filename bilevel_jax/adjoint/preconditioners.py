"""Preconditioners of the Krylov solvers: approximations of (I - M)^-1 that are cheap to apply.

They are applied on the right, (I - M) P^-1 u = b with x = P^-1 u, so that the residual stays the true one,
and the transposed solve has the transposed preconditioner. A preconditioner changes the way to a
solution, not the solution: no derivative flows through it.
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from bilevel_jax.transitions import StateOperator
from bilevel_jax.validation import plain, require_setting


class Preconditioner(eqx.Module):
    """The protocol. `products`: how many products with M an application costs."""

    products: ClassVar[int] = 0

    @abc.abstractmethod
    def prepare(self, operator: StateOperator) -> Any:
        """What applications to M and to M' share."""

    @abc.abstractmethod
    def apply(self, data: Any, residual: jax.Array, transpose: bool) -> jax.Array:
        """P^-1 r, or its transpose, for r[S]."""


class Jacobi(Preconditioner):
    """Division by the diagonal of I - M. Pays where many states are likely to stay, unlike their neighbours."""

    def prepare(self, operator):
        return 1 / (1 - operator.diagonal())

    def apply(self, data, residual, transpose):
        del transpose  # diagonal
        return data * residual


class ConstantDeflation(Preconditioner):
    """A coarse correction by the constant vector: P^-1 r = r + (1 / l - 1) mean(r), l = mean((I - M) 1).

    With one discount, I - M has the constant as an eigenvector with the eigenvalue 1 - discount, the
    slowest one; this moves it to 1 and leaves what I - M does to vectors of mean 0. One product in all.
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
    """P^-1 = I + M + ... + M^terms: more products a step, but fewer steps, basis vectors and inner products.

    Args:
      terms: products an application (static), at least 1.

    Raises:
      InputError: terms below 1.
    """

    terms: int = eqx.field(default=2, static=True, converter=plain)

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
