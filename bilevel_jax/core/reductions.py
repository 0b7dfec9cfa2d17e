"""Products at full precision, and sums and maxima over a short last axis, such as that of the actions.

Accelerators round the operands of a float32 matrix product to ten bits unless they are told otherwise (TF32, bfloat16).
Error bounds rest on such products, so each product here asks for all bits.

XLA's CPU backend reduces a short innermost axis one number at a time, and fuses what it reduces into that loop. At S =
10^6 and A = 4 a maximum over gathered action values took 60 to 100 ms, where the same maximum over A slices took 5 to
20 (docs/performance.md).
"""

import functools
import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from bilevel_jax.core.arrays import Scalar
from bilevel_jax.core.cpu import in_memory

# Above this, a reduction is long enough for the compiler's own.
UNROLLED = 16
# From so many entries a slot on, a CPU sums slots in a loop. Unrolled, the gathers of all slots are fused into what
# reduces them: at 10^5 states a solve that takes 40 ms did not end in minutes (docs/performance.md).
LOOPED = 4096


def matmul(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """a @ b, with all bits of the operands on every device."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def einsum(subscripts: str, *operands: Float[Array, "..."]) -> Float[Array, "..."]:
    """`jnp.einsum`, with all bits of the operands on every device."""
    return jnp.einsum(subscripts, *operands, precision=lax.Precision.HIGHEST)


def sum_last(x: Float[Array, "*batch N"]) -> Float[Array, "*batch"]:
    """Return the sum over the last axis. A long axis is summed in 16 groups, and each of these in the same way.

    Equal summands are rounded alike: one running total of 10,000 of them may be off by 2,000 roundings, this sum by 30.
    """
    length = x.shape[-1]
    if length <= UNROLLED:
        return _reduce(x, operator.add, jnp.sum)
    apart = length % UNROLLED
    whole = x[..., : length - apart].reshape(*x.shape[:-1], length // UNROLLED, UNROLLED)
    total = sum_last(lax.optimization_barrier(jnp.sum(whole, -1)))
    return total + sum_last(x[..., length - apart :]) if apart else total


def levels_of_sum(length: int) -> int:
    """Return how many levels of groups of 16 `sum_last` uses for an axis of this length, at least 1."""
    return 1 if length <= UNROLLED else 1 + levels_of_sum(length // UNROLLED)


def max_last(x: Float[Array, "*batch N"]) -> Float[Array, "*batch"]:
    """The maximum over the last axis; NaN where there is one."""
    return _reduce(x, jnp.maximum, jnp.max)


def sum_slots(term: Callable[..., Float[Array, "..."]], *arrays: Shaped[Array, "K ..."]) -> Float[Array, "..."]:
    """Return sum_k term(array_0[k], array_1[k], ...), the sum over the first axis; a long sum is a loop.

    Equal terms are rounded alike: one running total of 1,000 of them may be off by 200 roundings. Many terms are
    therefore summed in groups, whose size is about the square root of their number.
    """
    slots, entries = arrays[0].shape[0], arrays[0][0].size

    def unrolled(*arrays):
        return functools.reduce(operator.add, (term(*(array[k] for array in arrays)) for k in range(slots)))

    def looped(*arrays):
        one = jax.eval_shape(term, *(array[0] for array in arrays))
        start = jnp.zeros(one.shape, one.dtype)
        if slots <= UNROLLED:
            return lax.scan(lambda total, slot: (total + term(*slot), None), start, arrays)[0]
        size = math.isqrt(slots)
        is_last = jnp.arange(slots) % size == size - 1

        def add(carry, slot):
            (total, group), (last, *numbers) = carry, slot
            group += term(*numbers)
            return (total + jnp.where(last, group, 0), jnp.where(last, 0, group)), None

        return operator.add(*lax.scan(add, (start, start), (is_last, *arrays))[0])

    if slots > UNROLLED:
        return looped(*arrays)
    if entries < LOOPED:
        return unrolled(*arrays)
    return lax.platform_dependent(*arrays, cpu=looped, default=unrolled)


def map_slots(function: Callable[..., Shaped[Array, "..."]], *arrays: Shaped[Array, "K ..."]) -> Shaped[Array, "K ..."]:
    """Return function(array_0[k], array_1[k], ...) for each k, stacked. A loop runs many of them, and compiles once."""
    slots = arrays[0].shape[0]
    if slots > UNROLLED:
        return lax.map(lambda slot: function(*slot), arrays)
    return jnp.stack([function(*(array[k] for array in arrays)) for k in range(slots)])


def argmax_last(x: Float[Array, "*batch N"]) -> Int[Array, "*batch"]:
    """Return the first index of the maximum over the last axis, int32. A NaN is never the maximum."""
    length = x.shape[-1]
    if not 0 < length <= UNROLLED:
        return jnp.argmax(x, -1).astype(jnp.int32)
    top, index = lax.index_in_dim(x, 0, -1, keepdims=False), jnp.zeros(x.shape[:-1], jnp.int32)
    for a in range(1, length):
        candidate = lax.index_in_dim(x, a, -1, keepdims=False)
        better = candidate > top
        top, index = jnp.where(better, candidate, top), jnp.where(better, a, index)
    return index


def is_first(best: Int[Array, "*batch"], x: Float[Array, "*batch A"]) -> Bool[Array, "*batch A"]:
    """Return a mask of x[..., A] that is True at the index best[...]."""
    return lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) == best[..., None]


def min_max(x: Float[Array, "..."]) -> tuple[Scalar, Scalar]:
    """Return the smallest and the largest entry, in one pass."""
    infinity = jnp.asarray(jnp.inf, x.dtype)

    def combine(a, b):
        return lax.min(a[0], b[0]), lax.max(a[1], b[1])

    return lax.reduce((x, x), (infinity, -infinity), combine, tuple(range(x.ndim)))


def largest(*arrays: Float[Array, "*shape"]) -> tuple[Scalar, ...]:
    """The largest entry of each of several arrays of one shape, NaN where there is one, in one pass."""
    least = jnp.asarray(-jnp.inf, arrays[0].dtype)

    def combine(a, b):
        return tuple(lax.max(one, other) for one, other in zip(a, b, strict=True))

    return tuple(lax.reduce(in_memory(*arrays), (least,) * len(arrays), combine, tuple(range(arrays[0].ndim))))


def is_any(x: Float[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """Return where an entry is not 0.

    It looks at the bits, because devices treat numbers below the smallest normal one as 0.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32)
    return (bits << 1) != 0


def is_subnormal(x: Float[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """Return where an entry is not 0, but below the smallest normal number, by its bits."""
    wide = x.dtype == jnp.float64
    magnitude = lax.bitcast_convert_type(x, jnp.uint64 if wide else jnp.uint32) << 1
    return (magnitude != 0) & (magnitude < (1 << (53 if wide else 24)))


def _reduce(x: Float[Array, "*batch N"], combine: Callable, whole: Callable) -> Float[Array, "*batch"]:
    length = x.shape[-1]
    if not 0 < length <= UNROLLED:
        return whole(x, -1)
    return functools.reduce(combine, (lax.index_in_dim(x, a, -1, keepdims=False) for a in range(length)))
