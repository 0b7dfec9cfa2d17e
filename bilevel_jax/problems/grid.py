"""Grid worlds from plain-text maps: `x` is a wall, anything else a cell; cells in row-major order.

A problem gives letters a meaning: `s` is where the agent starts, `g` its goal.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.errors import InputError
from bilevel_jax.memory import require_room
from bilevel_jax.transitions import DenseTransition, StencilTransition, SuccessorTransition, Transition
from bilevel_jax.validation import as_float, require_fraction

# up, right, down, left, as (row, column) steps
MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])


class Grid(NamedTuple):
    """A parsed map: `walls` bool[H, W]; `cells` int[S, 2], (row, column) of each state; and its letter, [S]."""

    walls: np.ndarray
    cells: np.ndarray
    letters: np.ndarray

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

    def marked(self, letter: str, what: str = "", *, once: bool = False) -> np.ndarray:
        """Which states have a letter, bool [S].

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

    def moves(self) -> np.ndarray:
        """Where each move leads, int[S, 4]; a move into a wall or off the map stays."""
        index = np.full(self.walls.shape, -1)
        index[tuple(self.cells.T)] = np.arange(len(self.cells))
        target = self.cells[:, None] + MOVES
        inside = np.all((target >= 0) & (target < np.array(self.walls.shape)), -1)
        row, column = np.moveaxis(np.where(inside[..., None], target, 0), -1, 0)
        destination = np.where(inside, index[row, column], -1)
        return np.where(destination >= 0, destination, np.arange(len(self.cells))[:, None])


def map_rows(rows: str | Sequence[str]) -> tuple[str, ...]:
    """The rows of a map, given as a text or as its rows: hashable, as static parts of a problem have to be."""
    return tuple(rows.strip("\n").split("\n") if isinstance(rows, str) else rows)


def parse_map(rows: str | Sequence[str]) -> Grid:
    """Parse a map, a text or its rows. Raises InputError if it is not rectangular or has no cell."""
    rows = map_rows(rows)
    if not rows:
        raise InputError("rows: the map is empty; give at least one row")
    if len({len(row) for row in rows}) != 1:
        raise InputError(f"rows: they have lengths {sorted({len(row) for row in rows})}; pad them to one length")
    letters = np.array([list(row) for row in rows])
    walls = letters == "x"
    if walls.all():
        raise InputError("rows: the map has walls only; leave at least one cell that is not 'x'")
    return Grid(walls, np.argwhere(~walls), letters[~walls])


def dynamics(grid: Grid, slip: jax.Array | float, kind: str, entry: jax.Array | None = None) -> Transition:
    """The chosen move with probability 1 - slip, each other one with slip / 3; `kind` dense, successor or stencil.

    A stencil is one of moves and staying on a map without walls inside, and on others as many bands as
    the moves have offsets in the list of cells.

    Args:
      entry: [S], see `move_lists`.

    Raises:
      InputError: a kind that does not exist, a slip outside [0, 1) (where it is known), or a map with too
        many offsets for a stencil.
    """
    lists = move_lists(jnp.asarray(grid.moves(), jnp.int32), slip, entry)
    if kind == "successor":
        return lists
    if kind == "stencil":
        return StencilTransition.from_successors(lists, grid.shape())
    if kind != "dense":
        raise InputError(f"transition: expected 'dense', 'successor' or 'stencil', got {kind!r}")
    states, actions = lists.shape
    # The kernel, its checks, and the copy that an MDP makes of it.
    size = 3 * states * actions * states * lists.dtype.itemsize
    remedy = "take a smaller map, or transition='successor'"
    if states * actions * states >= 2**31:  # XLA aborts the process
        raise InputError(f"rows: a dense transition of {states} cells has 2^31 entries or more; {remedy}")
    require_room("rows", size, f"a dense transition of {states} cells", remedy)
    return DenseTransition(_dense(lists.successor, lists.probability))


def move_lists(moves: jax.Array, slip: jax.Array | float, entry: jax.Array | None = None) -> SuccessorTransition:
    """The chosen move with probability 1 - slip, each other one with equal shares of slip; differentiable.

    Args:
      moves: where each leads, int32[S, A].
      entry: [S], the probability that whoever moves to a cell gets in, and does not stay where it was. It is
        drawn anew with every move. None is 1 everywhere.

    Raises:
      InputError: a slip outside [0, 1) (where it is known).
    """
    slip = as_float("slip", slip)
    require_fraction("slip", slip, "0 is none, 0.75 a random move")
    return SuccessorTransition(*_move_lists(moves, slip, entry))


@jax.jit
def _move_lists(moves: jax.Array, slip: jax.Array, entry: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    states, actions = moves.shape
    made = jnp.where(jnp.eye(actions, dtype=bool), 1 - slip, slip / (actions - 1))  # chosen, made
    shape = (actions, states, actions)  # made, from, chosen
    successor = jnp.broadcast_to(moves.T[:, :, None], shape)
    probability = jnp.broadcast_to(made.T[:, None, :], shape)
    if entry is not None:
        inside = probability * entry.astype(made.dtype)[successor]
        here = jnp.broadcast_to(jnp.arange(states, dtype=jnp.int32)[:, None], shape[1:])
        successor = jnp.concatenate([successor, here[None]])
        probability = jnp.concatenate([inside, jnp.sum(probability - inside, 0)[None]])
    return successor, probability


@jax.jit
def _dense(successor: jax.Array, probability: jax.Array) -> jax.Array:
    """Lists [K, S, A] as P[S, A, S]."""
    _, states, actions = successor.shape
    state, action = np.indices((states, actions))
    kernel = jnp.zeros((states, actions, states), probability.dtype)
    return kernel.at[state, action, successor].add(probability)
