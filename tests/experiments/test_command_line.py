"""What the command line does whatever the command: its version, and an end where nobody reads on."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from experiment_helpers import run

import bilevel_jax as bj
from bilevel_jax.experiments import cli

COMMAND = [sys.executable, "-m", "bilevel_jax.experiments.cli"]


@pytest.mark.slow
def test_version():
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=False)
    assert done.stdout == f"bilevel-jax {bj.__version__}\n", done.stderr
    assert version("bilevel_jax") == bj.__version__


@pytest.mark.slow
def test_a_closed_pipe_ends_quietly():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([*COMMAND, "list"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    "order",
    [
        "run CONFIG KEY --out DIR",
        "run --out DIR CONFIG KEY",
        "run CONFIG --out DIR KEY",
        "run CONFIG KEY --out DIR KEY",
    ],
)
def test_order_of_the_arguments(order, tmp_path, monkeypatch):
    """The documented one is `run CONFIG [--out DIR] [key=value ...]`."""
    given = []

    def instead(options):
        given.append((options.config, options.out, options.overrides))

    monkeypatch.setattr(cli, "_run", instead)
    words = {"CONFIG": "c.yaml", "KEY": "seed=1", "DIR": str(tmp_path)}
    assert cli.main([words.get(word, word) for word in order.split()]) == 0
    assert given == [("c.yaml", tmp_path, order.count("KEY") * ["seed=1"])]


def test_no_command(capsys):
    with pytest.raises(SystemExit) as exit_status:
        cli.main([])
    assert exit_status.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_extra_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "yaml", None)
    for module in ("source", "cells", "sections", "keys", "config"):
        monkeypatch.delitem(sys.modules, f"bilevel_jax.experiments.{module}")
    called = run(tmp_path / "c.yaml", tmp_path / "out")
    assert called.code == 2
    assert called.err == "bilevel-jax: error: yaml is not installed; pip install 'bilevel_jax[cli]'\n"
