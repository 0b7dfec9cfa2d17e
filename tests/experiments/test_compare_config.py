"""Configs of comparisons: what is refused and how it is said, and what the accepted ones become."""

from pathlib import Path

import pytest
import yaml
from experiment_helpers import command, write

import bilevel_jax as bj
from bilevel_jax.algorithms import registry
from bilevel_jax.core.errors import InputError
from bilevel_jax.experiments.choices import choices
from bilevel_jax.experiments.comparison import load_comparison as load
from bilevel_jax.experiments.keys import CompareSection

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "compare").glob("*.yaml"))

GOOD = """\
problems:
  - {name: garnet, states: 3, actions: 2, branching: 1, horizon: 5}
  - name: synthetic
    label: small
    states: 3
    budget: {transitions: 500, seconds: 2.5}
algorithms:
  - name: m_sobirl
    solver: policy_iteration
    adjoint: descent
    grid: {learning_rate: [0.1, 1], adjoint.step_size: [0.3]}
  - {name: implicit, optimizer: lbfgs}
  - hpgd
tuning_seeds: [7]
"""


@pytest.mark.slow  # builds all problems
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_of_the_repository(path):
    comparison = load(path)
    assert comparison.cells
    # The written config is a config, and the same one.
    assert {cell.sections["algorithm"]["name"] for cell in comparison.cells} <= set(bj.algorithms.algorithm_names())


@pytest.mark.slow
def test_defaults_and_abbreviations_are_filled_in(tmp_path):
    values = load(write(tmp_path, GOOD)).values
    garnet, small = values["problems"]
    assert (garnet["label"], garnet["budget"], garnet["discount"]) == ("garnet", None, 0.9)
    assert small["budget"] == {"transitions": 500, "seconds": 2.5, "iterations": None}
    descent, newton, hpgd = values["algorithms"]
    assert descent["solver"] == {
        "name": "policy_iteration",
        "tolerance": None,
        "max_iterations": 1000,
        "linear_solver": None,
    }
    assert descent["grid"] == {"learning_rate": [0.1, 1.0], "adjoint.step_size": [0.3]}
    assert descent["optimizer"].items() >= {"name": "adam", "learning_rate": 0.05, "clip_norm": None}.items()
    assert newton["optimizer"] == {"name": "lbfgs", "memory_size": 10, "line_search_steps": 20}
    assert hpgd["agent"] is None
    defaults = CompareSection()
    assert values["seeds"] == defaults.seeds
    assert values["budget"] == {"transitions": 1_000_000, "seconds": None, "iterations": None}


def test_cells(tmp_path):
    cells = load(write(tmp_path, GOOD)).cells
    assert [cell.name for cell in cells][:2] == ["garnet, m_sobirl", "garnet, implicit"]
    first = cells[0]
    assert first.settings == [
        {"optimizer.learning_rate": 0.1, "algorithm.adjoint.step_size": 0.3},
        {"optimizer.learning_rate": 1.0, "algorithm.adjoint.step_size": 0.3},
    ]
    assert first.runs == [(place, seed) for place in (0, 1) for seed in (7, 0, 1, 2, 3, 4)]
    assert cells[1].runs == [(0, seed) for seed in range(5)], "one point needs no tuning"
    assert first.at(1)["optimizer"]["learning_rate"] == 1.0
    assert first.at(1)["algorithm"]["adjoint"]["step_size"] == 0.3
    assert [cell.limits["transitions"] for cell in cells] == [1_000_000] * 3 + [500] * 3
    assert len({cell.key for cell in cells}) == 6


def test_a_number_that_two_have_goes_by_its_whole_key(tmp_path, monkeypatch):
    """learning_rate: is it the optimizer's, or that of a user's own algorithm?"""
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))

    def rated(problem, upper, *, learning_rate: float = 0.1) -> bj.algorithms.Algorithm:
        return bj.algorithms.implicit(problem, upper)

    bj.algorithms.register_algorithm("rated", rated)
    text = "problems: [garnet]\ntuning_seeds: [7]\nalgorithms: [{name: rated, grid: {%s: [0.1, 1]}}]\n"
    for key in ("algorithm.learning_rate", "optimizer.learning_rate"):
        (cell,) = load(write(tmp_path, text % key)).cells
        assert cell.settings == [{key: 0.1}, {key: 1.0}]
    with pytest.raises(bj.InputError, match=r"no number to tune.*valid:.* optimizer.learning_rate, .*algorithm.learn"):
        load(write(tmp_path, text % "learning_rate"))


def test_a_cell_is_keyed_by_what_its_results_depend_on(tmp_path):
    path = write(tmp_path, GOOD)

    def keys(*overrides):
        return [cell.key for cell in load(path, overrides).cells]

    base = keys()
    assert keys("problems.0.label=other", "algorithms.2.label=another") == base
    changed = keys("algorithms.2.batch=3")
    assert [a == b for a, b in zip(base, changed, strict=True)] == [True, True, False] * 2
    changed = keys("problems.1.discount=0.4")
    assert [a == b for a, b in zip(base, changed, strict=True)] == [True] * 3 + [False] * 3
    # A problem with a budget of its own does not see the common one.
    changed = keys("budget.transitions=1234")
    assert [a == b for a, b in zip(base, changed, strict=True)] == [False] * 3 + [True] * 3
    for override in ("seeds=[9]", "tuning_seeds=[8]", "points=3", "first=0.5"):
        assert not set(keys(override)) & set(base), override


def test_a_written_config_is_the_same_config(tmp_path):
    comparison = load(write(tmp_path, GOOD))
    again = load(write(tmp_path, yaml.safe_dump(comparison.values), "again.yaml"))
    assert again.values == comparison.values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("algorithms: [hpgd]", "problems (config.yaml, line 1): give a list of names"),
        ("problems: [garnet]", "algorithms (config.yaml, line 1): give a list of names"),
        ("problems: []\nalgorithms: [hpgd]", "problems (config.yaml, line 1): give a list"),
        (
            "problems: [garnets]\nalgorithms: [hpgd]",
            "problems.0.name (config.yaml, line 1): no problem 'garnets', did",
        ),
        (
            "problems: [garnet]\nalgorithms: [hpdg]",
            "algorithms.0.name (config.yaml, line 2): no algorithm 'hpdg', did you mean",
        ),
        (
            "problems: [{name: garnet, state: 3}]\nalgorithms: [hpgd]",
            "problems.0.state (config.yaml, line 1): unknown",
        ),
        (
            "problems:\n  - garnet\n  - {name: garnet, label: b, discount: 1.0}\nalgorithms: [hpgd]",
            "problems.1.discount (config.yaml, line 3): discount must be at least 0 and below 1",
        ),
        (
            "problems: [garnet]\nalgorithms:\n  - hpgd\n  - {name: naive, bach: 3}",
            "algorithms.1.bach (config.yaml, line 4): unknown key, did you mean 'batch'?; valid: name, label, grid",
        ),
        (
            "problems: [garnet]\nalgorithms: [{name: m_sobirl, solver: {name: policy_iter}}]",
            "algorithms.0.solver.name (config.yaml, line 2): no choice 'policy_iter', did you mean 'policy_iteration'?",
        ),
        (
            "problems: [garnet]\nalgorithms: [{name: m_sobirl, solver: {name: auto, max_step: 3}}]",
            "algorithms.0.solver.max_step (config.yaml, line 2): unknown key, did you mean 'max_iterations'?",
        ),
        (
            "problems: [garnet]\nalgorithms: [{name: hpgd, optimizer: lbfgs}]",
            "algorithms.0.optimizer.name (config.yaml, line 2): no optimizer 'lbfgs'",
        ),
        (
            "problems: [garnet]\nalgorithms: [{name: hpgd, optimizer: {learning_rte: 1.0}}]",
            "algorithms.0.optimizer.learning_rte (config.yaml, line 2): unknown key, did you mean 'learning_rate'?",
        ),
        (
            "problems: [garnet]\nalgorithms: [{name: hpgd, grid: {agent: [1, 2]}}]",
            "algorithms.0.grid.agent (config.yaml, line 2): no number to tune",
        ),
        (
            "problems: [garnet]\nalgorithms: [{name: bc_hg, grid: {critic_step_siz: [0.1]}}]",
            "grid.critic_step_siz (config.yaml, line 2): no number to tune, did you mean 'critic_step_size'?",
        ),
        (
            "problems: [garnet]\nalgorithms: [{name: hpgd, grid: {learning_rate: 0.1}}]",
            "algorithms.0.grid.learning_rate (config.yaml, line 2): expected a list of numbers, got 0.1",
        ),
        (
            "problems: [garnet]\nalgorithms: [{name: hpgd, grid: {learning_rate: [0.1, -1]}}]",
            "learning_rate (config.yaml, line 2): Input should be greater than 0, got -1",
        ),
        (
            "problems: [garnet, garnet]\nalgorithms: [hpgd]",
            "problems.1 (config.yaml, line 1): another one has the label 'garnet'",
        ),
        (
            "problems: [garnet]\nalgorithms: [hpgd]\nbudget: {transitions: null}",
            "budget (config.yaml, line 3): transitions, seconds and iterations are all null",
        ),
        ("problems: [garnet]\nalgorithms: [hpgd]\nbudget: {steps: 3}", "budget.steps (config.yaml, line 3): unknown"),
        (
            "problems: [garnet]\nalgorithms: [hpgd]\nseed: [1]",
            "seed (config.yaml, line 3): unknown key, did you mean 'seeds'?",
        ),
        (
            "problems: [garnet]\nalgorithms: [hpgd]\nseeds: [1, 2]\ntuning_seeds: [2]",
            "tuning_seeds (config.yaml, line 4): 2 is among the reported seeds",
        ),
        ("problems: [garnet]\nalgorithms: [hpgd]\nseeds: [1, 1]", "seeds (config.yaml, line 3): one stands here twice"),
        (
            "problems: [garnet]\nalgorithms: [{name: hpgd, grid: {learning_rate: [1, 2]}}]\ntuning_seeds: []",
            "algorithms.0.grid (config.yaml, line 2): 2 points and no tuning_seeds",
        ),
        (
            "problems: [garnet]\nalgorithms: [{name: hpgd, label: '?'}]",
            "algorithms.0.label (config.yaml, line 2): expected",
        ),
        ("problems: [garnet]\nalgorithms: [3]", "algorithms.0 (config.yaml, line 2): give the algorithm a name"),
    ],
)
def test_bad_configs(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    called = command("compare", write(Path(), text), "--out", "out")
    assert called.code == 2
    assert message in called.message
    assert called.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithms.3.batch=2", "3: expected a place from 0 to 2"),
        (
            "algorithms.2.bach=2",
            "algorithms.2.bach (command line, algorithms.2.bach=2): unknown key, did you mean 'batch'?",
        ),
        ("budget.transitions=many", "budget.transitions (command line, budget.transitions=many): "),
    ],
)
def test_bad_overrides(tmp_path, override, message):
    with pytest.raises(InputError) as caught:
        load(write(tmp_path, GOOD), [override])
    assert message in str(caught.value)


def test_list_has_the_algorithms():
    printed = command("list").out
    for name, method in choices((bj.algorithms.Algorithm,)).items():
        assert f"  {name}: {method.summary}" in printed
    assert "solver = None   (a solver)" in printed
    assert "  lbfgs: L-BFGS with a zoom line search" in printed
