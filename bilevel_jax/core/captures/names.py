"""The names that a function reads, from its byte code."""

import dis
import functools
import re
from types import CodeType
from typing import Any, NamedTuple

LOADS = {
    "LOAD_GLOBAL": "global",
    "LOAD_NAME": "global",
    "LOAD_FROM_DICT_OR_GLOBALS": "global",
    "LOAD_DEREF": "cell",
    "LOAD_CLASSDEREF": "cell",
    "LOAD_FROM_DICT_OR_DEREF": "cell",
}
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
IMPORTS = ("IMPORT_NAME", "IMPORT_FROM")
# `import a.b as c` has these between its parts and the name that it stores, and large functions anywhere.
BETWEEN = ("SWAP", "POP_TOP", "ROT_TWO", "EXTENDED_ARG")


class Path(NamedTuple):
    """A name and the attributes that are read off it, as in `config.rates.low`.

    `kind`: "global" of the function's module, "cell" of a closure, or "import" of a module, by the function itself. A
    relative import has a dot per level before its name.
    """

    kind: str
    name: str
    attributes: tuple[str, ...]


class Names(NamedTuple):
    """What a function reads, and the globals and cells that it assigns, as (kind, name)."""

    read: tuple[Path, ...]
    assigned: frozenset[tuple[str, str]]


@functools.lru_cache(maxsize=4096)
def names_of(code: CodeType) -> Names:
    """Return the names that `code` and the functions defined in it read; local cells are among them."""
    operations = _operations(code)
    imported, read = _imports(operations)
    assigned = {
        *(("global", name) for operation, name in operations if operation == "STORE_GLOBAL"),
        *(("cell", name) for operation, name in operations if operation == "STORE_DEREF" and name in code.co_freevars),
    }
    for i, (operation, name) in enumerate(operations):
        if operation in LOADS or (operation.startswith("LOAD_FAST") and name in imported):
            read[Path(LOADS.get(operation, "cell"), name, _attributes(operations, i + 1))] = None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = names_of(constant)
            read |= dict.fromkeys(inner.read)
            assigned |= inner.assigned
    paths = dict(read)
    for path in read:
        if path.kind == "cell":  # or a local variable: it may hold what was imported, or something else
            for found in imported.get(path.name, ()):
                paths[found._replace(attributes=found.attributes + path.attributes)] = None
    return Names(tuple(paths), frozenset(assigned))


def _imports(operations: list[tuple[str, Any]]) -> tuple[dict[str, dict[Path, None]], dict[Path, None]]:
    """Return what may be imported under each local name, and what is imported under a name that is not local."""
    imported: dict[str, dict[Path, None]] = {}
    others: dict[Path, None] = {}
    module, whole, root, parts, found = "", False, "", [], Path("import", "", ())
    for i, (operation, name) in enumerate(operations):
        if operation == "IMPORT_NAME":
            (_, level), (_, names) = operations[i - 2 : i]
            module, whole = "." * level + name, names is None  # or `from module import names`
            root, *parts = module.split(".") if whole else [module]
            found = Path("import", root, ())
        elif operation == "IMPORT_FROM" and whole:  # `import package.module as name`
            found = Path("import", root, tuple(parts))
        elif operation == "IMPORT_FROM":
            found = Path("import", module, (name,))
        elif i and operations[i - 1][0] in IMPORTS:
            if operation in ("STORE_FAST", "STORE_DEREF"):
                imported.setdefault(name, {})[found] = None
            else:
                others[found] = None
    return imported, others


def _operations(code: CodeType) -> list[tuple[str, Any]]:
    """Return the names of the instructions and what each is about, one by one.

    From Python 3.13 on, an instruction may load or store two local variables. Those that only move things are left out.
    """
    operations: list[tuple[str, Any]] = []
    for instruction in dis.get_instructions(code):
        name, about = instruction.opname, instruction.argval
        if isinstance(about, tuple) and "FAST" in name:
            operations += zip(re.findall("(?:LOAD|STORE)_FAST", name), about, strict=True)
        elif name not in BETWEEN:
            operations.append((name, about))
    return operations


def _attributes(operations: list[tuple[str, Any]], start: int) -> tuple[str, ...]:
    names = []
    for operation, name in operations[start:]:
        if operation not in ATTRIBUTES:
            break
        names.append(name)
    return tuple(names)
