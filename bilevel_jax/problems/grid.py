"""Grid worlds from plain-text maps: `x` is a wall, anything else a cell; cells in row-major order.

A problem gives letters a meaning: `s` is where the agent starts, `g` its goal.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Int32, Real, Shaped

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.memory import require_room
from bilevel_jax.core.validation import as_float, require_fraction
from bilevel_jax.mdp.transitions import DenseTransition, StencilTransition, SuccessorTransition, Transition
from bilevel_jax.problems.options import as_sequence, require_room_for

# up, right, down, left, as (row, column) steps
MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])


class Grid(NamedTuple):
    """A parsed map: its `walls`, `cells` with (row, column) of each state, and `letters`, a text for each state."""

    walls: Bool[np.ndarray, "H W"]
    cells: Int[np.ndarray, "S 2"]
    letters: Shaped[np.ndarray, " S"]

    def state(self, name: str, cell: tuple[int, int]) -> int:
        """The state index of a cell. Raises InputError for a wall or a place outside the map."""
        if np.shape(cell) != (2,):
            raise InputError(f"{name}: expected (row, column), got {cell!r}")
        match = np.flatnonzero((self.cells == np.asarray(cell)).all(-1))
        if match.size != 1:
            raise InputError(
                f"{name}: {tuple(cell)} is no free cell of the {self.walls.shape[0]} x "
                f"{self.walls.shape[1]} map (rows and columns count from 0)"
            )
        return int(match[0])

    def marked(self, letter: str, what: str = "", *, once: bool = False) -> Bool[np.ndarray, " S"]:
        """Which states have a letter.

        Raises:
          InputError: `what` the letter marks is given and no cell has it, or several have where it is `once`.
        """
        found = self.letters == letter
        if once and found.sum() != 1:
            raise InputError(f"rows: expected one {what} {letter!r}, got {found.sum()}")
        if what and not found.any():
            raise InputError(f"rows: no {what}; mark at least one cell {letter!r}")
        return found

    def shape(self) -> tuple[int, ...]:
        """(height, width) of the cells where they fill a rectangle, else (S,)."""
        height, width = (int(length) for length in np.ptp(self.cells, 0) + 1)
        return (height, width) if height * width == len(self.cells) else (len(self.cells),)

    def moves(self) -> Int[np.ndarray, "S 4"]:
        """Where each move leads; a move into a wall or off the map stays."""
        index = np.full(self.walls.shape, -1)
        index[tuple(self.cells.T)] = np.arange(len(self.cells))
        target = self.cells[:, None] + MOVES
        inside = np.all((target >= 0) & (target < np.array(self.walls.shape)), -1)
        row, column = np.moveaxis(np.where(inside[..., None], target, 0), -1, 0)
        destination = np.where(inside, index[row, column], -1)
        return np.where(destination >= 0, destination, np.arange(len(self.cells))[:, None])


def map_rows(rows: str | Sequence[str]) -> tuple[str, ...]:
    """The rows of a map, given as a text or as its rows: hashable, as static parts of a problem have to be.

    Raises:
      InputError: rows that are no texts.
    """
    rows = tuple(rows.strip("\n").split("\n") if isinstance(rows, str) else as_sequence("rows", rows, "texts"))
    for row in rows:
        if not isinstance(row, str):
            raise InputError(f"rows: expected texts, a letter per cell, got {row!r}; put quotes around each row")
    return rows


def parse_map(rows: str | Sequence[str]) -> Grid:
    """Parse a map, a text or its rows.

    Raises:
      InputError: it is not rectangular, or has no cell or more than there is room for.
    """
    rows = map_rows(rows)
    if not any(rows):
        raise InputError("rows: the map is empty; give at least one row")
    lengths = {len(row) for row in rows}
    if len(lengths) != 1:
        raise InputError(f"rows: they have lengths {sorted(lengths)}; pad them to one length")
    # Lists of successors, one per move made and one to stay, and those of a simulator.
    require_room_for("rows", len(MOVES) + 1, len(rows) * lengths.pop(), len(MOVES), copies=10)
    letters = np.array(rows)[:, None].view("U1")
    walls = letters == "x"
    if walls.all():
        raise InputError("rows: the map has walls only; leave at least one cell that is not 'x'")
    return Grid(walls, np.argwhere(~walls), letters[~walls])


def dynamics(grid: Grid, slip: Real[ArrayLike, ""], kind: str, entry: Float[Array, " S"] | None = None) -> Transition:
    """The chosen move with probability 1 - slip, each other one with slip / 3; `kind` dense, successor or stencil.

    A stencil is one of moves and staying on a map without walls inside, and on others as many bands as
    the moves have offsets in the list of cells.

    Args:
      entry: see `move_lists`.

    Raises:
      InputError: a kind that does not exist, a slip outside [0, 1) (where it is known), or a map with too
        many offsets for a stencil.
    """
    moves = grid.moves()
    states, actions = moves.shape
    if kind == "stencil":
        slip = _as_slip(slip)
        successor = _successors(moves, entry is not None)  # numpy's: a stencil's offsets are static
        return StencilTransition.from_lists(successor, _probabilities(jnp.asarray(moves), slip, entry), grid.shape())
    if kind not in ("successor", "dense"):
        raise InputError(f"transition: expected 'dense', 'successor' or 'stencil', got {kind!r}")
    lists = move_lists(jnp.asarray(moves, jnp.int32), slip, entry)
    if kind == "successor":
        return lists
    # The kernel, its checks, and the copy that an MDP makes of it.
    size = 3 * states * actions * states * lists.dtype.itemsize
    remedy = "take a smaller map, or transition='successor'"
    if states * actions * states >= 2**31:  # XLA aborts the process
        raise InputError(f"rows: a dense transition of {states} cells has 2^31 entries or more; {remedy}")
    require_room("rows", size, f"a dense transition of {states} cells", remedy)
    return DenseTransition(_dense(lists.successor, lists.probability))


def move_lists(
    moves: Int32[Array, "S A"], slip: Real[ArrayLike, ""], entry: Float[Array, " S"] | None = None
) -> SuccessorTransition:
    """The chosen move with probability 1 - slip, each other one with equal shares of slip; differentiable.

    Args:
      moves: where each leads.
      entry: the probability that whoever moves to a cell gets in, and does not stay where it was. It is
        drawn anew with every move. None is 1 everywhere.

    Raises:
      InputError: a slip outside [0, 1) (where it is known).
    """
    return SuccessorTransition(*_move_lists(moves, _as_slip(slip), entry))


def _as_slip(slip: Real[ArrayLike, ""]) -> Float[Array, ""]:
    slip = as_float("slip", slip)
    require_fraction("slip", slip, "0 is none, 0.75 a random move")
    return slip


@jax.jit
def _move_lists(
    moves: Int32[Array, "S A"], slip: Float[Array, ""], entry: Float[Array, " S"] | None
) -> tuple[Int32[Array, "K S A"], Float[Array, "K S A"]]:
    return _successors(moves, entry is not None, jnp), _probabilities(moves, slip, entry)


def _successors(moves: Any, may_stay: bool, xp: Any = np) -> Any:
    """Where each move that is made leads, [made, from, chosen], and after them, if one may stay, the state itself."""
    states, actions = moves.shape
    made = xp.broadcast_to(moves.T[:, :, None], (actions, states, actions))
    if not may_stay:
        return made
    here = xp.broadcast_to(xp.arange(states, dtype=moves.dtype)[:, None], (1, states, actions))
    return xp.concatenate([made, here])


@jax.jit
def _probabilities(
    moves: Int[Array, "S A"], slip: Float[Array, ""], entry: Float[Array, " S"] | None
) -> Float[Array, "K S A"]:
    """Those of `_successors`, in the same shape."""
    states, actions = moves.shape
    made = jnp.where(jnp.eye(actions, dtype=bool), 1 - slip, slip / (actions - 1))  # [chosen, made]
    probability = jnp.broadcast_to(made.T[:, None, :], (actions, states, actions))
    if entry is None:
        return probability
    inside = probability * entry.astype(made.dtype)[_successors(moves, False, jnp)]
    return jnp.concatenate([inside, jnp.sum(probability - inside, 0)[None]])


@jax.jit
def _dense(successor: Int32[Array, "K S A"], probability: Float[Array, "K S A"]) -> Float[Array, "S A S"]:
    """Lists of successors as P."""
    _, states, actions = successor.shape
    state, action = np.indices((states, actions))
    kernel = jnp.zeros((states, actions, states), probability.dtype)
    return kernel.at[state, action, successor].add(probability)
