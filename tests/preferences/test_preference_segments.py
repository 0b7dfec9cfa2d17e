"""How segments are cut and relabelled: against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import bilevel_jax as bj
from bilevel_jax import preferences as pf

BATCH, HORIZON, LENGTH = 5, 12, 4


def record(kind, seed):
    """Trajectories with random ends: of `collect`, where processes go on, or of `rollout`, where they stop."""
    rng = np.random.default_rng(seed)
    terminated = rng.random((BATCH, HORIZON)) < 0.12
    truncated = (rng.random((BATCH, HORIZON)) < 0.08) & ~terminated
    valid = np.ones((BATCH, HORIZON), bool)
    if kind == "rollout":
        ended = np.cumsum(terminated | truncated, 1)
        valid = np.concatenate([np.ones((BATCH, 1), bool), ended[:, :-1] == 0], 1)
    number = np.arange(BATCH * HORIZON).reshape(BATCH, HORIZON)
    return bj.environments.Trajectory(
        state=None,
        observation={"number": jnp.asarray(number), "frame": jnp.asarray(number, jnp.uint8)[..., None]},
        action=jnp.asarray(number % 3, jnp.int32),
        probability=jnp.full((BATCH, HORIZON), 1 / 3),
        reward=jnp.asarray(number + 0.25),
        next_observation={
            "number": jnp.asarray(number + 1000),
            "frame": jnp.asarray(number + 100, jnp.uint8)[..., None],
        },
        terminated=jnp.asarray(terminated),
        truncated=jnp.asarray(truncated),
        valid=jnp.asarray(valid),
    )


def by_hand(trajectories, b, start, ends):
    """The segment from one place as a list of (observation, action, reward, next observation, valid), or None."""
    plain = jax.tree.map(np.asarray, trajectories)
    steps, over, last = [], None, None
    for h in range(start, start + LENGTH):
        if over is None and (h >= HORIZON or not plain.valid[b, h]):
            return None  # nothing is recorded there, and no end says why
        if over is not None:
            if ends == "exclude" or (ends == "hide" and over == "truncated"):
                return None
            if ends == "hide":
                steps.append((last[3], last[1], -7.0, last[3], True))
            else:
                steps.append((*last, False))
            continue
        number = int(plain.observation["number"][b, h])
        last = (number, number % 3, number + 0.25, number + 1000)
        steps.append((*last, True))
        over = "terminated" if plain.terminated[b, h] else "truncated" if plain.truncated[b, h] else None
    return steps


@pytest.mark.parametrize("kind", ["rollout", "collect"])
@pytest.mark.parametrize("ends", ["exclude", "hide", "show"])
def test_all_places_and_what_is_cut_there(kind, ends):
    cut_all = jax.jit(
        lambda key, record: pf.cut_segments(key, record, LENGTH, BATCH * HORIZON + 3, ends=ends, absorbing_reward=-7.0)
    )
    for seed in range(8):
        trajectories = record(kind, seed)
        cut = jax.tree.map(np.asarray, cut_all(jax.random.key(seed), trajectories))
        expected = {(b, s): by_hand(trajectories, b, s, ends) for b in range(BATCH) for s in range(HORIZON)}
        expected = {place: steps for place, steps in expected.items() if steps is not None}
        places = list(zip(cut.process[cut.found].tolist(), cut.start[cut.found].tolist(), strict=True))
        assert len(places) == len(set(places))
        assert set(places) == set(expected)
        assert not cut.trajectories.valid[~cut.found].any()
        made = cut.trajectories
        for row, place in zip(np.flatnonzero(cut.found), places, strict=True):
            got = [
                (
                    int(made.observation["number"][row, h]),
                    int(made.action[row, h]),
                    float(made.reward[row, h]),
                    int(made.next_observation["number"][row, h]),
                    bool(made.valid[row, h]),
                )
                for h in range(LENGTH)
            ]
            assert got == expected[place]
            repeated = [ends == "hide" and step[2] == -7 for step in expected[place]]
            assert cut.absorbing[row].tolist() == repeated
        assert made.observation["frame"].dtype == np.uint8


def test_length_tells_nothing():
    """Of hidden and of excluded ends all segments have as many steps; of shown ones some have fewer."""
    trajectories = record("collect", 1)
    for ends in ("exclude", "hide", "show"):
        cut = pf.cut_segments(jax.random.key(0), trajectories, LENGTH, 60, ends=ends)
        lengths = set(np.asarray(cut.trajectories.valid).sum(1)[np.asarray(cut.found)].tolist())
        assert (lengths == {LENGTH}) == (ends != "show")


def test_places_are_equally_likely():
    """Chi-square over the places, of 3,000 cuts of 2: at a level of 1e-5. Twice as many of one place would be seen."""
    trajectories = record("rollout", 2)
    cut = jax.vmap(lambda key: pf.cut_segments(key, trajectories, LENGTH, 2))(jax.random.split(jax.random.key(5), 3000))
    assert bool(cut.found.all())
    number = np.asarray(cut.process * HORIZON + cut.start).reshape(-1)
    _, counts = np.unique(number, return_counts=True)
    allowed = [by_hand(trajectories, b, s, "exclude") is not None for b in range(BATCH) for s in range(HORIZON)]
    assert len(counts) == sum(allowed)
    assert stats.chisquare(counts).pvalue > 1e-5


def test_relabelled_trajectories_segments_and_replay_items():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(60, 3)), jnp.float32)

    def reward(observation, action, following):
        return table[observation["number"], action] + following["number"].astype(jnp.float32)

    trajectories = record("rollout", 3)
    made = pf.relabelled(reward, trajectories)
    want = np.asarray(table)[np.arange(60), np.arange(60) % 3] + np.arange(1000, 1060)
    want = np.where(np.asarray(trajectories.valid), want.reshape(BATCH, HORIZON), 0)
    np.testing.assert_allclose(made.reward, want, rtol=1e-6)
    assert made.reward.dtype == trajectories.reward.dtype
    np.testing.assert_array_equal(made.action, trajectories.action)
    segments = pf.Segments.of(trajectories)
    np.testing.assert_array_equal(pf.relabelled(reward, segments).reward, made.reward)
    np.testing.assert_array_equal(
        pf.relabelled(reward, pf.Segments.of(trajectories, hidden=False)).reward.astype(float), made.reward
    )
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), trajectories)
    ring = bj.replay.add(bj.replay.init(jax.tree.map(lambda leaf: leaf[0], flat), 60), flat)
    np.testing.assert_array_equal(pf.relabelled(reward, ring.items).reward, np.asarray(made.reward).reshape(-1))
    gradient = jax.grad(
        lambda s: jnp.sum(pf.relabelled(lambda o, a, n: s * o["number"].astype(float), segments).reward)
    )(2.0)
    assert float(gradient) == float(
        np.sum(np.asarray(trajectories.observation["number"])[np.asarray(trajectories.valid)])
    )


def test_a_reward_of_the_next_observation():
    class Arrival(bj.ActionFunction):
        def __call__(self, observation, action):
            raise AssertionError

        def all(self, observation):
            raise AssertionError

        def of_step(self, observation, action, next_observation):
            return next_observation["number"].astype(float)

    segments = pf.Segments.of(record("collect", 0))
    np.testing.assert_array_equal(
        pf.relabelled(Arrival(), segments).reward, np.where(segments.valid, segments.next_observation["number"], 0)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda key: pf.cut_segments(key, record("collect", 0), 13, 1), "length: expected 1 to the horizon 12, got 13"),
        (lambda key: pf.cut_segments(key, record("collect", 0), 3, 0), "count: expected an integer of at least 1"),
        (
            lambda key: pf.cut_segments(key, record("collect", 0), 3, 1, ends="drop"),
            "ends: expected exclude, hide or show",
        ),
        (lambda key: pf.relabelled(lambda o, a, n: 0.0, {"reward": 0}), "steps: dict has no field observation"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(bj.InputError, match=message):
        call(jax.random.key(0))
