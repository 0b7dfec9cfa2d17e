"""docs/preferences.md as it stands there."""

import json
import re
from pathlib import Path

import jax
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "preferences.md").read_text()


@pytest.mark.slow
def test_the_program_runs(capsys):
    names = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
        for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(code, names)
    verdict, rationality = capsys.readouterr().out.splitlines()
    assert verdict.startswith("the labels judge decisions (held-out loss ")
    # The teacher's is 3.
    value, error = map(float, re.findall(r"[\d.]+", rationality))
    assert abs(value - 3) < 4 * error
    assert sum(names["counts_of_labels"]) == 100
    assert names["chosen"].count == names["counts_of_labels"][0]
    first = Path(names["path"]).read_text().splitlines()[0]
    documented = json.loads(re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[0])
    assert list(json.loads(first)) == list(documented)
