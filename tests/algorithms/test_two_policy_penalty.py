"""The penalty method with two policies: its estimate and its limit against derivatives, its agents, what it refuses."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sampled_helpers import KEY, EndingGarnet, PairGarnet, garnet, quick_jit, require_mean

import bilevel_jax as bj
from bilevel_jax.algorithms import requires, two_policy_penalty
from bilevel_jax.environments import policy_table
from bilevel_jax.estimators import group_costs
from bilevel_jax.problems.garnet import Garnet

SGD = optax.sgd(0.1)
TABLE = bj.networks.OneHot(5)
AGENT = bj.agents.SoftPQN(TABLE, processes=8, steps=8)
X = 0.5 * jax.random.normal(KEY, (5, 2))


class Stepwise(Garnet):
    """Costs of single steps, also in shorter trajectories, with an end."""

    def mdp(self, x):
        return super().mdp(x).replace(discount=jnp.full(self.base.shape, self.discount).at[0, 1].set(0))

    def objective(self, x, solution):
        mdp = bj.MDP(self.transition, self._costs(x), jnp.full(self.base.shape, self.discount).at[0, 1].set(0))
        return bj.policy_value(mdp, solution.policy) @ mdp.initial

    def loss(self, key, x, trajectories):
        return jnp.where(trajectories.valid[0], super().loss(key, x, trajectories), 0)


def penalized_solution(problem, x, softness):
    """The minimizer of f + gap / softness."""
    mdp = problem.mdp(x)
    return bj.check(bj.solve(mdp.replace(reward=mdp.reward - softness * problem._costs(x)), problem.regularizer(x)))


def claimed(problem, x, policies, softness):
    """df/dx + (d/dx J(own) - d/dx J(pi)) / w, by autodiff of exact values."""
    solution = bj.solve(problem.mdp(x), problem.regularizer(x))

    def penalized(x):
        mdp = problem.mdp(x)
        gap = (bj.policy_value(mdp, policies[0]) - bj.policy_value(mdp, policies[1])) @ mdp.initial
        return problem.objective(x, eqx.tree_at(lambda s: s.policy, solution, policies[1])) + gap / softness

    return jax.grad(penalized)(x)


def at_policies(algorithm, x, policies):
    """A state at x whose two agents have these policies: a linear network on one-hot states is a table."""
    state = algorithm.init(KEY, x)
    temperature = algorithm.problem.regularizer(x).temperature
    tables = jnp.stack([temperature * jnp.log(policy).T for policy in policies])
    params = jax.tree.map(
        lambda leaf: tables if leaf.shape == tables.shape else jnp.zeros_like(leaf), state.memory.agent.params
    )
    return eqx.tree_at(lambda s: s.memory.agent.params, state, params)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Garnet, Stepwise])
def test_gradient_has_the_mean_that_it_claims(kind):
    problem, softness = garnet(kind), 0.4
    duals = 0.5 * jax.random.normal(jax.random.key(1), (2, 5, 2))
    policies = [problem.regularizer(X).policy(dual) for dual in duals]
    algorithm = two_policy_penalty(problem, SGD, agent=AGENT, batch=8, softness=softness)
    state = at_policies(algorithm, X, policies)
    for which, policy in enumerate(policies):
        np.testing.assert_allclose(policy_table(algorithm._policy(state, which), 5), policy, rtol=1e-6)

    def many(keys):
        return jax.lax.map(
            lambda key: algorithm.estimate_from_samples(key, state).gradient.reshape(-1), keys, batch_size=100
        )

    drawn = quick_jit(many)(jax.random.split(KEY, 2000))
    require_mean(drawn, claimed(problem, X, policies, softness), 0.02, kind.__name__)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Garnet, Stepwise])
def test_the_limit_is_the_hypergradient(kind):
    """The error of the exact penalty gradient halves with the softness."""
    problem = garnet(kind)
    exact = bj.check(bj.hypergradient(problem, X))
    errors = []
    for softness in (0.04, 0.02, 0.01):
        policies = exact.solution.policy, penalized_solution(problem, X, softness).policy
        made = claimed(problem, X, policies, softness)
        errors.append(float(jnp.linalg.norm(made - exact.gradient) / jnp.linalg.norm(exact.gradient)))
    assert errors[0] < 0.05
    np.testing.assert_allclose(np.array(errors[:-1]) / errors[1:], 2, rtol=0.1)


@pytest.mark.slow
def test_the_second_agent_finds_the_penalized_policy():
    problem, softness = garnet(Stepwise), 1.0
    agent = bj.agents.SoftPQN(TABLE, processes=32, steps=16, learning_rate=0.02, updates=10)
    algorithm = two_policy_penalty(problem, optax.sgd(0.0), agent=agent, batch=8, softness=softness)
    state = algorithm.init(KEY, X)
    step = quick_jit(lambda key, state: algorithm.step(key, state))
    for k in range(60):
        state, info = step(jax.random.fold_in(KEY, k), state)
    own, other = (policy_table(algorithm._policy(state, which), 5) for which in (0, 1))
    exact = bj.solve(problem.mdp(X), problem.regularizer(X)).policy
    penalized = penalized_solution(problem, X, softness).policy
    assert float(jnp.max(jnp.abs(exact - penalized))) > 0.2
    np.testing.assert_allclose(own, exact, atol=0.05)
    np.testing.assert_allclose(other, penalized, atol=0.05)
    assert info.reports["reward_gap"].shape == ()


class Still(bj.environments.Environment):
    """One state, and actions from -1 to 1."""

    @property
    def action_space(self):
        return bj.environments.Box(-1.0, 1.0, (1,))

    def reset(self, key):
        return jnp.zeros(1)

    def observe(self, state):
        return state

    def step(self, key, state, action):
        nothing = jnp.asarray(False)
        return state, bj.environments.TimeStep(state, jnp.zeros(()), nothing, nothing)


def aim(x):
    return lambda state, action: -((action[0] - x) ** 2)


def off_target(key, x, trajectories):
    return (trajectories.action[0, :, 0] - 0.5) ** 2


@pytest.mark.slow
def test_continuous_actions():
    """An agent that is paid to come near x, where the upper level wants it near 0.5; f by quadrature over actions."""
    problem = bj.SampledBilevelProblem(
        Still(), aim, bj.ShannonEntropy(0.1), off_target, discount=0.5, loss_discount=0.5, horizon=12
    )
    small = bj.networks.MLP(width=16, depth=1)
    agent = bj.agents.PPO(small, processes=32, steps=12, learning_rate=5e-3)
    algorithm = two_policy_penalty(problem, optax.adam(0.03), agent=agent, batch=64, softness=0.5)
    state = algorithm.init(KEY, jnp.asarray(-0.5))
    step = quick_jit(lambda key, state: algorithm.step(key, state))
    for k in range(150):
        state, info = step(jax.random.fold_in(KEY, k), state)

    def exact(x):
        actions = np.linspace(-1, 1, 4001)
        weights = np.exp(-((actions - x) ** 2) / 0.1)
        return np.sum(weights * (actions - 0.5) ** 2) / np.sum(weights)

    assert np.isfinite(info.objective)
    assert exact(-0.5) > 0.8
    best = min(exact(x) for x in np.linspace(-1, 2, 301))
    assert exact(float(state.x)) < best + 0.02


class Remembering(Garnet):
    """A cost that counts the steps before."""

    def loss(self, key, x, trajectories):
        return jnp.cumsum(super().loss(key, x, trajectories))


class Random(Garnet):
    """A cost that is drawn."""

    def loss(self, key, x, trajectories):
        made = super().loss(key, x, trajectories)
        return made * (1 + jax.random.normal(key, made.shape))


class Offset(Garnet):
    """Memory beside a large constant."""

    def loss(self, key, x, trajectories):
        return 10 + 1e-3 * jnp.cumsum(super().loss(key, x, trajectories))


class Standardized(Garnet):
    """Not a number for one step."""

    def loss(self, key, x, trajectories):
        made = super().loss(key, x, trajectories)
        return (made - made.mean()) / made.std()


class Truth(Garnet):
    """A cost that is a truth."""

    def loss(self, key, x, trajectories):
        return trajectories.action[0] == 0


class OfStates(Garnet):
    """What agents do not record."""

    def loss(self, key, x, trajectories):
        return trajectories.state.astype(float)[0]


class Weighed(Garnet):
    """A loss that has its sizes from the problem."""

    def loss(self, key, x, trajectories):
        return super().loss(key, x, trajectories) @ jnp.eye(self.horizon)


def test_what_it_refuses():
    for kind in (Remembering, Random, Offset, Standardized):
        with pytest.raises(bj.InputError, match="two_policy_penalty needs costs"):
            two_policy_penalty(garnet(kind), SGD, agent=AGENT).init(KEY, X)
    with pytest.raises(bj.InputError, match="cannot be asked for one step alone"):
        bj.bilevel.penalized.costs_alone(garnet(Weighed), X, _some(garnet()))
    with pytest.raises(bj.InputError, match="agents record no `state`"):
        bj.bilevel.penalized.costs_alone(garnet(OfStates), X, _some(garnet()))
    assert "compares 2 trajectories" in requires("two_policy_penalty", garnet(PairGarnet))
    assert "discounted by 1, but an agent" in requires("two_policy_penalty", bj.problems.make("task"))
    for agent in (bj.agents.SoftQLearning(), bj.agents.ExactAgent()):
        with pytest.raises(bj.InputError, match=r"earns more|needs the model"):
            two_policy_penalty(garnet(EndingGarnet), SGD, agent=agent).init(KEY, X)


def _some(problem, horizon=4):
    policy = jnp.full((5, 2), 0.5)
    return bj.environments.rollout(KEY, problem.environment, policy, batch=2, horizon=horizon)


@pytest.mark.slow
def test_costs_that_are_known_too_late_end_the_run():
    algorithm = two_policy_penalty(garnet(Remembering), SGD, agent=AGENT, batch=8)

    @jax.jit
    def run(x):
        state = algorithm.init(KEY, x)
        return algorithm.step(KEY, state)[1]

    info = run(X)
    assert np.isnan(info.objective)
    assert info.reports["hyper-gradient estimate"].result == bj.Result.NOT_FINITE


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["softness", "loss_discount"])
def test_numbers_that_are_known_too_late_end_the_run(wrong):
    class Discounted(Garnet):
        other: jax.Array

        def __init__(self, options):
            super().__init__(options)
            self.other = self.discount

        @property
        def loss_discount(self):
            return self.other

    @jax.jit
    def run(number):
        problem = garnet(Discounted)
        if wrong == "loss_discount":
            problem = eqx.tree_at(lambda p: p.other, problem, number)
        softness = number if wrong == "softness" else 0.1
        algorithm = two_policy_penalty(problem, SGD, agent=AGENT, batch=8, softness=softness)
        return algorithm.step(KEY, algorithm.init(KEY, X))[1].objective

    assert np.isnan(run(jnp.asarray(-0.1 if wrong == "softness" else 0.9)))
    assert np.isfinite(run(jnp.asarray(0.1 if wrong == "softness" else 0.5)))


@pytest.mark.slow
def test_costs_may_be_truths():
    """The same as with numbers, discounted."""
    algorithm = two_policy_penalty(garnet(Truth), SGD, agent=AGENT, batch=8)
    costs = group_costs(KEY, garnet(Truth), X, jax.tree.map(lambda leaf: leaf[:, None], _some(garnet(horizon=20), 20)))
    assert costs.discount == 0.5
    _, info = algorithm.step(KEY, algorithm.init(KEY, X))
    assert 0 < info.objective < 2
