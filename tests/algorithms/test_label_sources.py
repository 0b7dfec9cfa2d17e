"""Where labels come from, each against what its own segments say; an agent of known decisions stands for the expert."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment_helpers import Walk, assert_same
from scipy.special import expit

import bilevel_jax as bj
from bilevel_jax.agents import Agent
from bilevel_jax.algorithms.labels.fresh import FreshLabels
from bilevel_jax.algorithms.labels.sources import AgentSegments, GivenLabels, SyntheticLabels, segments_of
from bilevel_jax.environments import AutoReset, Categorical, Continuing, Policy, Rewarded, TimeLimit
from bilevel_jax.networks import MLP, Ensemble, RewardNetwork
from bilevel_jax.preferences import PreferenceProblem, Preferences, Segments

KEY = jax.random.key(5)
LENGTH, HORIZON, TEMPERATURE = 3, 8, 0.25


def true_reward(before, action, after):
    """It tells all steps apart: none of two segments are equally good."""
    return after[0] + 0.3 * action.astype(after.dtype) + 0.1 * before[1]


def true_reward_numpy(segments):
    before, after = np.asarray(segments.observation), np.asarray(segments.next_observation)
    return after[..., 0] + 0.3 * np.asarray(segments.action) + 0.1 * before[..., 1]


def problem_of(environment=None, members=1, length=LENGTH, horizon=HORIZON):
    environment = Rewarded(Continuing(Walk()) if environment is None else environment, true_reward)
    model = RewardNetwork.of(environment, MLP(width=2, depth=0, layer_norm=False), "next_state")
    return PreferenceProblem(
        environment,
        model if members == 1 else Ensemble(model, members),
        regularizer=bj.ShannonEntropy(TEMPERATURE),
        discount=0.9,
        length=length,
        horizon=horizon,
    )


class Steep(Policy):
    """To the right with the probability sigmoid(slope (place + noise)): the more so, the farther right."""

    slope: jax.Array
    regularizer: bj.ShannonEntropy

    def distribution(self, observation):
        right = jax.nn.sigmoid(self.slope * (observation[0] + observation[1]))
        return Categorical(jnp.stack([1 - right, right]))


def log_steep(slope, segments):
    """log pi of the actions, in numpy."""
    seen, action = np.asarray(segments.observation), np.asarray(segments.action)
    right = expit(slope * (seen[..., 0] + seen[..., 1]))
    return np.log(np.where(action == 1, right, 1 - right))


class Known(Agent):
    """An agent that learns nothing from what it does: its slope is the number of its improvements times a step."""

    step: jax.Array = eqx.field(default_factory=lambda: jnp.asarray(0.1))

    def init(self, key, problem, x):
        return jnp.zeros((), jnp.int32)

    def improve(self, key, state, problem, x):
        assert problem.true_reward, "the expert must learn the true reward"
        return state + 1

    def policy(self, state, problem, x):
        return Steep(state.astype(self.step.dtype) * self.step, problem.regularizer(x))

    def environment_steps(self, problem):
        return 0


# Half of what is shown is of the expert itself, the other half at random.
EXPERT = {"expert": Known(), "improvements": 4, "shares": 2, "processes": 4}
SLOPE = 0.4


@eqx.filter_jit
def start(labels, problem, key=KEY, slope=0.0, x=None):
    """The state at the start, of an agent with a slope."""
    x = problem.start(jax.random.key(1)) if x is None else x
    return labels.init(key, problem, Steep(jnp.asarray(slope), problem.regularizer(x)), x)


@eqx.filter_jit
def update(labels, key, state, iteration, seen):
    iteration = jnp.asarray(iteration, jnp.int32)
    return labels.update(key, state, labels.due(state, iteration), iteration, seen)


def synthetic(judging="outcomes", key=KEY, **options):
    """30 pairs of an oracle to fit, and 20 that are held out."""
    return start(
        SyntheticLabels(30, 20, judging=judging, **({"rationality": jnp.inf} | EXPERT | options)), problem_of(), key
    )


def identities(segments):
    """A number for each segment: a walk's state has a key of its own at each step."""
    keys = segments.state[0][1]["key"][:, 0]
    return [tuple(words) for words in np.asarray(jax.random.key_data(keys)).tolist()]


def returns(data, scores):
    total = np.where(np.asarray(data.segments.valid), scores, 0).sum(1)
    one, two = np.asarray(data.pairs).T
    return total[one], total[two]


# Labels that are there already.


def test_given_labels_stay_what_they_are():
    made = synthetic()
    labels = GivenLabels(made.train, made.held_out)
    state = labels.init(KEY, problem_of(), None, None)
    assert labels.fresh_segments == 0
    state = update(labels, KEY, state, 0, None)
    assert_same(labels.train(state), made.train)
    assert_same(labels.held_out(state), made.held_out)
    alone = GivenLabels(made.train)
    assert alone.held_out(alone.init(KEY, problem_of(), None, None)) is None


# Those of a synthetic teacher.


def test_the_same_key_gives_the_same_pairs():
    state = synthetic()
    assert_same(synthetic(), state)
    other = synthetic(key=jax.random.key(6))
    assert not set(identities(other.train.segments)) & set(identities(state.train.segments))


@pytest.mark.slow
def test_several_runs_at_once_have_the_pairs_of_each():
    labels = SyntheticLabels(30, 20, judging="outcomes", rationality=jnp.inf, **EXPERT)
    keys = jax.random.split(KEY, 2)
    many = jax.jit(jax.vmap(lambda key: start(labels, problem_of(), key)))(keys)
    for number in range(2):
        alone = synthetic(key=keys[number]).train
        one = jax.tree.map(lambda leaf, number=number: leaf[number], many.train)
        assert identities(one.segments) == identities(alone.segments)
        np.testing.assert_array_equal(one.label, alone.label)
        np.testing.assert_array_equal(one.segments.action, alone.segments.action)


def test_sizes_and_shapes():
    labels, state = SyntheticLabels(30, 20, **EXPERT), synthetic()
    for data, count in ((labels.train(state), 30), (labels.held_out(state), 20)):
        assert data.count == count
        assert data.sources == ("synthetic",)
        assert data.segments.valid.shape == (2 * count, LENGTH)
        # Each segment is in one pair: nothing is carried that is in none.
        assert sorted(np.asarray(data.pairs).reshape(-1).tolist()) == list(range(2 * count))
    assert labels.fresh_segments == 0
    number = jnp.asarray(3, jnp.int32)
    assert not labels.due(state, number)
    assert labels.update(KEY, state, labels.due(state, number), number, None) is state


@pytest.mark.parametrize("judging", ["outcomes", "decisions"])
def test_no_segment_is_on_both_sides(judging):
    state = synthetic(judging)
    numbers = identities(state.train.segments) + identities(state.held_out.segments)
    assert len(set(numbers)) == len(numbers) == 100


def test_states_are_those_of_the_environment_and_fit_what_was_seen():
    environment = problem_of().environment
    for data in (synthetic().train, synthetic().held_out):
        segments = data.segments
        assert jax.tree.structure(segments.state) == jax.tree.structure(environment.reset(KEY))
        seen = jax.vmap(jax.vmap(environment.observe))(segments.state)
        np.testing.assert_array_equal(seen, segments.observation)
        np.testing.assert_array_equal(segments.observation[:, 1:], segments.next_observation[:, :-1])


def test_segments_may_go_on_after_an_end_of_a_process_that_has_none():
    segments = synthetic().train.segments
    place, over = np.asarray(segments.observation)[..., 0], np.asarray(segments.state[1])
    np.testing.assert_array_equal(over, np.abs(place) == 3)
    assert (np.abs(np.diff(place, axis=1))[~over[:, :-1]] == 1).all()
    assert over[:, :-1].any()


def test_outcomes_are_judged_by_the_true_reward():
    """By an oracle, who is never wrong; the hidden reward is what the environment emits. One always mistaken says the
    opposite.
    """
    for options, right in (({}, True), ({"mistake": 1.0}, False)):
        state = synthetic(**options)
        for data in (state.train, state.held_out):
            scores = true_reward_numpy(data.segments)
            np.testing.assert_allclose(data.segments.reward, scores, rtol=1e-14)
            one, two = returns(data, scores)
            np.testing.assert_array_equal(data.label, (one > two) == right)
            assert 0 < np.mean(data.label) < 1
            np.testing.assert_array_equal(data.weight, 1)


def test_decisions_are_judged_by_the_temperature_times_log_pi():
    """Of an expert improved as often as was said. What is skipped and what is equal tells the unit of the scores."""
    data = synthetic("decisions", skip=-0.6, equal=0.05).train

    def expected(scores):
        one, two = returns(data, scores)
        return np.maximum(one, two) > -0.6, np.where(np.abs(one - two) < 0.05, 0.5, one > two)

    judged, label = expected(TEMPERATURE * log_steep(SLOPE, data.segments))
    np.testing.assert_array_equal(data.weight, judged)
    np.testing.assert_array_equal(np.asarray(data.label)[judged], label[judged])
    assert 0 < judged.sum() < 30
    assert set(label[judged].tolist()) == {0.0, 0.5, 1.0}
    # Another unit, another number of improvements, or outcomes would be seen.
    for scores in (
        log_steep(SLOPE, data.segments),
        TEMPERATURE * log_steep(SLOPE * 3 / 4, data.segments),
        true_reward_numpy(data.segments),
    ):
        other_judged, other = expected(scores)
        assert (other_judged != judged).any() or (other != label)[judged].any()


def test_what_is_shown_is_more_and_more_random():
    """By 300 steps of an expert that always goes on outward: half of its steps are at random, so that three quarters go
    outward; with the least share 1 it is half of them. Each is outside of its bounds less than once in 10,000.
    """
    outward = {}
    for least in (0.0, 1.0):
        state = synthetic(expert=Known(jnp.asarray(1e6)), least_random=least)
        steps = [
            ((seen[..., 0] + seen[..., 1] > 0) == (action == 1)).mean(1)
            for seen, action in (
                (np.asarray(data.segments.observation), np.asarray(data.segments.action))
                for data in (state.train, state.held_out)
            )
        ]
        outward[least] = np.concatenate(steps)
    assert 0.62 < outward[0.0].mean() < 0.88
    assert 0.38 < outward[1.0].mean() < 0.62
    assert (outward[0.0] == 1).mean() > 0.35, "the expert itself is not shown"


def fragile():
    """Walks that end after one step or two, with one step too few for a segment of two."""
    return problem_of(Walk(1), length=2, horizon=8)


def require_weights(data):
    """Weight 0 where one of the two was not found; labels of an oracle elsewhere. Return how many were found."""
    valid = np.asarray(data.segments.valid)
    assert (valid.all(1) == valid.any(1)).all()
    found = valid.all(1)[np.asarray(data.pairs)].all(1)
    np.testing.assert_array_equal(data.weight, found)
    one, two = returns(data, true_reward_numpy(data.segments))
    np.testing.assert_array_equal(np.asarray(data.label)[found], (one > two)[found])
    return found.sum()


def test_where_nothing_can_be_cut_there_is_no_pair():
    labels = SyntheticLabels(40, 20, judging="outcomes", rationality=jnp.inf, **EXPERT)
    state = start(labels, fragile())
    found = require_weights(state.train) + require_weights(state.held_out)
    assert 5 < found < 55


def test_an_expert_with_a_network_in_float32():
    """The usual agent, small: everything is of that dtype, and all are judged."""
    with jax.enable_x64(False):
        network = MLP(width=4, depth=1, output_scale=0.0)
        expert = bj.agents.SoftPQN(network, processes=4, steps=8, epochs=1, minibatches=2)
        options = {"expert": expert, "improvements": 2, "shares": 2, "processes": 4}
        state = start(SyntheticLabels(5, 3, judging="decisions", rationality=10.0, **options), problem_of())
        leaves = jax.tree.leaves(state)
        assert {leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)} == {np.dtype(np.float32)}
        assert set(np.asarray(state.train.label).tolist()) <= {0.0, 1.0}
        np.testing.assert_array_equal(state.held_out.weight, 1)


def test_environments_that_reset_by_themselves_keep_their_whole_state():
    """Its clock is a part of the state, and not the one that agents put around others."""
    problem = problem_of(AutoReset(TimeLimit(Walk(), 5)))
    environment = problem.environment
    processes = bj.environments.start_processes(KEY, bj.agents.processes.simulator(problem, None), 3)
    policy = Steep(jnp.asarray(0.0), problem.regularizer(None))
    shown = bj.environments.collect(KEY, processes, policy, 10, with_states=True)[1]
    segments, found = segments_of(KEY, problem, shown, 5)
    assert found.all()
    assert jax.tree.structure(segments.state) == jax.tree.structure(environment.reset(KEY))
    np.testing.assert_array_equal(jax.vmap(jax.vmap(environment.observe))(segments.state), segments.observation)
    clock = np.asarray(segments.state[1])
    np.testing.assert_array_equal(np.diff(clock, axis=1), 1)


def test_segments_of_processes_that_are_started_again():
    """Their clock is taken off; none reaches over a new start, and as many are found as there are places."""
    problem = problem_of()
    environment = bj.agents.processes.simulator(problem, None)
    processes = bj.environments.start_processes(KEY, environment, 3)
    policy = Steep(jnp.asarray(0.0), problem.regularizer(None))
    shown = bj.environments.collect(KEY, processes, policy, 10, with_states=True)[1]
    segments, found = segments_of(KEY, problem, shown, 50)
    over = np.asarray(shown.truncated)
    places = sum(not over[b, h : h + LENGTH - 1].any() for b in range(3) for h in range(10 - LENGTH + 1))
    assert int(found.sum()) == places < 24
    np.testing.assert_array_equal(np.asarray(segments.valid).all(1), found)
    assert len(set(identities(jax.tree.map(lambda leaf: leaf[found], segments)))) == places


# Fresh ones.


def numbered(labels, number, problem, x):
    """What an agent did: each segment has a reward of its own, and its next observations say which it is."""
    count = labels.fresh_segments
    shape = (count, problem.length)
    rng = np.random.default_rng(number)
    name = jnp.broadcast_to((1000.0 * number + jnp.arange(count, dtype=float))[:, None], shape)
    segments = Segments(
        jnp.stack([name, name], -1),
        jnp.zeros(shape, jnp.int32),
        jnp.stack([name, name], -1),
        valid=jnp.ones(shape, bool),
        reward=jnp.asarray(rng.normal(size=shape)),
        state=shown_states(problem, shape),
    )
    return AgentSegments(problem, x, segments)


def shown_states(problem, shape):
    return jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, shape + leaf.shape), problem.environment.reset(jax.random.key(0))
    )


def names(data):
    """Of the segments of each pair that holds one, newest first."""
    here = np.asarray(data.weight) > 0
    pairs = np.asarray(data.segments.observation)[:, 0, 0][np.asarray(data.pairs)]
    return pairs[here].astype(int).tolist()


@functools.cache
def asked(iterations, **options):
    """The states of FreshLabels, an oracle's, after each iteration from the start on."""
    labels, problem = FreshLabels(rationality=jnp.inf, first=4, capacity=9, **options), problem_of()
    x = problem.start(jax.random.key(1))
    states = [start(labels, problem)]
    for number in range(iterations):
        seen = numbered(labels, number + 1, problem, x)
        states.append(update(labels, jax.random.key(number), states[-1], number, seen))
    return labels, states


def test_first_pairs_are_of_the_agent_before_it_learns():
    labels, problem = FreshLabels(3, first=12, capacity=20, rationality=jnp.inf), problem_of()
    state = start(labels, problem)
    data = labels.train(state)
    assert labels.held_out(state) is None
    assert (int(state.labels), data.count, data.sources) == (12, 20, ("fresh",))
    np.testing.assert_array_equal(data.weight, np.arange(20) < 12)
    np.testing.assert_array_equal(data.iteration, 0)
    # They were made by the environment: its rewards, its states, and no segment twice.
    here = np.concatenate([np.arange(12), 20 + np.arange(12)])
    first = jax.tree.map(lambda leaf: leaf[here], data.segments)
    np.testing.assert_allclose(first.reward, true_reward_numpy(first), rtol=1e-14)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(problem.environment.observe))(first.state), first.observation)
    assert len(set(identities(first))) == 24
    one, two = returns(data, true_reward_numpy(data.segments))
    np.testing.assert_array_equal(np.asarray(data.label)[:12], (one > two)[:12])
    # Actions are those of the policy: one that always goes on outward.
    certain = jax.tree.map(lambda leaf: leaf[here], labels.train(start(labels, problem, slope=1e6)).segments)
    right = np.asarray(certain.observation).sum(-1) > 0
    np.testing.assert_array_equal(certain.action, right)
    assert (np.asarray(first.action) != (np.asarray(first.observation).sum(-1) > 0)).any()


def test_labels_are_asked_for_every_so_many_iterations():
    labels, states = asked(7, count=2, every=3)
    assert labels.fresh_segments == 4
    assert [int(state.labels) for state in states] == [4, 4, 4, 6, 6, 6, 8, 8]
    for before, after, asks in zip(states, states[1:], [0, 0, 1, 0, 0, 1, 0], strict=False):
        if not asks:
            assert_same(before, after)
    data = labels.train(states[-1])
    # The newest first, and within one time the last first: those of the sixth iteration, then of the third.
    assert names(data)[:4] == [[6001, 6003], [6000, 6002], [3001, 3003], [3000, 3002]]
    assert np.asarray(data.iteration)[:8].tolist() == [5, 5, 2, 2, 0, 0, 0, 0]
    # An oracle's labels of the hidden rewards.
    one, two = returns(data, np.asarray(data.segments.reward))
    here = np.asarray(data.weight) > 0
    assert here.sum() == 8
    np.testing.assert_array_equal(np.asarray(data.label)[here], (one > two)[here])


def test_the_oldest_pairs_are_forgotten():
    labels, states = asked(5, count=3, every=1)
    assert [len(names(labels.train(state))) for state in states] == [4, 7, 9, 9, 9, 9]
    assert [int(state.labels) for state in states] == [4, 7, 10, 13, 16, 19]
    data = labels.train(states[-1])
    assert np.asarray(data.iteration).tolist() == [4, 4, 4, 3, 3, 3, 2, 2, 2]
    assert names(data)[-1] == [3000, 3003]


def test_nothing_is_asked_beyond_the_budget():
    _, states = asked(4, count=3, every=1, budget=10)
    assert [int(state.labels) for state in states] == [4, 7, 10, 10, 10]
    assert_same(states[2], states[-1])


# Six candidates for each of two pairs, and three linear members with slopes of their own.
UNSURE = {"count": 2, "every": 1, "first": 2, "capacity": 4, "candidates": 6}
SLOPES = np.array([[1.0, -2.0], [0.5, 1.0], [-1.0, 0.3]])


def linear(problem, slope, rationality):
    """x of an ensemble of linear rewards [members, 2]."""
    leaves, structure = jax.tree.flatten(problem.start(KEY)["reward"])
    made = [jnp.asarray(slope).reshape(leaf.shape) if leaf.size == slope.size else 0 * leaf for leaf in leaves]
    parameters, probe = jax.tree.unflatten(structure, made), jnp.asarray([0.7, -1.3])
    members = problem.model.members_of(parameters, probe, jnp.asarray(0), probe)
    np.testing.assert_allclose(members, slope @ np.array([0.7, -1.3]), rtol=1e-12)
    return {"reward": parameters, "log_rationality": jnp.log(jnp.asarray(rationality))}


def test_those_are_asked_about_on_which_an_ensemble_disagrees():
    """The spread of the chances, at the rationality of x, in numpy; at rationality 1 the order is another one."""
    labels, problem = FreshLabels(**UNSURE), problem_of(members=3)
    assert labels.fresh_segments == 24
    x = linear(problem, SLOPES, 0.05)
    rng = np.random.default_rng(0)
    after = rng.normal(size=(24, LENGTH, 2)) * rng.uniform(0.2, 8, (24, 1, 1))
    seen, state = numbered(labels, 1, problem, x), start(labels, problem, x=x)

    def chosen(valid):
        replaced = jnp.asarray(after), jnp.asarray(valid)
        made = eqx.tree_at(lambda seen: (seen.segments.next_observation, seen.segments.valid), seen, replaced)
        data = labels.train(update(labels, KEY, state, 0, made))
        newest = np.asarray(data.segments.observation)[:, 0, 0][np.asarray(data.pairs)[:2]]
        return sorted(newest.astype(int).tolist())

    def most(valid, rationality=0.05):
        total = np.where(valid, np.einsum("nhf,mf->mnh", after, SLOPES), 0).sum(-1)
        spread = expit(rationality * (total[:, :12] - total[:, 12:])).std(0)
        spread = np.where(valid.any(1)[:12] & valid.any(1)[12:], spread, -1)
        return sorted([1000 + int(k), 1012 + int(k)] for k in np.argsort(-spread)[:2])

    valid = np.ones((24, LENGTH), bool)
    assert chosen(valid) == most(valid)
    assert most(valid) != most(valid, 1.0)
    # A pair of which one was not found is none to ask about, however surely the members would tell them apart.
    lost = valid.copy()
    lost[[first - 1000 for first, _ in most(valid)]] = False
    assert chosen(lost) == most(lost)
    assert not set(map(tuple, most(lost))) & set(map(tuple, most(valid)))


def test_equal_candidates_are_drawn_by_the_key():
    """Members that agree on all: 400 keys choose two of twelve pairs each, every pair between 30 and 110 times, 67 on
    average. A right program fails less than once in 10,000.
    """
    labels, problem = FreshLabels(**UNSURE), problem_of(members=3)
    x = linear(problem, 0 * SLOPES, 1.0)
    state, seen = start(labels, problem, x=x), numbered(labels, 1, problem, x)

    def chosen(key):
        data = labels.train(update(labels, key, state, 0, seen))
        return data.segments.observation[:2, 0, 0]

    picked = np.asarray(jax.jit(jax.vmap(chosen))(jax.random.split(KEY, 400))).reshape(-1) - 1000
    counts = np.bincount(picked.astype(int), minlength=12)
    assert counts.sum() == 800
    assert counts.shape == (12,)
    assert counts.min() > 30
    assert counts.max() < 110


def test_fresh_pairs_that_were_not_found_do_not_count():
    labels, problem = FreshLabels(5, every=1, first=40, capacity=60, rationality=jnp.inf), fragile()
    state = start(labels, problem)
    data = labels.train(state)
    first = Preferences(data.segments, data.pairs[:40], data.label[:40], data.weight[:40])
    assert 3 < require_weights(first) < 38
    seen = numbered(labels, 1, problem, problem.start(KEY))
    valid = seen.segments.valid.at[jnp.array([1, 7])].set(False)
    state = update(labels, KEY, state, 0, eqx.tree_at(lambda seen: seen.segments.valid, seen, valid))
    # Pairs are of segments p and p + 5, the last one first.
    assert np.asarray(labels.train(state).weight)[:5].tolist() == [1, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SyntheticLabels(0), "count: .*at least 1, got 0"),
        (lambda: SyntheticLabels(4, 0), "held_out: .*at least 1, got 0"),
        (lambda: SyntheticLabels(judging="both"), "judging: expected decisions or outcomes, got 'both'"),
        (lambda: SyntheticLabels(improvements=0), "improvements: .*at least 1"),
        (lambda: SyntheticLabels(shares=0), "shares: .*at least 1"),
        (lambda: SyntheticLabels(processes=-1), "processes: .*at least 1"),
        (lambda: SyntheticLabels(least_random=1.5), "least_random must be from 0 to 1"),
        (lambda: SyntheticLabels(rationality=-1.0), "rationality must be at least 0"),
        (lambda: SyntheticLabels(mistake=1.5), "mistake must be at most 1"),
        (lambda: FreshLabels(0), "count: .*at least 1"),
        (lambda: FreshLabels(every=0), "every: .*at least 1"),
        (lambda: FreshLabels(first=0), "first: .*at least 1"),
        (lambda: FreshLabels(candidates=0), "candidates: .*at least 1"),
        (lambda: FreshLabels(budget=0), "budget: .*at least 1"),
        (lambda: FreshLabels(first=20, capacity=19), "capacity: 19 has no room for 20 pairs at a time; enlarge it"),
        (lambda: FreshLabels(11, first=1, capacity=9), "capacity: 9 has no room for 11 pairs"),
        (lambda: FreshLabels(discount=1.1), "discount must be at most 1"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(bj.InputError, match=message):
        make()


def test_labels_of_a_file(tmp_path):
    """Pairs that people labelled, skipped ones left out; some are held out; a file without labels is refused."""
    path = str(tmp_path / "labels.jsonl")
    file = bj.preferences.PreferenceFile.create(
        path, jnp.zeros(2), bj.environments.Discrete(3), 4, next_observation=False, reward=False
    )
    steps = jnp.zeros((12, 4, 2))
    segments = bj.preferences.Segments(steps, jnp.zeros((12, 4), jnp.int32), valid=jnp.ones((12, 4), bool))
    ids = np.asarray(file.append_segments(segments))
    pairs = file.append_pairs(ids.reshape(6, 2), source="uniform", iteration=0)
    with pytest.raises(bj.InputError, match=r"0 pairs of .* have labels"):
        bj.algorithms.FileLabels(path)
    for place, pair in enumerate(pairs):
        file.append_label(pair, None if place == 5 else place % 2, by="Ada")
    labels = bj.algorithms.FileLabels(path, held_out=0.4, wait_for=5, wait_minutes=0.01)
    assert (labels.pairs.count, labels.others.count) == (3, 2)
    assert labels.pairs.segments.count == 10  # those of the skipped pair are left out
    assert sorted(map(float, [*labels.pairs.label, *labels.others.label])) == [0, 0, 0, 1, 1]
    again = bj.algorithms.FileLabels(path, held_out=0.4)
    np.testing.assert_array_equal(labels.pairs.pairs, again.pairs.pairs)
    with pytest.raises(bj.InputError, match="wait_for"):
        bj.algorithms.FileLabels(path, wait_for=-1)
