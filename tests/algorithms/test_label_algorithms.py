"""Algorithms on labels: their gradients against the exact ones, and what they leave alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from bilevel_jax.agents import Agent
from bilevel_jax.algorithms.base import State
from bilevel_jax.algorithms.labels.base import LabelMemory, fitted_losses
from bilevel_jax.algorithms.sampled.base import Learned
from bilevel_jax.core.errors import RequirementError
from bilevel_jax.environments import TabularPolicy

pf = bj.preferences
KEY = jax.random.key(0)
S, A, H, TEMPERATURE, DISCOUNT = 4, 3, 3, 0.4, 0.8
RNG = np.random.default_rng(0)
TRANSITION = jnp.asarray(RNG.dirichlet(np.full(S, 0.5), (S, A)))
HIDDEN = jnp.asarray(RNG.normal(size=(S, A)))
UNIFORM = jnp.full((S, A), 1 / A)


class Solved(Agent):
    """The exact answer on the table: what an agent would come to."""

    def init(self, key, problem, x):
        return jnp.zeros(())

    def improve(self, key, state, problem, x):
        return state

    def policy(self, state, problem, x):
        return TabularPolicy(answer(problem, x))

    def environment_steps(self, problem):
        return 0


def answer(problem, x):
    reward = jax.vmap(problem.reward(x).all)(jnp.arange(S))
    return bj.solve(bj.MDP(TRANSITION, reward, DISCOUNT), bj.ShannonEntropy(TEMPERATURE)).policy


def problem(inputs="state_action", environment=None, **options):
    environment = (
        bj.environments.TabularEnvironment(bj.MDP(TRANSITION, HIDDEN, DISCOUNT)) if environment is None else environment
    )
    model = bj.networks.RewardNetwork.of(environment, bj.networks.OneHot(S), inputs)
    given = {"length": H, "horizon": 12, "discount": DISCOUNT} | options
    return pf.PreferenceProblem(environment, model, regularizer=bj.ShannonEntropy(TEMPERATURE), **given)


def labelled_pairs(count, seed=0):
    """Pairs of segments of the uniform policy, with states, labelled by outcomes with noise."""
    keys = jax.random.split(jax.random.fold_in(KEY, seed), 3)
    trajectories = bj.environments.rollout(keys[0], problem().environment, UNIFORM, batch=2 * count, horizon=H)
    segments = pf.Segments.of(trajectories)
    number = jnp.arange(count)
    data = pf.Preferences(segments, jnp.stack([number, number + count], -1))
    return pf.labelled(keys[2], pf.ScriptedTeacher.boltzmann(1.0), data)


def some_x(of, seed=3):
    x = of.start(KEY)
    noise = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(seed), leaf.shape), x)
    return x | {"reward": noise["reward"], "log_rationality": jnp.asarray(0.3)}


def state_of(algorithm, x):
    own = algorithm.init_own(KEY, x)
    memory = Learned(jnp.zeros(()), LabelMemory(None, own))
    return State(x, memory, None, jnp.asarray(0)), own


def make(name, of, **options):
    given = {"agent": Solved(), "labels": bj.algorithms.GivenLabels(labelled_pairs(8)), "batch": 4} | options
    return getattr(bj.algorithms, name)(of, optax.adam(0.01), **given)


def z_scores(estimates, exact):
    """Of each entry of a gradient, over estimates [N, ...]."""
    flat = np.concatenate([np.reshape(leaf, (leaf.shape[0], -1)) for leaf in jax.tree.leaves(estimates)], 1)
    want = np.concatenate([np.reshape(leaf, -1) for leaf in jax.tree.leaves(exact)])
    error = flat.std(0, ddof=1) / len(flat) ** 0.5
    off = flat.mean(0) - want
    fixed = error < 1e-12
    assert np.abs(off[fixed]).max(initial=0) < 1e-8
    return off[~fixed] / error[~fixed]


@pytest.mark.parametrize("inputs", ["state", "state_action", "next_state"])
def test_the_gradient_of_decisions_is_that_through_the_solver(inputs):
    """Nested rollouts against automatic differentiation through `solve`: 300 estimates, |z| < 4.5 for 13 numbers at
    most, a false alarm in 10^4 runs. What rollouts of 40 steps cut off is 0.8^40 = 1e-4 of a reward.
    """
    of = problem(inputs)
    data, x = labelled_pairs(6), some_x(problem(inputs))
    response = bj.estimators.NestedRollouts(40, every_action=True)
    algorithm = make("sobirl_labels", of, response=response)
    if inputs == "next_state":  # the reward of a pair is the mean over where it leads

        def table(x):
            of_next = jax.vmap(lambda s: of.reward(x).of_step(s, 0, s))(jnp.arange(S))
            return jnp.broadcast_to((TRANSITION @ of_next), (S, A))
    else:

        def table(x):
            return jax.vmap(of.reward(x).all)(jnp.arange(S))

    def loss(x):
        policy = bj.solve(bj.MDP(TRANSITION, table(x), DISCOUNT), bj.ShannonEntropy(TEMPERATURE)).policy
        scores = pf.decision_scores(policy, data.segments)
        return pf.preference_loss(data, scores, jnp.exp(x["log_rationality"]))

    value, exact = jax.jit(jax.value_and_grad(loss))(x)
    if inputs == "next_state":
        algorithm = make("sobirl_labels", of, response=response, agent=SolvedOfNext(table))
    state, own = state_of(algorithm, x)
    made = jax.jit(jax.vmap(lambda key: algorithm.fit(key, state, own, data)))(jax.random.split(KEY, 300))
    np.testing.assert_allclose(made.loss, value, rtol=1e-9)
    scores = z_scores(made.gradient, exact)
    assert np.abs(scores).max() < 4.5
    # The gradient is many times its error, so that a part that is missing would show.
    flat = np.concatenate([np.reshape(leaf, (300, -1)) for leaf in jax.tree.leaves(made.gradient)], 1)
    strength = np.linalg.norm(flat.mean(0)) / np.linalg.norm(flat.std(0) / 300**0.5)
    assert strength > 8


class SolvedOfNext(Solved):
    table: object

    def policy(self, state, problem, x):
        solution = bj.solve(bj.MDP(TRANSITION, self.table(x), DISCOUNT), bj.ShannonEntropy(TEMPERATURE))
        return TabularPolicy(solution.policy)


SolvedOfNext.__init__ = lambda self, table: object.__setattr__(self, "table", jax.tree_util.Partial(table))


def test_one_step_of_a_reward_of_the_state_is_zero():
    of = problem("state")
    algorithm = make("sobirl_labels", of, response=bj.estimators.OneStep())
    state, own = state_of(algorithm, some_x(of))
    made = algorithm.fit(KEY, state, own, labelled_pairs(6))
    assert float(made.reports["implicit_norm"]) < 1e-12
    assert float(made.reports["direct_norm"]) > 1e-3  # in the rationality


@pytest.mark.slow
def test_the_gradient_of_outcomes_is_that_of_the_papers_problem():
    """On `tabular_rlhf`, whose objective enumerates all segments: 4,000 minibatches of 8 fresh pairs, |z| < 4.5 for 12
    numbers. Without the agent's answer the scores are far beyond.
    """
    of = bj.problems.make(
        "tabular_rlhf", states=4, starts=4, actions=3, length=2, ridge=0.0, noise=0.0, rationality=1.0, discount=0.8
    )
    flat = 0.7 * jax.random.normal(KEY, (12,))
    exact = bj.hypergradient(of, flat)
    environment = of.environment
    model = bj.networks.RewardNetwork.of(environment, bj.networks.OneHot(4), "state_action")
    ours = pf.PreferenceProblem(environment, model, regularizer=of.regularizer(flat), discount=0.8, length=2, horizon=2)
    like = ours.start(KEY)
    leaves, structure = jax.tree.flatten(like["reward"])
    (weights,) = [leaf for leaf in leaves if leaf.size == 12]
    reward = jax.tree.unflatten(
        structure, [flat.reshape(4, 3).T if leaf is weights else jnp.zeros_like(leaf) for leaf in leaves]
    )
    x = {"reward": reward, "log_rationality": jnp.zeros(())}
    table = jax.vmap(ours.reward(x).all)(jnp.arange(4))
    np.testing.assert_allclose(table, flat.reshape(4, 3))
    policy = exact.solution.policy

    class There(Solved):
        def policy(self, state, problem, x):
            return TabularPolicy(policy)

    for coefficient, within in ((1.0, True), (0.0, False)):
        algorithm = bj.algorithms.sobirl_labels(
            ours,
            optax.adam(0.1),
            agent=There(),
            labels=bj.algorithms.FreshLabels(count=8, first=8, capacity=8),
            response=bj.estimators.NestedRollouts(40, every_action=True),
            judging="outcomes",
            coefficient=coefficient,
            batch=8,
            warm_up=0,
        )
        state, own = state_of(algorithm, x)

        def one(key, algorithm=algorithm, state=state, own=own):
            keys = jax.random.split(key, 3)
            drawn = bj.environments.rollout(keys[0], environment, policy, batch=16, horizon=2)
            number = jnp.arange(8)
            data = pf.Preferences(pf.Segments.of(drawn), jnp.stack([number, number + 8], -1))
            data = pf.labelled(keys[1], pf.ScriptedTeacher.boltzmann(1.0), data)
            return algorithm.fit(keys[2], state, own, data).gradient["reward"]

        made = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(5), 4000))
        (entries,) = [leaf for leaf in jax.tree.leaves(made) if leaf[0].size == 12]
        flat_made = np.swapaxes(np.asarray(entries), 1, 2).reshape(4000, 12)
        error = flat_made.std(0, ddof=1) / 4000**0.5
        scores = (flat_made.mean(0) - np.asarray(exact.gradient)) / error
        assert (np.abs(scores).max() < 4.5) == within, scores


def test_the_gradient_through_a_virtual_step_is_that_of_differences():
    environment = bj.environments.TabularEnvironment(bj.MDP(TRANSITION, HIDDEN, DISCOUNT))
    of = problem("state", environment)
    network = bj.networks.OneHot(S, bj.networks.MLP(width=8))
    agent = bj.agents.SoftPQN(network, processes=4, steps=8)
    algorithm = make("virtual_step", of, agent=agent, step_size=0.5)
    x = some_x(of)
    data = labelled_pairs(6)
    lower = agent.improve(KEY, agent.init(KEY, of, x), of, x)
    state = State(x, Learned(lower, None), None, jnp.asarray(0))
    fit = jax.jit(lambda x: algorithm.fit(KEY, State(x, state.memory, None, state.iteration), None, data))
    made = fit(x)
    along = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(7), leaf.shape), x)

    def at(t):
        return float(fit(jax.tree.map(lambda leaf, d: leaf + t * d, x, along)).loss)

    difference = (at(1e-5) - at(-1e-5)) / 2e-5
    inner = sum(float(jnp.sum(g * d)) for g, d in zip(*map(jax.tree.leaves, (made.gradient, along)), strict=True))
    assert abs(difference) > 1e-4
    np.testing.assert_allclose(inner, difference, rtol=1e-5)
    norms = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(made.gradient["reward"])]
    assert max(norms) > 1e-5  # the step carries something of the reward


def table_agent(rate=0.02, **options):
    return bj.agents.SoftPQN(bj.networks.OneHot(S), learning_rate=rate, **options)


def as_table(agent, params):
    return jax.vmap(agent.network.apply, (None, 0))(params, jnp.arange(S))


def test_the_bellman_error_has_no_bias_where_transitions_are_drawn():
    """Its mean over 2,000 pairs of draws, and that of its gradients, against the sum over where the steps lead: |z| <
    4.5 for 25 numbers, a false alarm in 5,000 runs. The square of one draw is far off.
    """
    of, agent = problem("state_action"), table_agent()
    algorithm, x = make("pbrl_labels", of, agent=agent), some_x(of)
    params = jax.tree.map(lambda leaf: jax.random.normal(KEY, leaf.shape), agent.init(KEY, of, x).params)
    state, action = (jnp.repeat(jnp.arange(S), A), jnp.tile(jnp.arange(A), S))
    never = jnp.zeros((1, S * A), bool)

    def steps(key):
        keys = jax.random.split(key, S * A)
        leads = jax.vmap(lambda key, s, a: jax.random.choice(key, S, p=TRANSITION[s, a]))(keys, state, action)
        return bj.environments.Trajectory(
            state=None,
            observation=state[None],
            action=action[None],
            probability=jnp.ones((1, S * A)),
            reward=jnp.zeros((1, S * A)),
            next_observation=leads[None],
            terminated=never,
            truncated=never,
            valid=~never,
        )

    def drawn(key, x, params, twice=True):
        first, second = jax.random.split(key)
        return algorithm._bellman_error(x, params, steps(first), steps(second if twice else first))

    def exact(x, params):
        q = as_table(agent, params)
        reward = jax.vmap(of.reward(x).all)(state.reshape(S, A)[:, 0])
        value = bj.ShannonEntropy(TEMPERATURE).conjugate(q)
        return jnp.mean((q - reward - DISCOUNT * TRANSITION @ value) ** 2) / 2

    want = jax.value_and_grad(exact, (0, 1))(x, params)
    keys = jax.random.split(KEY, 2000)
    made = jax.jit(jax.vmap(lambda key: jax.value_and_grad(drawn, (1, 2))(key, x, params)))(keys)
    assert np.abs(z_scores(made, want)).max() < 4.5
    once = jax.jit(jax.vmap(lambda key: drawn(key, x, params, twice=False)))(keys)
    assert abs(z_scores({"loss": once}, {"loss": want[0]})[0]) > 10


def test_the_gradient_of_the_penalty_tends_to_that_through_the_solver():
    """x stays, Q descends to its minimum; a reward of the state alone, where one step sees nothing. The error is to
    fall with the weight, to below 10%.
    """
    successor = RNG.integers(S, size=(S, A))
    transition = jax.nn.one_hot(successor, S)
    environment = bj.environments.TabularEnvironment(bj.MDP(transition, HIDDEN, DISCOUNT))
    of = problem("state", environment)
    x, data = some_x(of), labelled_pairs(12)

    def loss(x):
        reward = jax.vmap(of.reward(x).all)(jnp.arange(S))
        reward = jnp.broadcast_to(reward, (S, A))
        policy = bj.solve(bj.MDP(transition, reward, DISCOUNT), bj.ShannonEntropy(TEMPERATURE)).policy
        return pf.preference_loss(data, pf.decision_scores(policy, data.segments), jnp.exp(x["log_rationality"]))

    exact = jax.jit(jax.grad(loss))(x)["reward"]
    agent = table_agent(bj.agents.LinearDecay(0.02, 1e-4, 3000), processes=16, steps=16, epsilon=0.3)

    @jax.jit
    def at(weight):
        algorithm = make("pbrl_labels", of, agent=agent, weight=weight, policy_updates=1, warm_up=0)
        state, own = state_of(algorithm, x)

        def one(own, key):
            made = algorithm.fit(key, state, own, data)
            return made.own, made.gradient["reward"]

        gradients = jax.lax.scan(one, own, jax.random.split(KEY, 3000))[1]
        return jax.tree.map(lambda leaf: leaf[-300:].mean(0), gradients)

    def off(weight):
        return float(optax.tree.norm(optax.tree.sub(at(weight), exact)) / optax.tree.norm(exact))

    errors = [off(weight) for weight in (1e2, 1e3, 1e4)]
    assert errors[2] < errors[1] < errors[0], errors
    assert errors[2] < 0.1, errors


@pytest.mark.parametrize("members", [1, 3])
def test_drlhf_fits_each_member_as_a_logistic_regression(members):
    """The gradient is that of the mean loss of each member on its own, and of the ridge."""
    of = problem()
    if members > 1:
        model = bj.networks.Ensemble(of.model, members)
        of = pf.PreferenceProblem(
            of.environment,
            model,
            regularizer=bj.ShannonEntropy(TEMPERATURE),
            discount=DISCOUNT,
            length=H,
            horizon=12,
        )
    x = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), of.start(KEY))
    data = labelled_pairs(10)
    algorithm = make("drlhf", of, ridge=0.1)
    state, own = state_of(algorithm, x)
    made = algorithm.fit(KEY, state, own, data)

    def one(parameters):
        reward = (of.model if members == 1 else of.model.model)(parameters)
        scores = pf.outcome_scores(reward, data.segments)
        return pf.preference_loss(data, scores) + 0.1 * jnp.mean(scores**2), pf.preference_loss(data, scores)

    each = [x["reward"]] if members == 1 else [jax.tree.map(lambda leaf, k=k: leaf[k], x["reward"]) for k in range(3)]
    gradients = [jax.grad(lambda p: one(p)[0])(parameters) for parameters in each]
    want = gradients[0] if members == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-10), made.gradient["reward"], want)
    np.testing.assert_allclose(made.loss, np.mean([float(one(parameters)[1]) for parameters in each]))


def test_the_policy_alone_learns_decisions():
    """Noise-free labels of decisions of a known policy: its best actions are nearly as good as the teacher's."""
    solution = bj.solve(bj.MDP(TRANSITION, HIDDEN, DISCOUNT), bj.ShannonEntropy(TEMPERATURE))
    target = solution.policy
    data = labelled_pairs(400)
    scores = pf.decision_scores(target, data.segments, TEMPERATURE)
    data = pf.labelled(KEY, pf.ScriptedTeacher.oracle(), data, scores)
    algorithm = bj.algorithms.contrastive(
        problem(), network=bj.networks.OneHot(S), labels=bj.algorithms.GivenLabels(data), learning_rate=0.02
    )
    state = algorithm.init(KEY, problem().start(KEY))
    before = jax.tree.leaves(state.x)
    keys = jax.random.split(KEY, 600)
    state, infos = jax.jit(lambda s: jax.lax.scan(lambda s, k: algorithm.step(k, s), s, keys))(state)
    learned = bj.environments.policy_table(algorithm.policy(state), S)
    taken = np.take_along_axis(np.asarray(solution.q), np.argmax(learned, 1)[:, None], 1)[:, 0]
    least, best = solution.q.min(1), solution.q.max(1)
    assert float(((taken - least) / (best - least)).min()) > 0.8
    assert float(infos.objective[-50:].mean()) < 0.7 * float(infos.objective[:5].mean())
    for old, new in zip(before, jax.tree.leaves(state.x), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("judging", ["decisions", "outcomes"])
def test_the_end_tells_what_the_labels_judge(judging):
    """Held-out pairs of either kind, under the reward and the answer that made them."""
    of = problem()
    leaves, structure = jax.tree.flatten(of.start(KEY)["reward"])
    reward = jax.tree.unflatten(
        structure, [HIDDEN.T if leaf.size == S * A else jnp.zeros_like(leaf) for leaf in leaves]
    )
    x = {"reward": reward, "log_rationality": jnp.zeros(())}
    data = labelled_pairs(500)
    policy = answer(of, x)
    scores = {
        "decisions": 5 * pf.decision_scores(policy, data.segments, TEMPERATURE),
        "outcomes": 5 * data.segments.reward,
    }
    data = pf.labelled(KEY, pf.ScriptedTeacher.boltzmann(1.0), data, scores[judging])
    algorithm = make("drlhf", of, labels=bj.algorithms.GivenLabels(data, data))
    told = jax.jit(lambda algorithm, state: algorithm.at_the_end(state))(algorithm, algorithm.init(KEY, x))
    verdict = pf.verdict_of(*(float(told[f"held_out_{name}"]) for name in ("outcomes", "decisions", "error")), 500)
    assert verdict.kind == judging
    assert float(told["held_out_pairs"]) == 500
    each = [fitted_losses(data, one) for one in (pf.decision_scores(policy, data.segments), data.segments.reward)]
    np.testing.assert_allclose(told["held_out_error"], np.std(np.subtract(*each), ddof=1) / 500**0.5, rtol=1e-6)
    lower = "held_out_" + judging
    assert float(told[lower]) == min(float(told["held_out_decisions"]), float(told["held_out_outcomes"]))
    np.testing.assert_allclose(
        told["held_out_decisions"], np.mean(fitted_losses(data, pf.decision_scores(policy, data.segments))), rtol=1e-6
    )
    alone = make("drlhf", of, labels=bj.algorithms.GivenLabels(data))
    assert np.isnan(alone.at_the_end(alone.init(KEY, x))["held_out_error"])


def test_refusals():
    with pytest.raises(RequirementError, match="reward model"):
        bj.algorithms.make_algorithm("drlhf", bj.problems.make("garnet"), optax.adam(0.1))
    with pytest.raises(bj.InputError, match="agent's own"):
        make("sobirl_labels", problem(), judging="outcomes", response=bj.estimators.OneStep())
    with pytest.raises(bj.InputError, match="judging"):
        make("sobirl_labels", problem(), judging="choices", response=bj.estimators.OneStep())
    with pytest.raises(bj.InputError, match="SoftPQN"):
        make("virtual_step", problem())
    with pytest.raises(bj.InputError, match="SoftPQN"):
        make("pbrl_labels", problem())
    with pytest.raises(bj.InputError, match="weight"):
        make("pbrl_labels", problem(), agent=table_agent(), weight=0.0)
    with pytest.raises(bj.InputError, match="bias"):
        bj.algorithms.contrastive(problem(), bias=1.5)
    with pytest.raises(bj.InputError, match="coefficient"):
        make("sobirl_labels", problem(), coefficient=-1.0, response=bj.estimators.OneStep())
