"""The trajectory estimators: unbiased means, biases of the size they should have, variances, and what jit must allow.

The means are tested against the exact hyper-gradient (Hotelling's T^2, see `sampled_helpers`). A right
estimator fails one such test with probability 5e-7; there are 40, and 80 slow ones. Each also requires a standard
error below a stated share of the gradient, so that it can fail.
"""

import functools
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import flat
from jax.extend.core import jaxprs_in_params
from sampled_helpers import (
    FALSE_ALARM,
    HORIZON,
    KEY,
    EndingGarnet,
    NoisyGarnet,
    PairGarnet,
    Setting,
    StepPairGarnet,
    WholeGarnet,
    draws,
    garnet,
    hotelling,
    quick_jit,
    require_mean,
    setting,
    solved,
)

import bilevel_jax as bj
from bilevel_jax.core.functions import Table
from bilevel_jax.environments import Environment, TabularEnvironment, TimeStep
from bilevel_jax.estimators import (
    Baseline,
    Exact,
    LearnedCritic,
    LearnedModel,
    LeaveOneOut,
    NestedRollouts,
    NoBaseline,
    OneStep,
    SharedRollouts,
    StateBaseline,
    estimate,
    estimate_from,
    importance_weights,
    sample_groups,
)
from bilevel_jax.problems.garnet import Garnet

LENGTH = 10
UNBIASED = {
    "exact": Exact(),
    "coupled": NestedRollouts(LENGTH),
    "uncoupled": NestedRollouts(LENGTH, coupled=False),
    "two copies": NestedRollouts(LENGTH, copies=2),
    "two visits": NestedRollouts(LENGTH, visits=2),
    "shared": SharedRollouts(LENGTH),
}


@pytest.fixture(autouse=True)
def _compile_quickly(request):
    """The tests that are not slow compile much and run little."""
    jax.config.update("jax_disable_most_optimizations", request.node.get_closest_marker("slow") is None)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


UNIFORM = Table(np.full((5, 2), 0.5))


class OneOf(Baseline):
    """The baseline of a given number: a leaf, so that one compilation serves all."""

    number: Any
    baselines: tuple = (NoBaseline(), LeaveOneOut(), StateBaseline())

    def credit(self, state, problem, policy, groups, costs):
        shape = groups.action.shape
        each = [jnp.broadcast_to(b.credit(state, problem, policy, groups, costs), shape) for b in self.baselines]
        return jnp.stack(each)[self.number]


@functools.cache
def learned_baseline(batches=20, batch=64):
    """The state of a StateBaseline from batches that no test uses."""
    at = setting()

    def learn(state, key):
        made = estimate(key, at.problem, at.x, at.policy, batch=batch, response=Exact())
        return StateBaseline().update(state, at.problem, made.groups, made.costs), None

    start = StateBaseline().init(at.problem)
    keys = jax.random.split(jax.random.key(1000), batches)
    return quick_jit(lambda keys: jax.lax.scan(learn, start, keys)[0])(keys)


@functools.partial(quick_jit, static_argnums=3)
def quick_sample(key, problem, policy, batch, first=0):
    return sample_groups(key, problem, policy, batch, first)


@functools.partial(quick_jit, static_argnums=3)
def quick_estimate(key, at, response, batch, **arguments):
    return estimate(key, at.problem, at.x, at.policy, batch=batch, response=response, **arguments)


# 1. Means.


@functools.cache
def made_with(name, number):
    """10000 trajectories with a response and a baseline, both by name or number."""
    arguments = {"baseline": OneOf(jnp.asarray(number)), "baseline_state": learned_baseline()}
    return draws(setting(), UNBIASED[name], batches=600, **arguments)


@pytest.mark.often(2)
@pytest.mark.slow
@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased(name):
    """All baselines on one Garnet MDP, the mean over the others on a second one."""
    at = setting()
    for number in range(3):
        seen = made_with(name, number)
        require_mean(seen.gradient, at.gradient, 0.03, f"{name}, baseline {number}")
    require_mean(seen.value, at.value, 0.02, "value")
    other = setting(seed=11)
    arguments = {"baseline": OneOf(jnp.asarray(1)), "baseline_state": learned_baseline()}
    seen = draws(other, UNBIASED[name], batches=600, **arguments)
    require_mean(seen.gradient, other.gradient, 0.03, f"{name}, second MDP")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact", "two visits", "shared"])
def test_unbiased_where_processes_end_and_under_kl(name):
    at = setting(EndingGarnet)
    seen = draws(at, UNBIASED[name])
    require_mean(seen.gradient, at.gradient, 0.04, name)
    require_mean(seen.value, at.value, 0.06, "value")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact", "two visits", "shared"])
def test_unbiased_on_twenty_garnets(name):
    """100000 trajectories on each; besides each p, the sum of the squared z is chi-squared with 20 degrees."""
    from scipy import stats

    z = []
    for seed in range(20):
        at = setting(seed=seed, states=8, actions=3)
        seen = draws(at, UNBIASED[name], batch=64, batches=1600, chunk=50, fast=True)
        require_mean(seen.gradient, at.gradient, 0.02, f"seed {seed}")
        z.append(hotelling(seen.gradient, at.gradient).z)
    print(f"sum of z^2 {np.sum(np.square(z)):.1f} of 20")
    assert FALSE_ALARM < stats.chi2.cdf(np.sum(np.square(z)), 20) < 1 - FALSE_ALARM


@pytest.mark.slow
def test_unbiased_on_four_rooms():
    """100000 trajectories of 1000 steps (0.99^1000 = 4e-5), the temperature 0.005."""
    problem = bj.problems.make("four_rooms", temperature=0.005, horizon=1000)
    at = solved(problem, problem.start(jax.random.key(0)))
    seen = draws(at, Exact(), batch=50, batches=2000, chunk=10, fast=True)
    require_mean(seen.gradient, at.gradient, 0.03, "exact")
    require_mean(seen.value, at.value, 0.02, "value")

    # Rollouts of 400 steps, by when the agent has long been at its goal. The factor 1 / temperature is one of
    # their noise as well: it takes a good baseline and 4 rollouts from each of the 832 pairs a batch to see much.
    def learn(state, key):
        made = estimate(key, problem, at.x, at.policy, batch=50, response=OneStep())
        return baseline.update(state, problem, made.groups, made.costs), None

    baseline = StateBaseline(0.01)
    keys = jax.random.split(jax.random.key(3), 100)
    state = jax.jit(lambda keys: jax.lax.scan(learn, baseline.init(problem), keys)[0])(keys)
    arguments = {"baseline": baseline, "baseline_state": state, "fast": True}
    seen = draws(at, SharedRollouts(400, copies=4), batch=500, batches=200, chunk=2, **arguments)
    require_mean(seen.gradient, at.gradient, 0.1, "shared rollouts")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [WholeGarnet, NoisyGarnet, PairGarnet, StepPairGarnet], ids=lambda kind: kind.__name__)
def test_losses_of_every_form(kind):
    """A scalar; one that uses its key; of two trajectories, a scalar and [H]. All have the exact objective."""
    at = setting(kind)
    seen = draws(at, Exact(), batch=64)
    require_mean(seen.gradient, at.gradient, 0.04, kind.__name__)
    require_mean(seen.value, at.value, 0.06, "value")


@pytest.mark.slow
def test_a_pair_with_a_response_that_rolls_out():
    at = setting(PairGarnet)
    require_mean(draws(at, NestedRollouts(LENGTH, visits=2), batch=64).gradient, at.gradient, 0.1, "pair")


def test_each_group_has_a_key_of_its_own():
    problem = garnet(NoisyGarnet)
    groups = quick_sample(KEY, problem, UNIFORM, 1)
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), groups)
    made = quick_jit(estimate_from)(KEY, problem, jnp.zeros((5, 2)), UNIFORM, twice, OneStep())
    assert not np.allclose(made.costs.each[0], made.costs.each[1])


# 2. Variances.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact", "two visits"])
def test_variance_falls_as_one_over_n(name):
    """From 16 to 256 groups. 600 and 400 batches give the variances to about 5 and 6 percent, the slope to 0.03."""
    many = draws(setting(), UNBIASED[name], batch=256, batches=400, chunk=20, baseline=NoBaseline())
    ratio = many.gradient.var(0).sum() / made_with(name, 0).gradient.var(0).sum()
    slope = np.log(ratio) / np.log(256 / 16)
    print(f"slope {slope:.3f}")
    assert abs(slope + 1) < 0.15


def variance(name, number):
    """Of 600 batches, known to about 5 percent."""
    return made_with(name, number).gradient.var(0).sum()


@pytest.mark.often(2)
@pytest.mark.slow
@pytest.mark.parametrize("name", UNBIASED)
def test_baselines_lower_the_variance(name):
    none, others, states = (variance(name, number) for number in range(3))
    print(f"{name}: variance {none:.3f}, ratio {others / none:.3f} for LeaveOneOut, {states / none:.3f} by state")
    assert others < 0.8 * none
    assert states < 0.6 * none


@pytest.mark.slow
def test_the_model_lowers_the_variance():
    assert variance("exact", 1) < 0.7 * variance("coupled", 1)


@pytest.mark.slow
def test_coupling_and_copies_lower_the_variance():
    assert variance("coupled", 1) < 0.92 * variance("uncoupled", 1)
    assert variance("two copies", 1) < 0.85 * variance("coupled", 1)


@pytest.mark.slow
def test_state_baseline_learns_the_value():
    """b[s] is the upper level's value of the policy: to 10 percent of its size after 1280 trajectories."""
    at = setting()
    table, batches = learned_baseline()
    costs = at.problem.mdp(at.x).replace(reward=at.problem._costs(at.x))
    expected = bj.policy_value(costs, at.policy.values)
    assert np.linalg.norm(table - expected) < 0.1 * np.linalg.norm(expected)
    np.testing.assert_array_equal(batches, 20)


# 3. Truncation, and one step.


def truncated_gradient(at, length):
    """In plain numpy: the hyper-gradient with dQ* and dV* summed over `length` steps only."""
    problem, x = at.problem, np.asarray(at.x)
    kernel = np.zeros((*x.shape, len(x)))
    successor, probability = map(np.asarray, (problem.transition.successor, problem.transition.probability))
    for k, s, a in np.ndindex(successor.shape):
        kernel[s, a, successor[k, s, a]] += probability[k, s, a]
    pi, gamma = np.asarray(at.policy.values), float(problem.discount)
    follow = np.einsum("sa,sat->st", pi, kernel)
    resolvent = np.linalg.inv(np.eye(len(x)) - gamma * follow)
    occupancy = resolvent.T @ np.asarray(problem.mdp(at.x).initial)
    costs = np.asarray(problem.cost + problem.price / 2 * x**2)
    upper = costs + gamma * kernel @ (resolvent @ (pi * costs).sum(1))
    dr = np.eye(x.size).reshape(*x.shape, x.size)
    dq = dr
    for _ in range(length - 1):
        dq = dr + gamma * kernel @ np.einsum("sa,san->sn", pi, dq)
    difference = dq - np.einsum("sa,san->sn", pi, dq)[:, None]
    answer = np.einsum("s,sa,sa,san->n", occupancy, pi, upper, difference) / float(problem.temperature)
    return answer + (occupancy[:, None] * pi * float(problem.price) * x).reshape(-1)


@pytest.mark.slow
def test_truncation():
    """The bias is the predicted one, and below its bound.

    A rollout of T steps leaves out E sum_{t >= T} discount^t dr, at most discount^T / (1 - discount)
    max |dr| in any direction of x, once in dQ and once in dV; this is multiplied by the credits and
    divided by the temperature: |bias| <= 2 discount^T / (1 - discount) max |dr| E sum |credit| / temperature.
    Here max |dr| = 1. The expectations without rollouts are computed in numpy.
    """
    at = setting()
    np.testing.assert_allclose(truncated_gradient(at, 200), at.gradient, rtol=1e-9, atol=1e-12)
    costs = quick_estimate(KEY, at, OneStep(), 500).costs
    credit = np.mean(np.abs(costs.factors[None] * costs.returns()).sum(1))
    lengths = (1, 2, 4, 8, LENGTH)
    biases = [np.linalg.norm(truncated_gradient(at, t) - at.gradient) for t in lengths]
    for t, bias in zip(lengths, biases, strict=True):
        assert bias <= 2 * 0.5**t / 0.5 * credit / float(at.problem.temperature)
    assert all(later < earlier for earlier, later in itertools.pairwise(biases))
    print(f"relative biases {np.array(biases) / np.linalg.norm(at.gradient)}")
    for t in (1, 2):
        seen = draws(at, NestedRollouts(t), batch=64).gradient
        require_mean(seen, truncated_gradient(at, t), 0.03, f"length {t}")
        assert hotelling(seen, at.gradient).p < 1e-9, "a bias that cannot be seen"


@pytest.mark.slow
def test_one_step_is_exact_for_discount_zero():
    at = setting(discount=0.0, horizon=3)
    made = [quick_estimate(KEY, at, response, 16).gradient for response in (OneStep(), Exact())]
    np.testing.assert_allclose(made[0], made[1], rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(truncated_gradient(at, 1).reshape(5, 2), at.gradient.reshape(5, 2), rtol=1e-10)


@pytest.mark.slow
def test_one_step_is_biased_otherwise():
    """At discount 0.9: the one-step gradient as predicted, 40 standard errors or more from the exact one."""
    at = setting(discount=0.9, horizon=120, temperature=1.0)
    seen = draws(at, OneStep(), batch=32).gradient
    predicted = truncated_gradient(at, 1)
    require_mean(seen, predicted, 0.03, "one step")
    off = np.linalg.norm(seen.mean(0) - at.gradient)
    error = np.sqrt(seen.var(0).sum() / len(seen))
    print(f"bias {off / np.linalg.norm(at.gradient):.2f} of the gradient, {off / error:.0f} standard errors")
    assert off > 20 * error
    assert off > 0.3 * np.linalg.norm(at.gradient)


@pytest.mark.slow
def test_form_of_one_step():
    """sum credit (dr(s, a) - E_pi dr(s, .)) on a trajectory made by hand."""
    problem = garnet(horizon=3)
    policy = jnp.array([[0.1, 0.9], [0.3, 0.7], [0.5, 0.5], [0.6, 0.4], [0.8, 0.2]])
    visited, actions, credit = jnp.array([[1, 1, 4]]), jnp.array([[0, 1, 1]]), jnp.array([[2.0, -3.0, 0.5]])
    groups = quick_sample(KEY, problem, Table(policy), 1)
    trajectory = jax.tree.map(lambda leaf: leaf[0], groups)._replace(observation=visited, action=actions)
    for given in (Table(policy), lambda observation: policy[observation]):
        got = jax.grad(lambda x: OneStep().surrogate(KEY, None, problem, x, given, trajectory, credit))(policy)  # noqa: B023
        expected = np.zeros((5, 2))
        expected[1] = 2 * np.array([0.7, -0.7]) - 3 * np.array([-0.3, 0.3])
        expected[4] = 0.5 * np.array([-0.8, 0.8])
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)


# 6. Groups that were drawn under another policy.


@quick_jit
def importance_draws(at, drawn_under, clip):
    """500 batches of 32 groups: value, gradient, weights, and the value that one would see without them."""

    def one(key):
        groups = sample_groups(key, at.problem, drawn_under, 32)
        weighted = importance_weights(at.policy, groups, clip)
        made = estimate_from(key, at.problem, at.x, at.policy, groups, Exact(), weights=weighted.weights)
        return made.value, made.gradient.reshape(-1), weighted, jnp.mean(made.costs.returns()[:, 0])

    return jax.lax.map(one, jax.random.split(KEY, 500), batch_size=100)


@pytest.mark.slow
def test_importance_weights():
    """Unbiased without a clip; the weights themselves have the mean 1. A clip of 1 cuts as many as it says."""
    at = setting(horizon=10, discount=0.3)
    # One that does what costs most more often; no weight is above 0.8^-10.
    costs = at.problem._costs(at.x)
    dear = costs == costs.max(1, keepdims=True)
    other = Table(0.8 * at.policy.values + jnp.where(dear, 0.2, 0))
    value, gradient, weighted, plain = importance_draws(at, other, jnp.inf)
    require_mean(gradient, at.gradient, 0.04, "weighted")
    require_mean(value, at.value, 0.03, "value")
    require_mean(weighted.weights.reshape(-1), 1.0, 0.02, "weights")
    assert hotelling(plain, at.value).p < 1e-9, "the two policies cannot be told apart"
    w = np.asarray(weighted.weights)
    np.testing.assert_allclose(weighted.effective_sample_size, w.sum(1) ** 2 / (w**2).sum(1), rtol=1e-10)
    assert np.all(np.asarray(weighted.clipped_fraction) == 0)
    cut = importance_draws(at, other, 1.0)[2]
    np.testing.assert_allclose(cut.weights, np.minimum(w, 1), rtol=1e-12)
    np.testing.assert_allclose(cut.clipped_fraction, (w > 1).mean(1), rtol=1e-12)
    assert cut.clipped_fraction.mean() > 0.2


@pytest.mark.slow
def test_weights_by_hand_and_of_equal_policies():
    problem = garnet(PairGarnet, horizon=3)
    groups = quick_sample(KEY, problem, UNIFORM, 6)
    assert np.all(importance_weights(UNIFORM, groups).weights == 1)
    assert importance_weights(UNIFORM, groups).effective_sample_size == 6
    policy = np.random.default_rng(0).dirichlet(np.ones(2), 5)
    expected = np.prod(policy[np.asarray(groups.observation), np.asarray(groups.action)] / 0.5, (1, 2))
    np.testing.assert_allclose(importance_weights(Table(policy), groups).weights, expected, rtol=1e-12)
    halves = groups._replace(valid=groups.valid.at[:, :, 1:].set(False))
    expected = np.prod(policy[np.asarray(groups.observation), np.asarray(groups.action)][..., 0] / 0.5, 1)
    np.testing.assert_allclose(importance_weights(Table(policy), halves).weights, expected, rtol=1e-12)


# 7. Responses that learn.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("response", "kind", "errors"),
    [
        (LearnedModel(), EndingGarnet, (0.1, 0.02)),
        (LearnedCritic(sweeps=10, step_size=0.01), EndingGarnet, (0.3, 0.06)),
    ],
    ids=["model", "critic"],
)
def test_what_is_learned(response, kind, errors):
    """On one fixed batch, against the exact answer: after 4 batches of 8 trajectories, and after 400."""
    at = setting(kind)
    groups = quick_sample(jax.random.key(99), at.problem, at.policy, 64)
    flat_groups = jax.tree.map(lambda leaf: leaf[:, 0], groups)
    credit = jnp.where(flat_groups.valid, jax.random.normal(KEY, flat_groups.action.shape), 0)

    @quick_jit
    def answer(state, response):
        return jax.grad(lambda x: response.surrogate(KEY, state, at.problem, x, at.policy, flat_groups, credit))(at.x)

    @quick_jit
    def learn(state, keys):
        def one(state, key):
            batch = sample_groups(key, at.problem, at.policy, 8)
            return response.update(state, at.problem, at.x, at.policy, batch), None

        return jax.lax.scan(one, state, keys)[0]

    exact = answer(None, Exact())
    state, got = response.init(at.problem, at.x), []
    assert np.all(np.isfinite(answer(state, response)))
    keys = jax.random.split(KEY, 400)
    for some in (keys[:4], keys[4:40], keys[40:]):
        state = learn(state, some)
        got.append(float(np.linalg.norm(answer(state, response) - exact) / np.linalg.norm(exact)))
    print(f"{type(response).__name__}: relative errors {got}")
    assert got[0] < errors[0]
    assert got[2] < errors[1]
    assert got[2] < 0.5 * got[0]


# 8. What jit must allow.


def at_each(key, x, price, temperature):
    """One estimate from its numbers alone, the policy included."""
    problem = eqx.tree_at(lambda p: (p.price, p.temperature), garnet(EndingGarnet), (price, temperature))
    policy = Table(bj.solve(problem.mdp(x), problem.regularizer(x)).policy)
    return estimate(key, problem, x, policy, batch=4, response=NestedRollouts(4, visits=1))


@pytest.mark.slow
def test_vmap_and_jit_equal_single_calls():
    """Over keys, x and the numbers of the problem at once; new numbers do not recompile; same key, same bits."""
    single = quick_jit(at_each)
    numbers = (
        jax.random.split(KEY, 3),
        jax.random.normal(KEY, (3, 5, 2)),
        jnp.array([0.1, 0.2, 0.4]),
        jnp.array([0.3, 0.6, 0.9]),
    )
    many = quick_jit(jax.vmap(at_each))(*numbers)
    for i in range(3):
        alone = single(*(n[i] for n in numbers))
        np.testing.assert_array_equal(many.groups.action[i], alone.groups.action)
        np.testing.assert_allclose(many.gradient[i], alone.gradient, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(many.value[i], alone.value, rtol=1e-10)
    again = single(*(n[2] for n in numbers))
    np.testing.assert_array_equal(again.gradient, alone.gradient)
    assert single._cache_size() == 1
    assert len(np.unique(np.asarray(many.value))) == 3


def test_problems_of_the_same_sizes_share_a_compilation():
    compiled = quick_jit(lambda *arguments: estimate(*arguments[:4], batch=2, response=arguments[4]))
    for number in (1, 2):
        at = setting(seed=number, temperature=0.3 * number, discount=0.4 * number, price=0.1 * number)
        compiled(jax.random.key(number), at.problem, at.x, at.policy, OneStep())
    assert compiled._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coupled", "shared", "exact", "model", "critic"])
def test_float32(name):
    response = UNBIASED | {"model": LearnedModel(), "critic": LearnedCritic()}
    at = setting()
    narrow = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, at
    )

    def run(at):
        made = response[name]
        state = made.init(at.problem, at.x)
        groups = sample_groups(jax.random.key(1), at.problem, at.policy, 16)
        baseline = StateBaseline()
        state = made.update(state, at.problem, at.x, at.policy, groups)
        baseline_state = baseline.init(at.problem)
        learned = {"response_state": state, "baseline": baseline, "baseline_state": baseline_state}
        return estimate(KEY, at.problem, at.x, at.policy, batch=16, response=made, **learned), state

    got, wide = quick_jit(run)(Setting(*narrow)), quick_jit(run)(at)
    leaves = jax.tree.leaves(got)
    assert {leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)} == {np.dtype("float32")}
    np.testing.assert_allclose(got[0].gradient, wide[0].gradient, rtol=1e-3, atol=1e-4)


def test_groups_do_not_depend_on_how_they_are_cut():
    problem = garnet(PairGarnet)
    whole = quick_sample(KEY, problem, UNIFORM, 8)
    parts = [quick_sample(KEY, problem, UNIFORM, 4, first) for first in (0, 4)]
    jax.tree.map(lambda w, *p: np.testing.assert_array_equal(w, np.concatenate(p)), whole, *parts)


def sizes_of(jaxpr):
    """The sizes of all arrays that a jaxpr makes, those of the jaxprs inside it included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
        for inner in jaxprs_in_params(equation.params):
            yield from sizes_of(inner)


@pytest.mark.often(2)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["coupled", "two visits", "shared", "exact", "one step", "model"])
def test_nothing_as_wide_as_x_is_held_for_each_pair(name):
    """|x| = S A = 120, so that a Jacobian of a reward or value table has 14400 entries; all else has a tenth."""
    responses = UNBIASED | {"one step": OneStep(), "model": LearnedModel()}
    problem = garnet(states=40, actions=3, horizon=3)
    response = responses[name]
    x, policy = problem.base, Table(jnp.full((40, 3), 1 / 3))
    state = response.init(problem, x)
    made = jax.make_jaxpr(lambda x: estimate(KEY, problem, x, policy, batch=2, response=response, response_state=state))
    largest = max(sizes_of(made(x).jaxpr))
    assert largest < 120 * 120
    if response == OneStep():  # what is measured is what is meant: the critic does hold one
        critic, groups = LearnedCritic(), quick_sample(KEY, problem, policy, 2)
        made = jax.make_jaxpr(lambda x: critic.update(critic.init(problem, x), problem, x, policy, groups))
        assert max(sizes_of(made(x).jaxpr)) >= 120 * 120


# 9. Input errors.


class TsallisGarnet(Garnet):
    def regularizer(self, x):
        del x
        return bj.TsallisEntropy(self.temperature)


class WrongShape(Garnet):
    def loss(self, key, x, trajectories):
        return super().loss(key, x, trajectories)[:-1]


def model_free(environment=None, **changes):
    problem = garnet()
    parts = {"discount": 0.5, "horizon": 4, **changes}
    regularizer = parts.pop("regularizer", bj.ShannonEntropy(0.5))
    return bj.SampledBilevelProblem(
        problem.environment if environment is None else environment,
        problem.reward,
        regularizer,
        lambda key, x, trajectories: jnp.where(trajectories.valid[0], 1.0, 0.0),
        **parts,
    )


def even(observation):
    del observation
    return jnp.full(2, 0.5)


def run_estimate(problem, response=OneStep(), baseline=None, policy=UNIFORM):  # noqa: B008
    x = jnp.zeros((5, 2))
    states = {"response_state": response.init(problem, x)}
    if baseline is not None:
        states |= {"baseline": baseline, "baseline_state": baseline.init(problem)}
    jax.eval_shape(lambda: estimate(KEY, problem, x, policy, batch=2, response=response, **states))


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (lambda: run_estimate(garnet(TsallisGarnet)), "regularizer: .*ShannonEntropy or KLDivergence.*TsallisEntropy"),
        (lambda: model_free(regularizer=bj.TsallisEntropy(0.5)), "regularizer: .*TsallisEntropy"),
        (lambda: run_estimate(garnet(WrongShape)), r"loss: expected a scalar or \[H\] = \[20\].*\[19\]"),
        (lambda: NestedRollouts(0), "length: .*at least 1, got 0"),
        (lambda: NestedRollouts(2, copies=0), "copies: .*at least 1, got 0"),
        (lambda: NestedRollouts(2, visits=0), "visits: .*at least 1, got 0"),
        (lambda: NestedRollouts(2.0), "length: .*got 2.0"),
        (lambda: SharedRollouts(0), "length: .*at least 1"),
        (lambda: SharedRollouts(1, copies=-1), "copies: .*at least 1"),
        (lambda: LearnedCritic(sweeps=0), "sweeps: .*at least 1"),
        (lambda: model_free(horizon=0), "horizon: .*at least 1"),
        (lambda: model_free(trajectories=0), "trajectories: .*at least 1"),
        (lambda: model_free(discount=1.0), "discount must be at least 0 and below 1"),
        (lambda: sample_groups(KEY, garnet(), UNIFORM, 0), "batch: .*at least 1"),
        (lambda: run_estimate(model_free(), Exact()), r"Exact\(\) needs the model"),
        (lambda: run_estimate(garnet(PairGarnet), baseline=StateBaseline()), "trajectories: StateBaseline.*has 2"),
        *(
            (lambda part=part: part.init(model_free(Features.make())), "environment: .*needs a TabularEnvironment")
            for part in (StateBaseline(),)
        ),
        *(
            (
                lambda part=part: part.init(model_free(Features.make()), jnp.zeros((5, 2))),
                "environment: .*needs a TabularEnvironment, got Features",
            )
            for part in (LearnedModel(), LearnedCritic())
        ),
        (
            lambda: run_estimate(model_free(Features.make()), SharedRollouts(2), policy=even),
            "environment: SharedRollouts needs a TabularEnvironment",
        ),
    ],
)
def test_input_errors(fails, message):
    with pytest.raises(bj.InputError, match=message):
        fails()


# 10. An environment that is no table.


class Features(Environment):
    """A process of 4 states of which a policy sees a vector of features; one pair ends it."""

    kernel: jax.Array  # [S, A, S]
    features: jax.Array  # [S, F]

    @classmethod
    def make(cls):
        rng = np.random.default_rng(3)
        return cls(jnp.asarray(rng.dirichlet(np.ones(4), (4, 2))), jnp.asarray(rng.normal(size=(4, 4))))

    @property
    def action_space(self):
        return bj.environments.Discrete(2)

    def reset(self, key):
        return {"at": jax.random.randint(key, (), 0, 4)}

    def observe(self, state):
        return self.features[state["at"]]

    def step(self, key, state, action):
        following = {"at": jax.random.choice(key, 4, p=self.kernel[state["at"], action]).astype(state["at"].dtype)}
        ends = (state["at"] == 1) & (action == 0)
        return following, TimeStep(self.observe(following), jnp.zeros(()), ends, jnp.zeros((), bool))


COST = jnp.asarray(np.random.default_rng(4).normal(size=(4, 2)))
PRICE = 0.3


def features_setting():
    """The sampled problem and its exact twin on a table; the upper variable is a dict of weights [F, A]."""
    environment = Features.make()
    discount = jnp.full((4, 2), 0.5).at[1, 0].set(0)

    def costs(weights, observation):
        return observation @ COST + PRICE / 2 * (observation @ weights) ** 2

    def loss(key, x, trajectories):
        del key
        paid = jax.vmap(costs, (None, 0))(x["weights"], trajectories.observation[0])
        taken = jnp.take_along_axis(paid, trajectories.action[0][:, None], 1)[:, 0]
        return jnp.where(trajectories.valid[0], taken, 0)

    def reward(x):
        return bj.Linear(lambda observation: observation, x["weights"])

    def mdp(x):
        return bj.MDP(environment.kernel, environment.features @ x["weights"], discount)

    def objective(x, solution):
        process = mdp(x)
        paid = process.replace(reward=jax.vmap(costs, (None, 0))(x["weights"], environment.features))
        return bj.policy_value(paid, solution.policy) @ process.initial

    regularizer = bj.ShannonEntropy(0.7)
    sampled = bj.SampledBilevelProblem(
        environment, reward, regularizer, loss, discount=0.5, loss_discount=0.5, horizon=HORIZON
    )
    x = {"weights": jnp.asarray(np.random.default_rng(5).normal(size=(4, 2)))}
    exact = bj.check(bj.hypergradient(bj.BilevelProblem(mdp, regularizer, objective), x, with_error=False))
    logits = jnp.linalg.solve(environment.features, exact.solution.q / 0.7)

    def policy(observation):
        return jax.nn.softmax(observation @ logits)

    np.testing.assert_allclose(jax.vmap(policy)(environment.features), exact.solution.policy, rtol=1e-9)
    policy = jax.tree_util.Partial(lambda logits, observation: jax.nn.softmax(observation @ logits), logits)
    return Setting(sampled, x, policy, np.asarray(exact.value), flat(exact.gradient)), mdp(x)


@pytest.mark.slow
@pytest.mark.parametrize("response", [NestedRollouts(LENGTH, visits=2)], ids=["two visits"])
def test_features_for_states(response):
    at, _ = features_setting()
    seen = draws(at, response)
    require_mean(seen.gradient, at.gradient, 0.05, "features")
    require_mean(seen.value, at.value, 0.05, "value")


@pytest.mark.slow
def test_one_step_on_features_and_on_a_table():
    """The same process twice: the two means differ by no more than their errors allow."""
    at, mdp = features_setting()
    environment = at.problem.environment
    seen = draws(at, OneStep()).gradient

    def loss(key, x, trajectories):
        return at.problem.loss(
            key, x, trajectories._replace(observation=environment.features[trajectories.observation])
        )

    table = bj.SampledBilevelProblem(
        TabularEnvironment(mdp),
        lambda x: environment.features @ x["weights"],
        bj.ShannonEntropy(0.7),
        loss,
        discount=0.5,
        loss_discount=0.5,
        horizon=HORIZON,
    )
    policy = Table(jax.vmap(at.policy)(environment.features))
    other = draws(at._replace(problem=table, policy=policy), OneStep(), key=jax.random.key(8)).gradient
    error = np.sqrt(seen.var(0) / len(seen) + other.var(0) / len(other))
    z = (seen.mean(0) - other.mean(0)) / error
    print(f"z {z}")
    assert np.abs(z).max() < 5.5  # once in 3 million
    assert np.linalg.norm(error) < 0.08 * np.linalg.norm(other.mean(0))
