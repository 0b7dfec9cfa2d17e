"""Look-ups and their transpose, for indices that were checked to be in bounds when they were built.

Clamping an index costs a factor of 2 and more; wrapping negative ones makes XLA's CPU copy the indices at the
start of every loop that uses them (docs/performance.md).
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


def gather(values: Any, index: Any) -> Shaped[Array, "..."]:
    """Return values[index]. `index` is an integer array or a tuple of them, with entries from 0 on and in bounds."""
    return jnp.asarray(values).at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def scatter_add(
    terms: Float[Array, "*shape"], index: Int[Array, "*shape"], size: int, *, indices_are_sorted: bool = False
) -> Float[Array, " size"]:
    """out[size] with out[index] += terms; `index` of the shape of `terms`, from 0 on and in bounds."""
    out = jnp.zeros((size,), terms.dtype).at[index]
    return out.add(terms, mode="promise_in_bounds", wrap_negative_indices=False, indices_are_sorted=indices_are_sorted)
