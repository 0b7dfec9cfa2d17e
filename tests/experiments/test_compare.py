"""Comparisons: what is run, tuned, counted and written; and that an interrupted one goes on where it stopped."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from html import escape
from itertools import chain
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from experiment_helpers import command, read_rows, write

import bilevel_jax as bj
from bilevel_jax.algorithms.cost import factorization_sweeps
from bilevel_jax.core.errors import InputError
from bilevel_jax.environments import policy_table
from bilevel_jax.experiments import trainer
from bilevel_jax.experiments.cells import Cell
from bilevel_jax.experiments.comparison import load_comparison as load
from bilevel_jax.experiments.interruption import Stop
from bilevel_jax.experiments.outcome import Curves, Outcome
from bilevel_jax.experiments.present import run as present_run
from bilevel_jax.experiments.present import tables
from bilevel_jax.experiments.trainer import Trainer

SMALL = "problems: [{name: synthetic, states: 3, actions: 2, dimension: 2}]\n"
TINY = f"""\
{SMALL}
algorithms:
  - {{name: m_sobirl, label: few sweeps, grid: {{learning_rate: [0.001, 0.2]}}}}
  - hpgd
seeds: [0, 1]
tuning_seeds: [7]
budget: {{transitions: 3000}}
points: 3
first: 0.1
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A comparison of one algorithm that applies and one that does not: the directory and what was printed."""
    directory = tmp_path_factory.mktemp("tiny")
    called = command("compare", write(directory, TINY), "--out", directory / "out")
    assert called.code == 0, called.err
    return directory / "out", called.out


def outcome(tiny):
    directory, _ = tiny
    cell = load(directory / "resolved.yaml").cells[0]
    return Trainer(cell).run(directory, Stop(), lambda event: pytest.fail(f"computed again: {event}"))


@pytest.mark.slow
def test_curves_are_exact_objectives_within_the_budget(tiny):
    made = outcome(tiny)
    curves = made.curves
    problem = bj.problems.make("synthetic", states=3, actions=2, dimension=2)
    assert curves.objective.shape == (4, 2 * 3)
    assert (curves.transitions[0] == 0).all()
    assert (curves.iterations[0] == 0).all()
    targets = np.array([target.transitions for target in made.cell.targets()])
    assert targets.tolist() == [300, 948, 3000]
    each = curves.transitions[-1] / curves.iterations[-1]
    # Ten sweeps, two products of one step of descent, and the formula: 13 looks at the 6 pairs.
    np.testing.assert_allclose(each, 13 * 6)
    assert (curves.transitions[1:] <= targets[:, None]).all()
    assert (curves.transitions[1:] + each > targets[:, None]).all(), "another iteration would have fitted"
    assert (np.diff(curves.seconds, axis=0) >= 0).all()
    (x,) = made.x
    for run, (_, seed) in enumerate(made.cell.runs):
        solution = bj.solve(problem.mdp(x[run]), problem.regularizer(x[run]))
        np.testing.assert_allclose(curves.objective[-1, run], problem.objective(x[run], solution), rtol=1e-9)
        start = problem.start(jax.random.key(seed))
        first = bj.hypergradient(problem, start)
        np.testing.assert_allclose(curves.objective[0, run], first.value, rtol=1e-9)
        np.testing.assert_allclose(curves.gradient_norm[0, run], jnp.linalg.norm(first.gradient), rtol=1e-6)


@pytest.mark.slow
def test_runs_are_those_of_the_algorithm(tiny):
    """One run by hand: same start, same optimizer, as many iterations."""
    made = outcome(tiny)
    problem = bj.problems.make("synthetic", states=3, actions=2, dimension=2)
    algorithm = bj.algorithms.m_sobirl(problem, optax.adam(0.2))
    run = made.cell.runs.index((1, 1))
    state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(int(made.curves.iterations[-1, run])):
            state, _ = algorithm.step(jax.random.key(0), state)
    np.testing.assert_allclose(made.x[0][run], state.x, rtol=1e-8)


@pytest.mark.slow
def test_table(tiny):
    directory, printed = tiny
    first, second = read_rows(directory / "table.csv")
    rows = read_rows(directory / "curves.csv")
    final = {
        rate: [
            float(row["objective"])
            for row in rows
            if row["learning_rate"] == rate and row["point"] == "3" and row["tuning"] == "0"
        ]
        for rate in ("0.001", "0.2")
    }
    assert first["settings"] == "learning rate 0.2"
    assert float(first["mean"]) == pytest.approx(np.mean(final["0.2"]), rel=1e-6)
    assert float(first["standard_error"]) == pytest.approx(np.std(final["0.2"], ddof=1) / 2**0.5, rel=1e-5)
    assert (first["best"], first["seeds"], first["diverged"]) == ("1", "2", "0")
    assert "has no simulator" in second["does_not_apply"]
    assert (directory / "table.md").read_text() in printed
    assert "| few sweeps | **" in printed
    assert "- hpgd on synthetic: has no simulator" in printed


@pytest.mark.slow
def test_curves_file(tiny):
    directory, _ = tiny
    rows = read_rows(directory / "curves.csv")
    assert len(rows) == 2 * 3 * 4
    assert {row["seed"] for row in rows if row["tuning"] == "1"} == {"7"}
    assert {row["algorithm"] for row in rows} == {"few sweeps"}


def test_page_needs_nothing_but_itself(tiny):
    directory, _ = tiny
    page = (directory / "index.html").read_text()
    assert not re.search(r'(src|href)="(?!data:image/png;base64,|#)', page)
    assert "@import" not in page
    assert "url(" not in page
    summary = json.loads((directory / "summary.json").read_text())
    pictures = [file for files in summary["pictures"].values() for file in files.values()]
    assert page.count("data:image/png;base64,") == len(pictures) == 2
    for text in (tables.RULE, "3,000 transitions", summary["machine"], summary["versions"]["jax"], "few sweeps"):
        assert escape(text) in page
    for tag in ("table", "figure", "h2", "details", "div", "dl", "tr", "td"):
        assert len(re.findall(f"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag


def test_report(tiny, tmp_path):
    directory, _ = tiny
    page = tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    assert command("report", directory, "--out", page).code == 0
    text = page.read_text()
    assert (directory / "table.md").read_text().strip() in text
    linked = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert len(linked) == 2
    for link in linked:
        assert (page.parent / link).read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "others.md").write_text("# Others\n\n| a |\n|---|\n| 1 |\n\n## A part\n")
    assert command("report", tmp_path / "others.md", directory, "--out", page).code == 0
    assert "\n## Others\n" in page.read_text()
    assert "\n### A part\n" in page.read_text()
    assert "none.md: No such file" in command("report", tmp_path / "none.md", "--out", page).message
    refused = command("report", tmp_path, "--out", page)
    assert (refused.code, "holds no finished comparison" in refused.message) == (2, True)
    assert "is on the page already" in command("report", directory, directory, "--out", page).message


def test_a_damaged_file_never_counts(tiny, tmp_path):
    directory, _ = tiny
    made = Trainer(load(directory / "resolved.yaml").cells[0])
    (path,) = (directory / "cells").glob("*.npz")
    content = path.read_bytes()
    assert len(made.outcome(directory).runs) == 6
    (tmp_path / "cells").mkdir()
    for damaged in (content[: len(content) // 2], content[:-30], content.replace(b"iterations", b"iterationz"), b""):
        (tmp_path / "cells" / path.name).write_bytes(damaged)
        (tmp_path / "cells" / path.with_suffix(".part1").name).write_bytes(content)
        with pytest.warns(UserWarning, match="is damaged; its runs are made again"):
            assert made.outcome(tmp_path).runs == []


# ---- Tuning and divergence, without running anything -----------------------------------------------------


def fake(tmp_path, final, grid="[0.1, 1, 10]"):
    """An outcome whose runs end at `final`, [grid point, seed], the tuning seed first."""
    text = f"{SMALL}algorithms: [{{name: m_sobirl, grid: {{learning_rate: {grid}}}}}]\n"
    cell = load(write(tmp_path, text + "seeds: [0, 1]\ntuning_seeds: [7]\npoints: 1")).cells[0]
    last = np.asarray(final, float).reshape(-1)
    ones = np.ones((2, last.size))
    curves = Curves(ones, ones, ones, np.stack([np.zeros_like(last), last]), ones, ones > 0, {})
    return Outcome(cell, None, list(range(last.size)), curves, {}, ["transitions"] * last.size)


def test_tuning_takes_the_best_on_the_tuning_seeds(tmp_path):
    # The reported seeds alone would choose the last.
    made = fake(tmp_path, [[3, 1, 1], [2, 5, 7], [4, 0, 0]])
    (row,) = tables.rows([made])
    assert row.settings == {"learning_rate": 1.0}
    assert (row.mean, row.standard_error) == (6, 1)


def test_a_diverged_tuning_run_comes_last_and_a_reported_one_is_said(tmp_path):
    (row,) = tables.rows([fake(tmp_path, [[np.nan, 1, 1], [9, 5, np.inf], [np.nan, 0, 0]])])
    assert row.settings == {"learning_rate": 1.0}
    assert row.diverged == 1
    assert np.isnan(row.mean)
    assert not row.best
    assert tables.entry(row) == "diverged (1 of 2)"
    (row,) = tables.rows([fake(tmp_path, np.full((3, 3), np.nan))])
    assert row.diverged == 2
    assert "diverged (2 of 2)" in tables.markdown([row])


# ---- Races ----------------------------------------------------------------------------------------------


class Wild(bj.problems.synthetic.Synthetic):
    """An objective without a minimum: steps that are too long leave the floats."""

    def objective(self, x, solution):
        return -jnp.sum(jnp.exp(x**2)) + jnp.sum(solution.policy) * 0


def cell_of(settings, *, problem, limits, points, sections=None):
    """A cell of M-SoBiRL and gradient descent on a problem that stands in for a registered one."""
    algorithm = {"name": "m_sobirl", "solver": None, "adjoint": None}
    optimizer = {"name": "sgd", "learning_rate": 0.1, "clip_norm": None, "momentum": None, "nesterov": False}
    upper = {"projection": None, "temperature": None}

    class Made(Cell):
        def algorithm(self, place):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("bilevel_jax.experiments.cells.build_problem", lambda section: problem)
                return super().algorithm(place)

    return Made(
        labels=("problem", "algorithm"),
        sections={
            "problem": {"name": "garnet"},
            "algorithm": algorithm,
            "optimizer": optimizer,
            **upper,
            **(sections or {}),
        },
        settings=settings,
        runs=[(place, 0) for place in range(len(settings))],
        limits={"iterations": None, "transitions": None, "seconds": None, **limits},
        points=points,
        samples=4000,
        precision="float64",
        memory_limit_mb=1000.0,
        checkpoint={"minutes": 5.0, "points": None, "keep": 2},
        exact="points",
    )


def trained(cell, directory):
    return Trainer(cell).run(directory, Stop(), lambda event: None)


@pytest.mark.slow
def test_a_diverged_run_ends_and_the_others_go_on_until_budget_or_deadline(tmp_path):
    wild = Wild(**vars(bj.problems.make("synthetic", states=3, actions=2, dimension=2)))
    settings = [{"optimizer.learning_rate": rate} for rate in (1e-6, 1e3)]
    points = {"count": 2, "first": 0.5}
    made = trained(cell_of(settings, problem=wild, limits={"transitions": 3000}, points=points), tmp_path / "a")
    curves = made.curves
    calm, lost = curves.iterations[-1]
    assert calm == 3000 // (13 * 6)
    assert lost < 5
    assert np.isfinite(curves.objective[:, 0]).all()
    assert not np.isfinite(curves.objective[-1, 1])
    assert made.ended_by == ["transitions", "not finite"]
    points = {"count": 2, "first": 1 / 3}
    made = trained(cell_of(settings, problem=wild, limits={"seconds": 0.15}, points=points), tmp_path / "b")
    curves = made.curves
    assert (curves.seconds[1] >= 0.05).all()
    assert (curves.seconds[1] < 0.15).all()
    assert (curves.seconds[2] >= 0.15).all()
    assert (curves.seconds[2] < 3).all()
    assert curves.iterations[2, 0] > curves.iterations[1, 0] > 8
    assert curves.iterations[2, 1] == lost
    assert made.ended_by == ["seconds", "not finite"]
    points = {"every": 4}
    made = trained(cell_of(settings, problem=wild, limits={"iterations": 10}, points=points), tmp_path / "c")
    assert made.curves.iterations[:, 0].tolist() == [0, 4, 8, 10]
    assert made.curves.iterations[-1, 1] == lost
    assert made.ended_by == ["iterations", "not finite"]


class Simulated(bj.SampledProblem):
    """Garnet without its model: what `SampledProblem` asks for and a start, no mdp(x)."""

    inner: bj.problems.garnet.Garnet
    environment = property(lambda self: self.inner.environment)
    discount = property(lambda self: self.inner.discount)
    loss_discount = property(lambda self: self.inner.loss_discount)
    horizon = property(lambda self: self.inner.horizon)
    trajectories = property(lambda self: self.inner.trajectories)

    def start(self, key):
        return self.inner.start(key)

    def reward(self, x):
        return self.inner.reward(x)

    def regularizer(self, x):
        return self.inner.regularizer(x)

    def loss(self, key, x, trajectories):
        return self.inner.loss(key, x, trajectories)


@pytest.mark.slow
def test_without_a_model_the_objective_is_estimated(tmp_path):
    garnet = bj.problems.make("garnet", states=4, actions=2, branching=2, discount=0.6, horizon=30)
    problem = Simulated(garnet)
    with pytest.raises(bj.InputError, match="no model for an ExactAgent; SoftQLearning and SoftPQN learn from"):
        bj.algorithms.make_algorithm("zero_order", problem, optax.sgd(1e-3), agent=bj.agents.ExactAgent())
    agent = {"name": "soft_q_learning", "processes": 8, "steps": 16, "epsilon": 0.2, "step_size": None}
    agent |= {"features": None, "restart_every": None, "keep": 1.0, "initial_value": None}
    algorithm = {"name": "zero_order", "agent": agent, "batch": 4, "radius": 0.1}
    sections = {"algorithm": algorithm}
    settings = [{"optimizer.learning_rate": 1e-3}]
    points = {"count": 1, "first": 1.0}
    cell = cell_of(settings, problem=problem, limits={"transitions": 2000}, points=points, sections=sections)
    cell = dataclasses.replace(cell, runs=[(0, 3)])
    curves = trained(cell, tmp_path).curves
    # Two agents of 8 processes and 16 steps, two batches of 4 trajectories.
    each = 2 * (8 * 16 + 4 * 30)
    assert curves.iterations[-1, 0] == 2000 // each
    assert curves.transitions[-1, 0] == 2000 // each * each
    assert np.isnan(curves.gradient_norm).all()
    # The policy that the agent has after as many steps, evaluated on the model that the trainer did not know.
    ((program, _),) = Trainer(cell)._programs([0])
    inputs = program.inputs([0])
    limits = trainer.Limits.of(np.inf, 2000.0)
    progress, _, _ = program.advance(inputs, program.start(inputs), limits, np.int32(1000))
    state = jax.tree.map(lambda leaf: leaf[0], progress.state)
    policy = policy_table(program.algorithms[0].policy(state), 4)
    mdp = bj.MDP(garnet.transition, garnet.cost + garnet.price / 2 * state.x**2, garnet.discount)
    exact = bj.policy_value(mdp, policy) @ mdp.initial
    # Losses have a standard deviation below 3.
    assert curves.objective[-1, 0] == pytest.approx(float(exact), abs=5 * 3 / 4000**0.5)


def test_factorizations_in_sweeps():
    """2/3 S^3 operations over 2 S A K: S^2 / (3 A K)."""
    mdp = bj.MDP(np.full((6, 2, 6), 1 / 6), np.zeros((6, 2)), 0.5)
    assert factorization_sweeps(mdp) == pytest.approx((2 / 3 * 6**3) / (2 * 6 * 2 * 6))


def test_what_does_not_apply_says_why():
    problem = bj.problems.make("synthetic", states=3, actions=2, dimension=2)
    assert bj.algorithms.requires("implicit", problem) is None
    with pytest.raises(InputError, match="problem: Synthetic has no simulator"):
        bj.algorithms.make_algorithm("hpgd", problem, optax.sgd(0.1))
    assert "has no model" in (bj.algorithms.requires("implicit", object()) or "")


# ---- Interruptions ----------------------------------------------------------------------------------------

THREE = TINY.replace("  - hpgd\n", "  - {name: implicit, grid: {learning_rate: [0.1]}}\n  - {name: amd, sweeps: 2}\n")


def results(directory):
    """What a comparison found, without what a clock says."""
    timed = ("seconds", "compile_seconds")
    return [
        {key: value for key, value in row.items() if key not in timed}
        for name in ("table.csv", "curves.csv")
        for row in read_rows(directory / name)
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What THREE finds if nothing interrupts it."""
    directory = tmp_path_factory.mktemp("whole")
    assert command("compare", write(directory, THREE), "--out", directory / "out").code == 0
    return results(directory / "out")


@pytest.mark.slow
def test_goes_on_after_an_interruption_in_chunks(tmp_path, monkeypatch, whole):
    path, cut = write(tmp_path, THREE), tmp_path / "cut"
    # So little memory that the first algorithm's six runs go in several chunks; a signal comes in the second chunk.
    original, computed = Trainer._train, []

    def train(made, chunk, *others):
        computed.append(chunk.runs)
        if len(computed) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(made, chunk, *others)

    limit = f"memory_limit_mb={two_runs(path)}"
    monkeypatch.setattr(Trainer, "_train", train)
    called = command("compare", path, limit, "--out", cut)
    assert called.code == 130
    assert computed == [[0, 1], [2, 3]]
    assert not (cut / "summary.json").exists()
    assert len(list((cut / "checkpoints").glob("*.npz"))) == 1
    computed.clear()

    def counted(made, chunk, *others):
        computed.append(chunk.runs)
        return original(made, chunk, *others)

    monkeypatch.setattr(Trainer, "_train", counted)
    assert command("compare", path, limit, "--out", cut).code == 0
    # The other algorithms need another amount of memory.
    assert computed[:2] == [[2, 3], [4, 5]]
    assert list(chain(*computed[2:])) == [0, 1, 0, 1]
    for one, other in zip(whole, results(cut), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if key in ("objective", "gradient_norm", "mean", "standard_error"):
                assert float(other[key]) == pytest.approx(float(value), rel=1e-7, abs=1e-9)
            else:
                assert other[key] == value
    # A changed algorithm is run again, the others are not; and the old one's runs are still there.
    computed.clear()
    assert command("compare", path, limit, "algorithms.2.sweeps=3", "--out", cut).code == 0
    assert list(chain(*computed)) == [0, 1]
    computed.clear()
    assert command("compare", path, limit, "--out", cut).code == 0
    assert computed == []


def two_runs(path):
    """MiB that two runs of the first cell need, and not three."""
    from bilevel_jax.experiments.chunks import _bytes

    cell = load(path).cells[0]
    ((program, _),) = Trainer(cell)._programs(list(range(len(cell.runs))))
    program.cuts([0, 1], 1e6)
    return _bytes(program.advance) / 2**20


@pytest.mark.slow
def test_goes_on_after_a_kill(tmp_path, whole):
    path, out = write(tmp_path, THREE), tmp_path / "out"
    line = [sys.executable, "-m", "bilevel_jax.experiments.cli", "compare", path, "--out", out]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("cells/*.npz")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = {file: file.stat().st_mtime_ns for file in out.glob("cells/*.npz")}
    assert len(kept) in (1, 2)
    assert not (out / "summary.json").exists()
    called = command("compare", path, "--out", out)
    assert called.code == 0
    assert called.out.count(" s each") == 3 - len(kept)
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())
    assert results(out) == whole


@pytest.mark.slow
def test_quick(tmp_path):
    """The config of the repository: exact algorithms and one from samples, all improve."""
    quick = Path(__file__).parents[2] / "configs" / "compare" / "quick.yaml"
    out = tmp_path / "out"
    assert command("compare", quick, "--out", out).code == 0
    rows = read_rows(out / "table.csv")
    assert len(rows) == 8
    curves = read_rows(out / "curves.csv")
    for row in rows:
        if not row["does_not_apply"]:
            own = [r for r in curves if (r["problem"], r["algorithm"]) == (row["problem"], row["algorithm"])]
            start = np.mean([float(r["objective"]) for r in own if r["point"] == "0" and r["tuning"] == "0"])
            assert float(row["mean"]) < start
            assert row["diverged"] == "0"
    assert present_run.PACKAGES[0] in (out / "index.html").read_text()
