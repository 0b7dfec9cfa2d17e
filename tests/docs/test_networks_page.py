"""docs/networks.md as it stands there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from experiment_helpers import run

CONFIG = Path(__file__).parents[2] / "configs" / "deep" / "cart_pole.yaml"
PAGE = (Path(__file__).parents[2] / "docs" / "networks.md").read_text()


def the_run_that_the_page_reads():
    """runs/cart_pole as its config describes it, but short."""
    short = ["algorithm.agent.steps=8", "algorithm.improvements=1", "iterations=2", "samples=2"]
    assert run(CONFIG, Path("runs/cart_pole"), short).code == 0


@pytest.mark.slow
def test_the_programs_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    the_run_that_the_page_reads()
    names = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
        for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(code, names)
    assert names["judged"].mean.shape == (3,)
    assert bool(jnp.isfinite(names["made"].value))
    assert (tmp_path / "agents.npz").exists()
    assert capsys.readouterr().out
