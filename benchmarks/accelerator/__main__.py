"""What an accelerator gains: five parts, in under nine minutes on one GPU.

    python -m benchmarks.accelerator                   # all parts that have no file yet
    python -m benchmarks.accelerator --only batches    # this one; may be given more than once
    python -m benchmarks.accelerator --toy             # the same at sizes that only show that it runs

- bandwidth: bytes a second of a Bellman sweep against a plain copy.
- batches: vmapped solves and hyper-gradients against as many one at a time.
- four_rooms: iterations a second with the exact hyper-gradient, and of M-SoBiRL.
- crossover: the sizes from which the accelerator is faster than its host's CPU.
- certificates: the search for wrong certificates at the default precision of matrix products; 0 faults are expected.

Each part has a process of its own and writes --out/PART.json when it is done; a part that is there is skipped, so that
a run that was cut off goes on. A part's cases come in the order of their worth, and those that the time does not
suffice for are named in its file. summary.json has all parts with machine, versions and commit. Every figure is the
median of calls that were waited for, after a warm-up.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accelerator.table import table

ROOT = Path(__file__).parents[2]
# Seconds of each part, the start of its process included; what a part leaves over, later ones may not take.
PARTS = {"bandwidth": 70, "batches": 110, "four_rooms": 100, "crossover": 120, "certificates": 90}
MINUTES = 9.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, print the table, write the summary. Returns 1 if a part failed or a fault was found."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.accelerator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/accelerator)")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part")
    parser.add_argument("--toy", action="store_true", help="at toy size (default of --out: runs/accelerator_toy)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="that all parts may take")
    parser.add_argument("--commit", help="of the code, where there is no clone to ask")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    out = options.out or (Path("runs/accelerator_toy") if options.toy else ROOT / "benchmarks/results/accelerator")
    if options.part:
        measure_part(options.part, options.toy, options.seconds, out, options.commit)
        return 0
    if wrong := [name for name, part in read(out).items() if part["toy"] != options.toy]:
        kind = "without" if options.toy else "with"
        parser.error(f"{out} has parts {kind} --toy: {', '.join(wrong)}; give another --out")
    failed = run_parts(options.only or list(PARTS), options, out)
    found = read(out)
    devices = {part["machine"]["device"] for part in found.values()}
    if len(devices) > 1:
        parser.error(f"{out} has parts of {' and of '.join(sorted(devices))}; give each device a folder of its own")
    write_summary(found, out)
    print(table(found))
    if failed:
        print(f"without a result: {', '.join(failed)}; started again, only these run", file=sys.stderr)
    faults = sum(cell.get("faults", 0) for cell in found.get("certificates", {}).get("cells", {}).values())
    return 1 if failed or faults else 0


def run_parts(names: Sequence[str], options: argparse.Namespace, out: Path) -> list[str]:
    """Run the parts that have no file, each in a process of its own. Returns the names of those without one after."""
    end = time.monotonic() + 60 * options.minutes
    failed = []
    for name in names:
        if (out / f"{name}.json").exists():
            print(f"{name}: there already", flush=True)
            continue
        left = end - time.monotonic()
        print(f"{name}:", flush=True)
        command = [sys.executable, "-m", "benchmarks.accelerator", "--part", name, "--out", str(out)]
        command += ["--seconds", str(min(PARTS[name], left)), *(["--toy"] if options.toy else [])]
        command += ["--commit", options.commit] if options.commit else []
        try:
            done = left > 0 and subprocess.run(command, timeout=left, check=False).returncode == 0
        except subprocess.TimeoutExpired:
            done = False
        if not done:
            failed.append(name)
    return failed


def measure_part(name: str, toy: bool, seconds: float, out: Path, commit: str | None) -> None:
    """Measure a part in this process and write its file. Cases begin within `seconds` from now."""
    started = time.monotonic()
    import jax

    from benchmarks.accelerator.cases import measure_cases
    from benchmarks.common import timing

    jax.config.update("jax_enable_x64", True)
    module = importlib.import_module(f"benchmarks.accelerator.{name}")
    cells, left_out = measure_cases(module.cases(toy), started + seconds)
    if not cells:
        raise SystemExit(f"{name}: no time was left for a case")
    part = {
        "toy": toy,
        "commit": commit or timing.commit(),
        "machine": timing.machine(),
        "seconds": round(time.monotonic() - started, 1),
        "cells": cells,
        "left_out": left_out,
    }
    if hasattr(module, "crossings"):
        part["crossings"] = module.crossings(cells)
    write(out / f"{name}.json", part)


def read(out: Path) -> dict[str, Any]:
    """The parts that are there, by name."""
    files = {name: out / f"{name}.json" for name in PARTS}
    return {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}


def write_summary(parts: dict[str, Any], out: Path) -> None:
    """summary.json: machine and commits once, and the parts without them."""
    if not parts:
        return
    commits = sorted({str(part["commit"]) for part in parts.values()})
    own = {name: {k: v for k, v in part.items() if k not in ("machine", "toy")} for name, part in parts.items()}
    first = next(iter(parts.values()))
    seconds = sum(part["seconds"] for part in parts.values())
    head = {"machine": first["machine"], "commit": ", ".join(commits), "toy": first["toy"], "seconds": seconds}
    write(out / "summary.json", {**head, "parts": own})


def write(path: Path, content: dict[str, Any]) -> None:
    """As JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
