"""What rounding may do to a result, and when it may end an iteration: each allowance of the library, with its argument.

One rule stands behind all of them: an allowance is made only of numbers that the answer is made of. A reward that
no policy collects, a wall that costs a million, an action that is not available, another part of the process: none of
them makes the error of a value larger, so none of them may excuse one (docs/mathematics.md, "Certificates").

u is the unit roundoff, half of eps: a rounded operation is exact up to a relative u. K u is the worst case of a sum of
K products. Roundings of terms that differ have no common sign, which leaves sqrt(K) u. Equal terms are rounded alike,
up to K u / 2 in one running total; our own sums of many terms are made of groups, which leaves sqrt(K) u again, and
libraries add a matrix times one vector in lanes of 16 bytes or more. Checked by test, not proven (docs/mathematics.md).
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from bilevel_jax.core.arrays import Flag, PerState, Scalar

# A value is at working precision where each state's equation V = T V holds to so many times its own rounding; to fewer
# where they say nothing of V, see `working_precision`.
AT_WORKING_PRECISION = 64
LEAST_WORKING_PRECISION = 2
# What is lost below the smallest normal number is no relative error. It is allowed fewer times: more could be all that
# a value of that size is.
UNDERFLOWS_AT_WORKING_PRECISION = 4
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

# Products of a long row with one vector are added in running totals that fill so many bytes at least.
LANES = 16

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
    """Return what a sweep loses where products fall below the smallest normal number: that number for each
    operation.
    """
    return (terms + 4) * float(jnp.finfo(dtype).tiny)


def full_precision(dtype: Any) -> float:
    """Return the number below which digits are lost: there the smallest normal number is more than u times the
    number.
    """
    return float(jnp.finfo(dtype).tiny) / unit_roundoff(dtype)


def least_derivative(actions: int, temperature: Scalar) -> Scalar:
    """Return the derivative in a number of the lower level below which digits are lost, see `full_precision`.

    A device takes a weight p of an action for 0 where it is below the smallest normal number. In the derivative in the
    temperature it counts p log p, and there are as many of them as actions. On its way there, what an action adds is
    multiplied and divided by the temperature, which makes what is lost larger where that is below 1.
    """
    dtype = temperature.dtype
    least = -actions * math.log(float(jnp.finfo(dtype).tiny)) * full_precision(dtype)
    return least / jnp.where(temperature > 0, jnp.minimum(temperature, 1), 1)


class Sums(NamedTuple):
    """How the sum of an expectation is rounded: `terms`, the largest number of summands, and `roundings`, how many u a
    sum may be off by, per unit of its size.

    `of_constants` is the same number for the sum of the probabilities themselves. Where these are constants of the
    program, the compiler sums them, in one running total.
    """

    terms: int
    roundings: Any
    of_constants: float


def of_groups(terms: int) -> Sums:
    """Return the `Sums` of a sum that is made in groups, or whose terms differ."""
    return Sums(terms, math.sqrt(terms), math.sqrt(terms))


def of_matrix_product(terms: int, dtype: Any) -> Sums:
    """Return the `Sums` of a library's product of a matrix with rows of `terms` entries and one vector."""
    lanes = LANES // jnp.dtype(dtype).itemsize
    root = math.sqrt(terms)
    return Sums(terms, max(root, terms / (2 * lanes)), max(root, terms / 2))


def of_one_total(terms: int) -> Sums:
    """Return the `Sums` of a library's product of a matrix with many vectors: each entry is one running total."""
    most = max(math.sqrt(terms), terms / 2)
    return Sums(terms, most, most)


def working_precision(modulus: Scalar, dtype: Any) -> Scalar:
    """Return by how many times its own rounding a state's equation may be off; at most 64.

    A relative error of n u in the equation becomes one of up to n u / (1 - discount) in the value. n is chosen such
    that the equation fixes the value to a hundredth, but is at least 2, which rounding itself leaves: with such an n
    the value may be known less well.
    """
    known = KNOWN * (1 - modulus) / unit_roundoff(dtype)
    return jnp.clip(known, LEAST_WORKING_PRECISION, AT_WORKING_PRECISION).astype(dtype)


def of_sweep(
    sums: Sums,
    expected: Float[Array, "..."],
    q: Float[Array, "..."],
    spread: Float[Array, "..."],
) -> Float[Array, "..."]:
    """How far a computed (T V)[s] may be from the true one; all arrays broadcast.

    Q = r + discount E has one rounding for each of the sum's products, `Sums` for their sum, one for the discount,
    and one of the size of Q. Omega* adds to the largest Q a number whose parts all have one sign
    (mdp/regularizers/), so that its rounding is some u of that number and one of the sum. Errors of Q reach T V
    by the policy, whose weights the sizes have.

    Args:
      sums: of an expectation, `Transition.sums`.
      expected: sum_a pi discount E|V|: the numbers that the expectation is made of.
      q: sum_a pi |Q| + |T V|.
      spread: |T V - max Q|, for each sum in each other by which Omega* adds over the actions (`levels_of_sum`).
    """
    return _relative(sums, expected, q, spread) + underflow(sums.terms, q.dtype)


def of_equation(
    sums: Sums,
    expected: Float[Array, "..."],
    q: Float[Array, "..."],
    spread: Float[Array, "..."],
    lost: Float[Array, "..."],
    times: Scalar,
) -> Float[Array, "..."]:
    """By how much V = T V may be off in a state that is known to working precision: `times` the rounding of a sweep.

    Of what is lost below the smallest normal number, `times` is cut to 4. `lost` is that of Omega*; the other arguments
    are those of `of_sweep`.
    """
    fewer = jnp.minimum(times, UNDERFLOWS_AT_WORKING_PRECISION)
    return times * _relative(sums, expected, q, spread) + fewer * (underflow(sums.terms, q.dtype) + lost)


def _relative(sums, expected, q, spread):
    roundings = jnp.asarray(2 + sums.roundings, q.dtype)
    return unit_roundoff(q.dtype) * (roundings * expected + q + 8 * spread)


def of_policy(temperature: Float[ArrayLike, ""], dtype: Any) -> Scalar:
    """Return what a regularized policy loses per step because its probabilities are rounded.

    The exact policy is the best one, so that a relative error of some u in each probability costs only the temperature
    times the square of that error.
    """
    return jnp.asarray(temperature, dtype) * (8 * unit_roundoff(dtype)) ** 2


def of_row_sums(sums: Sums, dtype: Any) -> Scalar:
    """How far a computed expected discount may be from the true one: a sum of probabilities and a product."""
    return jnp.asarray((1 + sums.of_constants) * unit_roundoff(dtype), dtype)


def of_linear_residual(terms: int, modulus: Scalar, x: Scalar, rhs: Scalar) -> Scalar:
    """How far a computed b - (I - M) x may be from the true one, in the norm in which |x|, |b| and |M| are given.

    Each entry is a sum of `terms` products, of b and of x. This one is the worst case: entries that add up in the
    1-norm of an adjoint all err in the same direction where masses do.
    """
    return 2 * unit_roundoff(x.dtype) * (terms * modulus * x + 2 * (x + rhs))


def is_moderate(x: PerState, rhs: PerState) -> Flag:
    """Whether a solution x[S] is no larger than a regular system explains. False for NaN."""
    limit = float(jnp.finfo(x.dtype).eps) ** REGULARITY
    return jnp.max(jnp.abs(x)) <= limit * jnp.max(jnp.abs(rhs))


def of_backup(expected: PerState, q: PerState, spread: PerState) -> PerState:
    """Return what rounding usually does to (T V)[s]: a u of each of the numbers that `of_sweep` allows for, [S]."""
    return unit_roundoff(q.dtype) * (expected + q + spread)


def of_right_hand_side(size: Float[Array, "*batch S"]) -> Float[Array, "*batch S"]:
    """Return what rounding may do to df/dV, whose summands have this size, [S]. Each is a product of some numbers.

    The rounding of a policy moves all summands of a state together. It is the business of V, not counted here.
    """
    return 4 * unit_roundoff(size.dtype) * size


def of_gradient(
    value: Float[Array, "*batch S"],
    spread: Float[Array, "*batch S"],
    logits: Scalar,
    modulus: Float[Array, "*batch"],
) -> Scalar:
    """Return about how large an error rounding causes in a hyper-gradient, relative to the gradient's summands.

    It has three parts: the error of the `logits`, Q / temperature, by which the policy moves; the error of a linear
    system with this modulus; and that of V itself, whose `spread`, the regularizer's part, may be larger than V. It is
    no worst case: the first two amplify constants most, and a policy does not depend on constants. The factor is
    measured, not derived: random gradients of nearly separate parts can exceed any factor (docs/failures.md).
    """
    larger = jnp.max(spread) / jnp.maximum(jnp.max(jnp.abs(value)), full_precision(value.dtype))
    return 2.5 * unit_roundoff(value.dtype) * (logits + (2 + larger) / (1 - jnp.max(modulus)))
