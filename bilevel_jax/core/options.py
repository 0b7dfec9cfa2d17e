"""Options of problems and algorithms that are registered by name: a frozen dataclass of values that a config can write.

A registry checks the class of options once, when it is registered, and builds its values from what a user gives by
name.
"""

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from jax.core import Tracer

from bilevel_jax.core.errors import InputError

WRITABLE = "bool, int, float, str, Literal[...], and unions, tuple[...] and list[...] of these"


def check_name(argument: str, name: Any) -> None:
    """Raise InputError if a name is no string of ASCII letters, digits and underscores.

    Example:
      >>> check_name("name", "toll_road")
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise InputError(f"{argument}: expected a string of letters, digits and underscores, got {name!r}")


def check_build(argument: str, build: Any) -> None:
    """Raise InputError if `build` cannot be called with one argument, the options.

    Example:
      >>> check_build("build", lambda options: options)
    """
    remedy = "give a function, or a class, of the options: build(options)"
    if not callable(build):
        raise InputError(f"{argument}: expected a function, got {build!r}; {remedy}")
    try:
        inspect.signature(build).bind(None)
    except TypeError as error:
        raise InputError(f"{argument}: {build!r} cannot be called with the options alone ({error}); {remedy}") from None
    except ValueError:  # some functions of C have no signature
        return


def check_options(argument: str, options_class: Any, reserved: Iterable[str] = ()) -> None:
    """Check a class of options: a frozen dataclass, each field with a default and of a type that a config can write.

    Args:
      argument: what the caller calls the class, for messages.
      options_class: the class.
      reserved: names that a config's section uses for something else.

    Raises:
      InputError: no such class; it names the argument, the field and the remedy.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class TollOptions:
      ...     jam: float = 0.4
      >>> check_options("options", TollOptions, reserved=("name",))
    """
    if not (isinstance(options_class, type) and dataclasses.is_dataclass(options_class)):
        raise InputError(
            f"{argument}: expected a dataclass, got {options_class!r}; write @dataclasses.dataclass(frozen=True) above "
            f"a class whose fields are the options"
        )
    where = f"{argument}: {options_class.__name__}"
    if not typing.cast(Any, options_class).__dataclass_params__.frozen:
        raise InputError(f"{where} is not frozen; write @dataclasses.dataclass(frozen=True)")
    hints = _hints(where, options_class)
    for field in dataclasses.fields(options_class):
        _check_field(where, field, hints[field.name], tuple(reserved))
    try:
        options_class()
    except Exception as error:
        raise InputError(
            f"{where}() fails with {type(error).__name__}: {error}; the defaults alone must make one"
        ) from None


def make_options(kind: str, name: str, options_class: type, given: dict[str, Any]) -> Any:
    """Build the options of a registered problem or algorithm from those that are given; the others have their defaults.

    Args:
      kind: what is registered, such as "problem", for messages.
      name: the name under which it is registered.
      options_class: a class that `check_options` accepts.
      given: options by name.

    Raises:
      InputError: an option does not exist (the nearest one is named), a value is no choice of its `Literal`, is no
        truth value or no text where one is expected, or is several numbers where one is expected.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class TollOptions:
      ...     jam: float = 0.4
      >>> make_options("problem", "toll", TollOptions, {"jam": 0.5}).jam
      0.5
    """
    known = [field.name for field in dataclasses.fields(options_class)]
    for option in given:
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise InputError(f"{option}: {kind} {name!r} has no such option{nearest(option, known)}; {has}")
    hints = typing.get_type_hints(options_class)
    for option, value in given.items():
        if hints[option] is float and (isinstance(value, list | tuple) or np.ndim(value)):
            raise InputError(f"{option}: expected one number, got several: {value!r}")
        if hints[option] is str and not isinstance(value, str):
            raise InputError(f"{option}: expected a text, got {value!r}")
    options = options_class(**given)
    require_choices(options)
    return options


def require_choices(options: Any) -> None:
    """Raise InputError if an option is none of the values that its type names: those of a `Literal`, or a bool."""
    hints = typing.get_type_hints(type(options))
    for name in [field.name for field in dataclasses.fields(options)]:
        valid, value = choices(hints[name]), getattr(options, name)
        value = value.item() if isinstance(value, np.generic) else value
        # Of one type, too: Python takes True for 1.
        if valid and not any(type(value) is type(choice) and value == choice for choice in valid):
            what = "a traced value, which a choice cannot be" if isinstance(value, Tracer) else repr(value)
            *others, last = map(repr, valid)
            listed = f"{', '.join(others)} or {last}" if others else last
            raise InputError(f"{name}: expected {listed}, got {what}")


def choices(hint: Any) -> tuple[Any, ...]:
    """Return all values of a type that has finitely many, such as `Literal["a", "b"]`, bool or a union of these.

    The tuple is empty for any other type.

    Example:
      >>> choices(Literal["dense", "successor"] | None)
      ('dense', 'successor', None)
    """
    if hint is bool:
        return (False, True)
    if hint is types.NoneType:
        return (None,)
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    if not _is_union(hint):
        return ()
    parts = [choices(part) for part in typing.get_args(hint)]
    return tuple(value for part in parts for value in part) if all(parts) else ()


def nearest(word: str, known: Iterable[str]) -> str:
    """', did you mean X?', X the most similar of the known words or one that `word` abbreviates."""

    def abbreviates(candidate: str) -> bool:
        letters = iter(candidate)
        return candidate[:1] == word[:1] and all(letter in letters for letter in word)

    def likeness(candidate: str) -> tuple[bool, bool, float]:
        ratio = difflib.SequenceMatcher(None, word, candidate).ratio()
        return ratio > 0.6, abbreviates(candidate), ratio

    match = max(known, key=likeness, default=None)
    return f", did you mean {match!r}?" if match else ""


def _hints(where: str, options_class: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(options_class)
    except Exception as error:  # a name that is not to be found may fail in any way
        raise InputError(
            f"{where}: its types cannot be read ({type(error).__name__}: {error}); define and import them where the "
            f"class is defined, outside functions"
        ) from None


def _check_field(where: str, field: dataclasses.Field, hint: Any, reserved: tuple[str, ...]) -> None:
    """Raise InputError if a field cannot be an option."""
    if field.name in reserved:
        raise InputError(
            f"{where}.{field.name}: configs use {', '.join(reserved)} for something else; give it another name"
        )
    if not field.init:
        raise InputError(f"{where}.{field.name}: init=False makes it no option; compute it where it is used")
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        raise InputError(f"{where}.{field.name} has no default; write {field.name}: {_named(hint)} = ...")
    if not _is_writable(hint):
        raise InputError(f"{where}.{field.name}: a config cannot write {_named(hint)}; take {WRITABLE}")


def _is_writable(hint: Any) -> bool:
    """Whether a config can write the values of a type."""
    if hint in (bool, int, float, str, types.NoneType):
        return True
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return all(part is None or type(part) in (bool, int, str) for part in parts)
    if _is_union(hint) or typing.get_origin(hint) in (tuple, list):
        return bool(parts) and all(part is ... or _is_writable(part) for part in parts)
    return False


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _named(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
