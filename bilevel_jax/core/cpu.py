"""What XLA's CPU needs and other devices do not: kernels that run one at a time, and arrays that lie in memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def one_at_a_time_on_cpu(function: Callable, unless: Callable[..., bool] | None = None) -> Callable:
    """Let vmap run `function` for one element after another on a CPU, and as a batch on every other device.

    Two batched LAPACK calls that are ready at the same time deadlock the thread pool of XLA's CPU backend (measured:
    most runs on 2 cores hang). Single calls never did. The result is not differentiable by itself: use it inside
    `lax.custom_linear_solve` or behind a custom derivative rule.

    Args:
      unless: a function of pytrees that are True where the arguments are mapped. It returns True where the batch gains
        from being advanced together, for instance because it shares a matrix, and `function` makes no LAPACK call.
    """
    # The rule below and each further use would trace `function` again; a jitted one is traced once for its shapes.
    function = jax.jit(function)
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(axis_size, in_batched, *args):
        del axis_size
        leaves, structure = jax.tree.flatten(args)
        is_batched = jax.tree.leaves(in_batched)
        moving = [leaf for leaf, batched in zip(leaves, is_batched, strict=True) if batched]

        def call(moving_leaves, run):
            rest = iter(moving_leaves)
            merged = [next(rest) if batched else leaf for leaf, batched in zip(leaves, is_batched, strict=True)]
            return run(*jax.tree.unflatten(structure, merged))

        def sequential(*moving_leaves):
            # `mapped`, not `function`: a further vmap over this loop meets the same rule again.
            return lax.map(lambda one: call(one, mapped), list(moving_leaves))

        def batched(*moving_leaves):
            return jax.vmap(lambda one: call(one, function))(list(moving_leaves))

        if unless is not None and unless(*in_batched):
            out = batched(*moving)
        else:
            out = lax.platform_dependent(*moving, cpu=sequential, default=batched)
        return out, jax.tree.map(lambda _: True, out)

    return mapped


def in_memory(*arrays: Float[Array, "..."]) -> tuple[Float[Array, "..."], ...]:
    """Return the arrays, each computed once before anything that uses it.

    XLA's CPU backend computes the operand of a reduction inside it: entry by entry, on one thread, and again for each
    reduction. A value that enters a loop has to lie in memory. The loop here ends before its first round, since no
    number is below -inf.
    """

    def through_a_loop(*arrays):
        never = arrays[0].ravel()[0] < -jnp.inf
        return lax.while_loop(
            lambda carry: carry[1], lambda carry: (tuple(-array for array in carry[0]), carry[1]), (arrays, never)
        )[0]

    return lax.platform_dependent(*arrays, cpu=through_a_loop, default=lambda *arrays: arrays)
