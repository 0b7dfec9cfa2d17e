"""Products at full precision, and sums and maxima over a short last axis, as the actions are.

Accelerators multiply matrices of float32 with operands of ten bits unless they are told otherwise (TF32, bfloat16).
Error bounds rest on products: each of them asks for all bits.

XLA's CPU reduces an innermost axis of a few entries one number at a time, and fuses what it reduces into
that loop: at S = 10^6, A = 4 a maximum over gathered action values took 60 to 100 ms where the same
maximum of A slices took 5 to 20 (docs/performance.md).
"""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

# Above this, a reduction is long enough for the compiler's own.
UNROLLED = 16
# From so many entries a slot on, a CPU sums slots in a loop. Unrolled, the gathers of all slots are fused into what
# reduces them: at 10^5 states a solve that takes 40 ms did not end in minutes (docs/performance.md).
LOOPED = 4096


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b, with all bits of the operands on every device."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    """`jnp.einsum`, with all bits of the operands on every device."""
    return jnp.einsum(subscripts, *operands, precision=lax.Precision.HIGHEST)


def sum_last(x: jax.Array) -> jax.Array:
    """The sum over the last axis."""
    return _reduce(x, operator.add, jnp.sum)


def max_last(x: jax.Array) -> jax.Array:
    """The maximum over the last axis; NaN where there is one."""
    return _reduce(x, jnp.maximum, jnp.max)


def sum_slots(term: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """sum_k term(array_0[k], array_1[k], ...): the first axis taken apart, by a loop where it or the rest is long."""
    slots, entries = arrays[0].shape[0], arrays[0][0].size

    def unrolled(*arrays):
        return functools.reduce(operator.add, (term(*(array[k] for array in arrays)) for k in range(slots)))

    def looped(*arrays):
        one = jax.eval_shape(term, *(array[0] for array in arrays))
        start = jnp.zeros(one.shape, one.dtype)
        return lax.scan(lambda total, slot: (total + term(*slot), None), start, arrays)[0]

    if slots > UNROLLED:
        return looped(*arrays)
    if entries < LOOPED:
        return unrolled(*arrays)
    return lax.platform_dependent(*arrays, cpu=looped, default=unrolled)


def map_slots(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """function(array_0[k], array_1[k], ...) for each k, stacked; many by a loop, which compiles once."""
    slots = arrays[0].shape[0]
    if slots > UNROLLED:
        return lax.map(lambda slot: function(*slot), arrays)
    return jnp.stack([function(*(array[k] for array in arrays)) for k in range(slots)])


def argmax_last(x: jax.Array) -> jax.Array:
    """The first index of the maximum over the last axis, int32. NaN counts as no maximum."""
    length = x.shape[-1]
    if not 0 < length <= UNROLLED:
        return jnp.argmax(x, -1).astype(jnp.int32)
    top, index = lax.index_in_dim(x, 0, -1, keepdims=False), jnp.zeros(x.shape[:-1], jnp.int32)
    for a in range(1, length):
        candidate = lax.index_in_dim(x, a, -1, keepdims=False)
        better = candidate > top
        top, index = jnp.where(better, candidate, top), jnp.where(better, a, index)
    return index


def min_max(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least and the largest entry, in one pass."""
    infinity = jnp.asarray(jnp.inf, x.dtype)

    def combine(a, b):
        return lax.min(a[0], b[0]), lax.max(a[1], b[1])

    return lax.reduce((x, x), (infinity, -infinity), combine, tuple(range(x.ndim)))


def in_memory(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, each computed once before anything that uses them.

    XLA's CPU computes what a reduction is made of inside of it: entry by entry, by one thread, and again for each
    reduction. What enters a loop has to lie in memory; this one ends before its first round, since no number is
    below -inf.
    """

    def through_a_loop(*arrays):
        never = arrays[0].ravel()[0] < -jnp.inf
        return lax.while_loop(
            lambda carry: carry[1], lambda carry: (tuple(-array for array in carry[0]), carry[1]), (arrays, never)
        )[0]

    return lax.platform_dependent(*arrays, cpu=through_a_loop, default=lambda *arrays: arrays)


def largest(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The largest entry of each of several arrays of one shape, NaN where there is one, in one pass."""
    least = jnp.asarray(-jnp.inf, arrays[0].dtype)

    def combine(a, b):
        return tuple(lax.max(one, other) for one, other in zip(a, b, strict=True))

    return tuple(lax.reduce(in_memory(*arrays), (least,) * len(arrays), combine, tuple(range(arrays[0].ndim))))


def is_any(x: jax.Array) -> jax.Array:
    """Where an entry is not 0, by its bits: devices take numbers below the smallest normal one for 0."""
    bits = lax.bitcast_convert_type(x, jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32)
    return (bits << 1) != 0


def _reduce(x: jax.Array, combine: Callable, whole: Callable) -> jax.Array:
    length = x.shape[-1]
    if not 0 < length <= UNROLLED:
        return whole(x, -1)
    return functools.reduce(combine, (lax.index_in_dim(x, a, -1, keepdims=False) for a in range(length)))
