"""Pictures of a finished run, from the files in its directory alone."""

import contextlib
import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import bilevel_jax as bj
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.saving import flat_names, of_run
from bilevel_jax.experiments.checkpoints import DAMAGED
from bilevel_jax.experiments.config import RECORD, Config, from_directory
from bilevel_jax.experiments.present.clips import episode_frames, shows_images, write_clip
from bilevel_jax.experiments.present.pictures import line_style, picture
from bilevel_jax.experiments.sections import build_problem
from bilevel_jax.experiments.trained import trained
from bilevel_jax.problems.panels import Pictured

NEEDED = (RECORD, "metrics.csv", "runs.csv", "final.npz", "summary.json")
# Entries of a legend in one column.
ROWS = 18


class Curve(NamedTuple):
    """A column of metrics.csv that has a panel."""

    column: str
    label: str
    logarithmic: bool = False


CURVES = (
    Curve("objective", "objective (minimised)"),
    Curve("gradient_norm", "hyper-gradient norm", logarithmic=True),
    Curve("agent_episode_return", "return of the agent's episodes"),
)


def plot(directory: Path) -> list[Path]:
    """Draw learning_curves.png; incentive.png where the problem has panels; and clip.gif, an episode of the agent,
    where it sees images. Returns what was written.

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
    written = [_save(figure, directory / name) for name, figure in figures.items()]
    return written if best is None else [*written, *_clips(config, directory, best)]


def _clips(config: Config, directory: Path, run: int) -> list[Path]:
    """An episode of a run's agent as clip.gif, where observations are images."""
    with jax.enable_x64(config.values["precision"] == "float64"):
        environment = getattr(build_problem(config.at(config.grid[run])["problem"]), "environment", None)
        if environment is None or not shows_images(environment):
            return []
        found = trained(directory, run)
        frames = episode_frames(jax.random.key(0), found.problem, found.policy)
    path = directory / "clip.gif"
    with _writing(path):
        write_clip(path, frames)
    return [path]


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
    with _writing(path):
        figure.savefig(path, dpi=130, bbox_inches="tight")
    return path


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A picture that cannot be written is an error that says how to get it."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error}); the results are complete, and bilevel-jax plot {path.parent} draws "
            f"the pictures"
        ) from None


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
    """Objective, hyper-gradient norm and, where the agent reports them, the returns of its episodes against iterations:
    median over seeds, band from least to most.
    """
    runs: dict[int, list[tuple[float, ...]]] = {}
    with _reading(directory / "metrics.csv") as path, path.open(encoding="utf-8") as file:
        table = csv.DictReader(file)
        curves = [curve for curve in CURVES if curve.column in (table.fieldnames or ())]
        for row in table:
            entry = [float(row[name] or "nan") for name in ("iteration", *(curve.column for curve in curves))]
            runs.setdefault(int(row["run"]), []).append(tuple(entry))
    shown = [i for i, curve in enumerate(curves, 1) if not curve.logarithmic or _some(runs, i)]
    curves = [curves[i - 1] for i in shown]
    runs = {run: [(row[0], *(row[i] for i in shown)) for row in rows] for run, rows in runs.items()}
    groups = {label: [runs[m] for m in members if m in runs] for label, members in _groups(config).items()}
    groups = {label: curves for label, curves in groups.items() if curves}
    columns = -(-len(groups) // ROWS) if len(groups) > 1 else 0
    figure = Figure(figsize=(5 * len(curves) + 2.2 * columns, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(curves))
    for i, (label, members) in enumerate(groups.items()):
        shortest = min(map(len, members))  # of an interrupted or diverged run
        table = np.array([rows[:shortest] for rows in members])  # [runs, records, 1 + curves]
        style = line_style(i)
        for column, panel in enumerate(panels, 1):
            values = table[..., column]
            panel.plot(table[0, :, 0], np.median(values, 0), **style, lw=1.6, label=label or None)
            if len(table) > 1:
                panel.fill_between(table[0, :, 0], values.min(0), values.max(0), color=style["color"], alpha=0.14, lw=0)
    for panel, curve in zip(panels, curves, strict=True):
        panel.set(xlabel="upper iteration", ylabel=curve.label)
        if curve.logarithmic:
            panel.set_yscale("log")
    if columns:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", ncols=columns, frameon=False, fontsize=8)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    seeds = max((len(members) for members in groups.values()), default=0)
    spread = f"; median and range over {seeds} seeds" if seeds > 1 else ""
    figure.suptitle(f"{config.name}: {_title(config)}{spread}", fontsize=11)
    return figure


def _some(runs: dict[int, list[tuple[float, ...]]], column: int) -> bool:
    """Whether any number in a column of the runs' rows is above zero."""
    return any(row[column] > 0 for rows in runs.values() for row in rows)


def _title(config: Config) -> str:
    """Problem, algorithm, optimizer and the learning rate where it is not swept."""
    values = config.values
    optimizer = values["optimizer"]["name"]
    rate = values["optimizer"].get("learning_rate")
    if isinstance(rate, int | float) and "optimizer.learning_rate" not in values["sweep"]:
        optimizer += f", learning rate {rate:g}"
    return f"{values['problem']['name']}, {values['algorithm']['name']} with {optimizer}"
