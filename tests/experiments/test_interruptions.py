"""Runs that are interrupted: by signals, by kill -9, by damage on the disk; and that go on with the same bits."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from experiment_helpers import command, read_rows, run, write

from bilevel_jax.algorithms import registry
from bilevel_jax.experiments import measure, trainer
from bilevel_jax.experiments.checkpoints import Checkpoints, read_arrays, write_arrays
from bilevel_jax.experiments.chunks import _bytes
from bilevel_jax.experiments.config import load
from bilevel_jax.experiments.interruption import InterruptionError, noticed

pytestmark = pytest.mark.usefixtures("as_from_the_shell")

# M-SoBiRL as published: what it carries matters. Two seeds of a problem, four runs.
RUN = """\
problem: {name: synthetic, states: 3, actions: 2, dimension: 2, discount: 0.9}
algorithm: {name: m_sobirl}
optimizer: adam
iterations: 40
record_every: 5
checkpoint: {points: 1}
sweep:
  seed: [0, 1]
  problem.temperature: [0.5, 1.0]
"""
COMPARISON = """\
problems: [{name: synthetic, states: 3, actions: 2, dimension: 2}]
algorithms:
  - {name: m_sobirl, grid: {learning_rate: [0.001, 0.2]}}
  - {name: amd, sweeps: 3}
seeds: [0, 1]
tuning_seeds: [7]
budget: {transitions: 20000}
points: 6
checkpoint: {points: 1}
"""
TIMED = ("seconds", "compile_seconds")


def found(directory: Path) -> dict:
    """All that an experiment found, to the bit, without what a clock says."""
    arrays = {}
    for path in sorted(directory.glob("*.npz")):
        read = read_arrays(path)
        assert read is not None, path
        arrays |= {f"{path.name} {name}": array.tobytes() for name, array in read[0].items()}
    for path in sorted(directory.glob("cells/*.npz")):
        read = read_arrays(path)
        assert read is not None, path
        arrays |= {f"{path.name} {k}": v.tobytes() for k, v in read[0].items() if k != "seconds"}
    tables = {
        path.name: [{k: v for k, v in row.items() if k not in TIMED} for row in read_rows(path)]
        for path in sorted(directory.glob("*.csv"))
    }
    return {**arrays, **tables}


def no_torn_file(directory: Path) -> bool:
    return not list(directory.rglob("*.part*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """What RUN finds if nothing interrupts it."""
    directory = tmp_path_factory.mktemp("whole")
    called = run(write(directory, RUN), directory / "out")
    assert called.code == 0, called.err
    assert not (directory / "out" / "checkpoints").exists() or not list((directory / "out" / "checkpoints").iterdir())
    return found(directory / "out")


class Signal:
    """Sends a signal to this process when a point of a number is recorded."""

    def __init__(self, monkeypatch, number: int, at: int):
        left = [at]
        original = trainer._Walk._record

        def record(walk, exact):
            original(walk, exact)
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(number)

        monkeypatch.setattr(trainer._Walk, "_record", record)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("at", [1, 4])
def test_goes_on_to_the_bit_after_a_signal(number, status, at, tmp_path, whole):
    path, out = write(tmp_path, RUN), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        Signal(patch, number, at)
        called = run(path, out)
    assert called.code == status
    assert "interrupted; the state is kept" in called.message
    assert list((out / "checkpoints").glob("*.npz"))
    # What was recorded is there: one row per run and point.
    assert len(read_rows(out / "metrics.csv")) == 4 * at
    assert run(path, out).code == 0
    assert found(out) == whole
    assert no_torn_file(out)


@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, whole):
    path, out = write(tmp_path, RUN), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        Signal(patch, signal.SIGINT, 5)
        assert run(path, out).code == 130
    newest = max((out / "checkpoints").glob("*.npz"), key=lambda file: file.stat().st_mtime_ns)
    content = newest.read_bytes()
    kept = sorted((out / "checkpoints").glob("*.npz"))
    assert len(kept) == 2
    for damaged in (content[: len(content) // 3], content[:100] + b"\0" * 64 + content[164:], b""):
        copy = tmp_path / f"copy{len(damaged)}"
        shutil.copytree(out, copy)
        (copy / "checkpoints" / newest.name).write_bytes(damaged)
        with pytest.warns(UserWarning, match=re.escape(newest.name) + " is damaged"):
            assert run(path, copy).code == 0
        assert found(copy) == whole
    # With none that is whole it begins anew.
    for file in kept:
        file.write_bytes(b"no zip")
    with pytest.warns(UserWarning, match="is damaged"):
        assert run(path, out).code == 0
    assert found(out) == whole


CHUNKED = """\
problem: {name: garnet, states: 4, actions: 2, branching: 2}
algorithm: {name: m_sobirl, solver: {name: value_iteration, max_iterations: 3}}
iterations: 25
record_every: 10
checkpoint: {points: 1}
sweep:
  problem.seed: [0, 1]
  algorithm.solver.max_iterations: [3, 4]
  optimizer.learning_rate: [0.01, 0.02, 0.03]
"""


@pytest.fixture(scope="module")
def chunked(tmp_path_factory) -> tuple[str, dict]:
    """The override under which programs of CHUNKED have several chunks, and what an uninterrupted run finds."""
    directory = tmp_path_factory.mktemp("chunked")
    path = write(directory, CHUNKED)
    with jax.enable_x64(True):
        made = trainer.Trainer(load(path).cell)
        program, runs = next(iter(made._programs(list(range(12)))))
        program.cuts(range(len(runs))[:4], 1e6)
    limit = f"memory_limit_mb={_bytes(program.advance) / 2**20!r}"
    called = run(path, directory / "out", [limit])
    assert called.code == 0, called.err
    assert len(list((directory / "out" / "cells").glob("*.npz"))) > 2
    return limit, found(directory / "out")


@pytest.mark.often(2)
@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 5, 6, 9, 10])  # of four points per chunk, before its last segment
def test_goes_on_to_the_bit_in_every_chunk_of_every_program(at, tmp_path, chunked):
    limit, whole = chunked
    path, out = write(tmp_path, CHUNKED), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        Signal(patch, signal.SIGTERM, at)
        assert run(path, out, [limit]).code == 143
    events = []
    with pytest.MonkeyPatch.context() as patch:
        restore = trainer._Walk._restore
        patch.setattr(trainer._Walk, "_restore", lambda walk: (restore(walk), events.append(len(walk.points)))[0])
        assert run(path, out, [limit]).code == 0
    assert max(events[:1]) > 0, "it began anew"
    assert found(out) == whole


@pytest.mark.often(2)
@pytest.mark.slow
@pytest.mark.parametrize("at", range(1, 9))
def test_goes_on_to_the_bit_from_any_block(at, tmp_path):
    """A signal while the device works, in the last block too; segments have a block of one iteration and the rest."""
    text = RUN.replace("iterations: 40", "iterations: 25").replace("record_every: 5", "record_every: 10")
    path, out = write(tmp_path, text), tmp_path / "out"
    assert run(path, tmp_path / "whole").code == 0
    original, left = trainer._Walk._advance, [at]

    def advance(walk, target):
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGINT)
        return original(walk, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._Walk, "_advance", advance)
        code = run(path, out).code
    assert code == (130 if left[0] <= 0 else 0)
    assert run(path, out).code == 0
    assert found(out) == found(tmp_path / "whole")


@pytest.mark.slow
def test_a_limit_of_seconds_ends_a_run_at_once(tmp_path):
    """Also where iterations are without end, and a signal is noticed then too."""
    text = RUN.replace("iterations: 40", "iterations: 2000000000").replace("record_every: 5", "record_every: 1")
    path = write(tmp_path, text + "budget: {seconds: 0.02}\n")
    called = run(path, tmp_path / "out", ["checkpoint.points=null"])
    assert called.code == 0, called.err
    rows = read_rows(tmp_path / "out" / "runs.csv")
    assert {row["ended_by"] for row in rows} == {"seconds"}
    assert len(read_rows(tmp_path / "out" / "metrics.csv")) < 40_000


@pytest.mark.slow
def test_a_module_of_other_content_is_another_config(tmp_path):
    code = "import bilevel_jax as bj\nbj.algorithms.register_algorithm('of_a_module', bj.algorithms.amd)\n"
    for name, extra in (("a.py", ""), ("b.py", "# another\n")):
        (tmp_path / name).write_text(code + extra)
    path, out = write(tmp_path, "problem: synthetic\nalgorithm: of_a_module\niterations: 1\n"), tmp_path / "out"
    try:
        assert run(path, out, ["modules=[a.py]", "algorithm.sweeps=2"]).code == 0
        registry._BUILDERS.pop("of_a_module")
        called = run(path, out, ["modules=[b.py]", "algorithm.sweeps=2"])
        assert called.code == 2
        assert "digests" in called.message
    finally:
        registry._BUILDERS.pop("of_a_module", None)


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_no_flipped_bit_ends_in_a_traceback(bit, tmp_path):
    path = tmp_path / "a.npz"
    write_arrays(path, {"x": np.arange(3)}, {"note": "first"})
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :])
        read = read_arrays(path)
        assert read is None or read[0].get("x", np.arange(3)).tolist() == [0, 1, 2]


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_is_named(tmp_path, whole):
    """Of another number of runs at once it is not gone on with; of another jax it is, and either is said."""
    path, out = write(tmp_path, RUN), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        Signal(patch, signal.SIGINT, 3)
        assert run(path, out).code == 130
    for change, message in (({"runs": [0, 1]}, "is of other runs at once"), ({"jax": "0.0"}, "under jax 0.0")):
        copy = tmp_path / next(iter(change))
        shutil.copytree(out, copy)
        for file in (copy / "checkpoints").glob("*.npz"):
            arrays, described = read_arrays(file) or ({}, {})
            write_arrays(file, arrays, described | change)
        with pytest.warns(UserWarning, match=message):
            assert run(path, copy).code == 0
        assert found(copy) == whole


def killed(command_name: str, path: Path, out: Path, patience: float) -> int:
    """Start the command in a process of its own and kill it after so many seconds, unless it ends before."""
    line = [sys.executable, "-m", "bilevel_jax.experiments.cli", command_name, path, "--out", out]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            return process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            return process.wait()


def survives(name: str, text: str, directory: Path, kills: int, seed: int = 0) -> None:
    """Kill a command again and again at random times, let it finish, and compare with one that nothing interrupted."""
    path, out, whole = write(directory, text), directory / "out", directory / "whole"
    started = time.monotonic()
    assert killed(name, path, whole, 600) == 0
    lasted = time.monotonic() - started
    times = random.Random(seed)
    for _ in range(kills):
        if killed(name, path, out, times.uniform(0.3, 1.0) * lasted) == 0:
            assert found(out) == found(whole)
            shutil.rmtree(out)  # it was faster: from the start again
    assert killed(name, path, out, 600) == 0
    assert found(out) == found(whole)
    assert no_torn_file(out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "kills"),
    [
        ("run", RUN, 2),
        pytest.param("compare", COMPARISON, 2, marks=pytest.mark.nightly),
        pytest.param("run", RUN, 25, marks=pytest.mark.nightly),
        pytest.param("compare", COMPARISON, 25, marks=pytest.mark.nightly),
    ],
)
def test_goes_on_to_the_bit_after_kills(name, text, kills, tmp_path):
    survives(name, text, tmp_path, kills)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(("name", "text"), [("run", RUN), ("compare", COMPARISON)])
def test_exit_status_of_a_process(name, text, number, status, tmp_path):
    """While it compiles, too: no segmentation fault, no traceback."""
    text = text.replace("iterations: 40", "iterations: 100000000").replace("transitions: 20000", "seconds: 300")
    line = [sys.executable, "-m", "bilevel_jax.experiments.cli", name, write(tmp_path, text), "--out", tmp_path / "out"]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / "resolved.yaml").exists() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == status, error
    assert "Traceback" not in error
    assert "interrupted; the state is kept" in error


@pytest.mark.often(4)
@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.3, 0.6, 1.0, 1.5, 2.5])
@pytest.mark.parametrize(("name", "text"), [("run", RUN), ("compare", COMPARISON)])
def test_a_signal_before_anything_is_run(name, text, seconds, tmp_path):
    """While configs are read and problems are built, JAX computes already: an exception in its callbacks is lost, or
    ends the process in a segmentation fault.
    """
    text = text.replace("iterations: 40", "iterations: 100000000").replace("transitions: 20000", "seconds: 300")
    (tmp_path / "ready.py").write_text(f"open({str(tmp_path / 'ready')!r}, 'w').close()\n")
    path = write(tmp_path, text + "modules: [ready.py]\n")
    line = [sys.executable, "-m", "bilevel_jax.experiments.cli", name, path, "--out", tmp_path / "out"]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "ready").exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "Exception ignored" not in error


@pytest.mark.slow
def test_a_second_signal_ends_the_process():
    code = (
        "import signal\nfrom bilevel_jax.experiments.interruption import noticed\n"
        "with noticed(again=signal.SIG_DFL):\n    with noticed() as stop:\n        signal.raise_signal(signal.SIGINT)\n"
        "        assert stop.number == signal.SIGINT\n    signal.raise_signal(signal.SIGINT)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGINT


@pytest.mark.slow
def test_a_signal_after_the_last_run_is_not_lost(tmp_path, monkeypatch):
    """What is computed stays; the same command draws the pictures that are missing."""
    path, out = write(tmp_path, RUN), tmp_path / "out"
    original = measure.final

    def final(*arguments):
        signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(measure, "final", final)
    assert run(path, out).code == 130
    monkeypatch.undo()
    assert run(path, out).code == 0
    assert (out / "learning_curves.png").exists()


@pytest.mark.slow
def test_a_second_process_is_refused(tmp_path):
    """The lock is of the process; a process that was killed holds none."""
    out = tmp_path / "out"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom bilevel_jax.experiments.directory import claimed\n"
        "with claimed(Path(sys.argv[1]), 'a', 'run', {}):\n    print('claimed', flush=True)\n    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, out], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    called = run(write(tmp_path, RUN), out)
    assert called.code == 2
    assert f"process {process.pid} on" in called.message
    assert "wait for it, or give another directory" in called.message
    process.kill()
    process.communicate()
    assert "process" not in run(write(tmp_path, RUN), out, ["iterations=0"]).message


@pytest.mark.slow
def test_nothing_is_removed_before_something_new_is_whole(tmp_path):
    """A user's commented config in the directory of the results; a refusal; another kind of experiment."""
    text = "# mine\n" + RUN
    path = write(tmp_path, text)
    assert run(path, tmp_path).code == 0
    assert path.read_text() == text
    before = found(tmp_path)
    for override in ("memory_limit_mb=0.0001", "iterations=41", "optimizer.learning_rate=-1"):
        called = run(path, tmp_path, [override])
        assert called.code == (0 if override.startswith("memory") else 2)  # nothing is left to compute
        assert found(tmp_path) == before
    comparison = write(tmp_path, COMPARISON, "comparison.yaml")
    called = command("compare", comparison, "--out", tmp_path)
    assert called.code == 2
    assert "holds what bilevel-jax run wrote" in called.message


@pytest.mark.parametrize(
    ("kind", "config", "name"),
    [
        pytest.param("run", RUN, "metrics.csv", marks=pytest.mark.slow),
        pytest.param("run", RUN, "learning_curves.png", marks=pytest.mark.slow),
        ("compare", COMPARISON, "best-1.png"),
        ("compare", COMPARISON, "cells"),
    ],
)
def test_a_users_own_file_is_not_overwritten(tmp_path, kind, config, name):
    path, out = write(tmp_path, config), tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    (out / "notes.png").write_text("mine, too")  # of a name that no command writes
    called = command(kind, path, "--out", out)
    assert called.code == 2
    assert f"{name} is there already and would be overwritten" in called.message
    assert (out / name).read_text() == "mine"
    if kind == "run":
        assert run(path, out, ["--fresh"]).code == 0
        assert (out / "before-1" / name).read_text() == "mine"
        assert (out / "notes.png").read_text() == "mine, too"


def test_signals_are_noticed_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with noticed() as stop:
        stop.check()
        signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        with pytest.raises(InterruptionError) as caught:
            stop.check()
        assert caught.value.status == 143
        # The second one of a kind acts as it does without us.
        assert signal.getsignal(signal.SIGTERM) == before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_checkpoints_are_few_and_the_newest_first(tmp_path):
    store = Checkpoints(tmp_path, "name-0", minutes=60.0, points=3, keep=2)
    others = Checkpoints(tmp_path, "name-01", minutes=1e-9, points=None, keep=2)
    for number in range(4):
        store.write({"value": np.asarray(number)}, {"number": number})
    others.write({"value": np.asarray(9)}, {})
    assert [described["number"] for _, _, described in store.latest()] == [3, 2]
    assert [point for point in range(1, 8) if store.due(point)] == [3, 6]
    assert not store.due()
    assert others.due()
    store.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["name-01-1.npz"]


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a.npz"
    write_arrays(path, {"x": np.arange(3)}, {"note": "first"})
    with pytest.raises(TypeError):
        write_arrays(path, {"x": np.arange(4)}, {"note": object()})
    read = read_arrays(path)
    assert read is not None
    assert read[0]["x"].tolist() == [0, 1, 2]
    assert read[1] == {"note": "first"}
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]
