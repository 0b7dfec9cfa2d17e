"""The sections of a config: checks that fill in every default, and the objects that sections describe."""

import dataclasses
import functools
import json
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
import pydantic
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass

import bilevel_jax as bj
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.options import nearest
from bilevel_jax.core.schedules import Schedule
from bilevel_jax.experiments.choices import (
    Choice,
    Option,
    algorithm,
    choices,
    optimizers,
    options_of,
    projections,
)
from bilevel_jax.experiments.source import Source, plain
from bilevel_jax.problems import registry

STRICT_KEYS = ConfigDict(extra="forbid", allow_inf_nan=False)
# An optimizer's numbers that every run of a program may have its own of: they are leaves of its state.
LEAVES = ("learning_rate", "clip_norm")
POSITIVE = ("learning_rate", "clip_norm")


# Checking.


def validated(
    kind: type, data: dict[str, Any], prefix: str, source: Source, beside: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The data with every default of a dataclass filled in, the types as its hints say.

    Args:
      kind: a dataclass, whose fields are the keys.
      data: the section.
      prefix: its dotted key, for messages.
      source: where keys stand.
      beside: keys of the same section that are read by someone else.

    Raises:
      InputError: an unknown key, a wrong type, a number out of range; it names the key and where it stands.
    """
    known = [*beside, *(field.name for field in dataclasses.fields(kind))]
    for key in data:
        if key not in known:
            where = f"{prefix}.{key}" if prefix else str(key)
            if not isinstance(key, str):
                raise source.error(where, f"keys should be strings, got {key!r}")
            raise source.error(where, f"unknown key{nearest(key, known)}; valid: {', '.join(known)}")
    hints = typing.get_type_hints(kind, include_extras=True)
    within = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    given = {key: value for key, value in data.items() if key not in within}
    adapter = pydantic.TypeAdapter(pydantic_dataclass(_without(kind, hints, within), config=STRICT_KEYS, frozen=True))
    try:
        values = adapter.dump_python(adapter.validate_python(given), mode="json")
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        location = [str(part) for part in first["loc"] if part in data or isinstance(part, int)]
        location = location or [str(part) for part in first["loc"]]
        raise source.error(
            ".".join([*filter(None, [prefix]), *location]), f"{first['msg']}, got {first['input']!r}"
        ) from None
    _refuse_other_types(given, values, prefix, source)
    for name, hint in within.items():
        place, section = f"{prefix}.{name}" if prefix else name, data.get(name, {})
        if not isinstance(section, dict):
            raise source.error(place, f"expected keys with values, got {section!r}")
        values[name] = validated(typing.cast(type, hint), section, place, source)
    return {field.name: values[field.name] for field in dataclasses.fields(kind)}


def _without(kind: Any, hints: dict[str, Any], left_out: Iterable[str]) -> Any:
    """The dataclass without some of its fields."""
    own = [field for field in dataclasses.fields(kind) if field.name not in left_out]
    fields = [
        (f.name, hints[f.name], dataclasses.field(default=f.default, default_factory=f.default_factory)) for f in own
    ]
    return dataclasses.make_dataclass(kind.__name__, fields, frozen=True)


def _refuse_other_types(data: Any, values: Any, key: str, source: Source) -> None:
    """Raise for a value of another type.

    Python takes true for 1, and a text of digits can be read as a number; both are mistakes in a config.
    """
    is_scalar = isinstance(values, bool | int | float)
    if isinstance(data, bool) and not isinstance(values, bool):
        raise source.error(key, f"expected a number (an integer where it counts), got {str(data).lower()}")
    if isinstance(data, str) and is_scalar and isinstance(plain(data), str):
        raise source.error(
            key, f"expected a number, got the text {data!r}; numbers stand without quotes and leading zeros"
        )
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list | tuple) else ()
    for name, child in children:
        _refuse_other_types(child, typing.cast(Any, values)[name], f"{key}.{name}" if key else str(name), source)


def checked_problem(section: Any, place: str, source: Source, beside: tuple[str, ...] = ()) -> dict[str, Any]:
    """A problem's section with every default filled in.

    `beside`: keys that are valid too, and are read by someone else. Paths become absolute: they are relative to the
    config.

    Raises:
      InputError: an unknown name or key, a wrong type.
    """
    section = {"name": section} if isinstance(section, str) else section
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        raise source.error(place, f"give the section a name, one of {', '.join(registry.names())}")
    name = section["name"]
    _require_known(name, registry.names(), "problem", place, source)
    kind = registry.spec(name).options
    values = validated(kind, {k: v for k, v in section.items() if k not in ("name", *beside)}, place, source, beside)
    for field in dataclasses.fields(kind):
        if field.metadata.get("path") and values[field.name]:  # absolute, so that the results' own config finds it
            values[field.name] = str((Path(source.path).parent / values[field.name]).resolve())
    return {"name": name, **values}


def checked_choice(
    section: Any,
    place: str,
    known: Mapping[str, Choice],
    what: str,
    source: Source,
    default: str | None = None,
    beside: tuple[str, ...] = (),
) -> dict[str, Any]:
    """A section that names one of the choices, with every default filled in, sections within it too.

    Args:
      section: a mapping with a name, or the name alone.
      place: its dotted key.
      known: the choices.
      what: they are called, for messages.
      source: where keys stand.
      default: the name where none is given.
      beside: see `validated`.

    Raises:
      InputError: see `validated`; no such choice.
    """
    section = {"name": section} if isinstance(section, str) else section
    if not isinstance(section, dict):
        raise source.error(
            place, f"expected a name or a dictionary with one, one of {', '.join(known)}, got {section!r}"
        )
    name = section.get("name", default)
    if not isinstance(name, str):
        raise source.error(place, f"give the section a name, one of {', '.join(known)}")
    _require_known(name, known, what, place, source)
    rivals = (known[name].build, *known[name].rivals)
    if len(rivals) > 1:
        places = ", ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in rivals)
        raise source.error(f"{place}.name", f"{name!r} is several classes: {places}; give yours another name")
    given = {key: value for key, value in section.items() if key not in ("name", *beside)}
    return {"name": name, **checked_options(known[name].options, given, place, source, ("name", *beside))}


def checked_options(
    options: Iterable[Option], given: dict[str, Any], place: str, source: Source, beside: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The options by name, those that are not given at their defaults. Raises InputError, see `validated`."""
    options = tuple(options)
    sections = {o.name: o for o in options if not o.scalar or isinstance(given.get(o.name), dict)}
    scalars = [o for o in options if o.name not in sections]
    fields = [(o.name, o.hint, dataclasses.field(default=o.default)) for o in scalars if not o.required]
    for option in options:
        if option.required and given.get(option.name) is None:
            raise source.error(f"{place}.{option.name}", "has no default; give one")
    needed = [(o.name, o.hint) for o in scalars if o.required]
    kind = dataclasses.make_dataclass("Options", [*needed, *fields], frozen=True)
    rest = {key: value for key, value in given.items() if key not in sections}
    values = validated(kind, rest, place, source, (*beside, *sections))
    for option in scalars:
        _require_range(option, values[option.name], place, source)
    for name, option in sections.items():
        values[name] = _checked_within(option, given.get(name, option.default), f"{place}.{name}", source)
    return {option.name: values[option.name] for option in options}


def _checked_within(option: Option, value: Any, place: str, source: Source) -> Any:
    if value is None:
        return None
    if option.fixed is not None:
        if not isinstance(value, dict):
            names = ", ".join(o.name for o in options_of(option.fixed))
            raise source.error(place, f"expected a dictionary of {names}, got {value!r}")
        return checked_options(options_of(option.fixed), value, place, source)
    known = choices(option.bases)
    made = checked_choice(value, place, known, "choice", source)
    if option.bases != (bj.algorithms.Algorithm,):  # those need a problem
        require_buildable(made, place, known, source)
    return made


def require_buildable(section: dict[str, Any], place: str, known: Mapping[str, Choice], source: Source) -> None:
    """Raise InputError, with the key and where it stands, for an option that a constructor refuses."""
    try:
        build_choice(section, known)
    except InputError as error:
        raise refused(error, section, place, source) from None


def refused(error: InputError, section: Iterable[str], place: str, source: Source) -> InputError:
    """Return the error of a constructor, with the key of the section that it is about and the line of that key."""
    key = max((k for k in section if re.match(rf"{re.escape(k)}\b", str(error))), key=len, default=None)
    message = str(error)
    if key is not None and message.startswith(f"{key}: "):
        message = message[len(key) + 2 :]
    return source.error(f"{place}.{key}" if key else place, message)


def _require_range(option: Option, value: Any, place: str, source: Source) -> None:
    if option.name in POSITIVE and value is not None and not value > 0:
        raise source.error(f"{place}.{option.name}", f"Input should be greater than 0, got {value!r}")


def _require_known(name: str, known: Iterable[str], what: str, place: str, source: Source) -> None:
    if name not in known:
        raise source.error(f"{place}.name", f"no {what} {name!r}{nearest(name, known)}; valid: {', '.join(known)}")


# Building.


def build_problem(section: dict[str, Any]) -> Any:
    """The problem of a section, at the precision that is set. Raises InputError for values without a meaning."""
    return _problem(json.dumps(section, sort_keys=True), bool(jax.config.values["jax_enable_x64"]))


@functools.lru_cache(maxsize=32)
def _problem(section: str, x64: bool) -> Any:
    del x64
    options = json.loads(section)
    return registry.make(options.pop("name"), **options)


class Context(typing.NamedTuple):
    """What algorithms in a section are built on: problem, upper level, and the run's budget in transitions."""

    problem: Any
    upper: Any
    transitions: int | None


def build_algorithm(section: dict[str, Any], context: Context) -> Any:
    """The algorithm of a section.

    Raises:
      RequirementError: the problem lacks what it requires.
      InputError: an option that it refuses.
    """
    values = dict(section)
    name = values.pop("name")
    options = {o.name: _built(o, values[o.name], context) for o in algorithm(name).options}
    return bj.algorithms.make_algorithm(
        name, context.problem, context.upper, transitions=context.transitions, **options
    )


def build_choice(section: dict[str, Any], known: Mapping[str, Choice], context: Context | None = None) -> Any:
    """Build the object that a section describes. Raises InputError for an option that it refuses."""
    choice = known[section["name"]]
    return choice.build(**_arguments(choice.options, section, context))


def _arguments(options: Iterable[Option], section: dict[str, Any], context: Context | None) -> dict[str, Any]:
    return {
        "key" if o.of_key else o.name: jax.random.key(section[o.name])
        if o.of_key
        else _built(o, section[o.name], context)
        for o in options
    }


def _built(option: Option, value: Any, context: Context | None) -> Any:
    if not isinstance(value, dict):
        return value
    if option.fixed is not None:
        return option.fixed(**_arguments(options_of(option.fixed), value, context))
    if option.bases == (bj.algorithms.Algorithm,):
        assert context is not None
        return build_algorithm(value, context)
    return build_choice(value, choices(option.bases), context)


def build_upper(section: dict[str, Any]) -> bj.algorithms.UpperLevel:
    """The upper level of {optimizer, projection, temperature}; equal structures are the same optimizer."""
    projection = section["projection"]
    if projection is not None:
        rule = projections()[projection["name"]].build
        projection = jax.tree_util.Partial(rule, **{k: v for k, v in projection.items() if k != "name"})
    temperature = section["temperature"]
    if temperature is not None:
        temperature = build_choice(temperature, choices((Schedule,)))
    optimizer = section["optimizer"]
    numbers = {key: float(optimizer[key]) for key in LEAVES if type(optimizer.get(key)) in (int, float)}
    return bj.algorithms.UpperLevel(
        _optimizer(structure_of(optimizer)), projection=projection, temperature=temperature, hyperparameters=numbers
    )


def structure_of(optimizer: dict[str, Any]) -> str:
    """Return the part of an optimizer's section that all runs of a program must share."""
    return json.dumps({k: 1.0 if k in LEAVES and type(v) in (int, float) else v for k, v in optimizer.items()})


@functools.lru_cache(maxsize=256)  # the same object for the same structure, or it would be compiled again
def _optimizer(structure: str) -> optax.GradientTransformation:
    options = json.loads(structure)
    name = options.pop("name")
    choice = optimizers()[name]
    if "clip_norm" not in options:
        return choice.build(**options)
    clip_norm, rate = options.pop("clip_norm"), options.pop("learning_rate")
    if isinstance(rate, dict):
        rate = build_choice(rate, choices((Schedule,)))

    def make(learning_rate: Any, clip_norm: Any = None) -> optax.GradientTransformation:
        made = choice.build(learning_rate, **options)
        return made if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), made)

    return optax.inject_hyperparams(make)(rate, clip_norm)
