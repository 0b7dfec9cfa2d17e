"""Incentives by a network: who earns and pays what; and Four Rooms with its penalties as a network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from environment_helpers import Anything
from helpers import central_difference, flat, random_like

import bilevel_jax as bj
from bilevel_jax.bilevel import reparameterized
from bilevel_jax.environments import rollout

KEY = jax.random.key(0)
ENVIRONMENTS = ("cart_pole", "mountain_car", "pendulum")


def make(**options):
    return bj.problems.make("incentives", **{"width": 4, "horizon": 12} | options)


def seen(problem):
    policy = Anything(problem.action_space)
    return rollout(jax.random.key(1), problem.environment, policy, batch=1, horizon=problem.horizon)


@pytest.mark.slow
@pytest.mark.parametrize("inputs", ["state", "next_state", "state_action"])
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_who_earns_and_pays_what(environment, inputs):
    effort = {} if environment == "cart_pole" else {"effort": 0.3}
    problem = make(environment=environment, inputs=inputs, price=0.7, max_payment=0.2, **effort)
    x = jax.tree.map(lambda leaf: 5 * leaf, problem.start(KEY))
    steps = seen(problem)
    payment, reward = problem.payment(x), problem.reward(x)
    losses = problem.loss(KEY, x, steps)
    paid_in_all = []
    for h in range(12):
        if not bool(steps.valid[0, h]):
            assert losses[h] == 0
            continue
        step = [jax.tree.map(lambda leaf, h=h: leaf[0, h], part) for part in
                (steps.observation, steps.action, steps.next_observation)]  # fmt: skip
        paid = float(payment.of_step(*step))
        assert abs(paid) <= 0.2
        paid_in_all.append(paid)
        action, after = np.asarray(step[1]), np.asarray(step[2])
        effort, gain = {
            "cart_pole": lambda: (0, 1),
            "mountain_car": lambda a=action, s=after: (abs(int(a) - 1), (np.sin(3 * s[0]) - 1) / 2),
            "pendulum": lambda a=action, h=h: ((a[0] / 2) ** 2, float(steps.reward[0, h]) / 16.3),
        }[environment]()
        np.testing.assert_allclose(reward.of_step(*step), paid - 0.3 * effort, rtol=1e-10)
        np.testing.assert_allclose(losses[h], 0.7 * abs(paid) - gain, rtol=1e-10)
    assert np.std(paid_in_all) > 0


@pytest.mark.slow
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_at_no_price_the_naive_gradient_is_zero(environment):
    problem = make(environment=environment, price=0.0)
    agent = bj.agents.GaussianActorCritic if environment == "pendulum" else bj.agents.SoftPQN
    network = bj.networks.MLP(width=4)
    small = (
        {"processes": 2, "capacity": 32, "learning_starts": 2, "batch": 4}
        if environment == "pendulum"
        else {"processes": 2, "steps": 4}
    )
    common = {"agent": agent(network, **small), "batch": 2}
    norms = {}
    for name in ("naive", "sobirl"):
        algorithm = bj.algorithms.make_algorithm(name, problem, optax.sgd(0.1), **common)
        state = algorithm.init(KEY, problem.start(KEY))
        _, info = algorithm.step(jax.random.key(1), state)
        assert np.isfinite(info.objective)
        norms[name] = float(info.gradient_norm)
    assert norms["naive"] == 0
    assert norms["sobirl"] > 0


@pytest.mark.slow
def test_the_one_step_estimate_is_zero_where_states_are_paid():
    problem = make(inputs="state", price=0.0)
    x, batch = problem.start(KEY), 4
    policy = jnp.array([0.4, 0.6])
    common = {"batch": batch, "baseline": bj.estimators.NoBaseline()}

    def gradient(response):
        made = bj.estimators.estimate(KEY, problem, x, lambda observation: policy, response=response, **common)
        return float(optax.tree.norm(made.gradient))

    assert gradient(bj.estimators.OneStep()) < 1e-12
    assert gradient(bj.estimators.NestedRollouts(5)) > 1e-3


@pytest.mark.parametrize("inputs", ["state", "state_action"])
def test_rewards_of_all_actions(inputs):
    problem = make(environment="mountain_car", inputs=inputs)
    reward = problem.reward(problem.start(KEY))
    observation = jnp.array([-0.4, 0.02])
    every = reward.all(observation)
    np.testing.assert_allclose(every, [reward(observation, jnp.asarray(a)) for a in range(3)], rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"environment": "car"}, "environment: expected 'cart_pole', 'mountain_car' or 'pendulum', got 'car'"),
        ({"width": 0}, "width must be a whole number from 1 to 4096"),
        ({"horizon": 0}, "horizon must be a whole number"),
        ({"max_payment": 0.0}, "max_payment"),
        ({"environment": "pendulum", "effort": -1.0}, "effort"),
        ({"effort": 0.3}, "effort: has no effect on cart_pole"),
        ({"price": np.nan}, "price"),
        ({"discount": 1.0}, "discount"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(bj.InputError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gymnax": "Nothing-v0"}, "gymnax: .*(needs gymnax|no environment 'Nothing-v0')"),
        ({"gymnax": 3}, "gymnax: expected a text"),
        ({"gymnax": "Acrobot-v1", "environment": "pendulum"}, "environment: has no effect where gymnax names"),
    ],
)
def test_bad_tasks(options, message):
    with pytest.raises(bj.InputError, match=message):
        bj.problems.make("task", **options)


# Four Rooms by coordinates.

ROOMS = {"rows": ("s.x..", ".t.xg", "g...."), "temperature": 0.05, "discount": 0.9}


@pytest.mark.slow
def test_penalties_of_a_network():
    """The same as the general way to make x of a network, and its gradient that of differences."""
    problem, table = (bj.problems.make("four_rooms", **ROOMS, **more) for more in ({"variable": "network"}, {}))
    cells = np.asarray(table.grid.cells, float)
    places = jnp.asarray((cells - [1, 2]) / [1, 2])

    def weights(x):
        network = bj.networks.MLP(width=32, layer_norm=False, activation="silu")
        each = jax.vmap(lambda place: network.apply(x["network"], place)[0])(places)
        return jnp.append(each, x["spare"])

    x = problem.start(KEY)
    general = reparameterized(table, weights, problem.start)
    made, want = (bj.check(bj.hypergradient(one, x, with_error=False)) for one in (problem, general))
    np.testing.assert_allclose(made.value, want.value, rtol=1e-12)
    for one, other in zip(jax.tree.leaves(made.gradient), jax.tree.leaves(want.gradient), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-13)
    d = random_like(1, x)
    f = jax.jit(lambda x: problem.objective(x, bj.solve(problem.mdp(x), problem.regularizer(x))))
    np.testing.assert_allclose(np.vdot(flat(made.gradient), flat(d)), central_difference(f, x, d)[0], rtol=1e-6)


def test_a_width_without_a_network_is_refused():
    with pytest.raises(bj.InputError, match="width: has no effect unless variable is 'network'"):
        bj.problems.make("four_rooms", width=8)
    with pytest.raises(bj.InputError, match="variable: expected 'weights' or 'network'"):
        bj.problems.make("four_rooms", variable="net")
