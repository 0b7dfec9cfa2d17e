"""Pictures of a finished run, from the files in its directory alone."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from bilevel_jax.errors import InputError
from bilevel_jax.problems.grid import MOVES, Grid
from bilevel_jax.runner.config import Config, from_directory
from bilevel_jax.runner.sweep import build_problem

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


def plot(directory: Path) -> list[Path]:
    """Draw learning_curves.png, and incentive.png where the problem is a grid. Returns what was written.

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
            if hasattr(problem, "grid") and hasattr(problem, "incentive"):
                with np.load(directory / "final.npz") as final:
                    written.append(directory / "incentive.png")
                    figure = incentive(problem, final["x"][best], final["policy"][best], summary["final_value"])
                    _save(figure, written[-1])
    return written


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


def incentive(problem: Any, x: np.ndarray, policy: np.ndarray, value: float) -> Figure:
    """The incentive of each cell as a heat map with the policy's arrows, one panel a context."""
    grid: Grid = problem.grid
    heat = np.asarray(problem.incentive(x))
    policies = policy.reshape(-1, *policy.shape[-2:])
    field = np.full(grid.walls.shape, np.nan)
    field[tuple(grid.cells.T)] = heat
    figure = Figure(figsize=(4.9 * len(policies) + 0.8, 4.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(policies)))
    colors = mpl.colormaps["Reds_r" if heat.min() < 0 else "Greens"].with_extremes(bad="#3a3f47")
    low, high = (heat.min(), 0) if heat.min() < 0 else (0, max(heat.max(), 1e-12))
    for context, (panel, one) in enumerate(zip(panels, policies, strict=True)):
        panel.imshow(field, cmap=colors, vmin=low, vmax=high)
        _draw_policy(panel, grid, one)
        _mark(panel, grid, problem, context)
        panel.set(xticks=[], yticks=[], title=f"context {context + 1}" if len(policies) > 1 else "")
    scale = ScalarMappable(Normalize(low, high), colors)
    figure.colorbar(scale, ax=list(panels), shrink=0.85, label="incentive")
    figure.suptitle(f"incentive and the agent's policy, objective {value:.3f}", fontsize=11)
    return figure


def _draw_policy(panel: Axes, grid: Grid, policy: np.ndarray) -> None:
    """The mean move in each cell: long where the policy is sure, short where it wavers."""
    mean = policy @ MOVES  # [S, 2], (row, column)
    panel.quiver(
        grid.cells[:, 1],
        grid.cells[:, 0],
        mean[:, 1],
        mean[:, 0],
        angles="xy",
        scale_units="xy",
        scale=1.35,
        pivot="mid",
        width=0.006,
        color="#10243e",
    )


def _mark(panel: Axes, grid: Grid, problem: Any, context: int) -> None:
    """Name the cells that the problem names: at_goal [C, S], at_target [S], initial [S]."""
    marks = {
        "G": np.asarray(problem.at_goal)[context] if hasattr(problem, "at_goal") else None,
        "T": np.asarray(problem.at_target) if hasattr(problem, "at_target") else None,
        "S": np.asarray(problem.initial) == 1 if hasattr(problem, "initial") else None,
    }
    for letter, where in marks.items():
        for state in [] if where is None else np.flatnonzero(where):
            row, column = grid.cells[state]
            box = {"boxstyle": "circle,pad=0.18", "fc": "white", "ec": "#0072b2", "lw": 1.2}
            panel.text(column, row, letter, ha="center", va="center", fontsize=9, weight="bold", bbox=box)
