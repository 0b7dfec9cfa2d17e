"""What came of a cell's runs: points of their curves, and where they ended, put together from the chunks on disk."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from bilevel_jax.experiments.cells import Cell

CURVES = ("iterations", "transitions", "seconds", "objective", "gradient_norm", "recorded")


class Point(NamedTuple):
    """One point of the curves of N runs, arrays [N].

    `iterations` and `transitions` count those so far. `objective` and `gradient_norm` come from `measure.evaluated`,
    and are NaN where they are not evaluated. `columns` is the record of the iteration that begins here, and `recorded`
    says whether one did. `seconds` is the time of a run, [].
    """

    iterations: np.ndarray
    transitions: np.ndarray
    objective: np.ndarray
    gradient_norm: np.ndarray
    recorded: np.ndarray
    columns: dict[str, np.ndarray]
    seconds: np.ndarray


@dataclasses.dataclass
class Curves:
    """All runs of a cell, arrays [P, R] over points and runs: see `Point`. Runs have as many points as the longest."""

    iterations: np.ndarray
    transitions: np.ndarray
    seconds: np.ndarray
    objective: np.ndarray
    gradient_norm: np.ndarray
    recorded: np.ndarray
    columns: dict[str, np.ndarray]


@dataclasses.dataclass
class Outcome:
    """The results of a cell.

    `reason` says why the algorithm does not apply; the other fields are then empty. `runs` are the runs of the cell
    that are finished: all of them, unless it was interrupted. `final` has their results, by name. `ended_by` is the
    limit that ended each run. `compile_seconds` is the compile time of all programs.
    """

    cell: Cell
    reason: str | None = None
    runs: list[int] = dataclasses.field(default_factory=list)
    curves: Curves | None = None
    final: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    ended_by: list[str] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0

    @property
    def diverged(self) -> np.ndarray:
        """Runs whose last objective is not finite, bool [R]."""
        assert self.curves is not None
        return ~np.isfinite(self.curves.objective[-1])

    @property
    def x(self) -> list[np.ndarray]:
        """The leaves of the last x, [R, ...] each."""
        count = sum(name.startswith("x") and name[1:].isdecimal() for name in self.final)
        return [self.final[f"x{i}"] for i in range(count)]


def stacked(points: list[Point]) -> Curves:
    """Return the points of one chunk as curves [P, N]; columns that a point does not have are NaN there."""
    count = len(points[0].iterations)
    names = list(dict.fromkeys(name for point in points for name in point.columns))
    blank = np.full(count, np.nan)

    def column(name: str) -> np.ndarray:
        return np.stack([point.columns.get(name, blank) for point in points])

    return Curves(
        iterations=np.stack([point.iterations for point in points]),
        transitions=np.stack([point.transitions for point in points]),
        seconds=np.stack([np.broadcast_to(point.seconds, (count,)) for point in points]),
        objective=np.stack([point.objective for point in points]),
        gradient_norm=np.stack([point.gradient_norm for point in points]),
        recorded=np.stack([point.recorded for point in points]),
        columns={name: column(name) for name in names},
    )


def unstacked(arrays: dict[str, np.ndarray]) -> list[Point]:
    """Return the points that a checkpoint has as arrays, by the names "curve ..." and "column ..."."""
    columns = {k.removeprefix("column "): v for k, v in arrays.items() if k.startswith("column ")}
    curves = {name: arrays[f"curve {name}"] for name in CURVES}
    made = []
    for p in range(len(curves["seconds"])):
        own = {name: column[p] for name, column in columns.items()}
        row = {name: array[p] for name, array in curves.items()}
        made.append(Point(**{**row, "seconds": np.asarray(row["seconds"][0])}, columns=own))
    return made


def _together(name: str, runs: Iterable[int], arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of the runs stacked under their name; where the shapes differ, each under a name with its run's number."""
    if len({array.shape for array in arrays}) == 1:
        return {name: np.stack(arrays)}
    return {f"{name}/run {run}": array for run, array in zip(runs, arrays, strict=True)}


def outcome_of(cell: Cell, stored: dict[int, tuple[int, dict[str, Any]]]) -> Outcome:
    """Return the outcome of a cell's finished runs.

    Args:
      cell: the cell.
      stored: by run, its place in a chunk and the chunk: {"arrays", "compile_seconds", "ended_by"}.
    """
    if not stored:
        return Outcome(cell)
    own = list(stored.values())
    points = max(len(chunk["arrays"]["seconds"]) for _, chunk in own)

    def curve(name: str) -> np.ndarray:
        """[P, R]; a run that was over earlier stays where it ended."""
        columns = []
        for place, chunk in own:
            array = chunk["arrays"].get(name)
            array = np.full(points, np.nan) if array is None else array[:, place]
            columns.append(np.concatenate([array, np.repeat(array[-1:], points - len(array), 0)]))
        return np.stack(columns, 1)

    first = own[0][1]["arrays"]
    names = sorted({name for _, chunk in own for name in chunk["arrays"] if name.startswith("column ")})
    curves = Curves(
        **{name: curve(name) for name in CURVES}, columns={name.removeprefix("column "): curve(name) for name in names}
    )
    finals = [name for name in first if name.startswith(("final ", "x", "best_x", "agent"))]
    final: dict[str, np.ndarray] = {}
    for name in finals:
        if all(name in chunk["arrays"] for _, chunk in own):
            final |= _together(name.removeprefix("final "), stored, [chunk["arrays"][name][i] for i, chunk in own])
    chunks = {id(chunk): float(chunk["compile_seconds"]) for _, chunk in own}
    ended = [chunk["ended_by"][place] for place, chunk in own]
    return Outcome(cell, None, list(stored), curves, final, ended, sum(chunks.values()))
