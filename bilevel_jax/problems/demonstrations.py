"""Demonstrations in a file: one row per step, with the columns state, action, time and episode.

A .npz file (numpy's) holds these four arrays, each [N]. A .csv file has their names in its first line, and N lines of
numbers. Other arrays and columns are ignored, and rows may be in any order. All four are whole numbers:
  state: from 0 to S - 1; for a map, its free cells in row-major order.
  action: from 0 to A - 1; for a map, up, right, down, left.
  time: 0 in the first step of an episode, then 1, 2, ... without gaps.
  episode: any number that its steps share.
"""

import zipfile
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int64, Real, Shaped

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import is_known
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.transitions import SuccessorTransition

OPTION = "demonstrations_file"
COLUMNS = ("state", "action", "time", "episode")


def visits_of_file(path: str, mdp: MDP) -> Float[Array, "S A"]:
    """Return the mean over the file's episodes of sum_t discount^t 1{s_t = s, a_t = a}.

    The process says which steps are possible. Its transition is a `SuccessorTransition`, and it has one discount.

    Raises:
      InputError: the file cannot be read or lacks a column; entries are no whole numbers or out of range; an episode
        has a gap or a step twice; a start or a step has probability 0 in the process.
    """
    state, action, time, episode = _read(path)
    for name, column, size in (("state", state, mdp.num_states), ("action", action, mdp.num_actions)):
        _require(path, (column >= 0) & (column < size), column, name, f"expected 0 to {size - 1}")
    order = np.lexsort((time, episode))
    state, action, time, episode = (column[order] for column in (state, action, time, episode))
    first = np.append(True, episode[1:] != episode[:-1])
    expected = np.where(first, 0, np.append(0, time[:-1] + 1))
    _require_steps(path, time == expected, episode, time, "the times of an episode are 0, 1, 2, ..., each once")
    if is_known(mdp.initial):
        possible = ~first | (np.asarray(mdp.initial)[state] > 0)
        remedy = "no process of this map starts in that state; leave the letter s out to start anywhere"
        _require_steps(path, possible, episode, time, remedy)
    _require_moves(path, mdp, state, action, time, episode, first)
    weight = mdp.discount ** jnp.asarray(time, mdp.discount.dtype) / int(first.sum())
    return jnp.zeros_like(mdp.reward).at[state, action].add(weight)


def _read(path: str) -> list[Int64[np.ndarray, " N"]]:
    """The four columns."""
    remedy = f"give a .npz or .csv with {', '.join(COLUMNS)}"
    if not path.endswith((".npz", ".csv")):
        raise InputError(f"{OPTION}: {path!r} ends in neither .npz nor .csv; {remedy}")
    try:
        found = _read_npz(path) if path.endswith(".npz") else _read_csv(path)
    except (OSError, UnicodeDecodeError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{OPTION}: {path} cannot be read ({error}); {remedy}") from None
    missing = [name for name in COLUMNS if name not in found]
    if missing:
        raise InputError(
            f"{OPTION}: {path} has no {', '.join(missing)}, only {', '.join(found) or 'nothing'}; {remedy}"
        )
    columns = [found[name] for name in COLUMNS]
    shapes = {name: list(column.shape) for name, column in zip(COLUMNS, columns, strict=True)}
    if columns[0].ndim != 1 or len({column.shape for column in columns}) > 1:
        raise InputError(f"{OPTION}: {path} has shapes {shapes}; expected one number for each step, [N]")
    if columns[0].size == 0:
        raise InputError(f"{OPTION}: {path} has no steps; {remedy}")
    return [_whole(path, name, column) for name, column in zip(COLUMNS, columns, strict=True)]


def _read_npz(path: str) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _read_csv(path: str) -> dict[str, np.ndarray]:
    with open(path, encoding="utf-8-sig") as file:
        names = [name.strip() for name in file.readline().split(",")]
        lines = [line for line in file if line.strip()]
    used = [names.index(name) for name in COLUMNS if name in names]
    if not used or not lines:
        return {names[place]: np.zeros(0) for place in used} | {name: np.zeros(0) for name in names if name}
    table = np.loadtxt(lines, delimiter=",", usecols=used, ndmin=2)
    return {names[place]: column for place, column in zip(used, table.T, strict=True)}


def _whole(path: str, name: str, column: Shaped[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
    if not (np.issubdtype(column.dtype, np.integer) or np.issubdtype(column.dtype, np.floating)):
        raise InputError(f"{OPTION}: {path} has a {name} of {column.dtype}; expected whole numbers")
    known = np.isfinite(column) & (np.abs(column.astype(float)) < 2**53)
    whole = np.where(known, column, 0).astype(np.int64)
    _require(path, known & (whole == column), column, name, "expected a whole number")
    return whole


def _require(path: str, good: Bool[np.ndarray, " N"], column: Real[np.ndarray, " N"], name: str, remedy: str) -> None:
    """Raise InputError that names the first row, from 0, in which a column is not good."""
    if not good.all():
        row = int(np.argmin(good))
        raise InputError(f"{OPTION}: {path}, step {row} of the file: {name} is {column[row]:g}; {remedy}")


def _require_steps(
    path: str,
    good: Bool[np.ndarray, " N"],
    episode: Int64[np.ndarray, " N"],
    time: Int64[np.ndarray, " N"],
    remedy: str,
) -> None:
    if not good.all():
        row = int(np.argmin(good))
        raise InputError(f"{OPTION}: {path}, episode {episode[row]}, time {time[row]}: {remedy}")


def _require_moves(path: str, mdp: MDP, state, action, time, episode, first) -> None:
    """Raise InputError where a step leads to a state that has probability 0."""
    transition: Any = mdp.transition
    if not (isinstance(transition, SuccessorTransition) and is_known(transition.successor, transition.probability)):
        return
    successor, probability = np.asarray(transition.successor), np.asarray(transition.probability)
    before, after = state[:-1], state[1:]
    leads = (successor[:, before, action[:-1]] == after) & (probability[:, before, action[:-1]] > 0)
    good = np.append(leads.any(0) | first[1:], True)
    remedy = "no move with that action leads to the next state in this process; look at rows and slip"
    _require_steps(path, good, episode, time, remedy)
