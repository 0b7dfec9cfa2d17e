"""The policy of an unregularized MDP as users read it: no derivative, and never 0 in place of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax.mdp.bellman import read_policy

Q = jnp.asarray([[1.0, 3.0, 2.0], [2.0, -jnp.inf, 0.0]])
NONE = bj.Unregularized()
MESSAGE = r"policy: the policy of an unregularized MDP is piecewise constant and has no derivative; use ShannonEntropy"


def read(q):
    return NONE.conjugate(q), read_policy(NONE, q)


def stacked(q):
    return jax.vmap(read)(jnp.stack([q, 2 * q]))


def scanned(q):
    return jax.lax.scan(lambda carry, _: (carry, read(carry)), q, None, 2)[1]


READERS = {"plain": read, "jit": jax.jit(read), "vmap": stacked, "checkpoint": jax.checkpoint(read), "scan": scanned}


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_only_a_policy_that_is_used_raises(reader):
    function = READERS[reader]
    # The value of a function that returns both is differentiable, also under further transformations.
    gradient = jax.grad(lambda q: function(q)[0].sum())
    np.testing.assert_array_equal(gradient(Q) / np.sum(gradient(Q)[0]), NONE.policy(Q))
    np.testing.assert_array_equal(jax.jit(jax.vmap(gradient))(Q[None])[0], gradient(Q))
    np.testing.assert_array_equal(jax.jacfwd(gradient)(Q), np.zeros((2, 3, 2, 3)))
    for used in (lambda q: function(q)[1].sum(), lambda q: sum(out.sum() for out in function(q))):
        for differentiate in (jax.grad, jax.jacrev, lambda f: jax.jit(jax.vmap(jax.grad(f)))):
            with pytest.raises(bj.InputError, match=MESSAGE):
                differentiate(used)(Q[None] if differentiate not in (jax.grad, jax.jacrev) else Q)


@pytest.mark.parametrize("reader", READERS)
def test_forward_mode_is_nan_in_the_policy_alone(reader):
    (value, policy), (of_value, of_policy) = jax.jvp(READERS[reader], (Q,), (jnp.ones_like(Q),))
    assert np.isfinite(value).all()
    assert np.isfinite(of_value).all()
    assert np.isfinite(policy).all()
    assert np.isnan(of_policy).all()


def test_a_policy_that_is_held_fixed_passes():
    objective = lambda q: jnp.sum(jax.lax.stop_gradient(read(q)[1]) * jnp.where(jnp.isfinite(q), q, 0))  # noqa: E731
    np.testing.assert_array_equal(jax.grad(objective)(Q), NONE.policy(Q))


@pytest.mark.slow
def test_smooth_policies_are_read_as_they_are():
    entropy = bj.ShannonEntropy(0.5)
    np.testing.assert_array_equal(read_policy(entropy, Q), entropy.policy(Q))
    ours, theirs = (jax.grad(lambda q, f=f: f(q)[0, 0])(Q) for f in (lambda q: read_policy(entropy, q), entropy.policy))
    np.testing.assert_array_equal(ours, theirs)


def test_linearized_policy_has_no_derivative_either():
    given = jnp.full(Q.shape, 1 / 3)
    np.testing.assert_array_equal(NONE.linearized_policy(given, Q, Q[:, 0]), given)
    with pytest.raises(bj.InputError, match=MESSAGE):
        jax.grad(lambda q: NONE.linearized_policy(given, q, q[:, 0])[0, 0])(Q)
