"""Studies: options are checked, tables are complete and right, pictures are pictures."""

import json

import jax
import matplotlib.image
import numpy as np
import pytest
import yaml
from experiment_helpers import read_rows
from studies_helpers import call

import bilevel_jax as bj
from benchmarks.common.options import meanings
from benchmarks.common.timing import RESULTS
from benchmarks.studies import (
    accuracy,
    agents,
    decisions,
    dynamics,
    networks,
    preferences,
    protocol,
    rates,
    samples,
    truncation,
)
from benchmarks.studies.study import read

MODULES = (accuracy, agents, decisions, dynamics, networks, preferences, protocol, rates, samples, truncation)
STUDIES = {module.STUDY.name: module.STUDY for module in MODULES}


def study(directory, name, words):
    out = directory / "out"
    called = call(STUDIES[name], *words.split(), "--out", out)
    assert called.code == 0, called.err
    return out, called


def assert_picture(path):
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 200
    assert pixels[..., :3].std() > 0.01


def committed():
    return sorted(path.parent.name for path in (RESULTS / "studies").glob("*/config.yaml"))


@pytest.mark.parametrize("case", committed())
def test_the_committed_results_are_of_the_defaults(case):
    """What is an option by now was none when some of them were made."""
    made = yaml.safe_load((RESULTS / "studies" / case / "config.yaml").read_text())
    options = STUDIES[made.pop("study")].cases[case]
    for name, value in made.items():
        now = getattr(options, name)
        assert value == (list(now) if isinstance(now, tuple) else now), name


def test_every_case_has_results_and_an_option_for_each_field():
    assert sorted(case for study in STUDIES.values() for case in study.cases) == committed()
    for study in STUDIES.values():
        for case, options in study.cases.items():
            assert read(study, ["--case", case]) == (case, None, options)
            assert set(meanings(type(options))) >= set(vars(options))


@pytest.mark.parametrize("name", STUDIES)
def test_help_has_the_options(name):
    called = call(STUDIES[name], "--help")
    printed = " ".join(called.out.split())
    assert called.code == 0
    for option, default in vars(next(iter(STUDIES[name].cases.values()))).items():
        assert f" --{option.replace('_', '-')} " in printed
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        assert isinstance(default, dict) or f"(default: {shown})" in printed


def test_options_are_read_as_what_they_are():
    words = ["--iterations", "10", "20", "--step-size", "1", "--problem", "states=4", "discount=0.5"]
    _, _, options = read(rates.STUDY, words)
    assert options.iterations == (10, 20)
    assert (options.step_size, type(options.step_size)) == (1, float)
    assert options.problem == {"name": "garnet", "discount": 0.5, "horizon": 40, "states": 4}
    assert options.seeds == 8
    # Another problem has other options.
    _, _, options = read(rates.STUDY, ["--problem", "name=tabular_rlhf", "labels=sampled"])
    assert options.problem == {"name": "tabular_rlhf", "labels": "sampled"}


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("samples", "--case samples_four_room", "invalid choice: 'samples_four_room'"),
        ("rates", "--seed 3", "no option --seed, did you mean '--seeds'?"),
        ("rates", "more", "unrecognized arguments: more"),
        ("rates", "--seeds many", "argument --seeds: invalid int value: 'many'"),
        ("rates", "--problem garnet", "argument --problem: expected KEY=VALUE, got 'garnet'"),
        ("rates", "--problem name=garnets", "name: no problem 'garnets', did you mean 'garnet'?"),
        ("samples", "--problem name=garnet discount=1.0", "discount must be at least 0 and below 1"),
        ("samples", "--algorithms hpdg", "algorithms: no algorithm 'hpdg'"),
    ],
)
def test_bad_options(tmp_path, name, words, message):
    called = call(STUDIES[name], *words.split(), "--out", tmp_path / "out")
    assert called.code == 2
    assert message in called.message


def test_a_directory_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    called = call(rates.STUDY, "--out", tmp_path / "out")
    assert called.code == 2
    assert f"--out {tmp_path / 'out'}: cannot be written" in called.message


SAMPLES = """
--problem name=garnet states=4 actions=2 branching=2 discount=0.6 horizon=15
--learning-rates 0.1 0.3 --seeds 2 --budget 60000 --first 10000 --points 2 --batch 8
"""


def test_stoc_sobirl_takes_as_many_iterations_as_fit():
    problem, budget = bj.problems.make("garnet", states=4), 20_000

    def made(iterations):
        return bj.algorithms.stoc_sobirl(problem, iterations, response=bj.estimators.LearnedModel())

    fitting = [made(n) for n in range(1, 60) if n * made(n).environment_steps <= budget]
    assert len(fitting) < 50
    found = samples._within(problem, None, budget)
    assert (found.batch, found.environment_steps) == (fitting[-1].batch, fitting[-1].environment_steps)
    assert found.batch > fitting[0].batch


@pytest.mark.slow
def test_samples(tmp_path):
    with jax.numpy_dtype_promotion("standard"):  # optax.adam needs it
        out, _ = study(tmp_path, "samples", SAMPLES)
    rows = read_rows(out / "samples.csv")
    assert len(rows) == len(samples.ALGORITHMS) * 2 * 2 * 2
    assert all(int(row["steps"]) <= int(row["budget"]) for row in rows)
    table = read_rows(out / "samples_table.csv")
    assert {row["algorithm"] for row in table} == set(samples.ALGORITHMS)
    # The table by hand: the best mean over the seeds.
    for row in table:
        own = [r for r in rows if r["algorithm"] == row["algorithm"] and r["budget"] == row["budget"]]
        means = {
            rate: np.mean([float(r["objective"]) for r in own if r["learning_rate"] == rate])
            for rate in {r["learning_rate"] for r in own}
        }
        assert float(row["mean"]) == pytest.approx(min(means.values()), rel=1e-4)
        assert float(row["mean"]) == pytest.approx(means[row["learning_rate"]], rel=1e-4)
    # All start at the same places, and what uses the implicit term improves.
    last = {row["algorithm"]: float(row["mean"]) for row in table if row["budget"] == "60000"}
    assert last["sobirl"] < last["naive"] - 0.5
    assert last["hpgd"] < last["naive"] - 0.5
    assert_picture(out / "samples.png")
    assert yaml.safe_load((out / "config.yaml").read_text())["seeds"] == 2
    assert json.loads((out / "study.json").read_text())["study"] == "samples"


@pytest.mark.slow
def test_rates(tmp_path):
    out, called = study(
        tmp_path,
        "rates",
        "--problem states=4 actions=2 branching=2 discount=0.5 horizon=15 --iterations 8 64 "
        "--sobirl-iterations 8 32 --seeds 2",
    )
    rows = read_rows(out / "rates.csv")
    assert len(rows) == 2 * 2 + 2 * 2
    slopes = {row["algorithm"]: row for row in read_rows(out / "slopes.csv")}
    for name in ("stoc_sobirl", "sobirl"):
        assert float(slopes[name]["low"]) <= float(slopes[name]["slope"]) <= float(slopes[name]["high"]) < 0
        assert f"{name}: slope" in called.out
    assert_picture(out / "rates.png")


def test_slope_of_a_known_power():
    sizes = [10, 100, 1000]
    rows = [
        {"algorithm": "sobirl", "iterations": size, "samples": size, "seed": s, "mean_squared_gradient": (1 + s) / size}
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
        "accuracy",
        "--mdps 1 --discount 0.3 --horizon 10 --rooms-horizon 20 --trajectories 400 --batch 20 "
        "--variance-batches 4 256",
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
        tmp_path, "truncation", "--lengths 1 8 --discounts 0.0 0.8 --horizons 5 --mdps 1 --batches 40 --batch 200"
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
    out, _ = study(tmp_path, "agents", "--problem states=4 --improves 1 32 --seeds 1")
    rows = read_rows(out / "agents.csv")
    assert len(rows) == 4 * 2 * 2
    for name in {row["agent"] for row in rows}:
        gap = {(row["start"], row["steps"]): float(row["gap"]) for row in rows if row["agent"] == name}
        assert gap["cold", "32768"] < gap["cold", "1024"] / 4
        assert gap["warm", "1024"] < gap["cold", "1024"]
    assert_picture(out / "agents.png")


@pytest.mark.slow
def test_networks(tmp_path):
    words = "--rooms-batch 4 --rooms-estimates 3 --rooms-horizon 20 --length 5 --mdps 2 --batch 4 --estimates 3"
    out, _ = study(tmp_path, "networks", words + " --decays 0 1 --critics 2 4")
    rooms, traces = read_rows(out / "rooms.csv"), read_rows(out / "traces.csv")
    assert len(rooms) == 8
    assert all(-1 <= float(row["cosine"]) <= 1 for row in rooms)
    assert len(traces) == 2 * 3 * 2
    assert {row["credit"] for row in traces} == {"exact", "2", "4"}
    assert_picture(out / "networks.png")


@pytest.mark.slow
def test_protocol(tmp_path):
    """On the cart pole, in short: rows as asked, labels as many as asked for, and a second call runs nothing."""
    words = (
        "--iterations 16 --first 20 --count 4 --capacity 40 --horizon 60 --processes 8 --seeds 2 --gymnax= "
        "--conditions fresh_0 bounded_1 fixed_0 true"
    )
    out, called = study(tmp_path, "protocol", words)
    rows = read_rows(out / "protocol.csv")
    assert len(rows) == 4 * 2
    asked = {row["condition"]: int(row["labels"]) for row in rows}
    assert asked == {"fresh_0": 28, "bounded_1": 28, "fixed_0": 20, "true": 0}
    assert all(np.isfinite(float(row["return"])) for row in rows)
    assert all(np.isfinite(float(row["loss"])) == (row["condition"] != "true") for row in rows)
    table = read_rows(out / "protocol_table.csv")
    assert [row["condition"] for row in table] == ["fresh_0", "bounded_1", "fixed_0", "true"]
    own = [float(row["return"]) for row in rows if row["condition"] == "fixed_0"]
    np.testing.assert_allclose(float(table[2]["return"]), np.mean(own), rtol=1e-5)
    assert_picture(out / "protocol.png")
    assert "fresh_0 100" in called.out
    assert "fresh_0 100" not in study(tmp_path, "protocol", words)[1].out


def test_a_protocol_without_what_it_is_compared_with(tmp_path):
    for words in ("--conditions true", "--conditions fresh_0 other"):
        called = call(STUDIES["protocol"], *words.split(), "--out", tmp_path / "out")
        assert called.code == 2
        assert "conditions: expected fresh_0" in called.err
