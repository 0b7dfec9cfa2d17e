"""Sizes that are static fields of an equinox module."""

from collections.abc import Callable
from typing import Any

from bilevel_jax.core.validation import as_size, plain


def size(name: str, *, optional: bool = False) -> Callable[[Any], Any]:
    """A converter for the static field of this name: an int of at least 1, see `as_size`, or None where `optional`.

    It raises InputError for anything else; for several numbers as `plain` does.
    """
    convert = plain(name)

    def convert_size(value: Any) -> int | None:
        return None if optional and value is None else as_size(name, convert(value))

    return convert_size
