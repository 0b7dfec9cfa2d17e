"""Losses of labels, the fitted rationality, and the verdict: against numpy, scipy and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

import bilevel_jax as bj
from bilevel_jax import preferences as pf

RNG = np.random.default_rng(7)
COUNT, LENGTH, PAIRS, STATES, ACTIONS = 8, 5, 30, 4, 3
SEGMENTS = pf.Segments(
    RNG.integers(0, STATES, (COUNT, LENGTH)).astype(np.int32),
    RNG.integers(0, ACTIONS, (COUNT, LENGTH)).astype(np.int32),
    RNG.integers(0, STATES, (COUNT, LENGTH)).astype(np.int32),
    valid=np.arange(LENGTH)[None] < RNG.integers(2, LENGTH + 1, COUNT)[:, None],
)
DATA = pf.Preferences(
    SEGMENTS,
    RNG.integers(0, COUNT, (PAIRS, 2)),
    RNG.choice([0, 0.5, 1, 0.3], PAIRS),
    RNG.choice([0.0, 1.0, 2.0], PAIRS),
)
REWARD = RNG.normal(size=(STATES, ACTIONS))
LOGITS = RNG.normal(size=(STATES, ACTIONS))


def negative_log(gain, label):
    gain = np.asarray(gain, np.longdouble)
    return label * np.logaddexp(0, -gain) + (1 - label) * np.logaddexp(0, gain)


def by_hand(table):
    """The gain of each pair if the steps score table[s, a]."""
    total = np.zeros(COUNT, np.longdouble)
    for n in range(COUNT):
        for h in range(LENGTH):
            if SEGMENTS.valid[n, h]:
                total[n] += table[int(SEGMENTS.observation[n, h]), int(SEGMENTS.action[n, h])]
    return np.array([total[i] - total[j] for i, j in np.asarray(DATA.pairs)])


def test_losses_of_outcomes():
    scores = pf.outcome_scores(bj.Table(REWARD), SEGMENTS)
    np.testing.assert_allclose(pf.gains(DATA, scores), by_hand(REWARD).astype(float), rtol=1e-13, atol=1e-14)
    losses = negative_log(1.7 * by_hand(REWARD), np.asarray(DATA.label))
    np.testing.assert_allclose(pf.pair_losses(DATA, scores, 1.7), losses.astype(float), rtol=1e-12)
    weight = np.asarray(DATA.weight)
    mean = float((weight * losses).sum() / weight.sum())
    np.testing.assert_allclose(pf.preference_loss(DATA, scores, 1.7), mean, rtol=1e-13)
    plain = pf.outcome_scores(lambda s, a, following: jnp.asarray(REWARD)[s, a], SEGMENTS)
    np.testing.assert_array_equal(plain, scores)


def test_losses_of_decisions():
    log_policy = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
    policy = jnp.exp(jnp.asarray(log_policy))
    scores = pf.decision_scores(policy, SEGMENTS, 0.3)
    losses = negative_log(2 * by_hand(0.3 * log_policy), np.asarray(DATA.label))
    np.testing.assert_allclose(pf.pair_losses(DATA, scores, 2), losses.astype(float), rtol=1e-12)


def test_nothing_judged_costs_nothing():
    none = pf.Preferences(SEGMENTS, DATA.pairs)
    assert float(pf.preference_loss(none, jnp.full((COUNT, LENGTH), jnp.inf))) == 0
    gradient = jax.grad(lambda scores: pf.preference_loss(none, scores))(jnp.ones((COUNT, LENGTH)))
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("kind", ["outcomes", "decisions"])
def test_derivatives_of_the_loss(kind):
    """In the table and in the logarithm of the rationality, against central differences."""

    def loss(parameters):
        table, log_rationality = parameters
        if kind == "outcomes":
            scores = pf.outcome_scores(bj.Table(table), SEGMENTS)
        else:
            scores = pf.decision_scores(jax.nn.softmax(table), SEGMENTS, 0.7)
        return pf.preference_loss(DATA, scores, jnp.exp(log_rationality))

    start = (jnp.asarray(REWARD), jnp.asarray(0.4))
    gradient = jax.grad(loss)(start)
    compiled, rng = jax.jit(loss), np.random.default_rng(8)
    for _ in range(3):
        way = (jnp.asarray(rng.normal(size=REWARD.shape)), jnp.asarray(rng.normal()))
        step = 1e-5
        up, down = (compiled(jax.tree.map(lambda x, d, s=s: x + s * d, start, way)) for s in (step, -step))
        slope = sum(float(jnp.sum(g * d)) for g, d in zip(gradient, way, strict=True))
        np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-7, atol=1e-9)


def test_in_float32():
    scores = pf.outcome_scores(bj.Table(jnp.asarray(REWARD, jnp.float32)), SEGMENTS)
    assert scores.dtype == pf.pair_losses(DATA, scores).dtype == jnp.float32
    np.testing.assert_allclose(
        pf.preference_loss(DATA, scores), pf.preference_loss(DATA, scores.astype(float)), rtol=1e-6
    )


def test_an_infinite_rationality_is_always_right():
    data = pf.Preferences(SEGMENTS, DATA.pairs[:5], [1.0, 0.0, 0.5, 0.5, 1.0])
    gain = jnp.asarray([2.0, -1.0, 0.0, 1.0, -1.0])
    scores = jnp.zeros((COUNT, LENGTH)).at[:, 0].set(np.arange(COUNT) % 5.0)
    got = pf.pair_losses(data, scores, jnp.inf)
    want = [
        np.log(2) if g == 0 else 0.0 if y == float(g > 0) else np.inf
        for g, y in zip(pf.gains(data, scores), data.label, strict=True)
    ]
    np.testing.assert_allclose(got, want)
    np.testing.assert_allclose(pf.likelihood._losses(gain, data.label, jnp.inf), [0, 0, np.log(2), np.inf, np.inf])


# The rationality.


def noisy(count=40, scale=1.0, rationality=2.0, seed=0):
    rng = np.random.default_rng(seed)
    gain = scale * rng.normal(size=count)
    return gain, (rng.random(count) < 1 / (1 + np.exp(-rationality * gain / scale))).astype(float)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("rationality", [1.0, 2.0, 8.0])
def test_the_fitted_rationality_is_the_minimum(scale, rationality):
    gain, label = noisy(60, scale, rationality, seed=3)
    weight = np.random.default_rng(4).choice([0.0, 1.0, 3.0], gain.size)
    gain[weight == 0] = np.nan  # of pairs that were not judged

    def cost(log):
        b = np.exp(log) / scale
        return float(sum(w * negative_log(b * g, y) for w, g, y in zip(weight, gain, label, strict=True) if w))

    want = np.exp(optimize.minimize_scalar(cost, bounds=(-8, 8), method="bounded", options={"xatol": 1e-10}).x) / scale
    fit = pf.fit_rationality(gain, label, weight)
    assert not (fit.at_zero | fit.at_infinity | fit.undetermined)
    np.testing.assert_allclose(fit.rationality, want, rtol=1e-6)
    np.testing.assert_allclose(fit.loss, cost(np.log(want * scale)) / weight.sum(), rtol=1e-9)
    b, g, w = float(fit.rationality), gain[weight > 0], weight[weight > 0]
    chance = 1 / (1 + np.exp(-b * g))
    slope = np.sum(w * g * (chance - label[weight > 0]))
    curvature = np.sum(w * g**2 * chance * (1 - chance))
    assert abs(slope) < 1e-12 * np.sum(w * np.abs(g))
    np.testing.assert_allclose(fit.standard_error, curvature**-0.5, rtol=1e-9)


def test_the_fit_in_float32():
    gain, label = noisy()
    want = pf.fit_rationality(gain, label).rationality
    got = pf.fit_rationality(gain.astype(np.float32), label.astype(np.float32)).rationality
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_nearly_separable_labels_still_have_a_minimum():
    """One label in contradiction, of a gain a million times smaller: the root is far out."""
    gain, label = np.array([1.0, -1.0, 1e-6]), np.array([1.0, 0.0, 0.0])
    fit = pf.fit_rationality(gain, label)
    slope = lambda b: 2 * -1 / (1 + np.exp(b)) + 1e-6 / (1 + np.exp(-1e-6 * b))  # noqa: E731
    assert not fit.at_infinity
    np.testing.assert_allclose(fit.rationality, optimize.brentq(slope, 1, 100, xtol=1e-13), rtol=1e-10)


@pytest.mark.parametrize(
    ("gain", "label", "flag", "rationality", "loss"),
    [
        ([1.0, -2.0, 0.0], [1.0, 0.0, 0.5], "at_infinity", np.inf, np.log(2) / 3),
        ([1.0, -2.0], [0.0, 1.0], "at_zero", 0.0, np.log(2)),
        ([1.0, 1.0], [0.5, 0.5], "at_zero", 0.0, np.log(2)),
        ([1.0, 1.0], [1.0, 0.0], "at_zero", 0.0, np.log(2)),
        ([0.0, 0.0], [1.0, 0.0], "undetermined", np.nan, np.log(2)),
        ([], [], "undetermined", np.nan, np.nan),
    ],
)
def test_where_the_rationality_has_no_value_inside(gain, label, flag, rationality, loss):
    fit = pf.fit_rationality(np.array(gain), np.array(label))
    assert [name for name in ("at_zero", "at_infinity", "undetermined") if getattr(fit, name)] == [flag]
    np.testing.assert_array_equal(fit.rationality, rationality)
    np.testing.assert_allclose(fit.loss, loss, rtol=1e-15)
    assert np.isnan(fit.standard_error)
    gradient = jax.grad(lambda gain: jnp.nan_to_num(pf.fit_rationality(gain, np.array(label)).rationality))(
        jnp.array(gain)
    )
    np.testing.assert_array_equal(gradient, np.zeros(len(gain)))


def test_derivatives_and_vmap_of_the_fit():
    gain, label = map(jnp.asarray, noisy())
    rng = np.random.default_rng(6)
    weight = jnp.asarray(rng.random(gain.size))
    ways = tuple(jnp.asarray(rng.normal(size=gain.size)) for _ in range(3))
    point = (gain, 0.9 * label + 0.05, weight)
    gradient = jax.grad(lambda *x: pf.fit_rationality(*x).rationality, (0, 1, 2))(*point)
    step = 1e-6
    moved = [tuple(x + s * d for x, d in zip(point, ways, strict=True)) for s in (step, -step)]
    up, down = jax.jit(jax.vmap(pf.fit_rationality))(
        *(jnp.stack(both) for both in zip(*moved, strict=True))
    ).rationality
    slope = sum(float(jnp.sum(g * d)) for g, d in zip(gradient, ways, strict=True))
    np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-6)


def test_standard_errors_are_those_of_repeated_labels():
    """400 sets of 200 labels of rationality 1.5: (fit - 1.5) / standard error has mean 0 and spread 1 but for chance.

    The spread of 400 standard normals is off by more than 0.15 once in 50,000; an error off by a third is always seen.
    The mean may be off by 0.3: the fit is biased upward by about a tenth of a standard error.
    """
    rng = np.random.default_rng(1)
    gain = rng.normal(size=(400, 200))
    label = (rng.random((400, 200)) < 1 / (1 + np.exp(-1.5 * gain))).astype(float)
    fit = jax.jit(jax.vmap(pf.fit_rationality))(gain, label)
    scores = np.asarray((fit.rationality - 1.5) / fit.standard_error)
    assert abs(scores.mean()) < 0.3
    assert abs(scores.std() - 1) < 0.15


# The verdict.


def test_the_verdict_is_a_paired_t_test():
    rng = np.random.default_rng(2)
    outcome, decision = rng.gamma(2, 0.3, 50), rng.gamma(2, 0.2, 50)
    verdict = pf.judged_by(outcome, decision)
    interval = stats.ttest_rel(outcome, decision).confidence_interval(0.95)
    np.testing.assert_allclose(verdict.difference - verdict.margin, interval.low, rtol=1e-12)
    np.testing.assert_allclose(verdict.difference + verdict.margin, interval.high, rtol=1e-12)
    # A pair of weight 0 is not there.
    padded = pf.judged_by(np.append(outcome, np.nan), np.append(decision, 0.0), np.append(np.full(50, 3.0), 0.0))
    np.testing.assert_allclose(padded[2:7], verdict[2:7], rtol=1e-12)
    assert padded.pairs == 50


def test_how_often_a_verdict_is_wrong():
    """Losses that do not differ name a model in 5% of 1,000 verdicts, and a difference of one standard deviation over
    40 pairs is named always but once in 10,000.

    More than 8.5% false alarms come by chance less than once in 100,000, of a margin that is a tenth too small at least
    half of the time.
    """
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(1000, 40))
    named = [pf.judged_by(np.full(40, 0.4), 0.4 + 0.1 * row).kind for row in noise]
    assert 0.025 < np.mean(np.array(named) != "unclear") < 0.085
    seen = [pf.judged_by(np.full(40, 0.5), 0.4 + 0.1 * row).kind for row in noise[:200]]
    assert set(seen) == {"decisions"}


def test_verdicts_in_words():
    low, high = np.full(20, 0.2) + np.tile([0.05, -0.05], 10), np.full(20, 0.6)
    assert pf.judged_by(low, high).text.startswith(
        "the labels judge outcomes (held-out loss 0.200 against 0.600, difference 0.400 +- 0.0"
    )
    assert pf.judged_by(high, low).text.startswith("the labels judge decisions (held-out loss 0.200 against 0.600")
    assert pf.judged_by(low, low).kind == "unclear"
    assert pf.judged_by(low, low).text.startswith("these labels do not tell (held-out loss 0.200")
    assert "neither model predicts them better than a coin" in pf.judged_by(high + 0.1, high + 0.3).text
    few = pf.judged_by(low[:1], high[:1])
    assert (few.kind, few.text) == ("unclear", "these labels do not tell: 1 held-out pairs were judged")
    assert pf.judged_by([], []).pairs == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pf.gains(DATA, np.ones((COUNT, LENGTH + 1))), r"scores: expected shape \[8, 5\], got \[8, 6\]"),
        (lambda: pf.pair_losses(DATA, np.ones((COUNT, LENGTH)), -1.0), "rationality must be at least 0"),
        (lambda: pf.fit_rationality([[1.0]], [1.0]), r"gain: expected \[pairs\]"),
        (lambda: pf.fit_rationality([1.0, np.nan], [1.0, 1.0]), r"gain\[1\] is nan"),
        (lambda: pf.fit_rationality([1.0], [1.5]), "label must be from 0 to 1"),
        (lambda: pf.fit_rationality([1.0], [1.0], [-1.0]), "weight must be at least 0"),
        (lambda: pf.judged_by([1.0], [1.0, 2.0]), "decision_losses: expected one for each pair"),
        (lambda: pf.judged_by([1.0, np.inf], [1.0, 2.0]), r"outcome_losses\[1\] is inf"),
        (lambda: pf.judged_by([1.0, 1.0], [1.0, 2.0], [1.0]), r"weight: expected shape \[2\]"),
        (
            lambda: pf.judged_by([1.0, 1.0], [1.0, 2.0], confidence=95),
            "confidence: expected a number above 0 and below 1",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(bj.InputError, match=message):
        call()
