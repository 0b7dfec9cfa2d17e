"""Runs that cannot be written, diverge, are interrupted, or meet an earlier run."""

import math
import re
import shutil
import signal
from pathlib import Path

import pytest
from experiment_helpers import (
    FIVE_SEEDS,
    SYNTHETIC,
    Called,
    Finished,
    assert_picture,
    command,
    finished,
    limit,
    run,
    start,
    write,
)

import bilevel_jax as bj
from bilevel_jax.experiments import trainer
from bilevel_jax.experiments.directory import LOCK, claimed
from bilevel_jax.experiments.program import Program

pytestmark = pytest.mark.usefixtures("as_from_the_shell")


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


@pytest.mark.slow
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
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file() and path.name != LOCK}


@pytest.mark.parametrize(
    "name", ["archive.part1.rar", "data.part1", "metrics.csv.part", "checkpoints/my.part9.txt", "cells.part2"]
)
def test_only_own_parts_are_removed(name, tmp_path):
    with claimed(tmp_path, "n", "run", {"a": 1}):
        pass
    for path in (tmp_path / name, tmp_path / "checkpoints" / "x-1.npz.part77", tmp_path / "metrics.csv.part77"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (tmp_path / "x.part2").mkdir()
    with claimed(tmp_path, "n", "run", {"a": 1}):
        assert (tmp_path / name).read_text() == "mine"
        assert not (tmp_path / "metrics.csv.part77").exists()
        assert not (tmp_path / "checkpoints" / "x-1.npz.part77").exists()


def test_what_a_link_leads_to_is_not_written_to(tmp_path):
    (tmp_path / "kept").write_text("precious")
    (tmp_path / LOCK).symlink_to(tmp_path / "kept")
    with pytest.raises(bj.InputError, match="cannot be written"), claimed(tmp_path, "n", "run", {"a": 1}):
        pass
    assert (tmp_path / "kept").read_text() == "precious"


@pytest.mark.parametrize("name", ["resolved.yaml", "metrics.csv", "cells", "incentive.png"])
def test_links_that_lead_nowhere_are_files_of_the_user(name, tmp_path):
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(bj.InputError, match="is there already"), claimed(tmp_path, "n", "run", {"a": 1}):
        pass
    (tmp_path / "before-1").symlink_to(tmp_path / "nowhere")
    with claimed(tmp_path, "n", "run", {"a": 1}, fresh=True):
        assert (tmp_path / "before-2" / name).is_symlink()


@pytest.mark.parametrize("text", ["[" * 3000, "a: 1", "command: walk", "- run", ""])
def test_a_record_that_is_none_is_a_file_of_the_user(text, tmp_path):
    (tmp_path / "resolved.yaml").write_text(text)
    with pytest.raises(bj.InputError, match=r"resolved.yaml is there already.*before-1"):  # noqa: SIM117
        with claimed(tmp_path, "n", "run", {"a": 1}):
            pass
    assert (tmp_path / "resolved.yaml").read_text() == text
