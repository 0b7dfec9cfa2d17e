"""Read and check the config of a comparison: problems, methods, seeds, budget."""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import typing
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

from bilevel_jax.problems import registry
from bilevel_jax.runner.config import (
    Source,
    checked_problem,
    is_float,
    read,
    require_makeable,
    require_name,
    validated,
)
from bilevel_jax.runner.methods import METHODS
from bilevel_jax.runner.schema import STRICT_KEYS, AdamSection, Count, LBFGSSection, Positive, Seed, SGDSection

OPTIMIZERS = {"adam": AdamSection, "sgd": SGDSection, "lbfgs": LBFGSSection}
BESIDE_PROBLEM = ("label", "budget")
BESIDE_METHOD = ("label", "optimizer", "grid")


@dataclass(config=STRICT_KEYS, frozen=True)
class BudgetSection:
    """What a run may take, whichever comes first; null is no limit.

    transitions: of the lower level that a run looks at, see `counting.py`.
    seconds: of a run, without compiling and evaluating. Runs that are vmapped share the time equally.
    """

    transitions: Annotated[int, Field(ge=1, lt=2**53)] | None = 1_000_000
    seconds: Positive | None = None


@dataclass(config=STRICT_KEYS, frozen=True)
class CompareSection:
    """The whole config but the lists of problems and methods.

    seeds: of the reported runs; they set start and samples.
    tuning_seeds: of the runs that choose a method's settings from its grid, others than the reported ones.
    budget: of every run; a problem may have its own.
    points: of each curve beside its start, evenly spaced in the logarithm of the budget.
    first: fraction of the budget at the first of them.
    samples: losses that estimate the objective where the problem has no model.
    precision: of all arrays.
    memory_limit_mb: a method's runs are cut into chunks below it.
    """

    seeds: Annotated[list[Seed], Field(min_length=1)] = dataclasses.field(default_factory=lambda: [0, 1, 2, 3, 4])
    tuning_seeds: list[Seed] = dataclasses.field(default_factory=lambda: [1000, 1001])
    budget: BudgetSection = dataclasses.field(default_factory=BudgetSection)
    points: Count = 16
    first: Annotated[float, Field(gt=0, le=1)] = 0.01
    samples: Count = 1000
    precision: Literal["float32", "float64"] = "float64"
    memory_limit_mb: Positive = 4096.0


@dataclasses.dataclass(frozen=True)
class Cell:
    """A method on a problem: checked sections, and what all cells share."""

    problem: dict[str, Any]
    method: dict[str, Any]
    budget: dict[str, Any]
    shared: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.problem['label']}, {self.method['label']}"

    @property
    def settings(self) -> list[dict[str, float]]:
        """The points of the method's grid."""
        grid = self.method["grid"]
        return [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]

    @functools.cached_property
    def runs(self) -> list[tuple[int, int]]:
        """(place in `settings`, seed) of each; a grid of one point needs no tuning."""
        settings = self.settings
        seeds = [*(self.shared["tuning_seeds"] if len(settings) > 1 else []), *self.shared["seeds"]]
        return [(place, seed) for place in range(len(settings)) for seed in seeds]

    @property
    def key(self) -> str:
        """Changes with everything that the results of the cell depend on, labels aside."""
        unlabelled = [{k: v for k, v in section.items() if k != "label"} for section in (self.problem, self.method)]
        parts = [*unlabelled, self.budget, self.shared, version("bilevel_jax")]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def file_name(self) -> str:
        """Start of the names of the cell's files."""
        words = "-".join(re.sub(r"\W+", "_", section["label"]).strip("_") for section in (self.problem, self.method))
        return f"{words}-{self.key}"

    def optimizer_at(self, setting: dict[str, float]) -> dict[str, Any]:
        """The optimizer's section at a point of the grid."""
        own = self.method["optimizer"]
        return {**own, **{key: value for key, value in setting.items() if key in own}}

    def options_at(self, setting: dict[str, float]) -> Any:
        """The method's options at a point of the grid."""
        options = {key: value for key, value in self.method.items() if key not in ("name", *BESIDE_METHOD)}
        options = copy.deepcopy(options)
        for key, value in setting.items():
            if key not in self.method["optimizer"]:
                _put(options, key, value)
        return pydantic.TypeAdapter(METHODS[self.method["name"]].options).validate_python(options)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A checked config: `values`, plain nested dicts and lists with every default filled in."""

    name: str
    values: dict[str, Any]

    @property
    def cells(self) -> list[Cell]:
        """Every method on every problem, problem by problem."""
        problems, methods, budget = (self.values[key] for key in ("problems", "methods", "budget"))
        lists = ("modules", "problems", "methods", "budget")
        shared = {key: value for key, value in self.values.items() if key not in lists}
        return [
            Cell({k: v for k, v in problem.items() if k != "budget"}, method, problem["budget"] or budget, shared)
            for problem in problems
            for method in methods
        ]


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Comparison:
    """Read a YAML file, apply `key=value` overrides and check everything.

    Raises:
      InputError: unreadable or malformed file, unknown key or name, wrong type, impossible value.
    """
    raw, source = read(path, overrides, _expand)
    rest = {key: value for key, value in raw.items() if key not in ("problems", "methods")}
    values = validated(CompareSection, rest, "", source, ("problems", "methods"))
    _require_budget(values["budget"], "budget", source)
    both = sorted(set(values["seeds"]) & set(values["tuning_seeds"]))
    if both:
        raise source.error("tuning_seeds", f"{both[0]} is among the reported seeds, too; tune on others")
    for place in ("seeds", "tuning_seeds"):
        if len(set(values[place])) < len(values[place]):
            raise source.error(place, f"one stands here twice: {values[place]}")
    problems = _each(raw, "problems", source, lambda section, at: _problem(section, at, values["precision"], source))
    methods = _each(raw, "methods", source, lambda section, at: _method(section, at, source))
    for i, method in enumerate(methods):
        points = Cell({}, method, {}, values).settings
        if len(points) > 1 and not values["tuning_seeds"]:
            raise source.error(f"methods.{i}.grid", f"{len(points)} points and no tuning_seeds to choose from them by")
    return Comparison(Path(path).stem, {"modules": source.modules, "problems": problems, "methods": methods, **values})


def _expand(raw: dict[str, Any]) -> None:
    """A problem, a method, and a section within one may be just a name."""
    for place in ("problems", "methods"):
        if isinstance(raw.get(place), list):
            raw[place] = [{"name": entry} if isinstance(entry, str) else entry for entry in raw[place]]
    for section in raw["methods"] if isinstance(raw.get("methods"), list) else []:
        if isinstance(section, dict):
            name = section.get("name")
            hints = typing.get_type_hints(METHODS[name].options) if name in METHODS else {}
            for key in ("optimizer", *(key for key, hint in hints.items() if _is_named(hint))):
                if isinstance(section.get(key), str):
                    section[key] = {"name": section[key]}


def _is_named(hint: Any) -> bool:
    """Whether a key is a section that is chosen by its name."""
    return any(dataclasses.is_dataclass(choice) for choice in typing.get_args(hint))


def _each(raw: dict[str, Any], place: str, source: Source, check: Any) -> list[dict[str, Any]]:
    """The checked sections of a list, their labels all different."""
    if not isinstance(raw.get(place), list) or not raw[place]:
        raise source.error(
            place, f"give a list of names, or of sections with a name; see configs/compare, got {raw.get(place)!r}"
        )
    checked = [check(section, f"{place}.{i}") for i, section in enumerate(raw[place])]
    labels = [section["label"] for section in checked]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            raise source.error(f"{place}.{i}", f"another one has the label {label!r}; give this one a label of its own")
    return checked


def _problem(section: Any, place: str, precision: str, source: Source) -> dict[str, Any]:
    checked = checked_problem(section, place, source, BESIDE_PROBLEM)
    require_makeable(checked, place, precision, source)
    budget = section.get("budget")
    if budget is not None:
        budget = validated(BudgetSection, _mapping(budget, f"{place}.budget", source), f"{place}.budget", source)
        _require_budget(budget, f"{place}.budget", source)
    return {"label": _label(section, place, source), "budget": budget, **checked}


def _method(section: Any, place: str, source: Source) -> dict[str, Any]:
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        raise source.error(place, f"give the method a name, one of {', '.join(METHODS)}")
    name = section["name"]
    require_name(name, METHODS, "method", place, source)
    method = METHODS[name]
    options = {key: value for key, value in section.items() if key not in ("name", *BESIDE_METHOD)}
    options = validated(method.options, options, place, source, BESIDE_METHOD)
    chosen = _mapping(section.get("optimizer", {}), f"{place}.optimizer", source)
    chosen = {"name": method.optimizers[0], **chosen}
    require_name(chosen["name"], method.optimizers, "optimizer", f"{place}.optimizer", source)
    optimizer_type = OPTIMIZERS[chosen["name"]]
    optimizer = validated(optimizer_type, chosen, f"{place}.optimizer", source)
    floats = {key: None for key, hint in typing.get_type_hints(optimizer_type).items() if is_float(hint)}
    known = [*floats, *_floats(method.options, options)]
    grid = {}
    for key, numbers in _mapping(section.get("grid", {}), f"{place}.grid", source).items():
        where = f"{place}.grid.{key}"
        if key not in known:
            raise source.error(where, f"no number to tune{registry.nearest(key, known)}; valid: {', '.join(known)}")
        if not isinstance(numbers, list) or not numbers:
            raise source.error(where, f"expected a list of numbers, got {numbers!r}")
        for number in numbers:
            if key in floats:
                validated(optimizer_type, {**optimizer, key: number}, f"{place}.optimizer", source)
                continue
            tried = copy.deepcopy(options)
            _put(tried, key, number)
            validated(method.options, tried, place, source)
        grid[key] = [float(number) for number in numbers]
    label = _label(section, place, source)
    return {"label": label, "name": name, **options, "optimizer": optimizer, "grid": grid}


def _floats(kind: type, values: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of the options' numbers that may be tuned."""
    keys = []
    for key, hint in typing.get_type_hints(kind).items():
        if is_float(hint):
            keys.append(prefix + key)
        elif _is_named(hint):
            choices = typing.get_args(hint)
            own = next(choice for choice in choices if choice().name == values[key]["name"])
            keys += _floats(own, values[key], f"{prefix}{key}.")
    return keys


def _put(options: dict[str, Any], key: str, number: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        options = options[parent]
    options[last] = number


def _label(section: dict[str, Any], place: str, source: Source) -> str:
    label = section.get("label", section["name"])
    if not isinstance(label, str) or not re.search(r"\w", label):
        raise source.error(f"{place}.label", f"expected a text with letters in it, got {label!r}")
    return label


def _mapping(value: Any, place: str, source: Source) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise source.error(place, f"expected keys with values, got {value!r}")
    return value


def _require_budget(budget: dict[str, Any], place: str, source: Source) -> None:
    if budget["transitions"] is None and budget["seconds"] is None:
        raise source.error(place, "transitions and seconds are both null; limit at least one")
