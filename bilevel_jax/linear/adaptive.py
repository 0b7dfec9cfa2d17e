"""Sweeps with extrapolation, followed by BiCGStab where the sweeps are slow."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax import lax

from bilevel_jax.core.arrays import Count, Flag, PerState, Scalar
from bilevel_jax.linear.bicgstab import BiCGStab
from bilevel_jax.linear.krylov import extrapolation

# Sweeps that are made whatever they gain, and the factor by which each further one must lower the residual.
TRIAL = 4
GAIN = 0.75


class Series(NamedTuple):
    """The series so far: its `total`, the next `term` and the one `following` it, all [S].

    `length`: 2-norm of the extrapolated residual, `previous` the one before; the products made.
    """

    total: PerState
    term: PerState
    following: PerState
    length: Scalar
    previous: Scalar
    products: Count


class AdaptiveKrylov(BiCGStab):
    """Sweeps x <- b + M x with the slowest mode extrapolated, as long as they are quick; then `BiCGStab`.

    Each sweep multiplies the residual by M. After some sweeps one mode is left of it, which M multiplies by a number,
    its eigenvalue: for values that mode is a constant and the number is the discount, for masses the mode is the
    stationary distribution. The sum of the remaining geometric series is known, and adding it leaves only the second
    slowest mode. On chains that mix fast, some twenty products therefore reach 1e-6 at any discount, and each product
    has less work beside it than an iteration of BiCGStab has. Once a sweep lowers the extrapolated residual by less
    than a quarter, BiCGStab goes on from there.

    Up to 5,000 states an LU factorization follows where both gain too little, as they do on chains that go round. It is
    made as soon as the gain per product so far says that the factorization is the cheaper way to the end.

    Arguments and errors are those of `BiCGStab`, except that `fall_back` is True unless it is set to False.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> policy = jnp.array([[0.5, 0.5], [1.0, 0.0]])
      >>> bj.policy_value(mdp, policy, bj.AdaptiveKrylov()).round(2).tolist()
      [2.75, 2.25]
    """

    fall_back: bool = eqx.field(default=True, static=True)

    def segment(self, contraction, gap, norm, target, budget):
        def unfinished(now: Series) -> Flag:
            useful = (now.products < TRIAL) | (now.length < GAIN * now.previous)
            return (now.length > 0.95 * target) & useful & (now.products < budget)

        def body(now: Series) -> Series:
            following = contraction(now.following)
            _, _, length = extrapolation(now.following, following)
            return Series(
                total=now.total + now.term,
                term=now.following,
                following=following,
                length=length,
                previous=now.length,
                products=now.products + 1,
            )

        first = contraction(gap)
        start = Series(
            total=jnp.zeros_like(gap),
            term=gap,
            following=first,
            length=extrapolation(gap, first)[2],
            previous=norm,
            products=jnp.asarray(1, jnp.int32),
        )
        end = lax.while_loop(unfinished, body, start)
        helped = end.length < norm  # False also for NaN
        rest, left, _ = extrapolation(end.term, end.following)
        u = jnp.where(helped, end.total + rest, 0)
        left = jnp.where(helped, left, gap)
        length = jnp.where(helped, end.length, norm)
        enough = jnp.where(length > target, target, jnp.inf)
        rest, applied = super().segment(contraction, left, length, enough, budget - end.products)
        return u + rest, end.products + applied
