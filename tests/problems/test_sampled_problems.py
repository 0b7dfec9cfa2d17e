"""Problems that can be solved exactly and sampled: both forms have one objective, and options do what they say."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import central_difference, densify, random_like

import bilevel_jax as bj
from bilevel_jax.estimators import Exact, estimate, sample_groups
from bilevel_jax.estimators.costs import step_costs

KEY = jax.random.key(0)
# name, options, and how far from the start x is taken
CASES = {
    "rlhf": ("tabular_rlhf", {}, 1.0),
    "rlhf with sampled labels": (
        "tabular_rlhf",
        {"labels": "sampled", "features": 4, "regularizer": "kl", "tie_threshold": 0.5, "length": 2, "starts": 3},
        1.0,
    ),
    "chain": ("reward_shaping", {}, 1.0),
    "chain with a bonus a pair": ("reward_shaping", {"bonus": "pair", "states": 6, "distractor": 0.6}, 1.0),
    "grid": ("reward_shaping", {"layout": "grid"}, 1.0),
    "four rooms": ("four_rooms", {"temperature": 0.005, "horizon": 1000}, 1.0),
}
# Among them every layout, kind of reward model, regularizer and label.
SOME = ["rlhf with sampled labels", "chain with a bonus a pair", "grid"]


@functools.cache
def build(case):
    """The problem, an x, and the lower level's solution there."""
    name, options, scale = CASES[case]
    problem = bj.problems.make(name, **options)
    x = problem.start(KEY)
    x = x + scale * random_like(7, x)
    return problem, x, bj.check(bj.solve(problem.mdp(x), problem.regularizer(x)))


def table(problem, solution):
    return bj.Table(solution.policy.reshape(-1, problem.environment.num_actions))


objective_of = jax.jit(lambda problem, x, solution: problem.objective(x, solution))


@jax.jit
def losses_of(key, problem, x, policy):
    """Of five groups."""
    groups = sample_groups(key, problem, policy, 5)
    return jax.vmap(problem.loss, (None, None, 0))(key, x, groups)


@functools.partial(jax.jit, static_argnames=("chunks", "batch"))
def mean_loss(key, problem, x, policy, chunks, batch):
    """Mean and standard error of the loss over chunks * batch groups, little memory at a time."""
    rollouts, losses = jax.random.split(key)

    def chunk(index):
        groups = sample_groups(rollouts, problem, policy, batch, first=index * batch)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(losses, index * batch + jnp.arange(batch))
        paid = jax.vmap(problem.loss, (0, None, 0))(keys, x, groups)
        costs = step_costs(problem, paid)
        return costs.each @ costs.factors

    paid = jax.lax.map(chunk, jnp.arange(chunks)).reshape(-1)
    return jnp.mean(paid), jnp.std(paid) / paid.size**0.5


@pytest.mark.often(2)
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_mean_loss_is_the_objective(case):
    """20,000 groups or more; within 4 standard errors, which false alarms 6 times in 100,000 for each case."""
    problem, x, solution = build(case)
    assert isinstance(problem, bj.Problem)
    assert isinstance(problem, bj.SampledProblem)
    mean, error = mean_loss(jax.random.key(1), problem, x, table(problem, solution), 20, 1000)
    exact = float(objective_of(problem, x, solution))
    assert error < 0.03 * max(0.3, abs(exact))  # else the check says little
    assert abs(mean - exact) <= 4 * error


@pytest.mark.slow
@pytest.mark.parametrize("case", SOME)
def test_hypergradient_against_differences(case):
    problem, x, _ = build(case)
    result = bj.check(bj.hypergradient(problem, x, with_error=False))
    f = jax.jit(lambda x: problem.objective(x, bj.solve(problem.mdp(x), problem.regularizer(x))))
    for seed in range(2):
        d = random_like(seed, x)
        np.testing.assert_allclose(np.vdot(result.gradient, d), central_difference(f, x, d)[0], rtol=1e-7, atol=1e-10)


@pytest.mark.slow
def test_hessian_vector_product_of_the_pair_loss():
    problem, x, _ = build("rlhf with sampled labels")
    d, e = (jnp.asarray(random_like(seed, x)) for seed in (0, 1))

    def gradient(x):
        return bj.hypergradient(problem, x, with_error=False).gradient

    _, along = jax.jit(lambda x: jax.jvp(gradient, (x,), (d,)))(x)
    _, across = jax.jit(lambda x: jax.jvp(gradient, (x,), (e,)))(x)
    np.testing.assert_allclose(along, central_difference(gradient, x, d), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(along @ e, across @ d, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rlhf with sampled labels", "chain with a bonus a pair"])
def test_mean_estimate_is_the_hypergradient(case):
    """20 batches; along a direction within 4 standard errors (of 19 degrees of freedom: 8 false alarms in 10,000)."""
    problem, x, solution = build(case)
    policy, d = table(problem, solution), random_like(3, x)

    @jax.jit
    def along(key):
        return estimate(key, problem, x, policy, batch=500, response=Exact()).gradient @ d

    sampled = np.array([along(key) for key in jax.random.split(jax.random.key(2), 20)])
    want = bj.hypergradient(problem, x, with_error=False).gradient @ d
    error = sampled.std(ddof=1) / len(sampled) ** 0.5
    assert error < 0.2 * abs(want)
    assert abs(sampled.mean() - want) <= 4 * error


@pytest.mark.slow
@pytest.mark.parametrize("case", SOME[:2])
def test_float32(case):
    name, options, _ = CASES[case]
    with jax.enable_x64(False):
        problem = jax.jit(lambda: bj.problems.make(name, **options))()
        x = problem.start(KEY)
        assert {leaf.dtype.name for leaf in jax.tree.leaves((problem, x))} <= {"float32", "int32", "bool"}
        result = bj.check(bj.hypergradient(problem, x, with_error=False))
        policy = table(problem, result.solution)
        paid = losses_of(KEY, problem, x, policy)
        assert {result.value.dtype, result.gradient.dtype, paid.dtype} == {jnp.dtype("float32")}
    wide = jax.tree.map(lambda leaf: leaf.astype(float) if leaf.dtype == jnp.float32 else leaf, (problem, x))
    want = bj.hypergradient(*wide, with_error=False)
    np.testing.assert_allclose(result.value, want.value, rtol=2e-5)
    np.testing.assert_allclose(result.gradient, want.gradient, rtol=0, atol=2e-3 * np.abs(want.gradient).max())


TRACED = {
    "tabular_rlhf": ["discount", "temperature", "rationality", "noise", "tie_threshold", "ridge", "seed"],
    "reward_shaping": ["discount", "temperature", "true_discount", "distractor", "scale", "price", "slip"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rlhf with sampled labels", "grid"])
def test_numbers_of_the_options_can_be_traced(case):
    """One program, mapped over the options: problem, exact hyper-gradient and sampled loss as if made one by one."""
    name, options, _ = CASES[case]
    x = build(case)[1]
    numbers = {option: np.array([2, 5], np.uint32) if option == "seed" else [0.3, 0.6] for option in TRACED[name]}

    def evaluate(numbers):
        problem = bj.problems.make(name, **(options | numbers))
        result = bj.hypergradient(problem, x, with_error=False)
        return result.value, result.gradient, losses_of(KEY, problem, x, table(problem, result.solution))

    many = jax.jit(jax.vmap(evaluate))(jax.tree.map(jnp.asarray, numbers, is_leaf=lambda leaf: isinstance(leaf, list)))
    for index in range(2):
        single = jax.jit(evaluate)({option: values[index] for option, values in numbers.items()})
        for got, want in zip(many, single, strict=True):
            np.testing.assert_allclose(got[index], want, rtol=1e-9, atol=1e-12)


# Tabular RLHF.


def brute_force(problem, policy, reward):
    """Every sequence of pairs: {pairs: (probability, return under reward, hidden return)}, by the dense kernel."""
    kernel = densify(np.asarray(problem.transition.successor), np.asarray(problem.transition.probability))
    initial, hidden = np.asarray(problem.initial), np.asarray(problem.hidden_reward)
    pairs = list(itertools.product(*map(range, hidden.shape)))
    found = {}
    for sequence in itertools.product(pairs, repeat=problem.horizon):
        probability = initial[sequence[0][0]]
        for step, pair in enumerate(sequence):
            before = sequence[step - 1] if step else None
            probability *= policy[pair] * (1 if before is None else kernel[(*before, pair[0])])
        if probability > 0:
            returns = (sum(t[pair] for pair in sequence) for t in (reward, hidden))
            found[sequence] = (probability, *returns)
    return found


TINY = {"states": 3, "actions": 2, "starts": 2, "seed": 3, "tie_threshold": 0.4, "ridge": 0.1}


@functools.cache
def tiny(**options):
    problem = bj.problems.make("tabular_rlhf", **(TINY | options))
    x = jnp.asarray(random_like(1, problem.start(KEY)))
    solution = bj.check(bj.solve(problem.mdp(x), problem.regularizer(x)))
    found = brute_force(problem, np.asarray(solution.policy), np.asarray(problem.reward(x).values))
    return problem, x, solution, found


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"branching": 3, "features": 2, "length": 2}])
def test_rlhf_objective_is_the_sum_over_all_pairs_of_segments(options):
    problem, x, solution, found = tiny(**options)
    probability, learned, hidden = (np.array(column) for column in zip(*found.values(), strict=True))
    assert probability.sum() == pytest.approx(1, rel=1e-12)
    segments = jax.jit(lambda problem, *arguments: problem.segments(*arguments))
    listed = [np.asarray(part) for part in segments(problem, solution.policy, problem.reward(x).values)]
    k, _, a = problem.transition.successor.shape
    assert listed[0].shape == (2 * a * (a * k) ** (problem.horizon - 1),)
    assert listed[0].sum() == pytest.approx(1, rel=1e-12)
    for power in (1, 2, 3):  # the same joint distribution of both returns
        np.testing.assert_allclose(listed[0] @ listed[1] ** power, probability @ learned**power, rtol=1e-11)
        np.testing.assert_allclose(
            listed[0] @ (listed[1] * listed[2] ** power), probability @ (learned * hidden**power), rtol=1e-11
        )
    label = np.asarray(problem.teacher.mean_label(jnp.asarray(hidden)[:, None], jnp.asarray(hidden)))
    gain = learned[:, None] - learned
    loss = label * np.logaddexp(0, -gain) + (1 - label) * np.logaddexp(0, gain)
    want = probability @ loss @ probability + 0.05 * np.sum(np.asarray(x) ** 2)
    np.testing.assert_allclose(objective_of(problem, x, solution), want, rtol=1e-12)


@pytest.mark.slow
def test_rlhf_segments_are_drawn_as_often_as_enumerated():
    """Each sequence with at least 10 expected draws within 5 standard errors: 6 false alarms in 10 million for each."""
    problem, _, solution, found = tiny()
    count = 50_000
    drawn = jax.tree.map(lambda leaf: leaf[:, 0], sample_groups(KEY, problem, table(problem, solution), count))
    code = (drawn.observation * 2 + drawn.action) @ 6 ** jnp.arange(3, dtype=jnp.int32)
    frequency = np.bincount(np.asarray(code), minlength=6**3) / count
    probability = np.zeros(6**3)
    for sequence, (p, *_) in found.items():
        probability[sum((2 * s + a) * 6**h for h, (s, a) in enumerate(sequence))] = p
    assert (frequency[probability == 0] == 0).all()
    error = np.sqrt(probability * (1 - probability) / count)
    often = probability * count >= 10
    assert often.sum() > 20
    assert (np.abs(frequency - probability)[often] <= 5 * error[often]).all()


def test_rlhf_is_as_described():
    problem = bj.problems.make("tabular_rlhf", states=8, actions=3, branching=3, starts=4, features=5)
    x = problem.start(KEY)
    assert x.shape == (5,)
    np.testing.assert_allclose(problem.initial, [0.25] * 4 + [0] * 4)
    successor = np.asarray(problem.transition.successor)
    assert successor.shape == (3, 8, 3)
    assert all(len(set(successor[:, s, a])) == 3 for s in range(8) for a in range(3))
    weights, *_ = np.linalg.lstsq(
        np.reshape(problem.features, (-1, 5)), np.asarray(problem.hidden_reward).reshape(-1), rcond=None
    )
    np.testing.assert_allclose(problem.reward(jnp.asarray(weights)).values, problem.hidden_reward, atol=1e-12)
    assert bj.problems.make("tabular_rlhf").start(KEY).shape == (24,)
    assert not np.array_equal(bj.problems.make("tabular_rlhf", seed=1).hidden_reward, problem.hidden_reward)


@pytest.mark.slow
def test_rlhf_reference_policy():
    problem = bj.problems.make("tabular_rlhf", regularizer="kl", temperature=1e6)
    x = problem.start(KEY)
    solution = bj.check(bj.solve(problem.mdp(x), problem.regularizer(x)))
    np.testing.assert_allclose(solution.policy, problem.reference, atol=1e-5)
    assert np.abs(np.asarray(problem.reference) - 1 / 3).max() > 0.2


@pytest.mark.slow
def test_rlhf_learns_the_hidden_reward_where_the_teacher_is_a_bradley_terry_model():
    """At the hidden reward itself the loss is least for every policy: its gradient in r_x alone is 0."""
    problem = bj.problems.make("tabular_rlhf", rationality=1.0, noise=0.0, ridge=0.0)
    x = problem.hidden_reward.reshape(-1)
    solution = bj.check(bj.solve(problem.mdp(x), problem.regularizer(x)))
    direct = jax.jit(jax.grad(problem.objective))(x, solution)
    np.testing.assert_allclose(direct, 0, atol=1e-12)
    np.testing.assert_array_less(objective_of(problem, x, solution), objective_of(problem, 0.5 * x, solution))


@pytest.mark.slow
def test_rlhf_true_return():
    problem, x, solution = build("rlhf")
    mdp = problem.mdp(x).replace(reward=problem.hidden_reward)
    want = bj.policy_value(mdp, solution.policy) @ mdp.initial
    np.testing.assert_allclose(problem.true_return(solution.policy), want, rtol=1e-12)
    zero = jnp.zeros_like(x)
    uniform = bj.solve(problem.mdp(zero), problem.regularizer(zero)).policy
    best = bj.solve(mdp, problem.regularizer(x)).policy
    assert problem.true_return(best) > problem.true_return(uniform) + 1


@pytest.mark.slow
def test_rlhf_largest_size():
    problem = bj.problems.make("tabular_rlhf", actions=2, length=6)
    x = problem.start(KEY)
    result = bj.check(bj.hypergradient(problem, x, with_error=False))
    mean, error = mean_loss(KEY, problem, x, table(problem, result.solution), 20, 1000)
    assert abs(mean - result.value) <= 4 * error


# Reward shaping.


@pytest.mark.slow
def test_chain_is_as_described():
    problem = bj.problems.make("reward_shaping", states=5, slip=0.25, distractor=0.3, scale=2.0, price=0.5)
    x = jnp.asarray([0.3, -1.0, 0.0, 50.0, 0.1])
    mdp = problem.mdp(x)
    kernel = np.zeros((5, 2, 5))
    for s, (a, made) in itertools.product(range(5), itertools.product(range(2), repeat=2)):
        kernel[s, a, np.clip(s + (-1, 1)[made], 0, 4)] += 0.75 if made == a else 0.25
    got = np.stack([mdp.transition.expect(row) for row in jnp.eye(5)], -1)
    np.testing.assert_allclose(got, kernel, rtol=1e-15)
    np.testing.assert_allclose(problem.shaping(x)[:, 0], 2 * np.tanh(x), rtol=1e-15)
    true = np.array([0.3, 0, 0, 0, 1])
    np.testing.assert_allclose(mdp.reward, np.repeat((true + 2 * np.tanh(x))[:, None], 2, 1), rtol=1e-15)
    np.testing.assert_allclose(mdp.discount, np.repeat([[0], [0.7], [0.7], [0.7], [0]], 2, 1))
    np.testing.assert_array_equal(mdp.initial, [0, 1, 0, 0, 0])
    solution = bj.check(bj.solve(mdp, problem.regularizer(x)))
    under = np.einsum("sa,saj->sj", solution.policy, kernel) * np.array([0, 0.97, 0.97, 0.97, 0])[:, None]
    want = np.linalg.solve(np.eye(5) - under, true)[1]
    np.testing.assert_allclose(problem.true_return(solution.policy), want, rtol=1e-12)
    np.testing.assert_allclose(problem.objective(x, solution), 0.25 * np.sum((2 * np.tanh(x)) ** 2) - want, rtol=1e-12)


def test_grid_is_as_described():
    problem = bj.problems.make("reward_shaping", layout="grid", rows=("s.x", "gxd", ".d."), bonus="pair")
    assert problem.start(KEY).shape == (7 * 4,)
    np.testing.assert_array_equal(problem.environment.reward[:, 0], [0, 0, 1, 0.2, 0, 0.2, 0])
    np.testing.assert_array_equal(problem.at_exit, [False, False, True, True, False, True, False])
    np.testing.assert_array_equal(problem.initial, [1, 0, 0, 0, 0, 0, 0])
    x = random_like(0, problem.start(KEY))
    np.testing.assert_allclose(problem.shaping(jnp.asarray(x)), 0.5 * np.tanh(x.reshape(7, 4)), rtol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "at_most", "at_least"), [("chain", 0.35, 0.6), ("grid", 0.25, 0.5)])
def test_shaping_is_needed_and_helps(layout, at_most, at_least):
    """Without a bonus the agent earns little; a bonus that grows towards the goal makes it earn much."""
    problem = bj.problems.make("reward_shaping", layout=layout)
    mdp = problem.mdp(jnp.zeros(problem.initial.shape))
    reached = jnp.asarray(problem.environment.reward[:, 0] == 1, float)
    for _ in range(60):  # discounted nearness of the goal
        near = 0.9 * jnp.max(mdp.transition.expect(reached), -1)
        reached = jnp.where(problem.at_exit, reached, jnp.maximum(reached, near))
    earned = []
    for bonus in (jnp.zeros_like(reached), jnp.where(problem.environment.reward[:, 0] == 0.2, -0.9, 0.9 * reached)):
        x = jnp.arctanh(bonus)
        solution = bj.check(bj.solve(problem.mdp(x), problem.regularizer(x)))
        earned.append(float(problem.true_return(solution.policy)))
    assert earned[0] < at_most
    assert earned[1] > at_least


@pytest.mark.slow
def test_truncation_is_as_small_as_said():
    problem = build("chain")[0]
    assert problem.true_discount**problem.horizon < 2.5e-7


@pytest.mark.slow
@pytest.mark.parametrize("discount", ["discount", "true_discount"])
def test_a_discount_of_zero_ends_nothing_in_the_simulator(discount):
    problem = bj.problems.make("reward_shaping", **{discount: 0.0})
    assert problem.environment.ends.sum() == 4  # two actions in each of two exits
    assert bj.problems.make("tabular_rlhf", discount=0.0).environment.ends.sum() == 0


# Options that make no sense.

RLHF, SHAPING = (functools.partial(bj.problems.make, name) for name in ("tabular_rlhf", "reward_shaping"))
REFUSED = {
    "too many segments": (
        lambda: RLHF(length=5),
        r"length: 5 steps make 31104 segments \(starts \* actions \* \(actions \* branching\)\^\(length - 1\)\), at "
        r"most 16384 can be compared exactly; take fewer",
    ),
    "branching": (lambda: RLHF(branching=9), r"branching must be at most 8 \(the number of states\), got 9"),
    "starts": (lambda: RLHF(starts=0), r"starts must be at least 1 \(the number of states\), got 0"),
    "features": (lambda: RLHF(features=-1), r"features must be at least 0, got -1"),
    "states": (lambda: RLHF(states=10_001), r"states must be at most 10000, got 10001"),
    "regularizer": (lambda: RLHF(regularizer="tsallis"), r"regularizer: expected 'entropy' or 'kl', got 'tsallis'"),
    "labels": (lambda: RLHF(labels="mean"), r"labels: expected 'expected' or 'sampled', got 'mean'"),
    "rlhf seed": (lambda: RLHF(seed=-1), r"seed must be at least 0 and below 2\^32, got -1"),
    "ridge": (lambda: RLHF(ridge=-1.0), r"ridge must be at least 0, got -1"),
    "rationality": (lambda: RLHF(rationality=-1.0), r"rationality must be at least 0, got -1"),
    "noise": (lambda: RLHF(noise=1.5), r"noise must be at most 1, got 1.5"),
    "rlhf discount": (lambda: RLHF(discount=1.0), r"discount must be at least 0 and below 1, got 1"),
    "rlhf temperature": (lambda: RLHF(temperature=0.0), r"temperature must be above 0, got 0"),
    "layout": (lambda: SHAPING(layout="ring"), r"layout: expected 'chain' or 'grid', got 'ring'"),
    "bonus": (lambda: SHAPING(bonus="action"), r"bonus: expected 'state' or 'pair', got 'action'"),
    "short chain": (lambda: SHAPING(states=2), r"states must be at least 3 \(exit, start and goal\), got 2"),
    "horizon": (lambda: SHAPING(horizon=0), r"horizon must be at least 1, got 0"),
    "no start": (lambda: SHAPING(layout="grid", rows=("..", "g.")), r"rows: expected one start 's', got 0"),
    "no goal": (lambda: SHAPING(layout="grid", rows=("..", "s.")), r"rows: no goal; mark at least one cell 'g'"),
    "no rows": (lambda: SHAPING(layout="grid", rows=()), r"rows: the map is empty"),
    "ragged": (lambda: SHAPING(layout="grid", rows=("sg.", "..")), r"rows: they have lengths \[2, 3\]"),
    "chain slip": (lambda: SHAPING(slip=1.0), r"slip must be at least 0 and below 1, got 1; 0 is none"),
    "grid slip": (lambda: SHAPING(layout="grid", slip=-0.1), r"slip must be at least 0 and below 1, got -0.1"),
    "true_discount": (lambda: SHAPING(true_discount=1.0), r"true_discount must be at least 0 and below 1, got 1"),
    "discount": (lambda: SHAPING(discount=-0.1), r"discount must be at least 0 and below 1, got -0.1"),
    "scale": (lambda: SHAPING(scale=-1.0), r"scale must be at least 0, got -1; 0 is none"),
    "price": (lambda: SHAPING(price=float("nan")), r"price is nan"),
    "distractor": (lambda: SHAPING(distractor=float("inf")), r"distractor is inf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_are_refused(case):
    build, message = REFUSED[case]
    with pytest.raises(bj.InputError, match=message):
        build()
