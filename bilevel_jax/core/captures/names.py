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
# `import a.b as c` has these between its parts and the name that it stores.
BETWEEN = ("SWAP", "POP_TOP", "ROT_TWO", "CACHE")


class Path(NamedTuple):
    """A name and the attributes that are read off it, as in `config.rates.low`.

    `kind`: "global" of the function's module, "cell" of a closure, or "import" of a module, by the function itself.
    """

    kind: str
    name: str
    attributes: tuple[str, ...]


class Names(NamedTuple):
    """What a function reads, and the names that it assigns."""

    read: tuple[Path, ...]
    assigned: frozenset[str]


@functools.lru_cache(maxsize=4096)
def names_of(code: CodeType) -> Names:
    """Return the names that `code` and the functions defined in it read; local cells are among them."""
    read: dict[Path, None] = {}
    assigned: set[str] = set()
    imported: dict[str, Path] = {}  # by the name in the function
    module, whole, found = "", False, Path("import", "", ())
    operations = _operations(code)
    for i, (operation, name) in enumerate(operations):
        if operation == "IMPORT_NAME":
            module, found = name, Path("import", name.partition(".")[0], ())
            whole = operations[i - 1][1] is None  # not `from module import ...`
        elif operation == "IMPORT_FROM" and whole:  # `import package.module as name`
            found = Path("import", module, ())
        elif operation == "IMPORT_FROM":
            found = Path("import", module, (name,))
            read[found] = None
        elif operation in ("STORE_FAST", "STORE_DEREF") and operations[i - 1][0] in IMPORTS:
            imported[name] = found
        elif operation in LOADS or (operation.startswith("LOAD_FAST") and name in imported):
            read[Path(LOADS.get(operation, "cell"), name, _attributes(operations, i + 1))] = None
        if operation in ("STORE_GLOBAL", "STORE_DEREF"):
            assigned.add(name)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = names_of(constant)
            read |= dict.fromkeys(inner.read)
            assigned |= inner.assigned
    paths = (
        imported[path.name]._replace(attributes=imported[path.name].attributes + path.attributes)
        if path.kind == "cell" and path.name in imported
        else path
        for path in read
    )
    return Names(tuple(paths), frozenset(assigned))


def _operations(code: CodeType) -> list[tuple[str, Any]]:
    """Return the names of the instructions and what each is about, one by one.

    From Python 3.13 on, an instruction may load or store two local variables.
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
