"""The scripts of examples/, as a user would start them."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs(path, tmp_path):
    done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = (float(word.rstrip(",")) for word in improvement(done.stdout))
    sign = -1 if "revenue" in done.stdout else 1  # a revenue is to rise, an objective to fall
    assert sign * (before - after) > 0.05 * abs(before)


def improvement(printed):
    """The numbers around the last arrow."""
    words = printed.split()
    place = len(words) - 1 - words[::-1].index("->")
    return words[place - 1], words[place + 1]


def test_they_are_short():
    assert SCRIPTS
    for path in SCRIPTS:
        assert len(path.read_text().splitlines()) <= 70, path
