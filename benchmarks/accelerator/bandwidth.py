"""Bytes a second of a Bellman sweep, against a plain copy of as many bytes in the same run.

Counted is what a sweep must read and write, each array once. Shannon entropy; 4 actions; 4 random successors per pair,
or an open grid as a stencil of 5. Arrays are larger than caches.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from benchmarks.solvers import scale

STATES = {"dense": 4096, "successor": 10**6, "stencil": 10**6}
TOY = {"dense": 32, "successor": 100, "stencil": 100}
ROUNDS, REPEATS = 20, 15


def cases(toy: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """A case per form of the transitions and dtype."""
    return {
        f"{form}, {dtype.__name__}": functools.partial(measure, form, states, dtype, 2 if toy else REPEATS)
        for form, states in (TOY if toy else STATES).items()
        for dtype in (np.float32, np.float64)
    }


def measure(form: str, states: int, dtype: Any, repeats: int) -> dict[str, Any]:
    """Rates in GB/s, medians of `repeats` loops of ROUNDS sweeps."""
    mdp = dense(states, dtype) if form == "dense" else scale.build(_name(form), states, dtype)
    mdp = jax.block_until_ready(mdp)
    regularizer = bj.ShannonEntropy(dtype(scale.TEMPERATURE))
    value = jnp.max(mdp.reward, -1)
    rates = scale.bandwidth(mdp, regularizer, value, repeats, ROUNDS)
    return {"states": mdp.num_states, "bytes_per_sweep": scale.swept_bytes(mdp), **rates}


def dense(states: int, dtype: Any) -> bj.MDP:
    """Random rows, all entries above 0."""
    rng = np.random.default_rng(states)
    probability = rng.random((states, scale.ACTIONS, states), dtype) + dtype(1e-2)
    probability /= probability.sum(-1, keepdims=True)
    reward = rng.standard_normal((states, scale.ACTIONS), dtype)
    return bj.MDP(bj.DenseTransition(probability), jnp.asarray(reward), scale.DISCOUNT)


def _name(form: str) -> str:
    return {"successor": "random", "stencil": "grid"}[form]
