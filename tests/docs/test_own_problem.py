"""The page on problems: its example runs from the command line, and its table and pictures are complete."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from experiment_helpers import command
from helpers import SIMULATORS
from scipy.optimize import minimize_scalar

import bilevel_jax as bj
from bilevel_jax.experiments.config import load

PAGE = Path(__file__).parents[2] / "docs" / "problems.md"
TEXT = PAGE.read_text()
MAP, OWN = TEXT.split("## Your own problem")
CODE = re.findall(r"```python\n(.*?)```", OWN, re.DOTALL)
YAML = re.findall(r"```yaml\n(.*?)```", OWN, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page's file and config beside each other."""
    place = tmp_path_factory.mktemp("own")
    (place / "toll.py").write_text(CODE[0])
    (place / "toll.yaml").write_text(YAML[0])
    yield place
    bj.problems.registry._SPECS.pop("toll", None)  # other tests are about the library's problems


@pytest.mark.slow
def test_run(folder, monkeypatch):
    """From another directory; the best toll is where a numerical search has it."""
    monkeypatch.chdir("/")
    with jax.numpy_dtype_promotion("standard"):
        called = command("run", folder / "toll.yaml", "--out", folder / "out")
    assert called.code == 0, called.err
    summary = json.loads((folder / "out" / "summary.json").read_text())
    values = []
    for temperature in (0.25, 0.5):

        def cost(toll, t=temperature):
            return (0.4 - toll) / (1 + np.exp((1 + toll - 2) / t))

        values.append(minimize_scalar(cost, bounds=(0, 5), method="bounded", options={"xatol": 1e-8}).fun)
    assert len(set(values)) == 2
    np.testing.assert_allclose(summary["final_value"], min(values), rtol=1e-4)
    assert (folder / "out" / "incentive.png").stat().st_size > 1000
    # What it wrote finds the module again, wherever it stands.
    assert str(folder / "toll.py") in (folder / "out" / "resolved.yaml").read_text()
    assert command("plot", folder / "out").code == 0


def test_list(folder):
    out = command("list", folder / "toll.py").out
    assert "toll: Toll: what to ask of drivers" in out
    assert "jam = 0.4" in out


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("[missing.py]", r"modules: there is no file .*missing.py; give its path relative to the config"),
        ("[broken.py]", r"modules: broken.py cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("[no_such_module]", r"modules: no_such_module cannot be imported \(ModuleNotFoundError"),
        ("toll.py", r"modules \(.*line 1\): expected a list of files or modules, got 'toll.py'"),
    ],
)
def test_modules_that_cannot_be_imported(modules, message, folder):
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "bad.yaml").write_text(f"modules: {modules}\nproblem: four_rooms\n")
    called = command("run", folder / "bad.yaml", "--out", folder / "bad")
    assert called.code == 2
    assert re.search(message, called.message)
    assert not (folder / "bad").exists()


def test_page_is_complete():
    rows = re.findall(r"^\| `(\w+)` \|.*\|$", TEXT, re.MULTILINE)
    registered = [name for name in bj.problems.names() if name != "toll"]
    assert sorted(rows) == registered
    pictures = re.findall(r"\]\((images/problems/(\w+)\.png)\)", TEXT)
    assert set(registered) - set(SIMULATORS) <= {name for _, name in pictures}
    for path, _ in pictures:
        assert 1_000 < (PAGE.parent / path).stat().st_size < 60_000, path


def test_map_of_the_page(folder):
    (folder / "map.yaml").write_text(re.findall(r"```yaml\n(.*?)```", MAP, re.DOTALL)[0])
    section = load(folder / "map.yaml").values["problem"]
    problem = bj.problems.make(**section)
    assert (problem.grid.walls == (np.array([list(row) for row in section["rows"]]) == "x")).all()
    assert len(problem.grid.cells) == 14
