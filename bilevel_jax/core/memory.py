"""How much memory arrays will take, asked before they are made.

An array that is too large ends in a MemoryError without a name, or, where the system promises more memory than it has,
in the death of the process.
"""

import functools
import os

from bilevel_jax.core.errors import InputError

# What pads lists to one length may take so many times what was given, once it is more than so many bytes.
MOST_PADDING = 32
SMALL = 256 * 2**20
# Limits that containers have: version 2 and version 1 of Linux's control groups.
CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def require_room(name: str, needed: int, what: str, remedy: str, *, given: int | None = None) -> None:
    """Raise InputError, with the numbers and the remedy, if arrays of `needed` bytes should not be made.

    That is the case where they need more than the machine's memory. It is also the case where they need more than 256
    MiB and more than 32 times `given`, the bytes of the input itself: then a few long rows make all other rows long.

    Args:
      name: the argument or option to blame.
      what: what would take that memory, for the message.
    """
    if given is not None and needed > max(SMALL, MOST_PADDING * given):
        raise InputError(
            f"{name}: {what} would take {_in_words(needed)}, {needed / max(given, 1):.0f} times the {_in_words(given)} "
            f"that were given (the limit is {MOST_PADDING} times, from {_in_words(SMALL)} on); {remedy}"
        )
    limit = machine_memory()
    if needed > limit:
        raise InputError(
            f"{name}: {what} would take {_in_words(needed)}, this machine has {_in_words(limit)} of memory; {remedy}"
        )


@functools.cache
def machine_memory() -> int:
    """Bytes of memory that the machine has, or that its container may use."""
    limits = [_read_limit(path) for path in CONTAINER]
    if hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min((limit for limit in limits if limit), default=2**63)


def _read_limit(path: str) -> int | None:
    """A number of bytes; None where there is no such file, or no limit in it."""
    try:
        with open(path) as file:
            text = file.read().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _in_words(count: int) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
