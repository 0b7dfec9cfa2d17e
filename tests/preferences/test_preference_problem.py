"""The bilevel problem of a reward that is learned from labels: what the agent earns, and its loss by hand."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment_helpers import PROCESS, Anything, Walk, walk_policy
from scipy.special import expit

import bilevel_jax as bj
from bilevel_jax.environments import Continuing, Rewarded, Trajectory, rollout
from bilevel_jax.networks import MLP, Ensemble, RewardNetwork
from bilevel_jax.preferences import PreferenceProblem, ScriptedTeacher, Segments, Teacher

KEY = jax.random.key(2)
HORIZON = 6


def true_reward(before, action, after):
    return 2 * after[0] + action.astype(after.dtype)


def problem_of(members=1, *, inputs="next_state", environment=None, **options):
    environment = Rewarded(Continuing(Walk()), true_reward) if environment is None else environment
    model = RewardNetwork.of(environment, MLP(width=4, depth=1), inputs)
    usual = {"regularizer": bj.ShannonEntropy(0.5), "discount": 0.9, "length": 4, "horizon": HORIZON}
    return PreferenceProblem(environment, model if members == 1 else Ensemble(model, members), **(usual | options))


@functools.cache
def walks(batch=5, ends=False):
    """Trajectories of the environment; with ends, those of walks that have some, and later steps that are not valid."""
    environment = Rewarded(Walk(2) if ends else Continuing(Walk()), true_reward)
    return jax.jit(lambda key: rollout(key, environment, walk_policy, batch=batch, horizon=HORIZON))(KEY)


@eqx.filter_jit
def loss_of(problem, key, x, steps):
    return problem.loss(key, x, steps)


@eqx.filter_jit
def scores_of(problem, x, segments):
    return problem.member_scores(x, segments)


def learned(problem, x, steps):
    """The reward of the model, a step at a time, [B, H]."""
    reward = problem.reward(x)
    parts = steps.observation, steps.action, steps.next_observation
    shape = np.shape(steps.valid)
    each = [reward.of_step(*(part[place] for part in parts)) for place in np.ndindex(shape)]
    return np.array([float(number) for number in each]).reshape(shape)


# What the agent earns.


@pytest.mark.parametrize("inputs", ["state", "next_state", "state_action"])
def test_the_agent_earns_the_model(inputs):
    problem = problem_of(inputs=inputs)
    x, steps = problem.start(KEY), walks()
    np.testing.assert_allclose(problem.earned(x, steps), learned(problem, x, steps), rtol=1e-12)
    assert problem.earns_reward_alone


@pytest.mark.parametrize("ends", [False, True])
def test_centred_rewards_have_the_mean_0_over_valid_steps(ends):
    problem, steps = problem_of(centred=True), walks(ends=ends)
    x = problem.start(KEY)
    plain, valid = np.asarray(problem_of().earned(x, steps)), np.asarray(steps.valid)
    assert valid.all() != ends
    got = np.asarray(problem.earned(x, steps))
    np.testing.assert_allclose(got, plain - plain[valid].mean(), rtol=1e-12)
    np.testing.assert_allclose(got[valid].mean(), 0, atol=1e-14)
    assert abs(plain[valid].mean()) > 1e-3
    # No valid step: nothing is divided by 0.
    assert np.isfinite(problem.earned(x, steps._replace(valid=jnp.zeros_like(steps.valid)))).all()


@pytest.mark.parametrize("centred", [False, True])
def test_with_the_true_reward_it_earns_what_the_environment_emits(centred):
    usual, steps = problem_of(centred=centred), walks()
    problem = usual.with_true_reward()
    assert problem.true_reward
    assert not usual.true_reward
    assert not problem.earns_reward_alone
    expected = 2 * np.asarray(steps.next_observation)[..., 0] + np.asarray(steps.action)
    for seed in (0, 1):  # x has no effect
        earned = problem.earned(problem.start(jax.random.key(seed)), steps)
        np.testing.assert_allclose(earned, expected - centred * expected.mean(), rtol=1e-12, atol=1e-12)
    for name in ("environment", "model", "teacher", "discount", "length", "horizon", "centred"):
        assert getattr(problem, name) is getattr(usual, name)
    x = problem.start(KEY)
    assert problem.reward(x).all(jnp.zeros(2)).tolist() == [0, 0]
    # Where actions are no finite set, too.
    box = problem_of(environment=bj.environments.classic.Pendulum()).with_true_reward()
    pendulums = rollout(KEY, box.environment, Anything(box.action_space), batch=2, horizon=3)
    np.testing.assert_array_equal(box.earned(box.start(KEY), pendulums), pendulums.reward)


@pytest.mark.slow
def test_agents_learn_from_it():
    """The same agent on the model and on the true reward: one update in float32, with other results."""
    with jax.enable_x64(False):
        problem = problem_of(centred=True)
        agent = bj.agents.SoftPQN(MLP(width=4, depth=1), processes=4, steps=4, epochs=1, minibatches=1)

        @eqx.filter_jit
        def improved(problem):
            x = problem.start(KEY)
            return agent.improve(KEY, agent.init(KEY, problem, x), problem, x).params

        one, other = (jax.tree.leaves(improved(made)) for made in (problem, problem.with_true_reward()))
        assert all(leaf.dtype == jnp.float32 and bool(jnp.isfinite(leaf).all()) for leaf in one + other)
        assert any(bool((a != b).any()) for a, b in zip(one, other, strict=True))


# Its start.


def test_it_starts_at_random_with_rationality_1_or_where_it_was_told():
    problem = problem_of()
    x = problem.start(KEY)
    assert float(problem.rationality(x)) == 1
    assert float(problem.rationality(x | {"log_rationality": jnp.log(jnp.asarray(3.0))})) == pytest.approx(3)
    expected = problem.model.init(KEY, jnp.zeros(2))
    jax.tree.map(np.testing.assert_array_equal, x["reward"], expected)
    other = problem.start(jax.random.key(3))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(other), strict=True))
    told = problem.starting_at(other)
    jax.tree.map(np.testing.assert_array_equal, told.start(KEY), other)
    jax.tree.map(np.testing.assert_array_equal, problem.start(KEY), x)


@pytest.mark.parametrize("x64", [False, True])
def test_the_dtype_is_that_of_the_parameters(x64):
    with jax.enable_x64(x64):
        x = problem_of().start(KEY)
        assert {leaf.dtype for leaf in jax.tree.leaves(x)} == {jnp.result_type(float)}


# Scores.


@pytest.mark.parametrize("members", [1, 3])
def test_scores_of_members_are_those_of_each(members):
    problem, steps = problem_of(members), walks(ends=True)
    x, segments = problem.start(KEY), Segments.of(walks(ends=True), hidden=False)
    scores = np.asarray(scores_of(problem, x, segments))
    assert scores.shape == (members, 5, HORIZON)
    one = problem_of()
    for member in range(members):
        own = x["reward"] if members == 1 else jax.tree.map(lambda leaf, member=member: leaf[member], x["reward"])
        expected = np.where(steps.valid, learned(one, {"reward": own}, steps), 0)
        np.testing.assert_allclose(scores[member], expected, rtol=1e-12, atol=1e-15)
    # The agent earns their mean.
    valid = np.asarray(steps.valid)
    np.testing.assert_allclose(np.asarray(problem.earned(x, steps))[valid], scores.mean(0)[valid], rtol=1e-12)
    assert members == 1 or np.abs(scores[0] - scores[1]).max() > 1e-3


# The loss.


def pair(whole=True):
    """Two trajectories, the first with a higher return; the second is one that stopped early, if not `whole`."""
    steps = jax.tree.map(lambda leaf: leaf[:2], walks())
    valid = jnp.ones((2, HORIZON), bool)
    valid = valid if whole else valid.at[1, 2:].set(False)
    reward = jnp.asarray(np.random.default_rng(0).normal(size=(2, HORIZON)))
    return steps._replace(reward=reward.at[0, 0].add(10.0), valid=valid)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("label", [1.0, 0.0])
def test_the_loss_of_a_label_by_hand(whole, label):
    """On whole trajectories, where the cut is no choice; the teacher is always right, or always wrong."""
    problem = problem_of(length=HORIZON, teacher=ScriptedTeacher(mistake=1 - label))
    x, steps = problem.start(KEY), pair(whole)
    total = np.where(steps.valid, learned(problem, x, steps), 0).sum(1)
    chance = expit(total[0] - total[1])
    expected = -np.log(chance if label else 1 - chance)
    np.testing.assert_allclose(loss_of(problem, KEY, x, steps), expected, rtol=1e-12)
    assert abs(expected - np.log(2)) > 1e-3


def test_the_loss_of_a_pair_that_is_skipped_is_0():
    problem = problem_of(length=HORIZON, teacher=ScriptedTeacher(skip=1e6))
    assert float(loss_of(problem, KEY, problem.start(KEY), pair())) == 0


def test_the_loss_of_labels_and_cuts_has_the_right_mean():
    """Segments of two steps of six, with five starts each, and a noisy teacher: the mean over 25 pairs of segments and
    both labels, in numpy. 4,000 draws; a right program is off by 5 standard errors once in 2 million, and those are
    below 3 percent.
    """
    teacher = Teacher(rationality=0.7)
    problem = problem_of(length=2, teacher=teacher)
    x, steps = problem.start(KEY), pair()
    model, truth = learned(problem, x, steps), np.asarray(steps.reward)
    model, truth = ([[row[h : h + 2].sum() for h in range(5)] for row in rows] for rows in (20 * model, truth))
    # The parameters of the last layer, times 20, are those of rewards that matter.
    leaves, structure = jax.tree.flatten(x["reward"])
    x = {"reward": jax.tree.unflatten(structure, [*leaves[:-2], *(20 * leaf for leaf in leaves[-2:])])}
    np.testing.assert_allclose(learned(problem, x, steps)[0, :2].sum(), model[0][0], rtol=1e-9)
    expected = []
    for a in range(5):
        for b in range(5):
            gain, first = model[0][a] - model[1][b], expit(0.7 * (truth[0][a] - truth[1][b]))
            expected.append(-first * np.log(expit(gain)) - (1 - first) * np.log(expit(-gain)))
    losses = jax.jit(jax.vmap(lambda key: problem.loss(key, x, steps)))(jax.random.split(KEY, 4000))
    error = np.std(losses) / np.sqrt(len(losses))
    assert error < 0.03 * np.mean(expected)
    assert abs(np.mean(losses) - np.mean(expected)) < 5 * error
    assert abs(np.mean(expected) - np.log(2)) > 10 * error


def test_states_and_distributions_are_not_cut():
    """Trajectories of `rollout` have states, others have none, and the loss is the same."""
    problem = problem_of(length=3)
    x, steps = problem.start(KEY), pair()
    assert steps.state is not None
    assert float(loss_of(problem, KEY, x, steps)) == float(loss_of(problem, KEY, x, steps._replace(state=None)))
    assert isinstance(steps, Trajectory)
    assert problem.trajectories == 2


def test_it_is_solved_as_a_sampled_problem():
    """The gradient of the loss in x is what an estimator of it needs, finite and not 0 for the model alone."""
    problem = problem_of(length=HORIZON)
    gradient = jax.jit(jax.grad(lambda x: problem.loss(KEY, x, pair())))(problem.start(KEY))
    assert float(gradient["log_rationality"]) == 0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    assert any(bool((leaf != 0).any()) for leaf in jax.tree.leaves(gradient["reward"]))


def masked():
    mask = np.array([[True, True, False]] + [[True] * 3] * 5)
    mdp = bj.MDP(PROCESS.dense, PROCESS.reward, 0.9, PROCESS.initial, available=mask)
    return bj.environments.TabularEnvironment(mdp)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 7}, "length: expected 1 to the horizon 6, got 7"),
        ({"length": 0}, "length: .*at least 1, got 0"),
        ({"horizon": 0}, "horizon: .*at least 1, got 0"),
        ({"horizon": 2.5}, "horizon: .*got 2.5"),
        ({"discount": 1.0}, "discount must be at least 0 and below 1"),
        ({"discount": -0.1}, "discount must be at least 0 and below 1"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(bj.InputError, match=message):
        problem_of(**options)


def test_refuses_states_that_lack_actions():
    environment = masked()
    model = RewardNetwork.of(Walk(), MLP(width=2), "state")
    with pytest.raises(bj.InputError, match="environment: PreferenceProblem takes every action in every state"):
        PreferenceProblem(environment, model, regularizer=bj.ShannonEntropy(0.5), discount=0.9, length=2, horizon=4)
