"""The tasks of `preference_learning`: their true rewards, their dynamics, and rewards that were saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax.problems import make
from bilevel_jax.problems.preference_learning import TASKS, environment

KEY = jax.random.key(0)


@pytest.mark.parametrize("task", TASKS)
def test_no_task_ends_and_each_change_is_one(task):
    """Random actions: never terminated, finite observations of the order of one, another course in other dynamics."""
    number = environment(task).num_actions
    seen = {}
    for dynamics in TASKS[task].dynamics:
        made = environment(task, dynamics)
        policy = jnp.full(number, 1 / number)
        rollout = jax.jit(
            lambda made, policy=policy: bj.environments.rollout(KEY, made, lambda o: policy, batch=16, horizon=150)
        )(made)
        assert not bool(rollout.terminated.any() | rollout.truncated.any())
        assert bool(rollout.valid.all())
        scaled = (np.asarray(rollout.observation) - TASKS[task].offset) / np.asarray(TASKS[task].scale)
        assert np.isfinite(scaled).all()
        assert 0.2 < np.abs(scaled).mean() < 5
        seen[dynamics] = rollout
    for dynamics, rollout in seen.items():
        same = dynamics == "usual"
        assert np.allclose(rollout.observation, seen["usual"].observation) == same, dynamics


@pytest.mark.parametrize(
    ("task", "good", "bad"),
    [
        ("cart_pole", [1.0, 0, 0, 0], [1.0, 0, 0.3, 0]),
        ("cart_pole", [1.0, 0, 0, 0], [-1.0, 0, 0, 0]),
        ("acrobot", [-1.0, 0, 1, 0, 0, 0], [1.0, 0, 1, 0, 0, 0]),
        ("mountain_car", [0.5, 0.01], [-0.5, 0.0]),
        ("four_rooms", [0.8, 0.6], [-0.6, 0.6]),
    ],
)
def test_true_rewards_are_of_the_next_state(task, good, bad):
    reward = TASKS[task].reward
    better, worse = (float(reward(jnp.zeros(6), 0, jnp.asarray(state))) for state in (good, bad))
    assert better > worse
    assert better == float(reward(jnp.ones(6), 1, jnp.asarray(good)))


def test_a_saved_reward_is_the_start(tmp_path):
    """A file as `bilevel-jax run` writes it, of two runs; and files that do not fit."""
    options = {"task": "cart_pole", "width": 4}
    fresh = make("preference_learning", **options)
    xs = [fresh.start(jax.random.key(k)) for k in range(2)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *xs)
    names = bj.core.saving.flat_names("x", xs[0])
    path = tmp_path / "final.npz"
    np.savez(path, **dict(zip(names, jax.tree.leaves(stacked), strict=True)))
    for run in range(2):
        made = make("preference_learning", **options, dynamics="heavy", saved=str(path), saved_run=run)
        for got, want in zip(*map(jax.tree.leaves, (made.start(KEY), xs[run])), strict=True):
            np.testing.assert_array_equal(got, want)
    with pytest.raises(bj.InputError, match="has 2 runs, there is no number 2"):
        make("preference_learning", **options, saved=str(path), saved_run=2)
    with pytest.raises(bj.InputError, match=r"saved: .*expected"):
        make("preference_learning", task="cart_pole", width=5, saved=str(path))
    with pytest.raises(bj.InputError, match="cannot be read"):
        make("preference_learning", **options, saved=str(tmp_path / "none.npz"))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(bj.InputError, match=r"is no final\.npz"):
        make("preference_learning", **options, saved=str(tmp_path / "text.npz"))


def test_the_log_policy_of_a_soft_pqn_is_finite_where_the_policy_is_0():
    """At a gap of 200 temperatures, in float32."""
    with jax.enable_x64(False):
        network = bj.networks.MLP(width=4, depth=0, output_scale=100.0)
        params = network.init(KEY, jnp.zeros(3), 2)
        policy = bj.agents.deep.soft_pqn.ValuePolicy(network, params, bj.ShannonEntropy(0.05))
        observation = jnp.ones(3)
        made = policy.distribution(observation)
        q = policy.q(observation)
        assert float(jnp.abs(q[0] - q[1])) > 10
        assert float(made.probabilities.min()) == 0
        worse = int(jnp.argmin(q))
        np.testing.assert_allclose(made.log_prob(worse), (q[worse] - q[1 - worse]) / 0.05, rtol=1e-5)
        slope = jax.grad(
            lambda params: (
                policy.__class__(network, params, policy.regularizer).distribution(observation).log_prob(worse)
            )
        )(params)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(slope))
