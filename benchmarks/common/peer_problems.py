"""The problems on which solvers are compared, made by numpy from a seed, and their solutions by none of the rivals.

- garnet: A = 4 actions, K = 5 distinct random successors a pair, exponential weights, rewards N(0, 1).
- rooms: a square grid cut into 4 x 4 rooms with a door in each wall; each step costs 1 until the goal, a corner
  where the process stays for nothing. Walls are states, too, that nothing enters, so that S is the area.
- cells: an open square grid; being in a cell pays N(0, 1), drawn once a cell.

In both grids the chosen move is made with probability 0.9 and each other one with 1/30; a move into a wall stays.
"""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import scipy.sparse as sparse
from scipy.sparse.linalg import bicgstab

ACTIONS = 4
SUCCESSORS = 5
SLIP = 0.1
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
# Solutions are known to this, relative to max |V*|.
REFERENCE_ERROR = 1e-10


@dataclasses.dataclass(frozen=True)
class Problem:
    """One MDP: `successor` int32[K, S, A], `probability` [K, S, A], `reward` [S, A]; temperature 0 is unregularized."""

    successor: np.ndarray
    probability: np.ndarray
    reward: np.ndarray
    discount: float
    temperature: float
    grid: tuple[int, int] | None

    @property
    def states(self) -> int:
        return self.reward.shape[0]

    @property
    def actions(self) -> int:
        return self.reward.shape[1]

    def matrix(self, actions_first: bool) -> sparse.csr_matrix:
        """P as [A S, S] with rows a S + s, or as [S A, S] with rows s A + a; entries merged and sorted."""
        order = (2, 1, 0) if actions_first else (1, 2, 0)
        columns = self.successor.transpose(order).reshape(-1)
        values = self.probability.transpose(order).reshape(-1)
        slots = self.successor.shape[0]
        rows = self.states * self.actions
        matrix = sparse.csr_matrix((values, columns, np.arange(rows + 1) * slots), shape=(rows, self.states))
        matrix.sum_duplicates()
        return matrix


def make(name: str, states: int, discount: float, temperature: float = 0.0) -> Problem:
    """One of the problems above, of `states` states (grids: the nearest square)."""
    rng = np.random.default_rng([states, sum(map(ord, name))])
    if name == "garnet":
        shape = (SUCCESSORS, states, ACTIONS)
        weight = rng.exponential(size=shape) + 1e-3
        parts = _distinct(rng, shape, states), weight / weight.sum(0), rng.standard_normal(shape[1:])
        return Problem(*parts, discount, temperature, None)
    side = round(states**0.5)
    walls = _rooms(side, rng) if name == "rooms" else np.zeros((side, side), bool)
    successor, probability = _grid(walls, goal=name == "rooms")
    if name == "rooms":
        reward = np.where(walls.reshape(-1), 0.0, -1.0)
        reward[-1] = 0
    elif name == "cells":
        reward = rng.standard_normal(side * side)
    else:
        raise ValueError(f"no problem is called {name!r}")
    reward = np.repeat(reward[:, None], ACTIONS, 1)
    return Problem(successor, probability, reward, discount, temperature, (side, side))


def _distinct(rng: np.random.Generator, shape: tuple[int, ...], states: int) -> np.ndarray:
    drawn = rng.integers(states, size=shape, dtype=np.int32)
    while True:
        ordered = np.sort(drawn, 0)
        again = (ordered[1:] == ordered[:-1]).any(0)
        if not again.any():
            return drawn
        drawn[:, again] = rng.integers(states, size=(shape[0], again.sum()), dtype=np.int32)


def _rooms(side: int, rng: np.random.Generator) -> np.ndarray:
    walls = np.zeros((side, side), bool)
    bounds = [round(part * side / 4) for part in range(5)]
    for line in bounds[1:4]:
        walls[line] = walls[:, line] = True
    for line in bounds[1:4]:
        for low, high in itertools.pairwise(bounds):
            walls[line, rng.integers(low + 1, high)] = False
            walls[rng.integers(low + 1, high), line] = False
    return walls


def _grid(walls: np.ndarray, goal: bool) -> tuple[np.ndarray, np.ndarray]:
    side = walls.shape[0]
    state = np.arange(side * side, dtype=np.int32).reshape(side, side)
    free = np.pad(~walls, 1)
    moved = []
    for row, column in MOVES:
        inside = (slice(1 + row, 1 + row + side), slice(1 + column, 1 + column + side))
        moved.append(np.where(free[inside] & ~walls, np.pad(state, 1)[inside], state).reshape(-1))
    destination = np.stack(moved)
    if goal:
        destination[:, -1] = side * side - 1
    made = np.where(np.eye(ACTIONS, dtype=bool), 1 - SLIP, SLIP / (ACTIONS - 1))  # [slot, action]
    shape = (ACTIONS, side * side, ACTIONS)
    return (
        np.ascontiguousarray(np.broadcast_to(destination[:, :, None], shape)),
        np.ascontiguousarray(np.broadcast_to(made[:, None, :], shape)),
    )


def stencil(problem: Problem) -> tuple[tuple[tuple[int, int], ...], np.ndarray]:
    """A grid as offsets (the moves and staying) and the probability of each, [5, S, A]."""
    assert problem.grid is not None
    state = np.arange(problem.states)[None, :, None]
    stays = problem.successor == state
    left = np.where(stays, 0, problem.probability)
    return (*MOVES, (0, 0)), np.concatenate([left, (problem.probability * stays).sum(0, keepdims=True)])


def sweep(matrix: sparse.csr_matrix, problem: Problem, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(T V [S], Q [A, S]) with the matrix of `matrix(actions_first=True)`."""
    q = problem.reward.T + problem.discount * (matrix @ value).reshape(problem.actions, -1)
    if problem.temperature == 0:
        return q.max(0), q
    top = q.max(0)
    return top + problem.temperature * np.log(np.exp((q - top) / problem.temperature).sum(0)), q


def bounds(problem: Problem, value: np.ndarray, backup: np.ndarray) -> tuple[np.ndarray, float]:
    """T V moved to the middle of MacQueen's bounds, and how far V* can be from it."""
    gap = backup - value
    factor = problem.discount / (1 - problem.discount)
    return backup + factor * (gap.min() + gap.max()) / 2, factor * (gap.max() - gap.min()) / 2


def _gauss_seidel():
    """(successor, probability, reward, discount, temperature, value, backwards): one sweep, in place."""
    import numba  # the processes that find their reference in the cache do without

    @numba.njit
    def run(successor, probability, reward, discount, temperature, value, backwards):
        slots, states, actions = successor.shape
        q = np.empty(actions)
        for step in range(states):
            state = states - 1 - step if backwards else step
            for action in range(actions):
                following = 0.0
                for slot in range(slots):
                    following += probability[slot, state, action] * value[successor[slot, state, action]]
                q[action] = reward[state, action] + discount * following
            value[state] = q.max()
            if temperature > 0:
                value[state] += temperature * np.log(np.exp((q - q.max()) / temperature).sum())

    return run


def reference(problem: Problem, cache: Path | None = None) -> np.ndarray:
    """V*[S] to REFERENCE_ERROR, proven by MacQueen's bounds at the last V, however that V was found.

    Policy iteration whose linear systems scipy's BiCGStab solves to two digits, and in between 20 Gauss-Seidel
    sweeps, forwards and backwards in turn, which carry a grid's values across it at once.
    """
    if cache is not None and cache.exists():
        return np.load(cache)
    matrix = problem.matrix(actions_first=True)
    value = np.zeros(problem.states)
    rows = np.arange(problem.states)
    gauss_seidel = _gauss_seidel()
    parts = problem.successor, problem.probability, problem.reward, problem.discount, problem.temperature
    for _ in range(200):
        for turn in range(20):
            gauss_seidel(*parts, value, turn % 2 == 1)
        backup, q = sweep(matrix, problem, value)
        best, bound = bounds(problem, value, backup)
        if bound <= REFERENCE_ERROR * np.abs(best).max():
            break
        if problem.temperature == 0:
            policy = matrix[q.argmax(0) * problem.states + rows]
        else:
            weight = np.exp((q - backup) / problem.temperature)
            policy = sum(
                sparse.diags_array(weight[a]) @ matrix[a * problem.states : (a + 1) * problem.states]
                for a in range(problem.actions)
            )
        system = sparse.eye_array(problem.states, format="csr") - problem.discount * policy
        gap = backup - value
        value = value + bicgstab(system, gap, x0=gap, rtol=1e-2, maxiter=500)[0]
    else:
        raise RuntimeError(f"no reference: it is known to {bound:.1e} only")
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, best)
    return best
