"""docs/networks.md as it stands there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "networks.md").read_text()


@pytest.mark.slow
def test_the_programs_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
        for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(code, names)
    assert names["judged"].mean.shape == (3,)
    assert bool(jnp.isfinite(names["made"].value))
    assert (tmp_path / "agents.npz").exists()
    assert capsys.readouterr().out
