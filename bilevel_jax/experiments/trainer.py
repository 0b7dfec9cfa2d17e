"""The one trainer: all runs of a cell, within their budget, recorded at the points, kept on disk.

A cell's runs are grouped into programs, and programs are cut into chunks. A finished chunk is a file in `cells/`; a
chunk under way has its latest states in `checkpoints/`. A trainer that is started again goes on from there, with the
same bits.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel_jax.core.errors import InputError, RequirementError
from bilevel_jax.core.saving import as_arrays, as_tree
from bilevel_jax.experiments import measure
from bilevel_jax.experiments.cells import Cell, Target
from bilevel_jax.experiments.checkpoints import SUFFIX, Checkpoints, read_arrays, write_arrays
from bilevel_jax.experiments.chunks import Cut
from bilevel_jax.experiments.interruption import Stop
from bilevel_jax.experiments.outcome import CURVES, Outcome, Point, outcome_of, stacked, unstacked
from bilevel_jax.experiments.program import Limits, Program, Progress, goes_on, structure_of

# Seconds between two looks at the clock, and at the signals.
BLOCK = 1.0
CELLS, CHECKPOINTS = "cells", "checkpoints"


Report = Callable[["Event"], None]


class Event(NamedTuple):
    """An event that the trainer reports while it runs.

    `what` is "iterations" after each call of the device, "point" when one was recorded, "restored" when a checkpoint
    was read, and "chunk" when `runs` are finished. `points` are those recorded so far, `iterations` those made.
    """

    what: str
    cell: Cell
    runs: list[int]
    points: list[Point]
    iterations: int


class Trainer:
    """The runs of one cell. Call it with the cell's precision set.

    Raises:
      InputError: an option that the algorithm refuses.
    """

    def __init__(self, cell: Cell):
        self.cell = cell
        self.reason: str | None = None
        try:
            self._algorithms = [cell.algorithm(place) for place in range(len(cell.settings))]
        except RequirementError as error:
            self.reason = error.reason
        except InputError as error:
            raise InputError(f"{cell.name}: {error}") from None

    def run(self, directory: Path, stop: Stop, report: Report) -> Outcome:
        """Return the outcome: finished parts are read from the directory, and the rest is computed and written there.

        Raises:
          InterruptionError: a signal has come; the state is kept.
          InputError: a single run does not fit into the memory limit.
        """
        if self.reason is not None:
            return Outcome(self.cell, self.reason)
        stored = self._stored(directory)
        # Of all runs, also those that are finished: what varies, the cuts and so the bits are as in the first start.
        for program, runs in self._programs(list(range(len(self.cell.runs)))):
            if all(run in stored for run in runs):
                continue
            stop.check()
            started = time.perf_counter()
            cuts = program.cuts(range(len(runs)), self.cell.memory_limit_mb)
            compile_seconds = time.perf_counter() - started
            for places in cuts:
                own = [i for i in places.runs if runs[i] not in stored]
                if not own:
                    continue
                stop.check()
                padded = own + own[-1:] * (len(places.padded) - len(own))
                self._train(
                    _Chunk(self.cell, directory, program, Cut(own, padded), runs), compile_seconds, stop, report
                )
                compile_seconds = 0.0
        return self.outcome(directory)

    def outcome(self, directory: Path) -> Outcome:
        """Return what is finished of the cell, from the directory."""
        if self.reason is not None:
            return Outcome(self.cell, self.reason)
        stored = self._stored(directory)
        return outcome_of(self.cell, {run: stored[run] for run in sorted(stored)})

    def _programs(self, runs: list[int]) -> Iterator[tuple[Program, list[int]]]:
        """Runs of one structure together."""
        groups: dict[Any, list[int]] = {}
        structures = [structure_of(algorithm) for algorithm in self._algorithms]
        for run in runs:
            groups.setdefault(structures[self.cell.runs[run][0]], []).append(run)
        for group in groups.values():
            places = [self.cell.runs[run] for run in group]
            yield Program([self._algorithms[place] for place, _ in places], [seed for _, seed in places]), group

    def _train(self, chunk: "_Chunk", compile_seconds: float, stop: Stop, report: Report) -> None:
        walk = _Walk(chunk, report)
        walk.train(stop)
        end = measure.final(walk.inputs, walk.progress, self.cell.samples)
        chunk.store(walk, end, compile_seconds)
        report(Event("chunk", self.cell, chunk.runs, walk.points, 0))

    def _stored(self, directory: Path) -> dict[int, tuple[int, dict[str, Any]]]:
        """Where each finished run is: its place in a chunk, and the chunk."""
        found = {}
        for path in sorted((directory / CELLS).glob(f"*-{self.cell.key}-*{SUFFIX}")):
            read = read_arrays(path)
            if read is None or not {"runs", *CURVES} <= set(read[0]):
                warnings.warn(f"{path} is damaged; its runs are made again", stacklevel=2)
                continue
            chunk = {"arrays": read[0], **read[1]}
            for place, run in enumerate(read[0]["runs"].tolist()):
                found[run] = (place, chunk)
        return found


class _Chunk:
    """Runs that go through a program together: `places` in the program, `runs` and `padded` in the cell."""

    def __init__(self, cell: Cell, directory: Path, program: Program, places: Cut, numbers: list[int]):
        self.cell, self.program, self.places = cell, program, places
        self.runs, self.padded = ([numbers[i] for i in part] for part in places)
        runs = self.runs
        name = f"{cell.file_name}-{runs[0]}"
        options = cell.checkpoint
        self.checkpoints = Checkpoints(
            directory / CHECKPOINTS, name, options["minutes"], options["points"], options["keep"]
        )
        self.path = directory / CELLS / f"{name}{SUFFIX}"

    def store(self, walk: "_Walk", end: measure.Final, compile_seconds: float) -> None:
        """Write what the runs came to; their checkpoints are then of no use."""
        made = slice(len(self.runs))
        curves = stacked(walk.points)
        arrays = {name: getattr(curves, name) for name in CURVES}
        arrays |= {f"column {name}": column for name, column in curves.columns.items()}
        arrays |= {f"final column {name}": column[made] for name, column in end.columns.items()}
        for name in ("objective", "gradient_norm", "result", "policy", "value", "best_objective"):
            array = getattr(end, name)
            if array is not None:
                arrays[f"final {name}"] = array[made]
        arrays |= {f"x{i}": np.asarray(leaf)[made] for i, leaf in enumerate(jax.tree.leaves(end.x))}
        arrays |= {f"best_x{i}": np.asarray(leaf)[made] for i, leaf in enumerate(jax.tree.leaves(end.best_x))}
        arrays |= {f"agent{i}": leaf[made] for i, leaf in enumerate(jax.tree.leaves(end.agent))}
        described = {"compile_seconds": compile_seconds, "ended_by": walk.ended_by()}
        write_arrays(self.path, {"runs": np.asarray(self.runs), **arrays}, described)
        self.checkpoints.remove()


class _Walk:
    """A chunk on its way through the points of its curves."""

    def __init__(self, chunk: _Chunk, report: Report):
        self.chunk, self.cell, self.program, self.report = chunk, chunk.cell, chunk.program, report
        self.inputs = self.program.inputs(chunk.places.padded)
        self.progress: Progress = self.program.start(self.inputs)
        self.points: list[Point] = []
        self.seconds = 0.0
        self.segment: tuple[Any, np.ndarray] | None = None  # the record since the last point, and where there is one
        self._rate: float | None = None
        self._kept_exact: tuple[np.ndarray, np.ndarray] | None = None  # of a segment that a checkpoint is within
        self._begin_segment()
        self._restore()

    def train(self, stop: Stop) -> None:
        """On to the end of the budget."""
        cell, total = self.cell, self.cell.total
        if np.isfinite(total.seconds) or cell.exact == "points":
            self._warm_up()
        for number, target in enumerate(cell.targets()):
            if number < len(self.points):
                continue
            if self.segment is None:
                if stop.number is not None:
                    self._keep(None)
                stop.check()
                over = self.seconds >= total.seconds or not self._open(total)
                if number > 0 and "every" in cell.points and over:
                    break
            exact = self._kept_exact
            if exact is None and cell.exact == "points":
                exact = self._exact()
            self._kept_exact = None
            while self.seconds < target.seconds and self._open(target):
                self._advance(target)
                if stop.number is not None or self.chunk.checkpoints.due():
                    self._keep(exact)
                stop.check()
            self._record(exact)
            if self.chunk.checkpoints.due(len(self.points)):
                self._keep(None)
        self._record(self._exact())

    def ended_by(self) -> list[str]:
        """Which limit ended each run."""
        total, made = self.cell.total, slice(len(self.chunk.runs))
        iterations = np.asarray(self.progress.state.iteration)[made]
        spent = np.asarray(self.progress.transitions + self.progress.last)[made]
        names = []
        for i, finite in enumerate(np.asarray(self.progress.finite)[made]):
            if not finite:
                names.append("not finite")
            elif iterations[i] >= total.iterations:
                names.append("iterations")
            else:
                names.append("transitions" if spent[i] > total.transitions else "seconds")
        return names

    def _exact(self) -> tuple[np.ndarray, np.ndarray]:
        return measure.evaluated(self.inputs, self.progress, self.cell.samples)

    def _open(self, target: Target) -> bool:
        return bool(np.any(np.asarray(goes_on(self.progress, Limits.of(target.iterations, target.transitions)))))

    def _warm_up(self) -> None:
        """Where the budget is in seconds: make some iterations and discard them, to learn how long one takes."""
        endless = Limits.of(np.inf, np.inf)
        for most in (1, 8):
            started = time.perf_counter()
            jax.block_until_ready(self.program.advance(self.inputs, self.progress, endless, np.int32(most)))
            self._rate = max((time.perf_counter() - started) / most, 1e-9)

    def _advance(self, target: Target) -> None:
        """Make as many iterations as fit into a block of time, at most up to the target."""
        size = len(self.chunk.places.padded)
        most = 1
        if self._rate is not None:
            left = (target.seconds - self.seconds) * size
            most = int(np.clip(min(BLOCK, left) / self._rate, 1, 2**30))
        limits = Limits.of(target.iterations, target.transitions)
        before = int(np.max(np.asarray(self.progress.state.iteration)))
        started = time.perf_counter()
        made = jax.block_until_ready(self.program.advance(self.inputs, self.progress, limits, np.int32(most)))
        took = time.perf_counter() - started
        self.progress, columns, counts = made
        self.seconds += took / size
        after = int(np.max(np.asarray(self.progress.state.iteration)))
        self._rate = max(took / max(1, after - before), 1e-9)
        if self.segment is None:
            self.segment = (jax.device_get(columns), np.asarray(counts) > 0)
        self.report(Event("iterations", self.cell, self.chunk.runs, self.points, after))

    def _record(self, exact: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Add the point at which the last segment began; `exact` is of then."""
        made = slice(len(self.chunk.runs))
        start = self._start_of_segment
        columns, recorded = self.segment or ({}, np.zeros(len(self.chunk.places.padded), bool))
        objective, norm = exact or (np.full(len(recorded), np.nan),) * 2
        self.points.append(
            Point(
                iterations=start[0][made],
                transitions=start[1][made],
                objective=objective[made],
                gradient_norm=norm[made],
                recorded=recorded[made],
                columns={name: np.asarray(column)[made] for name, column in columns.items()},
                seconds=np.asarray(start[2]),
            )
        )
        self.segment = None
        self._begin_segment()
        self.report(Event("point", self.cell, self.chunk.runs, self.points, int(np.max(start[0]))))

    def _begin_segment(self) -> None:
        state = self.progress
        self._start_of_segment = (np.asarray(state.state.iteration), np.asarray(state.transitions), self.seconds)

    # Keeping and restoring.

    def _keep(self, exact: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Write a checkpoint. `exact`: of the segment under way, None between two."""
        arrays = as_arrays(self.progress, "leaf ")
        arrays |= {f"start {i}": np.asarray(part) for i, part in enumerate(self._start_of_segment)}
        if self.segment is not None:
            arrays |= {f"segment {name}": np.asarray(column) for name, column in self.segment[0].items()}
            arrays["segment"] = self.segment[1]
        if exact is not None:
            arrays |= {f"exact {i}": part for i, part in enumerate(exact)}
        if self.points:
            curves = stacked(self.points)
            arrays |= {f"curve {name}": getattr(curves, name) for name in CURVES}
            arrays |= {f"column {name}": column for name, column in curves.columns.items()}
        described = {
            "runs": self.chunk.runs,
            "padded": self.chunk.padded,
            "seconds": self.seconds,
            "jax": jax.__version__,
        }
        self.chunk.checkpoints.write(arrays, described)

    def _restore(self) -> None:
        """The newest checkpoint of these runs, if there is one."""
        for path, arrays, described in self.chunk.checkpoints.latest():
            same = described.get("runs") == self.chunk.runs and described.get("padded") == self.chunk.padded
            progress = as_tree(arrays, "leaf ", self.progress) if same else None
            if progress is None:
                warnings.warn(
                    f"{path} is of other runs at once than memory_limit_mb now allows, and is not gone on with; start "
                    f"again with the memory_limit_mb of before to use it",
                    stacklevel=2,
                )
                continue
            if described.get("jax") != jax.__version__:
                warnings.warn(
                    f"{path} was written under jax {described.get('jax')}, this is jax {jax.__version__}: what follows "
                    f"may differ in the last bits",
                    stacklevel=2,
                )
            self.progress, self.seconds = progress, described["seconds"]
            self._start_of_segment = (arrays["start 0"], arrays["start 1"], float(arrays["start 2"]))
            if "segment" in arrays:
                columns = {k.removeprefix("segment "): v for k, v in arrays.items() if k.startswith("segment ")}
                self.segment = (columns, arrays["segment"])
            self._kept_exact = (arrays["exact 0"], arrays["exact 1"]) if "exact 0" in arrays else None
            if "curve seconds" in arrays:
                self.points = unstacked(arrays)
            self.report(
                Event("restored", self.cell, self.chunk.runs, self.points, int(np.max(self._start_of_segment[0])))
            )
            return
