"""What people do to a command line: messages instead of tracebacks, numbers as they are meant."""

import errno
import os
import subprocess
import sys
import time

import pytest
from experiment_helpers import command, run, write

from bilevel_jax.core.errors import InputError
from bilevel_jax.experiments.comparison import load_comparison
from bilevel_jax.experiments.config import load

SMALL = "problem: {name: synthetic, states: 3, actions: 2, dimension: 2}\niterations: 2\n"


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1E2", 100.0), (".5", 0.5), ("2.", 2.0), ("1_000", 1000), ("+3", 3)]
)
def test_numbers_are_read_as_people_write_them(text, value, tmp_path):
    assert load(write(tmp_path, SMALL + f"optimizer: {{learning_rate: {text}}}\n")).values["optimizer"][
        "learning_rate"
    ] == pytest.approx(value)


@pytest.mark.parametrize("text", ["010", "08", "1:30", "0x10", "0o7", "00", "-01", "1_0:3", "1e", "0b1"])
@pytest.mark.parametrize("key", ["seed", "iterations", "problem.states", "problem.temperature"])
def test_numbers_that_mean_something_else_are_refused(text, key, tmp_path):
    with pytest.raises(InputError, match=rf"{key} .*{text}"):
        load(write(tmp_path, SMALL), [f"{key}={text}"])


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "y", "n"])
def test_words_are_words(word, tmp_path):
    with pytest.raises(InputError, match=f"nesterov .*{word}"):
        load(write(tmp_path, SMALL), ["optimizer=sgd", f"optimizer.nesterov={word}"])


@pytest.mark.parametrize("sweep", ["seed: [1, 1]", "seed: [1, '1']", "problem.temperature: [0.5, 5.0e-1]"])
def test_points_of_a_sweep_that_are_equal_are_refused(sweep, tmp_path):
    with pytest.raises(InputError, match="stands here a second time; remove one"):
        load(write(tmp_path, SMALL + f"sweep: {{{sweep}}}\n"))


def test_a_sweep_is_counted_before_it_is_made(tmp_path):
    axes = [f"sweep.{key}={list(range(1, 1001))}" for key in ("seed", "problem.seed")]
    started = time.monotonic()
    with pytest.raises(InputError, match=r"sweep .*1,000,000,000 runs, of which 1,000,000 at most"):
        load(write(tmp_path, SMALL), [*axes, f"sweep.optimizer.learning_rate={list(range(1, 1001))}"])
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_seeds_do_not_build_the_problem_again(tmp_path, monkeypatch):
    from bilevel_jax.problems import registry

    built = []
    original = registry.make
    monkeypatch.setattr(registry, "make", lambda name, **options: built.append(name) or original(name, **options))
    path = write(tmp_path, "problem: {name: synthetic, states: 4, actions: 3, dimension: 3}\n")
    assert len(load(path, [f"sweep.seed={list(range(100))}"]).grid) == 100
    assert len(built) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sweep.optimizer.name=[adam, sgd]", "options go with a name: bilevel-jax compare takes several algorithms"),
        ("sweep.problem.name=[garnet]", "options go with a name"),
        ("sweep={optimizer: {learning_rate: [0.1]}}", r"write dotted keys, such as optimizer.learning_rate: \[...\]"),
    ],
)
def test_sweeps_of_what_cannot_be_swept(override, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load(write(tmp_path, SMALL), [override])


def test_a_config_of_another_command(tmp_path):
    comparison = write(tmp_path, "problems: [garnet]\nalgorithms: [hpgd]\n", "comparison.yaml")
    called = command("run", comparison)
    assert (called.code, "give it to bilevel-jax compare" in called.message) == (2, True)
    called = command("compare", write(tmp_path, SMALL))
    assert (called.code, "give it to bilevel-jax run" in called.message) == (2, True)
    called = command("run", write(tmp_path, "study: accuracy\n", "study.yaml"))
    assert (called.code, "benchmarks/studies" in called.message) == (2, True)
    record = write(tmp_path, "command: compare\nproblems: [garnet]\nalgorithms: [hpgd]\n", "resolved.yaml")
    called = command("run", record)
    assert (called.code, "is of bilevel-jax compare" in called.message) == (2, True)


def test_a_limit_of_seconds_alone_is_the_only_one(tmp_path):
    text = "problems: [garnet]\nalgorithms: [m_sobirl]\n"
    values = load_comparison(write(tmp_path, text + "budget: {seconds: 3}\n")).values
    assert values["budget"] == {"seconds": 3.0, "transitions": None, "iterations": None}
    assert load_comparison(write(tmp_path, text)).values["budget"]["transitions"] == 1_000_000


def test_an_algorithm_that_does_not_run_on_the_problem(tmp_path):
    with pytest.raises(InputError, match=r"algorithm.name .*hpgd does not run on synthetic, which has no simulator"):
        load(write(tmp_path, SMALL + "algorithm: hpgd\n"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm={name: pbrl, weight: -1}", r"algorithm.weight \(command line.* must be above 0"),
        ("algorithm={name: amd, sweeps: 0}", r"algorithm.sweeps \(command line"),
        ("algorithm={name: m_sobirl, adjoint: neumann}", r"algorithm.adjoint.terms \(command line.*has no default"),
        (
            "temperature={name: cooling, start: -1, iterations: 3}",
            r"temperature.start \(command line.* must be above 0",
        ),
        ("temperature=cooling", r"temperature.start \(command line.*has no default"),
        ("projection={name: simplex, scale: none}", r"projection.scale \(command line"),
        ("optimizer=lbfgs", r"optimizer.name .*no optimizer 'lbfgs'"),
        (
            "algorithm.solver={name: newton_krylov, krylov: direct}",
            r"algorithm.solver.krylov.name .*valid: adaptive_krylov, bicgstab, gmres",
        ),
    ],
)
def test_what_a_constructor_refuses_is_said_with_the_key(override, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load(write(tmp_path, SMALL), [override])


def shell(words, directory, **environment):
    line = [sys.executable, "-m", "bilevel_jax.experiments.cli", *words]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    return subprocess.run(
        line, cwd=directory, env={**clean, **environment}, capture_output=True, text=True, errors="replace", timeout=600
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"JAX_DISABLE_JIT": "1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    ],
    ids=["without jit", "ASCII"],
)
def test_other_surroundings(environment, tmp_path):
    text = "problems: [{name: synthetic, states: 3, actions: 2, dimension: 2}]\nalgorithms: [{name: amd, sweeps: 2}]\n"
    write(tmp_path, text + "seeds: [0, 1]\nbudget: {transitions: 300}\npoints: 2\n")
    done = shell(["compare", "config.yaml", "--out", "out"], tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "index.html").exists()


@pytest.mark.slow
def test_a_device_that_does_not_exist(tmp_path):
    write(tmp_path, SMALL)
    done = shell(["run", "config.yaml", "--out", "out"], tmp_path, JAX_PLATFORMS="cuda")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "bilevel-jax: error:" in done.stderr


def test_run_without_arguments(capsys):
    from bilevel_jax.experiments import cli

    with pytest.raises(SystemExit) as status:
        cli.main(["run"])
    assert status.value.code == 2
    assert "config" in capsys.readouterr().err


def test_a_directory_where_a_picture_belongs_is_refused_before_anything_runs(tmp_path):
    path, out = write(tmp_path, SMALL), tmp_path / "out"
    (out / "learning_curves.png").mkdir(parents=True)
    called = run(path, out)
    assert called.code == 2
    assert "learning_curves.png" in called.message
    assert "--fresh" in called.message
    assert {found.name for found in out.iterdir()} == {"learning_curves.png", ".bilevel-jax.lock"}


@pytest.mark.slow
def test_pictures_that_cannot_be_written_lose_nothing(tmp_path, monkeypatch):
    path, out = write(tmp_path, SMALL), tmp_path / "out"

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("matplotlib.figure.Figure.savefig", full)
        called = run(path, out)
    assert called.code == 2
    assert "the results are complete, and bilevel-jax plot" in called.message
    assert "No space left" in called.message
    assert (out / "summary.json").exists()
    assert not (out / "learning_curves.png").exists()
    assert command("plot", out).code == 0
    assert (out / "learning_curves.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metrics.csv", "runs.csv", "final.npz", "summary.json", "resolved.yaml"])
def test_plot_of_files_that_were_cut(name, tmp_path):
    path, out = write(tmp_path, SMALL), tmp_path / "out"
    assert run(path, out).code == 0
    content = (out / name).read_bytes()
    (out / name).write_bytes(content[: len(content) // 2])
    called = command("plot", out)
    assert called.code == 0 or (called.code == 2 and "Traceback" not in called.err)
    (out / name).write_bytes(b"\xff\x00")
    called = command("plot", out)
    assert (called.code, "Traceback" in called.err) == (2, False)
    assert name in called.message
    # Started again, the run writes them anew.
    if name != "resolved.yaml":
        assert run(path, out).code == 0
        assert command("plot", out).code == 0
