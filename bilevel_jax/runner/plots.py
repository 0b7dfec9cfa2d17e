"""Pictures of a finished run, from the files in its directory alone."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

import bilevel_jax as bj
from bilevel_jax.errors import InputError
from bilevel_jax.problems.panels import Pictured
from bilevel_jax.runner.config import Config, from_directory
from bilevel_jax.runner.pictures import COLORS, picture
from bilevel_jax.runner.run import flat_names
from bilevel_jax.runner.sweep import build_problem


def plot(directory: Path) -> list[Path]:
    """Draw learning_curves.png, and incentive.png where the problem has panels. Returns what was written.

    Raises:
      InputError: the directory has no finished run.
    """
    needed = [directory / name for name in ("config.yaml", "metrics.csv", "runs.csv", "final.npz", "summary.json")]
    missing = [path.name for path in needed if not path.exists()]
    if missing:
        raise InputError(f"{directory}: holds no finished run ({', '.join(missing)} missing); give a run's --out")
    config = from_directory(directory)
    written = [directory / "learning_curves.png"]
    summary = json.loads((directory / "summary.json").read_text())
    config = dataclasses.replace(config, name=summary["config"])
    _save(learning_curves(config, directory), written[0])
    best = summary["best_run"]
    if best is not None:
        with jax.enable_x64(config.values["precision"] == "float64"):
            problem = build_problem(config.at(config.grid[best])["problem"])
            if isinstance(problem, Pictured):
                written.append(directory / "incentive.png")
                _save(_answer(problem, directory, best, summary["final_value"]), written[-1])
    return written


def _answer(problem: Any, directory: Path, run: int, value: float) -> Figure:
    """The picture of a run's last x and of the policy that answers it."""
    names, structure = flat_names("x", jax.eval_shape(problem.start, jax.random.key(0)))
    with np.load(directory / "final.npz") as final:
        x = jax.tree.unflatten(structure, [jax.numpy.asarray(final[name][run]) for name in names])
        solution = bj.solve(problem.mdp(x), problem.regularizer(x), initial_value=final["value"][run])
    return picture(problem, x, solution, f"the agent's answer to the last x, objective {value:.3f}")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight")


def _groups(config: Config) -> dict[str, list[int]]:
    """Runs that differ in their seeds only, by what the others differ in."""
    groups: dict[str, list[int]] = {}
    for run, point in enumerate(config.grid):
        label = ", ".join(f"{k.split('.')[-1].replace('_', ' ')} {v:g}" for k, v in point.items() if k != "seed")
        groups.setdefault(label, []).append(run)
    return groups


def learning_curves(config: Config, directory: Path) -> Figure:
    """Objective and hyper-gradient norm against iterations: median over seeds, band from least to most."""
    with (directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    runs: dict[int, list[tuple[float, float, float]]] = {}
    for row in rows:
        entry = (float(row["iteration"]), float(row["objective"]), float(row["gradient_norm"]))
        runs.setdefault(int(row["run"]), []).append(entry)
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    groups = _groups(config)
    for i, (label, members) in enumerate(groups.items()):
        curves = [runs[m] for m in members if m in runs]
        if not curves:
            continue
        shortest = min(map(len, curves))  # of an interrupted or diverged run
        table = np.array([curve[:shortest] for curve in curves])  # [runs, records, 3]
        color = COLORS[i % len(COLORS)]
        for column, panel in enumerate(panels, 1):
            values = table[..., column]
            panel.plot(table[0, :, 0], np.median(values, 0), color=color, lw=1.6, label=label or None)
            if len(table) > 1:
                panel.fill_between(table[0, :, 0], values.min(0), values.max(0), color=color, alpha=0.18, lw=0)
    seeds = max(len(members) for members in groups.values())
    panels[0].set(xlabel="upper iteration", ylabel="objective (minimised)")
    panels[1].set(xlabel="upper iteration", ylabel="hyper-gradient norm", yscale="log")
    if 1 < len(groups) <= 12:
        panels[1].legend(frameon=False, fontsize=8)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    spread = f", median and range over {seeds} seeds" if seeds > 1 else ""
    figure.suptitle(f"{config.name}: {config.values['algorithm']['name']}{spread}", fontsize=11)
    return figure
