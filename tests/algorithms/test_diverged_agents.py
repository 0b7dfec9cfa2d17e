"""An agent that has diverged is told: its actions earn finite rewards all the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj

KEY = jax.random.key(0)
SMALL = {"processes": 4, "steps": 8, "minibatches": 2}
AGENTS = {
    "soft_pqn": lambda: bj.agents.SoftPQN(bj.networks.MLP(width=8), learning_rate=1e38, **SMALL),
    "ppo": lambda: bj.agents.PPO(bj.networks.MLP(width=8), learning_rate=1e38, **SMALL),
}


@pytest.mark.slow
@pytest.mark.parametrize("agent", AGENTS)
def test_an_agent_of_nan_is_not_finite(agent):
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        task = bj.problems.make("task", horizon=20)
        algorithm = bj.algorithms.agent_alone(task, agent=AGENTS[agent](), improvements=3, batch=2)
        state = algorithm.init(KEY, task.start(KEY))
        state, info = algorithm.step(jax.random.key(1), state)
        assert np.isnan(info.objective)
        assert info.reports["hyper-gradient estimate"].result == bj.Result.NOT_FINITE
        policy = algorithm.policy(state)
        for greedy in (False, True):
            made = bj.environments.evaluate(KEY, task.environment, policy, episodes=3, steps=20, greedy=greedy)
            assert np.isnan(made.mean)


@pytest.mark.slow
def test_networks_of_many_seeds_are_drawn_at_once():
    """Several independent QRs in one program, each of a batch: LAPACK's batched calls hang here."""
    network = bj.networks.MLP(width=128)
    drawn = jax.jit(
        jax.vmap(lambda key: [network.init(one, jnp.zeros((10, 10, 4)), 3) for one in jax.random.split(key, 4)])
    )
    for repeat in range(3):
        made = jax.block_until_ready(drawn(jax.random.split(jax.random.key(repeat), 10)))
    weight = made[0].arrays.layers[1].weight[0]
    np.testing.assert_allclose(weight @ weight.T / (weight @ weight.T)[0, 0], np.eye(128), atol=1e-5)
