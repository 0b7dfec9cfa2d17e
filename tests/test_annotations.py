"""What annotations say of arrays is true: calls of the library with all of them checked, by beartype."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_annotations_are_true():
    done = subprocess.run([sys.executable, "annotations.py"], cwd=HERE, capture_output=True, text=True, check=False)
    assert done.stdout == "true\n", done.stderr[-3000:]


@pytest.mark.slow
def test_an_untrue_one_is_found(tmp_path):
    """The checker looks into shapes: a bare function with the wrong one fails."""
    (tmp_path / "wrong.py").write_text(
        "from jaxtyping import Array, Float\n\n\ndef double(x: Float[Array, 'S S']) -> Float[Array, 'S S']: return x\n"
    )
    code = (
        "import jaxtyping, jax.numpy as jnp\n"
        "with jaxtyping.install_import_hook('wrong', 'beartype.beartype'):\n    import wrong\n"
        "wrong.double(jnp.ones((2, 2)))\n"
        "try:\n    wrong.double(jnp.ones((2, 3)))\nexcept jaxtyping.TypeCheckError:\n    print('found')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "found\n", done.stderr[-3000:]
