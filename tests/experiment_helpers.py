"""What the tests of experiments share: small configs, calling the command line in-process, reading what it wrote."""

import contextlib
import csv
import dataclasses
import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib.image
import numpy as np
import yaml

import bilevel_jax as bj
from bilevel_jax.experiments import cli
from bilevel_jax.experiments.choices import choices
from bilevel_jax.experiments.config import Config, from_directory, load
from bilevel_jax.experiments.program import Program
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
ROOMS_BY_ADAM = """\
problem:
  name: four_rooms
  temperature: 0.05
algorithm:
  name: m_sobirl
  solver: {name: policy_iteration}
  adjoint:
    name: direct
optimizer:
  name: adam
  learning_rate: 0.1
iterations: 5
record_every: 2
sweep:
  seed: [0, 1]
  problem.beta: [3.0]
"""
BARE_SYNTHETIC = """\
problem: {name: synthetic, states: 3, actions: 2, dimension: 2}
iterations: 5
"""
WORDS = ["converged", "iterations"]
FIVE_SEEDS = ("sweep.seed=[0, 1, 2, 3, 4]", "sweep.problem.seed=[0]")


class Called(NamedTuple):
    """One call of the command line: exit status and what it printed."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The line that explains the exit, without the progress bar."""
        return self.err.replace("\r", "\n").strip().split("\n")[-1]


def command(*arguments: str | Path) -> Called:
    """Call `bilevel-jax` in this process. Unlike capsys, it works in fixtures of a module too."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    return Called(code, out.getvalue(), err.getvalue())


def run(config: Path, out: Path, overrides: Sequence[str] = ()) -> Called:
    return command("run", config, *overrides, "--out", out)


def write(directory: Path, text: str, name: str = "config.yaml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@contextlib.contextmanager
def promotion_as_users_have_it():
    """The promotion of dtypes that jax has by itself, which optax's Adam needs."""
    before = jax.config.values["jax_numpy_dtype_promotion"]
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    try:
        yield
    finally:
        jax.config.update("jax_numpy_dtype_promotion", before)


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


def assert_picture(path: Path) -> None:
    pixels = matplotlib.image.imread(path)
    assert pixels.ndim == 3
    assert min(pixels.shape[:2]) > 200
    assert pixels[..., :3].std() > 0.01


def library_choices(*bases):
    """The choices that the library itself has; classes of other test modules in this process count as a user's."""
    found = choices(bases)
    return {name: choice for name, choice in found.items() if choice.build.__module__.startswith("bilevel_jax.")}
