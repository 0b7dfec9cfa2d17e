"""`bilevel-jax run` on labels: the verdict in words, a reward that is saved, and an agent that is trained on it."""

import json

import numpy as np
import pytest
from experiment_helpers import command, write

CONFIG = """
problem: {name: preference_learning, task: four_rooms, width: 8, length: 4, horizon: 12}
algorithm:
  name: drlhf
  batch: 4
  agent: &agent {name: soft_pqn, processes: 2, steps: 4, minibatches: 1, network: {name: mlp, width: 8}}
  labels:
    name: synthetic_labels
    count: 12
    held_out: 30
    judging: outcomes
    rationality: 20.0
    improvements: 2
    shares: 2
    processes: 4
    expert: *agent
optimizer: {name: adamw, learning_rate: 0.01}
iterations: 6
record_every: 2
samples: 4
precision: float32
sweep: {seed: [0, 1]}
"""
AGAIN = """
problem: {name: preference_learning, task: four_rooms, dynamics: heavy, width: 8, length: 4, horizon: 12, saved: SAVED}
algorithm:
  name: agent_alone
  improvements: 2
  batch: 2
  agent: {name: soft_pqn, processes: 2, steps: 4, minibatches: 1, network: {name: mlp, width: 8}}
iterations: 2
samples: 4
precision: float32
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    called = command("run", write(folder, CONFIG), "--out", folder / "out")
    assert called.code == 0, called.err
    return folder / "out", called


def test_the_verdict_is_printed_and_kept(made):
    out, called = made
    summary = json.loads((out / "summary.json").read_text())
    assert sum(int(line.split()[0]) for line in summary["labels"]) == 2
    for line in summary["labels"]:
        assert line in called.out
        assert "held-out loss" in line
    header, *rows = (out / "runs.csv").read_text().splitlines()
    assert "held_out_decisions,held_out_outcomes,held_out_error,held_out_pairs" in header
    assert len(rows) == 2
    assert ",labels" in (out / "metrics.csv").read_text().splitlines()[0]


def test_a_new_agent_is_trained_on_the_saved_reward(made, tmp_path):
    out, _ = made
    config = write(tmp_path, AGAIN.replace("SAVED", str(out / "final.npz")))
    called = command("run", config, "--out", tmp_path / "again")
    assert called.code == 0, called.err
    with np.load(out / "final.npz") as before, np.load(tmp_path / "again" / "final.npz") as after:
        names = [name for name in before.files if name.startswith("x/reward")]
        assert names
        for name in names:
            np.testing.assert_array_equal(after[name][0], before[name][0])  # agent_alone does not move x
    assert "greedy_return" in (tmp_path / "again" / "runs.csv").read_text()


@pytest.mark.slow
def test_a_run_that_goes_on_has_the_same_bits(made, tmp_path):
    """With one more iteration than before it is another config; the same one again computes nothing."""
    out, _ = made
    config = write(tmp_path, CONFIG)
    first = command("run", config, "--out", tmp_path / "first")
    assert first.code == 0, first.err
    with np.load(out / "final.npz") as one, np.load(tmp_path / "first" / "final.npz") as two:
        for name in one.files:
            np.testing.assert_array_equal(one[name], two[name])
