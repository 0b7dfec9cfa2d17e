"""A picture of a problem: its panels side by side."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.results import Result
from bilevel_jax.problems.panels import Curves, HeatMap, Pictured

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
STYLES = ("-", "--", ":", "-.")
MARKERS = ("", "o", "s", "^", "D", "v", "P", "X")
WALL, ARROW, MARK = "#3a3f47", "#10243e", "#0072b2"
SIGNED = LinearSegmentedColormap.from_list(
    "signed", [mpl.colormaps[half](shade) for half in ("Reds_r", "Greens") for shade in np.linspace(0, 1, 128)]
)
ARROWS = "An arrow is the policy's mean move: long where it is sure, a dot where it is even. Grey cells are walls."
HEIGHT = 3.9  # inches of a panel
MANY = 12  # rows or columns of a table: beyond, not every one has its number


def line_style(place: int) -> dict[str, Any]:
    """How the curve at a place in a list is drawn: the first 256 differ in colour, dashes or markers."""
    kind = place // len(COLORS)
    marker = MARKERS[kind // len(STYLES) % len(MARKERS)]
    return {
        "color": COLORS[place % len(COLORS)],
        "ls": STYLES[kind % len(STYLES)],
        "marker": marker,
        "ms": 4,
        "markevery": 0.12 if marker else None,
    }


def picture(problem: Any, x: Any, solution: Any, title: str = "") -> Figure:
    """The problem's panels at x, with `solution` the lower level's there, concrete both.

    The title says where the solution did not converge.

    Raises:
      InputError: the problem has no method `panels`.
    """
    if not isinstance(problem, Pictured):
        raise InputError(f"problem: {type(problem).__name__} has no method panels(x, solution), so no picture")
    panels = problem.panels(x, solution)
    widths = [_width(panel) for panel in panels]
    figure = Figure(figsize=(sum(widths) + 0.4, HEIGHT + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    columns = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    scales = _scales(panels)
    for axes, panel in zip(columns, panels, strict=True):
        if isinstance(panel, HeatMap):
            _heat_map(axes, panel, *scales[panel.label])
        else:
            _curves(axes, panel)
        axes.set_title(panel.title, fontsize=10)
    for label, (colors, norm) in scales.items():
        sharing = [axes for axes, panel in zip(columns, panels, strict=True) if getattr(panel, "label", None) == label]
        figure.colorbar(ScalarMappable(norm, colors), ax=sharing, shrink=0.85, label=label, aspect=25)
    if any(getattr(panel, "arrows", None) is not None for panel in panels):
        figure.supxlabel(ARROWS, fontsize=8, color=ARROW)
    if np.any(np.asarray(solution.result) != Result.CONVERGED):
        title = f"{title} (the lower level did not converge)".strip()
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _width(panel: Any) -> float:
    """Inches that suit a panel, with its share of the colour bar."""
    if isinstance(panel, Curves):
        return 4.4
    height, width = panel.values.shape
    return min(max(HEIGHT * width / height, 2.2), 4.6) + 0.6


def _scales(panels: Sequence[Any]) -> dict[str, tuple[Colormap, Normalize]]:
    """Colours by label: from white at 0 to red below it, to green above it, or to both."""
    scales = {}
    for label in dict.fromkeys(panel.label for panel in panels if isinstance(panel, HeatMap)):
        values = [panel.values for panel in panels if isinstance(panel, HeatMap) and panel.label == label]
        low = min(0.0, *(float(np.nanmin(v)) for v in values))
        high = max(0.0, *(float(np.nanmax(v)) for v in values))
        if label.startswith("probability"):
            high = 1.0
        if low < 0 < high:
            low, high = -max(-low, high), max(-low, high)
        colors = SIGNED if low < 0 < high else mpl.colormaps["Reds_r" if low < 0 else "Greens"]
        norm = Normalize(low, high if high > low else low + 1e-12)
        scales[label] = (colors.with_extremes(bad=WALL), norm)
    return scales


def _heat_map(axes: Axes, panel: HeatMap, colors: Colormap, norm: Normalize) -> None:
    is_map = not (panel.rows or panel.columns)
    axes.imshow(panel.values, cmap=colors, norm=norm, aspect="equal" if is_map else "auto", interpolation="nearest")
    if is_map:
        axes.set(xticks=[], yticks=[])
    else:
        axes.set(xlabel=panel.columns, ylabel=panel.rows)
        for axis, length in zip((axes.yaxis, axes.xaxis), panel.values.shape, strict=True):
            axis.set_ticks(range(0, length, -(-length // MANY)))
    if panel.arrows is not None:
        row, column = np.nonzero(np.isfinite(panel.arrows).all(-1))
        down, right = panel.arrows[row, column].T
        scale: Any = {"angles": "xy", "scale_units": "xy", "scale": 1.35, "pivot": "mid", "width": 0.006}
        axes.quiver(column, row, right, down, color=ARROW, edgecolor="white", linewidth=0.4, **scale)
    for letter, (row, column) in panel.marks:
        box = {"boxstyle": "circle,pad=0.18", "fc": "white", "ec": MARK, "lw": 1.2}
        axes.text(column, row, letter, ha="center", va="center", fontsize=9, weight="bold", bbox=box)


def _curves(axes: Axes, panel: Curves) -> None:
    for i, (name, values) in enumerate(panel.curves.items()):
        axes.plot(panel.x, values, **{**line_style(i), "marker": "o", "ms": 3, "markevery": 1}, lw=1.6, label=name)
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    if len(panel.curves) > 1:
        axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
