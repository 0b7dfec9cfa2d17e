"""What rounding may do to a result, and when it may end an iteration: each allowance of the library, with its argument.

One rule stands behind all of them: an allowance is made only of numbers that the answer is made of. A reward that
no policy collects, a wall that costs a million, an action that is not available, another part of the process: none of
them makes the error of a value larger, so none of them may excuse one (docs/mathematics.md, "Certificates").

u is the unit roundoff, half of eps: a rounded operation is exact up to a relative u. Sums of K products are allowed
sqrt(K) u where K u is the worst case: their roundings have no common sign. That is checked by test, not proven.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

# A value is at working precision where each state's equation V = T V holds to so many times its own rounding; to fewer
# where they say nothing of V, see `working_precision`.
AT_WORKING_PRECISION = 64
LEAST_WORKING_PRECISION = 2
# A gap T V - V of at most so many times the rounding of a sweep is noise: no constant is taken out of it.
NOISE = 4
# A bracket of V* whose half width is at most so many times what rounding adds to it ends the steps: more would take
# off no more than two thirds of the bound. Where a tolerance is not met yet, that may be enough to meet it.
REACHED = 2
REACHED_BUT_NOT_ASKED = 1 / 8
# Where the bracket is within so many times what rounding allows, a step that does not narrow it is the last.
STALL = 64
# A bound says something where it is at most so large a part of what the policy collects for ever.
SAYS_SOMETHING = 1 / 2
# A gain is known to working precision where its bound is at most this part of how far from it is what is collected in
# the long run, or at most the rounding of that.
KNOWN = 0.01
# So many rounds in a row without a smaller residual, each of at least so many steps, and rounding has ended an
# iteration. Fewer steps may gain less than the noise in a residual: those of value iteration gain 1 - discount each.
PATIENCE = 3
LEAST_BURST = 16

# A residual |b - A x|_2 of at most so many eps |x|_2 is what rounding leaves even to a good solution: it computes A x,
# whose entries have a few roundings each. Krylov solvers stop at the first, the report accepts the second.
KRYLOV_FLOOR = 4
SOLVE_FLOOR = 8
# A Krylov segment that gains next to nothing is the last if the residual is at most so many eps |x|_2.
KRYLOV_NEAR_FLOOR = 64
# A solver that gains nothing any more may blame rounding for a residual of so many eps (|x|_2 + |b|_2): a factor of
# 1,000 in the residual is what the condition of nearly singular systems costs.
SOLVE_NEAR_FLOOR = 1000

# The largest |x| / |b| of a regular system, as a power of eps: beyond it, rounding alone makes a singular matrix
# regular, and its solutions are of this size.
REGULARITY = -0.75


def unit_roundoff(dtype: Any) -> float:
    """u: the largest relative error of a rounded operation, 6e-8 in float32 and 1.1e-16 in float64."""
    return float(jnp.finfo(dtype).eps) / 2


def underflow(terms: int, dtype: Any) -> float:
    """What a sweep loses in all where products fall below the smallest normal number: that number per operation."""
    return (terms + 4) * float(jnp.finfo(dtype).tiny)


def working_precision(modulus: jax.Array, dtype: Any) -> jax.Array:
    """How many times its own rounding a state's equation may be off by: at most 64.

    A relative error n u in the equation is one of up to n u / (1 - discount) in the value. So n is such that the
    equation fixes the value to a hundredth, and no less than 2, what rounding itself leaves: there less may be known.
    """
    known = KNOWN * (1 - modulus) / unit_roundoff(dtype)
    return jnp.clip(known, LEAST_WORKING_PRECISION, AT_WORKING_PRECISION).astype(dtype)


def of_scaling(temperature: jax.Array, dtype: Any) -> jax.Array:
    """What Omega* loses where Q - max Q over the temperature is below the smallest normal number, and thus 0."""
    return jnp.asarray(temperature, dtype) * (2 * float(jnp.finfo(dtype).tiny))


def of_sweep(terms: int, expected: jax.Array, q: jax.Array, spread: jax.Array) -> jax.Array:
    """How far a computed (T V)[s] may be from the true one; all arrays broadcast.

    Q = r + discount E has one rounding for each of the sum's products, sqrt(terms) for their sum, one for the
    discount, and one of the size of Q. Omega* adds to the largest Q a number whose parts all have one sign
    (regularizers.py), so that its rounding is some u of that number and one of the sum. Errors of Q reach T V
    by the policy, whose weights the sizes have.

    Args:
      terms: the most summands of an expectation.
      expected: sum_a pi discount E|V|: the numbers that the expectation is made of.
      q: sum_a pi |Q| + |T V|.
      spread: |T V - max Q|.
    """
    u = unit_roundoff(q.dtype)
    return u * ((2 + math.sqrt(terms)) * expected + q + 8 * spread) + underflow(terms, q.dtype)


def of_policy(temperature: jax.Array, dtype: Any) -> jax.Array:
    """What a regularized policy loses in a step by the rounding of its probabilities.

    It is the best one, so that a relative error of some u in each costs the temperature times its square.
    """
    return jnp.asarray(temperature, dtype) * (8 * unit_roundoff(dtype)) ** 2


def of_row_sums(terms: int, dtype: Any) -> float:
    """How far a computed expected discount may be from the true one: a sum of `terms` probabilities and a product."""
    return (1 + math.sqrt(terms)) * unit_roundoff(dtype)


def of_linear_residual(terms: int, modulus: jax.Array, x: jax.Array, rhs: jax.Array) -> jax.Array:
    """How far a computed b - (I - M) x may be from the true one, in the norm in which |x|, |b| and |M| are given.

    Each entry is a sum of `terms` products, of b and of x. This one is the worst case: entries that add up in the
    1-norm of an adjoint all err in the same direction where masses do.
    """
    return 2 * unit_roundoff(x.dtype) * (terms * modulus * x + 2 * (x + rhs))


def is_moderate(x: jax.Array, rhs: jax.Array) -> jax.Array:
    """Whether a solution x[S] is no larger than a regular system explains. False for NaN."""
    limit = float(jnp.finfo(x.dtype).eps) ** REGULARITY
    return jnp.max(jnp.abs(x)) <= limit * jnp.max(jnp.abs(rhs))


def of_gradient(value: jax.Array, temperature: jax.Array | None, modulus: jax.Array) -> jax.Array:
    """About how large an error, relative to a hyper-gradient's summands, rounding makes.

    That of V over the temperature, by which the policy moves, and that of a linear system with this modulus. Not a
    worst case: both amplify constants most, which no policy sees.
    """
    logits = jnp.zeros((), value.dtype)
    if temperature is not None:
        logits = jnp.max(jnp.abs(value)) / jnp.min(temperature).astype(value.dtype)
    return 2 * unit_roundoff(value.dtype) * (logits + 2 / (1 - jnp.max(modulus)))
