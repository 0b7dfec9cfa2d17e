"""What the command line does whatever the command: its version, and an end where nobody reads on."""

import os
import subprocess
import sys
from importlib.metadata import version

import bilevel_jax as bj

COMMAND = [sys.executable, "-m", "bilevel_jax.experiments.cli"]


def test_version():
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=False)
    assert done.stdout == f"bilevel-jax {bj.__version__}\n", done.stderr
    assert version("bilevel_jax") == bj.__version__


def test_a_closed_pipe_ends_quietly():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([*COMMAND, "list"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
