"""Bad input: outside jit an InputError that names the argument; inside jit a result code."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ACTIONS, KINDS, STATES, make_mdp, make_regularizer, random_process

import bilevel_jax as bj

PROCESS = random_process(0)
P, R, RHO = PROCESS.dense, PROCESS.reward, PROCESS.initial
NEXT, PROB = PROCESS.successor, PROCESS.probability
SHAPE = (STATES, ACTIONS)
EVEN = np.full(SHAPE, 1 / ACTIONS)
ENTROPY = bj.ShannonEntropy(0.5)
KEY = jax.random.key(0)


def put(array, index, value):
    """A copy of the array with one entry changed."""
    out = np.array(array)
    out[index] = value
    return out


def mdp(transition=P, reward=R, discount=0.9, initial=RHO):
    return bj.MDP(transition, reward, discount, initial)


def solve(regularizer=ENTROPY, **options):
    return bj.solve(mdp(), regularizer, **options)


def upper(x=None, mdp=lambda x: mdp(reward=R * x), regularizer=ENTROPY, objective=lambda x, s: s.value[0], **options):
    """A hyper-gradient with one thing exchanged."""
    problem = bj.BilevelProblem(mdp, regularizer, objective)
    return bj.hypergradient(problem, jnp.ones(()) if x is None else x, **options)


PROBLEM = bj.BilevelProblem(lambda x: mdp(), ENTROPY, lambda x, s: s.value[0])


class Unrelated:
    """The methods of a problem, and nothing else."""

    mdp = regularizer = objective = lambda *_: None


four_rooms = partial(bj.problems.make, "four_rooms")
synthetic = partial(bj.problems.make, "synthetic")
m_sobirl = partial(bj.algorithms.m_sobirl, optimizer=optax.sgd(0.1))


def start(**given):
    return m_sobirl(synthetic(dimension=2)).init(KEY, jnp.ones(2), **given)


negative_mass = put(put(P, (1, 2, 0), -0.5), (1, 2, 1), 1.5 - P[1, 2, 2:].sum())
negative_slot = put(put(PROB, (0, 1, 2), -0.5), (1, 1, 2), 1.5 - PROB[2:, 1, 2].sum())

BAD = {
    # values of the MDP
    "rows of P": (lambda: mdp(P * 1.5), r"transition: probabilities at \[0, 0\] sum to 1\.5.*divide each row"),
    "one row of P": (lambda: mdp(put(P, (2, 1), 0)), r"transition: .*\[2, 1\] sum to 0, not 1 \(1 of 18"),
    "negative P": (lambda: mdp(negative_mass), r"transition\[1, 2, 0\] is -0\.5"),
    "NaN P": (lambda: mdp(put(P, (1, 2, 0), np.nan)), r"transition\[1, 2, 0\] is nan"),
    "NaN reward": (lambda: mdp(reward=put(R, (1, 2), np.nan)), r"reward\[1, 2\] is nan \(1 of 18"),
    "infinite reward": (lambda: mdp(reward=put(R, (1, 2), -np.inf)), r"reward\[1, 2\] is -inf"),
    "discount 1": (lambda: mdp(discount=1), r"discount .* below 1, got 1"),
    "discount above 1": (lambda: mdp(discount=1.5), r"discount .* below 1, got 1\.5"),
    "negative discount": (lambda: mdp(discount=-0.1), r"discount must be at least 0 .* got -0\.1"),
    "NaN discount": (lambda: mdp(discount=np.nan), r"discount .* got nan"),
    "one bad discount": (lambda: mdp(discount=put(EVEN, (0, 0), 2)), r"discount .* got 2"),
    "initial sum": (lambda: mdp(initial=RHO * 2), r"initial: .* sum to 2, not 1.*divide it by its sum"),
    "negative initial": (lambda: mdp(initial=np.eye(STATES)[0] * 3 - 2 * np.eye(STATES)[1]), r"initial\[1\] is -2"),
    "replaced reward": (lambda: mdp().replace(reward=R * np.nan), r"reward\[0, 0\] is nan \(18 of 18"),
    # shapes of the MDP
    "states disagree": (lambda: mdp(reward=R[:-1]), r"reward: shape \[5, 3\] disagrees.* 6 states and 3 actions"),
    "actions disagree": (lambda: mdp(reward=R[:, :-1]), r"reward: shape \[6, 2\] disagrees"),
    "reward of the state": (lambda: mdp(reward=R[:, 0]), r"reward: expected shape \[S, A\].*got \[6\]"),
    "batches disagree": (lambda: mdp(np.stack([P] * 3), np.stack([R] * 2)), r"transition: batch axes \[3\] .*\[2\]"),
    "initial's length": (lambda: mdp(initial=RHO[:-1]), r"initial: expected shape \[S\] = \[6\], got \[5\]"),
    "discount's shape": (lambda: mdp(discount=np.full(STATES, 0.9)), r"discount: expected a number.* got \[6\]"),
    "P with 2 axes": (lambda: mdp(P[0]), r"transition: expected shape \[S, A, S\].*got \[3, 6\]"),
    "P in another order": (lambda: mdp(np.moveaxis(P, 1, 0)), r"got \[3, 6, 6\]; the order is \[state, action, next"),
    "no action": (lambda: mdp(P[:, :0], R[:, :0]), r"shape \[6, 0\] has no action"),
    "no state": (lambda: mdp(P[:0, :, :0], R[:0], 0.9, None), r"shape \[0, 3\] has no state"),
    # what is no array of real numbers
    "complex P": (lambda: mdp(P * 1j), r"transition: expected real numbers, got complex128"),
    "complex reward": (lambda: mdp(reward=R * 1j), r"reward: expected real numbers, got complex128"),
    "text": (lambda: mdp(reward="high"), r"reward: expected an array of numbers, got str"),
    "nothing": (lambda: mdp(reward=None), r"reward: expected an array of numbers, got NoneType"),
    "ragged": (lambda: mdp([[1, 0], [1]]), r"transition: expected an array of numbers, got list"),
    "text discount": (lambda: mdp(discount="high"), r"discount: expected an array of numbers, got str"),
    # successors
    "successor too high": (lambda: bj.SuccessorTransition(put(NEXT, (3, 5, 2), 6), PROB), r"\[3, 5, 2\] is 6.*0 to 5"),
    "successor negative": (lambda: bj.SuccessorTransition(put(NEXT, (0, 1, 0), -1), PROB), r"\[0, 1, 0\] is -1"),
    "successor floats": (
        lambda: bj.SuccessorTransition(NEXT * 1.0, PROB),
        r"successor: expected integers, got float64",
    ),
    "successor text": (lambda: bj.SuccessorTransition("up", PROB), r"transition\.successor: expected"),
    "successor shape": (lambda: bj.SuccessorTransition(NEXT[:1], PROB), r"got \[1, 6, 3\] and \[4, 6, 3\]"),
    "slots' sum": (lambda: bj.SuccessorTransition(NEXT, PROB / 2), r"transition\.probability: .* sum to 0\.5, not 1"),
    "negative slot": (lambda: bj.SuccessorTransition(NEXT, negative_slot), r"probability\[0, 1, 2\] is -0\.5"),
    "no slot": (lambda: bj.SuccessorTransition(NEXT[:0], PROB[:0]), r"transition"),
    # regularizers
    **{
        f"{kind} temperature {t}": (lambda k=kind, t=t: make_regularizer(k, t, EVEN), rf"temperature.* {t}")
        for kind in KINDS
        for t in (0, -1, np.nan, np.inf)
    },
    "complex temperature": (lambda: bj.ShannonEntropy(1j), r"temperature: expected real numbers"),
    "text temperature": (lambda: bj.TsallisEntropy("hot"), r"temperature: expected an array of numbers, got str"),
    "reference sum": (lambda: bj.KLDivergence(1, EVEN * 2), r"reference: .*\[0\] sum to 2, not 1 .*divide each row"),
    "negative reference": (lambda: bj.KLDivergence(1, [1.5, -0.5, 0]), r"reference\[1\] is -0\.5"),
    "NaN reference": (lambda: bj.KLDivergence(1, [1.0, np.nan, 0]), r"reference\[1\] is nan"),
    "reference a number": (lambda: bj.KLDivergence(1, 1.0), r"reference: expected .*\[S, A\] or \[A\], got a number"),
    "reference's actions": (lambda: solve(bj.KLDivergence(1, [0.5, 0.5])), r"reference: .*\[6, 3\].*got \[2\]"),
    "reference's states": (lambda: solve(bj.KLDivergence(1, EVEN[:-1])), r"reference: .*\[6, 3\].*got \[5, 3\]"),
    "reference's batch": (lambda: solve(bj.KLDivergence(1, np.stack([EVEN] * 2))), r"reference.*\[2, 6, 3\]"),
    "temperature's batch": (lambda: solve(bj.ShannonEntropy(np.ones(4))), r"temperature.*\[4\]"),
    # solvers
    "initial_value's shape": (lambda: solve(initial_value=np.zeros(5)), r"initial_value: .*\[6\], got \[5\]"),
    "initial_value text": (lambda: solve(initial_value="zero"), r"initial_value: expected"),
    "no step": (lambda: bj.ValueIteration(max_iterations=0), r"max_iterations must be at least 1, got 0"),
    "negative steps": (lambda: bj.PolicyIteration(max_iterations=-3), r"max_iterations must be at least 1, got -3"),
    "negative tolerance": (lambda: bj.ValueIteration(-1e-3), r"tolerance must be at least 0, got -0\.001"),
    "NaN tolerance": (lambda: bj.PolicyIteration(np.nan), r"tolerance must be at least 0, got nan"),
    "array tolerance": (lambda: bj.ValueIteration(jnp.array([1.0, -1.0])), r"tolerance must be at least 0, got -1"),
    "text tolerance": (lambda: bj.ValueIteration("small"), r"tolerance: expected a number, got 'small'"),
    "half a step": (
        lambda: bj.ValueIteration(max_iterations=1.5),
        r"max_iterations: expected a whole number, got 1\.5; 1000 is",
    ),
    "steps as a float": (
        lambda: bj.PolicyIteration(max_iterations=0.0),
        r"max_iterations: expected a whole number, got 0\.0",
    ),
    "array of steps": (
        lambda: bj.ValueIteration(max_iterations=jnp.array([3, -1])),
        r"max_iterations must be .* got -1",
    ),
    "GMRES tolerance": (lambda: bj.GMRES(tolerance=-1), r"tolerance must be at least 0, got -1"),
    "negative cycles": (lambda: bj.GMRES(max_cycles=-1), r"max_cycles must be at least 0, got -1"),
    "half a restart": (lambda: bj.GMRES(restart=1.5), r"restart: expected a whole number, got 1\.5; 20 to 50 is usual"),
    "negative step size": (lambda: bj.Descent(-0.1), r"step_size must be at least 0, got -0\.1"),
    "restart 0": (lambda: bj.GMRES(restart=0), r"restart must be at least 1, got 0"),
    "negative terms": (lambda: bj.Neumann(-1), r"terms must be at least 0, got -1"),
    "no descent": (lambda: bj.Descent(iterations=0), r"iterations must be at least 1, got 0"),
    "policy's shape": (lambda: bj.policy_value(mdp(), EVEN[:, :2]), r"policy.*\[6, 2\]"),
    "counts as a policy": (
        lambda: bj.policy_value(mdp(), 9 * EVEN),
        r"policy: the probabilities at \[0\] sum to 9, not",
    ),
    "logits as a policy": (lambda: bj.occupancy(mdp(), EVEN - 1), r"policy\[0, 0\] is -0\.\d+: probabilities cannot"),
    "counts over time": (
        lambda: bj.finite_horizon_occupancy(mdp(), np.stack([3 * EVEN] * 2)),
        r"policy: the probabilities at \[0, 0\] sum to 3",
    ),
    "a horizon for no machine": (
        lambda: bj.solve_finite_horizon(mdp(), ENTROPY, 2 * 10**9),
        r"horizon: .* use `solve`",
    ),
    "several tolerances": (
        lambda: solve(solver=bj.ValueIteration(tolerance=jnp.array([1e-3]))),
        r"solver\.tolerance: expected one number, got shape \[1\]; for several, jax\.vmap",
    ),
    "several limits": (
        lambda: solve(solver=bj.Auto(max_iterations=[5])),
        r"solver\.max_iterations: expected one number",
    ),
    "several sweeps": (
        lambda: solve(solver=bj.AdaptivePolicyIteration(sweeps=np.array([10, 20]))),
        r"solver\.sweeps: expected one number, got shape \[2\]",
    ),
    "several tolerances within": (
        lambda: solve(solver=bj.PolicyIteration(linear_solver=bj.GMRES(tolerance=np.array([1e-3, 1e-4])))),
        r"solver\.linear_solver\.tolerance: expected one number",
    ),
    "several tolerances of an adjoint": (
        lambda: bj.policy_value(
            bj.MDP(P, R, 0.5), np.full(R.shape, 1 / R.shape[-1]), linear_solver=bj.GMRES(tolerance=[1e-3, 1e-4])
        ),
        r"linear_solver\.tolerance: expected one number",
    ),
    "several dampings": (
        lambda: bj.solve_average_reward(
            bj.MDP(P, R, 0.5), ENTROPY, solver=bj.RelativeValueIteration(damping=[0.1, 0.2])
        ),
        r"solver\.damping: expected one number",
    ),
    "several counts": (lambda: bj.Unrolled(np.array([3, 4])), r"sweeps: expected one number, got shape \[2\]; .* each"),
    "a list of one count": (lambda: bj.Neumann([3]), r"terms: expected one number, got shape \[1\]"),
    "several restarts": (lambda: bj.GMRES(restart=(10, 20)), r"restart: expected one number, got shape \[2\]"),
    "a setting of three digits": (
        lambda: bj.ValueIteration(tolerance=np.float16(0.01)),
        r"tolerance: float16 has too few digits for a setting; make it of float32 or float64",
    ),
    "a damping of two": (
        lambda: bj.RelativeValueIteration(damping=jnp.bfloat16(0.5)),
        r"damping: bfloat16 has too few",
    ),
    "a policy of NaN": (
        lambda: bj.occupancy(bj.MDP(P, R, 0.5), np.full(R.shape, np.nan)),
        r"policy\[0, 0\] is nan",
    ),
    "no report": (lambda: bj.check(None), r"check\(report\): expected what `solve`, .* got None"),
    # another type
    "no MDP": (lambda: bj.solve(R, ENTROPY), r"mdp: expected MDP, got ndarray"),
    "no regularizer": (lambda: solve(0.5), r"regularizer: expected Regularizer, got float"),
    "no solver": (lambda: solve(solver="PI"), r"solver: expected Solver or None, got str"),
    "a class": (
        lambda: solve(solver=bj.ValueIteration),
        r"solver: .* got the class ValueIteration itself; make one of it",
    ),
    "solver as adjoint": (lambda: solve(adjoint=bj.ValueIteration()), r"adjoint: .*LinearSolver or None, got ValueIt"),
    "adjoint text": (lambda: bj.policy_value(mdp(), EVEN, "LU"), r"linear_solver: expected LinearSolver or"),
    "linear_solver text": (lambda: bj.PolicyIteration(linear_solver="LU"), r"linear_solver: expected .* got str"),
    "method's solver": (lambda: bj.Implicit("PI"), r"solver: expected Solver or None, got str"),
    "method's tolerance": (lambda: bj.Implicit(tolerance=-1.0), r"tolerance must be at least 0, got -1"),
    "method's tolerance for nobody": (
        lambda: bj.Implicit(bj.Auto(), bj.Direct(), tolerance=1e-6),
        r"tolerance: 1e-06 goes to solvers that are not given, and both are",
    ),
    "method's adjoint": (lambda: bj.Implicit(adjoint=1), r"adjoint: .*LinearSolver or None, got int"),
    "method a solver": (lambda: upper(method=bj.ValueIteration()), r"method: .*Method or None, got ValueIteration"),
    "no problem": (lambda: bj.hypergradient(upper, 1.0), r"problem: expected Problem, got function"),
    "methods alone": (
        lambda: bj.hypergradient(Unrelated(), 1.0),
        r"problem: Unrelated has the methods .* derive its class from bilevel_jax.Problem, .*BilevelProblem",
    ),
    "a problem's class": (
        lambda: bj.hypergradient(bj.problems.synthetic.Synthetic, 1.0),
        r"problem: expected Problem, got the class Synthetic itself; make one of it",
    ),
    "no problem in m_sobirl": (lambda: m_sobirl(mdp()), r"problem: expected Problem, got MDP"),
    "solver text": (lambda: m_sobirl(synthetic(), solver="VI"), r"solver: .*Solver or None, got str"),
    "m_sobirl's adjoint": (lambda: m_sobirl(synthetic(), adjoint=2), r"adjoint: expected .* or None, got int"),
    # the upper level
    "initial_adjoint's shape": (lambda: upper(initial_adjoint=np.zeros(5)), r"initial_adjoint: .*\[6\], got \[5\]"),
    "initial_adjoint text": (lambda: upper(initial_adjoint="zero"), r"initial_adjoint: expected an array of numbers"),
    "initial_value above": (lambda: upper(initial_value=np.zeros(5)), r"initial_value: .*\[6\], got \[5\]"),
    "value in init": (lambda: start(initial_value=np.zeros(3)), r"initial_value: expected shape \[10\], got \[3\]"),
    "policy in init": (
        lambda: start(initial_policy=np.zeros((5, 10))),
        r"initial_policy: expected shape \[10, 5\], got \[5, 10\]",
    ),
    "adjoint in init": (
        lambda: start(initial_adjoint=np.zeros(())),
        r"initial_adjoint: expected shape \[10\], got \[\]",
    ),
    "text x": (lambda: upper({"a": "one"}), r"x\['a'\]: expected an array of numbers, got str"),
    "objective a dict": (lambda: upper(objective=lambda x, s: {}), r"objective\(x, solution\): .*numbers, got dict"),
    "no objective": (lambda: upper(objective=lambda x, s: None), r"objective\(x, solution\): .* got NoneType"),
    "integer x": (lambda: upper(jnp.arange(3)), r"x: expected floating-point numbers, got int64; use x\.astype"),
    "integer leaf of x": (lambda: upper({"a": 1.0, "b": [1]}), r"x\['b'\]\[0\]: expected floating-point"),
    "a random key in x": (
        lambda: upper({"a": 1.0, "key": jax.random.key(0)}),
        r"x\['key'\]: a random key is no number",
    ),
    "random keys in x": (lambda: upper(jax.random.split(jax.random.key(0))), r"x: a random key.*field of the problem"),
    "complex x": (lambda: upper(jnp.ones(3, complex)), r"x: expected real numbers.*real and imaginary parts as two"),
    "a Python complex in x": (lambda: upper([1.0, 1j]), r"x\[1\]: expected real numbers"),
    "booleans in x": (lambda: upper(np.ones(3, bool)), r"x: expected floating-point numbers, got bool"),
    "a function in x": (lambda: upper({"f": jnp.tanh}), r"x\['f'\]: expected an array of numbers.*equinox\.partition"),
    "a text array in x": (lambda: upper(np.array(["one"])), r"x: expected an array of numbers"),
    "x None": (lambda: bj.hypergradient(PROBLEM, None), r"x: has no number to be chosen, got None"),
    "x empty": (lambda: bj.hypergradient(PROBLEM, {}), r"x: has no number to be chosen, got \{\}"),
    "x of no entries": (lambda: bj.hypergradient(PROBLEM, np.zeros((0, 3))), r"x: has no number to be chosen"),
    "a key in an algorithm's x": (
        lambda: bj.algorithms.m_sobirl(PROBLEM, optax.sgd(0.1)).init(None, [jax.random.key(0)]),
        r"x\[0\]: a random key is no number",
    ),
    "vector objective": (lambda: upper(objective=lambda x, s: s.value), r"objective.* scalar, got shape \[6\]"),
    "mdp(x) an array": (lambda: upper(mdp=lambda x: P), r"mdp\(x\) must return a bilevel_jax\.MDP, got ndarray"),
    "regularizer(x) a number": (lambda: upper(regularizer=lambda x: 0.1), r"regularizer\(x\) must return.*got float"),
    "reference(x)": (lambda: upper(regularizer=bj.KLDivergence(1, [0.5, 0.5])), r"reference: .*\[6, 3\].*got \[2\]"),
    "mdp no function": (lambda: upper(mdp=P), r"mdp: expected a function, got ndarray"),
    "objective no function": (lambda: upper(objective=1.0), r"objective: expected a function, got float"),
    "integer x in init": (
        lambda: bj.algorithms.m_sobirl(synthetic(dimension=2), optax.sgd(0.1)).init(KEY, jnp.arange(2)),
        r"x: expected floating-point",
    ),
    "discount(x) in init": (
        lambda: bj.algorithms.m_sobirl(
            bj.BilevelProblem(lambda x: mdp(discount=x), ENTROPY, lambda x, s: x), optax.sgd(0.1)
        ).init(KEY, jnp.asarray(1.5)),
        r"discount .* got 1\.5",
    ),
    # problems
    "unknown problem": (lambda: bj.problems.make("four_room"), r"no problem 'four_room', did you mean 'four_rooms'"),
    "unknown option": (lambda: four_rooms(temprature=1.0), r"temprature: .*did you mean 'temperature'"),
    "name taken": (lambda: bj.problems.register("synthetic", object, object), r"'synthetic' is registered already"),
    "goal in a wall": (lambda: four_rooms(goals=((1, 9), (0, 0))), r"goals: \(0, 0\) is no free cell of the 13 x 13"),
    "goal off the map": (lambda: four_rooms(goals=((40, 1),)), r"goals: \(40, 1\) is no free cell"),
    "a goal, not goals": (lambda: four_rooms(goals=(1, 9)), r"goals"),
    "no goal": (lambda: four_rooms(goals=()), r"goals: give at least one"),
    "origin in a wall": (lambda: four_rooms(origin=(0, 1)), r"origin: \(0, 1\) is no free cell"),
    "target in a wall": (lambda: four_rooms(target=(6, 0)), r"target: \(6, 0\) is no free cell"),
    "unknown layout": (
        lambda: four_rooms(transition="sparse"),
        r"transition: expected 'dense', 'successor' or 'stencil'.*'sparse'",
    ),
    "NaN beta": (lambda: four_rooms(beta=np.nan), r"^beta is nan"),
    "text beta": (lambda: four_rooms(beta="high"), r"beta: expected an array of numbers, got str"),
    "negative penalty": (lambda: four_rooms(max_penalty=-1), r"max_penalty must be at least 0, got -1"),
    "infinite penalty": (lambda: four_rooms(max_penalty=np.inf), r"^max_penalty is inf"),
    "slip": (lambda: four_rooms(slip=2.0), r"slip must be at least 0 and below 1, got 2"),
    "problem's discount": (lambda: four_rooms(discount=1.0), r"discount .* got 1"),
    "problem's temperature": (lambda: synthetic(temperature=0.0), r"temperature must be above 0, got 0"),
    "too few states": (lambda: synthetic(states=1), r"states must be at least 2, got 1"),
    "no dimension": (lambda: synthetic(dimension=0), r"dimension must be at least 1, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(bj.InputError, match=message):
        call()


@pytest.mark.slow
def test_the_table_fails_for_its_own_reason():
    # The same calls with nothing exchanged are accepted.
    assert bj.check(solve()).value.shape == (STATES,)
    assert bj.check(upper()).value.shape == ()
    assert bj.SuccessorTransition(NEXT, PROB).shape == SHAPE


@pytest.mark.few(1)
@pytest.mark.parametrize("solver", [bj.ValueIteration(), bj.PolicyIteration()], ids=["VI", "PI"])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_inside_jit_is_a_code(kind, solver):
    @jax.jit
    def run(reward, discount):
        return bj.solve(bj.MDP(P, reward, discount), make_regularizer(kind, 0.5, EVEN), solver=solver)

    assert int(run(R, 0.9).result) == bj.Result.CONVERGED
    for reward, discount in [(put(R, (1, 2), np.nan), 0.9), (put(R, (1, 2), np.inf), 0.9), (R, np.nan)]:
        solution = run(reward, discount)
        assert int(solution.result) == bj.Result.NOT_FINITE
        with pytest.raises(bj.ConvergenceError, match=r"solve: a value was not finite; look for NaN"):
            bj.check(solution)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [bj.ValueIteration(), bj.PolicyIteration()], ids=["VI", "PI"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_not_finite_is_reported_at_an_action_that_is_never_taken(solver, value):
    forbidding = bj.KLDivergence(0.5, [0.5, 0.5, 0])
    run = jax.jit(lambda reward, kernel: bj.solve(bj.MDP(kernel, reward, 0.9), forbidding, solver=solver))
    assert int(run(R, P).result) == bj.Result.CONVERGED
    solution = run(put(R, (1, 2), value), P)
    assert int(solution.result) == bj.Result.NOT_FINITE
    assert int(solution.stats.iterations) == 1  # at once, not after max_iterations
    assert int(run(R, put(P, (1, 2, 0), value)).result) == bj.Result.NOT_FINITE


@pytest.mark.slow
def test_nan_of_one_batch_element_stays_there():
    rewards = np.stack([R, put(R, (1, 2), np.nan), R])
    solution = jax.jit(lambda r: bj.solve(bj.MDP(P, r, 0.9), ENTROPY))(rewards)
    np.testing.assert_array_equal(solution.result, [0, bj.Result.NOT_FINITE, 0])
    assert np.isfinite(np.asarray(solution.value)[[0, 2]]).all()
    with pytest.raises(bj.ConvergenceError, match=r"1 of 3 failed"):
        bj.check(solution)


@pytest.mark.slow
def test_nan_x_is_reported_by_the_hypergradient():
    with pytest.raises(bj.ConvergenceError, match="not finite"):
        bj.check(upper(jnp.asarray(np.nan)))


def test_too_few_steps():
    solution = solve(solver=bj.ValueIteration(1e-6, 5))
    assert int(solution.result) == bj.Result.MAX_ITERATIONS
    with pytest.raises(
        bj.ConvergenceError, match=r"raise max_iterations.*\(1 of 1 failed, largest error bound 0\.0[1-9]"
    ):
        bj.check(solution)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [bj.ValueIteration, bj.PolicyIteration])
def test_tolerance_below_rounding(solver):
    mdp = jax.tree.map(lambda x: x.astype(np.float32), make_mdp(PROCESS, 0.99))
    solution = bj.solve(mdp, ENTROPY, solver=solver(1e-12))
    assert int(solution.result) == bj.Result.PRECISION_LIMIT
    assert int(solution.stats.iterations) < 10_000  # it noticed, and did not run to max_iterations
    with pytest.raises(bj.ConvergenceError, match=r"rounding stopped.*use float64"):
        bj.check(solution)
    assert int(bj.solve(mdp, ENTROPY, solver=solver()).result) == bj.Result.CONVERGED


@pytest.mark.slow
def test_check_returns_what_is_right_and_refuses_traced_values():
    solution = solve()
    assert bj.check(solution) is solution
    with pytest.raises(bj.InputError, match=r"traced values; call check outside jit"):
        jax.jit(lambda m: bj.check(bj.solve(m, ENTROPY)).value)(mdp())
    with pytest.raises(bj.InputError, match=r"traced values; call check outside jit"):
        jax.vmap(lambda r: bj.check(bj.solve(bj.MDP(P, r, 0.9), ENTROPY)).value)(np.stack([R, R]))


def test_every_result_has_a_message():
    assert set(bj.MESSAGES) == set(bj.Result)
    assert all(len(message) > 5 for message in bj.MESSAGES.values())


def test_errors_are_the_usual_python_ones():
    assert issubclass(bj.InputError, ValueError)
    assert issubclass(bj.ConvergenceError, RuntimeError)


def test_the_bound_that_a_message_gives_is_that_of_the_elements_it_counts():
    outcome = bj.core.results.Outcome("solve", np.array([0, 1, 2, 1]), np.array([5.0, 1e-3, np.nan, 1e-4]))
    steps, lost = outcome.failures()
    assert steps.endswith("(2 of 4 failed, largest error bound 0.001)")
    assert lost.endswith("(1 of 4 failed, largest error bound nan)")
