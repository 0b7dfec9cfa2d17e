"""The names that a function reads, from its byte code."""

import dis
import functools
from types import CodeType
from typing import NamedTuple

LOADS = {
    "LOAD_GLOBAL": "global",
    "LOAD_NAME": "global",
    "LOAD_FROM_DICT_OR_GLOBALS": "global",
    "LOAD_DEREF": "cell",
    "LOAD_CLASSDEREF": "cell",
    "LOAD_FROM_DICT_OR_DEREF": "cell",
}
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")


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
    imported: dict[str, str] = {}  # name in the function -> module
    module = ""
    instructions = list(dis.get_instructions(code))
    for i, instruction in enumerate(instructions):
        operation, name = instruction.opname, instruction.argval
        if operation == "IMPORT_NAME":
            module = name
            if instructions[i + 1].opname in ("STORE_FAST", "STORE_DEREF"):
                imported[instructions[i + 1].argval] = name.partition(".")[0]
        elif operation == "IMPORT_FROM":
            read[Path("import", module, (name,))] = None
        elif operation in ("STORE_GLOBAL", "STORE_DEREF"):
            assigned.add(name)
        elif operation in LOADS or (operation.startswith("LOAD_FAST") and name in imported):
            read[Path(LOADS.get(operation, "cell"), name, _attributes(instructions, i + 1))] = None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = names_of(constant)
            read |= dict.fromkeys(inner.read)
            assigned |= inner.assigned
    paths = (
        Path("import", imported[path.name], path.attributes) if path.kind == "cell" and path.name in imported else path
        for path in read
    )
    return Names(tuple(paths), frozenset(assigned))


def _attributes(instructions: list[dis.Instruction], start: int) -> tuple[str, ...]:
    names = []
    for instruction in instructions[start:]:
        if instruction.opname not in ATTRIBUTES:
            break
        names.append(instruction.argval)
    return tuple(names)
