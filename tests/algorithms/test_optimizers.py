"""Every optimizer of optax in every algorithm: the second step compiles nothing, and what is missing is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import but, upper_problem, upper_start
from sampled_helpers import garnet
from test_upper_level import ALGORITHMS, KEY

import bilevel_jax as bj
from bilevel_jax.algorithms import UpperLevel, implicit, m_sobirl

NAMES = """adabelief adadelta adafactor adagrad adam adamax adamw adan amsgrad fromage lamb lars lion nadam novograd
optimistic_gradient_descent radam rmsprop rprop sgd sign_sgd sm3 yogi"""
OPTIMIZERS = {name: getattr(optax, name)(0.1) for name in NAMES.split()} | {
    "noisy_sgd": optax.noisy_sgd(0.1, key=jax.random.key(0)),
    "polyak_sgd": optax.polyak_sgd(1.0),
    "lbfgs": optax.lbfgs(),
    "lbfgs without a search": optax.lbfgs(0.1, linesearch=None),
    "lbfgs, backtracking": optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(10)),
    "momo": optax.contrib.momo(1.0),
    "prodigy": optax.contrib.prodigy(1.0),
    "dadapt_adamw": optax.contrib.dadapt_adamw(1.0),
    "dog": optax.contrib.dog(1.0),
    "cocob": optax.contrib.cocob(),
    "mechanize": optax.contrib.mechanize(optax.sgd(0.1)),
    "schedule_free": optax.contrib.schedule_free_sgd(0.1),
    "reduce_on_plateau": optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "a schedule": optax.adam(optax.cosine_decay_schedule(0.1, 10)),
    "apply_if_finite": optax.apply_if_finite(optax.sgd(0.1), 2),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.ema(0.9), optax.trace(0.9)),
    "flatten": optax.flatten(optax.adam(0.1)),
}


def types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)), tree)


@pytest.mark.often(8)
@pytest.mark.few(12)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_keeps_its_types_in_every_optimizer(name, dtype):
    upper = UpperLevel(OPTIMIZERS[name])
    x = {"a": jnp.ones((2, 3), dtype), "b": jnp.ones(1, dtype)}

    def phi(x):
        return jnp.sum(x["a"] ** 2) + jnp.sum(x["b"] ** 2)

    @jax.jit
    def update(x, state):
        value, gradient = jax.value_and_grad(phi)(x)
        return upper.update(gradient, state, x, value, phi)

    state = jax.jit(lambda x: upper.init(x, phi))(x)
    for _ in range(3):
        moved, after, _ = update(x, state)
        assert types(state) == types(after)
        assert types(moved) == types(x)
        x, state = moved, after
    assert update._cache_size() == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(x))


@pytest.mark.often(5)
@pytest.mark.parametrize("optimizer", ["adam", "polyak_sgd", "reduce_on_plateau", "inject_hyperparams", "momo"])
@pytest.mark.parametrize("name", but(["implicit", "m_sobirl", "sobirl"], ALGORITHMS))
def test_states_keep_their_types_in_every_algorithm(name, optimizer):
    problem, x = garnet(), jnp.zeros((5, 2))
    algorithm = ALGORITHMS[name](problem, UpperLevel(OPTIMIZERS[optimizer]))
    state = jax.eval_shape(lambda key: algorithm.init(key, x), KEY)
    after, _ = jax.eval_shape(algorithm.step, KEY, state)
    assert types(state) == types(after)


@pytest.mark.parametrize("name", but(["amd", "naive"], [name for name in ALGORITHMS if name != "implicit"]))
def test_a_line_search_is_refused_by_name_where_phi_is_not_evaluated(name):
    problem, x = garnet(), jnp.zeros((5, 2))
    algorithm = ALGORITHMS[name](problem, optax.lbfgs())
    with pytest.raises(bj.InputError, match="optimizer: it evaluates the objective at points of its own"):
        algorithm.init(KEY, x)


@pytest.mark.parametrize("make", [implicit, m_sobirl])
def test_an_argument_that_nobody_has_is_named(make):
    def update(updates, state, params=None, *, second_derivative, **rest):
        return updates, state

    optimizer = optax.GradientTransformationExtraArgs(lambda x: optax.EmptyState(), update)
    with pytest.raises(bj.InputError, match="'second_derivative'"):
        make(upper_problem("shannon"), optimizer).init(KEY, upper_start())


def test_an_error_of_the_optimizer_is_its_own():
    def update(updates, state, params=None, **rest):
        raise TypeError("mine")

    optimizer = optax.GradientTransformationExtraArgs(lambda x: optax.EmptyState(), update)
    with pytest.raises(TypeError, match="mine"):
        implicit(upper_problem("shannon"), optimizer).init(KEY, upper_start())


@pytest.mark.slow
@pytest.mark.parametrize(("make", "optimizer"), [(implicit, "lbfgs"), (m_sobirl, "polyak_sgd")])
def test_the_second_step_compiles_nothing(make, optimizer):
    import importlib

    step = importlib.import_module("bilevel_jax.algorithms.base")._step
    algorithm = make(upper_problem("shannon"), OPTIMIZERS[optimizer])
    state, before = algorithm.init(KEY, upper_start()), step._cache_size()
    values = []
    for _ in range(3):
        state, info = algorithm.step(KEY, state)
        values.append(float(info.objective))
    assert step._cache_size() == before + 1
    assert values[2] < values[1] < values[0]
