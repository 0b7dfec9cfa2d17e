"""The eligibility trace: its mean against the exact gradient and against numpy, its form, and the credits it takes.

Means are tested as in test_estimators.py: a right estimator fails with probability 5e-7 in each of the 11 tests of a
mean, and a bias is seen with probability 0.97 if it is 7 of the standard errors (2 to 5 percent of the gradient) that
each test requires.
"""

import functools
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import flat, random_like
from jax.flatten_util import ravel_pytree
from sampled_helpers import (
    HORIZON,
    KEY,
    EndingGarnet,
    PairGarnet,
    Setting,
    draws,
    garnet,
    hotelling,
    quick_jit,
    require_mean,
    setting,
    solved,
)

import bilevel_jax as bj
from bilevel_jax.core.functions import ActionFunction, Table
from bilevel_jax.environments import Discrete, Environment, TimeStep
from bilevel_jax.estimators import (
    Baseline,
    LearnedAdvantage,
    LeaveOneOut,
    NestedRollouts,
    OneStep,
    estimate,
    estimate_from,
    group_costs,
    sample_groups,
)
from bilevel_jax.estimators.baselines.critic_advantage import CriticAdvantage
from bilevel_jax.estimators.baselines.exact_advantage import ExactAdvantage
from bilevel_jax.estimators.responses.eligibility_trace import EligibilityTrace
from bilevel_jax.networks import MLP, OneHot, RewardNetwork
from bilevel_jax.problems.garnet import Garnet


class NextStateGarnet(Garnet):
    """The reward is a number x(s') of the state that a step leads to; costs do not depend on x."""

    @property
    def model(self):
        return RewardNetwork(OneHot(self.base.shape[0]), "next_state", Discrete(self.base.shape[1]))

    def mdp(self, x):
        if isinstance(x, jax.Array):  # the constructor asks for the dynamics
            return super().mdp(x)
        numbers = jax.vmap(lambda state: self.model.numbers(x, state, None)[0])(jnp.arange(self.base.shape[0]))
        return bj.MDP(self.transition, self.transition.expect(numbers), self.discount)

    def reward(self, x):
        return self.model(x)

    def _costs(self, x):
        return self.cost


class EndingNextStateGarnet(EndingGarnet, NextStateGarnet):
    """The same, where two pairs end the process; the reward of the last step is that of where it led."""


@functools.cache
def next_state_setting(kind=NextStateGarnet) -> Setting:
    problem = garnet(kind)
    x = problem.model.init(KEY, jnp.asarray(0))
    return solved(problem, jax.tree.map(jnp.asarray, random_like(3, x)))


def exact_credit(at: Setting) -> ExactAdvantage:
    return ExactAdvantage(at.problem._costs(at.x))


class Model:
    """A setting on a table in plain numpy: kernel of what goes on, policy, upper advantage, discounted visits."""

    def __init__(self, at: Setting):
        mdp = at.problem.mdp(at.x)
        states, actions = at.policy.values.shape
        kernel = np.zeros((states, actions, states))
        successor, probability = map(np.asarray, (mdp.transition.successor, mdp.transition.probability))
        for k, s, a in np.ndindex(successor.shape):
            kernel[s, a, successor[k, s, a]] += probability[k, s, a]
        self.gamma = float(np.max(mdp.discount))
        self.all = kernel
        self.kernel = kernel * np.broadcast_to(np.asarray(mdp.discount) > 0, (states, actions))[..., None]
        self.pi = np.asarray(at.policy.values)
        self.follow = np.einsum("sa,sat->st", self.pi, self.kernel)
        resolvent = np.linalg.inv(np.eye(states) - self.gamma * self.follow)
        costs = np.asarray(at.problem._costs(at.x))
        upper = costs + self.gamma * self.kernel @ (resolvent @ (self.pi * costs).sum(1))
        self.advantage = upper - (self.pi * upper).sum(1, keepdims=True)
        self.visits = resolvent.T @ np.asarray(mdp.initial)
        self.temperature = float(at.problem.temperature)

    def expected(self, dr: np.ndarray, factor: float) -> np.ndarray:
        """1/temperature sum_t E c_t (dr_t + sum_k>0 factor^k E_pi dr_(t+k)), for dr [S, A, n]."""
        dv = np.linalg.solve(np.eye(len(self.pi)) - factor * self.follow, np.einsum("sa,san->sn", self.pi, dr))
        weights = self.visits[:, None] * self.pi * self.advantage
        return np.einsum("sa,san->n", weights, dr + factor * self.kernel @ dv) / self.temperature


def traced_gradient(at: Setting, decay: float) -> np.ndarray:
    """The mean of the estimator on a `Garnet`, the direct part included."""
    model, x = Model(at), np.asarray(at.x)
    dr = np.eye(x.size).reshape(*x.shape, x.size)
    direct = model.visits[:, None] * model.pi * float(at.problem.price) * x
    return model.expected(dr, decay * model.gamma) + direct.reshape(-1)


# 1. Means.


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Garnet, EndingGarnet])
def test_the_derivation(kind):
    """With decay 1 the mean in the model is the exact hyper-gradient, and ExactAdvantage is the model's advantage."""
    at = setting(kind)
    np.testing.assert_allclose(traced_gradient(at, 1.0), at.gradient, rtol=1e-9, atol=1e-12)
    groups = quick_jit(lambda key: sample_groups(key, at.problem, at.policy, 16))(KEY)
    costs = group_costs(KEY, at.problem, at.x, groups)
    credit = exact_credit(at).credit(None, at.problem, at.policy, groups, costs)
    expected = Model(at).advantage[groups.observation, groups.action]
    valid = np.asarray(groups.valid)
    np.testing.assert_allclose(np.asarray(credit)[valid], expected[valid], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Garnet, EndingGarnet])
def test_unbiased_with_decay_one(kind):
    at = setting(kind)
    seen = draws(at, EligibilityTrace(1.0), batch=16, batches=1500, baseline=exact_credit(at))
    require_mean(seen.gradient, at.gradient, 0.03, kind.__name__)


@pytest.mark.slow
@pytest.mark.often(2)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("seed", [11, 12])
def test_unbiased_on_other_garnets(seed, centred):
    """At discount 0.8; not centred, too."""
    at = setting(seed=seed, states=8, actions=3, discount=0.8, horizon=60)
    response = EligibilityTrace(1.0, centred=centred)
    seen = draws(at, response, batch=32, batches=2000, baseline=exact_credit(at), fast=True)
    require_mean(seen.gradient, at.gradient, 0.02, f"seed {seed}")


@pytest.mark.slow
@pytest.mark.often(2)
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.8])
def test_the_bias_of_a_smaller_decay_is_the_predicted_one(decay):
    at = setting(discount=0.9, horizon=100)
    seen = draws(at, EligibilityTrace(decay), batch=32, batches=1500, baseline=exact_credit(at), fast=True)
    predicted = traced_gradient(at, decay)
    require_mean(seen.gradient, predicted, 0.02, f"decay {decay}")
    assert hotelling(seen.gradient, at.gradient).p < 1e-9, "a bias that cannot be seen"
    print(f"relative bias {np.linalg.norm(predicted - at.gradient) / np.linalg.norm(at.gradient):.2f}")


@pytest.mark.slow
def test_the_others_mean_lowers_the_variance():
    at = setting(discount=0.9, horizon=100)
    variances = [
        draws(
            at, EligibilityTrace(1.0, centred=centred), batch=32, batches=400, baseline=exact_credit(at), fast=True
        ).gradient.var(0)
        for centred in (False, True)
    ]
    assert variances[1].sum() < 0.8 * variances[0].sum()


class Paid(LeaveOneOut):
    """What was paid, said to be a function of the pair, which it is not."""

    of_pairs: ClassVar[bool] = True


@pytest.mark.slow
def test_a_monte_carlo_credit_is_wrong():
    at = setting(discount=0.9, horizon=100)
    seen = draws(at, EligibilityTrace(1.0), batch=32, batches=300, baseline=Paid(), fast=True)
    off = np.linalg.norm(seen.gradient.mean(0) - at.gradient) / np.linalg.norm(at.gradient)
    print(f"bias of a Monte-Carlo credit: {off:.1f} of the gradient")
    assert off > 1
    assert hotelling(seen.gradient, at.gradient).p < 1e-9


# 2. Rewards of the next state.


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [NextStateGarnet, pytest.param(EndingNextStateGarnet, marks=pytest.mark.slow)], ids=["goes on", "ends"]
)
def test_rewards_of_the_next_state(kind):
    at = next_state_setting(kind)
    for centred in (True, False):
        response = EligibilityTrace(1.0, centred=centred)
        seen = draws(at, response, batch=32, batches=1500, baseline=exact_credit(at))
        require_mean(seen.gradient, at.gradient, 0.05, f"trace, centred {centred}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [NextStateGarnet, EndingNextStateGarnet], ids=["goes on", "ends"])
def test_rewards_of_the_next_state_by_rollouts(kind):
    at = next_state_setting(kind)
    seen = draws(at, NestedRollouts(10), batch=32, batches=1000)
    require_mean(seen.gradient, at.gradient, 0.05, "rollouts")


@pytest.mark.slow
def test_one_step_refuses_rewards_of_the_next_state():
    at = next_state_setting()
    with pytest.raises(bj.InputError, match=r"function of the next state.*use NestedRollouts or EligibilityTrace"):
        jax.eval_shape(lambda: estimate(KEY, at.problem, at.x, at.policy, batch=2, response=OneStep()))


# 3. The form.


@pytest.mark.slow
def test_decay_zero_is_one_step():
    at = setting()
    credit = exact_credit(at)

    @quick_jit
    def run(response):
        return estimate(KEY, at.problem, at.x, at.policy, batch=8, response=response, baseline=credit).gradient

    one_step = run(OneStep())
    for centred in (True, False):
        np.testing.assert_array_equal(run(EligibilityTrace(0.0, centred=centred)), one_step)


class StepReward(ActionFunction):
    """x[s, a, s'], of which no sum over actions is known."""

    x: jax.Array

    def __call__(self, observation, action):
        raise bj.InputError("a reward of the step")

    def all(self, observation):
        raise bj.InputError("a reward of the step")

    def of_step(self, observation, action, next_observation):
        return self.x[observation, action, next_observation]


class Given(eqx.Module):
    """A problem with nothing but a reward and a discount."""

    reward: object
    discount: jax.Array


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("of_step", [True, False])
def test_the_form_in_numpy(of_step, centred):
    """Steps that end, in simulators that go on behind them and in those that do not; groups of five."""
    rng = np.random.default_rng(0)
    batch, horizon, states, actions, factor = 5, 7, 4, 3, 0.9 * 0.7
    observation, following = rng.integers(states, size=(2, batch, horizon), dtype=np.int32)
    action = rng.integers(actions, size=(batch, horizon), dtype=np.int32)
    ended, cut = rng.random((2, batch, horizon)) < 0.2
    valid = np.ones((batch, horizon), bool)
    valid[1, 4:] = valid[3, 2:] = False
    credit = np.where(valid, rng.normal(size=(batch, horizon)), 0)
    pi = rng.dirichlet(np.ones(actions), states)
    shape = (states, actions, states) if of_step else (states, actions)
    expected = np.zeros(shape)
    uncut = np.array([[sum(factor ** (t - k) * c[k] for k in range(t)) for t in range(horizon)] for c in credit])
    uncut += credit if of_step else 0
    for b, t in np.ndindex(batch, horizon):
        if not valid[b, t]:
            continue
        since = max([k + 1 for k in range(t) if ended[b, k] or cut[b, k]], default=0)
        trace = sum(factor ** (t - k) * credit[b, k] for k in range(since, t))
        others = (uncut[:, t].sum() - uncut[b, t]) / (batch - 1) if centred else 0
        s, a, n = observation[b, t], action[b, t], following[b, t]
        if of_step:
            expected[s, a, n] += trace + credit[b, t] - others
        else:
            expected[s, a] += credit[b, t]
            expected[s] += (trace - others - credit[b, t]) * pi[s]
    groups = jax.eval_shape(lambda: sample_groups(KEY, garnet(), Table(np.full((5, 2), 0.5)), 1))
    seen = groups._replace(
        state=None,
        observation=jnp.asarray(observation),
        action=jnp.asarray(action),
        next_observation=jnp.asarray(following),
        terminated=jnp.asarray(ended),
        truncated=jnp.asarray(cut),
        valid=jnp.asarray(valid),
    )
    response = EligibilityTrace(0.7, centred=centred)

    def run(x):
        problem = Given(StepReward if of_step else Table, jnp.asarray(0.9))
        return response.surrogate(KEY, None, problem, x, Table(pi), seen, jnp.asarray(credit))

    np.testing.assert_allclose(jax.grad(run)(jnp.zeros(shape)), expected, rtol=1e-12, atol=1e-14)


# 4. Reward networks.


@functools.cache
def network_setting():
    """A sampled problem whose reward is a network of one-hot states, and the same with its table as x."""
    problem = garnet(price=0.0, horizon=12)
    model = RewardNetwork(OneHot(5, MLP(width=8, depth=1)), "state_action", Discrete(2))
    cost = problem.cost

    def loss(key, x, trajectories):
        del key, x
        return cost[trajectories.observation[0], trajectories.action[0]]

    parts = {"discount": problem.discount, "loss_discount": problem.discount, "horizon": 12}
    regularizer = problem.regularizer(None)
    network = bj.SampledBilevelProblem(problem.environment, model, regularizer, loss, **parts)
    table = bj.SampledBilevelProblem(problem.environment, Table, regularizer, loss, **parts)
    x = model.init(KEY, jnp.asarray(0))
    policy = Table(np.random.default_rng(0).dirichlet(np.ones(2), 5))

    def tabulated(x):
        return jax.vmap(model(x).all)(jnp.arange(5))

    return network, table, x, tabulated, policy, ExactAdvantage(cost)


@pytest.mark.slow
@pytest.mark.parametrize(
    "response", [OneStep(), NestedRollouts(4), EligibilityTrace(0.9)], ids=lambda r: type(r).__name__
)
def test_a_reward_network_is_its_table_by_the_chain_rule(response):
    network, table, x, tabulated, policy, baseline = network_setting()

    @quick_jit
    def both(x):
        arguments = {"batch": 8, "response": response, "baseline": baseline}
        values, pull = jax.vjp(tabulated, x)
        made = estimate(KEY, network, x, policy, **arguments).gradient
        return made, pull(estimate(KEY, table, values, policy, **arguments).gradient)[0]

    made, expected = map(flat, both(x))
    assert np.linalg.norm(expected) > 1e-3
    np.testing.assert_allclose(made, expected, rtol=1e-9, atol=1e-12)


def temporary_bytes(response, width, batch, horizon):
    """What the gradient of one estimate needs beside its arguments and results, and |x|."""
    problem = garnet(horizon=horizon)
    model = RewardNetwork(OneHot(5, MLP(width=width)), "state_action", Discrete(2))

    def loss(key, x, trajectories):
        del key, x
        return problem.cost[trajectories.observation[0], trajectories.action[0]]

    sampled = bj.SampledBilevelProblem(
        problem.environment, model, problem.regularizer(None), loss, discount=0.5, loss_discount=0.5, horizon=horizon
    )
    x, policy = model.init(KEY, jnp.asarray(0)), Table(np.full((5, 2), 0.5))
    groups = jax.eval_shape(lambda: sample_groups(KEY, sampled, policy, batch))

    def gradient(x, groups):
        return estimate_from(KEY, sampled, x, policy, groups, response, baseline=ExactAdvantage(problem.cost)).gradient

    compiled = jax.jit(gradient).lower(x, groups).compile()
    return compiled.memory_analysis().temp_size_in_bytes, ravel_pytree(x)[0].size


@pytest.mark.slow
def test_memory_does_not_grow_with_the_size_of_x_times_that_of_the_batch():
    """2560 steps; a gradient for each would be 1.4 GB at the width of 256. Activations are 16 width for each step."""
    small, large = (temporary_bytes(EligibilityTrace(0.9), width, 64, 40) for width in (32, 256))
    print(f"temporary MB {small[0] / 1e6:.1f} at |x| {small[1]}, {large[0] / 1e6:.1f} at |x| {large[1]}")
    assert large[1] > 20 * small[1]
    steps = 64 * 40
    assert large[0] - small[0] < 0.05 * 8 * steps * (large[1] - small[1])
    assert large[0] < 8 * (4 * large[1] + 16 * 256 * steps)


# 5. Learned credits.


class Features(Environment):
    """Five states, of which one sees a vector."""

    inner: Environment
    features: jax.Array

    @property
    def action_space(self):
        return self.inner.action_space

    def reset(self, key):
        return self.inner.reset(key)

    def observe(self, state):
        return self.features[state]

    def step(self, key, state, action):
        following, made = self.inner.step(key, state, action)
        return following, TimeStep(self.observe(following), made.reward, made.terminated, made.truncated)


def advantage_error(at, baseline, batches, batch):
    """Of the credits that were learned from batches, relative; and the state."""

    @quick_jit
    def learn(keys):
        def one(state, key):
            groups = sample_groups(key, at.problem, at.policy, batch)
            return baseline.update(state, at.problem, groups, group_costs(key, at.problem, at.x, groups)), None

        state = jax.lax.scan(one, baseline.init(at.problem), keys)[0]
        groups = sample_groups(KEY, at.problem, at.policy, 64)
        costs = group_costs(KEY, at.problem, at.x, groups)
        return state, groups, baseline.credit(state, at.problem, at.policy, groups, costs)

    state, groups, credit = learn(jax.random.split(jax.random.key(5), batches))
    expected = Model(at).advantage[groups.observation, groups.action]
    valid = np.asarray(groups.valid)
    off = (np.asarray(credit) - expected)[valid]
    return np.linalg.norm(off) / np.linalg.norm(expected[valid]), state


@pytest.mark.slow
@pytest.mark.often(2)
@pytest.mark.parametrize("trace", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("kind", [Garnet, EndingGarnet])
def test_the_critic_learns_the_advantage(kind, trace):
    at = setting(kind, discount=0.8, horizon=30)
    errors = [
        advantage_error(at, CriticAdvantage(OneHot(5), trace=trace), batches, 64)[0] for batches in (10, 100, 400)
    ]
    print(f"trace {trace}: relative errors {np.round(errors, 3)}")
    assert errors[2] < 0.15
    assert errors[2] < errors[0]


@pytest.mark.slow
def test_without_bootstrapping_the_last_costs_are_the_last():
    """A horizon of one step: the advantage is that of the costs; bootstrapped, it is that of all that would follow."""
    at = setting(discount=0.8, horizon=1)
    cost, pi = np.asarray(at.problem._costs(at.x)), np.asarray(at.policy.values)
    baseline = CriticAdvantage(OneHot(5), bootstrap=False)
    _, state = advantage_error(at, baseline, 200, 256)
    values = np.asarray(jax.vmap(lambda s: baseline.critic.values(state, s)[:, 0])(jnp.arange(5)))
    got = values - (pi * values).sum(1, keepdims=True)
    expected = cost - (pi * cost).sum(1, keepdims=True)
    initial = np.asarray(at.problem.mdp(at.x).initial)
    seen = initial > 0.01
    np.testing.assert_allclose(got[seen], expected[seen], atol=0.1 * np.abs(expected).max())


@pytest.mark.slow
def test_a_learned_credit_gives_nearly_the_exact_gradient():
    at = setting(discount=0.8, horizon=30)
    baseline = CriticAdvantage(OneHot(5))
    error, state = advantage_error(at, baseline, 400, 64)
    arguments = {"batch": 64, "batches": 200, "fast": True}
    learned = draws(at, EligibilityTrace(1.0), baseline=baseline, baseline_state=state, **arguments).gradient
    off = np.linalg.norm(learned.mean(0) - at.gradient) / np.linalg.norm(at.gradient)
    print(f"error of the credit {error:.3f}, bias of the gradient {off:.3f}")
    assert off < 0.2


@pytest.mark.slow
def test_observations_that_are_no_states():
    """A network on vectors, and a policy that is a function."""
    features = jnp.asarray(np.random.default_rng(2).normal(size=(5, 3)))
    inner, cost = garnet().environment, jnp.asarray([1.0, -1.0])
    environment = Features(inner, features)
    model = RewardNetwork.of(environment, MLP(width=8, depth=1), "state")

    def loss(key, x, trajectories):
        del key, x
        return cost[trajectories.action[0]] * trajectories.observation[0, :, 0]

    problem = bj.SampledBilevelProblem(
        environment, model, bj.ShannonEntropy(0.5), loss, discount=0.9, loss_discount=0.9, horizon=8
    )
    x = model.init(KEY, environment.observation_space)
    baseline = CriticAdvantage(MLP(width=8, depth=1), steps=4)

    def run(key):
        policy = jax.tree_util.Partial(lambda observation: jax.nn.softmax(observation[:2]))
        groups = sample_groups(key, problem, policy, 4)
        costs = group_costs(key, problem, x, groups)
        state = baseline.update(baseline.init(problem), problem, groups, costs)
        response = EligibilityTrace(0.9)
        return estimate_from(key, problem, x, policy, groups, response, None, baseline, state).gradient, state

    gradient, state = quick_jit(run)(KEY)
    assert np.all(np.isfinite(flat(gradient)))
    assert np.linalg.norm(flat(gradient)) > 0
    assert state.shift.shape == (1,)


@pytest.mark.slow
def test_the_first_credit_is_zero_and_needs_no_costs():
    """Costs that are all zero set no units; later ones do."""
    at = setting()
    baseline = CriticAdvantage(OneHot(5))
    groups = quick_jit(lambda key: sample_groups(key, at.problem, at.policy, 8))(KEY)
    costs = group_costs(KEY, at.problem, at.x, groups)
    state = baseline.init(at.problem)
    assert np.all(np.asarray(baseline.credit(state, at.problem, at.policy, groups, costs)) == 0)
    nothing = costs._replace(each=jnp.zeros_like(costs.each))
    update = quick_jit(lambda state, costs: baseline.update(state, at.problem, groups, costs))
    state = update(state, nothing)
    assert float(state.scale) == 0
    assert np.all(np.isfinite(flat(state.params)))
    state = update(state, costs)
    assert float(state.scale) > 0
    credit = np.asarray(baseline.credit(state, at.problem, at.policy, groups, costs))
    assert np.all(np.isfinite(credit))
    assert np.any(credit != 0)


# 6. What jit must allow, and errors.


@pytest.mark.slow
def test_a_new_decay_does_not_recompile_and_vmap_is_single_calls():
    at = setting()
    credit = exact_credit(at)

    def run(decay, key):
        response = EligibilityTrace(decay)
        return estimate(key, at.problem, at.x, at.policy, batch=4, response=response, baseline=credit).gradient

    single = quick_jit(run)
    decays, keys = jnp.array([0.2, 1.0]), jax.random.split(KEY, 2)
    many = quick_jit(jax.vmap(run))(decays, keys)
    for i in range(2):
        np.testing.assert_allclose(many[i], single(decays[i], keys[i]), rtol=1e-9, atol=1e-12)
    assert single._cache_size() == 1


@pytest.mark.slow
def test_float32():
    at = setting()
    narrow = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, at
    )

    @quick_jit
    def run(at):
        baseline = exact_credit(at)
        groups = sample_groups(KEY, at.problem, at.policy, 16)
        arguments = {"response": EligibilityTrace(0.9), "baseline": baseline}
        made = estimate_from(KEY, at.problem, at.x, at.policy, groups, max_ratio=10.0, **arguments)
        learned = CriticAdvantage(OneHot(5), steps=2)
        state = learned.update(learned.init(at.problem), at.problem, groups, made.costs)
        arguments["baseline"] = learned
        arguments["baseline_state"] = state
        return made, estimate_from(KEY, at.problem, at.x, at.policy, groups, **arguments).gradient

    got, wide = run(Setting(*narrow)), run(at)
    leaves = jax.tree.leaves(got)
    assert {leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)} == {np.dtype("float32")}
    np.testing.assert_allclose(got[0].gradient, wide[0].gradient, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(got[1], wide[1], rtol=1e-2, atol=1e-3)


def test_one_trajectory_alone():
    at = setting()
    made = quick_jit(
        lambda key: (
            estimate(
                key, at.problem, at.x, at.policy, batch=1, response=EligibilityTrace(1.0), baseline=exact_credit(at)
            ).gradient
        )
    )(KEY)
    assert np.all(np.isfinite(made))


class Own(Baseline):
    """A user's baseline, of which nothing is said."""

    def credit(self, state, problem, policy, groups, costs):
        return jnp.zeros_like(costs.each)[:, None]


def run_with(baseline):
    at = setting()
    response = EligibilityTrace(0.9)
    jax.eval_shape(
        lambda: estimate(KEY, at.problem, at.x, at.policy, batch=2, response=response, baseline=baseline).gradient
    )


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (lambda: EligibilityTrace(1.1), "decay must be from 0 to 1"),
        (lambda: EligibilityTrace(-0.1), "decay must be from 0 to 1"),
        (lambda: run_with(None), "baseline: EligibilityTrace needs .* LeaveOneOut .*use CriticAdvantage"),
        (lambda: run_with(Own()), "baseline: EligibilityTrace needs .* Own .*use CriticAdvantage"),
        (lambda: CriticAdvantage(trace=2.0), "trace must be from 0 to 1"),
        (lambda: CriticAdvantage(steps=0), "steps: .*at least 1"),
        (lambda: CriticAdvantage(minibatches=0), "minibatches: .*at least 1"),
        (lambda: CriticAdvantage().init(garnet(PairGarnet)), "trajectories: CriticAdvantage is for losses of one"),
        (
            lambda: CriticAdvantage().init(eqx.tree_at(lambda p: p.discount, garnet(), jnp.ones(()))),
            r"loss_discount must be at least 0 and below 1.*CriticAdvantage\(bootstrap=False\)",
        ),
        (lambda: ExactAdvantage(jnp.zeros((4, 2))).init(garnet()), r"costs: expected shape \[S, A\] = \[5, 2\]"),
        (lambda: ExactAdvantage(jnp.zeros((5, 2))).init(garnet(PairGarnet)), "trajectories: ExactAdvantage is for"),
    ],
)
def test_input_errors(fails, message):
    with pytest.raises(bj.InputError, match=message):
        fails()


def test_which_baselines_have_credits_of_pairs():
    kinds = (CriticAdvantage, ExactAdvantage, LeaveOneOut, LearnedAdvantage)
    assert [kind.of_pairs for kind in kinds][:3] == [True, True, False]
    assert not OneStep.credit_of_pairs
    assert HORIZON == 20
