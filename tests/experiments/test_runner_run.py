"""The runner from the command line to its files, with small configs. A finished run is shared by a module's tests."""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
import yaml
from jax.experimental.compilation_cache import compilation_cache
from runner_helpers import Called, command, read_rows, run, write

import bilevel_jax as bj
from bilevel_jax import problems
from bilevel_jax.experiments import cli, trainer
from bilevel_jax.experiments.choices import KINDS, choices, optimizers, projections
from bilevel_jax.experiments.chunks import Cut
from bilevel_jax.experiments.config import Config, from_directory, load, sweepable
from bilevel_jax.experiments.directory import claimed
from bilevel_jax.experiments.present import plots
from bilevel_jax.experiments.present.pictures import picture
from bilevel_jax.experiments.program import Program
from bilevel_jax.experiments.source import get
from bilevel_jax.experiments.trainer import Trainer

METRICS = [
    "run",
    "iteration",
    "transitions",
    "objective",
    "gradient_norm",
    "stationarity",
    "adjoint_error_bound",
    "adjoint_result",
    "lower_level_error_bound",
    "lower_level_result",
]
FILES = [
    "cells",
    "final.npz",
    "incentive.png",
    "learning_curves.png",
    "metrics.csv",
    "resolved.yaml",
    "runs.csv",
    "summary.json",
]

ROOMS = """\
problem: {name: four_rooms}
algorithm: {solver: {name: policy_iteration}, adjoint: {name: direct}}
optimizer: {name: sgd}
iterations: 3
record_every: 2
"""
ROOMS_SWEEP = """\
sweep:
  seed: [0, 3]
  optimizer.learning_rate: [1.0, 5.0]
  problem.temperature: [0.05, 0.2]
  problem.beta: [1.0, 4.0]
  problem.discount: [0.9, 0.95]
"""
ROOMS_AXES = yaml.safe_load(ROOMS_SWEEP)["sweep"]
# Five runs over these three keys in most tests: one program, which the compilation cache keeps.
SYNTHETIC = """\
problem: {name: synthetic, states: 3, actions: 2, dimension: 2, discount: 0.9}
algorithm:
  solver: {name: value_iteration, max_iterations: 3, centred: false}
  adjoint: {name: descent, step_size: 0.5, iterations: 2}
optimizer: {name: sgd}
iterations: 5
record_every: 3
sweep:
  seed: [0]
  problem.seed: [0, 1, 2, 3, 4]
  optimizer.learning_rate: [0.1]
"""
WORDS = ["converged", "iterations"]
FIVE_SEEDS = ("sweep.seed=[0, 1, 2, 3, 4]", "sweep.problem.seed=[0]")


@dataclasses.dataclass(frozen=True)
class Finished:
    """A call of `bilevel-jax run` and what it left."""

    called: Called
    directory: Path

    @functools.cached_property
    def config(self) -> Config:
        return from_directory(self.directory)

    @functools.cached_property
    def metrics(self) -> list[dict[str, str]]:
        return read_rows(self.directory / "metrics.csv")

    @functools.cached_property
    def runs(self) -> list[dict[str, str]]:
        return read_rows(self.directory / "runs.csv")

    @functools.cached_property
    def summary(self) -> dict:
        return json.loads((self.directory / "summary.json").read_text())

    @functools.cached_property
    def final(self) -> dict[str, np.ndarray]:
        with np.load(self.directory / "final.npz") as arrays:
            return dict(arrays)

    def curve(self, number: int, column: str = "objective") -> np.ndarray:
        return np.array([float(row[column]) for row in self.metrics if row["run"] == str(number)])


def start(directory: Path, text: str, *overrides: str, name: str = "small.yaml") -> Finished:
    out = directory / "deep" / "out"
    return Finished(run(write(directory, text, name), out, overrides), out)


def finished(directory: Path, text: str, *overrides: str) -> Finished:
    done = start(directory, text, *overrides)
    assert done.called.code == 0, done.called.err
    return done


def problem_of(config: Config, point: dict):
    section = dict(config.at(point)["problem"])
    return bj.problems.make(section.pop("name"), **section)


@pytest.fixture(scope="module", autouse=True)
def _as_from_the_shell(tmp_path_factory):
    """Promotion as jax has it by itself, which optax's Adam needs.

    Compilation is most of the time: it is made cheap, and equal programs are compiled once. The run in a
    process of its own is as users have it.
    """
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_numpy_dtype_promotion": "standard",
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def rooms(tmp_path_factory) -> Finished:
    return finished(tmp_path_factory.mktemp("rooms"), ROOMS + ROOMS_SWEEP)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory) -> Finished:
    return finished(tmp_path_factory.mktemp("synthetic"), SYNTHETIC)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> str:
    """The override that limits the memory to what two runs of SYNTHETIC need."""
    return limit(tmp_path_factory.mktemp("limit"), "sweep.problem.seed=[0, 1]")


def limit(directory: Path, *overrides: str) -> str:
    """The override that limits the memory to what the two runs need that the overrides leave."""
    program = program_of(load(write(directory, SYNTHETIC), overrides))
    assert len(program.cuts([0, 1], 1e6)) == 1
    return f"memory_limit_mb={memory(program) / 2**20!r}"


def program_of(config: Config) -> Program:
    """The one program of all runs of a config."""
    ((program, runs),) = Trainer(config.cell)._programs(list(range(len(config.grid))))
    assert runs == list(range(len(config.grid)))
    return program


def memory(program: Program) -> int:
    """Bytes that the compiled program needs."""
    counts = program.advance.memory_analysis()
    return counts.temp_size_in_bytes + counts.argument_size_in_bytes + counts.output_size_in_bytes


# ---- Files ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_directory(rooms, synthetic):
    for done in (rooms, synthetic):
        assert sorted(path.name for path in done.directory.iterdir() if path.name != ".lock") == FILES


@pytest.mark.slow
def test_config_is_the_resolved_one(rooms):
    original = load(rooms.directory.parents[1] / "small.yaml")
    assert rooms.config.values == original.values
    assert rooms.config.grid == original.grid
    assert yaml.safe_load((rooms.directory / "resolved.yaml").read_text())["problem"]["discount"] == 0.99


@pytest.mark.slow
def test_metrics(rooms):
    rows = rooms.metrics
    assert list(rows[0]) == METRICS
    # every second iteration, and the exact row at the end
    assert [(row["run"], row["iteration"]) for row in sorted(rows, key=lambda row: int(row["run"]))] == [
        (str(number), str(iteration)) for number in range(32) for iteration in (0, 2, 3)
    ]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert {row["lower_level_result"] for row in rows} == {row["adjoint_result"] for row in rows} == {"0"}
    assert max(float(row["lower_level_error_bound"]) for row in rows) < 1e-6


@pytest.mark.slow
def test_first_row_is_the_problem_at_the_start(rooms):
    for number, point in enumerate(rooms.config.grid):
        problem = problem_of(rooms.config, point)
        exact = bj.hypergradient(problem, problem.start(jax.random.key(point["seed"])))
        np.testing.assert_allclose(rooms.curve(number)[0], exact.value, rtol=1e-9)
        norm = np.linalg.norm(exact.gradient)
        np.testing.assert_allclose(rooms.curve(number, "gradient_norm")[0], norm, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rooms", "synthetic"])
def test_last_row_is_exact_at_the_saved_x(name, request):
    """Also where the lower level of the run itself is inexact."""
    done = request.getfixturevalue(name)
    for number, (point, record) in enumerate(zip(done.config.grid, done.runs, strict=True)):
        exact = bj.check(bj.hypergradient(problem_of(done.config, point), done.final["x"][number], with_error=False))
        row = [row for row in done.metrics if row["run"] == str(number)][-1]
        assert row["iteration"] == str(done.config.values["iterations"])
        np.testing.assert_allclose(float(row["objective"]), exact.value, rtol=1e-9)
        np.testing.assert_allclose(float(row["gradient_norm"]), np.linalg.norm(exact.gradient), rtol=1e-7)
        np.testing.assert_allclose(done.final["policy"][number], exact.solution.policy, rtol=1e-7, atol=1e-12)
        np.testing.assert_allclose(done.final["value"][number], exact.solution.value, rtol=1e-7, atol=1e-12)
        assert float(record["final_value"]) == float(row["objective"])
        assert float(record["gradient_norm"]) == float(row["gradient_norm"])
        assert record["result"] == "converged"


@pytest.mark.slow
def test_runs_table(rooms):
    outcome = ["final_value", "best_value", "gradient_norm", "result", "ended_by"]
    assert [list(row) for row in rooms.runs] == 32 * [["run", *ROOMS_AXES, *outcome]]
    points = [dict(zip(ROOMS_AXES, values, strict=True)) for values in itertools.product(*ROOMS_AXES.values())]
    for number, (row, point) in enumerate(zip(rooms.runs, points, strict=True)):
        assert row["run"] == str(number)
        assert {key: float(row[key]) for key in ROOMS_AXES} == point
        assert float(row["best_value"]) <= min(rooms.curve(number))


@pytest.mark.slow
def test_best_x_has_the_best_value(rooms):
    for number, point in enumerate(rooms.config.grid):
        exact = bj.hypergradient(problem_of(rooms.config, point), rooms.final["best_x"][number], with_error=False)
        np.testing.assert_allclose(float(rooms.runs[number]["best_value"]), exact.value, rtol=1e-9)


@pytest.mark.slow
def test_best_of_all_iterations_is_kept(tmp_path):
    """A step far too long: the start is the best, and not the end."""
    done = finished(tmp_path, SYNTHETIC, "sweep.optimizer.learning_rate=[50.0]", *FIVE_SEEDS)
    grid = done.config.grid
    # The run's own start to the bit; the problem's up to the last bit, which compiling both together may change.
    program = program_of(done.config)
    starts = program.start(program.inputs(range(len(grid)))).state.x
    for number, point in enumerate(grid):
        np.testing.assert_array_equal(done.final["best_x"][number], starts[number])
        start_x = problem_of(done.config, point).start(jax.random.key(point["seed"]))
        np.testing.assert_array_almost_equal_nulp(np.asarray(starts[number]), np.asarray(start_x), 2)
        # The curve has what M-SoBiRL reported, at its approximate policy; the best value is solved for.
        best, reported = float(done.runs[number]["best_value"]), done.curve(number)[0]
        exact = bj.hypergradient(problem_of(done.config, point), starts[number], with_error=False).value
        np.testing.assert_allclose(best, exact, rtol=1e-12)
        assert abs(best - reported) < 1e-3 * best < float(done.runs[number]["final_value"])
    assert done.summary["best_value"] < done.summary["final_value"]


@pytest.mark.slow
def test_summary(rooms):
    summary = rooms.summary
    values = [float(row["final_value"]) for row in rooms.runs]
    best = int(np.argmin(values))
    assert summary["config"] == "small"
    assert summary["runs"] == summary["finished_runs"] == 32
    assert summary["interrupted"] is False
    assert summary["best_run"] == best
    assert summary["best_run_settings"] == rooms.config.grid[best]
    assert summary["final_value"] == values[best]
    assert summary["best_value"] == min(float(row["best_value"]) for row in rooms.runs) <= summary["final_value"]
    assert summary["final_gradient_norm"] == float(rooms.runs[best]["gradient_norm"])
    assert summary["results"] == {"converged": 32}
    assert 0 < summary["compile_seconds"] < summary["seconds"] < 600
    assert summary["device"] == jax.devices()[0].device_kind
    assert summary["platform"] == jax.default_backend()
    assert summary["versions"]["jax"] == jax.__version__
    for name in ("bilevel_jax", "jaxlib", "optax", "equinox", "numpy"):
        assert summary["versions"][name] == version(name)


@pytest.mark.slow
def test_final_arrays(rooms, synthetic):
    states = len(problem_of(rooms.config, {}).grid.cells)
    assert {name: array.shape for name, array in rooms.final.items()} == {
        "x": (32, states + 1),
        "best_x": (32, states + 1),
        "policy": (32, 2, states, 4),
        "value": (32, 2, states),
    }
    assert {name: array.shape for name, array in synthetic.final.items()} == {
        "x": (5, 2),
        "best_x": (5, 2),
        "policy": (5, 3, 2),
        "value": (5, 3),
    }
    for array in (*rooms.final.values(), *synthetic.final.values()):
        assert array.dtype == np.float64
    np.testing.assert_allclose(rooms.final["policy"].sum(-1), 1, rtol=1e-12)


# ---- What is printed -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_printed_summary(rooms):
    assert re.search(
        r"^small: 32 runs in [\d.]+ s \(compile [\d.]+ s\), best final objective -?[\d.]+", rooms.called.out
    )
    for name in FILES:
        assert str(rooms.directory / name) in rooms.called.out


@pytest.mark.slow
def test_progress_bar(rooms):
    """Off a terminal it writes a line at the start and one at the end."""
    last = rooms.called.err.replace("\r", "\n").strip().split("\n")[-1]
    assert last.startswith("small: 100%")
    assert "96/96" in last  # 32 runs of 3 iterations
    shown = re.search(r"objective (-?[\d.e+-]+), \|hyper-gradient\| ([\d.e+-]+)\]", last)
    assert shown, last
    # the best run at the last recorded iteration
    recorded = [(float(r["objective"]), float(r["gradient_norm"])) for r in rooms.metrics if r["iteration"] == "2"]
    np.testing.assert_allclose([float(number) for number in shown.groups()], min(recorded), rtol=1e-2)


def test_list():
    called = command("list")
    assert called.code == 0
    assert called.err == ""
    for name in problems.names():
        spec = problems.spec(name)
        assert f"  {name}: {spec.summary}" in called.out
        for option, default in vars(spec.options()).items():
            assert f"{option} = {default}" in called.out
    kinds = [choices((base,)) for base in (*KINDS.values(), bj.algorithms.Algorithm)]
    for found in (*kinds, optimizers(), projections()):
        assert found
        for choice in found.values():
            assert f"  {choice.name}: {choice.summary}" in called.out
            for option in choice.options:
                shown = "(has to be given)" if option.required else f"= {option.default}"
                assert f"{option.name} {shown}" in called.out
    assert "transition = dense   (dense | successor | stencil)" in called.out
    assert "penalty = value   (value | bellman)" in called.out


def test_list_has_the_keys_at_the_top():
    top = command("list").out.partition("problems (")[0]
    for key in ("iterations = 500", "record_every = 10", "seed = 0", "precision = float64", "memory_limit_mb = 4096.0"):
        assert key in top


# ---- Pictures ------------------------------------------------------------------------------------------


def assert_picture(path: Path) -> None:
    pixels = matplotlib.image.imread(path)
    assert pixels.ndim == 3
    assert min(pixels.shape[:2]) > 200
    assert pixels[..., :3].std() > 0.01


@pytest.mark.slow
def test_pictures_are_written_and_redrawn(rooms, tmp_path):
    names = ["learning_curves.png", "incentive.png"]
    copy = tmp_path / "copy"
    shutil.copytree(rooms.directory, copy)
    for name in names:
        assert_picture(rooms.directory / name)
        (copy / name).unlink()
    called = command("plot", copy)
    assert called == Called(0, "".join(f"{copy / name}\n" for name in names), "")
    for name in names:
        assert (copy / name).read_bytes() == (rooms.directory / name).read_bytes()


@pytest.mark.slow
def test_no_picture_of_a_problem_without_panels(synthetic, monkeypatch):
    monkeypatch.setattr(plots, "build_problem", lambda section: object())
    called = command("plot", synthetic.directory)
    assert called == Called(0, f"{synthetic.directory / 'learning_curves.png'}\n", "")
    assert_picture(synthetic.directory / "learning_curves.png")


@pytest.mark.slow
def test_learning_curves(rooms):
    """A line for each setting, the median of its seeds (runs i and i + 16), with a band from least to most."""
    figure = plots.learning_curves(rooms.config, rooms.directory)
    for panel, column in zip(figure.axes, ("objective", "gradient_norm"), strict=True):
        curves = np.array([rooms.curve(number, column) for number in range(32)]).reshape(2, 16, 3)
        assert len(panel.lines) == len(panel.collections) == 16
        for i, (drawn, band) in enumerate(zip(panel.lines, panel.collections, strict=True)):
            np.testing.assert_array_equal(drawn.get_xdata(), [0, 2, 3])
            np.testing.assert_allclose(drawn.get_ydata(), np.median(curves[:, i], 0))
            vertices = band.get_paths()[0].vertices
            assert vertices[:, 1].min() == curves[:, i].min()
            assert vertices[:, 1].max() == curves[:, i].max()
    assert "objective" in figure.axes[0].get_ylabel()
    assert "gradient" in figure.axes[1].get_ylabel()
    assert "2 seeds" in figure.get_suptitle()


@pytest.mark.slow
def test_learning_curves_without_spread(synthetic):
    """A line for each seed of the problem, which is a setting; no band, as each ran from one start."""
    figure = plots.learning_curves(synthetic.config, synthetic.directory)
    assert [len(panel.lines) for panel in figure.axes] == [5, 5]
    assert [len(panel.collections) for panel in figure.axes] == [0, 0]
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert [label.split(",")[0] for label in labels] == [f"seed {seed}" for seed in range(5)]


@pytest.mark.parametrize("goals", [((1, 9), (11, 11)), ((11, 1),), ((1, 9), (11, 11), (1, 1))])
def test_incentive_has_a_panel_for_each_context(goals):
    problem = bj.problems.make("four_rooms", goals=goals)
    states = len(problem.grid.cells)
    x = np.random.default_rng(0).normal(size=states + 1)
    policy = np.random.default_rng(1).dirichlet(np.ones(4), (len(goals), states))
    figure = picture(problem, x, SimpleNamespace(policy=policy, result=np.zeros(len(policy), np.int32)))
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == len(goals)
    heat = np.asarray(problem.incentive(x))
    for i, panel in enumerate(panels):
        drawn = panel.images[0].get_array()
        np.testing.assert_array_equal(np.ma.getmaskarray(drawn), problem.grid.walls)
        np.testing.assert_array_equal(drawn[~problem.grid.walls], heat)
        low, high = panel.images[0].get_clim()
        assert low <= heat.min() < heat.max() <= high
        # an arrow in each cell: right minus left, down minus up
        (arrows,) = [artist for artist in panel.collections if hasattr(artist, "U")]
        np.testing.assert_allclose(arrows.U, policy[i, :, 1] - policy[i, :, 3])
        np.testing.assert_allclose(arrows.V, policy[i, :, 2] - policy[i, :, 0])
        np.testing.assert_array_equal(arrows.XY, problem.grid.cells[:, ::-1])
        goal = [text.get_position() for text in panel.texts if text.get_text() == "G"]
        assert goal == [goals[i][::-1]]
    titles = [panel.get_title() for panel in panels]
    named = [f"goal at row {row}, column {column}" for row, column in goals]
    assert titles == ([""] if len(goals) == 1 else named)
    assert any("a dot where it is even" in text.get_text() for text in figure.texts)


def test_plot_of_no_run(tmp_path, synthetic):
    for directory in (tmp_path, tmp_path / "nowhere"):
        called = command("plot", directory)
        assert called.code == 2
        assert called.out == ""
        assert re.fullmatch(rf"bilevel-jax: error: {directory}: holds no finished run \(resolved.yaml.*\n", called.err)
    shutil.copytree(synthetic.directory, tmp_path / "copy")
    (tmp_path / "copy" / "metrics.csv").unlink()
    called = command("plot", tmp_path / "copy")
    assert called.code == 2
    assert "(metrics.csv missing)" in called.err


# ---- Sweeps --------------------------------------------------------------------------------------------


def reference(config: Config, point: dict, optimizer: optax.GradientTransformation, solver=None, adjoint=None):
    """A run without the runner: objective and gradient norm of each iteration, and the last x."""
    problem = problem_of(config, point)
    algorithm = bj.algorithms.m_sobirl(problem, optimizer, solver=solver, adjoint=adjoint)
    key = jax.random.key(config.at(point)["seed"])
    state = algorithm.init(key, problem.start(key))
    rows = []
    for _ in range(config.values["iterations"]):
        state, info = algorithm.step(key, state)
        rows.append((info.objective, info.gradient_norm))
    return np.array(rows), np.asarray(state.x)


@pytest.mark.slow
def test_sweep_is_the_same_as_single_runs(rooms, tmp_path):
    """seed x learning rate x temperature x beta x discount in one program; run by run the numbers of single runs."""
    for number, point in enumerate(rooms.config.grid):
        # with the lower level and the adjoint exact, this is gradient descent
        problem = problem_of(rooms.config, point)
        x = problem.start(jax.random.key(point["seed"]))
        objectives, norms = [], []
        for _ in range(3):
            exact = bj.hypergradient(problem, x, with_error=False)
            objectives.append(exact.value)
            norms.append(jnp.linalg.norm(exact.gradient))
            x = x - point["optimizer.learning_rate"] * exact.gradient
        np.testing.assert_allclose(rooms.curve(number)[:2], objectives[::2], rtol=1e-9)
        np.testing.assert_allclose(rooms.curve(number, "gradient_norm")[:2], norms[::2], rtol=1e-9)
        np.testing.assert_allclose(rooms.final["x"][number], x, rtol=1e-9, atol=1e-12)
    # and through the command line, with every value in its section
    number = 29
    alone = finished(tmp_path, ROOMS, *(f"{key}={value}" for key, value in rooms.config.grid[number].items()))
    assert len(alone.runs) == 1
    for column in METRICS[2:4]:
        np.testing.assert_allclose(alone.curve(0, column), rooms.curve(number, column), rtol=1e-9)
    for name, array in alone.final.items():
        np.testing.assert_allclose(array[0], rooms.final[name][number], rtol=1e-9, atol=1e-12)
    for column in ("final_value", "best_value", "gradient_norm"):
        np.testing.assert_allclose(float(alone.runs[0][column]), float(rooms.runs[number][column]), rtol=1e-9)


@pytest.mark.slow
def test_inexact_lower_level_and_descent_adjoint(synthetic):
    """Value iteration of three sweeps and two descent steps, over the seeds of the problem."""
    solver, optimizer = bj.ValueIteration(max_iterations=3, centred=False), optax.sgd(0.1)
    adjoint = bj.Descent(step_size=0.5, iterations=2)
    for number, point in enumerate(synthetic.config.grid):
        assert point == {"seed": 0, "problem.seed": number, "optimizer.learning_rate": 0.1}
        rows, x = reference(synthetic.config, point, optimizer, solver, adjoint)
        np.testing.assert_allclose(synthetic.curve(number)[:2], rows[[0, 3], 0], rtol=1e-9)
        np.testing.assert_allclose(synthetic.curve(number, "gradient_norm")[:2], rows[[0, 3], 1], rtol=1e-9)
        np.testing.assert_allclose(synthetic.final["x"][number], x, rtol=1e-9)
    during = [row for row in synthetic.metrics if row["iteration"] != "5"]
    assert {row["lower_level_result"] for row in during} == {str(int(bj.Result.MAX_ITERATIONS))}
    assert min(float(row["lower_level_error_bound"]) for row in during) > 1e-6
    assert len({row["final_value"] for row in synthetic.runs}) == 5


@pytest.fixture(scope="module")
def chunked(tmp_path_factory, two_runs) -> tuple[Finished, Program, list]:
    """SYNTHETIC with a limit for two runs, its program and the chunks."""
    seen = []
    original = Program.cuts

    def cuts(program, runs, limit):
        seen[:] = program, original(program, runs, limit)
        return seen[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "cuts", cuts)
        return finished(tmp_path_factory.mktemp("chunked"), SYNTHETIC, two_runs), *seen


@pytest.mark.slow
def test_chunks(chunked, synthetic):
    """Three chunks of two runs, the last filled up with a copy, and the numbers of one chunk."""
    done, _, cut = chunked
    assert cut == [Cut([0, 1], [0, 1]), Cut([2, 3], [2, 3]), Cut([4], [4, 4])]

    def numbers(rows):
        ordered = sorted(rows, key=lambda row: int(row["run"]))
        return np.array(
            [[WORDS.index(value) if value in WORDS else float(value) for value in row.values()] for row in ordered]
        )

    np.testing.assert_allclose(numbers(done.runs), numbers(synthetic.runs), rtol=1e-9)
    np.testing.assert_allclose(numbers(done.metrics), numbers(synthetic.metrics), rtol=1e-9, atol=1e-12)
    for name, array in synthetic.final.items():
        np.testing.assert_allclose(done.final[name], array, rtol=1e-12, atol=1e-14)
    same = ("runs", "finished_runs", "best_run", "best_run_settings", "results", "ended_by")
    assert [done.summary[key] for key in same] == [synthetic.summary[key] for key in same]
    assert "25/25" in done.called.err


@pytest.mark.slow
def test_chunks_stay_below_the_limit(chunked):
    done, program, _ = chunked
    assert memory(program) <= done.config.values["memory_limit_mb"] * 2**20


@pytest.mark.slow
def test_too_small_a_limit_for_one_run(tmp_path):
    refused = start(tmp_path, SYNTHETIC, "memory_limit_mb=1e-6")
    assert refused.called.code == 2
    message = r"bilevel-jax: error: memory_limit_mb: one run needs about [\d.]+ MiB, the limit is 1e-06; raise it .*"
    assert re.fullmatch(message, refused.called.message)
    assert not (refused.directory / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("key", ["learning_rate", "clip_norm"])
def test_integer_first_in_a_sweep_of_the_optimizer(key, tmp_path):
    """1 does not make the others whole numbers as well."""
    done = finished(tmp_path, SYNTHETIC, "sweep.problem.seed=[0]", f"sweep.optimizer.{key}=[1, 0.1, 0.2, 0.3, 0.4]")
    assert len({done.curve(number)[0] for number in range(5)}) == 1
    assert len({done.curve(number)[-1] for number in range(5)}) == 5


def is_number(key: str, values: dict) -> bool:
    """Whether a key is a number that may vary within a program: a float, or a seed."""
    value = get(values, key)
    structure = ("optimizer.b1", "optimizer.b2", "optimizer.eps", "optimizer.eps_root", "optimizer.momentum")
    return (value is None or isinstance(value, float) or key.endswith("seed")) and key not in structure


def one_point(key: str, values: dict) -> list:
    """A value to sweep the key at that is not the config's, so that an ignored key is seen."""
    for part in key.split("."):
        values = values[part]
    if key.endswith("seed"):
        return [values + 1]
    return [1e-6] if values is None else [0.9 * values]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "solver", "adjoint", "optimizer"),
    [
        ("synthetic", "value_iteration", "descent", "adam"),
        ("synthetic", "policy_iteration", "gmres", "sgd"),
        ("four_rooms", "policy_iteration", "neumann", "sgd"),
        ("four_rooms", "value_iteration", "gmres", "adam"),
    ],
)
def test_every_number_of_a_sweep_runs(problem, solver, adjoint, optimizer, tmp_path):
    """All keys as traced numbers, against the same numbers as constants; clip_norm where there is none by default."""
    small = {"states": 3, "actions": 2, "dimension": 2} if problem == "synthetic" else {}
    raw = {
        "problem": {"name": problem, "temperature": 0.1, "discount": 0.95, **small},
        "algorithm": {
            "solver": {"name": solver, "max_iterations": 20},
            "adjoint": {"name": adjoint, **({"terms": 50} if adjoint == "neumann" else {})},
        },
        "optimizer": {"name": optimizer, "learning_rate": 0.3},
        "iterations": 3,
        "record_every": 1,
    }
    base = load(write(tmp_path, yaml.safe_dump(raw)))
    numbers = [key for key in sweepable(base.values) if is_number(key, base.values)]
    axes = {key: one_point(key, base.values) for key in numbers}
    axes["optimizer.clip_norm"] = [1e-6, 1e6]
    assert base.values["optimizer"]["clip_norm"] is None
    done = finished(tmp_path, yaml.safe_dump(raw | {"sweep": axes}))
    assert set(done.runs[0]) >= set(axes)
    assert len(done.runs) == 2
    made = {"value_iteration": bj.ValueIteration, "policy_iteration": bj.PolicyIteration}
    made |= {"descent": bj.Descent, "gmres": bj.GMRES, "neumann": bj.Neumann}
    for number, point in enumerate(done.config.grid):
        values = done.config.at(point)
        arguments = [{k: v for k, v in values["algorithm"][k].items() if k != "name"} for k in ("solver", "adjoint")]
        rule = getattr(optax, optimizer)(point["optimizer.learning_rate"])
        clipped = optax.chain(optax.clip_by_global_norm(point["optimizer.clip_norm"]), rule)
        rows, x = reference(done.config, point, clipped, made[solver](**arguments[0]), made[adjoint](**arguments[1]))
        np.testing.assert_allclose(done.curve(number)[:3], rows[:, 0], rtol=1e-9)
        np.testing.assert_allclose(done.final["x"][number], x, rtol=1e-6, atol=1e-9)
    assert not np.array_equal(done.final["x"][0], done.final["x"][1])


# ---- Precision, and a process of its own ---------------------------------------------------------------


@pytest.mark.slow
def test_float32(tmp_path):
    done = finished(tmp_path, SYNTHETIC, "precision=float32")
    assert jax.config.jax_enable_x64  # as before the run
    assert {name: array.dtype for name, array in done.final.items()} == dict.fromkeys(
        ("x", "best_x", "policy", "value"), np.dtype(np.float32)
    )
    for row in done.runs:
        assert row["result"] == "converged"
        assert float(row["best_value"]) <= float(row["final_value"])


@pytest.mark.slow
def test_fresh_process(rooms, tmp_path):
    """float64 is off until the runner switches it on; the numbers are those of this process."""
    changed = ("JAX_ENABLE_X64", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "bilevel_jax.experiments.cli",
            "run",
            write(tmp_path, ROOMS + ROOMS_SWEEP),
            "--out",
            "out",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name not in changed},
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert "config: 32 runs" in process.stdout
    done = Finished(Called(0, process.stdout, process.stderr), tmp_path / "out")
    for name, array in rooms.final.items():
        assert done.final[name].dtype == np.float64
        np.testing.assert_allclose(done.final[name], array, rtol=1e-9, atol=1e-12)
    for number in range(32):
        for column in METRICS[2:4]:
            np.testing.assert_allclose(done.curve(number, column), rooms.curve(number, column), rtol=1e-9)
    assert_picture(done.directory / "incentive.png")


def test_default_directory(tmp_path, monkeypatch):
    def instead(config, directory, fresh):
        assert directory is None
        assert not fresh
        with claimed(directory, config.name, "run", config.values) as place:
            return {"runs": 1, "seconds": 1.0, "compile_seconds": 0.5, "final_value": None}, place

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bilevel_jax.experiments.present.run.run", instead)
    monkeypatch.setattr("bilevel_jax.experiments.present.plots.plot", lambda directory: [])
    called = command("run", write(tmp_path, SYNTHETIC, "mine.yaml"))
    assert called.code == 0
    assert called.out.startswith("mine: 1 runs in 1.0 s (compile 0.5 s), best final objective none\n")
    (directory,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"mine-\d{8}-\d{6}", directory.name)
    # Another one in the same second has a directory of its own.
    for _ in range(3):
        assert command("run", write(tmp_path, SYNTHETIC, "mine.yaml")).code == 0
    assert len(list((tmp_path / "runs").iterdir())) == 4


# ---- What goes wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["file/out", "file"])
def test_unwritable_out(below, tmp_path):
    (tmp_path / "file").write_text("mine\n")
    called = run(write(tmp_path, SYNTHETIC), tmp_path / below)
    assert called.code == 2
    assert called.out == ""
    assert re.fullmatch(
        rf"bilevel-jax: error: --out {tmp_path / below}: cannot be written \(.*\); give .*\n", called.err
    )
    assert (tmp_path / "file").read_text() == "mine\n"


def test_unwritable_file_in_out(tmp_path):
    (tmp_path / "out" / "resolved.yaml").mkdir(parents=True)
    called = run(write(tmp_path, SYNTHETIC), tmp_path / "out")
    assert called.code == 2
    assert called.err.startswith(f"bilevel-jax: error: --out {tmp_path / 'out'}: resolved.yaml is there already")


@pytest.mark.slow
def test_not_finite(tmp_path):
    """Every run diverges: an error that says where, and the metrics up to there."""
    done = start(tmp_path, SYNTHETIC, "sweep.optimizer.learning_rate=[1e200]", "iterations=6", "record_every=2")
    assert done.called.code == 2
    assert done.called.out == ""
    assert "Traceback" not in done.called.err
    assert done.called.message.startswith("bilevel-jax: error: iteration 1: no run has a finite objective")
    assert "learning_rate" in done.called.message
    assert "metrics.csv" in done.called.message
    rows = done.metrics
    assert [(row["run"], row["iteration"]) for row in rows] == [(r, i) for r in "01234" for i in "01"]
    assert [math.isfinite(float(row["objective"])) for row in rows] == 5 * [True, False]
    called = command("plot", done.directory)
    assert called.code == 2
    assert "holds no finished run" in called.err


# the second chunk of two has no finite run
DIVERGING = ("sweep.problem.seed=[0]", "sweep.optimizer.learning_rate=[0.1, 0.2, 1e200, 1e210, 0.3]")


@pytest.mark.slow
def test_some_runs_not_finite(tmp_path):
    """The others count: best run, pictures and table."""
    done = finished(tmp_path, SYNTHETIC, *DIVERGING)
    assert [row["result"] == "not_finite" for row in done.runs] == [False, False, True, True, False]
    assert done.summary["best_run"] in (0, 1, 4)
    assert done.summary["final_value"] == min(float(done.runs[number]["final_value"]) for number in (0, 1, 4))
    assert done.summary["results"] == {"converged": 3, "not_finite": 2}
    assert_picture(done.directory / "learning_curves.png")


@pytest.mark.slow
def test_one_chunk_not_finite(tmp_path, two_runs):
    """That chunk ends early, the others are run."""
    done = finished(tmp_path, SYNTHETIC, *DIVERGING, two_runs)
    assert [row["result"] == "not_finite" for row in done.runs] == [False, False, True, True, False]
    assert [len(done.curve(number)) for number in range(5)] == [3, 3, 2, 2, 3]
    assert done.summary["final_value"] == min(float(done.runs[number]["final_value"]) for number in (0, 1, 4))
    assert done.final["x"].shape == (5, 2)
    assert_picture(done.directory / "learning_curves.png")


class Interrupt:
    """Sends SIGINT to this process when a chunk has recorded its point of a number, counted over all chunks."""

    def __init__(self, monkeypatch, at: int):
        self.left = at
        original = trainer._Walk._record

        def record(walk, exact):
            original(walk, exact)
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(trainer._Walk, "_record", record)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Finished:
    """Two runs per chunk, interrupted in the second chunk after its first of two segments."""
    with pytest.MonkeyPatch.context() as patch:
        Interrupt(patch, 4)
        directory = tmp_path_factory.mktemp("interrupted")
        two = limit(directory, "sweep.seed=[0, 1]", "sweep.problem.seed=[0]")
        return start(directory, SYNTHETIC, *FIVE_SEEDS, two)


@pytest.mark.slow
def test_interrupted(interrupted):
    assert interrupted.called.code == 130
    assert interrupted.called.out == ""
    assert "Traceback" not in interrupted.called.err
    assert interrupted.called.message.startswith("bilevel-jax: interrupted")
    rows = [(row["run"], row["iteration"]) for row in interrupted.metrics]
    assert rows == [("0", "0"), ("0", "3"), ("0", "5"), ("1", "0"), ("1", "3"), ("1", "5"), ("2", "0"), ("3", "0")]
    assert [row["run"] for row in interrupted.runs] == ["0", "1"]
    assert interrupted.final["x"].shape == (2, 2)
    summary = interrupted.summary
    assert summary["interrupted"] is True
    assert (summary["runs"], summary["finished_runs"]) == (5, 2)
    assert summary["final_value"] == min(float(row["final_value"]) for row in interrupted.runs)


@pytest.mark.slow
def test_plot_of_an_interrupted_run(interrupted):
    """All four runs that started are of one line, two of them have two rows less."""
    called = command("plot", interrupted.directory)
    pictures = [interrupted.directory / name for name in ("learning_curves.png", "incentive.png")]
    assert called == Called(0, "".join(f"{path}\n" for path in pictures), "")
    for path in pictures:
        assert_picture(path)


def test_interrupted_before_a_run_is_finished(tmp_path, monkeypatch):
    Interrupt(monkeypatch, 1)
    done = start(tmp_path, SYNTHETIC)
    assert done.called.code == 130
    assert [(row["run"], row["iteration"]) for row in done.metrics] == [(str(number), "0") for number in range(5)]
    summary = done.summary
    assert (summary["runs"], summary["finished_runs"], summary["interrupted"]) == (5, 0, True)
    assert summary["final_value"] is summary["best_value"] is summary["best_run"] is None
    called = command("plot", done.directory)
    assert called.code == 2
    assert "holds no finished run (runs.csv, final.npz missing)" in called.err


@pytest.mark.slow
def test_two_runs_into_one_directory(tmp_path, synthetic, monkeypatch):
    """The same config goes on, here with nothing left to do; another is refused; --fresh moves away what is there."""
    out = tmp_path / "deep" / "out"
    shutil.copytree(synthetic.directory, out)
    before = contents(out)
    monkeypatch.setattr(Program, "cuts", lambda *arguments: pytest.fail("computed again"))
    again = start(tmp_path, SYNTHETIC)
    assert again.called.code == 0
    assert {name: data for name, data in contents(out).items() if name in EXACT} == {
        name: data for name, data in before.items() if name in EXACT
    }
    before = contents(out)
    other = start(tmp_path, SYNTHETIC, "algorithm.adjoint.iterations=3")
    assert other.called.code == 2
    assert "algorithm.adjoint.iterations: was 2, is 3" in other.called.message
    assert contents(out) == before
    monkeypatch.undo()
    fresh = run(write(tmp_path, SYNTHETIC), out, ["algorithm.adjoint.iterations=3", "--fresh"])
    assert fresh.code == 0, fresh.err
    assert {name: (out / "before-1" / name).read_bytes() for name in EXACT} == {name: before[name] for name in EXACT}
    assert (out / "final.npz").read_bytes() != before["final.npz"]


EXACT = ("metrics.csv", "runs.csv", "final.npz", "resolved.yaml", "learning_curves.png")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(
    "order",
    [
        "run CONFIG KEY --out DIR",
        "run --out DIR CONFIG KEY",
        "run CONFIG --out DIR KEY",
        "run CONFIG KEY --out DIR KEY",
    ],
)
def test_order_of_the_arguments(order, tmp_path, monkeypatch):
    """The documented one is `run CONFIG [--out DIR] [key=value ...]`."""
    given = []

    def instead(options):
        given.append((options.config, options.out, options.overrides))

    monkeypatch.setattr(cli, "_run", instead)
    words = {"CONFIG": "c.yaml", "KEY": "seed=1", "DIR": str(tmp_path)}
    assert cli.main([words.get(word, word) for word in order.split()]) == 0
    assert given == [("c.yaml", tmp_path, order.count("KEY") * ["seed=1"])]


def test_no_command(capsys):
    with pytest.raises(SystemExit) as exit_status:
        cli.main([])
    assert exit_status.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_extra_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "yaml", None)
    for module in ("source", "cells", "sections", "keys", "config"):
        monkeypatch.delitem(sys.modules, f"bilevel_jax.experiments.{module}")
    called = run(tmp_path / "c.yaml", tmp_path / "out")
    assert called.code == 2
    assert called.err == "bilevel-jax: error: yaml is not installed; pip install 'bilevel_jax[cli]'\n"
