"""One pass over everything that functions read, all the way down."""

import array
import functools
import hashlib
import os
import sys
import sysconfig
import types
import weakref
from collections import deque
from collections.abc import Hashable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from bilevel_jax.captures.names import names_of

# Bytes of an array up to which its numbers are kept as they are and not digested.
SMALL = 4096
# Bytes up to which the numbers of a JAX array are looked at, which may have to come from a device. A larger one is told
# by its identity.
LARGE = 1 << 20
PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, type(Ellipsis))
# A container of which a function only calls these is one that it writes, not reads.
CONTAINERS = (list, dict, set, deque)
WRITERS = {"append", "appendleft", "extend", "insert", "add", "update", "clear", "discard"}
# What their objects hold is theirs, but for functions that they wrap.
OPAQUE = {"builtins", "jax", "jaxlib", "numpy"}
LIBRARIES = tuple(
    {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {os.path.dirname(os.path.dirname(__file__)), "<frozen"}
)


class Same:
    """An object that is told by its identity; not kept alive where Python can do without."""

    __slots__ = ("_hash", "_thing")

    def __init__(self, thing: Any):
        self._hash = id(thing)
        try:
            self._thing = weakref.ref(thing)
        except TypeError:
            self._thing = lambda: thing

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        thing = self._thing()
        return isinstance(other, Same) and thing is not None and thing is other._thing()


class Lookups:
    """holder[key] or holder.key, and what was there."""

    def __init__(self):
        self.holders: list[Any] = []
        self.keys: list[Any] = []
        self.values: list[Any] = []

    def add(self, holder: Any, key: Any, value: Any) -> Any:
        self.holders.append(holder)
        self.keys.append(key)
        self.values.append(value)
        return value


class Reading:
    """What `roots` read: `content` says all of it, the other fields where it was found.

    `items`, `attributes`: holder[key] and holder.key. `sizes`: (container, length). `absent`: (container, key) that
    is not there. `arrays`, `sets`: with copies, since they are edited in place. `again`: something has no value yet.
    """

    def __init__(self, roots: Iterable[Any]):
        self.content: list[Hashable] = []
        self.items, self.attributes, self.sizes = Lookups(), Lookups(), Lookups()
        self.absent: list[tuple[Any, Any]] = []
        self.arrays: list[tuple[np.ndarray, np.ndarray]] = []
        self.sets: list[tuple[set, frozenset]] = []
        self.again = False
        self._met: dict[int, tuple[int, Any]] = {}
        self._ahead: list[Any] = []
        self._push(roots)
        while self._ahead:
            self._visit(self._ahead.pop())
        del self._met, self._ahead

    @property
    def can_change(self) -> bool:
        """Whether anything of it could be edited."""
        where = (self.items.keys, self.attributes.keys, self.sizes.keys, self.absent, self.arrays, self.sets)
        return self.again or any(where)

    def _say(self, *content: Hashable) -> None:
        self.content.extend(content)

    def _push(self, things: Iterable[Any]) -> None:
        things = list(things)
        self._say(len(things))
        self._ahead.extend(reversed(things))

    def _visit(self, thing: Any) -> None:
        if type(thing) in PLAIN:
            # -0.0 and 0.0 are equal, and NaN is not: their names tell
            self._say(type(thing), repr(thing) if isinstance(thing, float | complex | slice) else thing)
            return
        if id(thing) in self._met:
            self._say("met", self._met[id(thing)][0])
            return
        self._met[id(thing)] = len(self._met), thing
        for kinds, visit in VISITS:
            if isinstance(thing, kinds):
                visit(self, thing)
                return
        self._object(thing)

    def _opaque(self, thing: Any) -> None:
        self._say(Same(thing))

    def _code(self, code: types.CodeType) -> None:
        self._say(code)

    def _array(self, numbers: Any) -> None:
        self._say(type(numbers), numbers.dtype.str, numbers.shape)
        if numbers.dtype.hasobject:
            self.again = True
            self._push(numbers.reshape(-1).tolist())
            return
        self._say(_digest(numbers.tobytes()))
        if isinstance(numbers, np.ndarray):
            self.arrays.append((numbers, numbers.copy()))

    def _jax_array(self, numbers: Any) -> None:
        if (
            jax.numpy.issubdtype(numbers.dtype, jax.dtypes.extended)
            or numbers.is_deleted()
            or numbers.nbytes > LARGE
            or not numbers.is_fully_addressable
        ):
            self._say(Same(numbers))
            return
        read = np.asarray(numbers)
        self._say("jax", read.dtype.name, numbers.weak_type, read.shape, _digest(read.tobytes()))

    def _function(self, function: types.FunctionType) -> None:
        code = function.__code__
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        inside: list[Any] = [function.__defaults__, function.__kwdefaults__, getattr(function, "__wrapped__", None)]
        self._say(code)
        if is_library(code.co_filename):
            # What it names is not bound anew; what that holds may be edited.
            inside += [cell.cell_contents for cell in cells.values() if _is_filled(cell)]
        else:
            for name in ("__code__", "__defaults__", "__kwdefaults__"):
                self.attributes.add(function, name, getattr(function, name))
            inside += self._named(function, cells)
        self._push(inside)

    def _named(self, function: types.FunctionType, cells: dict[str, Any]) -> Iterator[Any]:
        """What the function's names hold, followed along the attributes that it reads."""
        names = names_of(function.__code__)
        for kind, name, attributes in names.read:
            lookups, key = self.items, name
            if kind == "cell":
                if name not in cells:  # of a function within
                    continue
                lookups, holder, key = self.attributes, cells[name], "cell_contents"
                if not _is_filled(holder):
                    self.again = True
                    continue
                value = holder.cell_contents
            else:
                holder = function.__globals__ if kind == "global" else sys.modules
                if name not in holder:
                    self.absent.append((holder, name))
                    continue
                value = holder[name]
            if type(value) is int and name in names.assigned:  # a counter of its own
                continue
            if isinstance(value, CONTAINERS) and attributes and attributes[0] in WRITERS:
                continue
            lookups.add(holder, key, value)
            yield self._along(value, attributes)

    def _along(self, value: Any, attributes: tuple[str, ...]) -> Any:
        """The value that is read: at the end of the attributes, or the last one on the way that is known."""
        for name in attributes:
            if isinstance(value, types.ModuleType):
                holder = vars(value)
                if _is_library_module(value):
                    break
            else:
                holder = getattr(value, "__dict__", None)
                if type(holder) is not dict or hasattr(type(value), name):
                    break
            if name not in holder:
                self.absent.append((holder, name))
                break
            value = self.items.add(holder, name, holder[name])
        return value

    def _class(self, cls: type) -> None:
        """Its methods, and the numbers that stand in it: of all its ancestors that are the user's."""
        if is_library_class(cls):
            self._say(Same(cls))
            return
        self._say(cls.__qualname__)
        inside: list[Any] = []
        for ancestor in cls.__mro__:
            if is_library_class(ancestor):
                self._say(Same(ancestor))
                continue
            members = vars(ancestor)
            self.sizes.add(members, None, len(members))
            for name, member in list(members.items()):
                if isinstance(member, METHODS) or not name.startswith(("__", "_abc_")):
                    inside += [name, self.items.add(members, name, member)]
        self._push(inside)

    def _method(self, method: Any) -> None:
        owner = getattr(method, "__self__", None)
        if isinstance(method, types.MethodType):
            self._push((method.__func__, owner))
        elif owner is None or isinstance(owner, types.ModuleType):
            self._say(Same(method))
        else:
            self._say(method.__name__)
            self._push((owner,))

    def _partial(self, partial: functools.partial) -> None:
        self._push((partial.func, partial.args, partial.keywords))

    def _member(self, member: Any) -> None:
        self._push((member.fget if isinstance(member, property) else member.__func__,))

    def _tuple(self, entries: tuple) -> None:
        self._say(Same(type(entries)))
        self._push([*_own_class(entries), *entries])

    def _list(self, entries: list | deque) -> None:
        self._say(type(entries).__name__)
        self.sizes.add(entries, None, len(entries))
        for index, entry in enumerate(entries):
            self.items.add(entries, index, entry)
        self._push([*_own_class(entries), *entries])

    def _dict(self, entries: Any) -> None:
        self._say(type(entries).__name__)
        self.sizes.add(entries, None, len(entries))
        for key, value in entries.items():
            self.items.add(entries, key, value)
        self._push([*_own_class(entries), *(part for pair in entries.items() for part in pair)])

    def _set(self, entries: set | frozenset) -> None:
        self._say(frozenset(entries))
        if isinstance(entries, set):
            self.sets.append((entries, frozenset(entries)))
        self._push([*_own_class(entries), *(entry for entry in entries if type(entry) not in PLAIN)])

    def _buffer(self, buffer: Any) -> None:
        """Numbers that are edited in place, without a copy to compare with: looked at in each call."""
        self.again = True
        self._say(type(buffer).__name__, _digest(buffer.tobytes() if hasattr(buffer, "tobytes") else bytes(buffer)))

    def _view(self, view: Any) -> None:
        self.again = True
        self._push(view)

    def _object(self, thing: Any) -> None:
        """Its attributes; for other libraries' objects that can be read as arrays, their numbers."""
        cls = type(thing)
        holder = getattr(thing, "__dict__", None)
        if cls.__module__.partition(".")[0] in OPAQUE:
            wrapped = [getattr(thing, "__wrapped__", None)]
            wrapped += [part for part in (holder or {}).values() if callable(part)]
            self._say(Same(thing) if wrapped == [None] else Same(cls))
            self._push(wrapped)
            return
        slots = [name for base in cls.__mro__ for name in _slots(base) if hasattr(thing, name)]
        own = not is_library_class(cls)
        if not slots and (holder is None or not (holder or own)):
            self._say(Same(thing))
            return
        if own:
            self.attributes.add(thing, "__class__", cls)
        self._push([cls, *(self.attributes.add(thing, name, getattr(thing, name)) for name in slots)])
        if isinstance(holder, dict):
            self._push((holder,))


METHODS = (types.FunctionType, property, staticmethod, classmethod)
VISITS: tuple = (
    ((np.ndarray, np.generic), Reading._array),
    (Tracer, Reading._opaque),
    (jax.Array, Reading._jax_array),
    (types.FunctionType, Reading._function),
    (type, Reading._class),
    (types.ModuleType, Reading._opaque),
    (types.CodeType, Reading._code),
    ((types.MethodType, types.BuiltinMethodType), Reading._method),
    (functools.partial, Reading._partial),
    ((property, staticmethod, classmethod), Reading._member),
    (tuple, Reading._tuple),
    ((list, deque), Reading._list),
    ((dict, types.MappingProxyType), Reading._dict),
    ((set, frozenset), Reading._set),
    ((array.array, bytearray, memoryview), Reading._buffer),
    ((KeysView, ValuesView, ItemsView), Reading._view),
)


def _own_class(entries: Any) -> list[type]:
    """The class of a container, where it is the user's: its methods read more than the entries."""
    cls = type(entries)
    return [] if is_library_class(cls) else [cls]


def _digest(numbers: bytes) -> bytes:
    return numbers if len(numbers) <= SMALL else hashlib.blake2b(numbers, digest_size=16).digest()


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _is_filled(cell: types.CellType) -> bool:
    return cell != types.CellType()


@functools.lru_cache(maxsize=4096)
def is_library(path: str) -> bool:
    """Whether a source file is an installed library's or Python's own, whose names nobody edits."""
    return path.startswith(LIBRARIES) or "site-packages" in path or "dist-packages" in path


def _is_library_module(module: types.ModuleType) -> bool:
    path = getattr(module, "__file__", None)
    return module.__name__ in sys.builtin_module_names if path is None else is_library(path)


def is_library_class(cls: type) -> bool:
    """The same of a class."""
    module = sys.modules.get(cls.__module__)
    return module is not None and cls.__module__ != "__main__" and _is_library_module(module)
