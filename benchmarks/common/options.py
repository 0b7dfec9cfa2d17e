"""The command line of a script whose options are a dataclass: one option per field, its docstring the help."""

import argparse
import ast
import dataclasses
import inspect
import re
import typing
from collections.abc import Sequence
from typing import Any

from bilevel_jax.problems.registry import nearest


def add_options(parser: argparse.ArgumentParser, defaults: Any) -> None:
    """Add an option for each field of a dataclass, `learning_rates` as --learning-rates; `read_options` reads them.

    A field is an int, a float, a str, a tuple of one of these (several words) or a dict (words KEY=VALUE).

    Args:
      defaults: an instance of the dataclass, whose docstring has a line "NAME: meaning." for each field.
    """
    types, meaning = typing.get_type_hints(type(defaults)), meanings(type(defaults))
    for field in dataclasses.fields(defaults):
        kind: Any = types[field.name]
        several: dict[str, Any] = {}
        if typing.get_origin(kind) is tuple:
            kind, several = typing.get_args(kind)[0], {"nargs": "+"}
        elif typing.get_origin(kind) is dict:
            kind, several = _pair, {"nargs": "+", "metavar": "KEY=VALUE"}
        text = f"{meaning[field.name]} (default: {_shown(getattr(defaults, field.name))})".replace("%", "%%")
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=kind, default=argparse.SUPPRESS, help=text, **several)


def read_options(given: argparse.Namespace, defaults: Any) -> Any:
    """The defaults with what was given in their place; of a dict, the keys that were given.

    A dict with a new `name` starts from nothing: the other keys are options of what has the old name.
    """
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(defaults):
        if not hasattr(given, field.name):
            continue
        value, default = getattr(given, field.name), getattr(defaults, field.name)
        if isinstance(default, dict):
            value = dict(value)
            kept = {} if value.get("name", default.get("name")) != default.get("name") else default
            changed[field.name] = {**kept, **value}
        else:
            changed[field.name] = tuple(value) if isinstance(default, tuple) else value
    return dataclasses.replace(defaults, **changed)


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """As `parser.parse_args`; of an option that does not exist, the nearest one that does is named."""
    given, rest = parser.parse_known_args(arguments)
    known = [option for action in parser._actions for option in action.option_strings]
    for word in rest:
        if word.startswith("-"):
            parser.error(f"no option {word}{nearest(word, known)}")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return given


def meanings(kind: type) -> dict[str, str]:
    """What a docstring says of each field in lines "NAME: meaning." or "NAME, NAME: meaning.", and in those after."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in (inspect.getdoc(kind) or "").splitlines():  # the indentation that __doc__ has depends on the Python
        head = re.match(r"(\w+(?:, \w+)*): (.+)", line)
        if head:
            names = head[1].split(", ")
            found |= dict.fromkeys(names, head[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            names = []
    return found


def _pair(word: str) -> tuple[str, Any]:
    """KEY=VALUE; a value that is not a Python literal is text."""
    key, sign, value = word.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {word!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={entry}" for key, entry in value.items())
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
