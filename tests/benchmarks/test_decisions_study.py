"""The decisions study: its fits against the library's, its labels by hand, and what it must find from many labels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_helpers import read_rows
from scipy import stats
from studies_helpers import call

import bilevel_jax as bj
from benchmarks.studies import decisions
from bilevel_jax import preferences as pf

SMALL = decisions.DecisionsOptions(
    states=5, actions=2, labels=(40,), teacher_labels=40, held_out=30, mdps=3, tuning_mdps=2, strengths=(0.1, 1.0)
)
WORDS = (
    "--states 5 --actions 2 --labels 40 --teacher-labels 40 --held-out 30 --mdps 3 --tuning-mdps 2 --strengths 0.1 1.0"
)


@pytest.fixture(scope="module")
def made():
    """Two MDPs with labels of decisions, and the first of them as the library's own data."""
    worlds, labels = decisions._data(jnp.arange(2), 0, 0, SMALL)
    first = jax.tree.map(lambda leaf: leaf[0], (worlds, labels))
    return *first, drawn(first[0], 0, 0)


# What is known may be sampled in another way than what is not: jitted, as in the study.
@jax.jit
def drawn(world, judging, teacher):
    return decisions._preferences(world, 0, judging, teacher, SMALL)


def fitted(learner, world, labels):
    return jax.jit(lambda: decisions._fit(decisions._model(learner, world.old, 0.5, SMALL), labels))()


def test_a_world_is_what_it_says(made):
    world, labels, data = made
    for transition in (world.old, world.new):
        np.testing.assert_allclose(transition.sum(-1), 1, rtol=1e-6)
        np.testing.assert_array_equal((np.asarray(transition) > 0).sum(-1), SMALL.branching)
    assert not np.allclose(world.old, world.new)
    np.testing.assert_allclose([world.hidden.mean(), world.hidden.std()], [0, 1], atol=1e-6)
    assert labels.label.shape == (data.count,) == (SMALL.labels[0] + SMALL.held_out,)
    # Steps lie where the dynamics lead, and all actions are taken.
    steps = data.segments
    chances = np.asarray(world.old)[steps.observation, steps.action]
    assert (np.take_along_axis(chances, np.asarray(steps.next_observation)[..., None], -1) > 0).all()
    assert np.bincount(np.asarray(steps.action).ravel()).min() > 100


def test_counts_give_the_gains_of_the_library(made):
    _, labels, data = made
    table = np.random.default_rng(0).normal(size=(SMALL.states, SMALL.actions))
    want = pf.gains(data, pf.outcome_scores(bj.Table(table), data.segments))
    np.testing.assert_allclose(labels.counts @ table.reshape(-1), want, rtol=1e-6, atol=1e-6)
    policy = jax.nn.softmax(jnp.asarray(table), -1)
    want = pf.gains(data, pf.decision_scores(policy, data.segments))
    np.testing.assert_allclose(labels.counts @ jnp.log(policy).reshape(-1), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("judging", decisions.JUDGINGS)
def test_teachers_judge_by_what_they_are_said_to(judging):
    world = jax.tree.map(lambda leaf: leaf[0], decisions._data(jnp.arange(1), 0, 0, SMALL)[0])
    place = decisions.JUDGINGS.index(judging)
    reward = jnp.broadcast_to(world.hidden[:, None], (SMALL.states, SMALL.actions))
    solution = bj.solve(bj.MDP(world.old, reward, SMALL.discount), bj.ShannonEntropy(SMALL.temperature))
    scores = reward if judging == "outcomes" else SMALL.temperature * jnp.log(solution.policy)
    for teacher in ("oracle", "skipping", "tying"):
        data = drawn(world, place, decisions.TEACHERS.index(teacher))
        sums = np.asarray(scores)[data.segments.observation, data.segments.action].sum(1)
        one, two = sums[np.asarray(data.pairs)].T
        sure = np.abs(one - two) > 1e-4  # sums of the same rewards are equal but for rounding
        judged, right = np.asarray(data.weight) > 0, np.asarray(data.label) == (one > two)
        equal = np.abs(one - two) < (np.std(sums) / 4 if teacher == "tying" else 1e-9)
        if teacher == "skipping":
            np.testing.assert_array_equal(judged, np.maximum(one, two) > np.median(sums) + 1e-9)
            assert 0.5 < judged.mean() < 0.95
        else:
            assert judged.all()
        assert right[judged & sure & ~equal].all()
        if teacher == "tying":
            assert (np.asarray(data.label)[equal] == 0.5).all()
            assert 0.02 < equal.mean() < 0.5


def test_the_fit_of_outcomes_is_the_logistic_regression(made):
    world, labels, _ = made
    for learner, features in (
        ("drlhf_s", labels.counts.reshape(-1, SMALL.states, SMALL.actions).sum(-1)),
        ("drlhf_sa", labels.counts),
    ):
        fit = fitted(learner, world, labels)
        want = pf.fit_linear_reward(features, labels.label, 0.5, jnp.zeros(features.shape[1]))
        np.testing.assert_allclose(fit.x, want, rtol=1e-3, atol=1e-4)


def test_the_bilevel_fit_is_stationary_by_the_library(made):
    """Its slopes go forward through the solver, the library's hyper-gradient backward, from the other formula."""
    world, labels, _ = made
    model = decisions._model("bilevel", world.old, 0.5, SMALL)
    problem = decisions._problem(world.old, labels, 0.5, SMALL)
    start = jnp.asarray(np.random.default_rng(1).normal(size=model.start.size))
    hg = bj.hypergradient(problem, start, with_error=False)

    def objective(x):
        gain = labels.counts @ model.scores(x).reshape(-1)
        return jnp.sum(-pf.log_likelihood(gain, jnp.zeros_like(gain), labels.label)) + model.prior(x)

    np.testing.assert_allclose(hg.value, objective(start), rtol=1e-6)
    np.testing.assert_allclose(hg.gradient, jax.grad(objective)(start), rtol=1e-4, atol=1e-5)
    fit = fitted("bilevel", world, labels)
    end, first = (bj.hypergradient(problem, x, with_error=False) for x in (fit.x, model.start))
    assert jnp.linalg.norm(end.gradient) < 1e-4 * jnp.linalg.norm(first.gradient)
    np.testing.assert_allclose(end.value, fit.objective, rtol=1e-6)
    assert end.value < 0.8 * first.value


def test_the_one_step_form_sees_nothing(made):
    world, labels, _ = made
    problem = decisions._problem(world.old, labels, 0.0, SMALL)
    x = jnp.asarray(np.random.default_rng(2).normal(size=SMALL.states + 1))
    whole = bj.hypergradient(problem, x, with_error=False).gradient[:-1]
    assert jnp.linalg.norm(whole) > 1
    assert jnp.linalg.norm(decisions.one_step_gradient(problem, x)) < 1e-5 * jnp.linalg.norm(whole)


@pytest.mark.slow
def test_many_sure_labels_of_decisions_give_the_reward_and_no_advantage_does():
    options = dataclasses.replace(
        decisions.DecisionsOptions(), labels=(3000,), held_out=200, mdps=4, nearness=(0.0, 1.0)
    )
    data = decisions._chunks(range(options.mdps), decisions.Setting("decisions", "oracle", 3000), options)
    made = {name: decisions._learn(name, data, 0.01, options) for name in ("bilevel", "drlhf_sa", "true_reward")}
    np.testing.assert_allclose(made["true_reward"].gain, 1, rtol=1e-9)
    assert (made["bilevel"].gain > 0.97).all()
    assert (made["bilevel"].gradient < 1e-3).all()
    # In the process whose advantage it is, it serves; elsewhere it does not.
    assert (made["drlhf_sa"].gain[:, 0] > 0.9).all()
    assert made["drlhf_sa"].gain[:, 1].mean() < 0.6
    assert made["bilevel"].losses.mean() < made["drlhf_sa"].losses.mean()
    # Of labels with noise, the product of rationality and temperature is found, though neither was told.
    data = decisions._chunks(range(options.mdps), decisions.Setting("decisions", "boltzmann", 3000), options)
    product = decisions._learn("bilevel", data, 0.01, options).product
    np.testing.assert_allclose(product, options.rationality * options.temperature, rtol=0.4)


def invented(setting, options):
    """Rows as of a run, with numbers that are not."""
    rng = np.random.default_rng([len(setting.judging), len(setting.teacher), setting.labels])
    names = [name for name in decisions.LEARNERS if not name.startswith("bilevel_")]
    common = {"strength": 1.0, "loss": 0.5, "gradient": 1e-6, "product": "", "verdict_few": "", "verdict": "decisions"}
    tried = [{**setting._asdict(), "learner": name, "strength": 1.0, "loss": 0.5} for name in decisions.FITTED]
    rows = [
        {**setting._asdict(), "learner": name, "seed": seed, **common}
        | {column: float(rng.uniform()) for column in decisions._gains(options)}
        for name in names
        for seed in range(options.mdps)
    ]
    return tried, rows


def test_rows_are_kept_and_tables_are_theirs(tmp_path, monkeypatch):
    ran = []

    def run_setting(setting, options):
        ran.append(setting)
        return invented(setting, options)

    monkeypatch.setattr(decisions, "_run_setting", run_setting)
    out = tmp_path / "out"
    called = call(decisions.STUDY, *WORDS.split(), "--out", out)
    assert called.code == 0, called.message
    settings = decisions.settings(SMALL)
    assert ran == settings
    assert len(settings) == len(set(settings)) == 12
    rows = read_rows(out / "decisions.csv")
    first = [row for row in rows if decisions._setting(row) == settings[0]]
    kept = {name: np.array([float(r["gain_1"]) for r in first if r["learner"] == name]) for name in decisions.FITTED}
    table, paired = read_rows(out / "decisions_table.csv"), read_rows(out / "decisions_paired.csv")
    for row in table:
        if decisions._setting(row) == settings[0] and row["learner"] in kept:
            assert float(row["gain_1"]) == pytest.approx(kept[row["learner"]].mean(), rel=1e-4)
            assert float(row["gain_1_standard_error"]) == pytest.approx(stats.sem(kept[row["learner"]]), rel=1e-4)
    for row in paired:
        if decisions._setting(row) == settings[0] and row["against"] in kept:
            test = stats.ttest_rel(kept["bilevel"], kept[row["against"]])
            low, high = test.confidence_interval(0.95)
            assert float(row["gain_1"]) == pytest.approx((low + high) / 2, rel=1e-4, abs=1e-6)
            assert float(row["gain_1_margin"]) == pytest.approx((high - low) / 2, rel=1e-4)
    assert (out / "decisions.png").stat().st_size > 10_000
    # A run that was cut off goes on where it was.
    text = (out / "decisions.csv").read_text().splitlines(keepends=True)
    last = settings[-1]
    words = f"{last.judging},{last.teacher},{last.labels},"
    (out / "decisions.csv").write_text("".join(line for line in text if not line.startswith(words)))
    ran.clear()
    assert call(decisions.STUDY, *WORDS.split(), "--out", out).code == 0
    assert ran == [last]
    assert (out / "decisions.csv").read_text() == "".join(text)
    assert read_rows(out / "decisions_table.csv") == table
    # Rows of other options are no part of it.
    called = call(decisions.STUDY, *WORDS.split(), "--discount", "0.5", "--out", out)
    assert (called.code, "has rows of other options" in called.message) == (2, True)


@pytest.mark.slow
def test_a_small_run(tmp_path):
    called = call(decisions.STUDY, *WORDS.split(), "--out", tmp_path / "out")
    assert called.code == 0, called.message
    rows = read_rows(tmp_path / "out" / "decisions.csv")
    assert len(rows) == 3 * (12 * 6 + 3)
    table = {
        (*decisions._setting(row), row["learner"]): row for row in read_rows(tmp_path / "out" / "decisions_table.csv")
    }
    for setting in decisions.settings(SMALL):
        for share in SMALL.nearness:
            assert float(table[(*setting, "true_reward")][f"gain_{share:g}"]) == pytest.approx(1, rel=1e-5)
            assert float(table[(*setting, "one_step")][f"gain_{share:g}"]) == 0
    right = {
        judging: table[judging, "oracle", 40, name]
        for judging, name in zip(decisions.JUDGINGS, ("bilevel", "drlhf_s"), strict=True)
    }
    assert all(float(row["gain_0"]) > 0.5 for row in right.values())
    tuning = read_rows(tmp_path / "out" / "decisions_tuning.csv")
    assert len(tuning) == 12 * 4 * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mdps 0", "mdps must be at least 1, got 0"),
        ("--branching 21", "branching: "),
        ("--nearness 0 0.5", "nearness: expected 0 and 1 among them"),
        ("--labels 0 5", "labels: expected numbers above 0"),
    ],
)
def test_bad_options(tmp_path, words, message):
    called = call(decisions.STUDY, *words.split(), "--out", tmp_path / "out")
    assert called.code == 2
    assert message in called.message
