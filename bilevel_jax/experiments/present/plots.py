"""Pictures of a finished run, from the files in its directory alone."""

import contextlib
import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import bilevel_jax as bj
from bilevel_jax.core.errors import InputError
from bilevel_jax.experiments.checkpoints import DAMAGED
from bilevel_jax.experiments.config import RECORD, Config, from_directory
from bilevel_jax.experiments.present.pictures import line_style, picture
from bilevel_jax.experiments.present.run import flat_names, of_run
from bilevel_jax.experiments.sections import build_problem
from bilevel_jax.problems.panels import Pictured

NEEDED = (RECORD, "metrics.csv", "runs.csv", "final.npz", "summary.json")
# Entries of a legend in one column.
ROWS = 18


def plot(directory: Path) -> list[Path]:
    """Draw learning_curves.png, and incentive.png where the problem has panels. Returns what was written.

    Raises:
      InputError: the directory has no finished run, or a file of it is damaged.
    """
    missing = [name for name in NEEDED if not (directory / name).exists()]
    if missing:
        raise InputError(f"{directory}: holds no finished run ({', '.join(missing)} missing); give a run's --out")
    with _reading(directory / "summary.json") as path:
        summary = json.loads(path.read_text(encoding="utf-8"))
        name, best, value = summary["config"], summary["best_run"], summary["final_value"]
    config = dataclasses.replace(from_directory(directory), name=name)
    figures = {"learning_curves.png": learning_curves(config, directory)}
    if best is not None:
        with jax.enable_x64(config.values["precision"] == "float64"):
            problem = build_problem(config.at(config.grid[best])["problem"])
            if isinstance(problem, Pictured) and isinstance(problem, bj.Problem):
                figures["incentive.png"] = _answer(problem, config, directory, best, value)
    return [_save(figure, directory / name) for name, figure in figures.items()]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Whatever cannot be read in a file of the run is an error that names the file."""
    try:
        yield path
    except (*DAMAGED, IndexError, TypeError) as error:
        raise InputError(
            f"{path}: is damaged ({type(error).__name__}: {error}); start the run again with the same --out, which "
            f"writes what is missing"
        ) from None


def _answer(problem: Any, config: Config, directory: Path, run: int, value: float) -> Figure:
    """The picture of a run's last x and of the policy that answers it."""
    start = jax.eval_shape(problem.start, jax.random.key(0))
    names, structure = flat_names("x", start), jax.tree.structure(start)
    with _reading(directory / "runs.csv") as path, path.open(encoding="utf-8") as file:
        place = [int(row["run"]) for row in csv.DictReader(file)].index(run)
    with _reading(directory / "final.npz") as path, path.open("rb") as file, np.load(file) as final:
        leaves = [jax.numpy.asarray(of_run(final, name, place, run)) for name in names]
        value_of_states = jax.numpy.asarray(of_run(final, "value", place, run))
    x = jax.tree.unflatten(structure, leaves)
    solution = bj.solve(problem.mdp(x), problem.regularizer(x), initial_value=value_of_states)
    point = ", ".join(f"{key.split('.')[-1].replace('_', ' ')} {v}" for key, v in config.grid[run].items())
    title = (
        f"{config.values['problem']['name']}, {config.values['algorithm']['name']}: the agent's answer to the last x"
    )
    return picture(problem, x, solution, f"{title} of run {run} ({point}), objective {value:.4g}")


def _save(figure: Figure, path: Path) -> Path:
    try:
        figure.savefig(path, dpi=130, bbox_inches="tight")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error}); the results are complete, and bilevel-jax plot {path.parent} draws "
            f"the pictures"
        ) from None
    return path


def _groups(config: Config) -> dict[str, list[int]]:
    """Runs that differ in their seeds only, by what the others differ in."""
    groups: dict[str, list[int]] = {}
    for run, point in enumerate(config.grid):
        parts = [f"{key.split('.')[-1].replace('_', ' ')} {_text(v)}" for key, v in point.items() if key != "seed"]
        groups.setdefault(", ".join(parts), []).append(run)
    return groups


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def learning_curves(config: Config, directory: Path) -> Figure:
    """Objective and hyper-gradient norm against iterations: median over seeds, band from least to most."""
    runs: dict[int, list[tuple[float, float, float]]] = {}
    with _reading(directory / "metrics.csv") as path, path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            entry = (float(row["iteration"]), float(row["objective"]), float(row["gradient_norm"]))
            runs.setdefault(int(row["run"]), []).append(entry)
    groups = {label: [runs[m] for m in members if m in runs] for label, members in _groups(config).items()}
    groups = {label: curves for label, curves in groups.items() if curves}
    columns = -(-len(groups) // ROWS) if len(groups) > 1 else 0
    figure = Figure(figsize=(10 + 2.2 * columns, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for i, (label, curves) in enumerate(groups.items()):
        shortest = min(map(len, curves))  # of an interrupted or diverged run
        table = np.array([curve[:shortest] for curve in curves])  # [runs, records, 3]
        style = line_style(i)
        for column, panel in enumerate(panels, 1):
            values = table[..., column]
            panel.plot(table[0, :, 0], np.median(values, 0), **style, lw=1.6, label=label or None)
            if len(table) > 1:
                panel.fill_between(table[0, :, 0], values.min(0), values.max(0), color=style["color"], alpha=0.14, lw=0)
    panels[0].set(xlabel="upper iteration", ylabel="objective (minimised)")
    panels[1].set(xlabel="upper iteration", ylabel="hyper-gradient norm", yscale="log")
    if columns:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", ncols=columns, frameon=False, fontsize=8)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    seeds = max((len(curves) for curves in groups.values()), default=0)
    spread = f"; median and range over {seeds} seeds" if seeds > 1 else ""
    figure.suptitle(f"{config.name}: {_title(config)}{spread}", fontsize=11)
    return figure


def _title(config: Config) -> str:
    """Problem, algorithm, optimizer and the learning rate where it is not swept."""
    values = config.values
    optimizer = values["optimizer"]["name"]
    rate = values["optimizer"].get("learning_rate")
    if isinstance(rate, int | float) and "optimizer.learning_rate" not in values["sweep"]:
        optimizer += f", learning rate {rate:g}"
    return f"{values['problem']['name']}, {values['algorithm']['name']} with {optimizer}"
