"""Sweeps with extrapolation, and BiCGStab where these are slow."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax

from bilevel_jax.adjoint.bicgstab import BiCGStab
from bilevel_jax.adjoint.krylov import extrapolation

# Sweeps that are made whatever they gain, and the factor by which each further one must lower the residual.
TRIAL = 4
GAIN = 0.75


class AdaptiveKrylov(BiCGStab):
    """x <- b + M x with the slowest mode extrapolated, as long as that is quick; then `BiCGStab`.

    The residual M^n b of a sweep turns into one mode, and that into itself times its eigenvalue: a constant and
    the discount for values, the stationary distribution for masses. Summing the rest of that geometric
    series leaves the next mode, so that on chains that mix fast some twenty products reach 1e-6 at any
    discount, each with less beside it than an iteration of BiCGStab has. Once a sweep lowers the
    extrapolated residual by less than a quarter, BiCGStab starts from there.

    Up to 5,000 states an LU factorization follows where either gains too little, as on chains that go round:
    as soon as what was gained a product says that it is the cheaper way on.

    Arguments and errors are those of `BiCGStab`, but that `fall_back` is True unless it is set to False.
    """

    fall_back: bool = eqx.field(default=True, static=True)

    def segment(self, contraction, gap, norm, target, budget):
        def unfinished(carry):
            _, _, _, length, previous, made = carry
            useful = (made < TRIAL) | (length < GAIN * previous)
            return (length > 0.95 * target) & useful & (made < budget)

        def body(carry):
            total, term, following, length, _, made = carry
            next_following = contraction(following)
            _, _, next_length = extrapolation(following, next_following)
            return total + term, following, next_following, next_length, length, made + 1

        first = contraction(gap)
        start = (jnp.zeros_like(gap), gap, first, extrapolation(gap, first)[2], norm, jnp.asarray(1, jnp.int32))
        total, term, following, length, _, made = lax.while_loop(unfinished, body, start)
        helped = length < norm  # False also for NaN
        rest, left, _ = extrapolation(term, following)
        u = jnp.where(helped, total + rest, 0)
        left = jnp.where(helped, left, gap)
        length = jnp.where(helped, length, norm)
        enough = jnp.where(length > target, target, jnp.inf)
        rest, applied = super().segment(contraction, left, length, enough, budget - made)
        return u + rest, made + applied
