"""Every method on every registered problem that it applies to; and where that is, as docs/algorithms.md says it.

A new problem or method is here as soon as it is registered.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sampled_helpers import quick_jit

import bilevel_jax as bj
from bilevel_jax.problems import make, names
from bilevel_jax.runner.methods import METHODS
from bilevel_jax.runner.schema import DescentSection

KEYS = jax.random.split(jax.random.key(0), 2)
DOCS = Path(__file__).parent.parent / "docs" / "algorithms.md"
SMALL = {
    "environment_design": {"discount": 0.8, "temperature": 0.1},
    "four_rooms": {"rows": ("s...", ".t..", "...g"), "discount": 0.8, "temperature": 0.05, "horizon": 20},
    "reward_shaping": {"states": 6, "temperature": 0.2, "horizon": 60},
    "synthetic": {"dimension": 20},
    "tax_design": {"grid": 7, "hours_levels": 2, "spending_levels": 2},
}
OPTIONS = {
    "continuation": {"start": 3.0, "steps": 10.0},
    "amd": {"sweeps": 10},
    # One step of the adjoint an iteration, as published, takes hundreds of them until it is a direction of descent.
    "m_sobirl": {"adjoint": DescentSection(steps=20)},
    "pbrl": {"steps": 3},
    "stoc_sobirl": {"iterations": 60},
}
MODEL = ("m_sobirl", "implicit", "continuation", "amd", "pbrl")


@functools.cache
def problem_of(name):
    """A small instance, two starts, and what they pay."""
    problem = make(name, **SMALL.get(name, {}))
    starts = jax.vmap(problem.start)(KEYS)
    return problem, starts, paid(problem, starts)


@quick_jit
def paid(problem, xs):
    return jax.lax.map(lambda x: problem.objective(x, bj.solve(problem.mdp(x), problem.regularizer(x))), xs)


@functools.partial(quick_jit, static_argnums=3)
def train(algorithm, keys, xs, steps):
    def one(key, x):
        state = algorithm.init(key, x)
        return jax.lax.scan(lambda s, k: algorithm.step(k, s), state, jax.random.split(key, steps))

    state, info = jax.vmap(one)(keys, xs)
    return state.x, info.objective, info.gradient_norm


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", names())
def test_every_pair(name, method):
    """Two seeds in one program: finite, and the exact objective goes down; where it does not apply, a refusal."""
    problem, starts, before = problem_of(name)
    options = METHODS[method].options(**OPTIONS.get(method, {}))
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        rate, steps = (0.02, 100) if method == "m_sobirl" else (0.05, 30 if method in MODEL else 60)
        optimizer = optax.adam(rate)
        if METHODS[method].applies(problem, options) is not None:
            with pytest.raises(bj.InputError, match=f"problem: {type(problem).__name__} has no"):
                METHODS[method].build(problem, optimizer, options)
            return
        algorithm = METHODS[method].build(problem, optimizer, options)
        x, objective, norm = train(algorithm, KEYS, starts, steps)
    change = np.asarray(paid(problem, x) - before)
    print(f"{method} on {name}: {np.asarray(before)}, change {change}")
    for leaf in jax.tree.leaves((x, objective, norm)):
        assert bool(jnp.all(jnp.isfinite(leaf)))
    if method in MODEL:
        assert np.all(change < 0)
    elif method != "naive":  # which has other stationary points than the problem
        assert np.mean(change) < 0


def matrix() -> str:
    """Which method applies to which problem, as a table."""
    lines = ["| problem | " + " | ".join(f"`{method}`" for method in METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for name in names():
        marks = [" x " if METHODS[method].applies(problem_of(name)[0]) is None else "   " for method in METHODS]
        lines.append(f"| `{name}` |" + "|".join(marks) + "|")
    return "\n".join(lines)


@pytest.mark.slow
def test_the_documentation_says_where_each_applies():
    assert matrix() in DOCS.read_text(), f"docs/algorithms.md should have this table:\n\n{matrix()}\n"


def test_the_documentation_has_every_method():
    text = DOCS.read_text()
    for method in METHODS:
        assert f"| `{method}` |" in text, method
