"""A config file as it was written: YAML of plain values, overrides from the command line, and where each key stands."""

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import yaml

from bilevel_jax.core.errors import InputError
from bilevel_jax.experiments.modules import import_module


@dataclasses.dataclass
class Source:
    """Where the keys of a config stand, for error messages; and the modules that it imported."""

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


def read(path: str | Path, overrides: typing.Sequence[str] = ()) -> tuple[dict[str, Any], Source]:
    """A YAML file with the overrides put in, and where its keys stand.

    The key `modules`, of any config, is taken out: they are imported, and their names put into the source.

    Raises:
      InputError: unreadable or malformed file or override, or a module that cannot be imported.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
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
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise InputError(f"{override}: expected key=value, e.g. optimizer.learning_rate=0.1")
        try:
            put(raw, key, yaml.load(value, _Loader))
        except yaml.YAMLError:
            raise InputError(f"{override}: {value!r} is not a valid YAML value") from None
        source.overridden[key] = override
    modules = raw.pop("modules", [])
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise source.error("modules", f"expected a list of files or modules, got {modules!r}")
    source.modules = [import_module(name, path.parent) for name in modules]
    return raw, source


class _Loader(yaml.SafeLoader):
    """YAML of plain numbers and texts, as people write them.

    There are no dates and no tags that construct objects. Some numbers of YAML 1.1 that people do not expect are left
    out as well: there 010 is 8, 1:30 is 90, 1e-3 is a text and `no` is false.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, AttributeError) as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _letters in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    # An int of several digits with a leading zero is neither: it stays a text, which is refused where a number stands.
    _whole = re.compile(rf"^(?:(?![-+]?0[0-9]+$){_pattern})$" if _tag == "float" else rf"^(?:{_pattern})$")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, list(_letters))


def _refuse_repetition(node: yaml.Node | None, prefix: str, above: tuple[yaml.Node, ...], source: Source) -> None:
    """Raise for a key that stands twice, of which YAML would silently take the last, and for a section that contains
    itself.
    """
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


def plain(text: str) -> Any:
    """A text as a config would read it without quotes."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def split(key: str) -> list[str]:
    """The parts of a dotted key; a key of the sweep section has dots of its own."""
    return ["sweep", key.removeprefix("sweep.")] if key.startswith("sweep.") else key.split(".")


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, in place; sections on the way are made, and a section that is a name alone is written out."""
    *parents, last = split(key)
    place: Any = values
    for parent in parents:
        if _is_entry(place, parent):
            if isinstance(place[int(parent)], str):
                place[int(parent)] = {"name": place[int(parent)]}
            place = place[int(parent)]
            continue
        if isinstance(place.get(parent), str):
            place[parent] = {"name": place[parent]}
        if not isinstance(place.get(parent), dict | list):
            place[parent] = {}
        place = place[parent]
    place[int(last) if _is_entry(place, last) else last] = value


def get(values: Any, key: str) -> Any:
    """The value at a dotted key."""
    for part in split(key):
        values = values[part]
    return values


def _is_entry(place: Any, key: str) -> bool:
    """Whether a part of a key is the place in a list."""
    if not isinstance(place, list):
        return False
    if not (key.isdecimal() and int(key) < len(place)):
        raise InputError(f"{key}: expected a place from 0 to {len(place) - 1} in a list")
    return True
