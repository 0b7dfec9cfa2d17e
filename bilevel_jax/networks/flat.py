"""The check of a network's outputs that the adapters share."""

from typing import Any

from bilevel_jax.core.errors import InputError


def numbers(name: str, made: Any, outputs: int) -> None:
    """Raise InputError unless `made` has the shape [outputs]."""
    if made.shape != (outputs,):
        raise InputError(f"{name}: expected {outputs} outputs, got shape {list(made.shape)}; set its last layer's size")
