"""The cells of `solvers_against_peers.py` that are close, again: both contenders in one process, in turns.

    python -m benchmarks.solvers.close_cells [--below 2] [--seconds 3] [--again]

There each method has a process of its own, minutes apart, and on a shared machine the same solve takes up to twice as
long in one process as in the next. Where the fastest peer took less than `--below` times what `Auto` took, both
are timed here as A B A B ... for `--seconds`: the peer at the loosest tolerance that was accurate there, `Auto` by
what it has to prove, and at the loosest tolerance that is accurate, as peers stop. Each cell has a fresh process;
figures are medians, `ratio` that of the peer's time over ours in the same turn.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import peer_problems
from benchmarks.common.figures import Figures
from benchmarks.common.peers import PEERS, quiet
from benchmarks.solvers.solvers_against_peers import ACCURACY, RESULTS, Cell, read, timed

MOST = 120.0


def close_ones(below: float) -> list[tuple[Cell, str, int, int]]:
    """(cell of our Auto, the fastest peer, its decade, our own decade as peers stop)."""
    found: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in read(RESULTS).values():
        if row["status"] == "ok":
            place = (row["problem"], int(row["states"]), float(row["discount"]), float(row["temperature"]))
            found.setdefault(place, {})[row["method"]] = row
    close = []
    for place, rows in found.items():
        autos = [row for name, row in rows.items() if name.startswith("ours auto")]
        peers = [row for name, row in rows.items() if name in PEERS]
        if not (autos and peers):
            continue
        auto, peer = (min(group, key=lambda row: float(row["seconds"])) for group in (autos, peers))
        if float(peer["seconds"]) < below * float(auto["seconds"]):
            problem, states, discount, temperature = place
            ours = Cell(problem, states, discount, temperature, auto["method"])
            close.append((ours, peer["method"], int(peer["decade"]), int(auto["tried_decade"])))
    return close


def duel(cell: Cell, rival: str, decade: int, own_decade: int, seconds: float, cache: Path) -> dict[str, Any]:
    """Both, in turns, in this process."""
    from benchmarks.common.ours import OURS

    problem = peer_problems.make(cell.problem, cell.states, cell.discount, cell.temperature)
    right = peer_problems.reference(problem, cache / ("-".join(map(str, cell[:-1])) + ".npy"))
    scale = float(np.abs(right).max())
    target = ACCURACY * scale
    solve = OURS[cell.method].build(problem)
    peer = PEERS[rival](problem)
    with quiet():
        peer.warm_up()
        contenders = {
            "peer": functools.partial(peer.solve, target * 10.0**decade),
            "ours": functools.partial(solve, target),
            "ours, as peers stop": functools.partial(solve, target * 10.0**own_decade),
        }
        taken: dict[str, list[float]] = {name: [] for name in contenders}
        errors = {}
        for name, call in contenders.items():  # warm-up
            peer.prepare()
            _, result = timed(call, MOST)
            value = peer.value(result) if name == "peer" else np.asarray(result.value)
            errors[name] = float(np.abs(value - right).max()) / scale
        start = time.perf_counter()
        while len(taken["peer"]) < 5 or time.perf_counter() - start < seconds:
            for name, call in contenders.items():
                peer.prepare()
                taken[name].append(timed(call, MOST)[0])
    turns = list(zip(*taken.values(), strict=True))
    return {
        "peer": rival,
        "ours": cell.method,
        "seconds": {name: statistics.median(times) for name, times in taken.items()},
        "least": {name: min(times) for name, times in taken.items()},
        "runs": len(turns),
        "relative_error": errors,
        "ratio": statistics.median(a / b for a, b, _ in turns),
        "ratio_as_peers_stop": statistics.median(a / c for a, _, c in turns),
    }


def in_process(*arguments: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.solvers.close_cells", "--cell", json.dumps(arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    """Measure what is not measured yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--below", type=float, default=2.0, help="times")
    parser.add_argument("--seconds", type=float, default=3.0, help="a cell")
    parser.add_argument("--cache", default=str(Path(tempfile.gettempdir()) / "bilevel_jax_references"))
    parser.add_argument("--name", default="close_cells", help="of the file in benchmarks/results, or a path *.json")
    parser.add_argument("--again", action="store_true", help="measure the chosen cells though they are there")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        cell, rival, decade, own_decade, seconds, cache = json.loads(options.cell)
        print(json.dumps(duel(Cell(*cell), rival, decade, own_decade, seconds, Path(cache))))
        return
    figures = Figures(options.name, options.again)
    for cell, *rest in close_ones(options.below):
        call = functools.partial(in_process, cell, *rest, options.seconds, options.cache)
        figures.measure(f"{cell.problem} {cell.states} {cell.discount:g} {cell.temperature:g}", call)
    print("| problem | peer, ms | ours, ms | ratio | as peers stop |\n|---|---|---|---|---|")
    for key, row in figures.cells.items():
        peer, own = (1e3 * row["seconds"][name] for name in ("peer", "ours"))
        times = f"{row['ratio']:.2f} | {row['ratio_as_peers_stop']:.2f}"
        print(f"| {key} | {peer:.3g} ({row['peer']}) | {own:.3g} | {times} |")


if __name__ == "__main__":
    main()
