"""How every benchmark times and reports: warm-up, blocked calls, medians, and the machine beside the figures."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parents[2]
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"


def seconds(call: Callable[[], Any], repeats: int, warm_up: int = 2) -> list[float]:
    """Wall seconds of each of `repeats` calls, their results waited for."""
    for _ in range(warm_up):
        jax.block_until_ready(call())
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - start)
    return taken


def alternate(calls: dict[str, Callable[[], Any]], repeats: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Time several calls in turn, A B A B ..., so that a drift of the machine meets them all."""
    for call in calls.values():
        seconds(call, 0, warm_up)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name] += seconds(call, 1, 0)
    return taken


def summary(taken: list[float]) -> dict[str, float]:
    """Median, least and most, in seconds."""
    return {"median": statistics.median(taken), "min": min(taken), "max": max(taken), "runs": len(taken)}


def machine() -> dict[str, Any]:
    """What ran it."""
    names = ("bilevel_jax", "jax", "jaxlib", "numpy")
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "device": str(jax.devices()[0].device_kind),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


def commit() -> str | None:
    """The commit that the scripts are of, "-dirty" behind it where files differ; None outside a clone with git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write(name: str, figures: dict[str, Any]) -> None:
    """Print the figures and write them to benchmarks/results/NAME.json."""
    text = json.dumps({"machine": machine(), **figures}, indent=2) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text)
    print(text)
