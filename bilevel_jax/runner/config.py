"""Read, override and check a config. Every error names the key, where it stands, and what would be valid."""

import copy
import dataclasses
import itertools
import math
import types
import typing
from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic.dataclasses import dataclass as pydantic_dataclass

from bilevel_jax.errors import InputError
from bilevel_jax.problems import registry
from bilevel_jax.runner.schema import SECTIONS, STRICT_KEYS, RunSection


@dataclasses.dataclass(frozen=True)
class Config:
    """A checked config: `values`, plain nested dicts with every default filled in, and the sweep's grid."""

    name: str
    values: dict[str, Any]

    @property
    def grid(self) -> list[dict[str, float]]:
        """What tells the runs apart: for each, its seed and the swept numbers, by dotted key."""
        axes = {"seed": [self.values["seed"]], **self.values["sweep"]}
        return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]

    def at(self, point: dict[str, Any]) -> dict[str, Any]:
        """The values with those of one point of the grid put in."""
        values = copy.deepcopy(self.values)
        for key, value in point.items():
            _set(values, key, value)
        return values


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides and check everything.

    Raises:
      InputError: unreadable or malformed file, unknown key, wrong type, impossible value.
    """
    path = Path(path)
    try:
        text = path.read_text()
        tree = yaml.compose(text, yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give the path of a YAML config") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected keys with values at the top, got {type(raw).__name__}; see configs/")
    source = _Source(str(path), tree, {})
    _refuse_duplicates(tree, "", source)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise InputError(f"{override}: expected key=value, e.g. optimizer.learning_rate=0.1")
        try:
            _set(raw, key, yaml.safe_load(value))
        except yaml.YAMLError:
            raise InputError(f"{override}: {value!r} is not a valid YAML value") from None
        source.overridden[key] = override
    return Config(path.stem, _check(raw, source))


def from_directory(directory: Path) -> Config:
    """The config that a run wrote into its directory."""
    return load(directory / "config.yaml")


@dataclasses.dataclass
class _Source:
    """Where the keys of a config stand, for error messages."""

    path: str
    tree: yaml.Node | None
    overridden: dict[str, str]

    def where(self, key: str) -> str:
        for overridden, text in self.overridden.items():
            if key == overridden or key.startswith(overridden + "."):
                return f"command line, {text}"
        node, line = self.tree, 1
        for part in _split(key):
            found = None
            if isinstance(node, yaml.MappingNode):
                found = next(((k, v) for k, v in node.value if k.value == part), None)
            elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
                found = (node.value[int(part)], node.value[int(part)])
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        return f"{self.path}, line {line}"

    def error(self, key: str, message: str) -> InputError:
        return InputError(f"{key} ({self.where(key)}): {message}")


def _refuse_duplicates(node: yaml.Node | None, prefix: str, source: _Source) -> None:
    """YAML would silently take the last of two equal keys."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name in seen:
            line = key.start_mark.line + 1
            raise InputError(f"{name} ({source.path}, line {line}): stands here a second time; remove one")
        seen.add(name)
        _refuse_duplicates(value, name + ".", source)


def _split(key: str) -> list[str]:
    # A key of the sweep section has dots of its own.
    return ["sweep", key.removeprefix("sweep.")] if key.startswith("sweep.") else key.split(".")


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = _split(key)
    for parent in parents:
        if not isinstance(values.get(parent), dict):
            values[parent] = {}
        values = values[parent]
    values[last] = value


def _check(raw: dict[str, Any], source: _Source) -> dict[str, Any]:
    values = _check_types(raw, source)
    _check_numbers(values, source)
    for key, points in values["sweep"].items():
        for point in points:
            _check_swept(raw, key, point, source)
    return values


def _check_types(raw: dict[str, Any], source: _Source) -> dict[str, Any]:
    problem = raw.get("problem")
    if isinstance(problem, str):
        problem = {"name": problem}
    if not isinstance(problem, dict) or not isinstance(problem.get("name"), str):
        raise source.error("problem", f"give the section a name, one of {', '.join(registry.names())}")
    if problem["name"] not in registry.names():
        hint = registry.nearest(problem["name"], registry.names())
        raise source.error(
            "problem.name", f"no problem {problem['name']!r}{hint}; valid: {', '.join(registry.names())}"
        )
    options_type = pydantic_dataclass(registry.spec(problem["name"]).options, config=STRICT_KEYS, frozen=True)
    options = {key: value for key, value in problem.items() if key != "name"}
    rest = {key: value for key, value in raw.items() if key != "problem"}
    return {
        "problem": {"name": problem["name"], **_validated(options_type, options, "problem", source)},
        **_validated(RunSection, rest, "", source),
    }


def _validated(kind: type, data: dict[str, Any], prefix: str, source: _Source) -> dict[str, Any]:
    adapter = pydantic.TypeAdapter(kind)
    try:
        return adapter.dump_python(adapter.validate_python(data), mode="json")
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        parts = _without_tags(first["loc"], data)
        key = ".".join([*([prefix] if prefix else []), *parts])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = _known_keys(kind, data, parts[:-1], top=not prefix)
            hint = registry.nearest(parts[-1], known)
            raise source.error(key, f"unknown key{hint}; valid: {', '.join(known)}") from None
        if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
            valid = [kind().name for kind in SECTIONS[key]]
            name = first["input"].get("name")
            problem = "needs a name" if name is None else f"no choice {name!r}{registry.nearest(str(name), valid)}"
            raise source.error(f"{key}.name", f"{problem}; valid: {', '.join(valid)}") from None
        raise source.error(key, f"{first['msg']}, got {first['input']!r}") from None


def _without_tags(location: tuple[Any, ...], data: Any) -> list[str]:
    """A pydantic error's location without the union tags that it inserts."""
    parts = []
    for i, part in enumerate(location):
        last = i == len(location) - 1
        if isinstance(data, dict) and (part in data or (last and part != data.get("name"))):
            parts.append(str(part))
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int):
            parts.append(str(part))
            data = data[part]
    return parts


def _known_keys(kind: Any, data: Any, parts: list[str], *, top: bool) -> list[str]:
    for part in parts:
        data = data[part]
        hint = typing.get_type_hints(kind)[part]
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        named = [o for o in options if typing.get_type_hints(o).get("name") == typing.Literal[data.get("name")]]
        kind = (named or list(options))[0]
    names = [field.name for field in dataclasses.fields(kind)]
    return ["problem", *names] if top and not parts else names


def _check_numbers(values: dict[str, Any], source: _Source) -> None:
    """Values that have the right type and no meaning, such as a discount of 1: the problem says so."""
    section = dict(values["problem"])
    name = section.pop("name")
    for key, value in section.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise source.error(f"problem.{key}", f"must be finite, got {value}")
    try:
        registry.make(name, **section)
    except InputError as error:
        key = next((k for k in section if str(error).startswith(k)), None)
        raise source.error(f"problem.{key}" if key else "problem", str(error)) from None


def _check_swept(raw: dict[str, Any], key: str, point: Any, source: _Source) -> None:
    where = f"sweep.{key}"
    trial = copy.deepcopy(raw)
    trial["sweep"] = {}
    full = _check_types(trial, source)
    known = sweepable(full)
    if key not in known:
        raise source.error(where, f"cannot be swept{registry.nearest(key, known)}; what can: {', '.join(known)}")
    _set(trial, key, point)
    try:
        _check_numbers(_check_types(trial, source), source)
    except InputError as error:
        raise source.error(where, f"{point!r} is not valid: {error}") from None


def sweepable(values: dict[str, Any]) -> list[str]:
    """The dotted keys of a checked config that a sweep may list: its floats, and its seeds."""
    keys = ["seed"]
    sections = {
        "problem": registry.spec(values["problem"]["name"]).options,
        **{
            place: next(s for s in choices if s().name == _get(values, place)["name"])
            for place, choices in SECTIONS.items()
        },
    }
    for place, kind in sections.items():
        hints = typing.get_type_hints(kind)
        keys += [f"{place}.{name}" for name, hint in hints.items() if _is_float(hint) or name == "seed"]
    return keys


def _is_float(hint: Any) -> bool:
    return hint is float or float in [a for a in typing.get_args(hint) if isinstance(a, type)]


def _get(values: dict[str, Any], key: str) -> Any:
    for part in _split(key):
        values = values[part]
    return values
