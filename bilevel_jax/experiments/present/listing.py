"""`bilevel-jax list`: every choice that a config can name, with its options and their values."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import bilevel_jax as bj
from bilevel_jax.experiments.choices import KINDS, Choice, Option, choices, optimizers, options_of, projections
from bilevel_jax.problems import names, spec


def listing(*tops: type) -> str:
    """The whole text; `tops` are the dataclasses of the keys at the top of a config."""
    return "\n".join(_lines(tops))


def _lines(tops: tuple[type, ...]) -> Iterator[str]:
    yield "keys at the top of a config of `run`"
    yield from _described("config", _first_line(tops[0]), tops[0])
    yield "\nproblems (section `problem`, list `problems` of a comparison)"
    for name in names():
        yield from _described(name, spec(name).summary, spec(name).options)
    yield "\nalgorithms (section `algorithm`, list `algorithms` of a comparison)"
    yield from _choices(choices((bj.algorithms.Algorithm,)))
    yield "\noptimizers (section `optimizer`)"
    yield from _choices(optimizers())
    yield "\nprojections (section `projection`; without it x is free)"
    yield from _choices(projections())
    for kind, base in KINDS.items():
        place = {
            "solver": ", e.g. `algorithm.solver`",
            "linear solver": ", e.g. `algorithm.adjoint`",
            "method": ", `algorithm.method` of implicit",
            "schedule": ", section `temperature`, or in place of a step size",
        }.get(kind, f", e.g. `algorithm.{kind}`" if kind != "preconditioner" else ", of linear solvers")
        yield f"\n{kind}s{place}"
        yield from _choices(choices((base,)))
    yield "\nkeys at the top of a comparison, beside the lists `problems` and `algorithms`"
    yield from _described("config", _first_line(tops[1]), tops[1])


def _first_line(kind: Any) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def _choices(found: Mapping[str, Choice]) -> Iterator[str]:
    for name, choice in found.items():
        yield f"  {name}: {choice.summary}"
        for option in choice.options:
            yield f"      {_option(option)}"


def _option(option: Option) -> str:
    default = "(has to be given)" if option.required else f"= {option.default}"
    parts = [] if option.hint is None else list(_values(option.hint))
    if option.fixed is not None:
        parts.append("{" + ", ".join(o.name for o in options_of(option.fixed)) + "}")
    if option.bases:
        kinds = [kind for kind, base in KINDS.items() if any(issubclass(own, base) for own in option.bases)]
        parts.append(f"{'an' if kinds[0][0] in 'aeiou' else 'a'} {kinds[0]}" if kinds else "an algorithm")
    valid = f"   ({' | '.join(parts)})" if parts else ""
    return f"{option.name} {default}{valid}"


def _values(hint: Any) -> Iterator[str]:
    """What a value of the type may be, in words."""
    if typing.get_origin(hint) is Literal:
        yield from map(str, typing.get_args(hint))
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from _values(part)
    else:
        words = {bool: "true | false", int: "integer", float: "number", str: "text", types.NoneType: "null"}
        yield words.get(hint, str(hint))


def _described(name: str, summary: str, kind: type) -> Iterator[str]:
    yield f"  {name}: {summary}"
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name == "name":
            continue
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
            default = vars(default) if dataclasses.is_dataclass(default) else default
        valid = list(_values(hints[field.name]))
        shown = f"   ({' | '.join(valid)})" if typing.get_origin(hints[field.name]) is Literal else ""
        yield f"      {field.name} = {default}{shown}"
