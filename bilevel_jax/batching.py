"""Batching rules for kernels that must not be batched on a CPU."""

from collections.abc import Callable

import jax
from jax import lax


def one_at_a_time_on_cpu(function: Callable, unless: Callable[..., bool] | None = None) -> Callable:
    """Let vmap run `function` element after element on a CPU, and batched everywhere else.

    `unless(*batched)`, with trees of True where the arguments are mapped, says where the batch gains by
    being advanced together (a matrix that it shares) and `function` makes no LAPACK call.

    XLA's CPU thread pool deadlocks when two batched LAPACK calls are ready at once (measured: most
    runs on 2 cores hang). Single calls never did. The result is not differentiable by itself: use it
    inside `lax.custom_linear_solve` or behind a custom derivative rule.
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
