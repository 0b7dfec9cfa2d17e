"""Tells whether what the functions in an argument read is still the same."""

import functools
import operator
import threading
import weakref
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import equinox as eqx
import jax
import numpy as np

from bilevel_jax.core.captures.reader import SMALL, Reading, is_library_class

# Structures whose captures are kept. One that was dropped is read anew, which changes nothing.
KEPT = 256


class Token:
    """Stands for everything that was read. Two tokens are equal if that is."""

    __slots__ = ("_content", "_hash")

    def __init__(self, content: Iterable[Hashable]):
        self._content = tuple(content)
        self._hash = hash(self._content)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Token) and self._hash == other._hash and self._content == other._content


class Watch:
    """What the functions and classes in `roots` read, as of the last look, and the `token` that stands for it."""

    def __init__(self, roots: list[Any]):
        self._roots = roots
        self._seen = Reading(roots)
        self.token = Token(self._seen.content)

    @property
    def can_change(self) -> bool:
        return self._seen.can_change

    def refresh(self) -> Token:
        """The token of what is there now."""
        if not self._is_same():
            self._seen = Reading(self._roots)
            token = Token(self._seen.content)
            if token != self.token:  # that of equal content stays: the same object is compared faster
                self.token = token
        return self.token

    def absorb(self) -> None:
        """Let the token stand for what is there now."""
        if not self._is_same():
            self._seen = Reading(self._roots)

    def _is_same(self) -> bool:
        seen, same = self._seen, operator.is_
        if seen.again:
            return False
        try:
            return (
                all(map(same, map(operator.getitem, seen.items.holders, seen.items.keys), seen.items.values))
                and all(map(same, map(getattr, seen.attributes.holders, seen.attributes.keys), seen.attributes.values))
                and all(map(operator.eq, map(len, seen.sizes.holders), seen.sizes.values))
                and not any(key in holder for holder, key in seen.absent)
                and all(entries == before for entries, before in seen.sets)
                and all(_holds(array, numbers) for array, numbers in seen.arrays)
            )
        except (KeyError, IndexError, AttributeError, ValueError):  # deleted since
            return False


def _holds(array: np.ndarray, numbers: np.ndarray) -> bool:
    """Whether an array has these numbers, bit by bit."""
    if array.shape != numbers.shape or array.dtype != numbers.dtype:
        return False
    if array.nbytes <= SMALL or array.itemsize not in (1, 2, 4, 8):
        return array.tobytes() == numbers.tobytes()
    bits = f"u{array.itemsize}"
    return bool((array.view(bits) == numbers.view(bits)).all())


_alive: "weakref.WeakSet[Watch]" = weakref.WeakSet()
_of_object: dict[int, tuple[weakref.ref, Watch | None]] = {}
_thread = threading.local()


def tokens_of(arguments: Iterable[Any]) -> Hashable:
    """Return, as a key, what the functions in these arguments read; None where nothing of it can be edited.

    Inside a trace the key is that of the beginning of the trace: any change since then is made by the functions
    themselves.
    """
    fixed = is_tracing()
    tokens = []
    for argument in arguments:
        watch = _watch_of(argument)
        if watch is not None:
            tokens.append(watch.token if fixed else watch.refresh())
    return tuple(tokens) if len(tokens) > 1 else tokens[0] if tokens else None


def is_tracing() -> bool:
    """Whether the user's functions run at the moment."""
    return getattr(_thread, "depth", 0) > 0


@contextmanager
def tracing() -> Iterator[None]:
    """A context in which the user's functions run. If they change a counter, that is their own doing and no edit."""
    depth = getattr(_thread, "depth", 0)
    if depth == 0:
        for watch in list(_alive):
            watch.refresh()
    _thread.depth = depth + 1
    try:
        yield
    finally:
        _thread.depth = depth
        if depth == 0:
            for watch in list(_alive):
                watch.absorb()


@functools.cache
def _is_plain(kind: type) -> bool:
    """Whether there is nothing to be looked for. Of the type: an equinox module's isinstance takes long."""
    return issubclass(kind, jax.Array | np.ndarray | np.generic | bool | int | float | str | type(None))


def _watch_of(argument: Any) -> Watch | None:
    if _is_plain(type(argument)):
        return None
    known = _of_object.get(id(argument))
    if known is not None and known[0]() is argument:
        return known[1]
    structure = jax.tree.structure(argument)
    try:
        watch, is_fixed = _watch_of_structure(structure)
    except TypeError:  # no hash: jit refuses it, in its own words
        return None
    if is_fixed and isinstance(argument, eqx.Module):
        key = id(argument)
        _of_object[key] = weakref.ref(argument, lambda _: _of_object.pop(key, None)), watch
    return watch


@functools.lru_cache(maxsize=KEPT)
def _watch_of_structure(structure: Any) -> tuple[Watch | None, bool]:
    """The watch, and whether an object of this structure keeps it for good."""
    roots: list[Any] = []
    is_fixed, ahead = True, [structure]
    while ahead:
        part = ahead.pop()
        ahead += part.children()
        node = part.node_data()
        if node is None:
            continue
        kind, static = node
        empty = kind in (dict, type(None)) and not part.children()  # a Partial has a dict of keywords
        is_fixed &= empty or issubclass(kind, (tuple, eqx.Module, jax.tree_util.Partial))
        if kind.__module__ != "builtins":
            roots += [static] if is_library_class(kind) else [kind, static]
    watch = Watch(roots)
    if not watch.can_change:
        return None, is_fixed
    _alive.add(watch)
    return watch, is_fixed
