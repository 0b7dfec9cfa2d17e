"""Batch axes: functions written for one problem."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bilevel_jax.core.arrays import Scalar


def over_batch(function: Callable, batch_ndim: int | None = None, *, inner_ndim: int = 0) -> Callable:
    """Make `function(*arguments, **shared)`, which is written for one problem, accept batch axes in front.

    An argument that has a method `event_ndim`, such as an MDP or a regularizer, is mapped leaf by leaf: a leaf with the
    batch axes is mapped, and a leaf without them is shared. Any other argument is an array or a pytree of arrays, all
    of which have the batch axes. None is passed on. Keyword arguments are shared.

    Args:
      batch_ndim: the number of batch axes; None takes it from the first argument that has a `batch_shape`.
      inner_ndim: the number of batch axes, counted from the last, that `function` itself handles, such as the time axis
        of a finite horizon.
    """

    @functools.wraps(function)
    def mapped(*arguments: Any, **shared: Any) -> Any:
        shapes = (argument.batch_shape for argument in arguments if hasattr(argument, "batch_shape"))
        return at(len(next(shapes)) if batch_ndim is None else batch_ndim, arguments, shared)

    def at(depth: int, arguments: tuple, shared: dict) -> Any:
        if depth == inner_ndim:
            return function(*arguments, **shared)
        axes = tuple(_axes(argument, depth) for argument in arguments)
        return jax.vmap(lambda *ones: at(depth - 1, ones, shared), in_axes=axes)(*arguments)

    return mapped


def _axes(argument: Any, depth: int) -> Any:
    """`in_axes` of an argument that has `depth` batch axes."""
    if not hasattr(argument, "event_ndim"):
        return jax.tree.map(lambda _: 0, argument)
    return jax.tree.map(lambda leaf, own: 0 if jnp.ndim(leaf) - own == depth else None, argument, argument.event_ndim())


def merge_axes(tree: Any) -> Any:
    """The first two axes of every array of a pytree as one: groups of trajectories [N, I, ...] as [N I, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def where_mapped(like: Float[Array, "..."], yes: float, no: float) -> Scalar:
    """A number of the dtype of `like`: `yes` where vmap maps that array, `no` where it does not."""

    @jax.custom_batching.custom_vmap
    def number(token: Scalar) -> Scalar:
        return jnp.full_like(token, no)

    @number.def_vmap
    def rule(axis_size: int, in_batched: Any, token: Float[Array, " B"]) -> tuple[Scalar, bool]:
        del axis_size, in_batched
        return jnp.full((), yes, token.dtype), False

    return number(lax.stop_gradient(like.ravel()[0]))
