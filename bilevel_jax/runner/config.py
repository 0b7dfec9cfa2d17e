"""Read, override and check a config. Every error names the key, where it stands, and what would be valid."""

import copy
import dataclasses
import itertools
import types
import typing
from pathlib import Path
from typing import Any

import jax
import pydantic
import yaml
from pydantic.dataclasses import dataclass as pydantic_dataclass

from bilevel_jax.errors import InputError
from bilevel_jax.problems import registry
from bilevel_jax.runner.modules import import_module
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
    raw, source = read(path, overrides, _expand_names)
    return Config(Path(path).stem, _check({**raw, "modules": source.modules}, source))


def read(
    path: str | Path, overrides: typing.Sequence[str], expand: typing.Callable[[dict[str, Any]], None]
) -> tuple[dict[str, Any], "Source"]:
    """A YAML file with the overrides put in, and where its keys stand. `expand` writes abbreviations out.

    The key `modules`, of any config, is taken out: they are imported, and their names put into the source.

    Raises:
      InputError: unreadable or malformed file or override, or a module that cannot be imported.
    """
    path = Path(path)
    try:
        text = path.read_text()
        tree = yaml.compose(text, _Loader)
        source = Source(str(path), tree, {}, [])
        _refuse_repetition(tree, "", (), source)
        raw = yaml.load(text, _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give the path of a YAML config") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected keys with values at the top, got {type(raw).__name__}; see configs/")
    expand(raw)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise InputError(f"{override}: expected key=value, e.g. optimizer.learning_rate=0.1")
        try:
            _set(raw, key, yaml.load(value, _Loader))
        except yaml.YAMLError:
            raise InputError(f"{override}: {value!r} is not a valid YAML value") from None
        source.overridden[key] = override
        expand(raw)
    modules = raw.pop("modules", [])
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise source.error("modules", f"expected a list of files or modules, got {modules!r}")
    source.modules = [import_module(name, path.parent) for name in modules]
    return raw, source


def from_directory(directory: Path) -> Config:
    """The config that a run wrote into its directory."""
    return load(directory / "config.yaml")


@dataclasses.dataclass
class Source:
    """Where the keys of a config stand, for error messages."""

    path: str
    tree: yaml.Node | None
    overridden: dict[str, str]
    modules: list[str]

    def where(self, key: str) -> str:
        for overridden, text in self.overridden.items():
            if key == overridden or key.startswith(overridden + "."):
                return f"command line, {text}"
        node, line, rest = self.tree, 1, key
        while rest:
            if isinstance(node, yaml.MappingNode):
                children = [(k.value, k, v) for k, v in node.value]
            elif isinstance(node, yaml.SequenceNode):
                children = [(str(i), v, v) for i, v in enumerate(node.value)]
            else:
                break
            # Keys of the sweep section have dots of their own.
            found = next((c for c in children if rest == c[0] or rest.startswith(f"{c[0]}.")), None)
            if found is None:
                break
            name, at, node = found
            line, rest = at.start_mark.line + 1, rest[len(name) + 1 :]
        return f"{self.path}, line {line}"

    def error(self, key: str, message: str) -> InputError:
        return InputError(f"{key} ({self.where(key)}): {message}")


class _Loader(yaml.SafeLoader):
    """YAML of plain numbers and texts: without dates, and without tags that construct something."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, AttributeError) as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _refuse_repetition(node: yaml.Node | None, prefix: str, above: tuple[yaml.Node, ...], source: Source) -> None:
    """Of two equal keys YAML would silently take the last; and a section can be made to contain itself."""
    if isinstance(node, yaml.SequenceNode):
        children = [(f"{prefix}{i}", child, child) for i, child in enumerate(node.value)]
    elif isinstance(node, yaml.MappingNode):
        children = [(f"{prefix}{key.value}", key, value) for key, value in node.value]
    else:
        return
    seen = set()
    for name, at, child in children:
        where = f"{name} ({source.path}, line {at.start_mark.line + 1})"
        if name in seen:
            raise InputError(f"{where}: stands here a second time; remove one")
        if any(child is ancestor for ancestor in (*above, node)):
            raise InputError(f"{where}: contains itself; write its values out")
        seen.add(name)
        _refuse_repetition(child, name + ".", (*above, node), source)


def _expand_names(raw: dict[str, Any]) -> None:
    """A section may be just a name, or leave the default name out."""
    if isinstance(raw.get("problem"), str):
        raw["problem"] = {"name": raw["problem"]}
    for place, choices in SECTIONS.items():
        *parents, last = place.split(".")
        section = raw
        for parent in parents:
            section = section[parent] if isinstance(section, dict) else None
        if not isinstance(section, dict):
            continue
        value = section.setdefault(last, {})
        if isinstance(value, str):
            section[last] = {"name": value}
        elif isinstance(value, dict):
            section[last] = {"name": choices[0]().name, **value}


def _split(key: str) -> list[str]:
    # A key of the sweep section has dots of its own.
    return ["sweep", key.removeprefix("sweep.")] if key.startswith("sweep.") else key.split(".")


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = _split(key)
    place: Any = values
    for parent in parents:
        if _is_entry(place, parent):
            place = place[int(parent)]
            continue
        if not isinstance(place.get(parent), dict | list):
            place[parent] = {}
        place = place[parent]
    place[int(last) if _is_entry(place, last) else last] = value


def _is_entry(place: Any, key: str) -> bool:
    """Whether a part of a key is the place in a list."""
    if not isinstance(place, list):
        return False
    if not (key.isdecimal() and int(key) < len(place)):
        raise InputError(f"{key}: expected a place from 0 to {len(place) - 1} in a list")
    return True


def _check(raw: dict[str, Any], source: Source) -> dict[str, Any]:
    values = _checked(raw, source)
    known = sweepable(values)
    for key, points in values["sweep"].items():
        if key not in known:
            hint = registry.nearest(key, known)
            raise source.error(f"sweep.{key}", f"cannot be swept{hint}; what can: {', '.join(known)}")
        for point in points:
            _check_point(raw, key, point, source)
        values["sweep"][key] = [int(point) if _is_seed(key) else float(point) for point in points]
    return values


def _checked(raw: dict[str, Any], source: Source) -> dict[str, Any]:
    values = _check_types(raw, source)
    require_makeable(values["problem"], "problem", values["precision"], source)
    return values


def _check_types(raw: dict[str, Any], source: Source) -> dict[str, Any]:
    rest = {key: value for key, value in raw.items() if key != "problem"}
    return {
        "problem": checked_problem(raw.get("problem"), "problem", source),
        **validated(RunSection, rest, "", source, ("problem",)),
    }


def checked_problem(section: Any, place: str, source: Source, beside: tuple[str, ...] = ()) -> dict[str, Any]:
    """A problem's section with every default filled in. Raises InputError for unknown names and keys, wrong types.

    `beside`: keys that are valid too, and are read by someone else. Paths become absolute: they are relative to the
    config.
    """
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        raise source.error(place, f"give the section a name, one of {', '.join(registry.names())}")
    name = section["name"]
    require_name(name, registry.names(), "problem", place, source)
    options_type = pydantic_dataclass(registry.spec(name).options, config=STRICT_KEYS, frozen=True)
    options = {key: value for key, value in section.items() if key not in ("name", *beside)}
    values = validated(options_type, options, place, source, beside)
    for field in dataclasses.fields(registry.spec(name).options):
        if field.metadata.get("path") and values[field.name]:  # absolute, so that the results' own config finds it
            values[field.name] = str((Path(source.path).parent / values[field.name]).resolve())
    return {"name": name, **values}


def require_name(name: str, known: typing.Iterable[str], what: str, place: str, source: Source) -> None:
    """Raise InputError, with the nearest one, if a section's name is not known."""
    if name not in known:
        hint = registry.nearest(name, known)
        raise source.error(f"{place}.name", f"no {what} {name!r}{hint}; valid: {', '.join(known)}")


def validated(
    kind: type, data: dict[str, Any], prefix: str, source: Source, beside: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The data with every default of a pydantic dataclass filled in. Raises InputError that names the key.

    `beside`: keys of the same section that are read by someone else.
    """
    adapter = pydantic.TypeAdapter(kind)
    try:
        values = adapter.dump_python(adapter.validate_python(data), mode="json")
        _refuse_truth_values(data, values, prefix, source)
        return values
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        parts = _without_tags(first["loc"], data)
        key = ".".join([*([prefix] if prefix else []), *parts])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = _known_keys(kind, data, parts[:-1], beside)
            hint = registry.nearest(parts[-1], known)
            raise source.error(key, f"unknown key{hint}; valid: {', '.join(known)}") from None
        if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
            valid = [choice().name for choice in typing.get_args(_hint_at(kind, data, parts))]
            name = first["input"].get("name")
            hint = registry.nearest(str(name), valid)
            raise source.error(f"{key}.name", f"no choice {name!r}{hint}; valid: {', '.join(valid)}") from None
        raise source.error(key, f"{first['msg']}, got {first['input']!r}") from None


def _refuse_truth_values(data: Any, values: Any, key: str, source: Source) -> None:
    """Python takes true for 1; a config that says so is mistaken."""
    if isinstance(data, bool):
        if not isinstance(values, bool):
            raise source.error(key, f"expected a number (an integer where it counts), got {str(data).lower()}")
        return
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for name, child in children:
        _refuse_truth_values(child, values[name], f"{key}.{name}" if key else str(name), source)


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


def _hint_at(kind: Any, data: Any, parts: list[str]) -> Any:
    """The type that a key has in a dataclass, its section's names chosen as in the data."""
    hint = kind
    for part in parts:
        hint = typing.get_type_hints(_chosen(hint, data))[part]
        data = data[part]
    return hint


def _chosen(hint: Any, data: Any) -> Any:
    """Of several sections the one that the data names."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    named = [o for o in options if typing.get_type_hints(o).get("name") == typing.Literal[data.get("name")]]
    return (named or list(options))[0]


def _known_keys(kind: Any, data: Any, parts: list[str], beside: tuple[str, ...]) -> list[str]:
    section = data
    for part in parts:
        section = section[part]
    chosen = _chosen(_hint_at(kind, data, parts), section) if parts else kind
    names = [field.name for field in dataclasses.fields(chosen)]
    return names if parts else [*beside, *names]


def require_makeable(section: dict[str, Any], place: str, precision: str, source: Source) -> None:
    """Raise for values that have the right type and no meaning, such as a discount of 1: the problem says so."""
    options = dict(section)
    name = options.pop("name")
    try:
        with jax.enable_x64(precision == "float64"):
            registry.make(name, **options)
    except InputError as error:
        key = max((k for k in options if str(error).startswith(k)), key=len, default=None)  # one may begin another
        raise source.error(f"{place}.{key}" if key else place, str(error)) from None


def _check_point(raw: dict[str, Any], key: str, point: Any, source: Source) -> None:
    trial = copy.deepcopy(raw)
    trial["sweep"] = {}
    _set(trial, key, point)
    try:
        _checked(trial, source)
    except InputError as error:
        raise source.error(f"sweep.{key}", f"{point!r} is not valid: {error}") from None


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
        keys += [f"{place}.{name}" for name, hint in hints.items() if is_float(hint) or _is_seed(name)]
    return keys


def _is_seed(key: str) -> bool:
    return key.split(".")[-1] == "seed"


def is_float(hint: Any) -> bool:
    """Whether a key takes a number that may be swept. A tuple of numbers is none."""
    choices = typing.get_args(hint) if typing.get_origin(hint) is not tuple else ()
    return hint is float or float in [a for a in choices if isinstance(a, type)]


def _get(values: dict[str, Any], key: str) -> Any:
    for part in _split(key):
        values = values[part]
    return values
