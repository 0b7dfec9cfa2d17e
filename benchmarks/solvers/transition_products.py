"""Products of every representation of a kernel, in transitions a second, scipy's CSR product beside them.

    python -m benchmarks.solvers.transition_products [--states 1e4 1e5 1e6] [--dtypes float32 float64] [--repeats 7]

Each of our products runs 5 times inside one compiled loop, as it does in a solver, its result feeding the
next; scipy's 5 times in Python. A transition is one entry [k, s, a]; `bytes` is the least that a product
reads and writes, `copy` the rate of a plain copy measured in the same run.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy import sparse

import bilevel_jax as bj
from benchmarks.common.timing import alternate, summary, write
from bilevel_jax.core.reductions import max_last

ACTIONS, SLOTS, LOOP = 4, 5, 5
DENSE = {"states": 2000, "actions": 8, "batch": 256}


def random_lists(states: int, dtype: Any) -> bj.SuccessorTransition:
    """Uniformly random successors."""
    rng = np.random.default_rng(0)
    successor = rng.integers(states, size=(SLOTS, states, ACTIONS), dtype=np.int32)
    weight = rng.random(successor.shape).astype(dtype)
    return bj.SuccessorTransition(successor, weight / weight.sum(0))


def grid_stencil(states: int, dtype: Any) -> bj.StencilTransition:
    """An open square grid: four moves and staying, with slip 0.1."""
    side = round(states**0.5)
    moves = [(-1, 0), (0, 1), (1, 0), (0, -1)]
    row, column = np.unravel_index(np.arange(side * side), (side, side))
    probability = np.zeros((SLOTS, side * side, ACTIONS), dtype)
    made = np.where(np.eye(ACTIONS, dtype=bool), 0.9, 0.1 / 3).astype(dtype)  # chosen, made
    for k, (i, j) in enumerate(moves):
        inside = (row + i >= 0) & (row + i < side) & (column + j >= 0) & (column + j < side)
        probability[k] = inside[:, None] * made[:, k]
        probability[4] += ~inside[:, None] * made[:, k]
    return bj.StencilTransition([*moves, (0, 0)], probability, (side, side))


def looped(product: Callable) -> Callable:
    """`LOOP` products v -> product(v, *arguments), [S] to [S], in one program, which is not told how many."""
    run = jax.jit(lambda count, v, *rest: lax.fori_loop(0, count, lambda _, v: product(v, *rest), v))
    return functools.partial(run, LOOP)


# What each product computes, [S] to [S]; folding happens before the clock.
def sweep(v, kernel, reward):
    """max_a of r + 0.9 P v: `expect` and a reduction over the actions."""
    return max_last(reward + v.dtype.type(0.9) * kernel.expect(v))


def push(v, kernel, policy):
    """The transposed product without folding."""
    return kernel.push(policy * v[:, None])


def apply(v, operator):
    """M v."""
    return operator.apply(v)


def apply_transpose(v, operator):
    """M' v."""
    return operator.apply_transpose(v)


def calls_of(kernel: bj.Transition, dtype: Any) -> dict[str, Callable]:
    """A blocked call of each product of one kernel."""
    states, actions = kernel.shape
    rng = np.random.default_rng(1)
    v = jnp.asarray(rng.random(states).astype(dtype))
    reward = jnp.asarray(rng.random((states, actions)).astype(dtype))
    policy = jnp.asarray(rng.dirichlet(np.ones(actions), states).astype(dtype))
    action = jnp.asarray(rng.integers(actions, size=states, dtype=np.int32))
    folded = jax.jit(lambda k, w: k.under(w))(kernel, policy)
    chosen = jax.jit(lambda k, a, w: k.select(a, w))(kernel, action, jnp.ones_like(v))
    made = {
        "sweep": (sweep, kernel, reward),
        "push": (push, kernel, policy),
        "folded apply": (apply, folded),
        "folded apply_transpose": (apply_transpose, folded),
        "selected apply": (apply, chosen),
    }
    return {name: functools.partial(looped(f), v, *rest) for name, (f, *rest) in made.items()}


def scipy_calls(lists: bj.SuccessorTransition, dtype: Any) -> dict[str, Callable]:
    """The same with scipy's CSR: rows (s, a), and rows s folded under a policy."""
    slots, states, actions = lists.successor.shape
    rng = np.random.default_rng(1)
    v = rng.random(states).astype(dtype)
    policy = rng.dirichlet(np.ones(actions), states).astype(dtype)
    columns = np.asarray(lists.successor).transpose(1, 2, 0)
    weight = np.asarray(lists.probability).transpose(1, 2, 0)
    pairs, rows = states * actions, np.arange(states + 1) * slots * actions
    matrix = sparse.csr_matrix((weight.ravel(), columns.ravel(), np.arange(pairs + 1) * slots), (pairs, states))
    folded = sparse.csr_matrix(((weight * policy[..., None]).ravel(), columns.ravel(), rows), (states, states))
    transposed = folded.T.tocsr()
    made = {"expect": (matrix, v), "folded apply": (folded, v), "folded apply_transpose": (transposed, v)}
    return {name: lambda m=m, v=v: [m @ v for _ in range(LOOP)] for name, (m, v) in made.items()}


def least_bytes(name: str, kernel: Any, dtype: Any) -> int:
    """What a product must read and write, each array once."""
    states, actions = kernel.shape
    width, entries = np.dtype(dtype).itemsize, kernel.terms * states * actions
    stencil = isinstance(kernel, bj.StencilTransition)
    if name == "selected apply" or (stencil and name.startswith("folded")):
        entries //= actions
    pairs = states * actions * width if name in ("sweep", "push") else 0
    return entries * (width + (0 if stencil else 4)) + pairs + 2 * states * width


def figures(taken: list[float], transitions: int, moved: int) -> dict[str, float]:
    """Rates of calls that each made `LOOP` products."""
    each = {key: value / LOOP for key, value in summary(taken).items() if key != "runs"}
    return {
        "ms": 1e3 * each["median"],
        "ms_min": 1e3 * each["min"],
        "million_transitions_per_s": transitions / each["median"] / 1e6,
        "least_GB_per_s": moved / each["median"] / 1e9,
    }


def sparse_forms(states: int, dtype: Any, repeats: int) -> dict[str, Any]:
    """Successor lists with and without predecessors, on random successors and a grid; stencils on the grid."""
    lists, stencil = random_lists(states, dtype), grid_stencil(states, dtype)
    on_grid = stencil.to_successors()
    kernels = {
        "random successors": lists,
        "random successors, with predecessors": lists.with_predecessors(),
        "grid successors": on_grid,
        "grid successors, with predecessors": on_grid.with_predecessors(),
        "grid stencil": stencil,
    }
    calls, sizes = {}, {}
    for form, kernel in kernels.items():
        for name, call in calls_of(kernel, dtype).items():
            calls[form, name] = call
            entries = kernel.terms * kernel.shape[0] * kernel.shape[1]
            sizes[form, name] = (entries, least_bytes(name, kernel, dtype))
    for form, kernel in [("random scipy CSR", lists), ("grid scipy CSR", on_grid)]:
        for name, call in scipy_calls(kernel, dtype).items():
            calls[form, name] = call
            sizes[form, name] = (kernel.successor.size, least_bytes(name, kernel, dtype))
    one = jnp.zeros(lists.probability.size, lists.dtype)
    copy = looped(lambda x: x + 1)
    calls["copy", "copy"] = functools.partial(copy, one)
    sizes["copy", "copy"] = (one.size, 2 * one.nbytes)
    taken = alternate(calls, repeats)
    out: dict[str, Any] = {}
    for (form, name), seconds in taken.items():
        out.setdefault(form, {})[name] = figures(seconds, *sizes[form, name])
    return out


def dense_shared(repeats: int) -> dict[str, Any]:
    """A batch of values over one dense kernel, float32, beside the bare matrix product of that shape."""
    states, actions, batch = DENSE.values()
    rng = np.random.default_rng(0)
    probability = rng.random((states, actions, states), dtype=np.float32)
    kernel = bj.DenseTransition(probability / probability.sum(-1, keepdims=True))
    v = jnp.asarray(rng.random((batch, states), dtype=np.float32))
    reward = jnp.asarray(rng.random((batch, states, actions), dtype=np.float32))
    flat = kernel.probability.reshape(-1, states)
    regularizer = bj.ShannonEntropy(jnp.float32(0.1))
    every = functools.partial(jax.vmap, in_axes=(None, 0))

    def backup(kernel, v, reward):
        return regularizer.conjugate(reward + jnp.float32(0.9) * kernel.expect(v))

    products = {
        "bare [SA, S] @ [S, B]": (jax.jit(jnp.matmul), flat, jnp.asarray(np.ascontiguousarray(np.asarray(v).T))),
        "bare [B, S] @ [SA, S]'": (jax.jit(lambda p, v: lax.dot_general(v, p, (((1,), (1,)), ((), ())))), flat, v),
        "expect": (jax.jit(every(lambda k, v: k.expect(v))), kernel, v),
        "push": (jax.jit(every(lambda k, d: k.push(d))), kernel, reward),
        "Shannon sweep": (jax.jit(jax.vmap(backup, in_axes=(None, 0, 0))), kernel, v, reward),
    }
    taken = alternate({name: functools.partial(f, *rest) for name, (f, *rest) in products.items()}, repeats)
    work = 2 * batch * states * actions * states / 1e9
    return {name: {**summary(s), "GFLOP_per_s": work / summary(s)["median"]} for name, s in taken.items()}


def main() -> None:
    """Measure and write benchmarks/results/transition_products.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", type=float, nargs="+", default=[1e4, 1e5, 1e6])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--name", default="transition_products")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    out: dict[str, Any] = {"actions": ACTIONS, "slots": SLOTS, "dense": DENSE}
    out["dense, shared by a batch"] = dense_shared(options.repeats)
    for states in options.states:
        for dtype in options.dtypes:
            out[f"{int(states)} states, {dtype}"] = sparse_forms(int(states), dtype, options.repeats)
    write(options.name, out)


if __name__ == "__main__":
    main()
