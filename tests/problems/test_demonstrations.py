"""inverse_rl: experts at long horizons, its two estimators, and demonstrations from files."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import logsumexp, softmax

import bilevel_jax as bj
from bilevel_jax.experiments import config
from bilevel_jax.problems import inverse_rl

KEY = jax.random.key(0)
make = functools.partial(bj.problems.make, "inverse_rl")
ESTIMATORS = ("likelihood", "visits")


def exact(problem, reward):
    """Visits [S, A] and policy of the soft optimal policy, in numpy: policy iteration by linear solves."""
    kernel, discount = problem.transition, float(problem.discount)
    states, actions = kernel.shape
    dense = np.zeros((states, actions, states))
    for successor, probability in zip(np.asarray(kernel.successor), np.asarray(kernel.probability), strict=True):
        np.add.at(dense, (*np.indices((states, actions)), successor), probability)
    temperature, policy = float(problem.temperature), np.full((states, actions), 1 / actions)
    for _ in range(200):
        moves = np.einsum("sa,saj->sj", policy, dense)
        entropy = -temperature * np.sum(policy * np.log(np.maximum(policy, 1e-300)), -1)
        value = np.linalg.solve(np.eye(states) - discount * moves, policy @ np.zeros(actions) + reward + entropy)
        q = reward[:, None] + discount * dense @ value
        before, policy = policy, softmax(q / temperature, -1)
        if np.abs(policy - before).max() < 1e-14:
            break
    assert np.abs(temperature * logsumexp(q / temperature, -1) - value).max() < 1e-7 * np.abs(value).max()
    moves = np.einsum("sa,saj->sj", policy, dense)
    visits = np.linalg.solve((np.eye(states) - discount * moves).T, np.asarray(problem.initial))
    return visits[:, None] * policy


def corridor(cells):
    return ("s" + "".join(".~."[i % 3] for i in range(cells - 2)) + "g",)


LONG = {
    "corridor": {"rows": corridor(60), "discount": 0.99999, "slip": 0.6, "expert": (0.0, -2.0, 0.05)},
    "anywhere": {"rows": (corridor(40)[0].replace("s", "."),), "discount": 0.999999, "slip": 0.5},
    "cold": {"rows": corridor(30), "discount": 0.9999, "temperature": 0.05, "expert": (0.0, -0.02, 0.001)},
    "field": {"rows": ("s....", "..~..", ".~.~.", "....g"), "discount": 0.999995, "slip": 0.7},
}
LARGE = {
    "long corridor": LONG["corridor"] | {"rows": corridor(300)},
    "longer corridor": LONG["corridor"] | {"rows": corridor(600)},
}


def assert_expert_is_exact(options):
    problem = make(**options)
    expert = jnp.asarray(options.get("expert", (0.0, -2.0, 3.0)))
    want = exact(problem, np.asarray(problem.features[:, 0] @ expert))
    np.testing.assert_allclose(problem.visits, want, rtol=1e-6, atol=1e-9 * want.sum())
    return problem, expert, want.sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_experts_of_long_horizons(name):
    assert_expert_is_exact(LONG[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_experts_of_long_corridors(name):
    problem, expert, visits = assert_expert_is_exact(LARGE[name])
    got = bj.check(bj.hypergradient(problem, expert, with_error=False))
    assert np.abs(got.gradient).max() < 1e-9 * visits  # where it must vanish


@pytest.mark.slow
def test_an_expert_that_is_not_found_is_an_error(monkeypatch):
    few = bj.ValueIteration(max_iterations=3)
    monkeypatch.setattr(inverse_rl, "solve", lambda *problem: bj.solve(*problem, solver=few))
    for options in ({}, {"demonstrations": 5}):
        with pytest.raises(bj.ConvergenceError, match="solve: the maximum number of iterations"):
            make(**options)
        # Where numbers are traced nothing can be raised: the visits say it.
        visits = jax.jit(lambda temperature, options=options: make(temperature=temperature, **options).visits)(1.0)
        assert np.isnan(visits).all()


@pytest.mark.slow
def test_options_may_be_traced():
    discounts = jnp.array([0.9, 0.99])
    visits = jax.vmap(lambda discount: make(discount=discount).visits)(discounts)
    for one, discount in zip(visits, (0.9, 0.99), strict=True):
        np.testing.assert_allclose(one, make(discount=discount).visits, rtol=1e-9)


# the two estimators


def best(problem, steps=40):
    algorithm = bj.algorithms.implicit(problem, LBFGS)
    state = algorithm.init(KEY, problem.start(KEY))
    for _ in range(steps):
        state, info = algorithm.step(KEY, state)
        if float(info.gradient_norm) < 1e-8:
            break
    assert info.gradient_norm < 1e-6
    solution = bj.check(bj.solve(problem.mdp(state.x), problem.regularizer(state.x)))
    return bj.occupancy(problem.mdp(state.x), solution.policy)


LBFGS = optax.lbfgs()


@pytest.mark.slow
@pytest.mark.parametrize("features", ["ground", "pair"])
def test_estimators_are_one_where_visits_are_an_occupancy(features):
    problems = [make(estimator=estimator, features=features, ridge=0.1) for estimator in ESTIMATORS]
    x = jax.random.normal(KEY, problems[0].start(KEY).shape)
    one, other = (bj.hypergradient(problem, x, with_error=False) for problem in problems)
    np.testing.assert_allclose(one.value, other.value, rtol=1e-10)
    np.testing.assert_allclose(one.gradient, other.gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_visits_are_matched_and_likelihood_is_another_estimator():
    options = {"demonstrations": 20, "length": 60}
    problem = make(**options, estimator="visits")
    shares = np.einsum("sa,saf->f", problem.visits, problem.features)
    matched = np.einsum("sa,saf->f", best(problem), problem.features)
    np.testing.assert_allclose(matched, shares, atol=1e-5)
    raw = make(**options)
    # The demonstrations' own visits, but for what comes after their last step.
    np.testing.assert_allclose(problem.visits * (1 - 0.9**60), raw.visits, rtol=1e-9)
    likely = np.einsum("sa,saf->f", best(raw), raw.features)
    assert 0.02 < np.abs(likely - shares).max() < 1  # of 10 visits
    many = {"demonstrations": 4000, "length": 60}
    both = [np.einsum("sa,saf->f", best(make(**many, estimator=e)), raw.features) for e in ESTIMATORS]
    assert np.abs(both[0] - both[1]).max() < np.abs(likely - shares).max() / 3  # both are consistent


@pytest.mark.slow
def test_visits_gradient_matches_by_definition():
    problem = make(demonstrations=7, length=9, estimator="visits", features="state", ridge=0.2, temperature=0.7)
    x = jax.random.normal(KEY, problem.start(KEY).shape)
    got = bj.check(bj.hypergradient(problem, x, with_error=False))
    model = bj.occupancy(problem.mdp(x), got.solution.policy)
    want = np.einsum("sa,saf->f", model - problem.visits, problem.features) / 0.7 + 0.2 * x
    np.testing.assert_allclose(got.gradient, want, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(problem.visits.sum(), 10, rtol=1e-12)


# files


@functools.cache
def drawn():
    """Columns of six demonstrations of 5 steps on the default map, from a simulator."""
    problem = make()
    simulator = bj.environments.TabularEnvironment(problem.mdp(jnp.zeros(3)))
    policy = bj.Table(jnp.full(problem.transition.shape, 0.25))
    t = bj.environments.rollout(KEY, simulator, policy, batch=6, horizon=5)
    time, episode = np.meshgrid(np.arange(5), np.arange(6))
    columns = {"state": t.state, "action": t.action, "time": time, "episode": 10 * episode - 7}
    return {name: np.asarray(column).reshape(-1) for name, column in columns.items()}


def write(path, columns):
    if path.suffix == ".npz":
        np.savez(path, **columns)
    else:
        rows = [",".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
        path.write_text("\n".join([",".join(columns), *rows]) + "\n")
    return str(path)


def expected_visits(columns, shape):
    visits = np.zeros(shape)
    episodes = len(set(columns["episode"].tolist()))
    for state, action, time in zip(columns["state"], columns["action"], columns["time"], strict=True):
        visits[state, action] += 0.9**time / episodes
    return visits


@pytest.mark.parametrize("ending", ["demos.npz", "demos.csv"])
@pytest.mark.parametrize("how", ["as it is", "shuffled", "ragged", "more columns"])
def test_files_are_read(tmp_path, ending, how):
    columns = dict(drawn())
    if how == "shuffled":
        order = np.random.default_rng(0).permutation(30)
        columns = {name: column[order] for name, column in reversed(columns.items())}
    if how == "ragged":
        keep = (columns["episode"] > 0) | (columns["time"] < 2)
        columns = {name: column[keep] for name, column in columns.items()}
    if how == "more columns":
        columns = {"note": np.full(30, 0.5), **{name: column.astype(float) for name, column in columns.items()}}
    problem = make(demonstrations_file=write(tmp_path / ending, columns))
    whole = {name: columns[name].astype(int) for name in ("state", "action", "time", "episode")}
    np.testing.assert_allclose(problem.visits, expected_visits(whole, problem.visits.shape), rtol=1e-12)
    matched = make(demonstrations_file=str(tmp_path / ending), estimator="visits")
    np.testing.assert_allclose(matched.visits, problem.visits * 10 / problem.visits.sum(), rtol=1e-12)


def changed(**columns):
    return {name: np.array(columns.get(name, column)) for name, column in drawn().items()}


def one(name, value, row=3):
    column = drawn()[name].astype(type(value))
    column[row] = value
    return changed(**{name: column})


def impossible():
    far = drawn()["state"].copy()
    far[2] = (far[2] + 13) % 24
    return changed(state=far)


WRONG = {
    "a far state": (lambda: one("state", 1000), r"step 3 of the file: state is 1000; expected 0 to \d+"),
    "a negative action": (lambda: one("action", -1), r"step 3 of the file: action is -1; expected 0 to 3"),
    "half an action": (lambda: one("action", 0.5), r"step 3 of the file: action is 0\.5; expected a whole number"),
    "NaN": (lambda: one("time", float("nan")), r"step 3 of the file: time is nan; expected a whole number"),
    "a gap": (lambda: one("time", 9, row=4), r"episode -7, time 9: the times of an episode are 0, 1, 2"),
    "a step twice": (lambda: one("time", 1, row=0), r"episode -7, time 1: the times of an episode are 0, 1, 2"),
    "another start": (lambda: one("state", 5, row=0), r"episode -7, time 0: no process of this map starts in that"),
    "a jump": (impossible, r"episode -7, time [12]: no move with that action leads to the next state"),
    "no actions": (lambda: {k: v for k, v in drawn().items() if k != "action"}, r"has no action, only state, time, e"),
    "no steps": (lambda: {k: v[:0] for k, v in drawn().items()}, r"has no steps; give a \.npz or \.csv with state, a"),
}


@pytest.mark.parametrize("ending", ["demos.npz", "demos.csv"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_named(tmp_path, ending, name):
    columns, message = WRONG[name]
    path = write(tmp_path / ending, columns())
    with pytest.raises(bj.InputError, match=f"demonstrations_file: .*{message}"):
        make(demonstrations_file=path)


UNREADABLE = {
    "no such file": ("demos.csv", None, r"demos\.csv cannot be read \(.*No such file"),
    "another kind": ("demos.txt", b"", r"ends in neither \.npz nor \.csv"),
    "no archive": ("demos.npz", b"state,action", r"demos\.npz cannot be read"),
    "an empty file": ("demos.csv", b"", r"has no state, action, time, episode, only nothing"),
    "words": ("demos.csv", b"state,action,time,episode\n1,up,0,0\n", r"demos\.csv cannot be read \(.*up"),
    "too few numbers": ("demos.csv", b"state,action,time,episode\n1,2\n", r"demos\.csv cannot be read"),
    "other text": ("demos.csv", b"\xff\xfe\x00", r"demos\.csv cannot be read"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files_are_named(tmp_path, name):
    file, content, message = UNREADABLE[name]
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(bj.InputError, match=f"demonstrations_file: .*{message}"):
        make(demonstrations_file=str(tmp_path / file))


def test_pickled_arrays_and_tables_are_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", **(drawn() | {"state": np.array([{}] * 30, object)}))
    with pytest.raises(bj.InputError, match="cannot be read"):
        make(demonstrations_file=str(tmp_path / "objects.npz"))
    np.savez(tmp_path / "table.npz", **(drawn() | {"state": np.zeros((30, 2), int)}))
    with pytest.raises(bj.InputError, match=r"has shapes .*'state': \[30, 2\].*expected one number for each step"):
        make(demonstrations_file=str(tmp_path / "table.npz"))


@pytest.mark.parametrize(
    "options", [{"demonstrations": 3}, {"length": 10}, {"expert": (0.0, -1.0, 1.0)}, {"seed": 1}], ids=str
)
def test_options_without_effect_beside_a_file_are_refused(tmp_path, options):
    path = write(tmp_path / "demos.csv", drawn())
    with pytest.raises(bj.InputError, match=f"{next(iter(options))}: has no effect beside demonstrations_file"):
        make(demonstrations_file=path, **options)


def test_a_config_names_a_file_beside_it(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "demos.csv", drawn())
    text = "problem: {name: inverse_rl, demonstrations_file: data/demos.csv, estimator: visits}\niterations: 2\n"
    (tmp_path / "fit.yaml").write_text(text)
    values = config.load(tmp_path / "fit.yaml").values["problem"]
    assert values["demonstrations_file"] == str(tmp_path / "data" / "demos.csv")
    name = values.pop("name")
    problem = bj.problems.make(name, **values)
    assert eqx.tree_equal(problem, make(demonstrations_file=str(tmp_path / "data" / "demos.csv"), estimator="visits"))
    (tmp_path / "fit.yaml").write_text(text.replace("demos.csv", "demo.csv"))
    with pytest.raises(bj.InputError, match=r"problem\.demonstrations_file \(.*line 1\): .*demo\.csv cannot be read"):
        config.load(tmp_path / "fit.yaml")
