"""One comparison: its cells one after another, and everything that it leaves in the directory."""

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import yaml
from matplotlib.figure import Figure

from bilevel_jax.errors import InputError
from bilevel_jax.runner.compare.cells import Outcome, race_of, run_cell
from bilevel_jax.runner.compare.config import Comparison
from bilevel_jax.runner.compare.curves import best_solution, learning_curves
from bilevel_jax.runner.compare.page import page
from bilevel_jax.runner.compare.tables import RULE, grid, markdown, rows, write_curves, write_table

PACKAGES = ("bilevel_jax", "jax", "jaxlib", "optax", "equinox", "numpy")


def compare(comparison: Comparison, directory: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Run what is not there yet and write tables, curves, pictures and a page into the directory.

    Files: config.yaml (all defaults filled in), curves.csv, table.csv, table.md, summary.json, index.html,
    curves-PROBLEM.png, best-PROBLEM.png, and cells/, the finished runs: started again with the same
    directory, a comparison goes on where it stopped; with a changed config, only cells that it changes are run.

    Returns:
      The summary.

    Raises:
      InputError: the directory cannot be written, a method refuses an option, or a run does not fit into the memory
        limit.
    """
    started = time.perf_counter()
    with jax.enable_x64(comparison.values["precision"] == "float64"):
        for cell in comparison.cells:  # what is refused is refused before anything is computed
            race_of(cell)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "summary.json").unlink(missing_ok=True)
        (directory / "config.yaml").write_text(yaml.safe_dump(comparison.values, sort_keys=False))
        with jax.enable_x64(comparison.values["precision"] == "float64"):
            outcomes = [run_cell(cell, directory / "cells", report) for cell in comparison.cells]
            return _write(comparison, outcomes, directory, time.perf_counter() - started)
    except OSError as error:
        raise InputError(f"--out {directory}: cannot be written ({error}); give another directory") from None


def _write(comparison: Comparison, outcomes: Sequence[Outcome], directory: Path, seconds: float) -> dict[str, Any]:
    made = rows(outcomes)
    write_curves(directory / "curves.csv", outcomes)
    write_table(directory / "table.csv", made)
    (directory / "table.md").write_text(markdown(made))
    problems, methods, _ = grid(made)
    pictures: dict[str, dict[str, str]] = {}
    for number, problem in enumerate(problems):
        own = [row for row in made if row.problem == problem]
        pictures[problem] = {}
        if any(row.reason is None for row in own):
            curves = learning_curves(own, methods)
            pictures[problem]["curves"] = _save(curves, directory, f"curves-{number + 1}.png")
        best = best_solution(own)
        if best is not None:
            pictures[problem]["best"] = _save(best, directory, f"best-{number + 1}.png")
    values = comparison.values
    summary = {
        "config": comparison.name,
        "problems": problems,
        "methods": methods,
        "runs": sum(len(outcome.cell.runs) for outcome in outcomes if outcome.reason is None),
        "diverged": sum(int(outcome.diverged.sum()) for outcome in outcomes if outcome.reason is None),
        "budget": values["budget"],
        "budgets": {problem["label"]: problem["budget"] for problem in values["problems"] if problem["budget"]},
        "seeds": values["seeds"],
        "tuning_seeds": values["tuning_seeds"],
        "precision": values["precision"],
        "rule": RULE,
        "seconds": round(seconds, 1),
        "machine": _machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "pictures": pictures,
    }
    (directory / "index.html").write_text(page(comparison, made, summary, directory))
    # Last: a directory that has it is complete.
    (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _save(figure: Figure, directory: Path, name: str) -> str:
    figure.savefig(directory / name, dpi=110)
    return name


def _machine() -> str:
    """What the runs were made on, as far as a reader of the seconds has to know."""
    device = jax.devices()[0]
    kind = platform.machine() if device.platform == "cpu" else device.device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{device.platform.upper()} {kind}, {cores} cores, {platform.system()}"
