"""The templates of docs/extending.md: each file and config as it stands there, through the command line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from experiment_helpers import command, read_rows

import bilevel_jax as bj
from bilevel_jax.algorithms import registry as algorithms
from bilevel_jax.experiments.choices import choices
from bilevel_jax.problems import registry as problems

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
CODE = [re.findall(r"```python\n(.*?)```", part, re.DOTALL) for part in PAGE.split("\n## ")]
YAML = [re.findall(r"```yaml\n(.*?)```", part, re.DOTALL) for part in PAGE.split("\n## ")]
NAMES = [re.search(r"modules: \[(\w+)\.py\]", yaml[0]).group(1) for yaml in YAML if yaml]
PARTS = [part for part in zip(CODE, YAML, strict=True) if part[1]]
TEMPLATES = {name: (code[0], yaml[0]) for name, (code, yaml) in zip(NAMES, PARTS, strict=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every template's file and config beside each other."""
    place = tmp_path_factory.mktemp("own")
    for name, (code, text) in TEMPLATES.items():
        (place / f"{name}.py").write_text(code)
        (place / f"{name}.yaml").write_text(text)
    before = dict(problems._SPECS), dict(algorithms._BUILDERS)
    with jax.numpy_dtype_promotion("standard"):
        yield place
    # Other tests are about the library's own.
    for registered, old in zip((problems._SPECS, algorithms._BUILDERS), before, strict=True):
        registered.clear()
        registered.update(old)


def test_there_is_a_template_of_each():
    assert NAMES == ["shuttle", "one_sweep", "fixed_policy", "relaxed_iteration", "myopic"]


def ran(folder, name, kind="run", *overrides):
    out = folder / f"out {name} {kind} {len(overrides)}"
    called = command(kind, folder / f"{name}.yaml", *overrides, "--out", out)
    assert called.code == 0, called.err
    return out


@pytest.mark.slow
def test_simulator(folder):
    """A simulator of one's own, with features, an agent and an evaluation: the loss goes down."""
    out = ran(folder, "shuttle")
    rows = read_rows(out / "metrics.csv")
    started = np.mean([float(row["objective"]) for row in rows if row["iteration"] == "0"])
    # One loss has a standard deviation of about 0.6, a mean of 2,000 one of 0.014.
    assert json.loads((out / "summary.json").read_text())["final_value"] < started - 0.3
    with np.load(out / "final.npz") as final:
        assert final["x"].shape == (2, 6, 2)


@pytest.mark.slow
def test_simulator_in_a_comparison(folder):
    text = TEMPLATES["shuttle"][0]
    assert "features" in text
    (folder / "compared.yaml").write_text(
        "modules: [shuttle.py]\nproblems: [shuttle]\nalgorithms:\n"
        "  - {name: sobirl, batch: 8, agent: {name: soft_q_learning, processes: 8, steps: 8}}\n"
        "  - {name: zero_order, batch: 8}\n  - {name: naive, batch: 8}\n  - implicit\n"
        "seeds: [0, 1]\nbudget: {transitions: 20000}\npoints: 2\nsamples: 500\n"
    )
    out = ran(folder, "compared", "compare")
    rows = {row["algorithm"]: row for row in read_rows(out / "table.csv")}
    assert "has no model" in rows["implicit"]["does_not_apply"]
    assert all(np.isfinite(float(rows[name]["mean"])) for name in ("sobirl", "zero_order", "naive"))


@pytest.mark.slow
def test_agent(folder):
    out = ran(folder, "one_sweep")
    values = [float(row["objective"]) for row in read_rows(out / "metrics.csv")]
    assert values[-1] < values[0]


@pytest.mark.slow
def test_algorithm(folder):
    """In a comparison, tuned; and in a run, swept; it is the gradient of the objective alone."""
    out = ran(folder, "fixed_policy", "compare")
    rows = {row["algorithm"]: row for row in read_rows(out / "table.csv")}
    assert rows["fixed_policy"]["does_not_apply"] == ""
    assert float(rows["implicit"]["mean"]) <= float(rows["fixed_policy"]["mean"]) + 1e-9
    (folder / "alone.yaml").write_text(
        "modules: [fixed_policy.py]\nproblem: {name: garnet, states: 5, actions: 2, branching: 2, discount: 0.7}\n"
        "algorithm: fixed_policy\noptimizer: sgd\niterations: 3\nrecord_every: 1\n"
        "sweep: {algorithm.damping: [0.0, 0.5]}\n"
    )
    rows = read_rows(ran(folder, "alone") / "metrics.csv")
    norms = [float(row["gradient_norm"]) for row in rows if row["iteration"] == "0"]
    assert norms[1] == pytest.approx(norms[0] / 2, rel=1e-9)


@pytest.mark.slow
def test_solver(folder):
    """Certified like every solver, and the same answer."""
    out = ran(folder, "relaxed_iteration")
    exact = ran(folder, "relaxed_iteration", "run", "algorithm.solver=policy_iteration")
    one, other = (json.loads((place / "summary.json").read_text()) for place in (out, exact))
    assert one["final_value"] == pytest.approx(other["final_value"], rel=1e-6)
    rows = read_rows(out / "metrics.csv")
    assert {row["lower_level_result"] for row in rows} == {"0"}
    relaxed = choices((bj.Solver,))["relaxed_iteration"].build
    problem = bj.problems.make("garnet")
    x = problem.start(jax.random.key(0))
    made = bj.check(bj.solve(problem.mdp(x), problem.regularizer(x), solver=relaxed(share=0.9)))
    np.testing.assert_allclose(made.value, bj.solve(problem.mdp(x), problem.regularizer(x)).value, rtol=1e-9)


@pytest.mark.slow
def test_response(folder):
    """Where no reward is followed by another it is exact, and equal to the library's one-step response."""
    out = ran(folder, "myopic", "run", "problem.discount=0.0")
    other = ran(folder, "myopic", "run", "problem.discount=0.0", "algorithm.response=one_step")
    with np.load(out / "final.npz") as one, np.load(other / "final.npz") as two:
        np.testing.assert_allclose(one["x"], two["x"], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_list_in_a_process_of_its_own(folder):
    """Nothing but the files is needed."""
    files = [f"{name}.py" for name in TEMPLATES]
    line = [sys.executable, "-m", "bilevel_jax.experiments.cli", "list", *files]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for text in ("  shuttle: Shuttle: pay a vehicle", "  one_sweep: One Bellman sweep", "  myopic: dQ is taken for dr"):
        assert text in done.stdout
    assert "  relaxed_iteration: V <- V + share (T V - V)." in done.stdout
    assert "  fixed_policy: Descent along df/dx alone" in done.stdout
    assert "damping = 0.0   (number)" in done.stdout
