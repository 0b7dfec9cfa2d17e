"""One problem at a time: every solver of this library against those of other packages, to the same accuracy.

python -m benchmarks.solvers.solvers_against_peers          # everything that has no row yet: hours
python -m benchmarks.solvers.solvers_against_peers --quick  # 1,000 states only, seconds a solve at most
python -m benchmarks.solvers.solvers_against_peers --only 'garnet 10000 ' --only 'mdpsolver|ours'
python -m benchmarks.solvers.solvers_against_peers --table  # only the table and the picture of what is there

A cell is a problem (`peer_problems.py`), its size, its discount, its temperature and a method; it has a process of its
own, and a row of benchmarks/results/solvers_against_peers.csv, written when it is done; who has one is not run again,
unless it failed.
`--only` keeps the cells whose row key ("garnet 10000 0.99 0 mdpsolver vi") has a match of the regular expression;
given several times, of all of them.

Some cells are decided by the next smaller ones of the same problem and discount: a peer's method that took too long
takes longer yet, and above 20,000 states a setting that took more than 3 times its package's best is left out
(`--prune 0` leaves none out). Both have rows that say so.

Accuracy: |V - V*|_inf <= 1e-6 max |V*|, V* by `peer_problems.reference`. A peer is tried at decades of its own
tolerance, and its time is that of the loosest at which its true error passes. Ours are given the accuracy as their
tolerance, and have to prove it; `tried_seconds` is what they take by the peers' rule. Float64; medians (`repeat` says
of how many runs), of one run where a run or setting it up takes more than 10 seconds. Times of ours are of
`bilevel_jax.solve` called again: compiling is a column of its own.
"""

import argparse
import csv
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import peer_problems
from benchmarks.common.peers import PEERS, SOFT, JaxDP, quiet

RESULTS = Path(__file__).parents[1] / "results" / "solvers_against_peers.csv"
ACCURACY = 1e-6
DECADES = (4, -8)  # of the tolerance over the accuracy, from loose to tight
PRUNE, PRUNE_ABOVE = 3.0, 20_000
DISCOUNTS = (0.9, 0.99, 0.999)
SIZES = {
    "garnet": (10**3, 10**4, 10**5, 10**6),
    "rooms": (32**2, 100**2, 316**2, 1000**2),
    "cells": (32**2, 100**2, 316**2, 1000**2),
}
TEMPERATURE = 0.1  # of Shannon's entropy, in units of the reward
FIELDS = (
    *("problem", "states", "discount", "temperature", "method", "status", "seconds", "least", "most", "runs"),
    *(
        "compile_seconds",
        "tolerance",
        "decade",
        "relative_error",
        "steps",
        "products",
        "tried_seconds",
        "tried_decade",
        "load",
    ),
)


class Cell(NamedTuple):
    """What one row is about."""

    problem: str
    states: int
    discount: float
    temperature: float
    method: str

    @property
    def key(self) -> str:
        return f"{self.problem} {self.states} {self.discount:g} {self.temperature:g} {self.method}"


def cells(quick: bool) -> Iterator[Cell]:
    """Every cell, small ones first."""
    from benchmarks.common.ours import OURS

    for place in range(1 if quick else 4):
        for problem, sizes in SIZES.items():
            for discount in DISCOUNTS:
                for temperature in (0.0, TEMPERATURE):
                    grid = problem != "garnet"
                    ours = [name for name, entry in OURS.items() if grid or entry.form != "stencil"]
                    for method in (*(PEERS if temperature == 0 else SOFT), *ours):
                        yield Cell(problem, sizes[place], discount, temperature, method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,000 states only, at most 5 seconds a solve")
    parser.add_argument("--only", action="append", default=[], metavar="REGEX", help="cells whose key matches")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that one solve may take")
    parser.add_argument("--prune", type=float, default=PRUNE, metavar="TIMES", help="see above; 0: leave none out")
    parser.add_argument("--again", action="store_true", help="run the chosen cells though they have rows")
    parser.add_argument("--list", action="store_true", help="only print the keys of the chosen cells without a row")
    parser.add_argument("--table", action="store_true", help="only write the table and the picture")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV file")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "bilevel_jax_references")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell is not None:
        print(json.dumps(run(Cell(*json.loads(options.cell)), options)))
        return
    if not options.table:
        chosen = [cell for cell in cells(options.quick) if all(re.search(part, cell.key) for part in options.only)]
        if options.quick:
            options.limit = min(options.limit, 5.0)
        run_all(chosen, options)
    if not (options.table or options.list):
        write_machine(options.results.with_suffix(".json"), options.limit)
    if not options.list and options.results.exists():
        from benchmarks.solvers.peer_table import write_table

        write_table(options.results)


def run_all(chosen: list[Cell], options: argparse.Namespace) -> None:
    """Run the cells that have no row, each in a process of its own, and write each row at once."""
    rows = read(options.results)
    for cell in chosen:
        if cell.key in rows and not options.again and not rows[cell.key]["status"].startswith("failed"):
            continue
        if options.list:
            print(cell.key)
            continue
        smaller = [s for s in SIZES[cell.problem] if s < cell.states]
        before = {
            name: rows[key]
            for name in PEERS
            if smaller and (key := cell._replace(states=smaller[-1], method=name).key) in rows
        }
        figures = left_out(cell, before, options)
        # One decade looser than what sufficed there.
        decade = before.get(cell.method, {}).get("decade")
        options.start = 1 if decade in (None, "") else int(decade) + 1
        load = f"{os.getloadavg()[0]:.1f}"  # of the last minute, with the last cell's own
        rows[cell.key] = row = {**cell._asdict(), "load": load, **(figures or in_process(cell, options))}
        write(options.results, rows)
        print(cell.key, {name: row[name] for name in FIELDS[5:] if row.get(name) not in (None, "")}, flush=True)


def left_out(cell: Cell, before: dict[str, dict[str, Any]], options: argparse.Namespace) -> dict[str, Any] | None:
    """The row of a cell that the rows at the next smaller size decide, if they do."""
    if cell.method not in before:
        return None
    own = before[cell.method]
    if own["status"].startswith(">"):
        return {"status": f"> {options.limit:g} s: it was at a smaller size"}
    if own["status"].startswith("left out"):
        return {"status": own["status"]}
    package = cell.method.split()[0]
    times = [float(row["seconds"]) for name, row in before.items() if name.split()[0] == package and row.get("seconds")]
    if (
        options.prune
        and cell.states > PRUNE_ABOVE
        and own.get("seconds")
        and float(own["seconds"]) > options.prune * min(times)
    ):
        slower = float(own["seconds"]) / min(times)
        return {"status": f"left out: {slower:.1f} times the best of {package} at {own['states']} states"}
    return None


def in_process(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    arguments = ["--cell", json.dumps(cell), "--limit", str(options.limit), "--cache", str(options.cache)]
    arguments += [f"--start={options.start}"]
    # Set-up is outside the clock, but not without an end: lists of lists at 10^6 states take a minute each time.
    whole = 10 * options.limit + 600
    environment = os.environ | {"OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "2")}
    command = [sys.executable, "-m", "benchmarks.solvers.solvers_against_peers", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=whole, env=environment)
    except subprocess.TimeoutExpired:
        return {"status": f"> {whole:g} s with its set-up"}
    if done.returncode == -signal.SIGALRM:
        return {"status": f"> {options.limit:g} s"}
    if done.returncode < 0:
        return {"status": f"ended by {signal.Signals(-done.returncode).name}"}
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        errors = re.findall(r"^[\w.]+(?:Error|Exception|Exit)\b.*", done.stderr, re.MULTILINE)
        return {"status": "failed: " + (errors or ["no output"])[-1][:200]}
    return json.loads(lines[-1])


def run(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """One cell, in its own process."""
    problem = peer_problems.make(cell.problem, cell.states, cell.discount, cell.temperature)
    name = "-".join(map(str, cell[:-1])) + ".npy"
    right = peer_problems.reference(problem, options.cache / name)
    scale = float(np.abs(right).max())
    target = ACCURACY * scale

    def error(value: np.ndarray) -> float:
        with np.errstate(invalid="ignore"):
            return float(np.abs(value - right).max()) / scale

    if cell.method not in PEERS:
        from benchmarks.common.ours import OURS  # peers' processes do without jax

        solve = OURS[cell.method].build(problem)
        first, solution = timed(lambda: solve(target), options.limit + 60)  # compiling may take a while
        taken, solution = repeat(lambda: solve(target), options.limit)
        found = error(np.asarray(solution.value))
        done = int(solution.result) == 0
        status = "ok" if found <= ACCURACY and done else f"not accurate: {found:.1e}, result {int(solution.result)}"

        def attempt_ours(decade: int) -> tuple[float, float]:
            seconds, solution = timed(lambda: solve(target * 10.0**decade), options.limit)
            return error(np.asarray(solution.value)), seconds

        decade, (_, seconds) = loosest(attempt_ours, 1)
        tried = repeat(lambda: solve(target * 10.0**decade), options.limit)[0] if seconds <= 10 else [seconds]
        return {
            **figures(taken, target, found),
            "status": status,
            "tried_seconds": f"{statistics.median(tried):.4g}",
            "tried_decade": decade,
            "compile_seconds": round(max(0.0, first - statistics.median(taken)), 4),
            "steps": int(solution.stats.iterations),
            "products": int(solution.stats.products),
        }

    with quiet():
        if cell.method.startswith(JaxDP.package) and cell.states > JaxDP.most_states:
            return {"status": "too large: dense"}
        peer = PEERS[cell.method](problem)
        peer.warm_up()

        def attempt(decade: int) -> tuple[float, float, float]:
            """(error, seconds, seconds with the preparation)."""
            start = time.perf_counter()
            peer.prepare()
            seconds, result = timed(lambda: peer.solve(target * 10.0**decade), options.limit)
            whole = time.perf_counter() - start
            return error(peer.value(result)), seconds, whole

        decade, (found, seconds, whole) = loosest(attempt, options.start) if peer.has_tolerance else (0, attempt(0))
        if not found <= ACCURACY:
            return {"status": f"not accurate at any tolerance: {found:.1e} at the last"}
        taken = [seconds]
        if whole <= 10:
            taken, _ = repeat(lambda: peer.solve(target * 10.0**decade), options.limit, peer.prepare)
        return {**figures(taken, target * 10.0**decade, found), "status": "ok", "decade": decade}


def loosest(attempt: Callable[[int], tuple[float, ...]], start: int) -> tuple[int, tuple[float, ...]]:
    """The loosest decade whose attempt is accurate (or else the tightest), sought from `start`, and its attempt."""
    first, last = DECADES
    decade = max(last, min(first, start))
    outcome = attempt(decade)
    step = 1 if outcome[0] <= ACCURACY else -1
    while last <= decade + step <= first:
        following = attempt(decade + step)
        passes = following[0] <= ACCURACY
        if step == 1 and not passes:
            return decade, outcome
        decade, outcome = decade + step, following
        if step == -1 and passes:
            break
    return decade, outcome


def timed(call: Callable[[], Any], limit: float) -> tuple[float, Any]:
    """(seconds, result). The process dies of SIGALRM after `limit` seconds: compiled code heeds nothing else."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, limit)
    start = time.perf_counter()
    result = call()
    taken = time.perf_counter() - start
    signal.setitimer(signal.ITIMER_REAL, 0)
    return taken, result


def repeat(call: Callable[[], Any], limit: float, prepare: Callable[[], None] = lambda: None) -> tuple[list, Any]:
    """Seconds of each of 9 runs, of more (up to 200) while they take less than 0.3 seconds in all.

    Fewer where they do not fit into about 10 seconds with what they need: 3, or one that takes 10 seconds by itself.
    """
    taken: list[float] = []
    start = time.perf_counter()
    while True:
        prepare()
        seconds, result = timed(call, limit)
        taken.append(seconds)
        most = 200 if time.perf_counter() - start < 0.3 else 9 if time.perf_counter() - start < 10 else 3
        if len(taken) >= most or seconds > 10:
            return taken, result


def write_machine(path: Path, limit: float) -> None:
    """What ran the cells last."""
    from benchmarks.common import timing

    machine = timing.machine()
    packages = ("mdpsolver", "quantecon", "numba", "pymdptoolbox", "jaxdp", "scipy")
    machine["versions"] |= {name: metadata.version(name) for name in packages}
    path.write_text(json.dumps({"machine": machine, "accuracy": ACCURACY, "limit_seconds": limit}, indent=2) + "\n")


def figures(taken: list[float], tolerance: float, found: float) -> dict[str, Any]:
    return {
        "seconds": f"{statistics.median(taken):.4g}",
        "least": f"{min(taken):.4g}",
        "most": f"{max(taken):.4g}",
        "runs": len(taken),
        "tolerance": f"{tolerance:.3g}",
        "relative_error": f"{found:.2g}",
    }


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The rows there are, by their keys."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        Cell(r["problem"], int(r["states"]), float(r["discount"]), float(r["temperature"]), r["method"]).key: r
        for r in rows
    }


def write(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
    partial.replace(path)


if __name__ == "__main__":
    main()
