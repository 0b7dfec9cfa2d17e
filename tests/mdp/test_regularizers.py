"""Regularizers against their definition, in extreme numbers, and the linearized policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KINDS, central_difference, conjugate_numpy, make_regularizer, random_like
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import bilevel_jax as bj

STATES, ACTIONS = 5, 4
SHAPE = (STATES, ACTIONS)
REFERENCE = np.random.default_rng(0).dirichlet(np.ones(ACTIONS), STATES)
REFERENCE[1] = [0, 0.25, 0.75, 0]
REFERENCE[2] = [0, 0, 1, 0]
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
EXTREMES = [1e-6, 1e-3, 1.0, 1e3, 1e6]

conjugate = jax.jit(lambda r, q: r.conjugate(q))
policy = jax.jit(lambda r, q: r.policy(q))
penalty = jax.jit(lambda r, p: r.penalty(p))
slope = jax.jit(jax.grad(lambda q, r: jnp.sum(r.conjugate(q))))

action_values = arrays(float, SHAPE, elements=st.floats(-10, 10, width=64))
simplices = arrays(float, SHAPE, elements=st.floats(1e-3, 1, width=64)).map(lambda w: w / w.sum(-1, keepdims=True))
temperatures = st.floats(0.05, 20)


def random_q(seed, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=SHAPE)


@pytest.mark.parametrize("kind", KINDS)
def test_conjugate_is_the_maximum_over_the_simplex(kind):
    @PROPERTY
    @given(action_values, simplices, temperatures)
    def run(q, p, temperature):
        regularizer = make_regularizer(kind, temperature, REFERENCE)
        best, pi = conjugate(regularizer, q), np.asarray(policy(regularizer, q))
        attained = (pi * q).sum(-1) - penalty(regularizer, pi)
        np.testing.assert_allclose(best, attained, rtol=1e-12, atol=1e-12 * temperature)
        if kind == "kl":  # only policies that the reference allows have a finite penalty
            p = np.where(REFERENCE > 0, p, 0)
            p /= p.sum(-1, keepdims=True)
        others = (p * q).sum(-1) - penalty(regularizer, p)
        assert (best >= others - 1e-12 * (10 + temperature)).all()
        assert (pi >= 0).all()
        np.testing.assert_allclose(pi.sum(-1), 1, rtol=1e-13)

    run()


@pytest.mark.parametrize("kind", KINDS)
def test_policy_is_the_gradient_of_the_conjugate(kind):
    @PROPERTY
    @given(action_values, temperatures)
    def run(q, temperature):
        regularizer = make_regularizer(kind, temperature, REFERENCE)
        np.testing.assert_allclose(slope(q, regularizer), policy(regularizer, q), rtol=1e-11, atol=1e-13)

    run()


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_against_numpy(kind, temperature):
    regularizer = make_regularizer(kind, temperature, REFERENCE)
    for seed in range(20):
        q = random_q(seed)
        value, pi = conjugate_numpy(kind, q, temperature, REFERENCE)
        np.testing.assert_allclose(regularizer.conjugate(q), value, rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(regularizer.policy(q), pi, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_derivative_in_the_temperature(kind):
    # Envelope theorem: d Omega*(q) = -d Omega(pi) with pi held fixed.
    regularizer, q = make_regularizer(kind, 0.7, REFERENCE), jnp.asarray(random_q(1))
    grad = jax.grad(lambda r: r.conjugate(q).sum())(regularizer).temperature
    np.testing.assert_allclose(grad, -regularizer.penalty(regularizer.policy(q)).sum() / 0.7, rtol=1e-12)


@pytest.mark.parametrize("spread", [0.1, 10.0])
def test_derivative_in_the_reference(spread):
    # Of temperature log (sum ref exp(q / temperature) / sum ref), at small and large spreads of q.
    regularizer, q = bj.KLDivergence(0.7, REFERENCE[3]), jnp.asarray(random_q(1, spread))[:1]
    pi = np.asarray(regularizer.policy(q))[0]
    grad = np.asarray(jax.grad(lambda r: r.conjugate(q)[0])(regularizer).reference)
    np.testing.assert_allclose(grad, 0.7 * (pi / REFERENCE[3] - 1), rtol=1e-12, atol=1e-14)


def test_a_derivative_in_a_reference_of_zero_far_above():
    """One-sided: temperature expm1(q / temperature) of an action that is not taken, up to what the dtype has."""
    single, double = np.float32, np.float64
    cases = [(single, 60, 1), (single, 80, 1), (single, 86, 1), (single, 88, 1e-5), (single, 87, 1e-10)]
    cases += [(single, 150, 1e-30), (single, 60, 1e10), (double, 600, 1), (double, 707, 1e-10), (double, 900, 1e-90)]
    for dtype, above, temperature in cases:
        temperature = dtype(temperature)
        q = np.array([[0, 0, above * temperature]], dtype)
        regularizer = bj.KLDivergence(temperature, jnp.array([0.5, 0.5, 0.0], dtype))
        of_regularizer, of_q = jax.grad(lambda r, q: r.conjugate(q)[0], (0, 1))(regularizer, q)
        want = np.longdouble(temperature) * np.expm1(np.longdouble(q[0, 2]) / np.longdouble(temperature))
        rtol = 3 * above * np.finfo(dtype).eps
        np.testing.assert_allclose(np.longdouble(of_regularizer.reference[2]), want, rtol=rtol)
        np.testing.assert_allclose(of_q, [[0.5, 0.5, 0]], rtol=2 * np.finfo(dtype).eps)
        # Of the policy, too, as far as that is in range.
        of_policy = jax.grad(lambda r, q: r.policy(q)[0, 2])(regularizer, q).reference[2]
        want = np.minimum(want / np.longdouble(temperature), 0.9 * np.finfo(dtype).max)
        np.testing.assert_allclose(np.longdouble(of_policy), want, rtol=rtol)


def test_derivatives_in_the_temperature_beside_a_good_action_that_the_reference_forbids():
    """They are 0, in both modes and twice, however far above the action is."""
    gaps = jnp.arange(80, 200, dtype=jnp.float32)

    def both(temperature, gap):
        regularizer = bj.KLDivergence(temperature, jnp.array([1, 0], jnp.float32))
        q = jnp.stack([jnp.zeros_like(gap), jax.lax.stop_gradient(gap * temperature)])[None]
        return jnp.stack([regularizer.conjugate(q)[0], regularizer.policy(q)[0, 0]])

    for temperature in (1, 0.1, 1e-3, 1e-5):
        at = jnp.asarray(temperature, jnp.float32)
        for derivative in (jax.jacfwd(both), jax.jacrev(both), jax.jacfwd(jax.jacrev(both))):
            assert not np.any(jax.vmap(derivative, (None, 0))(at, gaps)), temperature


def test_mixed_derivatives_in_a_reference_of_zero():
    q = jnp.array([[0, 53.7]], jnp.float32)
    slope = jax.grad(lambda reference, q, t: bj.KLDivergence(t, reference).conjugate(q)[0])
    reference, temperature = jnp.array([1, 0], jnp.float32), jnp.float32(1)
    of_q = jax.jacfwd(slope, 1)(reference, q, temperature)[1, 0]
    of_temperature = jax.jacfwd(slope, 2)(reference, q, temperature)[1]
    weight = np.exp(53.7)  # the derivative is t expm1(q / t)
    np.testing.assert_allclose(of_q, [-weight, weight], rtol=1e-4)
    np.testing.assert_allclose(of_temperature, weight * (1 - 53.7), rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_where_a_quotient_is_out_of_range(kind):
    """100 / 1e-37 is infinite in float32: the weight is 0, and so is its derivative."""
    q = jnp.asarray([[1, -100]], jnp.float32)

    def both(temperature):
        regularizer = make_regularizer(kind, temperature, jnp.array([0.5, 0.5], jnp.float32))
        return jnp.stack([regularizer.conjugate(q)[0], regularizer.policy(q)[0, 0]])

    made = jax.jacobian(both)(jnp.asarray(1e-37, jnp.float32))
    np.testing.assert_allclose(made, [np.log(0.5) if kind == "kl" else 0, 0], rtol=1e-6)


def test_derivatives_in_the_reference_keep_their_digits_at_high_temperatures():
    """A constant of the temperature's size in them, which makes no difference on the simplex, would cost the digits."""
    rng = np.random.default_rng(0)
    x, q = rng.normal(size=(5, 4)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)

    def at(dtype, part):
        def value(x):
            regularizer = bj.KLDivergence(jnp.asarray(3e5, dtype), jax.nn.softmax(x))
            return part(regularizer, jnp.asarray(q, dtype))

        return np.asarray(jax.grad(value)(jnp.asarray(x, dtype)), np.float64)

    fixed = rng.dirichlet(np.ones(4), 5)
    for part in (
        lambda regularizer, q: regularizer.conjugate(q).sum(),
        lambda regularizer, q: regularizer.penalty_at(q).sum(),
        lambda regularizer, q: (
            regularizer.linearized_policy(fixed.astype(q.dtype), q, regularizer.conjugate(q)) * q
        ).sum(),
    ):
        want = at(jnp.float64, part)
        np.testing.assert_allclose(at(jnp.float32, part), want, rtol=0, atol=2e-6)  # made of terms of the size of q


def reference_numbers(kind, q, temperature):
    """Conjugate and policy in a wider type than q's, by formulas that hold at every scale."""
    wide, dtype = np.longdouble, q.dtype
    q, temperature = q.astype(wide), temperature.astype(wide)
    top = q.max(-1, keepdims=True)
    if kind == "tsallis":
        value, pi = conjugate_numpy("tsallis", (q - top) / temperature, wide(1), None)
        return top[..., 0] + temperature * value, pi
    # Only KL takes a reference: normalized here in the wide type, so that rounding in the library's shows.
    reference = REFERENCE.astype(dtype).astype(wide) if kind == "kl" else np.ones(SHAPE, wide)
    if kind == "kl":
        reference /= reference.sum(-1, keepdims=True)
    top = np.where(reference > 0, q, -np.inf).max(-1, keepdims=True)
    scaled = np.minimum((q - top) / temperature, 0)
    weight = reference * np.exp(scaled)
    log_total = np.log1p((reference * np.expm1(scaled)).sum(-1) + (0 if kind == "kl" else ACTIONS - 1))
    return top[..., 0] + temperature * log_total, weight / weight.sum(-1, keepdims=True)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_every_scale_of_temperature_and_value(kind, dtype):
    eps = np.finfo(dtype).eps
    for temperature in np.array(EXTREMES, dtype):
        regularizer = make_regularizer(kind, temperature, REFERENCE.astype(dtype))
        for scale in (1e-6, 1.0, 1e6):
            q = random_q(2, scale).astype(dtype)
            q[0] = scale  # ties
            q[3, 1] = q[3, 0]
            value, pi = conjugate(regularizer, q), policy(regularizer, q)
            assert value.dtype == pi.dtype == dtype
            want, want_pi = reference_numbers(kind, q, temperature)
            # A KL value stays within the range of q, however high the temperature; so does its error.
            size = float(np.abs(q).max()) + (0.0 if kind == "kl" else float(temperature))
            name = f"T={temperature}, q of {scale}"
            assert (np.abs(np.asarray(value, np.longdouble) - want) <= 8 * eps * size).all(), name
            np.testing.assert_allclose(pi, want_pi.astype(float), rtol=0, atol=16 * eps, err_msg=name)
            np.testing.assert_allclose(np.asarray(pi, float).sum(-1), 1, rtol=8 * eps, err_msg=name)
            assert np.isfinite(slope(q, regularizer)).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_finite_at_every_scale(kind):
    differentiate = jax.jit(jax.grad(lambda rq: jnp.sum(rq[0].conjugate(rq[1]) + rq[0].policy(rq[1])[:, 0])))
    for temperature in EXTREMES:
        for scale in (1e-6, 1.0, 1e6):
            regularizer = make_regularizer(kind, temperature, REFERENCE)
            grads = differentiate((regularizer, random_q(3, scale)))
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads)), (temperature, scale)


def test_kl_never_takes_an_action_without_reference():
    regularizer = bj.KLDivergence(0.5, REFERENCE)
    q = random_q(4)
    q[1, 0] = 1e6  # the best action, forbidden: it must not set the scale either
    pi = np.asarray(regularizer.policy(q))
    assert (pi[REFERENCE == 0] == 0).all()
    np.testing.assert_allclose(regularizer.conjugate(q)[2], q[2, 2], rtol=1e-15)  # one action left
    allowed = REFERENCE[1] > 0
    want = 0.5 * np.log((REFERENCE[1, allowed] * np.exp(q[1, allowed] / 0.5)).sum())
    np.testing.assert_allclose(regularizer.conjugate(q)[1], want, rtol=1e-14)
    np.testing.assert_allclose(penalty(regularizer, REFERENCE), 0, atol=1e-15)


def test_kl_to_the_uniform_policy_is_entropy_shifted():
    q = random_q(5)
    kl, shannon = bj.KLDivergence(0.3, np.full(ACTIONS, 1 / ACTIONS)), bj.ShannonEntropy(0.3)
    np.testing.assert_allclose(kl.policy(q), shannon.policy(q), rtol=1e-13)
    np.testing.assert_allclose(kl.conjugate(q), shannon.conjugate(q) - 0.3 * np.log(ACTIONS), rtol=1e-12)


@pytest.mark.parametrize(
    ("q", "want"),
    [
        ([0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]),
        ([5, 5, 0, 0], [0.5, 0.5, 0, 0]),
        ([1, 0, 0, 0], [1, 0, 0, 0]),  # on the edge of the support
        ([0.5, 0, 0, -9], [2 / 3, 1 / 6, 1 / 6, 0]),  # ties in the middle
        ([-3, 2, -3, 1.5], [0, 0.75, 0, 0.25]),
    ],
)
def test_tsallis_ties_and_edges(q, want):
    for shift in (0.0, 100.0):
        np.testing.assert_allclose(bj.TsallisEntropy(1.0).policy(jnp.asarray([q], float) + shift)[0], want, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_linearized_policy(kind):
    regularizer = make_regularizer(kind, 0.6, REFERENCE)
    q, anything = jnp.asarray(random_q(6)), jnp.asarray(np.random.default_rng(7).dirichlet(np.ones(ACTIONS), STATES))
    value = regularizer.conjugate(q)
    # Its value is the policy given, at any q and value.
    np.testing.assert_array_equal(regularizer.linearized_policy(anything, q + 3, value - 2), anything)
    # At the optimum its derivative is that of the policy, if value moves as the optimum does: dV = <pi, dq>.
    dq = jnp.asarray(random_q(8))
    optimal = regularizer.policy(q)
    moves = (jnp.zeros_like(optimal), dq, jnp.sum(optimal * dq, -1))
    primal, tangent = jax.jvp(regularizer.linearized_policy, (optimal, q, value), moves)
    np.testing.assert_array_equal(primal, optimal)
    want = central_difference(lambda q: policy(regularizer, q), q, dq, 1e-4).reshape(SHAPE)  # short of a support's end
    np.testing.assert_allclose(tangent, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["shannon", "kl"])
def test_linearized_policy_moves_with_every_parameter(kind):
    # d pi = pi d[(q - value) / temperature + log reference], value being the conjugate of all of them.
    q, reference = jnp.asarray(random_q(9)), jnp.asarray(REFERENCE[3:4])
    start = {"q": q[:1], "temperature": jnp.asarray(0.6), "reference": reference}
    direction = random_like(10, start)
    direction["reference"] = 0.1 * (direction["reference"] - direction["reference"].mean())
    fixed = make_regularizer(kind, 0.6, reference).policy(q[:1])

    def linearized(p):
        regularizer = make_regularizer(kind, p["temperature"], p["reference"])
        return regularizer.linearized_policy(fixed, p["q"], regularizer.conjugate(p["q"]))

    def exact(p):
        return make_regularizer(kind, p["temperature"], p["reference"]).policy(p["q"])

    tangent = jax.jit(lambda p, d: jax.jvp(linearized, (p,), (d,))[1])(start, direction)
    np.testing.assert_allclose(tangent[0], central_difference(jax.jit(exact), start, direction), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_event_ndim(kind):
    ndims = make_regularizer(kind, 0.5, np.stack([REFERENCE] * 2)).event_ndim()
    assert ndims.temperature == 0
    assert kind != "kl" or ndims.reference == 2
    assert bj.KLDivergence(0.5, REFERENCE[0]).event_ndim().reference == 1
