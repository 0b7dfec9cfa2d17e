"""What numbers come in as: whole ones of any size, half precision, other types, and JAX's own settings."""

import datetime

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from scipy import sparse

import bilevel_jax as bj
from bilevel_jax import agents, algorithms, environments, estimators, preferences

# Two states: action 0 stays, action 1 goes to the other.
P = np.array([[[1, 0], [0, 1]], [[0, 1], [1, 0]]])
R = np.array([[0, 1], [2, 0]])
U = bj.Unregularized()
KEY = jax.random.key(0)


def mdp(discount=0.5, reward=R):
    return bj.MDP(P, reward, discount)


def problem(**options):
    return bj.problems.make("garnet", states=2, actions=2, branching=2, **options)


def simulator():
    return environments.TabularEnvironment(mdp())


def sampled(discount):
    def loss(key, x, trajectories):
        return jnp.zeros(())

    return bj.SampledBilevelProblem(
        simulator(), lambda x: x, bj.ShannonEntropy(1), loss, discount=0, horizon=2, loss_discount=discount
    )


ONE_SWEEP = bj.ValueIteration(max_iterations=1)


def narrow(leaf):
    return leaf.astype(np.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


SGD = optax.sgd(0.1)

TOOLBOX = "reward from mdptoolbox"

# Where numbers come in that are computed with: shape of the argument, and what becomes of it.
FLOATS = {
    "reward": ((2, 2), lambda v: mdp(reward=v).reward),
    "rewards of a batch": ((3, 2, 2), lambda v: mdp(reward=v).reward),
    "reward of successors": ((2, 2), lambda v: bj.MDP(successors(), v, 0.5).reward),
    "temperature": ((), lambda v: bj.ShannonEntropy(v).temperature),
    "KL's temperature": ((), lambda v: bj.KLDivergence(v, [0.5, 0.5]).temperature),
    "Tsallis' temperature": ((), lambda v: bj.TsallisEntropy(v).temperature),
    "initial_value": ((2,), lambda v: bj.solve(mdp(), U, solver=ONE_SWEEP, initial_value=v).q),
    "initial_bias": ((2,), lambda v: bj.solve_average_reward(mdp(), U, initial_bias=v).bias),
    "terminal_value": ((2,), lambda v: bj.solve_finite_horizon(mdp(), U, 1, terminal_value=v).value),
    "Table": ((2, 2), lambda v: bj.Table(v).values),
    "features": ((2, 2), lambda v: bj.Linear(v, np.ones((2, 2))).features),
    "weights": ((2, 2), lambda v: bj.Linear(np.ones((2, 2)), v).weights),
    "Polynomial": ((), lambda v: agents.Polynomial(v, v).scale),
    "step_size": ((), lambda v: agents.SoftQLearning(step_size=v).step_size.initial),
    "agent's initial_value": ((), lambda v: agents.SoftQLearning(initial_value=v).initial_value),
    "agent's features": ((2, 2), lambda v: agents.SoftQLearning(features=v).features),
    "cooling": ((), lambda v: algorithms.Cooling(v, v).iterations),
    "clip": ((), lambda v: algorithms.Reuse(clip=v).clip),
    "radius": ((), lambda v: algorithms.zero_order(problem(), SGD, agent=agents.ExactAgent(), radius=v).radius),
    "rationality": ((), lambda v: preferences.Teacher(v).rationality),
    "returns": ((2,), lambda v: preferences.log_likelihood(v, v, np.ones(2))),
    "returns' probability": ((2,), lambda v: preferences.preference_probability(v, v)),
    "rewards of a segment": ((3, 2), lambda v: preferences.segment_return(v, np.ones((3, 2), bool))),
    "reward from scipy": (
        (2, 2),
        lambda v: bj.interchange.from_scipy(sparse.csr_array(P.reshape(4, 2)), v, 0.5).reward,
    ),
    TOOLBOX: ((2, 2), lambda v: bj.interchange.from_mdptoolbox(np.moveaxis(P, 1, 0), v, 0.5).reward),
    "reward from quantecon": ((2, 2), lambda v: bj.interchange.from_quantecon(v, P, 0.5).reward),
    "price": ((), lambda v: problem(price=v).price),
    "loss_discount": ((), lambda v: sampled(v).loss_discount),
}

# Numbers that are indices or counts, by the argument's name.
WHOLE = {
    "transition.successor": lambda n: bj.SuccessorTransition(np.array([[[0, 1], [1, n]]]), np.ones((1, 2, 2))),
    "actions": lambda n: environments.rollout_from(
        jax.random.split(KEY, 2), simulator(), bj.Table(P[0]), jnp.zeros(2, jnp.int32), horizon=2, actions=[0, n]
    ),
    "starts": lambda n: environments.segments(
        environments.rollout(KEY, simulator(), bj.Table(P[0]), batch=2, horizon=2), [0, n], 2
    ),
    "restart_every": lambda n: agents.SoftQLearning(restart_every=n),
    "steps": lambda n: environments.TimeLimit(simulator(), n),
    "max_iterations": lambda n: bj.ValueIteration(max_iterations=n),
    "max_iterations of policies": lambda n: bj.PolicyIteration(max_iterations=n),
    "max_iterations of averages": lambda n: bj.RelativeValueIteration(max_iterations=n),
    "max_iterations of BiCGStab": lambda n: bj.BiCGStab(max_iterations=n),
    "max_cycles": lambda n: bj.GMRES(max_cycles=n),
    "restart": lambda n: bj.GMRES(restart=n),
    "terms": lambda n: bj.Neumann(n),
    "iterations of a descent": lambda n: bj.Descent(iterations=n),
    "sweeps": lambda n: bj.Unrolled(n),
    "horizon": lambda n: bj.solve_finite_horizon(mdp(), U, n),
    "batch": lambda n: environments.rollout(KEY, simulator(), bj.Table(P[0]), batch=n, horizon=2),
    "processes": lambda n: agents.SoftQLearning(processes=n),
    "length": lambda n: estimators.NestedRollouts(length=n),
    "iterations": lambda n: algorithms.stoc_schedule(n, discount=0.5),
    "sweeps of amd": lambda n: algorithms.amd(problem(), SGD, sweeps=n),
    "batch of hpgd": lambda n: algorithms.hpgd(problem(), SGD, agent=agents.ExactAgent(), batch=n),
    "num_states": lambda n: bj.MatrixFreeTransition(lambda p, v: v[:, None], (), n, 1),
}


def successors():
    return bj.SuccessorTransition(np.array([[[0, 1], [1, 0]]]), np.ones((1, 2, 2)))


def python_ints(array):
    return np.vectorize(int, otypes=[object])(array).tolist()


def numpy_scalars(array):
    return np.int64(array) if np.ndim(array) == 0 else [numpy_scalars(part) for part in array]


SPELLINGS = {
    "int64": lambda v: np.asarray(v, np.int64),
    "uint64": lambda v: np.asarray(v, np.uint64),
    "lists": python_ints,
    "numpy scalars": numpy_scalars,
    "objects": lambda v: np.vectorize(int, otypes=[object])(v),
    "big-endian": lambda v: np.asarray(v, ">i8"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", FLOATS)
def test_whole_numbers_of_64_bits_do_not_wrap(name, spelling):
    shape, call = FLOATS[name]
    # 2^32 + 8 would be 8, and 3 * 10^9 below 0.
    numbers = np.resize([2**32 + 8, 3_000_000_000], shape)
    with jax.enable_x64(False):
        made, expected = call(SPELLINGS[spelling](numbers)), call(numbers.astype(np.float64))
        assert made.dtype == np.float32
    np.testing.assert_array_equal(made, expected)
    assert np.max(np.abs(np.asarray(made))) > 1e8 or name in ("returns", "returns' probability", "initial_bias")


def test_the_policy_of_large_costs_is_that_of_small_ones():
    with jax.enable_x64(False):
        for costs in ([[-3_000_000_000, 0], [0, 0]], np.array([[-(10**18), 0], [0, 0]]), [[-(10**30), 0], [0, 0]]):
            policy = bj.check(bj.solve(mdp(reward=costs), U)).policy
            assert policy[0].tolist() == [0, 1]


def test_whole_numbers_beyond_64_bits():
    with jax.enable_x64(False):
        assert (
            mdp(reward=[[10**30, -(10**25)], [2**63, 2**64]]).reward.tolist()
            == np.array([[1e30, -1e25], [2.0**63, 2.0**64]], np.float32).tolist()
        )
        with pytest.raises(bj.InputError, match=r"^reward\[0, 1\] is 1e\+39, beyond float32 .*jax_enable_x64"):
            mdp(reward=[[0, 10**39], [0, 0]])
    with pytest.raises(bj.InputError, match=r"^reward: a whole number is beyond float64; use smaller units"):
        mdp(reward=[[0, 10**400], [0, 0]])


@pytest.mark.parametrize("number", [2**31, 2**32, 2**32 + 1, -(2**32) + 1, 2**63, 2**70, 10**400])
@pytest.mark.parametrize("name", WHOLE)
def test_counts_and_indices_are_in_range(name, number):
    spellings = [number] if abs(number) >= 2**63 else [number, np.int64(number)]
    for x64 in (False, True):
        for spelled in spellings:
            with jax.enable_x64(x64), pytest.raises(bj.InputError) as error:
                WHOLE[name](spelled)
            message = str(error.value)
            assert message.startswith(name.split(" of ")[0])
            # In a list beside small numbers, numpy makes 2^63 a float.
            assert any(said in message for said in (str(number), "expected integers, got float64", "of at least"))
            assert ";" in message  # the remedy


def test_parameters_of_functions_that_are_whole():
    def kernel(at):
        return bj.MatrixFreeTransition(lambda p, v: v[p["at"]], {"at": at}, 2, 1)

    assert kernel(np.array([[0], [1]])).expect(jnp.array([3.0, 4.0])).tolist() == [[3], [4]]
    with jax.enable_x64(False):
        for number in (2**31, 2**32, -(2**32) + 1):
            with pytest.raises(bj.InputError, match=rf"^parameters\['at'\]\[1, 0\] is {number}, beyond int32"):
                kernel(np.array([[0], [number]]))


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("spell", [int, np.int64, np.uint8, np.int16])
def test_counts_and_indices_of_numpy(name, spell):
    WHOLE[name](spell(1))


@pytest.mark.parametrize("name", sorted(set(WHOLE) - {"transition.successor", "actions", "starts"}))
def test_booleans_are_no_counts(name):
    for flag in (True, np.True_):
        with pytest.raises(bj.InputError, match=rf"^{name.split(' of ')[0]}: expected an? .*True"):
            WHOLE[name](flag)


def test_booleans_are_0_and_1_where_numbers_are_computed_with():
    goal = np.array([[True, False], [False, True]])
    assert mdp(reward=goal).reward.tolist() == [[1, 0], [0, 1]]
    assert bj.MDP(P == 1, R, 0.5).transition.probability.tolist() == P.tolist()
    assert bj.MDP(P, R, 0.5, [True, False]).initial.tolist() == [1, 0]
    assert bj.KLDivergence(1, [True, False]).reference.tolist() == [1, 0]
    assert bj.policy_value(mdp(0), goal).tolist() == [0, 0]
    with pytest.raises(bj.InputError, match=r"discount must be .* below 1, got 1"):
        mdp(True)


WRAPPED = {
    "transition": lambda n: bj.MDP([[[n, 0], [0, 1]], [[0, 1], [1, 0]]], R, 0.5),
    "initial": lambda n: bj.MDP(P, R, 0.5, [n, 0]),
    "reference": lambda n: bj.KLDivergence(1, [n, 0]),
    "transition.probability": lambda n: bj.SuccessorTransition(np.zeros((1, 1, 1), int), [[[n]]]),
    "discount": lambda n: mdp(n - 1),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_probabilities_that_would_wrap_to_1_are_refused(name):
    with jax.enable_x64(False):
        WRAPPED[name](1)
        for one in (2**32 + 1, np.int64(2**32 + 1), 2**64 + 1):
            with pytest.raises(bj.InputError, match=rf"^{name}"):
                WRAPPED[name](one)


HALF = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("kind", HALF)
@pytest.mark.parametrize("name", FLOATS)
def test_half_precision_is_widened(name, kind):
    shape, call = FLOATS[name]
    numbers = np.resize(np.array([0.5, 0.25], HALF[kind]), shape)
    for x64 in (True, False):
        with jax.enable_x64(x64):
            spellings = [numbers, jnp.asarray(numbers), numbers.tolist(), numbers[()]]
            expected = call(numbers.astype(np.float32))
            for spelled in spellings:
                np.testing.assert_allclose(call(spelled), expected, rtol=1e-6)
            assert call(numbers).dtype.itemsize >= 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", HALF)
def test_a_process_in_half_precision_is_solved_in_float32(kind):
    half = HALF[kind]
    parts = [P.astype(half), R.astype(half), half(0.5), np.array([0.25, 0.75], half)]
    for transition in (
        parts[0],
        bj.SuccessorTransition(np.array([[[0, 1], [1, 0]]]), np.ones((1, 2, 2), half)),
        bj.StencilTransition([(0,), (1,), (-1,)], stencil(half), (2,)),
        bj.MatrixFreeTransition(lambda p, v: p @ v, jnp.asarray(parts[0]), 2, 2),
    ):
        process = bj.MDP(transition, *parts[1:])
        assert {leaf.dtype for leaf in jax.tree.leaves(process) if leaf.dtype != np.int32} == {np.dtype(np.float32)}
        np.testing.assert_array_equal(process.transition.expect(jnp.array([1, 2], np.float32)), P @ [1, 2])
    for regularizer in (bj.ShannonEntropy(half(0.5)), kl(half)):
        assert_solved(bj.MDP(*parts), regularizer)


def assert_solved(process, regularizer):
    exact = bj.solve(bj.MDP(P, R, 0.5), jax.tree.map(lambda leaf: leaf.astype(float), regularizer))
    np.testing.assert_allclose(bj.check(bj.solve(process, regularizer)).value, exact.value, rtol=1e-5)


def kl(half):
    return bj.KLDivergence(half(0.5), np.array([0.25, 0.75], half))


def stencil(half):
    """P by the offsets 0, 1, -1, [K, S, A]."""
    stay, right, left = np.array([[1, 0], [1, 0]]), np.array([[0, 1], [0, 0]]), np.array([[0, 0], [0, 1]])
    return np.stack([stay, right, left]).astype(half)


@pytest.mark.slow
@pytest.mark.parametrize("kind", HALF)
def test_half_precision_inside_jit_vmap_and_grad(kind):
    reward = jnp.asarray(R, HALF[kind])

    def value(r):
        return bj.solve(bj.MDP(P, r, 0.5), bj.ShannonEntropy(1)).value

    expected = value(jnp.asarray(R, jnp.float32))
    np.testing.assert_allclose(jax.jit(value)(reward), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(value)(reward[None])[0], expected, rtol=1e-6)
    gradient = jax.grad(lambda r: value(r)[0])(reward)
    wide = jax.grad(lambda r: value(r)[0])(reward.astype(jnp.float32))
    assert gradient.dtype == reward.dtype
    np.testing.assert_allclose(gradient.astype(float), wide, rtol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kind", HALF)
def test_an_upper_variable_in_half_precision(kind):
    x = {"a": jnp.asarray([[0.5, 0.25], [1, 2]], HALF[kind])}
    bilevel = bj.BilevelProblem(
        lambda x: bj.MDP(P.astype(np.float32), R.astype(np.float32) - x["a"], 0.5),
        bj.ShannonEntropy(1),
        lambda x, s: s.value[0] + jnp.sum(x["a"] ** 2),
    )
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), x)
    made, expected = bj.check(bj.hypergradient(bilevel, x)), bj.hypergradient(bilevel, wide)
    np.testing.assert_array_equal(made.gradient["a"], expected.gradient["a"])
    assert made.gradient["a"].dtype == np.float32
    for algorithm in (algorithms.implicit(bilevel, SGD), algorithms.m_sobirl(bilevel, SGD)):
        assert algorithm.init(KEY, x).x["a"].dtype == np.float32


@pytest.mark.slow
def test_an_estimate_in_half_precision():
    x, garnet = jnp.zeros((2, 2), jnp.float16), jax.tree.map(narrow, problem())
    response = estimators.LearnedCritic(step_size=np.float16(0.5))
    states = [learner.init(garnet, x) for learner in (response, estimators.LearnedModel())]
    # In float16 counts end at 65,504.
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(states))
    policy = bj.Table(np.full((2, 2), 0.5, np.float16))
    made = estimators.estimate(KEY, garnet, x, policy, batch=4, response=response, response_state=states[0])
    assert made.gradient.dtype == np.float32
    groups = made.groups
    assert all(leaf.dtype == np.float32 for leaf in response.update(states[0], garnet, x, policy, groups))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_leaves_that_were_narrowed_later_are_refused(dtype):
    def narrow(tree):
        return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)

    name = np.dtype(dtype).name
    for call in (
        lambda: bj.solve(narrow(mdp()), U),
        lambda: bj.policy_value(narrow(mdp()), P[0]),
        lambda: bj.occupancy(narrow(mdp()), P[0]),
        lambda: bj.solve_finite_horizon(narrow(mdp()), U, 3),
        lambda: bj.solve_average_reward(narrow(mdp()), U),
        lambda: environments.TabularEnvironment(narrow(mdp())),
    ):
        with pytest.raises(bj.InputError, match=rf"^mdp\.transition\.probability is {name}; make it of float32"):
            call()
    with pytest.raises(bj.InputError, match=rf"^regularizer\.temperature is {name}"):
        bj.solve(mdp(), narrow(bj.ShannonEntropy(1)))
    with pytest.raises(bj.InputError, match=rf"^mdp\(x\)\.transition\.probability is {name}"):
        bj.hypergradient(bj.BilevelProblem(lambda x: narrow(mdp()), U, lambda x, s: s.value[0]), 1.0)


def test_rows_in_half_precision_that_do_not_sum_to_1_are_told_the_precision():
    third = np.full((3, 1, 3), 1 / 3, ml_dtypes.bfloat16)
    with pytest.raises(bj.InputError, match=r"sum to 1\.00\d+, not 1 .*divide each row by its sum.*in float32"):
        bj.MDP(third, np.ones((3, 1)), 0.5)
    wide = third.astype(np.float32)
    assert bj.MDP(wide / wide.sum(-1, keepdims=True), np.ones((3, 1)), 0.5).num_states == 3


EXOTIC = {
    "float8": lambda shape: np.ones(shape, ml_dtypes.float8_e4m3fn),
    "jax float8": lambda shape: jnp.ones(shape, jnp.float8_e5m2),
    "int4": lambda shape: np.ones(shape, ml_dtypes.int4),
    "complex": lambda shape: np.ones(shape, complex),
    "jax complex": lambda shape: jnp.ones(shape, complex),
    "object": lambda shape: np.full(shape, None),
    "decimal": lambda shape: np.full(shape, object()),
    "strings": lambda shape: np.full(shape, "1"),
    "bytes": lambda shape: np.full(shape, b"1"),
    "dates": lambda shape: np.full(shape, np.datetime64("2020-01-01")),
    "durations": lambda shape: np.full(shape, np.timedelta64(1, "D")),
    "date objects": lambda shape: np.full(shape, datetime.date(2020, 1, 1)),
    "records": lambda shape: np.zeros(shape, [("a", float)]),
    "masked": lambda shape: np.ma.array(np.ones(shape), mask=True),
    "sparse": lambda shape: sparse.csr_array(np.ones((2, 2))),
    "sparse matrices": lambda shape: [sparse.csr_array(np.ones((2, 2)))] * 2,
    "keys": lambda shape: jnp.broadcast_to(KEY, shape),
    "a dict": lambda shape: {"a": 1.0},
    "a set": lambda shape: {1.0},
}


# MDPToolbox has rewards of the next state as sparse matrices.
REFUSED = [(name, kind) for name in FLOATS for kind in EXOTIC if (name, kind) != (TOOLBOX, "sparse matrices")]


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_other_types_are_refused_by_name(name, kind):
    shape, call = FLOATS[name]
    with pytest.raises(bj.InputError, match=r"^[a-z_0-9.]+: .*; |^[a-z_0-9.]+: expected"):
        call(EXOTIC[kind](shape))


@pytest.mark.parametrize("kind", EXOTIC)
def test_other_types_of_transitions_masks_and_upper_variables(kind):
    make = EXOTIC[kind]
    with pytest.raises(bj.InputError, match=r"^transition"):
        bj.MDP(make((2, 2, 2)), R, 0.5)
    with pytest.raises(bj.InputError, match=r"^available"):
        bj.MDP(P, R, 0.5, available=make((2, 2)))
    with pytest.raises(bj.InputError, match=r"^transition\.successor"):
        bj.SuccessorTransition(make((1, 2, 2)), np.ones((1, 2, 2)))
    if kind not in ("a dict", "sparse matrices"):  # these are pytrees
        with pytest.raises(bj.InputError, match=r"^x: "):
            bj.hypergradient(problem(), make((2, 2)))


def test_numbers_beyond_the_type_are_named():
    with jax.enable_x64(False):
        for reward in (np.array([[0, 1e39], [0, 0]]), [[0, 1e39], [0, 0]], [[0, np.longdouble(1e39)], [0, 0]]):
            with pytest.raises(bj.InputError, match=r"^reward\[0, 1\] is 1e\+39, beyond float32 \(at most 3\.4e\+38\)"):
                mdp(reward=reward)
        with pytest.raises(bj.InputError, match=r"^temperature is 1e\+40, beyond float32"):
            bj.ShannonEntropy(1e40)
        with pytest.raises(bj.InputError, match=r"^discount must be .* below 1, got 1 in float32"):
            mdp(0.99999999999)
    narrow = jax.tree.map(lambda leaf: leaf.astype(np.float32), mdp())
    with pytest.raises(bj.InputError, match=r"^initial_value\[1\] is 1e\+300, beyond float32"):
        bj.solve(narrow, U, initial_value=jnp.array([0, 1e300]))
    assert mdp(reward=[[0, 1e39], [0, 0]]).reward[0, 1] == 1e39


@pytest.mark.slow
def test_byte_orders_and_long_doubles():
    swapped = bj.MDP(
        P.astype(">f8"), R.astype(">i4"), np.array(0.5, ">f4"), np.array([1, 0], ">u2"), R.astype(">i2") < 9
    )
    native = bj.MDP(P, R, 0.5, [1, 0], R < 9)
    for made, expected in zip(jax.tree.leaves(swapped), jax.tree.leaves(native), strict=True):
        np.testing.assert_array_equal(made, expected)
    by_successor = bj.SuccessorTransition(np.array([[[0, 1], [1, 0]]], ">i8"), np.ones((1, 2, 2), ">f4"))
    assert by_successor.successor.tolist() == [[[0, 1], [1, 0]]]
    assert mdp(reward=R.astype(np.longdouble)).reward.dtype == np.float64
    assert bj.check(bj.solve(swapped, bj.ShannonEntropy(np.array(0.5, ">f8")))).value.dtype == np.float64


class TestWithoutX64:
    """What was made in float64, used when JAX is back in float32."""

    FLAG = r"is float64; it was made while jax_enable_x64 was on.*jax\.config\.update\('jax_enable_x64', True\)"

    def refused(self, name, call):
        with jax.enable_x64(False), pytest.raises(bj.InputError, match=rf"^{name}\S* {self.FLAG}"):
            call()

    def test_processes(self):
        wide, policy = mdp(), np.full((2, 2), 0.5, np.float32)
        for call in (
            lambda: bj.solve(wide, U),
            lambda: jax.jit(bj.solve)(wide, U),
            lambda: bj.policy_value(wide, policy),
            lambda: bj.occupancy(wide, policy),
            lambda: bj.stationary_distribution(wide, policy),
            lambda: bj.regularized_policy_value(wide, U, policy),
            lambda: bj.solve_finite_horizon(wide, U, 3),
            lambda: bj.finite_horizon_occupancy(wide, policy[None]),
            lambda: bj.solve_average_reward(wide, U),
            lambda: environments.TabularEnvironment(wide),
        ):
            self.refused(r"mdp\.", call)

    def test_parts(self):
        with jax.enable_x64(False):
            narrow = mdp()
        entropy, solver = bj.ShannonEntropy(1), bj.ValueIteration(jnp.asarray(1e-3))
        self.refused(r"regularizer\.temperature", lambda: bj.solve(narrow, entropy))
        self.refused(r"solver\.tolerance", lambda: bj.solve(narrow, U, solver=solver))
        self.refused(r"regularizer\.temperature", lambda: bj.solve_finite_horizon(narrow, entropy, 3))

    def test_problems(self):
        garnet, x = problem(), np.zeros((2, 2), np.float32)
        self.refused(r"problem\.", lambda: bj.hypergradient(garnet, x))
        self.refused(r"problem\.", lambda: bj.check_gradient(garnet, x))
        self.refused(r"problem\.", lambda: algorithms.m_sobirl(garnet, SGD))

    def test_problems_of_algorithms(self):
        algorithm = algorithms.implicit(problem(), SGD)
        hpgd = algorithms.hpgd(problem(), SGD, agent=agents.ExactAgent(), batch=2)
        states = [(made, made.init(KEY, np.zeros((2, 2)))) for made in (algorithm, hpgd)]
        for made, state in states:
            self.refused(r"", lambda made=made: made.init(KEY, np.zeros((2, 2), np.float32)))
            self.refused(r"", lambda made=made, state=state: made.step(KEY, state))

    def test_simulators(self):
        environment, policy = simulator(), bj.Table(np.full((2, 2), 0.5))
        self.refused(r"environment\.", lambda: environments.rollout(KEY, environment, policy, batch=2, horizon=2))
        garnet, x = problem(), np.zeros((2, 2), np.float32)
        self.refused(r"problem\.", lambda: agents.SoftQLearning().init(KEY, garnet, x))
        answer = estimators.OneStep()
        self.refused(
            r"(problem|environment)\.", lambda: estimators.estimate(KEY, garnet, x, policy, batch=2, response=answer)
        )

    def test_constructors_take_them_as_float32(self):
        wide = mdp()
        with jax.enable_x64(False):
            assert wide.replace().initial.dtype == np.float32
            narrow = wide.replace(reward=wide.reward)
            assert narrow.reward.dtype == narrow.transition.dtype == np.float32
            assert bj.check(bj.solve(narrow, U)).value.dtype == np.float32
            assert bj.ShannonEntropy(jnp.asarray(wide.discount)).temperature.dtype == np.float32
        whole = jnp.asarray(R)
        assert whole.dtype == np.int64
        with jax.enable_x64(False):
            assert mdp(reward=whole).reward.dtype == np.float32


SPREAD = np.full((2, 2, 2), 0.5)


def test_rewards_of_the_next_state_are_no_batch():
    rewards = np.arange(8.0).reshape(2, 2, 2)
    message = r"^reward: shape \[2, 2, 2\] .*batch of 2 problems or r\[s, a, s'\].*discount of shape \[2\].*\(P \* r\)"
    by_successor, mask = successors(), np.ones((2, 2), bool)
    for make in (
        lambda r: bj.MDP(SPREAD, r, 0.5),
        lambda r: bj.MDP(SPREAD, r, np.full((2, 2), 0.5), [1, 0], mask),
        lambda r: bj.MDP(by_successor, r, 0.5),
        lambda r: bj.MDP(SPREAD, R, 0.5).replace(reward=r),
    ):
        for run in (make, jax.jit(lambda r, make=make: make(r).reward)):
            with pytest.raises(bj.InputError, match=message):
                run(rewards)
    with pytest.raises(bj.InputError, match=r"^reward: shape \[5, 2, 2, 2\]"):
        bj.MDP(SPREAD, np.zeros((5, 2, 2, 2)), 0.5)


@pytest.mark.slow
def test_batches_of_as_many_problems_as_states():
    rewards = np.arange(8.0).reshape(2, 2, 2)
    for process in (
        bj.MDP(SPREAD, rewards, np.full(2, 0.5)),
        bj.MDP(SPREAD, rewards, 0.5, np.full((2, 2), 0.5)),
        bj.MDP(SPREAD, rewards, 0.5, available=np.ones((2, 2, 2), bool)),
        bj.MDP(np.stack([SPREAD] * 2), rewards, 0.5),
        bj.MDP(SPREAD, rewards, np.full(2, 0.5)).replace(reward=rewards),
    ):
        assert process.batch_shape == (2,)
    batch = bj.solve(bj.MDP(SPREAD, rewards, np.full(2, 0.5)), U).value
    mapped = jax.vmap(lambda r: bj.solve(bj.MDP(SPREAD, r, 0.5), U).value)(rewards)
    # Both states follow with probability 1/2 whatever is done: V[s] = best[s] + mean(V) / 2, so mean(V) = 2 mean(best).
    best = rewards.max(-1)
    expected = best + best.mean(-1, keepdims=True)
    np.testing.assert_allclose(batch, expected, rtol=1e-12)
    np.testing.assert_allclose(mapped, expected, rtol=1e-12)


def test_rewards_of_the_next_state_where_sizes_differ():
    wide = np.full((2, 3, 2), 0.5)
    with pytest.raises(bj.InputError, match=r"^reward: shape \[2, 3, 2\] disagrees.*\[2, 3\].*\(P \* r\)\.sum\(-1\)"):
        bj.MDP(wide, np.ones((2, 3, 2)), 0.5)
    with pytest.raises(bj.InputError, match=r"^transition: batch axes \[4\] disagree.*\(P \* r\)\.sum\(-1\)"):
        bj.MDP(np.stack([SPREAD] * 4), np.ones((4, 2, 2, 2)), 0.5)
    with pytest.raises(bj.InputError, match=r"^reward: shape \[4, 2, 3\] disagrees(?!.*\(P \* r\))"):
        bj.MDP(SPREAD, np.ones((4, 2, 3)), 0.5)


@pytest.mark.slow
def test_a_population_of_as_many_followers_as_states_and_actions():
    equal = bj.problems.make("multi_follower", followers=3, states=3, actions=3, branching=2)
    load = equal.load(np.full((3, 3, 3), 1 / 3))
    assert load.shape == (3, 3)
    np.testing.assert_allclose(load.sum(), 1, rtol=1e-12)


def test_infinite_costs_name_available():
    for reward in ([[-np.inf, 0], [0, 0]], [[0, np.inf], [0, 0]], [[np.nan, 0], [0, 0]]):
        with pytest.raises(bj.InputError, match=r"^reward\[0, \d\] is .*available="):
            mdp(reward=reward)
    with pytest.raises(bj.InputError, match=r"^reward\[0, 0\] is -inf"):
        bj.MDP(P, [[-np.inf, 0], [0, 0]], 0.5, available=np.array([[False, True], [True, True]]))


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_array, sparse.coo_array])
def test_sparse_matrices_name_from_scipy(form):
    rows = form(P.reshape(4, 2).astype(float))
    for given in (rows, [form(P[:, a].astype(float)) for a in range(2)], tuple(form(p.astype(float)) for p in P)):
        with pytest.raises(bj.InputError, match=r"^transition: .*sparse.*interchange\.from_scipy"):
            bj.MDP(given, R, 0.5)
    assert bj.interchange.from_scipy(rows, R.astype(float), 0.5).num_states == 2


def test_sparse_matrices_of_complex_numbers_are_refused():
    with pytest.raises(bj.InputError, match=r"^matrices: expected real numbers, got complex128"):
        bj.interchange.from_scipy(sparse.csr_array(P.reshape(4, 2) * (1 + 0j)), R, 0.5)


SKEWED = np.array([[[0.9, 0.1, 0], [0.2, 0.3, 0.5], [1, 0, 0]]] * 3)


@pytest.mark.parametrize(("source", "target"), [(-1, -3), (-1, -2)])
def test_axes_in_another_order_are_told(source, target):
    moved = np.moveaxis(SKEWED, source, target)
    message = (
        rf"those along axis {target} do, and the order is \[state, action, next state\].*moveaxis\(p, {target}, -1"
    )
    for given in (moved, np.stack([moved] * 2)):
        with pytest.raises(bj.InputError, match=message):
            bj.DenseTransition(given)
    np.testing.assert_array_equal(np.moveaxis(moved, target, -1), SKEWED)  # what the message says to do


def test_axes_of_slots_and_references_in_another_order_are_told():
    slots = np.moveaxis(SKEWED, -1, 0)  # [K, S, A]
    index = np.broadcast_to(np.arange(3)[:, None, None], slots.shape)
    assert bj.SuccessorTransition(index, slots).shape == (3, 3)
    for target in (-1, -2):
        moved = np.moveaxis(slots, 0, target)
        with pytest.raises(bj.InputError, match=rf"axis {target} do, and the order is \[slot, state, action\]"):
            bj.SuccessorTransition(np.moveaxis(index, 0, target), moved)
        with pytest.raises(bj.InputError, match=rf"axis {target} do, and the order is \[slot, state, action\]"):
            bj.StencilTransition([(0,), (1,), (-1,)], moved, (3,))
    with pytest.raises(bj.InputError, match=r"axis -2 do, and the order is \[state, action\]"):
        bj.KLDivergence(1, [[0.9, 0.2], [0.1, 0.8]])
    with pytest.raises(bj.InputError, match=r"sum to 1\.1, not 1 .*divide each row by its sum"):
        bj.KLDivergence(1, [[0.9, 0.2], [0.3, 0.8]])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, np.int64, np.uint64, object])
def test_policies_of_other_types(dtype):
    """Policies are known to be distributions, so that they have no large numbers: all of it on one action."""
    even = np.array([[1, 0], [0, 1]])
    policy = jnp.asarray(even, dtype) if dtype in (jnp.float16, jnp.bfloat16) else even.astype(dtype)
    for function in (bj.policy_value, bj.occupancy):
        np.testing.assert_array_equal(function(mdp(0), policy), function(mdp(0), even.astype(float)))
    over_time = bj.finite_horizon_occupancy(mdp(), policy[None])
    np.testing.assert_array_equal(over_time, bj.finite_horizon_occupancy(mdp(), even[None].astype(float)))
