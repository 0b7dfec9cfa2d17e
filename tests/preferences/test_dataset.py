"""Data sets of preferences in memory: against plain loops, inside jit, and what they refuse."""

import collections

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax import preferences as pf

RNG = np.random.default_rng(3)


def segments(count=6, length=4, dtype=np.float32, reward=True):
    return pf.Segments(
        {
            "speed": RNG.normal(size=(count, length)).astype(dtype),
            "frame": RNG.integers(0, 255, (count, length, 2, 2), np.uint8),
        },
        RNG.integers(0, 3, (count, length)).astype(np.int32),
        {
            "speed": RNG.normal(size=(count, length)).astype(dtype),
            "frame": RNG.integers(0, 255, (count, length, 2, 2), np.uint8),
        },
        valid=RNG.random((count, length)) < 0.8,
        reward=RNG.normal(size=(count, length)) if reward else None,
    )


def data(pairs=5, sources=("a", "b")):
    some = segments()
    return pf.Preferences(
        some,
        RNG.integers(0, some.count, (pairs, 2)),
        RNG.choice([0.0, 0.5, 1.0], pairs),
        RNG.integers(0, 2, pairs),
        RNG.integers(0, len(sources), pairs),
        RNG.integers(0, 9, pairs),
        sources,
    )


def rows(preferences):
    """Each pair as (first segment's leaves, second's leaves, label, weight, source, iteration), plain numbers."""
    made = []
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(preferences.segments)]
    for p in range(preferences.count):
        one, two = (tuple(leaf[i].tobytes() for leaf in leaves) for i in np.asarray(preferences.pairs)[p])
        source = preferences.sources[int(preferences.source[p])]
        made.append(
            (
                one,
                two,
                *(float(x[p]) for x in (preferences.label, preferences.weight)),
                source,
                int(preferences.iteration[p]),
            )
        )
    return made


def test_two_batches_of_trajectories_make_pairs():
    environment = bj.environments.TabularEnvironment(bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9))
    policy = jnp.full((2, 2), 0.5)
    one, two = (bj.environments.rollout(jax.random.key(k), environment, policy, batch=3, horizon=4) for k in (0, 1))
    made = pf.Preferences.paired(one, two, [1.0, 0.0, 0.5], source="uniform", iteration=7)
    assert made.sources == ("uniform",)
    assert made.iteration.tolist() == [7, 7, 7]
    for side, trajectory in ((made.first, one), (made.second, two)):
        for name in ("observation", "action", "next_observation", "valid", "reward"):
            np.testing.assert_array_equal(getattr(side, name), getattr(trajectory, name))
    assert pf.Preferences.paired(one, two, hidden=False).segments.reward is None
    unlabelled = pf.Preferences.paired(one, two)
    assert unlabelled.weight.tolist() == [0, 0, 0]
    assert unlabelled.label.tolist() == [0.5, 0.5, 0.5]


def test_dtypes_are_kept():
    made = data()
    assert made.segments.observation["frame"].dtype == jnp.uint8
    assert made.segments.observation["speed"].dtype == jnp.float32
    assert made.first.observation["frame"].dtype == jnp.uint8


def test_concatenate_subset_and_compacted_keep_every_pair():
    one, two = data(5, ("a", "b")), data(4, ("b", "c"))
    both = pf.concatenate(one, two)
    assert both.sources == ("a", "b", "c")
    assert rows(both) == rows(one) + rows(two)
    index = [6, 0, 6, 3]
    assert rows(pf.subset(both, index)) == [rows(both)[i] for i in index]
    assert rows(jax.jit(pf.subset)(both, jnp.asarray(index))) == [rows(both)[i] for i in index]
    chosen = np.asarray(both.weight) > 0
    assert rows(pf.subset(both, chosen)) == [row for row, kept in zip(rows(both), chosen, strict=True) if kept]
    assert pf.subset(both, np.zeros(9, bool)).count == 0
    few = pf.compacted(pf.subset(both, [2]))
    assert few.segments.count <= 2
    assert rows(few) == [rows(both)[2]]


def test_split_and_minibatches_are_partitions():
    made = pf.concatenate(*(data() for _ in range(5)))
    everything = sorted(map(repr, rows(made)))
    train, held_out = pf.split(jax.random.key(0), made, 0.2)
    assert (train.count, held_out.count) == (20, 5)
    assert sorted(map(repr, rows(train) + rows(held_out))) == everything
    assert pf.split(jax.random.key(0), made, 7)[1].count == 7
    index = pf.minibatches(jax.random.key(1), made, 8)
    assert index.shape == (3, 8)
    assert len(set(index.reshape(-1).tolist())) == 24
    assert index.tolist() != pf.minibatches(jax.random.key(2), made, 8).tolist()


def test_an_epoch_of_minibatches_inside_one_scan():
    made = data(8)

    @jax.jit
    def epoch(key):
        def step(total, index):
            return total + jnp.sum(pf.subset(made, index).label), None

        return jax.lax.scan(step, jnp.zeros(()), pf.minibatches(key, made, 2))[0]

    assert float(epoch(jax.random.key(0))) == float(made.label.sum())


def test_a_buffer_keeps_the_last_pairs_inside_jit():
    batches = [data(4) for _ in range(4)]
    buffer = pf.PreferenceBuffer(batches[0], 10, sources=("other", "b", "a"))
    assert float(buffer.preferences().weight.sum()) == 0  # nothing yet
    step = eqx.filter_jit(lambda buffer, batch: buffer.add(batch))
    seen = []
    for batch in batches:
        buffer = step(buffer, batch)
        seen = rows(batch)[::-1] + seen
        kept = rows(buffer.preferences())
        assert kept[: len(seen)] == seen[:10]
        assert all(row[3] == 0 for row in kept[len(seen) :])


def test_what_is_drawn_has_a_label_and_its_own_segments():
    """Of a data set and of a buffer with empty places: all labelled pairs come, as often as each other, and no other.
    4,000 draws of 3 pairs: each is within 5 standard errors, a false alarm in 10^6.
    """
    some = data(4)
    some = eqx.tree_at(lambda one: one.weight, some, jnp.asarray([1.0, 0.0, 1.0, 1.0]))
    buffer = pf.PreferenceBuffer(some, 10).add(some)
    assert int(buffer.judged) == 3
    wanted = {tuple(map(repr, row)) for row in rows(some) if row[3] > 0}
    for made in (pf.draw(jax.random.key(0), some, 4000), buffer.draw(jax.random.key(1), 4000)):
        assert made.segments.count == 8000
        counts = collections.Counter(tuple(map(repr, row)) for row in rows(made))
        assert set(counts) == wanted
        assert max(abs(count - 4000 / 3) for count in counts.values()) < 5 * (4000 * 2 / 9) ** 0.5
    nothing = pf.PreferenceBuffer(some, 10).draw(jax.random.key(0), 5)
    assert (nothing.count, float(nothing.weight.sum())) == (5, 0)


def test_a_buffer_refuses_what_it_does_not_know():
    buffer = pf.PreferenceBuffer(data(4), 10)
    with pytest.raises(bj.InputError, match="sources: 'c' is none of a, b"):
        buffer.add(data(2, ("a", "c")))
    with pytest.raises(bj.InputError, match="from 1 to the capacity 10"):
        buffer.add(data(11))


def test_under_vmap_and_in_float32():
    some = segments(reward=False)
    labels = jnp.asarray([[1.0, 0.0], [0.5, 0.5]], jnp.float32)
    many = jax.vmap(lambda label: pf.Preferences(some, [[0, 1], [2, 3]], label))(labels)
    assert many.label.dtype == many.weight.dtype == jnp.float32
    assert jax.vmap(lambda one: jnp.sum(one.first.valid))(many).shape == (2,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pf.Preferences(segments(), [[0, 6]]), r"pairs\[0, 1\] is 6, out of range"),
        (lambda: pf.Preferences(segments(), [0, 1]), r"pairs: expected \[P, 2\]"),
        (lambda: pf.Preferences(segments(), [[0, 1]], [1.5]), r"label must be from 0 to 1, got 1.5"),
        (lambda: pf.Preferences(segments(), [[0, 1]], [float("nan")]), r"label must be from 0 to 1, got nan"),
        (lambda: pf.Preferences(segments(), [[0, 1]], [1, 0]), r"label: expected shape \[1\], got \[2\]"),
        (lambda: pf.Preferences(segments(), [[0, 1]], [1], [-1]), r"weight must be at least 0"),
        (lambda: pf.Preferences(segments(), [[0, 1]], None, [1]), r"weight: there are no labels"),
        (lambda: pf.Preferences(segments(), [[0, 1]], [1], source=1), r"source.* 1, out of range"),
        (lambda: pf.Preferences(segments(), [[0, 1]], [1], sources=("a", "a")), r"sources: expected different names"),
        (lambda: pf.Preferences(segments(), [[0, 1]], [1], iteration=[1, 2]), r"iteration: expected one for each pair"),
        (
            lambda: pf.Segments(jnp.zeros((2, 3)), jnp.zeros((2, 4)), valid=jnp.ones((2, 3), bool)),
            r"action: expected the leading axes",
        ),
        (
            lambda: pf.Segments(jnp.zeros((2, 3)), jnp.zeros((2, 3)), valid=jnp.ones((2, 3))),
            r"valid: expected booleans",
        ),
        (lambda: pf.concatenate(), r"parts: expected at least one"),
        (
            lambda: pf.concatenate(data(), pf.Preferences(segments(length=5), [[0, 1]], [1.0])),
            r"segments.*cannot be joined",
        ),
        (
            lambda: pf.concatenate(data(), pf.Preferences(segments(reward=False), [[0, 1]], [1.0])),
            r"their structures differ",
        ),
        (lambda: pf.split(jax.random.key(0), data(), 5), r"held_out: 5 of 5 pairs leave a side empty"),
        (lambda: pf.split(jax.random.key(0), data(), 0.01), r"held_out: 0.01 of 5"),
        (lambda: pf.split(jax.random.key(0), data(), 1.5), r"held_out: expected an integer"),
        (lambda: pf.minibatches(jax.random.key(0), data(), 6), r"size: expected 1 to the 5 pairs"),
        (lambda: pf.subset(data(), [5]), r"index\[0\] is 5, out of range"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(bj.InputError, match=message):
        make()
