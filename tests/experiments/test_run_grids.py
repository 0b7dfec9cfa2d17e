"""Grids of settings in one program: the same numbers as single runs, in chunks that fit into the memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from experiment_helpers import METRICS, ROOMS, SYNTHETIC, WORDS, Finished, finished, memory, problem_of, start, write

import bilevel_jax as bj
from bilevel_jax.experiments.chunks import Cut
from bilevel_jax.experiments.config import Config, load, sweepable
from bilevel_jax.experiments.program import Program
from bilevel_jax.experiments.source import get

pytestmark = pytest.mark.usefixtures("as_from_the_shell")


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
@pytest.mark.often(2)
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
