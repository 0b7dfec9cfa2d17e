"""Pictures of a comparison: learning curves of all algorithms on a problem, and the best solution that was found."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import bilevel_jax as bj
from bilevel_jax.experiments.present.pictures import line_style, picture
from bilevel_jax.experiments.present.tables import Row
from bilevel_jax.problems.panels import Pictured

AXES = {"iterations": "upper iterations", "transitions": "lower-level transitions", "seconds": "seconds per run"}
# Gaps below this fraction of the best objective are drawn at it: a logarithm has no zero.
FLOOR = 1e-10


def learning_curves(rows: Sequence[Row], algorithms: Sequence[str]) -> Figure:
    """One problem's tuned algorithms: the mean over the reported seeds, a band of one standard error.

    Above, the objective; below, its distance to the best that any run found. `algorithms`: all, in the order of
    their colours.
    """
    shown = [row for row in rows if row.outcome.curves is not None]
    best = min(np.nanmin(row.outcome.curves.objective) for row in shown if row.outcome.curves is not None)
    figure = Figure(figsize=(12.6, 6.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3, sharex="col", sharey="row")
    for row in shown:
        _draw(panels, row, best, {**line_style(list(algorithms).index(row.algorithm)), "lw": 1.7})
    for column, label in enumerate(AXES.values()):
        panels[1, column].set(xlabel=label, xscale="log", yscale="log")
    figure.suptitle(f"{rows[0].problem}: mean over seeds at each algorithm's tuned settings", fontsize=11)
    panels[0, 0].set_ylabel("objective (minimised)")
    panels[1, 0].set_ylabel("objective - best found")
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, lw=0.6)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False, fontsize=9)
    return figure


def _draw(panels: np.ndarray, row: Row, best: float, style: dict) -> None:
    curves = row.outcome.curves
    assert curves is not None
    values = curves.objective[1:, row.runs]  # on a logarithmic axis the start has no place
    mean = values.mean(1)
    error = values.std(1, ddof=1) / np.sqrt(values.shape[1]) if values.shape[1] > 1 else np.zeros_like(mean)
    floor = FLOOR * max(1.0, abs(best))
    for column, name in enumerate(AXES):
        x = getattr(curves, name)[1:, row.runs].mean(1)
        for panel, shift in ((panels[0, column], 0.0), (panels[1, column], best)):
            lower = floor if shift else -np.inf

            def shown(y: np.ndarray, shift: float = shift, lower: float = lower) -> np.ndarray:
                return np.where(np.isfinite(y), np.maximum(y - shift, lower), np.nan)

            _line(panel, x, shown(mean), shown(mean - error), shown(mean + error), row.algorithm, style)


def _line(axes: Axes, x: np.ndarray, mean: np.ndarray, low: np.ndarray, high: np.ndarray, label: str, style: dict):
    axes.plot(x, mean, label=label, **style)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.16, lw=0)


def best_solution(rows: Sequence[Row]) -> Figure | None:
    """The picture of the x with the least final objective among the reported runs; None if the problem has none.

    Call it with the comparison's precision set.
    """
    finals = {
        (place, run): row.outcome.curves.objective[-1, run]
        for place, row in enumerate(rows)
        if row.outcome.curves is not None
        for run in row.runs
    }
    finite = {at: value for at, value in finals.items() if np.isfinite(value)}
    if not finite:
        return None
    place, run = min(finite, key=lambda at: finite[at])
    row = rows[place]
    cell = row.outcome.cell
    problem: Any = cell.problem(cell.runs[row.outcome.runs[run]][0])
    if not all(isinstance(problem, kind) for kind in (Pictured, bj.Problem)):
        return None
    structure = jax.tree.structure(jax.eval_shape(problem.start, jax.random.key(0)))
    x = jax.tree.unflatten(structure, [jax.numpy.asarray(leaf[run]) for leaf in row.outcome.x])
    solution = bj.solve(problem.mdp(x), problem.regularizer(x))
    return picture(
        problem, x, solution, f"{row.problem}, best found: {row.algorithm}, objective {finite[place, run]:.6g}"
    )
