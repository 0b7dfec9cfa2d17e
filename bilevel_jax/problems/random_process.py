"""Random dynamics, as Garnet has them (Archibald, McKinnon and Thomas 1995)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Key

from bilevel_jax.problems.options import require_room_for

MOST_MINIMA = 32  # up to which one minimum after another takes a tenth of the time that a sort takes


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_successors(
    keys: Key[Array, "2"], pairs: tuple[int, ...], states: int, branching: int
) -> tuple[Int32[Array, " K *pairs"], Float[Array, " K *pairs"]]:
    """For each pair, K = `branching` different states and their probabilities.

    Args:
      keys: two.
      pairs: the axes of the pairs that have successors, such as (S, A).

    Raises:
      InputError: the order of all states that each pair draws from has no room, or the lists have none.
    """
    # Random numbers and their order; a sort holds both several times.
    require_room_for("states, actions", *pairs, states, copies=3 if branching <= MOST_MINIMA else 8)
    require_room_for("branching", branching, *pairs, copies=10)  # the lists, and those of a simulator
    order = smallest(jax.random.uniform(keys[0], (*pairs, states)), branching)
    weight = jax.random.exponential(keys[1], (branching, *pairs)) + 1e-3
    return order, weight / jnp.sum(weight, 0, keepdims=True)


@functools.partial(jax.jit, static_argnums=1)
def smallest(values: Float[Array, "*batch S"], count: int) -> Int32[Array, " K *batch"]:
    """Return the indices of the K = `count` smallest values, in ascending order; among equals, the first.

    Example:
      >>> smallest(jnp.array([3.0, 1.0, 2.0]), 2)
      Array([1, 2], dtype=int32)
    """
    if count > MOST_MINIMA:
        return jnp.moveaxis(jnp.argsort(values, -1)[..., :count], -1, 0).astype(jnp.int32)

    def take(left: Float[Array, "*batch S"], _: None) -> tuple[Float[Array, "*batch S"], Int32[Array, "*batch"]]:
        place = jnp.argmin(left, -1, keepdims=True)
        return jnp.put_along_axis(left, place, jnp.inf, -1, inplace=False), place[..., 0].astype(jnp.int32)

    return lax.scan(take, values, length=count)[1]
