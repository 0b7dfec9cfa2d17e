"""Figures of a benchmark that are kept cell by cell: what has been measured is not measured again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.timing import RESULTS, machine


class Figures:
    """benchmarks/results/NAME.json (or another path), `cells` by their keys; written after each cell."""

    def __init__(self, path: str | Path, again: bool = False):
        path = Path(path)
        self.path = path if path.suffix == ".json" else RESULTS / f"{path}.json"
        self.again = again
        self.cells: dict[str, Any] = json.loads(self.path.read_text())["cells"] if self.path.exists() else {}

    def measure(self, key: str, call: Callable[[], Any]) -> Any:
        """The cell's figures: those that are there, or those that `call` returns now."""
        if self.again or key not in self.cells:
            self.cells[key] = call()
            self.path.parent.mkdir(exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps({"machine": machine(), "cells": self.cells}, indent=2) + "\n")
            partial.replace(self.path)
            print(key, json.dumps(self.cells[key]), flush=True)
        return self.cells[key]


def resident() -> tuple[int, int]:
    """Bytes of this process in memory, now and at the most since `reset_peak`.

    From /proc, not getrusage, whose maximum begins with that of the process that started this one.
    """
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    now, most = (1024 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return now, most


def reset_peak() -> None:
    """The most starts again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
