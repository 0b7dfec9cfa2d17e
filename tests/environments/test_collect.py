"""Processes that go on from call to call, and what is collected from them; what agents report."""

import functools
import re
from pathlib import Path
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ACTIONS, STATES

import bilevel_jax as bj
from bilevel_jax.agents import (
    ActorCritic,
    Agent,
    ExactAgent,
    Polynomial,
    SampledPolicyIteration,
    SoftQLearning,
    policy_gap,
)
from bilevel_jax.agents.processes import choose_all
from bilevel_jax.environments import (
    AutoReset,
    Processes,
    TabularEnvironment,
    TabularPolicy,
    TimeLimit,
    collect,
    start_processes,
    with_restarts,
)
from bilevel_jax.environments.sampling import two_numbers
from bilevel_jax.estimators import LearnedModel, NestedRollouts, OneStep

KEY = jax.random.key(5)
POLICY = np.random.default_rng(1).dirichlet(np.ones(ACTIONS), STATES)
ENDS = np.zeros((STATES, ACTIONS))
ENDS[1, 1] = ENDS[4, 0] = 1


def simulator(every=7):
    return with_restarts(TabularEnvironment(helpers.make_mdp(helpers.random_process(0), 0.9), ends=ENDS), every)


@functools.partial(jax.jit, static_argnames=("steps", "with_states"))
def collected(key, processes, policy, steps, with_states=False):
    return collect(key, processes, policy, steps, with_states=with_states)


@pytest.mark.slow
def test_against_steps_by_hand():
    """The states, actions and ends of a loop over `environment.step`, with the keys that the docstring names."""
    environment = simulator()
    processes = start_processes(KEY, environment, 6)
    np.testing.assert_array_equal(processes.states[1], np.arange(6) * 7 // 6)
    after, made = collected(KEY, processes, TabularPolicy(POLICY), 20, with_states=True)
    step = jax.jit(lambda key, state, action: environment.step(key, state, action))
    assert np.any(made.terminated)
    assert np.any(made.truncated)
    for b in (0, 5):
        key, state = jax.random.fold_in(KEY, b), jax.tree.map(lambda leaf, b=b: leaf[b], processes.states)
        for h in range(20):
            assert int(made.observation[b, h]) == int(state[0]) == int(made.state[0][b, h])
            number = two_numbers(key, 2 * h)[0]
            action = int(np.searchsorted(np.cumsum(POLICY[int(state[0])]).astype(np.float32), number, side="right"))
            assert int(made.action[b, h]) == action
            assert made.probability[b, h] == POLICY[int(state[0]), action]
            state, one = step(jax.random.fold_in(key, 2 * h + 1), state, jnp.int32(action))
            for name in ("reward", "terminated", "truncated"):
                np.testing.assert_array_equal(getattr(made, name)[b, h], getattr(one, name))
            assert int(made.next_observation[b, h]) == int(one.observation)
        np.testing.assert_array_equal([leaf[b] for leaf in after.states], state)
    assert np.all(made.valid)


@pytest.mark.slow
def test_ends_start_anew():
    """The step after an end is of a new process; before it, that which followed."""
    _, made = collected(KEY, start_processes(KEY, simulator(5), 50), TabularPolicy(POLICY), 40)
    ended = np.asarray(made.terminated | made.truncated)[:, :-1]
    goes_on = np.asarray(made.next_observation[:, :-1]) == np.asarray(made.observation[:, 1:])
    assert np.all(goes_on[~ended])
    assert not np.all(goes_on[ended])
    np.testing.assert_array_equal(made.terminated, ENDS[made.observation, made.action] == 1)
    ends = [np.flatnonzero(row) for row in np.asarray(made.truncated | made.terminated)]
    assert max(np.diff(row).max() for row in ends) == 5


@pytest.mark.slow
def test_calls_go_on_from_each_other():
    """Two calls are the processes' own continuation; a process does not see how many others there are."""
    processes = start_processes(KEY, simulator(), 6)
    after, first = collected(KEY, processes, TabularPolicy(POLICY), 9)
    _, second = collected(jax.random.key(1), after, TabularPolicy(POLICY), 9)
    went_on = np.asarray(first.next_observation[:, -1]) == np.asarray(second.observation[:, 0])
    assert np.all(went_on | np.asarray(first.terminated | first.truncated)[:, -1])
    np.testing.assert_array_equal(second.observation[:, 0], after.states[0])
    few = Processes(processes.environment, jax.tree.map(lambda leaf: leaf[:2], processes.states))
    fewer = collected(KEY, few, TabularPolicy(POLICY), 9)[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:2]), fewer, first)
    assert first.state is None


@pytest.mark.slow
def test_under_vmap():
    keys, processes = jax.random.split(KEY, 3), start_processes(KEY, simulator(), 4)
    _, together = jax.vmap(lambda k: collect(k, processes, TabularPolicy(POLICY), 5))(keys)
    for i in range(3):
        _, alone = collected(keys[i], processes, TabularPolicy(POLICY), 5)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a, b[i]), alone, together)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_types(dtype):
    mdp = helpers.make_mdp(helpers.random_process(0), 0.9)
    with jax.enable_x64(dtype == np.float64):
        mdp = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == np.float64 else leaf, mdp)
        processes = start_processes(KEY, with_restarts(TabularEnvironment(mdp), 7), 4)
        made = collect(KEY, processes, TabularPolicy(POLICY.astype(dtype)), 3)[1]
    assert made.reward.dtype == made.probability.dtype == dtype
    assert made.action.dtype == np.int32


def test_restarting():
    plain = TabularEnvironment(helpers.make_mdp(helpers.random_process(0), 0.9))
    assert isinstance(with_restarts(plain, 4).environment, TimeLimit)
    assert with_restarts(plain).environment is plain
    again = AutoReset(plain)
    assert with_restarts(again, 4) is again
    # Without a limit nothing is at another time.
    assert start_processes(KEY, again, 3).count == 3


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda p: start_processes(KEY, p.environment, 0), "count: "),
        (lambda p: start_processes(KEY, p.environment.environment, 3), "environment: processes that end"),
        (lambda p: collect(KEY, p, TabularPolicy(POLICY), 2.5), "steps: "),
        (lambda p: collect(KEY, p, TabularPolicy(POLICY[:, :2]), 2), "policy: expected probabilities of shape"),
        (lambda p: collect(KEY, p, None, 2), "policy: expected a Policy"),
        (lambda p: with_restarts(p.environment.environment.environment, 0), "steps"),
    ],
)
def test_bad_calls(call, match):
    with pytest.raises(bj.InputError, match=match):
        call(start_processes(KEY, simulator(), 4))


@pytest.mark.slow
def test_trajectories_without_states():
    """Estimators that need no states take collected trajectories; the one that does says so."""
    problem = bj.problems.make("garnet", states=4, actions=2, branching=2)
    x, policy = problem.start(KEY), TabularPolicy(jnp.full((4, 2), 0.5))
    processes = start_processes(KEY, with_restarts(problem.environment, 9), 3)
    for with_states in (False, True):
        _, made = collect(KEY, processes, policy, 6, with_states=with_states)
        if with_states:  # of the simulator itself, without the clock of its limit
            made = made._replace(state=made.state[0])
        credit = jnp.ones((3, 6))
        assert np.isfinite(OneStep().surrogate(KEY, None, problem, x, policy, made, credit))
        nested = functools.partial(NestedRollouts(2).surrogate, KEY, None, problem, x, policy, made, credit)
        if with_states:
            assert np.isfinite(nested())
        else:
            with pytest.raises(bj.InputError, match="trajectories: NestedRollouts starts from the simulator's states"):
                nested()


# What agents report


SMALL = {"processes": 4, "steps": 8}


@functools.cache
def improved(kind):
    problem = bj.problems.make("garnet", states=4, actions=2, branching=2, discount=0.8, horizon=9)
    x = problem.start(KEY)
    agent = kind if isinstance(kind, Agent) else kind(**SMALL)
    state = agent.init(KEY, problem, x)
    return agent, problem, x, state, jax.jit(lambda *arguments: agent.improve(*arguments))(KEY, state, problem, x)


@pytest.mark.slow
@pytest.mark.few(1)
@pytest.mark.parametrize("kind", [SoftQLearning, ActorCritic, SampledPolicyIteration])
def test_reports(kind):
    agent, _, x, before, after = improved(kind)
    first = agent.report(before)
    assert np.isinf(next(iter(first.values())))
    assert first["coverage"] == 0
    report = jax.jit(lambda state: agent.report(state))(after)
    assert set(report) == set(first)
    assert all(value.shape == () and value.dtype == x.dtype for value in report.values())
    visits = {SoftQLearning: lambda s: s.learned.visits, ActorCritic: lambda s: s.critic.visits}
    counts = visits.get(kind, lambda s: s.visits)(after)
    assert report["coverage"] == np.mean(np.asarray(counts) > 0)
    assert 0 < report["coverage"] <= 1


@pytest.mark.slow
def test_temporal_difference_errors_by_hand():
    """One step of one process: the error is that of its one correction."""
    problem = bj.problems.make("garnet", states=4, actions=2, branching=2, discount=0.8, horizon=9)
    x = problem.start(KEY)
    agent = SoftQLearning(processes=1, steps=1, step_size=0.25)
    before = agent.init(KEY, problem, x)
    after = agent.improve(KEY, before, problem, x)
    moved = np.asarray(after.learned.parameters - before.learned.parameters)
    assert np.count_nonzero(moved) == 1
    np.testing.assert_allclose(agent.report(after)["temporal_difference_error"], np.abs(moved).max() / 0.25, rtol=1e-9)
    critic = ActorCritic(processes=1, steps=1, critic_step_size=0.25, actor_step_size=Polynomial(0.5, 1.0, 1.0))
    before = critic.init(KEY, problem, x)
    after = critic.improve(KEY, before, problem, x)
    moved = np.asarray(after.critic.parameters - before.critic.parameters)
    report = critic.report(after)
    np.testing.assert_allclose(report["temporal_difference_error"], np.abs(moved).max() / 0.25, rtol=1e-9)
    np.testing.assert_allclose(report["actor_step_size"], 0.25)


@pytest.mark.slow
def test_the_change_of_a_sweep():
    """That of the last of three sweeps, against evaluations of two and of three from the same counts."""
    problem = bj.problems.make("garnet", states=4, actions=2, branching=2, discount=0.8, horizon=9)
    x = problem.start(KEY)
    ahead = []
    for sweeps in (2, 3):
        agent = SampledPolicyIteration(**SMALL, improvements=1, sweeps=sweeps)
        state = agent.improve(KEY, agent.init(KEY, problem, x), problem, x)
        ahead.append(np.asarray(state.ahead))
    np.testing.assert_allclose(agent.report(state)["sweep_change"], np.abs(ahead[1] - ahead[0]).max(), rtol=1e-12)
    assert agent.report(state)["sweep_change"] > 0


@pytest.mark.slow
def test_the_exact_agent_reports_its_bound():
    agent, problem, x, before, after = improved(ExactAgent())
    assert np.isinf(agent.report(before)["value_error_bound"])
    exact = bj.check(bj.solve(problem.mdp(x), problem.regularizer(x)))
    assert agent.report(after)["value_error_bound"] == exact.stats.error_bound < 1e-6
    coarse = improved(ExactAgent(bj.ValueIteration(max_iterations=2)))
    assert coarse[0].report(coarse[4])["value_error_bound"] > 0.01


@pytest.mark.slow
@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["sobirl", "zero_order", "attenuating_actor_critic"])
def test_algorithms_pass_on_what_agents_report(name):
    problem = bj.problems.make("garnet", states=4, actions=2, branching=2, discount=0.8, horizon=9)
    x = problem.start(KEY)
    kind = ActorCritic if name == "attenuating_actor_critic" else SoftQLearning
    options = {"response": LearnedModel()} if name == "sobirl" else {}
    algorithm = getattr(bj.algorithms, name)(problem, optax.sgd(0.1), agent=kind(**SMALL), batch=4, **options)
    state, info = algorithm.step(KEY, algorithm.init(KEY, x))
    report = info.reports["agent"]
    assert set(report) >= {"temporal_difference_error", "coverage"}
    assert 0 < report["temporal_difference_error"] < 100
    lower = state.memory.agent
    if name == "zero_order":
        lower = lower[0]
    if name == "attenuating_actor_critic":
        lower = jax.tree.map(lambda leaf: leaf[0], lower)
    np.testing.assert_allclose(report["temporal_difference_error"], lower.error)


@pytest.mark.slow
def test_the_agent_of_the_page_on_sampling():
    """Its code runs, learns, and reports through an algorithm."""
    page = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class OnPolicy" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    problem = bj.problems.make("garnet", states=4, actions=2, branching=2, discount=0.8, horizon=9)
    x, agent = problem.start(KEY), names["OnPolicy"]()
    optimal = bj.solve(problem.mdp(x), problem.regularizer(x)).policy

    @jax.jit
    def learned(state):
        return jax.lax.fori_loop(0, 60, lambda i, s: agent.improve(jax.random.fold_in(KEY, i), s, problem, x), state)

    start = agent.init(KEY, problem, x)
    gaps = [float(policy_gap(agent.policy(state, problem, x), optimal)) for state in (start, learned(start))]
    assert gaps[1] < 0.1 * gaps[0]
    algorithm = bj.algorithms.sobirl(problem, optax.sgd(0.1), agent=agent, response=LearnedModel(), batch=4)
    _, info = algorithm.step(KEY, algorithm.init(KEY, x))
    assert 0 < info.reports["agent"]["temporal_difference_error"] < 100


@pytest.mark.slow
def test_choosing_by_numbers():
    """What `Processes.act` does with a `Categorical`, which agents' golden numbers rest on."""
    processes = start_processes(KEY, simulator(), 5)
    keys = processes.keys(KEY)
    rows = jnp.asarray(POLICY)[:5]
    acted = processes.act(keys, jnp.uint32(3), jax.vmap(bj.environments.Categorical)(rows))
    np.testing.assert_array_equal(acted, choose_all(two_numbers(keys, 6)[0], rows))
