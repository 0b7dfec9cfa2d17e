"""Proofs about V* from one Bellman sweep: two-sided bounds from T V - V, and what rounding adds to them.

T is monotone, and T (V + c) lies between T V + least * c and T V + most * c, where least and most are the
smallest and largest expected discounts of a pair, sum_s' discount P. Hence, with gap = T V - V,
  T V + lower <= V* <= T V + upper,   upper = factor(max gap),   lower = factor(min gap),
  factor(g) = g * d / (1 - d), d being the discount that makes the bound wider.
(MacQueen 1966, "A modified dynamic programming method for Markovian decision problems"; Porteus 1971.)
For one discount the width is discount / (1 - discount) * span(gap): on chains that mix fast the span falls
much faster than the gap itself. What rounding adds is made of the numbers of the sweep itself (rounding.py).
"""

from typing import NamedTuple

import jax.numpy as jnp

from bilevel_jax.core import rounding
from bilevel_jax.core.arrays import Flag, PerPair, PerState, Scalar
from bilevel_jax.core.reductions import largest
from bilevel_jax.core.rounds import only_if
from bilevel_jax.mdp.bellman import action_values, largest_rounding, sizes_of
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import Regularizer


class Discounts(NamedTuple):
    """The smallest and the largest expected discount of a state-action pair, scalars, both widened by what rounding may
    do to them.
    """

    least: Scalar
    most: Scalar


class Bracket(NamedTuple):
    """T V + lower <= V* <= T V + upper, both widened by `rounding`; scalars."""

    lower: Scalar
    upper: Scalar
    rounding: Scalar

    @property
    def middle(self) -> Scalar:
        """T V + middle is the best estimate of V*."""
        return (self.lower + self.upper) / 2

    @property
    def half_width(self) -> Scalar:
        """Bounds |T V + middle - V*|_inf, rounding apart."""
        return (self.upper - self.lower) / 2

    @property
    def reach(self) -> Scalar:
        """Bounds |T V - V*|_inf, rounding apart."""
        return jnp.maximum(self.upper, -self.lower)


def expected_discounts(mdp: MDP) -> Discounts:
    """Return the expected discounts from the row sums as they are: a row that sums to 1 + 1e-7 has a larger
    discount.
    """
    mass = mdp.discount * mdp.transition.expect(jnp.ones_like(mdp.reward[:, 0]))
    least, most = mass, mass
    if mdp.available is not None:
        least, most = jnp.where(mdp.available, mass, jnp.inf), jnp.where(mdp.available, mass, 0)
    return _allowing_for_row_sums(mdp, jnp.min(least), jnp.max(most))


def contraction_only(mdp: MDP) -> Discounts:
    """Return discounts for bounds by the contraction modulus alone, whatever signs a gap has."""
    most = expected_discounts(mdp).most
    return Discounts(jnp.zeros_like(most), most)


def _allowing_for_row_sums(mdp: MDP, least: Scalar, most: Scalar) -> Discounts:
    relative = rounding.of_row_sums(mdp.transition.sums(mdp.reward[:, 0]), most.dtype)
    return Discounts(least * (1 - relative), most * (1 + relative))


def bracket(discounts: Discounts, low: Scalar, high: Scalar, noise: Scalar) -> Bracket:
    """The bracket that min and max of T V - V prove; `noise` is the error in one entry of T V."""
    least, most = (jnp.where((d >= 0) & (d < 1), d / (1 - d), jnp.inf) for d in discounts)
    upper = _times(high, jnp.where(high > 0, most, least))
    lower = _times(low, jnp.where(low > 0, least, most))
    return Bracket(lower, upper, _times(noise, 1 + most))


def _times(gap: Scalar, factor: Scalar) -> Scalar:
    return jnp.where(gap == 0, 0, gap * factor)


def excess_below(
    mdp: MDP,
    regularizer: Regularizer,
    discounts: Discounts,
    value: PerState,
    backup: PerState,
    shift: Scalar,
    allowed: PerState,
) -> Scalar:
    """Return about the largest |T W - W| of a state, W = T V + shift, relative to what its equation at V allows, a
    scalar.

    Near discount 1 a large constant has a small residual, (1 - discount) shift. The rounding of V + shift would cover
    it, whatever V is. The shift is therefore held against the rounding of the equation without it; its own product with
    1 - discount has a rounding, too. `allowed`[S] is what is allowed at W. In most cases it is enough to subtract what
    the shift may add to it, and nothing is computed at V.
    """
    sums = mdp.transition.sums(value)
    size = jnp.abs(shift)
    times = rounding.working_precision(mdp.modulus, value.dtype)
    own = times * rounding.of_row_sums(sums, value.dtype) * size
    left = jnp.maximum(*(jnp.abs(discount * (backup - value) - (1 - discount) * shift) for discount in discounts))

    def exact():
        q = action_values(mdp, value)
        sizes = sizes_of(mdp, regularizer, value, q, backup)
        return jnp.max(left / (sizes.allowed(sums, sizes.expected(), times) + own))

    added = times * rounding.of_sweep(sums, discounts.most * size, 2 * size, jnp.zeros_like(size))
    rough = jnp.max(left / (jnp.maximum(allowed - added, 0) + own))
    return only_if(~(rough <= 1), exact, rough)


class Certificate(NamedTuple):
    """What one sweep at V proves about V; scalars.

    `residual` is |T V - V|_inf. `error_bound` bounds |V - V*|_inf. `suboptimality` bounds max_s V*[s] - V^pi[s] for the
    policy pi at V. `noise` is the largest rounding of the sweep. `implied` is the most that the policy collects per
    step, divided by 1 - discount; it bounds |V^pi|. `excess` is the largest |T V - V| of a state relative to
    what the rounding of that state's own equation allows (`Sizes.allowed`): at most 1 at working precision, infinite
    where it was not asked for.
    """

    residual: Scalar
    error_bound: Scalar
    suboptimality: Scalar
    noise: Scalar
    implied: Scalar
    excess: Scalar


def certify(
    mdp: MDP,
    regularizer: Regularizer,
    discounts: Discounts,
    value: PerState,
    q: PerPair,
    backup: PerState,
    by_state: Flag | None,
) -> tuple[Certificate, PerState]:
    """Return the certificate of V[S], given Q[S, A] and T V [S] at it, and the least that each state's equation allows,
    [S].

    T_pi V = T V for the policy pi at V, so that the bracket that V and T V prove holds V^pi as well as V*. `by_state`,
    a bool, says whether to compute E|V|, a product, where the bound on `excess` without it is above the threshold. None
    leaves out both: `excess` and that least are then infinite.
    """
    sums = mdp.transition.sums(value)
    gap = backup - value
    sizes = sizes_of(mdp, regularizer, value, q, backup)
    parts = (jnp.abs(value), sizes.q, sizes.spread, jnp.abs(sizes.collected), gap, -gap)
    if by_state is None:
        least, exact = jnp.full_like(gap, jnp.inf), jnp.full_like(discounts.most, jnp.inf)
        *three, most, high, low = largest(*parts)
    else:
        # |E V| <= E|V|: a state whose equation holds to what |E V| allows needs no second expectation.
        times = rounding.working_precision(mdp.modulus, value.dtype)
        least = sizes.allowed(sums, sizes.expectation, times)
        *three, most, high, low, rough = largest(*parts, jnp.abs(gap) / least)
        unclear = by_state & (rough > 1)
        exact = only_if(unclear, lambda: jnp.max(jnp.abs(gap) / sizes.allowed(sums, sizes.expected(), times)), rough)

    low = -low
    noise = largest_rounding(mdp, sizes, discounts.most, *three)
    proven = bracket(discounts, low, high, noise)
    # V* - V is between gap + lower and gap + upper.
    error = jnp.maximum(high + proven.upper, -(low + proven.lower))
    collected = most + 4 * rounding.underflow(sums.terms, value.dtype)
    # Of the problem as it is meant, without an allowance: a bound must not pass for one by the allowance alone.
    horizon = 1 / (1 - mdp.modulus)
    certificate = Certificate(
        residual=jnp.maximum(high, -low),
        error_bound=(error + proven.rounding) * (1 + 8 * rounding.unit_roundoff(value.dtype)),
        suboptimality=2 * (proven.half_width + proven.rounding)
        + horizon * rounding.of_policy(regularizer.temperature, value.dtype),
        noise=noise,
        implied=collected * horizon,
        excess=exact,
    )
    return certificate, least
