"""Every value of every option that is a choice: built with all other options traced, as a sweep does, it runs.

Choices are read from the types of the options, so that a new problem is here as soon as it is registered.
"""

import dataclasses
import functools
import itertools
import typing

import jax
import numpy as np
import pytest
from environment_helpers import Anything

import bilevel_jax as bj
from bilevel_jax.core.functions import Table
from bilevel_jax.core.options import choices
from bilevel_jax.environments import rollout

KEY = jax.random.key(0)
MAP = ("sd ", " x ", "t g")
SMALL = {
    "environment_design": {"rows": ("so ", "t g")},
    "four_rooms": {"rows": MAP, "horizon": 3},
    "garnet": {"states": 3, "actions": 2, "branching": 2, "horizon": 3},
    "inverse_rl": {"rows": ("s.~", "..g")},
    "multi_follower": {"followers": 2, "states": 3, "actions": 2, "branching": 2},
    "reward_shaping": {"horizon": 3},
    "stackelberg": {"states": 3, "actions": 2, "branching": 2, "leader_actions": 2},
    "synthetic": {"states": 3, "actions": 2, "dimension": 2},
    "tabular_rlhf": {"states": 3, "actions": 2, "starts": 2, "length": 2},
    "tax_design": {"grid": 5, "hours_levels": 2, "spending_levels": 2},
}
# Choices that are no type's: what is given instead of a default that means that there is none.
OTHER = {
    "four_rooms": [{"transition": "dense", "goals": ((0, 2), (2, 2)), "origin": (0, 0), "target": (2, 0)}],
    "inverse_rl": [{"demonstrations": 3, "length": 4}],
    "multi_follower": [{"features": 2}],
    "reward_shaping": [{"layout": "grid", "rows": MAP}],
    "tabular_rlhf": [{"features": 2, "regularizer": "kl"}],
}


def fields_of(name):
    options = bj.problems.spec(name).options
    hints = typing.get_type_hints(options)
    return [(field.name, hints[field.name], field.default) for field in dataclasses.fields(options)]


def combinations(name):
    """All of the values of the problem's choices, as options."""
    valid = {option: choices(hint) for option, hint, _ in fields_of(name) if choices(hint)}
    return [dict(zip(valid, values, strict=True)) for values in itertools.product(*valid.values())]


CASES = [
    pytest.param(name, SMALL.get(name, {}) | chosen, id="-".join([name, *map(str, chosen.values())]))
    for name in bj.problems.names()
    for chosen in [*combinations(name), *OTHER.get(name, [])]
]


def numbers_of(name, chosen):
    """Two values of each option that a sweep may change: numbers, and the seed."""
    pairs = {o: d * np.array([1, 0.9]) for o, hint, d in fields_of(name) if hint is float and o not in chosen}
    if name == "four_rooms":
        pairs["closed"] = np.array([0.2, 0.1])
    if chosen.get("environment") == "cart_pole":
        pairs.pop("effort", None)  # of which there is no choice
    return pairs | {o: np.array([0, 1]) for o, _, _ in fields_of(name) if o == "seed"}


def one_step(problem):
    """What algorithms ask of a problem once: a gradient if there is a model, a loss if there is a simulator."""
    x = problem.start(KEY)
    made = []
    if isinstance(problem, bj.Problem):
        made += jax.tree.leaves(bj.hypergradient(problem, x, with_error=False).gradient)
    if isinstance(problem, bj.SampledProblem):
        drawn = rollout(
            KEY, problem.environment, policy_of(problem, x), batch=problem.trajectories, horizon=problem.horizon
        )
        made.append(problem.loss(KEY, x, drawn))
    return made


def policy_of(problem, x):
    """One that prefers what the problem pays for where it pays for actions, else one that does not look."""
    reward = problem.reward(x)
    if isinstance(reward, Table):
        return Table(jax.nn.softmax(reward.values))
    return Anything(problem.environment.action_space)


def build(name, chosen, numbers):
    return bj.problems.make(name, **chosen, **numbers)


def test_choices_are_found():
    assert combinations("four_rooms") == [
        {"penalties": penalties, "variable": variable, "transition": transition}
        for penalties in ("cells", "doors")
        for variable in ("weights", "network")
        for transition in ("dense", "successor", "stencil")
    ]
    assert len(CASES) >= 30
    for name in bj.problems.names():
        texts = {option for option, hint, _ in fields_of(name) if hint is str}
        assert texts <= {"grounds", "demonstrations_file", "gymnax", "saved"}, (
            f"{name}: a text of which some are valid is a Literal"
        )


@pytest.mark.parametrize(("name", "chosen"), CASES)
def test_every_choice_is_built_of_traced_numbers(name, chosen):
    numbers = numbers_of(name, chosen)
    made = jax.eval_shape(jax.vmap(functools.partial(build, name, chosen)), numbers)
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(made))


@pytest.mark.often(4)
@pytest.mark.slow
@pytest.mark.parametrize(("name", "chosen"), CASES)
def test_every_choice_runs_with_traced_numbers(name, chosen):
    numbers = numbers_of(name, chosen)

    def run(numbers):
        problem = build(name, chosen, numbers)
        return problem, one_step(problem)

    swept, steps = jax.jit(jax.vmap(run))(numbers)
    assert all(np.isfinite(step).all() for step in steps)
    for k in range(2):
        alone = build(name, chosen, {option: pair[k].item() for option, pair in numbers.items()})
        assert jax.tree.structure(swept) == jax.tree.structure(alone)
        for got, want in zip(jax.tree.leaves(swept), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(got[k], want, rtol=1e-9, atol=1e-12)
