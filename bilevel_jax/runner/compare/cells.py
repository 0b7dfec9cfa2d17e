"""The cells of a comparison, a method on a problem each: run, and kept on disk chunk by chunk."""

import functools
import json
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel_jax.errors import InputError
from bilevel_jax.runner.compare.config import Cell
from bilevel_jax.runner.compare.race import Curves, Entry, Race
from bilevel_jax.runner.methods import METHODS
from bilevel_jax.runner.sweep import build_problem


class Outcome(NamedTuple):
    """What came of a cell. `reason`: why the method does not apply, and then there is nothing else.

    `runs` are places in `cell.runs`, in order. `curves`: of those runs, seconds [P, R] included; x is None.
    `x`: leaves [R, ...] of the last x. `compile_seconds`: of all chunks together.
    """

    cell: Cell
    reason: str | None
    curves: Curves | None = None
    x: list[np.ndarray] | None = None
    compile_seconds: float = 0.0

    @property
    def diverged(self) -> np.ndarray:
        """Runs whose last objective is not finite, bool [R]."""
        assert self.curves is not None
        return ~np.isfinite(self.curves.objective[-1])


def run_cell(cell: Cell, directory: Path, report: Callable[[str], None]) -> Outcome:
    """The cell's outcome: from the directory as far as it is there, the rest computed and written there.

    Call it with the cell's precision set.
    """
    race = race_of(cell)
    if isinstance(race, str):
        return Outcome(cell, race)
    stored = _stored(cell, directory)
    missing = [run for run in range(len(cell.runs)) if run not in stored]
    if missing:
        started = time.perf_counter()
        chunks = race.cuts(missing, cell.shared["memory_limit_mb"])
        compile_seconds = time.perf_counter() - started
        for number, chunk in enumerate(chunks):
            curves = race.run(chunk, *points(cell))
            _store(cell, directory, chunk.runs, curves, 0.0 if number else compile_seconds)
            report(f"{cell.name}: {len(chunk.runs)} runs, {curves.seconds[-1]:.3g} s each")
        stored = _stored(cell, directory)
    return _outcome(cell, stored)


def race_of(cell: Cell) -> Race | str:
    """The cell's runs, nothing compiled yet; or why the method does not apply.

    Raises:
      InputError: an option that the method refuses.
    """
    problem, method = problem_of(cell), METHODS[cell.method["name"]]
    options = [cell.options_at(setting) for setting in cell.settings]
    if (reason := method.applies(problem, options[0])) is not None:
        return reason
    optimizers = [cell.optimizer_at(setting) for setting in cell.settings]
    entries = [Entry(options[place], optimizers[place], seed) for place, seed in cell.runs]
    try:
        return Race(method, problem, entries, cell.budget["transitions"], cell.shared["samples"])
    except InputError as error:
        raise InputError(f"{cell.name}: {error}") from None


def problem_of(cell: Cell) -> Any:
    """The problem of the cell's section."""
    return _problem(json.dumps(cell.problem), cell.shared["precision"])


@functools.lru_cache(maxsize=1)  # cells go problem by problem
def _problem(section: str, precision: str) -> Any:
    del precision
    return build_problem({k: v for k, v in json.loads(section).items() if k != "label"})


def points(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """Transitions and seconds at each point of the curves, infinite where the budget does not limit them."""
    shares = np.geomspace(cell.shared["first"], 1, cell.shared["points"]) if cell.shared["points"] > 1 else np.ones(1)
    limits = (cell.budget["transitions"], cell.budget["seconds"])
    transitions, seconds = (np.full(shares.shape, np.inf) if limit is None else shares * limit for limit in limits)
    return np.floor(transitions), seconds


def _store(cell: Cell, directory: Path, runs: list[int], curves: Curves, compile_seconds: float) -> None:
    """Write a chunk under another name first: a file that is there is whole."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{cell.file_name}-{runs[0]}.npz"
    arrays = {name: value for name, value in curves._asdict().items() if name != "x"}
    leaves = {f"x{i}": leaf for i, leaf in enumerate(jax.tree.leaves(curves.x))}
    part = path.with_suffix(f".part{os.getpid()}")
    with part.open("wb") as file:
        np.savez(file, runs=np.asarray(runs), compile_seconds=compile_seconds, **arrays, **leaves)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    # For people: what the key in the file's name stands for.
    described = {"problem": cell.problem, "method": cell.method, "budget": cell.budget, **cell.shared}
    (directory / f"{cell.file_name}.json").write_text(json.dumps(described, indent=2) + "\n")


def _stored(cell: Cell, directory: Path) -> dict[int, tuple[int, dict[str, Any]]]:
    """Where each finished run is: its place in a chunk, and the chunk."""
    found = {}
    for path in sorted(directory.glob(f"*-{cell.key}-*.npz")):
        try:
            with path.open("rb") as file, np.load(file) as arrays:
                chunk = dict(arrays)
        except (OSError, ValueError, zipfile.BadZipFile):
            continue  # not one of ours, or damaged: computed again
        for place, run in enumerate(chunk["runs"].tolist()):
            found[run] = (place, chunk)
    return found


def _outcome(cell: Cell, stored: dict[int, tuple[int, dict[str, Any]]]) -> Outcome:
    own = [stored[run] for run in range(len(cell.runs))]

    def column(name: str) -> np.ndarray:
        return np.stack([chunk[name][:, place] for place, chunk in own], 1)

    curves = Curves(
        column("iterations"),
        column("transitions"),
        np.stack([chunk["seconds"] for _, chunk in own], 1),
        column("objective"),
        column("gradient_norm"),
        None,
    )
    leaves = sum(name.removeprefix("x").isdecimal() for name in own[0][1])
    x = [np.stack([chunk[f"x{i}"][place] for place, chunk in own]) for i in range(leaves)]
    chunks = {id(chunk): float(chunk["compile_seconds"]) for _, chunk in own}
    return Outcome(cell, None, curves, x, sum(chunks.values()))
