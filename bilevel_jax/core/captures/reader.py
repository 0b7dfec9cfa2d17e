"""Reads, in one pass, the values of everything that functions read, all the way down."""

import contextvars
import functools
import hashlib
import importlib.util
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

from bilevel_jax.core.captures.names import names_of

# Bytes of an array up to which its numbers are kept as they are and not digested.
SMALL = 4096
# Bytes up to which the numbers of a JAX array are looked at, which may have to come from a device. A larger one is told
# by its identity.
LARGE = 1 << 20
PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, type(Ellipsis))
CONSTANTS = (int, float, complex, str, bytes)
# A container of which a function only calls these is one that it writes, not reads.
CONTAINERS = (list, dict, set, deque)
WRITERS = {"append", "appendleft", "extend", "insert", "add", "update", "clear", "discard"}
# What their objects hold is theirs, but for functions that they wrap.
OPAQUE = {"builtins", "jax", "jaxlib", "numpy"}
LIBRARIES = tuple(
    {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {os.path.dirname(str(sys.modules[__name__.partition(".")[0]].__file__)), "<frozen"}
)


class Same:
    """An object that is compared by identity. It is not kept alive where Python can do without."""

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
    """Look-ups holder[key] or holder.key, with the values that were there."""

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
    """What `roots` read: `content` holds all of it; the other fields say where it was found.

    `items` and `attributes` hold look-ups holder[key] and holder.key; `sizes` pairs of a container and its length;
    `absent` pairs of a container and a key that it does not have; `arrays` and `sets` copies, since these are edited in
    place. `again` is True if something cannot be compared with its former value, so that all of it is read at each
    call.
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
        if self.again:  # it will be read anew: what was found need not be kept, nor kept alive
            self.items, self.attributes, self.sizes = Lookups(), Lookups(), Lookups()
            self.absent, self.arrays, self.sets = [], [], []

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
        if type(thing) in weakref.ProxyTypes:
            self._proxy(thing)
            return
        if id(thing) in self._met:
            self._say("met", self._met[id(thing)][0])
            return
        self._met[id(thing)] = len(self._met), thing
        for kinds, visit in VISITS:
            if isinstance(thing, kinds):
                visit(self, thing)
                return
        if _bytes_of(thing) is None:
            self._object(thing)
        else:
            self._buffer(thing)

    def _opaque(self, thing: Any) -> None:
        self._say(Same(thing))

    def _code(self, code: types.CodeType) -> None:
        self._say(code)

    def _array(self, numbers: Any) -> None:
        self._say(type(numbers), numbers.dtype.str, numbers.shape)
        if numbers.dtype.hasobject:
            self.again = True
            self._push([*self._own(numbers), *numbers.reshape(-1).tolist()])
            return
        self._say(_digest(numbers.tobytes()))
        if isinstance(numbers, np.ndarray):
            self.arrays.append((numbers, numbers.copy()))
        self._push(self._own(numbers))

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
                key = name = _absolute(name, function) if kind == "import" else name
                if name not in holder:
                    self.absent.append((holder, name))
                    continue
                value = holder[name]
            if type(value) is int and (kind, name) in names.assigned:  # a counter of its own
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
        inside: list[Any] = [] if is_library_class(type(cls)) else [type(cls)]
        for ancestor in cls.__mro__:
            if is_library_class(ancestor):
                self._say(Same(ancestor))
                continue
            self.attributes.add(ancestor, "__bases__", ancestor.__bases__)
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
        self._push((*self._own(partial), partial.func, partial.args, partial.keywords))

    def _member(self, member: Any) -> None:
        self._push((member.fget if isinstance(member, property) else member.__func__,))

    def _tuple(self, entries: tuple) -> None:
        self._say(Same(type(entries)))
        self._push([*self._own(entries), *entries])

    def _list(self, entries: list | deque) -> None:
        self._say(type(entries).__name__)
        self.sizes.add(entries, None, len(entries))
        for index, entry in enumerate(entries):
            self.items.add(entries, index, entry)
        self._push([*self._own(entries), *entries])

    def _dict(self, entries: Any) -> None:
        self._say(type(entries).__name__)
        self.sizes.add(entries, None, len(entries))
        for key, value in entries.items():
            self.items.add(entries, key, value)
        factory = "default_factory"
        made = [self.attributes.add(entries, factory, entries.default_factory)] if hasattr(entries, factory) else []
        self._push([*made, *self._own(entries), *(part for pair in entries.items() for part in pair)])

    def _set(self, entries: set | frozenset) -> None:
        self._say(frozenset(entries))
        if isinstance(entries, set):
            self.sets.append((entries, frozenset(entries)))
        self._push([*self._own(entries), *(entry for entry in entries if type(entry) not in PLAIN)])

    def _buffer(self, buffer: Any) -> None:
        """Numbers that are edited in place, without a copy to compare with: looked at in each call."""
        self.again = True
        numbers = _bytes_of(buffer)  # None of a memoryview that was released
        self._say(type(buffer).__name__, Same(buffer) if numbers is None else _digest(numbers))
        self._push(self._own(buffer))

    def _view(self, view: Any) -> None:
        self.again = True
        self._push(view)

    def _reference(self, reference: weakref.ref) -> None:
        """What a weak reference leads to. That it may be gone at the next call, no attribute says."""
        self.again = True
        self._push([*self._own(reference), reference()])

    def _context(self, variable: contextvars.ContextVar) -> None:
        self.again = True
        self._say(Same(variable))
        self._push([variable.get(None)])

    def _exception(self, error: BaseException) -> None:
        self._push([self.attributes.add(error, "args", error.args)])
        self._object(error)

    def _proxy(self, proxy: Any) -> None:
        self.again = True
        try:
            self._push([proxy.__init__.__self__])
        except ReferenceError:
            self._say("gone")

    def _constant(self, thing: Any) -> None:
        """Of a subclass of a plain type, which may have attributes besides."""
        base: Any = next(kind for kind in CONSTANTS if isinstance(thing, kind))
        self._say(base, base.__repr__(thing))
        self._object(thing)

    def _own(self, thing: Any) -> list[Any]:
        """The class and the attributes of an object that has contents besides, where the class is the user's."""
        return [] if is_library_class(type(thing)) else self._attributes(thing)

    def _attributes(self, thing: Any) -> list[Any]:
        """The class, the slots and the dictionary of an object."""
        cls, holder = type(thing), getattr(thing, "__dict__", None)
        if not is_library_class(cls):
            self.attributes.add(thing, "__class__", cls)
        return [cls, *self._slots(thing), *([holder] if isinstance(holder, dict) else [])]

    def _slots(self, thing: Any) -> list[Any]:
        names = [name for base in type(thing).__mro__ for name in _slots(base) if hasattr(thing, name)]
        return [self.attributes.add(thing, name, getattr(thing, name)) for name in names]

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
        if not self._slots(thing) and (holder is None or not (holder or not is_library_class(cls))):
            self._say(Same(thing))
            return
        self._push(self._attributes(thing))


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
    (memoryview, Reading._buffer),
    (weakref.ref, Reading._reference),
    (contextvars.ContextVar, Reading._context),
    (BaseException, Reading._exception),
    (CONSTANTS, Reading._constant),
    ((KeysView, ValuesView, ItemsView), Reading._view),
)


def _bytes_of(thing: Any) -> bytes | None:
    """What is in memory that an object shares, as arrays of numbers, files and structures of C do; None if none."""
    try:
        return memoryview(thing).tobytes()
    except (TypeError, ValueError, BufferError):
        return None


def _digest(numbers: bytes) -> bytes:
    return numbers if len(numbers) <= SMALL else hashlib.blake2b(numbers, digest_size=16).digest()


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    private = f"_{cls.__name__.lstrip('_')}"  # Python's own name for those that begin with two underscores
    return tuple(
        private + name if name.startswith("__") and not name.endswith("__") else name
        for name in names
        if name not in ("__dict__", "__weakref__")
    )


def _absolute(module: str, function: types.FunctionType) -> str:
    """The name of a module that a function imports, whose own package relative imports start from."""
    try:
        return importlib.util.resolve_name(module, function.__globals__.get("__package__"))
    except ImportError:  # above the package, or in none: the import fails, too
        return module


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
