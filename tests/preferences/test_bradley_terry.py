"""The Bradley-Terry likelihood and the teacher: against numpy, at the extremes, and by frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax.preferences import Teacher, log_likelihood, preference_probability, segment_return

RNG = np.random.default_rng(0)
ONE, TWO = jnp.asarray(3 * RNG.normal(size=50)), jnp.asarray(3 * RNG.normal(size=50))
LABEL = jnp.asarray(RNG.choice([0.0, 0.5, 1.0], size=50))
TEACHERS = {
    "bradley_terry": Teacher(),
    "ties": Teacher(rationality=1.3, tie_threshold=0.8),
    "noise": Teacher(rationality=2.0, noise=0.3),
    "all": Teacher(rationality=0.7, noise=0.2, tie_threshold=1.5),
    "guesses": Teacher(rationality=0.0, noise=0.0, tie_threshold=1.0),
}


def log_sigmoid(x):
    return -np.logaddexp(0, -np.asarray(x))


# The likelihood.


def test_log_likelihood_is_that_of_the_logistic_model():
    want = LABEL * log_sigmoid(ONE - TWO) + (1 - LABEL) * log_sigmoid(TWO - ONE)
    np.testing.assert_allclose(log_likelihood(ONE, TWO, LABEL), want, rtol=1e-14)
    np.testing.assert_allclose(preference_probability(ONE, TWO), np.exp(log_sigmoid(ONE - TWO)), rtol=1e-14)
    np.testing.assert_allclose(log_likelihood(ONE, TWO, 1.0), jnp.log(preference_probability(ONE, TWO)), rtol=1e-10)
    np.testing.assert_allclose(log_likelihood(ONE, TWO, LABEL), log_likelihood(TWO, ONE, 1 - LABEL), rtol=1e-14)
    assert log_likelihood(1, 0, 1) == pytest.approx(-np.log1p(np.exp(-1)))


def test_log_likelihood_keeps_its_digits():
    np.testing.assert_allclose(log_likelihood(40.0, 0.0, 1.0), -np.exp(-40.0), rtol=1e-14)
    np.testing.assert_allclose(log_likelihood(-40.0, 0.0, 0.0), -np.exp(-40.0), rtol=1e-14)
    np.testing.assert_allclose(log_likelihood(0.0, 1e300, 1.0), -1e300)
    assert log_likelihood(1e300, 0.0, 1.0) == 0
    single = log_likelihood(jnp.float32(20), jnp.float32(0), jnp.float32(1))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, -np.exp(-20.0), rtol=1e-6)


@pytest.mark.parametrize("gain", [0.0, 1e-9, 0.7, -3.0, 40.0, -40.0, 1e4, -1e4])
@pytest.mark.parametrize("label", [0.0, 0.5, 1.0])
def test_log_likelihood_derivatives(gain, label):
    def f(gain, label):
        return log_likelihood(gain, 0.0, label)

    with np.errstate(over="ignore"):
        up, down = 1 / (1 + np.exp(-gain)), 1 / (1 + np.exp(gain))
    np.testing.assert_allclose(jax.grad(f)(gain, label), label * down - (1 - label) * up, rtol=1e-13)
    np.testing.assert_allclose(jax.grad(jax.grad(f))(gain, label), -up * down, rtol=1e-12, atol=1e-16)
    np.testing.assert_allclose(jax.grad(f, 1)(gain, label), gain, rtol=1e-15)


def test_a_mean_label_gives_the_mean_likelihood():
    teacher = TEACHERS["all"]
    probability = teacher.probabilities(TWO, ONE)
    mean = sum(probability[:, i] * log_likelihood(ONE, TWO, label) for i, label in enumerate((1.0, 0.5, 0.0)))
    np.testing.assert_allclose(log_likelihood(ONE, TWO, teacher.mean_label(TWO, ONE)), mean, rtol=1e-13)


def test_segment_return_leaves_out_steps_that_are_not_valid():
    rewards = jnp.asarray([[1.0, 2.0, 4.0], [8.0, jnp.nan, jnp.inf], [jnp.nan, 1.0, 1.0]])
    valid = jnp.asarray([[True, True, True], [True, False, False], [False, False, False]])
    np.testing.assert_array_equal(segment_return(rewards, valid), [7, 8, 0])
    gradient = jax.grad(lambda r: jnp.sum(segment_return(r, valid)))(rewards)
    np.testing.assert_array_equal(gradient, valid.astype(float))


# The teacher.


@pytest.mark.parametrize("name", TEACHERS)
def test_teacher_is_as_defined(name):
    teacher = TEACHERS[name]
    rationality, noise, threshold = (float(leaf) for leaf in jax.tree.leaves(teacher))
    gain = np.asarray(ONE - TWO)
    first = np.exp(log_sigmoid(rationality * (gain - threshold)))
    second = np.exp(log_sigmoid(-rationality * (gain + threshold)))
    want = (1 - noise) * np.stack([first, 1 - first - second, second], -1) + noise * np.array([0.5, 0, 0.5])
    probability = teacher.probabilities(ONE, TWO)
    assert probability.shape == (50, 3)
    np.testing.assert_allclose(probability, want, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(np.sum(probability, -1), 1, rtol=1e-14)
    np.testing.assert_allclose(teacher.mean_label(ONE, TWO), want @ np.array([1, 0.5, 0]), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(probability, teacher.probabilities(TWO, ONE)[:, ::-1], rtol=1e-14)  # fair
    assert (np.asarray(probability[:, 1]) == 0).all() == (threshold == 0 or rationality == 0)


def test_a_teacher_without_ties_or_noise_is_the_bradley_terry_model():
    np.testing.assert_allclose(Teacher().mean_label(ONE, TWO), preference_probability(ONE, TWO), rtol=1e-14)


def test_a_rational_teacher_declares_ties_below_the_threshold():
    teacher = Teacher(rationality=1e4, tie_threshold=0.5)
    probability = teacher.probabilities(jnp.asarray([0.0, 0.49, -0.49, 0.51, -0.51, 1e6]), jnp.zeros(6))
    want = [[0, 1, 0], [0, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]]
    np.testing.assert_allclose(probability, want, atol=1e-12)


def test_small_tie_probabilities_keep_their_digits():
    tie = Teacher(rationality=1e-9, tie_threshold=1e-3).probabilities(0.0, 0.0)[1]
    np.testing.assert_allclose(tie, 0.5e-12, rtol=1e-9)


@pytest.mark.parametrize("name", TEACHERS)
def test_labels_come_with_their_probabilities(name):
    """Each frequency within 4 standard errors: 8 chances in 100,000 of a false alarm for each of the 5 by 3."""
    teacher, count = TEACHERS[name], 100_000
    labels = teacher.label(jax.random.key(1), jnp.full(count, 0.4), jnp.full(count, 1.1))
    probability = np.asarray(teacher.probabilities(0.4, 1.1))
    frequency = np.array([np.mean(np.asarray(labels) == label) for label in (1, 0.5, 0)])
    assert frequency.sum() == pytest.approx(1)
    assert (np.abs(frequency - probability) <= 4 * np.sqrt(probability * (1 - probability) / count)).all()
    np.testing.assert_array_equal(labels, teacher.label(jax.random.key(1), jnp.full(count, 0.4), jnp.full(count, 1.1)))


def test_teacher_in_float32_jit_and_vmap():
    one, two = ONE.astype(jnp.float32), TWO.astype(jnp.float32)
    teacher = TEACHERS["all"]
    assert teacher.probabilities(one, two).dtype == jnp.float32
    assert teacher.label(jax.random.key(0), one, two).dtype == jnp.float32
    np.testing.assert_allclose(teacher.probabilities(one, two), teacher.probabilities(ONE, TWO), atol=1e-6)
    rationality = jnp.asarray([0.0, 1.0, 5.0])
    many = jax.jit(jax.vmap(lambda r: Teacher(r, tie_threshold=0.2).probabilities(ONE, TWO)))(rationality)
    for got, r in zip(many, rationality, strict=True):
        np.testing.assert_allclose(got, Teacher(r, tie_threshold=0.2).probabilities(ONE, TWO), rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rationality": -1.0}, r"rationality must be at least 0, got -1; 0 is a teacher who always guesses"),
        ({"rationality": float("inf")}, r"rationality is inf"),
        ({"rationality": [1.0, 2.0]}, r"rationality: expected a number, got shape \[2\]; vmap"),
        ({"noise": 1.2}, r"noise must be at most 1, got 1.2; 0 is none"),
        ({"noise": -0.1}, r"noise must be at least 0, got -0.1"),
        ({"tie_threshold": -0.1}, r"tie_threshold must be at least 0, got -0.1; 0 never ties"),
        ({"tie_threshold": "high"}, r"tie_threshold: expected an array of numbers"),
    ],
)
def test_teacher_refuses(arguments, message):
    with pytest.raises(bj.InputError, match=message):
        Teacher(**arguments)
