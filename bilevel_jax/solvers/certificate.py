"""What a Bellman sweep proves about V*: two-sided bounds from T V - V, and what rounding adds to them.

T is monotone, and T (V + c) lies between T V + least * c and T V + most * c, where least and most are the
smallest and largest expected discounts of a pair, sum_s' discount P. Hence, with gap = T V - V,
  T V + lower <= V* <= T V + upper,   upper = factor(max gap),   lower = factor(min gap),
  factor(g) = g * d / (1 - d), d being the discount that makes the bound wider.
(MacQueen 1966, "A modified dynamic programming method for Markovian decision problems"; Porteus 1971.)
For one discount the width is discount / (1 - discount) * span(gap): on chains that mix fast the span falls
much faster than the gap itself.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel_jax.mdp import MDP


class Discounts(NamedTuple):
    """The smallest and the largest expected discount of a pair, scalars."""

    least: jax.Array
    most: jax.Array


class Bracket(NamedTuple):
    """T V + lower <= V* <= T V + upper, both widened by `rounding`; scalars, as `scale`, of |r| + |V*|."""

    lower: jax.Array
    upper: jax.Array
    rounding: jax.Array

    @property
    def middle(self) -> jax.Array:
        """T V + middle is the best estimate of V*."""
        return (self.lower + self.upper) / 2

    @property
    def half_width(self) -> jax.Array:
        """Bounds |T V + middle - V*|_inf, rounding apart."""
        return (self.upper - self.lower) / 2


def expected_discounts(mdp: MDP) -> Discounts:
    """From the row sums as they are: a row that sums to 1 + 1e-7 has a larger discount."""
    mass = mdp.discount * mdp.transition.expect(jnp.ones_like(mdp.reward[:, 0]))
    if mdp.available is None:
        return Discounts(jnp.min(mass), jnp.max(mass))
    least = jnp.min(jnp.where(mdp.available, mass, jnp.inf))
    return Discounts(least, jnp.max(jnp.where(mdp.available, mass, 0)))


def contraction_only(mdp: MDP) -> Discounts:
    """Bounds by the contraction modulus alone; no product is made for them."""
    return Discounts(jnp.zeros_like(mdp.modulus), mdp.modulus)


def bracket(discounts: Discounts, low: jax.Array, high: jax.Array, rounding: jax.Array) -> Bracket:
    """The bracket that min and max of T V - V prove; `rounding` is the error in one entry of T V."""
    least, most = (jnp.where((d >= 0) & (d < 1), d / (1 - d), jnp.inf) for d in discounts)
    upper = _times(high, jnp.where(high > 0, most, least))
    lower = _times(low, jnp.where(low > 0, least, most))
    return Bracket(lower, upper, _times(rounding, 1 + most))


def _times(gap: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.where(gap == 0, 0, gap * factor)


def rounding_of_sweep(mdp: MDP, scale: jax.Array) -> jax.Array:
    """How far a computed T V may be from the true one, for |r| + |V| <= scale.

    Some roundings for r + discount * E and the conjugate, and the square root of their number for the sum
    in E: their signs are not all the same. An allowance that is checked by test, not a worst case.
    """
    return (4 + mdp.transition.terms**0.5) * jnp.finfo(scale.dtype).eps * scale
