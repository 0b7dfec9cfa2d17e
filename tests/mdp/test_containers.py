"""The MDP as a pytree: shapes, batch axes, dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ACTIONS, LAYOUTS, STATES, make_mdp, random_process, transition

import bilevel_jax as bj


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("discount", [0.9, np.full((STATES, ACTIONS), 0.9)], ids=["number", "pairs"])
def test_mdp_round_trips_as_a_pytree(layout, discount):
    mdp = make_mdp(random_process(4), discount, layout)
    leaves, structure = jax.tree.flatten(mdp)
    copies = [
        jax.tree.unflatten(structure, leaves),
        jax.jit(lambda m: m)(mdp),
        jax.tree.map(lambda x: x[0], jax.vmap(lambda m: m)(jax.tree.map(lambda x: jnp.stack([x, x]), mdp))),
        mdp.replace(),
    ]
    assert structure == jax.tree.structure(copies[1])
    for copy in copies:
        assert isinstance(copy, bj.MDP)
        assert (copy.num_states, copy.num_actions, copy.batch_shape) == (STATES, ACTIONS, ())
        jax.tree.map(np.testing.assert_array_equal, copy, mdp)


def test_mdp_is_built_inside_jit_and_vmap():
    process = random_process(5)
    rewards = np.random.default_rng(0).normal(size=(4, STATES, ACTIONS))
    batch = jax.jit(jax.vmap(lambda r: bj.MDP(process.dense, r, 0.9)))(rewards)
    assert batch.reward.shape == (4, STATES, ACTIONS)
    np.testing.assert_array_equal(batch.reward, rewards)
    np.testing.assert_allclose(batch.initial, np.full((4, STATES), 1 / STATES))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [(2,), (2, 3)])
def test_batch_axes_with_a_shared_transition(layout, batch):
    process = random_process(6)
    rewards = np.random.default_rng(0).normal(size=(*batch, STATES, ACTIONS))
    mdp = bj.MDP(transition(process, layout), rewards, 0.9, process.initial)
    assert mdp.batch_shape == batch
    assert mdp.transition.shape == (STATES, ACTIONS)  # shared, not copied
    assert mdp.initial.shape == (*batch, STATES)
    np.testing.assert_array_equal(mdp.initial, np.broadcast_to(process.initial, mdp.initial.shape))
    np.testing.assert_array_equal(mdp.modulus, np.full(batch, 0.9))
    stacked = jax.tree.map(lambda x: np.broadcast_to(x, (*batch, *x.shape)), mdp.transition)
    assert bj.MDP(stacked, rewards, 0.9).transition.shape == (*batch, STATES, ACTIONS)


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        ((), (2,)),
        ((2,), (2,)),
        ((STATES, ACTIONS), (2, STATES, ACTIONS)),
        ((2, STATES, ACTIONS), (2, STATES, ACTIONS)),
    ],
)
def test_discount_takes_numbers_pairs_and_batch_axes(shape, kept):
    process = random_process(7)
    discount = np.random.default_rng(0).uniform(0, 0.9, shape)
    mdp = bj.MDP(process.dense, np.stack([process.reward] * 2), discount)
    assert mdp.discount.shape == kept
    events = np.broadcast_to(discount, kept).reshape(2, -1)
    np.testing.assert_array_equal(mdp.modulus, events.max(-1))


def test_dtypes():
    process = random_process(8)
    ints = bj.MDP(process.dense, np.ones((STATES, ACTIONS), int), 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(ints)} == {np.dtype("float64")}
    narrow = bj.MDP(np.float32(process.dense), np.float32(process.reward), 0.9, process.initial)
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {np.dtype("float32")}
    for mode in ("strict", "standard"):
        with jax.numpy_dtype_promotion(mode):
            wide = bj.MDP(np.float32(process.dense), process.reward, np.float32(0.9))
        assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype("float64")}
    sparse = make_mdp(process, 0.9, "successor")
    assert sparse.transition.successor.dtype == np.int32


def test_an_mdp_keeps_its_own_numbers():
    """JAX reads numpy's memory where it is aligned: arrays of these sizes are, in about half of the tries."""
    transition, probability = np.zeros((1, 500, 100), np.int32), np.ones((1, 500, 100))
    for _ in range(10):
        reward = np.ones((500, 100))
        mdp = bj.MDP(bj.SuccessorTransition(transition, probability), reward, 0.9)
        reward[:] = 2
        probability[:] = 3
        np.testing.assert_array_equal(mdp.reward, 1)
        np.testing.assert_array_equal(mdp.transition.probability, 1)
        probability[:] = 1
