"""The benchmarks' rooms: what they import, what their page lists, and the command for accelerators."""

import ast
import json
import re
from pathlib import Path

import jax
import pytest

from benchmarks.accelerator import __main__ as accelerator
from benchmarks.accelerator.cases import measure_cases
from benchmarks.accelerator.crossover import crossing, crossings
from benchmarks.accelerator.table import COLUMNS

BENCHMARKS = Path(accelerator.__file__).parents[1]
PAGE = (BENCHMARKS / "README.md").read_text()
ROOMS = ("solvers", "gradients", "published", "studies", "deep")
MODULES = {path: ast.parse(path.read_text()) for path in BENCHMARKS.rglob("*.py")}
TOOLS = {"hpgd_peer", "hpgd_peer_run", "rejax_run", "stable_baselines_run"}  # of other environments, called by scripts


def imports(tree):
    found = [(alias.name, ()) for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found.append((node.module, tuple(alias.name for alias in node.names)))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(BENCHMARKS)))
def test_rooms_see_what_is_common_and_themselves(path):
    room = path.relative_to(BENCHMARKS).parts[0]
    seen = [name.split(".")[1] for name, _ in imports(MODULES[path]) if name.startswith("benchmarks.")]
    if room != "accelerator":
        assert set(seen) <= {"common", room}
    # What the runner is made of is no concern of a measurement.
    assert not [name for name, _ in imports(MODULES[path]) if name.startswith("bilevel_jax.experiments")]


def test_the_package_knows_no_benchmarks():
    for path in (BENCHMARKS.parent / "bilevel_jax").rglob("*.py"):
        assert not [name for name, _ in imports(ast.parse(path.read_text())) if name.split(".")[0] == "benchmarks"]


def test_the_page_lists_every_script_and_every_result():
    scripts = {
        path.stem
        for path, tree in MODULES.items()
        if path.parent.name in ROOMS
        and any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)
    }
    of_rooms, of_accelerator = (
        re.findall(r"^\| `(\w+)` \|.*\|$", half, re.MULTILINE) for half in PAGE.split("## Accelerators")
    )
    assert sorted(of_rooms) == sorted(scripts - TOOLS)
    assert of_accelerator == list(accelerator.PARTS)
    results = BENCHMARKS / "results"
    for path in (*results.glob("*.*"), *(results / "studies").iterdir()):
        assert re.search(rf"\b{path.stem}\b", PAGE), path
    for name in re.findall(r"(?<=[ |])[\w/]+\.(?:json|csv|npz)|studies/\w+", PAGE.split("## Accelerators")[0]):
        assert (results / name).exists(), name


# The command for accelerators.


def test_crossings():
    assert crossing([(10, 0.5), (100, 2.0), (1000, 3.0)]) == {"faster_from": 100, "about": pytest.approx(10**1.5)}
    assert crossing([(10, 2.0), (100, 0.9), (1000, 3.0)])["faster_from"] == 1000  # from which on it stays so
    assert crossing([(10, 1.5), (100, 2.0)]) == {"faster_from": 10, "about": None}
    assert crossing([(10, 1.5), (100, 0.5)]) == {"faster_from": None, "about": None}
    cells = {
        "solve, grid, 100": {"states": 100, "cpu_over_accelerator": 4.0},
        "solve, grid, 10": {"states": 10, "cpu_over_accelerator": 0.25},
        "solve, grid, 1000": {"failed": "no memory"},
    }
    assert crossings(cells) == {"solve, grid": {"faster_from": 100, "about": pytest.approx(10**1.5)}}


def test_cases_end_with_the_time_and_what_the_device_refuses_is_told(monkeypatch):
    now = iter([0.0, 1.0, 2.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))

    def refused():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nat ...")

    cells, left_out = measure_cases({"one": refused, "two": lambda: {"GB": 1.5}, "three": dict}, end=1.5)
    assert cells == {"one": {"failed": "RESOURCE_EXHAUSTED: out of memory"}, "two": {"GB": 1.5}}
    assert left_out == ["three"]


@pytest.mark.slow
def test_bandwidth_at_toy_size(tmp_path):
    accelerator.measure_part("bandwidth", True, 60.0, tmp_path, "0123abc")
    part = json.loads((tmp_path / "bandwidth.json").read_text())
    assert (part["toy"], part["commit"], part["left_out"]) == (True, "0123abc", [])
    assert len(part["cells"]) == 6
    for name, cell in part["cells"].items():
        width = 4 if "float32" in name else 8
        # Probabilities, successors (4 bytes each), rewards, V and T V, by hand.
        counted = {
            "dense": 32 * 4 * 32 * width + 32 * 4 * width,
            "successor": 4 * 100 * 4 * (width + 4) + 100 * 4 * width,
            "stencil": 5 * 100 * 4 * width + 100 * 4 * width,
        }[name.split(",")[0]]
        assert cell["bytes_per_sweep"] == counted + 2 * cell["states"] * width
        assert cell["sweep_of_copy"] == pytest.approx(cell["sweep_GB_per_s"] / cell["copy_GB_per_s"])


def part(**changed):
    made = {"toy": False, "commit": "abc", "machine": {"device": "H100"}, "seconds": 1.0, "cells": {}, "left_out": []}
    return made | changed


def keep(out, **parts):
    for name in accelerator.PARTS:
        accelerator.write(out / f"{name}.json", parts.get(name, part()))


def test_what_is_there_is_not_measured_again(tmp_path, capsys):
    crossed = {"solve, grid": {"faster_from": 100, "about": 31.6}}
    keep(
        tmp_path,
        bandwidth=part(cells={"dense": dict.fromkeys(COLUMNS["bandwidth"], 0.5)}, left_out=["stencil"]),
        crossover=part(crossings=crossed),
    )
    assert accelerator.main(["--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("there already") == 5
    assert "| dense | 0.5 | 0.5 | 0.5 | 0.5 |" in printed
    assert "left out, the time was up: stencil" in printed
    assert "solve, grid: faster from 100, about 31.6" in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["commit"], summary["machine"], summary["seconds"]) == ("abc", {"device": "H100"}, 5.0)
    assert summary["parts"]["crossover"]["crossings"] == crossed


def test_a_fault_is_an_exit_status(tmp_path, capsys):
    cells = {"structure 0": {"cases": 10, "faults": 1, "examples": ["0:3 bound: off"]}, "structure 1": {"cases": 10}}
    keep(tmp_path, certificates=part(cells=cells))
    assert accelerator.main(["--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "| 2 structures | 20 | 1 |" in printed
    assert "0:3 bound: off" in printed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"toy": True}, "has parts with --toy: batches; give another --out"),
        ({"machine": {"device": "H200"}}, "has parts of H100 and of H200; give each device a folder of its own"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path, capsys, changed, message):
    keep(tmp_path, batches=part(**changed))
    with pytest.raises(SystemExit) as end:
        accelerator.main(["--out", str(tmp_path)])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_without_time_nothing_is_written(tmp_path, capsys):
    assert accelerator.main(["--out", str(tmp_path), "--only", "bandwidth", "--minutes", "0"]) == 1
    assert list(tmp_path.iterdir()) == []
    assert "without a result: bandwidth" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in accelerator.PARTS if name != "bandwidth"])
def test_parts_at_toy_size(tmp_path, name):
    assert accelerator.main(["--toy", "--only", name, "--out", str(tmp_path)]) == 0
    part = json.loads((tmp_path / "summary.json").read_text())["parts"][name]
    assert part["left_out"] == []
    assert part["cells"]
    for cell in part["cells"].values():
        assert "failed" not in cell
        assert set(cell) & set(COLUMNS[name])
        assert cell.get("relative_error", 0) <= 1e-6
        assert cell.get("converged", 1) == 1
        assert cell.get("faults", 0) == 0
        rates = [value for key, value in cell.items() if key.endswith(("per_s", "_ms", "faster", "accelerator"))]
        assert all(value > 0 for value in rates)
