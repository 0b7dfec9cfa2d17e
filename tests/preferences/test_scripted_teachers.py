"""B-Pref's teachers: against a plain program of their rules, and by frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import bilevel_jax as bj
from bilevel_jax import preferences as pf
from bilevel_jax.preferences import ScriptedTeacher

RNG = np.random.default_rng(5)
# Whole numbers, so that sums tie and thresholds are met exactly.
ONE, TWO = (jnp.asarray(RNG.integers(-2, 3, (60, 4)).astype(float)) for _ in range(2))
VALID_ONE, VALID_TWO = (jnp.asarray(np.arange(4)[None] < RNG.integers(1, 5, 60)[:, None]) for _ in range(2))
TEACHERS = {
    "oracle": ScriptedTeacher.oracle(),
    "boltzmann": ScriptedTeacher.boltzmann(0.8),
    "mistaken": ScriptedTeacher.mistaken(0.1),
    "myopic": ScriptedTeacher.myopic(0.9),
    "last step": ScriptedTeacher.myopic(0.0),
    "skipping": ScriptedTeacher.skipping(1.0),
    "tying": ScriptedTeacher.tying(2.0),
    "all": ScriptedTeacher(0.7, 0.8, 0.2, -1.0, 1.5),
}


def by_hand(teacher, one, two):
    """(expected label, judged) from the scores of the valid steps, as B-Pref's program has it."""
    rationality, discount, mistake, skip, equal = (float(leaf) for leaf in jax.tree.leaves(teacher))
    if not max(sum(one), sum(two)) > skip:
        return 0.5, False
    if abs(sum(one) - sum(two)) < equal:
        return 0.5, True
    gain = 0.0
    for sign, scores in ((1, one), (-1, two)):
        weighted = list(scores)
        for h in range(len(weighted) - 1):
            weighted[: h + 1] = [discount * score for score in weighted[: h + 1]]
        gain += sign * sum(weighted)
    if np.isinf(rationality):
        p = 0.5 if abs(gain) < 1e-12 else float(gain > 0)
    else:
        p = 1 / (1 + np.exp(-rationality * gain))
    return (1 - mistake) * p + mistake * (1 - p), True


@pytest.mark.parametrize("name", TEACHERS)
def test_labels_are_expected_as_the_rules_say(name):
    teacher = TEACHERS[name]
    want = [
        by_hand(teacher, np.asarray(one)[v], np.asarray(two)[w])
        for one, two, v, w in zip(ONE, TWO, np.asarray(VALID_ONE), np.asarray(VALID_TWO), strict=True)
    ]
    # Steps that are not valid may hold anything.
    one, two = (jnp.where(v, x, jnp.nan) for v, x in ((VALID_ONE, ONE), (VALID_TWO, TWO)))
    label, judged = teacher.mean_label(one, two, VALID_ONE, VALID_TWO)
    np.testing.assert_array_equal(judged, [w[1] for w in want])
    np.testing.assert_allclose(label, [w[0] for w in want], rtol=1e-12)
    other, _ = teacher.mean_label(two, one, VALID_TWO, VALID_ONE)
    np.testing.assert_allclose(label, 1 - other, rtol=1e-12)  # fair
    drawn, drawn_judged = teacher.judge(jax.random.key(0), one, two, VALID_ONE, VALID_TWO)
    np.testing.assert_array_equal(drawn_judged, judged)
    assert set(np.asarray(drawn).tolist()) <= {0.0, 0.5, 1.0}
    certain = np.isin(np.asarray(label), [0, 1])
    np.testing.assert_array_equal(np.asarray(drawn)[certain], np.asarray(label)[certain])


@pytest.mark.parametrize("name", ["boltzmann", "mistaken", "all"])
def test_labels_come_with_their_probabilities(name):
    """An exact binomial test of the label 1 at a level of 1 in 100,000 for each of three teachers.

    40,000 labels show a probability that is off by 0.015 with a chance of more than 0.93: the standard error is at most
    0.0025, the level 4.4 of them away.
    """
    teacher, count = TEACHERS[name], 40_000
    one, two = jnp.asarray([1.0, 0.0, 1.0, 1.0]), jnp.asarray([0.5, 0.5, 0.0, 0.2])
    label, judged = teacher.judge(jax.random.key(2), jnp.tile(one, (count, 1)), jnp.tile(two, (count, 1)))
    mean = float(teacher.mean_label(one, two).label)
    assert bool(judged.all())
    assert 0.05 < mean < 0.95
    firsts = int(np.sum(np.asarray(label) == 1))
    assert int(np.sum(np.asarray(label) == 0)) == count - firsts
    assert stats.binomtest(firsts, count, mean).pvalue > 1e-5


def test_mistakes_are_independent_of_the_answer():
    """Of a fair coin's labels mistakes change nothing; of an oracle's they are as many for either side (level 1e-5)."""
    count = 40_000
    one, two = jnp.ones((count, 1)), jnp.zeros((count, 1))
    teacher = ScriptedTeacher.mistaken(0.3)
    wrong = int(np.sum(np.asarray(teacher.judge(jax.random.key(0), one, two).label) == 0))
    wrong_again = int(np.sum(np.asarray(teacher.judge(jax.random.key(1), two, one).label) == 1))
    for number in (wrong, wrong_again):
        assert stats.binomtest(number, count, 0.3).pvalue > 1e-5


def test_all_teachers_in_one_vmap_and_in_float32():
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *TEACHERS.values())
    one, two = ONE.astype(jnp.float32), TWO.astype(jnp.float32)
    label, judged = jax.jit(jax.vmap(lambda teacher: teacher.mean_label(one, two)))(many)
    assert label.dtype == jnp.float32
    for got, kept, teacher in zip(label, judged, TEACHERS.values(), strict=True):
        want = teacher.mean_label(ONE, TWO)
        np.testing.assert_array_equal(kept, want.judged)
        np.testing.assert_allclose(got, want.label, atol=1e-6)


def test_labelled_fills_in_a_data_set():
    segments = pf.Segments(
        jnp.zeros((4, 2)), jnp.zeros((4, 2)), valid=jnp.ones((4, 2), bool), reward=[[0, 0], [1, 1], [2, 2], [0, 1]]
    )
    data = pf.Preferences(segments, [[0, 1], [2, 1], [3, 0]])
    made = pf.labelled(jax.random.key(0), ScriptedTeacher(skip=1.5), data)
    assert made.label.tolist() == [0, 1, 0.5]
    assert made.weight.tolist() == [1, 1, 0]
    # By decisions: other scores than the rewards.
    advantages = jnp.asarray([[0.0, 0.0], [-1.0, 0.0], [-2.0, 0.0], [-3.0, 0.0]])
    assert pf.labelled(jax.random.key(0), ScriptedTeacher(), data, advantages).label.tolist() == [1, 0, 0]
    smooth = pf.labelled(jax.random.key(0), pf.Teacher(1e6), data)
    assert (smooth.label.tolist(), smooth.weight.tolist()) == ([0, 1, 1], [1, 1, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScriptedTeacher(rationality=-1.0), "rationality must be at least 0"),
        (lambda: ScriptedTeacher(rationality=np.nan), "rationality must be at least 0, got nan"),
        (lambda: ScriptedTeacher(discount=1.1), "discount must be at most 1"),
        (lambda: ScriptedTeacher(mistake=1.1), "mistake must be at most 1"),
        (lambda: ScriptedTeacher(equal=-0.1), "equal must be at least 0"),
        (lambda: ScriptedTeacher(skip=np.nan), "skip must be at least -inf, got nan; -inf skips none"),
        (lambda: ScriptedTeacher().mean_label(1.0, 2.0), "scores: expected those of the steps"),
        (
            lambda: pf.labelled(
                jax.random.key(0),
                ScriptedTeacher(),
                pf.Preferences(
                    pf.Segments(jnp.zeros((2, 2)), jnp.zeros((2, 2)), valid=jnp.ones((2, 2), bool)), [[0, 1]]
                ),
            ),
            "the segments have no hidden reward",
        ),
    ],
)
def test_refuses(make, message):
    with pytest.raises(bj.InputError, match=message):
        make()
