"""Configs of `run`: read, checked, every default filled in; and the cell that each stands for."""

import copy
import dataclasses
import itertools
import math
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

import bilevel_jax as bj
from bilevel_jax.algorithms.registry import builder, class_of
from bilevel_jax.core.errors import InputError, RequirementError
from bilevel_jax.core.options import nearest
from bilevel_jax.core.schedules import Schedule
from bilevel_jax.experiments.cells import Cell, digests_of
from bilevel_jax.experiments.choices import Option, choices, optimizers, options_of, projections
from bilevel_jax.experiments.keys import RunSection
from bilevel_jax.experiments.sections import (
    Context,
    build_algorithm,
    build_problem,
    build_upper,
    checked_choice,
    checked_problem,
    refused,
    require_buildable,
    validated,
)
from bilevel_jax.experiments.source import Source, get, put, read
from bilevel_jax.problems import registry

# What a directory of results has its config in, every default filled in; the user's own file may lie beside it.
RECORD = "resolved.yaml"
# Runs of one config at most: each is a row of the results.
MOST_RUNS = 1_000_000
# What a run may leave out: exact solves and an exact adjoint; without a model, samples.
ALGORITHM = {"name": "m_sobirl", "solver": "policy_iteration", "adjoint": "direct"}
SAMPLED_ALGORITHM = {"name": "sobirl"}
UPPER = ("optimizer", "projection", "temperature")


@dataclasses.dataclass(frozen=True)
class Config:
    """A checked config of `run`: `values`, plain nested dicts with every default filled in."""

    name: str
    values: dict[str, Any]

    @property
    def grid(self) -> list[dict[str, Any]]:
        """What distinguishes the runs: for each, its seed and the swept values, by dotted key."""
        axes = {"seed": [self.values["seed"]], **self.values["sweep"]}
        return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]

    def at(self, point: dict[str, Any]) -> dict[str, Any]:
        """Return the values, with those of one point of the grid in their places."""
        values = copy.deepcopy(self.values)
        for key, value in point.items():
            put(values, key, value)
        return values

    @property
    def cell(self) -> Cell:
        """All runs of the config."""
        values, grid = self.values, self.grid
        settings: list[dict[str, Any]] = []
        places: dict[str, int] = {}
        runs = []
        for point in grid:
            setting = {key: value for key, value in point.items() if key != "seed"}
            place = places.setdefault(repr(setting), len(settings))
            if place == len(settings):
                settings.append(setting)
            runs.append((place, point["seed"]))
        return Cell(
            labels=(self.name, values["algorithm"]["name"]),
            sections={key: values[key] for key in ("problem", "algorithm", *UPPER)},
            settings=settings,
            runs=runs,
            limits={"iterations": values["iterations"], **values["budget"]},
            points={"every": values["record_every"]},
            samples=values["samples"],
            precision=values["precision"],
            memory_limit_mb=values["memory_limit_mb"],
            checkpoint=values["checkpoint"],
            exact="end",
            digests=digests_of(values["modules"], values["problem"]),
        )


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the config of a run, apply `key=value` overrides and check everything.

    Raises:
      InputError: unreadable or malformed file, unknown key, wrong type, impossible value, a comparison.
    """
    raw, source = read(path, overrides)
    require_command(raw, "run", source)
    for key, command in (("algorithms", "compare"), ("study", "benchmarks/studies")):
        if key in raw:
            how = f"bilevel-jax {command}" if command == "compare" else f"a script of {command}"
            raise source.error(key, f"this is no config of a run; give it to {how}")
    values = {**_checked(raw, source), "modules": source.modules}
    values["sweep"] = _checked_sweep(raw, values, source)
    return Config(Path(path).stem, values)


def from_directory(directory: Path) -> Config:
    """The config of the run that wrote into a directory."""
    return load(directory / RECORD)


def require_command(raw: dict[str, Any], command: str, source: Source) -> None:
    """Take out the key `command`, which the configs in results have. Raises InputError where it is another command."""
    raw.pop("digests", None)
    found = raw.pop("command", command)
    if found != command:
        raise source.error("command", f"this config is of bilevel-jax {found}; give it to that")


def _checked(raw: dict[str, Any], source: Source) -> dict[str, Any]:
    problem = checked_problem(raw.get("problem"), "problem", source)
    known = choices((bj.algorithms.Algorithm,))
    beside = {key: value for key, value in raw.items() if key not in ("problem", "algorithm", *UPPER)}
    values = validated(RunSection, beside, "", source, ("problem", "algorithm", *UPPER))
    require_makeable(problem, "problem", values["precision"], source)
    with jax.enable_x64(values["precision"] == "float64"):
        has_model = isinstance(build_problem(problem), bj.Problem)
    default = ALGORITHM if has_model else SAMPLED_ALGORITHM
    algorithm = checked_choice(
        _with_default(raw.get("algorithm", {}), default), "algorithm", known, "algorithm", source
    )
    made = {"problem": problem, "algorithm": algorithm, **checked_upper(raw, algorithm["name"], "", source), **values}
    with jax.enable_x64(values["precision"] == "float64"):
        _require_algorithm(made, source)
    return made


def _with_default(section: Any, default: dict[str, Any]) -> Any:
    """An algorithm's section; without a name it is the default one, with what is given in place of its options."""
    if not isinstance(section, dict) or "name" in section:
        return section
    merged = {**default, **section}
    for key, own in section.items():
        if isinstance(own, dict) and "name" not in own and isinstance(default.get(key), str):
            merged[key] = {"name": default[key], **own}
    return merged


def _require_algorithm(values: dict[str, Any], source: Source) -> None:
    """Raise InputError, with the key, for an algorithm that does not run on the problem or refuses an option."""
    section = values["algorithm"]
    try:
        context = Context(build_problem(values["problem"]), build_upper(values), values["budget"]["transitions"])
        build_algorithm(section, context)
    except RequirementError as error:
        raise source.error(
            "algorithm.name", f"{section['name']} does not run on {values['problem']['name']}, which {error.reason}"
        ) from None
    except InputError as error:
        raise refused(error, section, "algorithm", source) from None


def checked_upper(raw: dict[str, Any], algorithm: str, place: str, source: Source) -> dict[str, Any]:
    """The sections optimizer, projection and temperature, the last two null where they are left out."""
    prefix = f"{place}." if place else ""
    searches = getattr(class_of(builder(algorithm)), "searches", True)
    known = {name: choice for name, choice in optimizers().items() if searches or name != "lbfgs"}
    made: dict[str, Any] = {
        "optimizer": checked_choice(raw.get("optimizer", {}), f"{prefix}optimizer", known, "optimizer", source, "adam")
    }
    others = (("projection", projections()), ("temperature", choices((Schedule,))))
    for key, known in others:
        section = raw.get(key)
        made[key] = None if section is None else checked_choice(section, f"{prefix}{key}", known, key, source)
        if key == "temperature" and made[key] is not None:
            require_buildable(made[key], f"{prefix}{key}", known, source)
    return made


def _checked_sweep(raw: dict[str, Any], values: dict[str, Any], source: Source) -> dict[str, list[Any]]:
    """The swept values, each tried on its own."""
    sweep = raw.get("sweep", {})
    known = sweepable(values)
    for key, points in sweep.items():
        if key not in known:
            raise source.error(
                f"sweep.{key}", f"cannot be swept{_hint(key, points, known)}; what can: {', '.join(known)}"
            )
        if not isinstance(points, list):
            raise source.error(f"sweep.{key}", f"Input should be a valid list, got {points!r}")
        if not points:
            raise source.error(f"sweep.{key}", "List should have at least 1 item, got []")
    count = math.prod(len(points) for points in sweep.values())
    if count > MOST_RUNS:
        raise source.error("sweep", f"{count:,} runs, of which {MOST_RUNS:,} at most are allowed; list fewer values")
    made = {}
    for key, points in sweep.items():
        made[key] = [_checked_point(raw, values, key, i, point, source) for i, point in enumerate(points)]
        for i, point in enumerate(made[key]):
            if point in made[key][:i]:
                raise source.error(f"sweep.{key}.{i}", f"{point!r} stands here a second time; remove one")
    return made


def _hint(key: str, points: Any, known: list[str]) -> str:
    """What to do in place of a key that cannot be swept."""
    if isinstance(points, dict):
        return f" as a section; write dotted keys, such as {key}.{next(iter(points), 'option')}: [...]"
    if key.split(".")[-1] == "name":
        return f", since options go with a name: bilevel-jax compare takes several algorithms{nearest(key, known)}"
    return nearest(key, known)


def _checked_point(
    raw: dict[str, Any], values: dict[str, Any], key: str, place: int, point: Any, source: Source
) -> Any:
    trial = {k: v for k, v in copy.deepcopy(raw).items() if k != "sweep"}
    put(trial, key, point)
    within = dataclasses.replace(source, overridden={**source.overridden, key: f"{key}={point}"})
    try:
        if key == "seed":  # nothing is built of it
            return validated(RunSection, {"seed": point}, "", within)["seed"]
        checked = _checked(trial, within)
    except InputError as error:
        message = re.sub(r"^\S+ \(command line, [^)]*\): ", "", str(error))
        raise source.error(f"sweep.{key}.{place}", f"{point!r} is not valid: {key}: {message}") from None
    return get(checked, key)


def sweepable(values: dict[str, Any]) -> list[str]:
    """The dotted keys of a checked config that a sweep may list: the seed, and every number, choice or truth value."""
    problem = typing.get_type_hints(registry.spec(values["problem"]["name"]).options)
    keys = ["seed", *(f"problem.{key}" for key, hint in problem.items() if is_scalar(hint))]
    for place, known in (
        ("algorithm", choices((bj.algorithms.Algorithm,))),
        ("optimizer", optimizers()),
        ("projection", projections()),
        ("temperature", choices((Schedule,))),
    ):
        if values[place] is not None:
            keys += scalars(known[values[place]["name"]].options, values[place], f"{place}.")
    return keys


def scalars(options: Iterable[Option], section: dict[str, Any], prefix: str) -> Iterator[str]:
    """The dotted keys of a section's numbers, choices and truth values, of sections within it too."""
    for option in options:
        value = section[option.name]
        if not isinstance(value, dict):
            if option.scalar:
                yield f"{prefix}{option.name}"
            continue
        within = options_of(option.fixed) if option.fixed else choices(option.bases)[value["name"]].options
        yield from scalars(within, value, f"{prefix}{option.name}.")


def is_scalar(hint: Any) -> bool:
    """Whether a problem's option is one number, choice or truth value."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Literal or hint in (bool, int, float):
        return True
    return typing.get_origin(hint) not in (tuple, list) and any(is_scalar(part) for part in parts)


def require_makeable(section: dict[str, Any], place: str, precision: str, source: Source) -> None:
    """Raise for values that have the right type but no meaning, such as a discount of 1.

    The problem says which they are.
    """
    try:
        with jax.enable_x64(precision == "float64"):
            build_problem(section)
    except InputError as error:
        key = max((k for k in section if str(error).startswith(k)), key=len, default=None)  # one may begin another
        raise source.error(f"{place}.{key}" if key else place, str(error)) from None
