"""Everything that the library has can be named in a config, and runs."""

import inspect
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml
from experiment_helpers import command, library_choices, read_rows, write

import bilevel_jax as bj
from bilevel_jax.core.options import choices as discrete
from bilevel_jax.experiments.choices import (
    KINDS,
    NAMESPACES,
    choices,
    name_of,
    optimizers,
    options_of,
    projections,
)
from bilevel_jax.experiments.config import load
from bilevel_jax.experiments.interruption import Stop
from bilevel_jax.experiments.trainer import Trainer
from bilevel_jax.problems import names, registry

pytestmark = pytest.mark.usefixtures("as_from_the_shell")

GARNET = "problem: {name: garnet, states: 4, actions: 2, branching: 2, discount: 0.6, horizon: 10}\niterations: 2\n"
# Algorithms on labels have a problem of their own.
LEARNED = "problem: {name: preference_learning, task: four_rooms, width: 8, length: 3, horizon: 12}\niterations: 2\n"
ON_LABELS = ("contrastive", "drlhf", "pbrl_labels", "sobirl_labels", "virtual_step")
# Options that have no default.
GIVEN = {
    "neumann": "terms: 3",
    "nested_rollouts": "length: 3",
    "shared_rollouts": "length: 3",
    "expected_trajectories": "length: 3",
    "unrolled": "sweeps: 3",
    "one_hot": "states: 4",
    "cooling": "start: 2.0, iterations: 3",
    "by_visits": "schedule: polynomial",
    "box": "lower: -1.0, upper: 1.0",
    "sobirl_labels": "batch: 4, warm_up: 1, response: {name: nested_rollouts, length: 3}",
    "pbrl_labels": "batch: 4, warm_up: 1",
    "virtual_step": "batch: 4, warm_up: 1",
    "synthetic_labels": "count: 8, held_out: 8, improvements: 1, shares: 2, processes: 4",
}


# What a garnet is not for: networks of frames, continuous actions; and labels of a file.
ELSEWHERE = {"nature_cnn", "reward_cnn", "gaussian_actor_critic", "file_labels"}


# What needs an array or a function, which a config cannot write.
OF_ARRAYS = {"ExactAdvantage", "GivenLabels"}


def section(name):
    return f"{{name: {name}, {GIVEN.get(name, '')}}}"


def places():
    """Where each thing may stand in a config, with the thing."""
    for name in library_choices(bj.algorithms.Algorithm):
        yield "algorithm", f"{LEARNED if name in ON_LABELS else ''}algorithm: {section(name)}"
    yield from (("optimizer", f"algorithm: implicit\noptimizer: {section(name)}") for name in optimizers())
    yield from (("projection", f"algorithm: implicit\nprojection: {section(name)}") for name in projections())
    templates = {
        "solver": "algorithm: {name: m_sobirl, solver: %s}",
        "linear solver": "algorithm: {name: m_sobirl, solver: {name: policy_iteration, linear_solver: %s}}",
        "preconditioner": "algorithm: {name: m_sobirl, adjoint: {name: gmres, preconditioner: %s}}",
        "method": "algorithm: {name: implicit, method: %s}",
        "response": "algorithm: {name: sobirl, batch: 4, response: %s}",
        "baseline": "algorithm: {name: sobirl, batch: 4, baseline: %s}",
        "agent": "algorithm: {name: naive, batch: 4, agent: %s}",
        "network": "algorithm: {name: naive, batch: 4, agent: {name: soft_pqn, processes: 4, steps: 8, network: %s}}",
        "labels": LEARNED + "algorithm: {name: drlhf, batch: 4, labels: %s}",
        "schedule": "algorithm: implicit\ntemperature: %s\noptimizer: {name: sgd, learning_rate: %s}",
    }
    assert set(templates) == set(KINDS)
    for kind, template in templates.items():
        for name in sorted(set(library_choices(KINDS[kind])) - ELSEWHERE):
            yield kind, template.replace("%s", section(name))
    yield from (
        ("adjoint", templates["solver"].replace("solver:", "adjoint:") % section(n))
        for n in library_choices(bj.LinearSolver)
    )


def test_every_public_class_can_be_named():
    for namespace in NAMESPACES:
        for name in namespace.__all__:
            kind = getattr(namespace, name)
            for base in KINDS.values():
                if inspect.isclass(kind) and issubclass(kind, base) and not inspect.isabstract(kind):
                    if name in OF_ARRAYS:
                        assert name_of(kind) not in choices((base,))
                    else:
                        assert choices((base,))[name_of(kind)].build is kind


def test_names_are_told_apart_and_have_a_summary():
    for base in KINDS.values():
        found = library_choices(base)
        assert found
        for name, choice in found.items():
            assert name == choice.name
            assert len(choice.summary) > 10, name
    assert name_of(bj.GMRES) == "gmres"
    assert name_of(bj.agents.SoftSARSA) == "soft_sarsa"


def test_options_are_the_arguments_of_the_constructor():
    assert [option.name for option in options_of(bj.ValueIteration)] == ["tolerance", "max_iterations", "centred"]
    sarsa = {option.name: option.default for option in options_of(bj.agents.SoftSARSA)}
    assert (sarsa["expected"], sarsa["epsilon"], sarsa["processes"]) == (False, 0.02, 64)  # its parents' too


def whole(text):
    """A config: with a garnet, unless there is a problem."""
    return text if text.startswith("problem:") else GARNET + text


def cases():
    """All of them; of the kinds that optax has, CI runs the first three."""
    seen: dict[str, int] = {}
    for kind, text in places():
        seen[kind] = seen.get(kind, 0) + 1
        rare = kind in ("optimizer", "projection") and seen[kind] > 3
        yield pytest.param(
            kind, text, marks=pytest.mark.nightly if rare else (), id=text.removeprefix(LEARNED).replace("\n", " ")[:90]
        )


@pytest.mark.slow
def test_two_classes_of_one_name_are_refused(tmp_path):
    """A user's own that has the name of one of the library is not silently left out, nor takes its place."""
    (tmp_path / "rival.py").write_text(
        "import bilevel_jax as bj\n\nclass PolicyIteration(bj.PolicyIteration):\n    pass\n"
    )
    path = write(tmp_path, GARNET + "algorithm: {name: m_sobirl, solver: policy_iteration}\nmodules: [rival.py]\n")
    line = [sys.executable, "-m", "bilevel_jax.experiments.cli", "run", path, "--out", tmp_path / "out"]
    called = subprocess.run(line, capture_output=True, text=True)  # a class stays, once it is there
    assert called.returncode == 2
    assert re.search(
        r"algorithm\.solver\.name .*'policy_iteration' is several classes: bilevel_jax\.\S*\.PolicyIteration, "
        r"\S*rival\.py\.PolicyIteration; give yours another name",
        called.stderr,
    )


@pytest.mark.slow
def test_what_a_run_writes_down_is_read_again(tmp_path):
    """All choices with all their defaults filled in, None among them."""
    for i, (_, text) in enumerate(places()):
        text = text.replace("learning_rate: {name: by_visits, schedule: polynomial}", "learning_rate: 0.1")
        values = load(write(tmp_path, whole(text) + "\n", f"{i}.yaml")).values
        again = load(write(tmp_path, yaml.safe_dump(values), f"{i}-again.yaml")).values
        assert {**again, "modules": []} == {**values, "modules": []}, text


@pytest.mark.often(9)
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "text"), list(cases()))
def test_everything_runs(kind, text, tmp_path):
    if "by_visits" in text:
        text = text.replace("learning_rate: {name: by_visits, schedule: polynomial}", "learning_rate: 0.1")
    extra = "optimizer: {name: sgd, learning_rate: 0.01}\n" if "optimizer" not in text else ""
    config = load(write(tmp_path, whole(text) + "\n" + extra))
    with jax.enable_x64(True):
        outcome = Trainer(config.cell).run(tmp_path / "out", Stop(), lambda event: None)
    assert outcome.reason is None
    assert outcome.ended_by == ["iterations"], kind
    assert np.isfinite(outcome.final["objective"]).all()


@pytest.mark.often(2)
@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_every_choice_of_every_problem_in_one_sweep(name, tmp_path):
    """Runs that differ in structure have programs of their own; what a problem refuses is refused with the key."""
    options = {
        key: [value for value in discrete(hint) if value is not None]
        for key, hint in inspect.get_annotations(registry.spec(name).options, eval_str=True).items()
        if discrete(hint)
    }
    for key, values in options.items():
        for value in values:
            path = write(tmp_path, f"problem: {{name: {name}}}\niterations: 1\n")
            shown = str(value).lower() if isinstance(value, bool) else value
            called = command("run", path, f"sweep.problem.{key}=[{shown}]", "--out", tmp_path / f"{key}-{value}")
            if called.code == 2:
                assert f"sweep.problem.{key}" in called.message
                continue
            assert called.code == 0, called.err
            (row,) = read_rows(tmp_path / f"{key}-{value}" / "runs.csv")
            assert row["ended_by"] == "iterations"


@pytest.mark.slow
def test_a_sweep_over_structure_is_that_of_single_runs(tmp_path):
    path = write(tmp_path, "problem: {name: synthetic, states: 3, actions: 2, dimension: 2}\niterations: 4\n")
    axes = (
        "sweep.problem.states=[3, 4]",
        "sweep.algorithm.solver.max_iterations=[2, 1000]",
        "sweep.optimizer.b1=[0.9, 0.5]",
    )
    assert command("run", path, *axes, "--out", tmp_path / "all").code == 0
    rows = read_rows(tmp_path / "all" / "runs.csv")
    assert len(rows) == 8
    assert len({row["final_value"] for row in rows}) > 4
    for row in rows[::3]:
        keys = [key for key in row if "." in key]
        alone = [f"{key}={row[key]}" for key in keys]
        assert command("run", path, *alone, "--out", tmp_path / row["run"]).code == 0
        (single,) = read_rows(tmp_path / row["run"] / "runs.csv")
        np.testing.assert_allclose(float(single["final_value"]), float(row["final_value"]), rtol=1e-9)
