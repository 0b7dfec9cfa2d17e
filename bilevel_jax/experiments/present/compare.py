"""`bilevel-jax compare`: runs its cells one after another, and writes all files of the directory."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from bilevel_jax.experiments.comparison import Comparison
from bilevel_jax.experiments.directory import claimed, write_text
from bilevel_jax.experiments.interruption import noticed
from bilevel_jax.experiments.outcome import Outcome
from bilevel_jax.experiments.present.curves import best_solution, learning_curves
from bilevel_jax.experiments.present.page import page
from bilevel_jax.experiments.present.run import machine
from bilevel_jax.experiments.present.tables import RULE, grid, markdown, rows, write_curves, write_table
from bilevel_jax.experiments.trainer import Event, Trainer


def compare(
    comparison: Comparison, directory: Path | None, report: Callable[[str], None], *, fresh: bool = False
) -> tuple[dict[str, Any], Path]:
    """Run what is not there yet and write tables, curves, pictures and a page into the directory.

    Files: resolved.yaml (all defaults filled in), curves.csv, table.csv, table.md, summary.json, index.html,
    curves-N.png and best-N.png of the N-th problem, and cells/, the finished runs. A comparison that is started again
    with the same directory goes on where it stopped. With a changed config, only cells that it changes are run.

    Args:
      comparison: see `load_comparison`.
      directory: None is runs/NAME-TIME.
      report: takes a line for each chunk of runs that is finished.
      fresh: whether to begin anew; what was there is moved away.

    Returns:
      The summary, and the directory.

    Raises:
      InputError: the directory cannot be used, an algorithm refuses an option, or a run exceeds the memory limit.
      InterruptionError: by a signal; the state is kept.
    """
    started = time.perf_counter()
    values = comparison.values

    def told(event: Event) -> None:
        if event.what == "chunk":
            report(f"{event.cell.name}: {len(event.runs)} runs, {float(event.points[-1].seconds):.3g} s each")

    with jax.enable_x64(values["precision"] == "float64"), noticed() as stop:
        # What is refused is refused before anything is computed.
        trainers = []
        for cell in comparison.cells:
            stop.check()
            trainers.append(Trainer(cell))
        with claimed(directory, comparison.name, "compare", values, fresh=fresh, changes=True) as place:
            outcomes = [trainer.run(place, stop, told) for trainer in trainers]
            return _write(comparison, outcomes, place, time.perf_counter() - started), place


def _write(comparison: Comparison, outcomes: Sequence[Outcome], directory: Path, seconds: float) -> dict[str, Any]:
    made = rows(outcomes)
    write_curves(directory / "curves.csv", outcomes)
    write_table(directory / "table.csv", made)
    write_text(directory / "table.md", markdown(made))
    problems, algorithms, _ = grid(made)
    pictures: dict[str, dict[str, str]] = {}
    for number, problem in enumerate(problems):
        own = [row for row in made if row.problem == problem]
        pictures[problem] = {}
        if any(row.reason is None for row in own):
            curves = learning_curves(own, algorithms)
            pictures[problem]["curves"] = _save(curves, directory, f"curves-{number + 1}.png")
        best = best_solution(own)
        if best is not None:
            pictures[problem]["best"] = _save(best, directory, f"best-{number + 1}.png")
    values = comparison.values
    summary = {
        "config": comparison.name,
        "problems": problems,
        "algorithms": algorithms,
        "runs": sum(len(outcome.runs) for outcome in outcomes if outcome.reason is None),
        "diverged": sum(int(outcome.diverged.sum()) for outcome in outcomes if outcome.reason is None),
        "budget": values["budget"],
        "budgets": {problem["label"]: problem["budget"] for problem in values["problems"] if problem["budget"]},
        "seeds": values["seeds"],
        "tuning_seeds": values["tuning_seeds"],
        "precision": values["precision"],
        "rule": RULE,
        "seconds": round(seconds, 1),
        **{key: value for key, value in machine().items() if key in ("machine", "versions")},
        "pictures": pictures,
    }
    write_text(directory / "index.html", page(comparison, made, summary, directory))
    # Last: a directory that has it is complete.
    write_text(directory / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _save(figure: Figure, directory: Path, name: str) -> str:
    figure.savefig(directory / name, dpi=110)
    return name
