"""Tables and pictures of a study."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows with the same keys as CSV."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV, as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def draw(path: Path, *panels: Callable[[Any], None]) -> None:
    """One picture with the panels side by side; each draws into the axes that it is given."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 5.2 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(path, dpi=130)
