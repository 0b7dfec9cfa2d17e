"""Random dynamics, as Garnet has them (Archibald, McKinnon and Thomas 1995)."""

import functools

import jax
import jax.numpy as jnp

from bilevel_jax.problems.options import require_room_for


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_successors(keys: jax.Array, pairs: tuple[int, ...], states: int, branching: int) -> tuple[jax.Array, ...]:
    """For each pair, `branching` different states and their probabilities, both [branching, *pairs].

    Args:
      keys: two, [2].
      pairs: axes of what has successors, such as (S, A).

    Raises:
      InputError: the order of all states that each pair draws from has no room.
    """
    require_room_for("states, actions", *pairs, states, copies=3)  # random numbers, and their order twice
    order = jnp.argsort(jax.random.uniform(keys[0], (*pairs, states)), -1)
    weight = jax.random.exponential(keys[1], (branching, *pairs)) + 1e-3
    successor = jnp.moveaxis(order[..., :branching], -1, 0).astype(jnp.int32)
    return successor, weight / jnp.sum(weight, 0, keepdims=True)
