"""The content of a problem's picture as plain numbers: heat maps and curves. Drawing them is done elsewhere."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Real

from bilevel_jax.problems.grid import MOVES, Grid


class HeatMap(NamedTuple):
    """Numbers in cells: of a map, or of a table such as [states, actions].

    Those of one picture that have the same `label` share their colours, which start at 0; where it begins with
    "probability" they end at 1.
    """

    title: str
    values: Real[np.ndarray, "H W"]  # NaN where nothing stands, such as a wall
    label: str = ""  # of the colour bar
    arrows: Float[np.ndarray, "H W 2"] | None = None  # a mean move (row, column); NaN: none
    marks: tuple[tuple[str, tuple[int, int]], ...] = ()  # letters, and the cell (row, column) of each
    rows: str = ""  # what a row is; none: the cells are places on a map
    columns: str = ""


class Curves(NamedTuple):
    """Functions of one number."""

    title: str
    x: Real[np.ndarray, " N"]
    curves: dict[str, Real[np.ndarray, " N"]]  # by name
    x_label: str
    y_label: str


Panel = HeatMap | Curves


@runtime_checkable
class Pictured(Protocol):
    """A problem that can be drawn. All registered ones can."""

    def panels(self, x: Any, solution: Any) -> tuple[Panel, ...]:
        """Return the panels of a picture at x, where `solution` is the `bilevel_jax.Solution` there.

        Concrete numbers only, no jit.
        """
        ...


def grid_panel(
    title: str,
    grid: Grid,
    values: Real[ArrayLike, " S"] | Any,
    policy: Real[ArrayLike, "S 4"] | Any | None = None,
    *,
    label: str = "",
    marks: Mapping[str, Bool[ArrayLike, " S"] | Any] | None = None,
) -> HeatMap:
    """The map, with a number in each free cell.

    Args:
      values: one number per free cell.
      policy: over the grid's moves. Its arrows are mean moves: long where the policy is nearly deterministic,
        short where it is nearly uniform.
      marks: by letter, the cells that have it.
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
    return HeatMap(title=title, values=field, label=label, arrows=arrows, marks=letters)


def pair_panel(title: str, values: Real[ArrayLike, "S A"] | Any, label: str = "") -> HeatMap:
    """Return a heat map with one number per state-action pair."""
    return HeatMap(title=title, values=np.asarray(values), label=label, rows="state", columns="action")
