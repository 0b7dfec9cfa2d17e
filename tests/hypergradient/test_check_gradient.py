"""`check_gradient`: silent on what is right, and its finger on what is wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    STATES,
    random_process,
    upper_mdp,
    upper_objective,
    upper_problem,
    upper_regularizer,
    upper_start,
)

import bilevel_jax as bj
from bilevel_jax.hypergradient import check

PROCESS = random_process(11)
REGULARIZER = functools.partial(upper_regularizer, kind="kl")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "contexts"), [("kl", True), ("tsallis", False)])
def test_right_problems_pass(kind, contexts, capsys):
    report = bj.check_gradient(upper_problem(kind, contexts), upper_start(), directions=2)
    assert report.ok, str(report)
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    assert printed.endswith("All agree\n")
    assert len(report.totals) == 4
    assert {row.part for row in report.parts} >= {
        "mdp(x).transition.probability",
        "mdp(x).reward",
        "mdp(x).discount",
        "regularizer(x).temperature",
        "T_x V* at fixed V*",
        "objective in x, solution fixed",
        "objective in V, x fixed",
    }


@pytest.mark.slow
def test_a_second_check_and_one_of_another_x_compile_nothing():
    problem = upper_problem("shannon")
    programs = [getattr(check, name) for name in ("_along_each", "_along_parts", "_modulus", "_directions")]
    bj.check_gradient(problem, upper_start(), directions=1, verbose=False)
    before = [program._cache_size() for program in programs]
    report = bj.check_gradient(problem, upper_start(2), directions=1, verbose=False)
    assert report.ok, str(report)
    assert [program._cache_size() for program in programs] == before


def rounded_reward(x):
    mdp = upper_mdp(x)
    return mdp.replace(reward=mdp.reward + 0.3 * jax.lax.stop_gradient(x["reward"]))


def stopped_transition(x):
    return upper_mdp(x | {"transition": jax.lax.stop_gradient(x["transition"])})


def stopped_temperature(x):
    return REGULARIZER(x | {"temperature": jax.lax.stop_gradient(x["temperature"])})


def hard_choice(x, solution):
    return upper_objective(x, solution) + jnp.sum(jax.lax.stop_gradient(solution.policy) ** 2)


def stopped_price(x, solution):
    return upper_objective(x, solution) + jnp.sum(jax.lax.stop_gradient(x["reward"]) ** 2)


@jax.custom_jvp
def squares(v):
    return v**2


@squares.defjvp
def _squares_jvp(primals, tangents):
    return primals[0] ** 2, 2.1 * primals[0] * tangents[0]


WRONG = {
    "mdp(x).reward": (rounded_reward, REGULARIZER, upper_objective),
    "mdp(x).transition.probability": (stopped_transition, REGULARIZER, upper_objective),
    "regularizer(x).temperature": (upper_mdp, stopped_temperature, upper_objective),
    "objective in V, x fixed": (upper_mdp, REGULARIZER, hard_choice),
    "objective in x, solution fixed": (upper_mdp, REGULARIZER, stopped_price),
}


@pytest.mark.often(2)
@pytest.mark.slow
@pytest.mark.parametrize("part", WRONG)
def test_it_says_which_part_is_wrong(part):
    report = bj.check_gradient(bj.BilevelProblem(*WRONG[part]), upper_start(), directions=1, verbose=False)
    wrong = {row.part for row in report.parts if not row.agrees}
    assert part in wrong
    # What is made of a wrong leaf is wrong, too; nothing else.
    assert wrong - {part} <= {"T_x V* at fixed V*"}
    assert not report.ok
    assert not report.totals[0].agrees  # differences of phi
    assert f"{part}" in str(report).splitlines()[-1]


@pytest.mark.slow
def test_a_wrong_derivative_rule():
    objective = lambda x, s: jnp.sum(squares(s.value)) + upper_objective(x, s)  # noqa: E731
    report = bj.check_gradient(bj.BilevelProblem(upper_mdp, REGULARIZER, objective), upper_start(), verbose=False)
    assert [row.part for row in report.parts if not row.agrees] == ["objective in V, x fixed"]


@pytest.mark.slow
def test_it_says_that_a_solve_failed():
    report = bj.check_gradient(
        upper_problem("kl"), upper_start(), method=bj.Implicit(bj.ValueIteration(max_iterations=3)), verbose=False
    )
    assert all(row.agrees for row in report.parts)
    assert any("solve: the maximum number of iterations" in line for line in report.failures)
    assert not report.ok
    assert "an iteration did not converge" in str(report)
    assert report.error > 0.01


@pytest.mark.slow
def test_a_kink_is_no_wrong_part():
    # Two actions with the same reward, unregularized: the value has a kink in x at 0.
    problem = bj.BilevelProblem(
        lambda x: bj.MDP(PROCESS.dense[:, :1].repeat(2, 1), jnp.stack([x, -x], -1), 0.8),
        bj.Unregularized(),
        lambda x, s: jnp.sum(s.value),
    )
    report = bj.check_gradient(problem, jnp.zeros(STATES), verbose=False)
    assert not report.ok
    assert "T_x V* at fixed V*" in str(report) or "kink" in str(report)
    away = bj.check_gradient(problem, jnp.linspace(0.5, 1, STATES), verbose=False)
    assert away.ok, str(away)


@pytest.mark.slow
def test_nan_disagrees():
    x = upper_start()
    x["reward"] = x["reward"].at[0, 0].set(jnp.nan)
    problem = bj.BilevelProblem(
        lambda x: bj.MDP(PROCESS.dense, jnp.where(jnp.isnan(x["reward"]), 0, x["reward"]), 0.8),
        bj.ShannonEntropy(0.5),
        lambda x, s: jnp.sum(s.policy * x["reward"]),
    )
    report = bj.check_gradient(problem, x, verbose=False, directions=1)
    assert not report.ok


@pytest.mark.slow
def test_float32():
    problem = bj.BilevelProblem(
        lambda x: bj.MDP(PROCESS.dense.astype(np.float32), x, 0.8),
        bj.ShannonEntropy(0.5),
        lambda x, s: jnp.sum(s.policy**2) + jnp.sum(s.value),
    )
    report = bj.check_gradient(problem, jnp.float32(PROCESS.reward), verbose=False)
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"directions": 0}, "directions must be"), ({"step": -1}, "step must")]
)
def test_bad_input(arguments, message):
    with pytest.raises(bj.InputError, match=message):
        bj.check_gradient(upper_problem("kl"), upper_start(), **arguments)
