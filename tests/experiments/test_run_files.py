"""What a run leaves: its files, their numbers, and what it prints."""

import itertools
import math
import os
import re
import subprocess
import sys
from importlib.metadata import version

import jax
import numpy as np
import pytest
import yaml
from experiment_helpers import (
    FILES,
    FIVE_SEEDS,
    METRICS,
    ROOMS,
    ROOMS_AXES,
    ROOMS_SWEEP,
    SYNTHETIC,
    Called,
    Finished,
    assert_picture,
    command,
    finished,
    problem_of,
    program_of,
    write,
)

import bilevel_jax as bj
from bilevel_jax.experiments.config import load
from bilevel_jax.experiments.directory import LOCK, claimed

pytestmark = pytest.mark.usefixtures("as_from_the_shell")


@pytest.mark.slow
def test_directory(rooms, synthetic):
    for done in (rooms, synthetic):
        assert sorted(path.name for path in done.directory.iterdir() if path.name != LOCK) == FILES


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
