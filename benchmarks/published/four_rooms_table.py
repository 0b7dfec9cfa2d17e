"""Four Rooms: the nine cells of the published table (Thoma et al. 2024), by basin hopping with M-SoBiRL.

    python -m benchmarks.published.four_rooms_table  # under a quarter of an hour on two cores
    python -m benchmarks.published.four_rooms_table --seeds 2 --descents 4 --out /tmp/table

Ten seeds a cell, one rule for all cells: from w ~ N(0, 0.01^2), descents of M-SoBiRL with Adam that begin at up to
`HEAT` times the temperature and cool to the temperature itself, from starts that `basin_hopping` draws; the best end
is the seed's, judged at the cell's own temperature. Every seed counts. Beside it the first of these descents alone.
All values are computed again in numpy from the weights alone. Writes results/four_rooms_table.json and .md, and the
ends of all seeds as results/four_rooms_weights.npz: weights [9, 10, 105] (cells of the map in row-major order, then the
unused entry), temperature [9], beta [9]. Interrupted and started again it goes on.
"""

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # small factorizations do not gain by threads

import jax
import numpy as np
import optax

import bilevel_jax as bj
from benchmarks.common.figures import Figures
from benchmarks.common.timing import RESULTS, machine
from bilevel_jax.algorithms import Cooling, UpperLevel, basin_hopping, m_sobirl

CELLS = [(temperature, beta) for temperature in (0.001, 0.003, 0.005) for beta in (1.0, 3.0, 5.0)]
# The best number of the published table in each cell.
PUBLISHED = dict(zip(CELLS, (0.91, 0.51, 0.46, 1.00, 0.73, 0.32, 1.28, 1.13, 0.97), strict=True))
SEEDS = 10
DESCENTS = 50
DESCENT = 200
HEAT = 3.0
COOLED = 120
RATE = 0.3
SPREAD = 3.0
FRESH = 0.7


OPTIMIZER = optax.adam(optax.cosine_decay_schedule(RATE, DESCENT))
# One Newton step an iteration, from the last V: as x comes to rest V becomes exact.
SOLVER = bj.PolicyIteration(max_iterations=2)


def run(cell: tuple[float, float], seed: int, descents: int) -> dict[str, Any]:
    """One seed of a cell: its weights, values after each descent, and the seconds that it took."""
    problem = bj.problems.make("four_rooms", temperature=cell[0], beta=cell[1])
    upper = UpperLevel(OPTIMIZER, temperature=Cooling(HEAT, COOLED))
    descent = m_sobirl(problem, upper, solver=SOLVER, adjoint=bj.Direct())
    algorithm = basin_hopping(descent, descent=DESCENT, spread=SPREAD, fresh=FRESH)
    key = jax.random.key(seed)
    started = time.perf_counter()
    state = algorithm.init(key, problem.start(key))
    values = []
    for descent in range(descents):
        state, info = algorithm.step(jax.random.fold_in(key, descent), state)
        values.append(-float(info.objective))
    return {"weights": np.asarray(state.x).tolist(), "values": values, "seconds": time.perf_counter() - started}


def work(task: tuple[tuple[float, float], int, int]) -> tuple[str, dict[str, Any]]:
    jax.config.update("jax_enable_x64", True)
    cell, seed, descents = task
    return key_of(cell, seed, descents), run(cell, seed, descents)


def key_of(cell: tuple[float, float], seed: int, descents: int) -> str:
    return f"temperature {cell[0]:g}, beta {cell[1]:g}, seed {seed}, {descents} descents"


def evaluate(weights: np.ndarray, temperature: float, beta: float) -> float:
    """The designer's value in numpy, from the published description: soft policy iteration, one linear solve."""
    walls = np.array([list(row) for row in bj.problems.four_rooms.ROWS]) == "x"
    cells = np.argwhere(~walls)
    index = {tuple(cell): state for state, cell in enumerate(cells)}
    moves = ((-1, 0), (0, 1), (1, 0), (0, -1))
    lands = np.array([[index.get((r + i, c + j), state) for i, j in moves] for state, (r, c) in enumerate(cells)])
    arrives = np.eye(len(cells))[lands]  # [S, move made, S]
    made = np.where(np.eye(4, dtype=bool), 1 - 0.44, 0.44 / 3)
    going = np.einsum("am,smt->sat", made, arrives)
    shares = np.exp(weights - weights.max())
    penalty = 0.2 * (shares / shares.sum())[:-1]
    total = 0.0
    for goal in (index[1, 9], index[11, 11]):
        at_goal = np.arange(len(cells)) == goal
        ahead = np.where(at_goal, 0.0, 0.99)[:, None, None] * going
        reward = np.where(at_goal, 1.0, -penalty)[:, None] * np.ones(4)
        value, policy = np.zeros(len(cells)), np.full(reward.shape, 0.25)
        for _ in range(200):
            entropy = -temperature * np.sum(policy * np.log(np.maximum(policy, 1e-300)), 1)
            earned = np.sum(policy * reward, 1) + entropy
            chain = np.einsum("sa,sat->st", policy, ahead)
            previous, value = value, np.linalg.solve(np.eye(len(cells)) - chain, earned)
            q = reward + ahead @ value
            policy = np.exp((q - q.max(1, keepdims=True)) / temperature)
            policy /= policy.sum(1, keepdims=True)
            if np.abs(value - previous).max() < 1e-13:
                break
        else:
            raise RuntimeError("soft policy iteration has not converged")
        designer = np.where(np.arange(len(cells)) == index[8, 4], 1.0, 0.0) - beta * penalty.sum() * at_goal
        chain = np.einsum("sa,sat->st", policy, ahead)
        total += np.linalg.solve(np.eye(len(cells)) - chain, designer)[index[4, 1]] / 2
    return total


def report(found: dict[tuple[float, float], list[dict[str, Any]]]) -> tuple[dict[str, Any], str]:
    """Figures of each cell, and the table in Markdown."""
    rows, lines = {}, []
    for cell, runs in found.items():
        ends = np.array([evaluate(np.array(run["weights"]), *cell) for run in runs])
        claimed = np.array([run["values"][-1] for run in runs])
        if np.abs(ends - claimed).max() > 1e-7:
            raise RuntimeError(f"{cell}: numpy gives {ends}, the library {claimed}")
        first = np.array([run["values"][0] for run in runs])
        rows[f"temperature {cell[0]:g}, beta {cell[1]:g}"] = {
            "published": PUBLISHED[cell],
            "mean": ends.mean(),
            "standard_error": ends.std(ddof=1) / len(ends) ** 0.5,
            "least": ends.min(),
            "largest": ends.max(),
            "one_descent": first.mean(),
            "one_descent_standard_error": first.std(ddof=1) / len(first) ** 0.5,
            "seconds": sum(run["seconds"] for run in runs),
        }
        row = rows[f"temperature {cell[0]:g}, beta {cell[1]:g}"]
        entries = [
            *(f"{number:g}" for number in cell),
            f"{PUBLISHED[cell]:.2f}",
            f"**{row['mean']:.3f} +- {row['standard_error']:.3f}**",
            f"{row['least']:.3f} to {row['largest']:.3f}",
            f"{row['one_descent']:.3f} +- {row['one_descent_standard_error']:.3f}",
        ]
        lines.append(f"| {' | '.join(entries)} |")
    head = [
        "| temperature | beta | best published | basin hopping, mean of seeds | from, to | its first descent alone |",
        "|---|---|---|---|---|---|",
    ]
    return rows, "\n".join([*head, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--descents", type=int, default=DESCENTS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--store", type=Path, default=Path("runs/four_rooms_table.json"), help="finished runs")
    options = parser.parse_args()
    store = Figures(options.store)
    tasks = [(cell, seed, options.descents) for seed in range(options.seeds) for cell in CELLS]
    left = [task for task in tasks if key_of(*task) not in store.cells]
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for key, made in pool.imap_unordered(work, left):
            store.measure(key, lambda made=made: made)
    wall = time.perf_counter() - started
    found = {
        cell: [store.cells[key_of(cell, seed, options.descents)] for seed in range(options.seeds)] for cell in CELLS
    }
    rows, table = report(found)
    rule = {"seeds": options.seeds, "descents": options.descents, "descent": DESCENT, "heat": HEAT, "cooled": COOLED}
    rule |= {"rate": RATE, "spread": SPREAD, "fresh": FRESH}
    options.out.mkdir(parents=True, exist_ok=True)
    figures = {"machine": machine(), "rule": rule, "wall_seconds": wall, "runs": len(left), "cells": rows}
    (options.out / "four_rooms_table.json").write_text(json.dumps(figures, indent=2) + "\n")
    (options.out / "four_rooms_table.md").write_text(f"# Four Rooms\n\n{(__doc__ or '').strip()}\n\n{table}\n")
    np.savez(
        options.out / "four_rooms_weights.npz",
        weights=np.array([[run["weights"] for run in runs] for runs in found.values()]),
        temperature=np.array([temperature for temperature, _ in CELLS]),
        beta=np.array([beta for _, beta in CELLS]),
    )
    print(f"{len(left)} runs in {wall:.0f} s\n{table}")


if __name__ == "__main__":
    main()
