"""The preferences study: its fit against scipy, its ranking against Kendall's tau and brute force, its loop by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_helpers import read_rows
from scipy import optimize, stats
from studies_helpers import call

import bilevel_jax as bj
from benchmarks.studies import preferences
from bilevel_jax.core.errors import InputError
from bilevel_jax.preferences import fit_linear_reward as fit
from bilevel_jax.preferences import misordered_fraction as misordered
from bilevel_jax.preferences import segment_features

RNG = np.random.default_rng(0)


def problem(**options):
    sizes = {"states": 3, "actions": 2, "starts": 2, "length": 2, "labels": "sampled"}
    return bj.problems.make("tabular_rlhf", **{**sizes, **options})


# The ranking.


def brute_force(learned, hidden, weight):
    wrong = total = 0.0
    for i in range(hidden.size):
        for j in range(i):
            if hidden[i] != hidden[j]:
                pair = weight[i] * weight[j]
                order = np.sign(hidden[i] - hidden[j]) * np.sign(learned[i] - learned[j])
                wrong += pair * {1: 0.0, 0: 0.5, -1: 1.0}[order]
                total += pair
    return wrong / total


@pytest.mark.parametrize("ties", [False, True])
def test_misordered_is_counted_right(ties):
    count = 300  # more than one batch of rows, and no whole number of them
    hidden = RNG.integers(0, 40, count) / 7 if ties else RNG.normal(size=count)
    learned = hidden + RNG.normal(size=count)
    learned = np.round(learned) if ties else learned
    weights = np.stack([np.ones(count), RNG.dirichlet(np.full(count, 0.1))])
    got = misordered(*map(jnp.asarray, (learned, hidden, weights)))
    np.testing.assert_allclose(got, [brute_force(learned, hidden, w) for w in weights], rtol=1e-10)
    # Kendall's tau-b divides by the geometric mean of the pairs that tie not in the one and not in the other.
    untied = [np.sum(x[:, None] != x) for x in (hidden, learned)]
    tau = stats.kendalltau(learned, hidden).statistic * np.sqrt(untied[1] / untied[0])
    assert got[0] == pytest.approx((1 - tau) / 2, rel=1e-10)


def test_misordered_at_its_ends():
    hidden = jnp.asarray([1.0, 2.0, 2.0 + 1e-12, 5.0])  # a tie but for rounding
    ones = jnp.ones((1, 4))
    assert misordered(3 * hidden + 1, hidden, ones)[0] == 0
    assert misordered(-hidden, hidden, ones)[0] == 1
    assert misordered(0 * hidden, hidden, ones)[0] == 0.5
    assert misordered(jnp.asarray([1.0, 3.0, 2.0, 5.0]), hidden, ones)[0] == 0
    # Only the last pair has weight.
    assert misordered(jnp.asarray([9.0, 8.0, 6.0, 5.0]), hidden, jnp.asarray([[0.0, 0.0, 0.5, 0.5]]))[0] == 1
    assert np.isnan(misordered(hidden, 0 * hidden, ones)[0])


# The fit.


def logistic_regression(features, label, ridge):
    """Another minimiser of the same: scipy's BFGS on formulas of its own, polished by scipy's root finder."""

    def loss(x):
        gain = features @ x
        return np.sum(label * np.logaddexp(0, -gain) + (1 - label) * np.logaddexp(0, gain)) + ridge * x @ x / 2

    def slope(x):
        return features.T @ (1 / (1 + np.exp(-features @ x)) - label) + ridge * x

    x = optimize.minimize(loss, np.zeros(features.shape[1]), jac=slope, method="BFGS").x
    found = optimize.root(slope, x, tol=1e-13)
    assert np.abs(slope(found.x)).max() < 1e-8 * ridge  # |x - x*| is at most |slope| / ridge
    return found.x


def test_fit_is_the_logistic_regression():
    jitted = jax.jit(fit)
    features = RNG.normal(size=(60, 5))
    label = RNG.choice([0.0, 0.5, 1.0], 60)
    cases = [
        (label, 0.1),
        (label, 30.0),
        (label, 1e-3),
        ((features @ np.arange(5) > 0).astype(float), 1e-2),  # separated: only the ridge holds it
    ]
    for label, ridge in cases:
        want = logistic_regression(features, label, ridge)
        for start in (np.zeros(5), 30 * RNG.normal(size=5)):  # from far away, where plain Newton steps diverge
            got = jitted(jnp.asarray(features), jnp.asarray(label), ridge, jnp.asarray(start))
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)


def test_fit_in_single_precision():
    features, label = RNG.normal(size=(60, 5)), RNG.choice([0.0, 1.0], 60)
    single = [jnp.asarray(array, jnp.float32) for array in (features, label, 0.1, np.zeros(5))]
    got = fit(*single)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, logistic_regression(features, label, 0.1), rtol=1e-4)
    batch = jax.vmap(fit, (None, None, 0, None))(*single[:2], jnp.asarray([0.1, 1e4], jnp.float32), single[3])
    np.testing.assert_allclose(batch[0], got, rtol=1e-4)
    np.testing.assert_allclose(batch[1], (label - 0.5) @ features / 1e4, rtol=0.01)


def test_fit_has_the_derivatives_of_the_minimum():
    features, label = jnp.asarray(RNG.normal(size=(60, 3))), jnp.asarray(RNG.choice([0.0, 1.0], 60))
    along = jnp.asarray(RNG.normal(size=3))

    def value(features, label, ridge, start):
        return along @ fit(features, label, ridge, start)

    given = (features, label, jnp.asarray(0.5), jnp.ones(3))
    gradients = jax.jit(jax.grad(value, (0, 1, 2, 3)))(*given)
    np.testing.assert_array_equal(gradients[3], 0)  # whence it started does not matter
    for place, gradient in enumerate(gradients[:3]):
        direction = np.asarray(RNG.normal(size=np.shape(given[place])))
        ends = []
        for sign in (-1, 1):
            moved = [np.asarray(one) + (sign * 1e-5 * direction if k == place else 0) for k, one in enumerate(given)]
            ends.append(along @ logistic_regression(moved[0], moved[1], moved[2]))
        assert np.sum(gradient * direction) == pytest.approx(float(ends[1] - ends[0]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.ones(3)}, r"features: expected \[pairs, features\], got shape \[3\]"),
        ({"label": np.ones(3)}, "label"),
        ({"label": [2.0, 0.0]}, "label must be from 0 to 1, got 2"),
        ({"ridge": 0.0}, "ridge must be above 0, got 0; few labels"),
        ({"start": np.ones(2)}, "start"),
        ({"features": [[np.nan, 0, 0], [0, 0, 0]]}, "features"),
    ],
)
def test_fit_refuses(change, message):
    given = {"features": np.ones((2, 3)), "label": [1.0, 0.0], "ridge": 1.0, "start": np.zeros(3)}
    with pytest.raises(InputError, match=message):
        fit(**{**given, **change})


def test_numbers_of_other_types():
    whole = fit([[1, 0], [0, 1]], [1, 0], 1, [0, 0])
    assert whole.dtype == float
    np.testing.assert_array_equal(whole, fit(np.eye(2), [1.0, 0.0], 1.0, np.zeros(2)))
    half = fit(np.eye(2, dtype=np.float16), [1, 0], 1, [0, 0])
    assert half.dtype == np.float32  # widened
    np.testing.assert_allclose(half, whole, rtol=1e-5)
    assert misordered([1, 3, 2], [1, 2, 3], np.ones((1, 3), int))[0] == pytest.approx(1 / 3)


def test_misordered_refuses():
    with pytest.raises(InputError, match="weights: expected"):
        misordered(np.ones(3), np.ones(3), np.ones(3))
    with pytest.raises(InputError, match="hidden: expected"):
        misordered(np.ones(3), np.ones((3, 1)), np.ones((1, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("features", [0, 4])
def test_segment_features_give_the_returns(features):
    made = problem(features=features)
    x = jnp.asarray(RNG.normal(size=features or 6))
    table = segment_features(made)
    policy = jnp.full((3, 2), 0.5)
    np.testing.assert_allclose(table @ x, made.segments(policy, made.reward(x).values)[1], rtol=1e-12, atol=1e-14)
    if not features:
        np.testing.assert_array_equal(table.sum(1), 2)  # steps


# The study.


def by_hand(made, key, spread, ridge, labels):
    """The closed loop with lists and scipy: misordered fraction and weights after each round."""
    keys = jax.random.split(key, 3)
    x = spread * np.asarray(jax.random.normal(keys[0], (6,)))
    pairs, found = np.zeros((0, 2), int), []
    for count in labels:
        reward = jnp.asarray(x.reshape(3, 2))
        policy = bj.solve(made.mdp(jnp.asarray(x)), made.regularizer(x)).policy
        probability, _, hidden = made.segments(policy, reward)
        drawn = np.asarray(jax.random.choice(keys[1], hidden.size, (labels[-1], 2), p=probability))
        pairs = np.concatenate([pairs, drawn[len(pairs) : count]])
        # One number a pair, the same ones each time: the first so many labels do not change.
        every = np.concatenate([pairs, np.zeros((labels[-1] - count, 2), int)])
        label = np.asarray(made.teacher.label(keys[2], hidden[every[:, 0]], hidden[every[:, 1]]))[:count]
        table = np.asarray(segment_features(made))
        x = logistic_regression(table[pairs[:, 0]] - table[pairs[:, 1]], label, ridge)
        found.append(brute_force(table @ x, np.round(hidden, 12), np.ones(hidden.size)))
    return found


@pytest.mark.slow
def test_the_closed_loop_by_hand():
    made, labels = problem(), (3, 10, 40)
    curves = preferences._curves(made, jax.random.key(5), 2.0, 1.0, labels=labels)
    assert curves.shape == (4, 3, 3)
    uniform, first_model, closed_loop, truth = np.asarray(curves)
    np.testing.assert_allclose(closed_loop[:, 0], by_hand(made, jax.random.key(5), 2.0, 1.0, labels), rtol=1e-9)
    # The first round is the same; the fixed sets do not depend on the rounds, the closed loop's pairs do.
    np.testing.assert_array_equal(closed_loop[0], first_model[0])
    once = np.asarray(preferences._curves(made, jax.random.key(5), 2.0, 1.0, labels=labels[-1:]))
    np.testing.assert_allclose(once[:2, 0], [uniform[-1], first_model[-1]], rtol=1e-6)
    np.testing.assert_allclose(once[2, 0], first_model[-1], rtol=1e-6)
    np.testing.assert_array_equal(truth[:, :2], 0)
    assert (curves[..., 2] < 1).all()


@pytest.mark.slow
def test_the_ranking_is_recovered_as_labels_grow(tmp_path):
    words = "--problem states=3 actions=2 starts=3 length=2 --first 5 --most 2000 --points 2 --seeds 8"
    out = tmp_path / "out"
    called = call(preferences.STUDY, *words.split(), "--out", out)
    assert called.code == 0, called.err
    rows = read_rows(out / "preferences.csv")
    assert len(rows) == 4 * 2 * 8
    table = read_rows(out / "preferences_table.csv")
    for source in preferences.SOURCES:
        few, many = ([r for r in rows if r["source"] == source and r["labels"] == n] for n in ("5", "2000"))
        low, high = (row for row in table if row["source"] == source)
        for name, sign in (("misordered", -1), ("misordered_optimal", -1), ("gain", 1)):
            before, after = (np.array([float(row[name]) for row in own]) for own in (few, many))
            assert float(low[name]) == pytest.approx(before.mean(), rel=1e-4)
            assert float(high[name + "_standard_error"]) == pytest.approx(stats.sem(after), rel=1e-4)
            # The same MDPs and the same first pairs: the difference's own standard error.
            assert sign * np.mean(after - before) > 3 * stats.sem(after - before), (source, name)
        assert f"{source}, 2000 labels: " in called.out
    assert (out / "preferences.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--problem name=garnet",
            "problem: expected tabular_rlhf, whose segments are enumerated, got {'name': 'garnet'",
        ),
        ("--most 5", "most must be at least 10, got 5"),
        ("--points 0", "points must be at least 1, got 0"),
        ("--ridge 0", "ridge must be above 0, got 0; few labels"),
        ("--spread=-1", "spread must be at least 0, got -1"),
    ],
)
def test_bad_options(tmp_path, words, message):
    called = call(preferences.STUDY, *words.split(), "--out", tmp_path / "out")
    assert called.code == 2
    assert message in called.message
