"""Attenuating actor-critic: its estimate against derivatives and numpy, its agent, its limit, and descent.

What every sampled algorithm must allow is in test_sampled_algorithms.py and test_upper_level.py, with this one among
them.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sampled_helpers import KEY, EndingGarnet, PairGarnet, garnet, quick_jit, require_mean

import bilevel_jax as bj
from bilevel_jax.agents import ActorCritic, Polynomial, policy_gap
from bilevel_jax.algorithms import Attenuation, UpperLevel, attenuating_actor_critic
from bilevel_jax.environments import policy_table
from bilevel_jax.estimators import group_costs, sample_groups

SGD = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)
STILL = jax.tree_util.Partial(lambda iteration: jnp.ones_like(iteration, float))
AGENT = ActorCritic(processes=8, steps=10)
SMALL = {"agent": AGENT, "batch": 8}


def at_duals(algorithm, x, duals, memory=None):
    """A state at x whose two policies are softmax(duals / temperature), and perhaps what the upper critic knows."""
    state = algorithm.init(KEY, x)
    state = eqx.tree_at(lambda s: s.memory.agent.actor, state, jnp.asarray(duals))
    return state if memory is None else eqx.tree_at(lambda s: s.memory.estimator, state, jnp.asarray(memory))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EndingGarnet, PairGarnet])
def test_gradient_has_the_mean_that_it_claims(kind):
    """E[gradient] = df/dx + (d/dx J(own) - d/dx J(pi)) / w at any two policies, by autodiff of exact values."""
    problem, softness = garnet(kind), 0.4
    x = 0.5 * jax.random.normal(KEY, (5, 2))
    duals = 0.5 * jax.random.normal(jax.random.key(1), (2, 5, 2))
    upper = UpperLevel(SGD, temperature=STILL)
    algorithm = attenuating_actor_critic(problem, upper, softness=softness, **SMALL)
    regularizer = problem.regularizer(x)
    own, other = (bj.solve(problem.mdp(x), regularizer), regularizer.policy(duals[1]))

    def claimed(x):
        mdp = problem.mdp(x)
        gap = (bj.policy_value(mdp, regularizer.policy(duals[0])) - bj.policy_value(mdp, other)) @ mdp.initial
        # Of the solution, these objectives look at the policy alone.
        return problem.objective(x, eqx.tree_at(lambda s: s.policy, own, other)) + gap / softness

    def many(keys):
        state = at_duals(algorithm, x, duals)
        return jax.lax.map(
            lambda key: algorithm.estimate_from_samples(key, state).gradient.reshape(-1), keys, batch_size=100
        )

    drawn = quick_jit(many)(jax.random.split(KEY, 2000))
    require_mean(drawn, jax.grad(claimed)(x), 0.02, kind.__name__)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EndingGarnet, PairGarnet])
def test_upper_critic_by_hand(kind):
    """Pair by pair: what was still to pay, less the other groups' mean, over discount^h; visits that ended left out."""
    problem, rate = garnet(kind), 0.3
    x, start = 0.5 * jax.random.normal(KEY, (5, 2)), np.random.default_rng(0).normal(size=(5, 2))
    algorithm = attenuating_actor_critic(problem, SGD, cost_step_size=rate, agent=AGENT, batch=4)

    def make():
        state = at_duals(algorithm, x, jnp.zeros((2, 5, 2)), start)
        for_groups, for_loss = jax.random.split(KEY)
        groups = sample_groups(for_groups, problem, algorithm._policy(state, 1), 4)
        return algorithm.estimate_from_samples(KEY, state), groups, group_costs(for_loss, problem, x, groups)

    made, groups, costs = jax.tree.map(np.asarray, quick_jit(make)())
    gamma, total, weight = float(problem.discount), np.zeros((5, 2)), np.zeros((5, 2))
    due = np.cumsum((costs.each * costs.factors[None])[:, ::-1], 1)[:, ::-1]
    for n, i, h in np.argwhere(groups.valid):
        at = groups.observation[n, i, h], groups.action[n, i, h]
        others = np.mean([due[m, h] for m in range(4) if m != n])
        total[at] += problem.trajectories * (due[n, h] - others)
        weight[at] += gamma**h
    expected = start.copy()
    for at in np.argwhere(weight):
        at = tuple(at)
        expected[at] += (1 - (1 - rate) ** weight[at]) * (total[at] / weight[at] - start[at])
    np.testing.assert_allclose(made.memory, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(made.value, np.mean(np.sum(costs.each * costs.factors[None], 1)), rtol=1e-10)


@pytest.mark.slow
def test_upper_critic_is_the_objectives_derivative():
    """At rest, averaged: U = df/dpi / (discounted visits) up to one number per state, by autodiff."""
    problem, x = garnet(PairGarnet), 0.5 * jax.random.normal(KEY, (5, 2))
    algorithm = attenuating_actor_critic(problem, SGD, cost_step_size=1.0, agent=AGENT, batch=50_000)
    duals = jnp.zeros((2, 5, 2))
    made = quick_jit(lambda: algorithm.estimate_from_samples(KEY, at_duals(algorithm, x, duals)))().memory
    solution = bj.solve(problem.mdp(x), problem.regularizer(x))
    policy = jnp.full((5, 2), 0.5)
    slope = jax.grad(lambda p: problem.objective(x, eqx.tree_at(lambda s: s.policy, solution, p)))(policy)
    visits = jnp.sum(bj.occupancy(problem.mdp(x), policy), 1, keepdims=True)
    expected, got = (table - jnp.mean(table, 1, keepdims=True) for table in (slope / visits, made))
    assert float(jnp.linalg.norm(got - expected)) < 0.05 * float(jnp.linalg.norm(expected))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EndingGarnet, None])
def test_agent_finds_the_optimal_policy_and_the_penalized_one(kind):
    """With costs c[S, A] the actor's fixed point is that of the reward r - c in its policy, but not in its values."""
    problem = garnet() if kind is None else garnet(kind)
    x, costs = jnp.zeros((5, 2)), 0.3 * jax.random.normal(KEY, (5, 2))
    agent = ActorCritic(processes=32, steps=16)
    mdp, regularizer = problem.mdp(x), problem.regularizer(x)

    def penalized(dual, _):
        policy = regularizer.policy(dual)
        value = bj.regularized_policy_value(mdp, regularizer, policy)
        return mdp.reward + mdp.discount * mdp.transition.expect(value) - costs, None

    dual, _ = jax.lax.scan(penalized, jnp.zeros((5, 2)), length=200)
    wanted = jnp.stack([bj.solve(mdp, regularizer).policy, regularizer.policy(dual)])
    charged = jnp.stack([jnp.zeros_like(costs), costs])

    def learn(charged):
        def improve(state, key):
            return agent.improve_against(key, state, problem, x, charged), None

        state, _ = jax.lax.scan(improve, agent.init(KEY, problem, x), jax.random.split(KEY, 1000))
        return agent.policy(state, problem, x).probabilities

    learned = quick_jit(jax.vmap(learn))(charged)
    for got, want in zip(learned, wanted, strict=True):
        assert float(policy_gap(bj.core.functions.Table(got), want)) < 1e-4
    assert float(jnp.linalg.norm(wanted[0] - wanted[1])) > 0.1


def value_at(problem, x):
    return float(bj.hypergradient(problem, x, with_error=False).value)


@functools.partial(jax.jit, static_argnums=3)
def train(algorithm, key, x, steps, rate=0.0):
    state = algorithm.init(key, x)
    state = eqx.tree_at(lambda s: s.optimizer_state.hyperparams["learning_rate"], state, jnp.asarray(rate, float))
    return jax.lax.scan(lambda s, k: algorithm.step(k, s), state, jax.random.split(key, steps))


@pytest.mark.slow
def test_at_rest_it_tends_to_the_hypergradient():
    """x stands still while penalty and temperature decay: means of late gradients, against the exact one."""
    problem, x = garnet(), 0.5 * jax.random.normal(KEY, (5, 2))
    exact = bj.hypergradient(problem, x, with_error=False).gradient
    agent = ActorCritic(processes=32, steps=16)
    errors = []
    for softness in (2.0, Polynomial(2.0, 10.0, 0.7)):
        algorithm = attenuating_actor_critic(problem, SGD, agent=agent, batch=64, softness=softness)
        _, info = train(algorithm, KEY, x, 1500)
        late = jnp.mean(info.gradient[500:], 0)
        errors.append(float(jnp.linalg.norm(late - exact) / jnp.linalg.norm(exact)))
    assert errors[1] < 0.15
    assert errors[0] > 3 * errors[1]


@pytest.mark.slow
def test_many_seeds_and_rates_in_one_program_all_descend():
    problem = garnet()
    algorithm = attenuating_actor_critic(problem, SGD, **SMALL)
    rates, keys = jnp.array([0.0, 0.1, 0.6]), jax.random.split(KEY, 2)
    over_rates = jax.vmap(train, (None, None, None, None, 0))
    x = jnp.zeros((5, 2))
    state, info = jax.vmap(over_rates, (None, 0, None, None, None))(algorithm, keys, x, 150, rates)
    np.testing.assert_array_equal(state.x[:, 0], 0)
    start = value_at(problem, x)
    for i in range(2):
        slow, fast = (start - value_at(problem, x) for x in state.x[i, 1:])
        assert fast > slow > 0.5
        assert fast > 0.8  # exact gradient descent gains 0.95
    steps = 2 * (AGENT.processes * AGENT.steps + 8 * problem.horizon)
    np.testing.assert_array_equal(info.transitions, steps)
    alone, _ = train(algorithm, keys[1], x, 150, rates[2])
    np.testing.assert_allclose(state.x[1, 2], alone.x, rtol=1e-6)


def test_attenuates_to_the_problems_temperature():
    factor = Attenuation(start=3.0, scale=5.0, power=1.0)
    got = [float(factor(jnp.asarray(k))) for k in (0, 5, 10, 1000)]
    np.testing.assert_allclose(got, [3, 1.5, 1, 1], rtol=1e-12)
    assert float(Attenuation(end=0.0)(jnp.asarray(10**9))) < 1e-3
    algorithm = attenuating_actor_critic(garnet(), SGD)
    assert isinstance(algorithm.upper.temperature, Attenuation)
    kept = attenuating_actor_critic(garnet(), UpperLevel(SGD, temperature=STILL))
    assert kept.upper.temperature is STILL


@pytest.mark.slow
def test_both_policies_are_one_where_nothing_is_charged():
    """No costs: same random numbers, same policies, and the penalty's gradient is exactly 0."""
    problem = garnet(temperature=0.8)
    algorithm = attenuating_actor_critic(problem, SGD, softness=1e-3, **SMALL)
    x = 0.1 * jax.random.normal(KEY, (5, 2))
    state = algorithm.init(KEY, x)
    made = quick_jit(lambda: algorithm.estimate_from_samples(KEY, state))()
    own, other = (policy_table(algorithm._policy(state, i), 5) for i in (0, 1))
    np.testing.assert_array_equal(own, other)
    assert 0 < float(jnp.linalg.norm(made.gradient)) < 1  # of the bonus alone; anything else would count 1000 times


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: attenuating_actor_critic(garnet(), SGD, batch=0), "batch: .*at least 1"),
        (lambda: attenuating_actor_critic(garnet(), SGD, softness=0.0), "softness must be above 0"),
        (lambda: attenuating_actor_critic(garnet(), SGD, cost_step_size=-1.0), "cost_step_size must be above 0"),
        (lambda: attenuating_actor_critic(garnet(), SGD, agent=bj.agents.ExactAgent()), "agent: expected ActorCritic"),
        (lambda: ActorCritic(processes=0), "processes: .*at least 1"),
        (lambda: ActorCritic(actor_step_size=0.0), "actor_step_size must be above 0"),
        (lambda: ActorCritic(epsilon=2.0), "epsilon must be from 0 to 1"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(bj.InputError, match=message):
        make()
