"""A cell of an experiment: one algorithm on one problem, and all its runs, settings times seeds."""

import copy
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from bilevel_jax.experiments.sections import Context, build_algorithm, build_problem, build_upper
from bilevel_jax.experiments.source import put
from bilevel_jax.problems import registry


def digests_of(modules: list[str], problem: dict[str, Any]) -> dict[str, str]:
    """Return digests of the files that results depend on, by path: the user's modules, and those a problem reads.

    Args:
      modules: files or names of modules, which are imported already.
      problem: a checked section.
    """
    paths = []
    for module in modules:
        found = getattr(sys.modules.get(module), "__file__", None)
        paths.append(module if found is None else found)
    fields = dataclasses.fields(registry.spec(problem["name"]).options)
    paths += [problem[f.name] for f in fields if f.metadata.get("path") and problem[f.name]]
    found = [Path(path) for path in paths]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in found if path.is_file()}


class Target(NamedTuple):
    """A point of a curve: what a run may have spent by then, infinite where nothing limits it."""

    iterations: float
    transitions: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Cell:
    """The runs of one algorithm on one problem: plain values only, from a checked config.

    labels: of the problem and of the algorithm. sections: problem, algorithm, optimizer, projection, temperature.
    settings: dotted keys of the sections with values. runs: (place in `settings`, seed) of each.
    limits: iterations, transitions, seconds, None where nothing limits a run. points: {"every": iterations}, or
    {"count", "first"} for so many, evenly spaced in the logarithm of the budget from that share on.
    exact: whether the objective is evaluated exactly at all points, or at the end. tuning_seeds: that choose settings.
    """

    labels: tuple[str, str]
    sections: dict[str, Any]
    settings: list[dict[str, Any]]
    runs: list[tuple[int, int]]
    limits: dict[str, Any]
    points: dict[str, Any]
    samples: int
    precision: str
    memory_limit_mb: float
    checkpoint: dict[str, Any]
    exact: Literal["points", "end"]
    tuning_seeds: tuple[int, ...] = ()
    digests: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return ", ".join(self.labels)

    @property
    def key(self) -> str:
        """A key that changes with everything on which the cell's results depend, and not with labels, memory or
        checkpoints.
        """
        parts = [self.sections, self.settings, self.runs, self.limits, self.points, self.samples, self.precision]
        text = json.dumps([*parts, self.exact, self.tuning_seeds, self.digests, version("bilevel_jax")], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def file_name(self) -> str:
        """Start of the names of the cell's files."""
        words = "-".join(re.sub(r"\W+", "_", label).strip("_") for label in self.labels)
        return f"{words}-{self.key}"

    def at(self, place: int) -> dict[str, Any]:
        """The sections at a point of the settings."""
        sections = copy.deepcopy(self.sections)
        for key, value in self.settings[place].items():
            put(sections, key, value)
        return sections

    def problem(self, place: int = 0) -> Any:
        """The problem at a point of the settings, at the precision that is set."""
        return build_problem(self.at(place)["problem"])

    def algorithm(self, place: int) -> Any:
        """The algorithm at a point of the settings.

        Raises:
          RequirementError: the problem lacks what it requires.
          InputError: an option that is refused.
        """
        sections = self.at(place)
        context = Context(build_problem(sections["problem"]), build_upper(sections), self.limits["transitions"])
        return build_algorithm(sections["algorithm"], context)

    @property
    def total(self) -> Target:
        """The whole budget."""
        names = ("iterations", "transitions", "seconds")
        return Target(*(np.inf if self.limits[name] is None else float(self.limits[name]) for name in names))

    def targets(self) -> Iterator[Target]:
        """The points of the curves after the start, in order.

        Where only seconds limit them, the iterator has no end.
        """
        total = self.total
        if "every" in self.points:
            iterations = 0
            while iterations < total.iterations:
                iterations += self.points["every"]
                yield total._replace(iterations=min(iterations, total.iterations))
            return
        count = self.points["count"]
        for share in np.geomspace(self.points["first"], 1, count) if count > 1 else np.ones(1):
            yield Target(np.floor(total.iterations * share), np.floor(total.transitions * share), total.seconds * share)
