"""What a picture of a problem shows, as plain numbers: heat maps and curves. Drawing them is not done here."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from bilevel_jax.problems.grid import MOVES, Grid


class HeatMap(NamedTuple):
    """Numbers in cells: of a map, or of a table such as [states, actions].

    Those of one picture that have the same `label` share their colours, which start at 0; where it begins with
    "probability" they end at 1.
    """

    title: str
    values: np.ndarray  # [H, W], NaN where nothing stands, such as a wall
    label: str = ""  # of the colour bar
    arrows: np.ndarray | None = None  # [H, W, 2], a mean move (row, column); NaN: none
    marks: tuple[tuple[str, tuple[int, int]], ...] = ()  # letters, and the cell (row, column) of each
    rows: str = ""  # what a row is; none: the cells are places on a map
    columns: str = ""


class Curves(NamedTuple):
    """Functions of one number."""

    title: str
    x: np.ndarray  # [N]
    curves: dict[str, np.ndarray]  # by name, [N] each
    x_label: str
    y_label: str


Panel = HeatMap | Curves


@runtime_checkable
class Pictured(Protocol):
    """A problem that can be drawn. All registered ones can."""

    def panels(self, x: Any, solution: Any) -> tuple[Panel, ...]:
        """What a picture at x shows, solution the `bilevel_jax.Solution` there. Concrete numbers only, no jit."""
        ...


def grid_panel(
    title: str,
    grid: Grid,
    values: Any,
    policy: Any = None,
    *,
    label: str = "",
    marks: Mapping[str, Any] | None = None,
) -> HeatMap:
    """The map, with a number in each free cell.

    Args:
      values: [S], a number each free cell.
      policy: [S, 4] over the grid's moves. Its arrows are mean moves: long where it is sure, short where
        it wavers.
      marks: bool [S] by letter, the cells that have it.
    """
    places = tuple(grid.cells.T)
    field = np.full(grid.walls.shape, np.nan)
    field[places] = np.asarray(values)
    arrows = None
    if policy is not None:
        arrows = np.full((*field.shape, 2), np.nan)
        arrows[places] = np.asarray(policy) @ MOVES
    letters = tuple(
        (letter, (int(row), int(column)))
        for letter, where in (marks or {}).items()
        for row, column in grid.cells[np.asarray(where, bool)]
    )
    return HeatMap(title, field, label, arrows, letters)


def pair_panel(title: str, values: Any, label: str = "") -> HeatMap:
    """A number of each pair of state and action, values[S, A]."""
    return HeatMap(title, np.asarray(values), label, rows="state", columns="action")
