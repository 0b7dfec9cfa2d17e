"""The two parts of a gradient: their sizes, their angle, and the bound on their ratio."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import flat, random_like
from sampled_helpers import KEY, quick_jit, setting

import bilevel_jax as bj
from bilevel_jax.core.reductions import einsum
from bilevel_jax.estimators import NestedRollouts, OneStep, estimate, estimate_from, sample_groups
from bilevel_jax.estimators.guards import bounded, compare, norm

TREE = {"a": np.zeros((3, 2)), "b": np.zeros(4)}


def parts(dtype=np.float64):
    cast = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)  # noqa: E731
    return cast(random_like(0, TREE)), cast(random_like(1, TREE))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers(dtype):
    direct, implicit = parts(dtype)
    one, other = flat(direct).astype(float), flat(implicit).astype(float)
    made = compare(direct, implicit)
    assert {leaf.dtype for leaf in made} == {np.dtype(dtype)}
    np.testing.assert_allclose(made.direct_norm, np.linalg.norm(one), rtol=1e-6)
    np.testing.assert_allclose(made.implicit_norm, np.linalg.norm(other), rtol=1e-6)
    np.testing.assert_allclose(made.cosine, one @ other / np.linalg.norm(one) / np.linalg.norm(other), rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1e6, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bound(ratio, dtype):
    direct, implicit = parts(dtype)
    made = quick_jit(bounded)(direct, implicit, ratio)
    one, other = flat(direct), flat(implicit)
    size, length = np.linalg.norm(other), np.linalg.norm(one)
    expected = one + other * min(1, ratio * length / size)
    assert flat(made).dtype == dtype
    np.testing.assert_allclose(flat(made), expected, rtol=1e-5, atol=1e-6)
    if ratio > 100:
        np.testing.assert_array_equal(flat(made), one + other)


def test_edges():
    """Parts that are zero, huge or tiny; leaves of two dtypes."""
    nothing, implicit = jax.tree.map(jnp.zeros_like, parts()[1]), parts()[1]
    assert float(compare(nothing, implicit).cosine) == float(compare(implicit, nothing).cosine) == 0
    np.testing.assert_array_equal(flat(bounded(nothing, implicit)), flat(implicit))
    np.testing.assert_array_equal(flat(bounded(nothing, implicit, 3.0)), 0)
    np.testing.assert_array_equal(flat(bounded(implicit, nothing, 0.0)), flat(implicit))
    for scale in (1e30, 1e-30):
        many = {"a": jnp.full(3, scale, jnp.float32)}
        np.testing.assert_allclose(norm(many), scale * np.sqrt(3), rtol=1e-5)
        np.testing.assert_allclose(compare(many, many).cosine, 1, rtol=1e-5)
    mixed = {"a": jnp.ones(3, jnp.float32), "b": jnp.ones(1)}
    assert float(norm(mixed)) == 2
    assert {name: leaf.dtype for name, leaf in bounded(mixed, mixed, 0.5).items()} == {
        "a": np.dtype("float32"),
        "b": np.dtype("float64"),
    }
    assert np.isnan(compare({"a": jnp.array([jnp.nan])}, many).direct_norm)


@pytest.mark.slow
@pytest.mark.parametrize("response", [OneStep(), NestedRollouts(3)], ids=["one step", "rollouts"])
def test_an_estimate_that_is_split(response):
    """The parts add up; the direct one is that of a gradient whose answer is off; the bound holds."""
    at = setting()

    def run(max_ratio):
        groups = sample_groups(KEY, at.problem, at.policy, 8)
        return estimate_from(KEY, at.problem, at.x, at.policy, groups, response, max_ratio=max_ratio)

    single = quick_jit(run)
    plain, split = quick_jit(lambda: run(None))(), single(jnp.asarray(jnp.inf))
    assert (plain.direct_norm, plain.implicit_norm, plain.cosine) == (None, None, None)
    np.testing.assert_allclose(split.gradient, plain.gradient, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(split.value, plain.value, rtol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, split.costs, plain.costs)
    problem, groups = at.problem, plain.groups
    visits = np.zeros(at.x.shape)
    weights = float(problem.discount) ** np.arange(groups.action.shape[-1])
    np.add.at(visits, (np.asarray(groups.observation), np.asarray(groups.action)), weights[None, None] / 8)
    direct = visits * float(problem.price) * np.asarray(at.x)
    implicit = np.asarray(plain.gradient) - direct
    np.testing.assert_allclose(split.direct_norm, np.linalg.norm(direct), rtol=1e-9)
    np.testing.assert_allclose(split.implicit_norm, np.linalg.norm(implicit), rtol=1e-9)
    cosine = einsum("sa,sa->", jnp.asarray(direct), jnp.asarray(implicit)) / split.direct_norm / split.implicit_norm
    np.testing.assert_allclose(split.cosine, cosine, rtol=1e-8)
    for ratio in (0.0, 0.1):
        cut = single(jnp.asarray(ratio))
        expected = direct + implicit * min(1, ratio * np.linalg.norm(direct) / np.linalg.norm(implicit))
        np.testing.assert_allclose(cut.gradient, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(cut.implicit_norm, split.implicit_norm, rtol=1e-10)  # that before the bound
    assert single._cache_size() == 1


def test_vmap_over_ratios():
    at = setting()
    ratios = jnp.array([0.0, 0.5, jnp.inf])

    def run(ratio):
        made = estimate(KEY, at.problem, at.x, at.policy, batch=4, response=OneStep(), max_ratio=ratio)
        return made.gradient, made.cosine

    many, cosines = quick_jit(jax.vmap(run))(ratios)
    assert np.unique(np.asarray(cosines)).size == 1
    assert np.unique(np.asarray(many)[:, 0, 0]).size > 1


def test_the_price_of_not_asking_is_nothing():
    """The program without a bound has one backward pass: it is as it was, which a bound makes longer."""
    at = setting()

    def count(max_ratio):
        groups = jax.eval_shape(lambda: sample_groups(KEY, at.problem, at.policy, 4))
        run = lambda x, groups: estimate_from(  # noqa: E731
            KEY, at.problem, x, at.policy, groups, OneStep(), max_ratio=max_ratio
        )
        return str(jax.make_jaxpr(run)(at.x, groups)).count("scatter-add")

    assert count(None) < count(jnp.inf)


def test_input_errors():
    direct, implicit = parts()
    for wrong in (-1.0, np.nan):
        with pytest.raises(bj.InputError, match="max_ratio must be at least 0"):
            bounded(direct, implicit, wrong)


def test_ratios_that_are_traced():
    """What is known is refused; of what is not, the result tells."""
    direct, implicit = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    made = jax.vmap(lambda ratio: bounded(direct, implicit, ratio))(jnp.array([-1.0, jnp.nan, 0.5]))
    assert np.isnan(made[:2]).any(1).all()
    np.testing.assert_allclose(made[2], [1, 0.5])


def test_the_norm_of_the_largest_numbers():
    big = jnp.asarray([1e38, 1e38], jnp.float32)
    for size in (norm, jax.jit(norm)):
        np.testing.assert_allclose(size(big), np.float32(2**0.5 * 1e38), rtol=1e-6)
