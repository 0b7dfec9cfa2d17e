"""The ring buffer: against a list that forgets, in every dtype, under jit, vmap and scan."""

import collections

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import bilevel_jax as bj
from bilevel_jax import replay

KEY = jax.random.key(2)
add, sample = jax.jit(replay.add), jax.jit(replay.sample, static_argnums=2)


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [1, 3, 7])
def test_against_a_list_that_forgets(capacity):
    """Adds of changing sizes, to several times round: the items, their order, and what is there."""
    rng = np.random.default_rng(capacity)
    ring, kept = replay.init(jnp.zeros((), jnp.int32), capacity), collections.deque(maxlen=capacity)
    number = 0
    for _ in range(12):
        count = int(rng.integers(1, capacity + 1))
        items = np.arange(number, number + count, dtype=np.int32) + 100
        number += count
        ring = add(ring, jnp.asarray(items))
        kept.extend(items)
        latest, here = replay.latest(ring)
        assert int(ring.size) == here.sum() == len(kept)
        np.testing.assert_array_equal(latest[here], list(kept)[::-1])
        assert np.all(latest[~here] == 0)
        assert np.all(here == np.sort(here)[::-1])
        assert set(np.asarray(sample(KEY, ring, 50))) <= set(kept)
    assert number > 3 * capacity


def test_samples_are_uniform_over_what_is_there():
    ring = add(replay.init(jnp.zeros(()), 8), jnp.arange(1.0, 6.0))
    drawn = np.asarray(sample(KEY, ring, 20_000)).astype(int)
    assert set(drawn) == {1, 2, 3, 4, 5}
    assert stats.chisquare(np.bincount(drawn)[1:]).pvalue > 1e-4
    full = add(ring, jnp.arange(6.0, 12.0))
    assert set(np.asarray(sample(KEY, full, 2000)).astype(int)) == set(range(4, 12))


def test_any_pytree_in_its_own_types():
    """uint8 stays uint8, keys stay keys, float16 and bool as they are; parts of an item stay together."""
    item = {"frame": jnp.zeros((4, 4, 2), jnp.uint8), "key": KEY, "rest": (jnp.zeros((), jnp.float16), jnp.array(True))}
    shapes = jax.eval_shape(lambda: item)
    for given in (item, shapes):
        ring = replay.init(given, 5)
        assert jax.tree.map(lambda leaf: leaf.dtype, ring.items) == jax.tree.map(lambda leaf: leaf.dtype, item)
    items = {
        "frame": jnp.broadcast_to(jnp.array([7, 200], jnp.uint8)[:, None, None, None], (2, 4, 4, 2)),
        "key": jax.random.split(KEY, 2),
        "rest": (jnp.array([7, 200], jnp.float16), jnp.array([True, False])),
    }
    drawn = sample(KEY, add(ring, items), 40)
    assert drawn["frame"].dtype == np.uint8
    first = np.asarray(drawn["rest"][0]) == 7
    assert 0 < first.sum() < 40
    np.testing.assert_array_equal(drawn["frame"][:, 0, 0, 0] == 7, first)
    np.testing.assert_array_equal(drawn["rest"][1], first)
    keys = jax.random.key_data(items["key"])
    np.testing.assert_array_equal(jax.random.key_data(drawn["key"]), np.asarray(keys)[np.where(first, 0, 1)])


def test_in_a_loop_and_under_vmap():
    """A scan that adds and draws, mapped over several rings, is each ring's own."""

    def run(key, offset):
        def step(ring, h):
            ring = replay.add(ring, (offset + h + jnp.arange(2.0)))
            return ring, replay.sample(jax.random.fold_in(key, h.astype(jnp.uint32)), ring, 3)

        return jax.lax.scan(step, replay.init(jnp.zeros(()), 5), jnp.arange(6.0))

    keys, offsets = jax.random.split(KEY, 3), jnp.array([0.0, 100.0, 200.0])
    together = jax.jit(jax.vmap(run))(keys, offsets)
    for i in range(3):
        alone = run(keys[i], offsets[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a, b[i]), alone, together)
    assert together[0].size.tolist() == [5, 5, 5]


def test_a_donated_ring_is_written_in_place():
    """A buffer may be most of the memory: nothing of its size is made anew."""
    ring = replay.init(jnp.zeros((1000,), jnp.uint8), 1000)
    program = jax.jit(replay.add, donate_argnums=0).lower(ring, jnp.ones((10, 1000), jnp.uint8)).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= 1_000_000
    assert memory.temp_size_in_bytes < 100_000


def test_what_is_added_only_where_it_is_time():
    """Against a Python choice, with a flag that is traced and differs in a batch; it wraps around."""
    flags = [[True, False], [False, False], [True, True], [True, False]]
    rings = jax.vmap(lambda _: replay.init(jnp.zeros(()), 5))(jnp.arange(2))
    lists = [replay.init(jnp.zeros(()), 5) for _ in range(2)]
    for number, pair in enumerate(flags):
        items = 10.0 * number + jnp.arange(3.0)
        rings = jax.jit(jax.vmap(lambda ring, when, items=items: replay.add(ring, items, when)))(
            rings, jnp.asarray(pair)
        )
        lists = [replay.add(ring, items) if when else ring for ring, when in zip(lists, pair, strict=True)]
        for place, ring in enumerate(lists):
            one = jax.tree.map(lambda leaf, place=place: leaf[place], rings)
            assert one.items.tolist() == ring.items.tolist()
            assert (int(one.next), int(one.size)) == (int(ring.next), int(ring.size))


def test_gradients_pass_to_what_was_added():
    ring = replay.init(jnp.zeros(()), 4)
    gradient = jax.grad(lambda v: jnp.sum(replay.latest(replay.add(ring, v))[0] * jnp.arange(4.0)))(jnp.ones(3))
    np.testing.assert_array_equal(gradient, [2, 1, 0])


def test_an_empty_ring_gives_zeros_where_it_is_not_known():
    assert sample(KEY, replay.init(jnp.ones(()), 3), 2).tolist() == [0, 0]
    with pytest.raises(bj.InputError, match="ring: it is empty"):
        replay.sample(KEY, replay.init(jnp.ones(()), 3), 2)


RING = replay.init({"a": jnp.zeros(2), "b": jnp.zeros((), jnp.uint8)}, 3)


def with_two(**parts):
    return {"a": jnp.zeros((2, 2)), "b": jnp.zeros(2, jnp.uint8)} | parts


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: replay.init(jnp.zeros(()), 0), "capacity: "),
        (lambda: replay.init(jnp.zeros(()), 1.5), "capacity: "),
        (lambda: replay.init((), 3), "item: expected a pytree of arrays"),
        (lambda: replay.add(RING, {"a": jnp.zeros((2, 2))}), "items: expected the structure"),
        (
            lambda: replay.add(RING, with_two(a=jnp.zeros((2, 3)))),
            r"items\['a'\]: expected shape .* \[2, 3\]",
        ),
        (lambda: replay.add(RING, with_two(b=jnp.zeros(2))), r"items\['b'\]: expected uint8 as the ring has it"),
        (
            lambda: replay.add(RING, with_two(b=jnp.zeros(1, jnp.uint8))),
            "one leading axis .* got 1 and 2",
        ),
        (lambda: replay.add(replay.init(jnp.zeros(()), 3), jnp.zeros(4)), "N from 1 to the capacity 3, got 4"),
        (lambda: replay.add(replay.init(jnp.zeros(()), 3), jnp.zeros(0)), "N from 1 to the capacity 3, got 0"),
        (lambda: replay.add(replay.init(jnp.zeros(()), 3), jnp.zeros(())), r"items: expected shape \[N, ...\]"),
        (lambda: replay.sample(KEY, eqx.tree_at(lambda r: r.size, RING, jnp.int32(1)), 0), "batch: "),
    ],
)
def test_bad_calls(call, match):
    with pytest.raises(bj.InputError, match=match):
        call()
