"""Networks: their numbers against plain numpy, their adapters against the modules themselves."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bilevel_jax as bj
from bilevel_jax.networks.linen import Linen
from bilevel_jax.networks.nnx import NNX

KEY = jax.random.key(0)
FRAMES = jax.random.randint(KEY, (84, 84, 4), 0, 255).astype(jnp.uint8)


def convolutional(cls):
    return pytest.param(cls(), FRAMES, marks=pytest.mark.slow, id=cls.__name__)


def build(key, observation, outputs):
    return eqx.nn.MLP(observation.size, outputs, width_size=8, depth=1, key=key)


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(4)(x)))


def layers(rngs):
    return nnx.Sequential(
        nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.Dropout(0.5, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
    )


VECTOR = jnp.array([0.3, -1.0, 2.0])
NETWORKS = [
    pytest.param(bj.networks.MLP(width=8), VECTOR, id="mlp"),
    pytest.param(bj.networks.MLP(depth=0), {"a": VECTOR, "b": jnp.asarray(3)}, id="linear"),
    pytest.param(bj.networks.OneHot(5, bj.networks.MLP(width=8)), jnp.asarray(3), id="one hot"),
    pytest.param(bj.networks.Scaled(jnp.array([0.1, 2.0, 1.0]), 0.5, bj.networks.MLP(width=8)), VECTOR, id="scaled"),
    pytest.param(bj.networks.equinox.Equinox(build), VECTOR, id="equinox"),
    pytest.param(Linen(Dense()), VECTOR, id="linen"),
    pytest.param(NNX(layers), VECTOR, id="nnx"),
    convolutional(bj.networks.NatureCNN),
    convolutional(bj.networks.RewardCNN),
]


@pytest.mark.parametrize(("network", "observation"), NETWORKS)
class TestEveryNetwork:
    def test_keeps_the_protocol(self, network, observation):
        """Parameters are an upper variable; the same under jit and vmap, and one compilation for other parameters."""
        params = network.init(KEY, observation, 2)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), observation)
        jax.tree.map(np.testing.assert_array_equal, params, network.init(KEY, shapes, 2))
        jax.tree.map(np.testing.assert_array_equal, params, bj.bilevel.as_upper_variable(params))
        made = network.apply(params, observation)
        assert made.shape == (2,)
        assert bool(jnp.isfinite(made).all())
        traces = []

        @jax.jit
        def apply(network, params, observation):
            traces.append(1)
            return network.apply(params, observation)

        np.testing.assert_allclose(apply(network, params, observation), made, rtol=1e-5)
        other = jax.tree.map(lambda leaf: leaf + 1, params)
        np.testing.assert_allclose(apply(network, other, observation), network.apply(other, observation), rtol=1e-5)
        assert len(traces) == 1
        both = jax.tree.map(lambda a, b: jnp.stack([a, b]), params, other)
        np.testing.assert_allclose(jax.vmap(network.apply, (0, None))(both, observation)[0], made, rtol=1e-5)

    def test_seeds_differ(self, network, observation):
        draws = [jax.flatten_util.ravel_pytree(network.init(jax.random.key(k), observation, 2))[0] for k in (0, 1)]
        zero = isinstance(network, bj.networks.OneHot) and network.network.output_scale == 0
        assert zero or float(jnp.abs(draws[0] - draws[1]).max()) > 1e-3

    def test_derivatives(self, network, observation):
        """Along a random direction, against central differences in float64."""
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), network.init(KEY, observation, 2))  # flax: float32
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        direction = jax.random.normal(jax.random.key(7), flat.shape, flat.dtype) / flat.size**0.5

        def along(t):
            return network.apply(unravel(flat + t * direction), observation)

        forward = jax.jvp(along, (0.0,), (1.0,))[1]
        np.testing.assert_allclose(forward, (along(1e-6) - along(-1e-6)) / 2e-6, rtol=2e-5, atol=1e-8)


def test_mlp_against_numpy():
    network = bj.networks.MLP(width=8, depth=2)
    params = network.init(KEY, VECTOR, 3)
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    hidden = np.asarray(VECTOR)
    for k in (0, 1):
        weight, bias, scale, offset = arrays[4 * k : 4 * k + 4]
        hidden = weight @ hidden + bias
        hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5) * scale + offset
        hidden = np.maximum(hidden, 0)
    np.testing.assert_allclose(network.apply(params, VECTOR), arrays[8] @ hidden + arrays[9], rtol=1e-12)
    np.testing.assert_allclose(arrays[4] @ arrays[4].T, 2 * np.eye(8), atol=1e-12)  # orthogonal, gain sqrt(2)


def test_scaled_observations():
    inner = bj.networks.MLP(width=8)
    network = bj.networks.Scaled(jnp.array([0.1, 2.0, 1.0]), 0.5, inner)
    params = network.init(KEY, VECTOR, 2)
    want = inner.apply(params, (VECTOR - 0.5) / jnp.array([0.1, 2.0, 1.0]))
    np.testing.assert_allclose(network.apply(params, VECTOR), want, rtol=1e-12)
    with pytest.raises(bj.InputError, match="scale"):
        bj.networks.Scaled(0.0)
    with pytest.raises(bj.InputError, match="offset is nan"):
        bj.networks.Scaled(1.0, jnp.nan)
    for name in ("scale", "offset"):
        with pytest.raises(bj.InputError, match=rf"{name}: expected a number or shape \[3\], .* got shape \[4\]"):
            bj.networks.Scaled(**{name: jnp.ones(4)}).init(KEY, VECTOR, 2)


def test_linen_against_the_module():
    with jax.numpy_dtype_promotion("standard"):  # flax's parameters are float32
        params = Dense().init(KEY, VECTOR)
        want = Dense().apply(params, VECTOR)
    np.testing.assert_array_equal(Linen(Dense()).apply(params, VECTOR), want)


def test_statistics_of_a_linen_module_are_constants():
    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.BatchNorm(use_running_average=True)(x))

    network = Linen(Normalized())
    params = network.init(KEY, VECTOR, 2)
    gradient = jax.grad(lambda params: jnp.sum(network.apply(params, VECTOR)))(params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient["batch_stats"]))
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(gradient["params"]))


def test_nnx_against_the_module():
    module = layers(nnx.Rngs(KEY))
    module.eval()
    network = NNX(layers)
    with jax.numpy_dtype_promotion("standard"):  # flax's parameters are float32
        want = module(VECTOR)
    np.testing.assert_allclose(network.apply(network.init(KEY, VECTOR, 2), VECTOR), want, rtol=1e-12)


def test_what_cannot_be_a_network_is_refused():
    with pytest.raises(bj.InputError, match=r"module: expected 3 outputs, got shape \[2\]"):
        Linen(Dense()).init(KEY, VECTOR, 3)
    with pytest.raises(bj.InputError, match="build: expected 3 outputs"):
        NNX(layers).init(KEY, VECTOR, 3)
    with pytest.raises(bj.InputError, match="no parameter"):
        NNX(lambda rngs: nnx.BatchNorm(3, rngs=rngs)).init(KEY, VECTOR, 3)
    with pytest.raises(bj.InputError, match="int32 array"):
        bj.networks.equinox.Equinox(_Counter).init(KEY, VECTOR, 3)
    with pytest.raises(bj.InputError, match=r"module: it asks for random numbers.*deterministic=True"):
        Linen(nn.Sequential([nn.Dense(3), nn.Dropout(0.5, deterministic=False)])).init(KEY, VECTOR, 3)
    with pytest.raises(bj.InputError, match=r"module: it changes more than its parameters.*use_running_average=True"):
        Linen(nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False)])).init(KEY, VECTOR, 3)
    for state in (-1, 8):
        with pytest.raises(bj.InputError, match=f"observation: expected a state from 0 to 7, got {state}"):
            bj.networks.OneHot(8).apply(bj.networks.OneHot(8).init(KEY, jnp.asarray(0), 3), jnp.asarray(state))
    with pytest.raises(bj.InputError, match="expected a frame"):
        bj.networks.NatureCNN().init(KEY, VECTOR, 3)
    with pytest.raises(bj.InputError, match="20 x 20 is too small"):
        bj.networks.NatureCNN().init(KEY, jnp.zeros((20, 20, 4)), 3)
    with pytest.raises(bj.InputError, match="width"):
        bj.networks.MLP(width=0)
    with pytest.raises(bj.InputError, match="depth"):
        bj.networks.MLP(depth=-1)
    with pytest.raises(bj.InputError, match="activation"):
        bj.networks.MLP(activation="swish")


class _Counter(eqx.Module):
    count: jax.Array

    def __init__(self, key, observation, outputs):
        self.count = jnp.zeros((), jnp.int32)

    def __call__(self, observation):
        return observation


@pytest.mark.slow
def test_a_state_that_there_is_not_has_no_number():
    network = bj.networks.OneHot(8, bj.networks.MLP(width=4))
    params = network.init(KEY, jnp.asarray(0), 3)
    made = jax.jit(jax.vmap(network.apply, (None, 0)))(params, jnp.array([-1, 0, 7, 8]))
    assert np.isnan(np.asarray(made)).all(1).tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("states", "dtype"), [(600, jnp.uint8), (256, jnp.uint8), (200, jnp.int8), (2, jnp.bool), (5, jnp.float32)]
)
def test_states_of_narrow_types_are_those_numbers(states, dtype):
    network = bj.networks.OneHot(states)
    params = jax.tree.map(
        lambda leaf: jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape), network.init(KEY, jnp.asarray(0), 1)
    )
    for run in (network.apply, jax.jit(network.apply)):
        np.testing.assert_array_equal(run(params, jnp.asarray(1, dtype)), run(params, jnp.asarray(1)))
    if dtype == jnp.float32:
        assert np.isnan(jax.jit(network.apply)(params, jnp.asarray(2.5, dtype))).all()


def test_dropouts_are_off():
    def build(key, observation, outputs):
        layer = eqx.nn.Linear(observation.size, outputs, key=key)
        return eqx.nn.Sequential([layer, eqx.nn.Dropout(0.9)])

    network = bj.networks.equinox.Equinox(build)
    params = network.init(KEY, VECTOR, 4)
    want = params.arrays[0].weight @ VECTOR + params.arrays[0].bias
    np.testing.assert_allclose(network.apply(params, VECTOR), want, rtol=1e-12)


@pytest.mark.slow
def test_frames_of_bytes_are_divided_once():
    network = bj.networks.NatureCNN(width=8)
    params = network.init(KEY, FRAMES, 2)
    np.testing.assert_allclose(
        network.apply(params, FRAMES), network.apply(params, FRAMES.astype(jnp.float64) / 255), rtol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [bj.networks.NatureCNN, bj.networks.RewardCNN])
def test_channels_may_come_first(kind):
    last, first = kind(), kind(channels="first")
    params = first.init(KEY, jnp.moveaxis(FRAMES, -1, 0), 2)
    want = last.apply(last.init(KEY, FRAMES, 2), FRAMES)
    np.testing.assert_array_equal(first.apply(params, jnp.moveaxis(FRAMES, -1, 0)), want)
    with pytest.raises(bj.InputError, match="channels: expected last or first"):
        kind(channels="middle")


class TestRewards:
    space = bj.environments.Discrete(3)
    box = bj.environments.Box(-1.0, 1.0, (2,))

    def test_of_the_state(self):
        model = bj.networks.RewardNetwork(bj.networks.MLP(width=8), "state", self.space, scale=2.0)
        x = model.init(KEY, VECTOR)
        want = 2 * model.network.apply(x, VECTOR)[0]
        reward = model(x)
        np.testing.assert_allclose(reward.all(VECTOR), [want] * 3)
        np.testing.assert_allclose(reward(VECTOR, 1), want)
        np.testing.assert_allclose(reward.of_step(VECTOR, 1, VECTOR + 1), want)

    def test_of_numbered_actions(self):
        model = bj.networks.RewardNetwork(bj.networks.MLP(width=8), "state_action", self.space)
        x = model.init(KEY, VECTOR)
        every = model.network.apply(x, VECTOR)
        np.testing.assert_allclose(model(x).all(VECTOR), every)
        np.testing.assert_allclose(model(x).of_step(VECTOR, 2, VECTOR), every[2])

    def test_of_continuous_actions(self):
        model = bj.networks.RewardNetwork(bj.networks.MLP(width=8), "state_action", self.box)
        x = model.init(KEY, VECTOR)
        one, other = (model(x)(VECTOR, jnp.full(2, action)) for action in (0.0, 1.0))
        assert one.shape == ()
        assert float(jnp.abs(one - other)) > 1e-6
        with pytest.raises(bj.InputError, match="no finite set"):
            model(x).all(VECTOR)

    def test_of_the_next_state(self):
        model = bj.networks.RewardNetwork(bj.networks.MLP(width=8), "next_state", self.space)
        x = model.init(KEY, VECTOR)
        want = model.network.apply(x, VECTOR + 1)[0]
        np.testing.assert_allclose(model(x).of_step(VECTOR, 0, VECTOR + 1), want)
        for ask in (lambda: model(x)(VECTOR, 0), lambda: model(x).all(VECTOR)):
            with pytest.raises(bj.InputError, match="function of the next state"):
                ask()

    @pytest.mark.slow
    def test_ensembles(self):
        one = bj.networks.RewardNetwork(bj.networks.MLP(width=8), "state_action", self.space)
        model = bj.networks.Ensemble(one, 4)
        x = model.init(KEY, VECTOR)
        members = model.members_of(x, VECTOR, 1, VECTOR)
        assert members.shape == (4,)
        assert float(members.std()) > 1e-3
        np.testing.assert_allclose(model(x)(VECTOR, 1), members.mean())
        np.testing.assert_allclose(model(x).all(VECTOR)[1], members.mean())
        np.testing.assert_allclose(model(x).of_step(VECTOR, 1, VECTOR), members.mean())

    def test_other_inputs_are_refused(self):
        with pytest.raises(bj.InputError, match=r"inputs: expected state.*'action'"):
            bj.networks.RewardNetwork(bj.networks.MLP(), "action", self.space)
        with pytest.raises(bj.InputError, match="members"):
            bj.networks.Ensemble(bj.networks.RewardNetwork(bj.networks.MLP(), "state", self.space), 0)


def test_modules_of_another_size_are_refused():
    network = bj.networks.equinox.Equinox(lambda key, observation, outputs: eqx.nn.Linear(3, 5, key=key))
    with pytest.raises(bj.InputError, match=r"build: expected 2 outputs, got shape \[5\]"):
        network.init(jax.random.key(0), jnp.zeros(3), 2)


@pytest.mark.parametrize("bound", [0.0, -1.0, np.nan, np.inf])
def test_bounds_of_rewards_that_bound_nothing_are_refused(bound):
    space = bj.environments.Discrete(2)
    with pytest.raises(bj.InputError, match="bound"):
        bj.networks.RewardNetwork(bj.networks.MLP(width=8), "state", space, bound=bound)
