"""Configs of `compare`: read, checked, every default filled in; and the cells that each stands for."""

import copy
import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bilevel_jax as bj
from bilevel_jax.core.options import nearest
from bilevel_jax.core.schedules import Schedule
from bilevel_jax.experiments.cells import Cell, digests_of
from bilevel_jax.experiments.choices import choices, optimizers
from bilevel_jax.experiments.config import UPPER, checked_upper, require_command, require_makeable, scalars
from bilevel_jax.experiments.keys import BudgetSection, CompareSection
from bilevel_jax.experiments.sections import checked_choice, checked_problem, validated
from bilevel_jax.experiments.source import Source, get, put, read


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A checked config of `compare`: `values`, plain nested dicts and lists with every default filled in."""

    name: str
    values: dict[str, Any]

    @property
    def cells(self) -> list[Cell]:
        """Every algorithm on every problem, problem by problem."""
        values = self.values
        return [self._cell(problem, algorithm) for problem in values["problems"] for algorithm in values["algorithms"]]

    def _cell(self, problem: dict[str, Any], algorithm: dict[str, Any]) -> Cell:
        values = self.values
        own = {key: value for key, value in problem.items() if key not in ("label", "budget")}
        options = {key: value for key, value in algorithm.items() if key not in ("label", "grid", *UPPER)}
        settings = settings_of(algorithm)
        seeds = [*(values["tuning_seeds"] if len(settings) > 1 else []), *values["seeds"]]
        return Cell(
            labels=(problem["label"], algorithm["label"]),
            sections={"problem": own, "algorithm": options, **{key: algorithm[key] for key in UPPER}},
            settings=settings,
            runs=[(place, seed) for place in range(len(settings)) for seed in seeds],
            limits=problem["budget"] or values["budget"],
            points={"count": values["points"], "first": values["first"]},
            samples=values["samples"],
            precision=values["precision"],
            memory_limit_mb=values["memory_limit_mb"],
            checkpoint=values["checkpoint"],
            exact="points",
            tuning_seeds=tuple(values["tuning_seeds"]),
            digests=digests_of(values["modules"], own),
        )


def settings_of(algorithm: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the points of an algorithm's grid, by dotted keys of a config of `run`."""
    full = _tunable(algorithm)
    axes = {full[key]: numbers for key, numbers in algorithm["grid"].items()}
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read the config of a comparison, apply `key=value` overrides and check everything.

    Raises:
      InputError: unreadable or malformed file, unknown key or name, wrong type, impossible value, another config.
    """
    raw, source = read(path, overrides)
    require_command(raw, "compare", source)
    if "problem" in raw and "problems" not in raw:
        raise source.error(
            "problem", "this is no comparison; give it to bilevel-jax run, or list `problems` and `algorithms`"
        )
    rest = {key: value for key, value in raw.items() if key not in ("problems", "algorithms")}
    values = validated(CompareSection, rest, "", source, ("problems", "algorithms"))
    values["budget"] = _with_a_limit(values["budget"], "budget", source, raw.get("budget"))
    both = sorted(set(values["seeds"]) & set(values["tuning_seeds"]))
    if both:
        raise source.error("tuning_seeds", f"{both[0]} is among the reported seeds, too; tune on others")
    for place in ("seeds", "tuning_seeds"):
        if len(set(values[place])) < len(values[place]):
            raise source.error(place, f"one stands here twice: {values[place]}")
    problems = _each(raw, "problems", source, lambda section, at: _problem(section, at, values["precision"], source))
    algorithms = _each(raw, "algorithms", source, lambda section, at: _algorithm(section, at, source))
    for i, algorithm in enumerate(algorithms):
        count = len(settings_of(algorithm))
        if count > 1 and not values["tuning_seeds"]:
            raise source.error(f"algorithms.{i}.grid", f"{count} points and no tuning_seeds to choose from them by")
    return Comparison(
        Path(path).stem, {"modules": source.modules, "problems": problems, "algorithms": algorithms, **values}
    )


def _each(raw: dict[str, Any], place: str, source: Source, check: Callable) -> list[dict[str, Any]]:
    """The checked sections of a list, their labels all different."""
    if not isinstance(raw.get(place), list) or not raw[place]:
        raise source.error(
            place, f"give a list of names, or of sections with a name; see configs/compare, got {raw.get(place)!r}"
        )
    entries = [{"name": entry} if isinstance(entry, str) else entry for entry in raw[place]]
    checked = [check(section, f"{place}.{i}") for i, section in enumerate(entries)]
    labels = [section["label"] for section in checked]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            raise source.error(f"{place}.{i}", f"another one has the label {label!r}; give this one a label of its own")
    return checked


def _problem(section: Any, place: str, precision: str, source: Source) -> dict[str, Any]:
    checked = checked_problem(section, place, source, ("label", "budget"))
    require_makeable(checked, place, precision, source)
    budget = section.get("budget")
    if budget is not None:
        given = _mapping(budget, f"{place}.budget", source)
        budget = validated(BudgetSection, given, f"{place}.budget", source)
        budget = _with_a_limit(budget, f"{place}.budget", source, given)
    return {"label": _label(section, place, source), "budget": budget, **checked}


def _algorithm(section: Any, place: str, source: Source) -> dict[str, Any]:
    known = choices((bj.algorithms.Algorithm,))
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        raise source.error(place, f"give the algorithm a name, one of {', '.join(known)}")
    options = checked_choice(section, place, known, "algorithm", source, beside=("label", "grid", *UPPER))
    algorithm = {**options, **checked_upper(section, options["name"], place, source)}
    grid = {}
    tunable = _tunable(algorithm)
    for key, numbers in _mapping(section.get("grid", {}), f"{place}.grid", source).items():
        where = f"{place}.grid.{key}"
        if key not in tunable:
            shown = [key for key, full in tunable.items() if key != full or list(tunable.values()).count(full) == 1]
            raise source.error(where, f"no number to tune{nearest(key, list(tunable))}; valid: {', '.join(shown)}")
        if not isinstance(numbers, list) or not numbers:
            raise source.error(where, f"expected a list of numbers, got {numbers!r}")
        grid[key] = []
        for number in numbers:
            trial, within = copy.deepcopy(section), tunable[key].removeprefix("algorithm.")
            put(trial, within, number)
            checked = {
                **checked_choice(trial, place, known, "algorithm", source, beside=("label", "grid", *UPPER)),
                **checked_upper(trial, options["name"], place, source),
            }
            grid[key].append(get(checked, within))
    return {"label": _label(section, place, source), **algorithm, "grid": grid}


def _tunable(algorithm: dict[str, Any]) -> dict[str, str]:
    """The keys of a config of `run` that an algorithm's grid may list, by the names that it may list them under.

    These are the keys themselves, and what follows "optimizer." or "algorithm." where one of them ends so.
    """
    own = choices((bj.algorithms.Algorithm,))[algorithm["name"]].options
    full = [f"optimizer.{o.name}" for o in optimizers()[algorithm["optimizer"]["name"]].options if o.scalar]
    full += scalars(own, algorithm, "algorithm.")
    ends = [key.partition(".")[2] for key in full]
    named = {end: key for end, key in zip(ends, full, strict=True) if ends.count(end) == 1 and end not in full}
    if algorithm["temperature"] is not None:
        kind = choices((Schedule,))[algorithm["temperature"]["name"]]
        full += scalars(kind.options, algorithm["temperature"], "temperature.")
    return named | {key: key for key in full}


def _label(section: dict[str, Any], place: str, source: Source) -> str:
    label = section.get("label", section["name"])
    if not isinstance(label, str) or not re.search(r"\w", label):
        raise source.error(f"{place}.label", f"expected a text with letters in it, got {label!r}")
    return label


def _mapping(value: Any, place: str, source: Source) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise source.error(place, f"expected keys with values, got {value!r}")
    return value


def _with_a_limit(budget: dict[str, Any], place: str, source: Source, given: Any) -> dict[str, Any]:
    if any(limit is not None for limit in budget.values()):
        return budget
    if given:
        raise source.error(place, "transitions, seconds and iterations are all null; limit at least one")
    return {**budget, "transitions": 1_000_000}
