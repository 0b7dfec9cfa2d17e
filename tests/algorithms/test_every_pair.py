"""Every algorithm on every registered problem that it applies to; and where that is, as docs/algorithms.md says it.

A new problem or algorithm is here as soon as it is registered.
"""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import WITH_MODEL
from sampled_helpers import quick_jit

import bilevel_jax as bj
from bilevel_jax.algorithms import Cooling, UpperLevel, algorithm_names, make_algorithm, requires
from bilevel_jax.problems import make, names

KEYS = jax.random.split(jax.random.key(0), 2)
DOCS = Path(__file__).parents[2] / "docs" / "algorithms.md"
SMALL = {
    "environment_design": {"discount": 0.8, "temperature": 0.1},
    "four_rooms": {"rows": ("s...", ".t..", "...g"), "discount": 0.8, "temperature": 0.05, "horizon": 20},
    "reward_shaping": {"states": 6, "temperature": 0.2, "horizon": 60},
    "synthetic": {"dimension": 20},
    "tax_design": {"grid": 7, "hours_levels": 2, "spending_levels": 2},
}
SAMPLED = (
    "agent_alone",
    "attenuating_actor_critic",
    "two_policy_penalty",
    "sobirl",
    "hpgd",
    "bc_hg",
    "zero_order",
    "naive",
)
OPTIONS = {
    "amd": {"sweeps": 10},
    # One step of the adjoint per iteration, as published, takes hundreds of them until it is a direction of descent.
    "m_sobirl": {"adjoint": bj.Descent(iterations=20)},
    "pbrl": {"policy_updates": 3},
    "stoc_sobirl": {"iterations": 60},
    "basin_hopping": {"descent": 5},
    **{name: {"batch": 10} for name in SAMPLED},
}
MODEL = ("m_sobirl", "implicit", "implicit, cooling", "basin_hopping", "amd", "pbrl")
METHODS = (*algorithm_names(), "implicit, cooling")


@functools.cache
def registered_problem(name):
    return make(name, **SMALL.get(name, {}))


@functools.cache
def problem_of(name):
    """A small instance, two starts, and what they pay."""
    problem = registered_problem(name)
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


def pairs():
    """All with a model; CI has every algorithm on three problems, and every problem with two algorithms."""
    for name in WITH_MODEL:
        for method in METHODS:
            often = name in ("garnet", "tabular_rlhf", "tax_design") or method in ("m_sobirl", "implicit")
            yield pytest.param(name, method, marks=() if often else pytest.mark.nightly)


@pytest.mark.often(8)
@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), list(pairs()))
def test_every_pair(name, method):
    """Two seeds in one program: finite, and the exact objective goes down; where it does not apply, a refusal."""
    problem, starts, before = problem_of(name)
    registered, _, cooling = method.partition(", ")
    options = OPTIONS.get(registered, {})
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        rate, steps = (0.02, 100) if method == "m_sobirl" else (0.05, 30 if method in MODEL else 60)
        steps = 6 if method == "basin_hopping" else steps
        upper = UpperLevel(optax.adam(rate), temperature=Cooling(3.0, 10.0) if cooling else None)
        if requires(registered, problem) is not None:
            with pytest.raises(bj.InputError, match=f"problem: {type(problem).__name__} has "):
                make_algorithm(registered, problem, upper, **options)
            return
        algorithm = make_algorithm(registered, problem, upper, **options)
        x, objective, norm = train(algorithm, KEYS, starts, steps)
    change = np.asarray(paid(problem, x) - before)
    print(f"{method} on {name}: {np.asarray(before)}, change {change}")
    for leaf in jax.tree.leaves((x, objective, norm)):
        assert bool(jnp.all(jnp.isfinite(leaf)))
    if method in MODEL:
        assert np.all(change < 0)
    elif method == "agent_alone":
        assert np.all(change == 0)
    elif method != "naive":  # which has other stationary points than the problem
        assert np.mean(change) < 0


def matrix() -> str:
    """Which algorithm applies to which problem, as a table."""
    methods = algorithm_names()
    lines = ["| problem | " + " | ".join(f"`{method}`" for method in methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for name in names():
        marks = [" x " if requires(method, registered_problem(name)) is None else "   " for method in methods]
        lines.append(f"| `{name}` |" + "|".join(marks) + "|")
    return "\n".join(lines)


@pytest.mark.slow
def test_the_documentation_says_where_each_applies():
    assert matrix() in DOCS.read_text(), f"docs/algorithms.md should have this table:\n\n{matrix()}\n"


def test_the_documentation_has_every_method():
    text = DOCS.read_text()
    for method in algorithm_names():
        assert f"| `{method}` |" in text, method


@pytest.mark.slow
def test_the_template_of_an_algorithm():
    """The code of the page's last section, as it stands there."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text().split("## Your own")[1], re.DOTALL)
    made: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, str(DOCS), "exec"), made)
    state, info, algorithm = made["state"], made["info"], made["algorithm"]
    assert int(state.iteration) == 3
    assert state.memory.shape == (2, 104)
    problem = algorithm.problem
    assert algorithm.requires(problem) is None
    assert algorithm.requires(object()) == "has no model"
    # The last info is about the x before the last step.
    before, _ = algorithm.step(KEYS[0], algorithm.init(KEYS[0], problem.start(jax.random.key(1))))
    before, _ = algorithm.step(KEYS[0], before)
    solution = bj.solve(problem.mdp(before.x), problem.regularizer(before.x))
    np.testing.assert_allclose(info.objective, problem.objective(before.x, solution), rtol=1e-9)
    direct = jax.grad(problem.objective)(before.x, jax.lax.stop_gradient(solution))
    np.testing.assert_allclose(info.gradient, direct, rtol=1e-6, atol=1e-12)
    assert info.transitions > 2 * problem.mdp(before.x).reward.size
