"""What the parts share: named cases that are measured one after another until the time is up."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

Cells = dict[str, dict[str, Any]]


def measure_cases(cases: Mapping[str, Callable[[], dict[str, Any]]], end: float) -> tuple[Cells, list[str]]:
    """(figures of the cases that began before `end`, names of the others).

    A case that the device refuses, for want of memory say, has the reason as `failed`.

    Args:
      end: of `time.monotonic()`.
    """
    cells: Cells = {}
    left_out = []
    for name, measure in cases.items():
        if time.monotonic() > end:
            left_out.append(name)
            continue
        try:
            cells[name] = measure()
        except jax.errors.JaxRuntimeError as error:
            cells[name] = {"failed": str(error).splitlines()[0]}
        print(f"  {name}: {shown(cells[name])}", flush=True)
    return cells, left_out


def shown(cell: Mapping[str, Any]) -> str:
    """The figures of a cell in a line."""
    texts = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in cell.items()}
    return ", ".join(f"{key} {text}" for key, text in texts.items())
