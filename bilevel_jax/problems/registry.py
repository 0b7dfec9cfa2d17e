"""The registry: a name, a dataclass of options, and the function that builds the problem from them."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from typing import Any

from bilevel_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ProblemSpec:
    """A registered problem.

    `build(options)` returns a pytree with the methods of `bilevel_jax.Problem` and `start(key)`, which
    draws an upper variable to start from. Options that are floats may be traced: they become leaves.
    """

    name: str
    options: type
    build: Callable[[Any], Any]

    @property
    def summary(self) -> str:
        """First line of the options' docstring."""
        return (self.options.__doc__ or "").strip().splitlines()[0]


_SPECS: dict[str, ProblemSpec] = {}


def register(name: str, options: type, build: Callable[[Any], Any]) -> None:
    """Add a problem to the registry.

    Args:
      name: what `make` takes.
      options: a dataclass, each field with a default.
      build: options -> problem, see `ProblemSpec`.

    Raises:
      InputError: the name is taken.
    """
    if name in _SPECS:
        raise InputError(f"name: a problem {name!r} is registered already")
    _SPECS[name] = ProblemSpec(name, options, build)


def names() -> tuple[str, ...]:
    """The registered names, sorted."""
    return tuple(sorted(_SPECS))


def spec(name: str) -> ProblemSpec:
    """What is registered under a name. Raises InputError that names the nearest one."""
    if name not in _SPECS:
        raise InputError(f"name: no problem {name!r}{nearest(name, _SPECS)}; there are {', '.join(names())}")
    return _SPECS[name]


def make(name: str, **options: Any) -> Any:
    """Build a problem by name.

    Raises:
      InputError: unknown name or option (the nearest valid one is named), or a value out of range.
    """
    found = spec(name)
    known = [field.name for field in dataclasses.fields(found.options)]
    for option in options:
        if option not in known:
            raise InputError(
                f"{option}: problem {name!r} has no such option{nearest(option, known)}; it has {', '.join(known)}"
            )
    return found.build(found.options(**options))


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
