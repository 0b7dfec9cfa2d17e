"""Studies: configs are checked, tables are complete and right, pictures are pictures."""

import json
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest
import yaml
from runner_helpers import command, read_rows, write

from bilevel_jax.runner.studies import rates, samples
from bilevel_jax.runner.studies.study import STUDIES, load, options_of

CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "studies").glob("*.yaml"))


def study(directory, text, *overrides):
    out = directory / "out"
    called = command("study", write(directory, text), *overrides, "--out", out)
    assert called.code == 0, called.err
    return out, called


def assert_picture(path):
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 200
    assert pixels[..., :3].std() > 0.01


@pytest.mark.slow
def test_every_study_has_a_config_that_is_valid():
    assert {load(path, []).kind for path in CONFIGS} == set(STUDIES)


def test_list_has_the_studies():
    printed = command("list").out
    for name in STUDIES:
        assert f"  {name}: " in printed
        for option, default in vars(options_of(name)()).items():
            if not isinstance(default, dict):
                assert f"{option} = {default}" in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study: sample", "study (config.yaml, line 1): no study 'sample', did you mean 'samples'?"),
        ("seeds: 3", "study (config.yaml, line 1): no study None"),
        ("study: rates\nseed: 3", "seed (config.yaml, line 2): unknown key, did you mean 'seeds'?"),
        ("study: rates\nseeds: many", "seeds (config.yaml, line 2): "),
        ("study: rates\nproblem: {name: garnets}", "problem (config.yaml, line 2): name: no problem 'garnets'"),
        ("study: samples\nproblem: {name: garnet, discount: 1.0}", "discount must be at least 0 and below 1"),
        ("study: samples\nmethods: [hpdg]", "methods: no method 'hpdg'"),
    ],
)
def test_bad_configs(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    called = command("study", write(Path(), text), "--out", "out")
    assert called.code == 2
    assert message in called.message


SAMPLES = """
study: samples
problem: {name: garnet, states: 4, actions: 2, branching: 2, discount: 0.6, horizon: 15}
learning_rates: [0.1, 0.3]
seeds: 2
budget: 60000
first: 10000
points: 2
batch: 8
"""


@pytest.mark.slow
def test_samples(tmp_path):
    with jax.numpy_dtype_promotion("standard"):  # optax.adam needs it
        out, _ = study(tmp_path, SAMPLES)
    rows = read_rows(out / "samples.csv")
    assert len(rows) == len(samples.METHODS) * 2 * 2 * 2
    assert all(int(row["steps"]) <= int(row["budget"]) for row in rows)
    table = read_rows(out / "samples_table.csv")
    assert {row["method"] for row in table} == set(samples.METHODS)
    # The table by hand: the best mean over the seeds.
    for row in table:
        own = [r for r in rows if r["method"] == row["method"] and r["budget"] == row["budget"]]
        means = {
            rate: np.mean([float(r["objective"]) for r in own if r["learning_rate"] == rate])
            for rate in {r["learning_rate"] for r in own}
        }
        assert float(row["mean"]) == pytest.approx(min(means.values()), rel=1e-4)
        assert float(row["mean"]) == pytest.approx(means[row["learning_rate"]], rel=1e-4)
    # All start at the same places, and what uses the implicit term improves.
    last = {row["method"]: float(row["mean"]) for row in table if row["budget"] == "60000"}
    assert last["sobirl"] < last["naive"] - 0.5
    assert last["hpgd"] < last["naive"] - 0.5
    assert_picture(out / "samples.png")
    assert yaml.safe_load((out / "config.yaml").read_text())["seeds"] == 2
    assert json.loads((out / "study.json").read_text())["study"] == "samples"


@pytest.mark.slow
def test_rates(tmp_path):
    out, called = study(
        tmp_path,
        "study: rates\nproblem: {name: garnet, states: 4, actions: 2, branching: 2, discount: 0.5, horizon: 15}\n",
        "iterations=[8, 64]",
        "sobirl_iterations=[8, 32]",
        "seeds=2",
    )
    rows = read_rows(out / "rates.csv")
    assert len(rows) == 2 * 2 + 2 * 2
    slopes = {row["method"]: row for row in read_rows(out / "slopes.csv")}
    for name in ("stoc_sobirl", "sobirl"):
        assert float(slopes[name]["low"]) <= float(slopes[name]["slope"]) <= float(slopes[name]["high"]) < 0
        assert f"{name}: slope" in called.out
    assert_picture(out / "rates.png")


def test_slope_of_a_known_power():
    sizes = [10, 100, 1000]
    rows = [
        {"method": "sobirl", "iterations": size, "samples": size, "seed": s, "mean_squared_gradient": (1 + s) / size}
        for size in sizes
        for s in range(4)
    ]
    fitted = rates._slope("sobirl", rows)
    assert fitted["slope"] == pytest.approx(-1)
    # Seeds are multiples of one another: resampling moves the curve and not its slope.
    assert fitted["low"] == pytest.approx(-1)
    assert fitted["high"] == pytest.approx(-1)


@pytest.mark.slow
def test_accuracy(tmp_path):
    out, called = study(
        tmp_path,
        "study: accuracy\nmdps: 1\ndiscount: 0.3\nhorizon: 10\nrooms_horizon: 20\ntrajectories: 400\nbatch: 20\n"
        "variance_batches: [4, 256]\n",
    )
    rows = read_rows(out / "accuracy.csv")
    assert {row["problem"] for row in rows} == {"garnet 0", "four_rooms"}
    assert all(int(row["trajectories"]) == 400 for row in rows)
    # Four Rooms cut after 20 steps is biased, Garnet is not: 21 z-values, |z| < 5 with chance 1e-5 of a false alarm.
    assert all(float(row["largest_z"]) < 5 for row in rows if row["problem"] == "garnet 0")
    assert "largest |z| of" in called.out
    variances = read_rows(out / "variance.csv")
    for name in {row["estimator"] for row in variances}:
        own = [float(row["relative_variance"]) for row in variances if row["estimator"] == name]
        assert own[0] > 20 * own[-1]  # 64 times as many trajectories
    assert_picture(out / "accuracy.png")


@pytest.mark.slow
def test_truncation(tmp_path):
    out, _ = study(
        tmp_path,
        "study: truncation\nlengths: [1, 8]\ndiscounts: [0.0, 0.8]\nhorizons: [5]\nmdps: 1\nbatches: 40\nbatch: 200\n",
    )
    short, long = read_rows(out / "truncation.csv")
    assert float(short["bias"]) > 5 * float(long["bias"])
    for row in (short, long):
        assert float(row["bias"]) < float(row["bound"])
    exact, biased = read_rows(out / "one_step.csv")
    assert float(exact["bias"]) < 1e-6
    assert float(biased["bias"]) > 5 * float(biased["standard_error"])
    assert_picture(out / "truncation.png")


@pytest.mark.slow
def test_agents(tmp_path):
    out, _ = study(tmp_path, "study: agents\nproblem: {name: garnet, states: 4}\nimproves: [1, 32]\nseeds: 1\n")
    rows = read_rows(out / "agents.csv")
    assert len(rows) == 4 * 2 * 2
    for name in {row["agent"] for row in rows}:
        gap = {(row["start"], row["steps"]): float(row["gap"]) for row in rows if row["agent"] == name}
        assert gap["cold", "32768"] < gap["cold", "1024"] / 4
        assert gap["warm", "1024"] < gap["cold", "1024"]
    assert_picture(out / "agents.png")
