"""Importers and exporters: against the formats' definitions, other libraries' solvers, and there and back."""

import itertools
from functools import partial

import jax
import numpy as np
import pytest
from helpers import ACTIONS, STATES, random_process
from scipy import sparse

import bilevel_jax as bj
from bilevel_jax.interchange.common import rows_sum_to_one, sums_to_one

PROCESS = random_process(0)
P, R, RHO = PROCESS.dense, PROCESS.reward, PROCESS.initial
# What MDPToolbox has: [A, S, S], also as sparse matrices.
BY_ACTION = np.moveaxis(P, 1, 0)
MATRICES = [sparse.csr_matrix(m) for m in BY_ACTION]
MASK = np.ones((STATES, ACTIONS), bool)
MASK[1, 0] = MASK[3, 1] = MASK[3, 2] = False
PAIRS = np.argwhere(MASK)
DISCOUNT = 0.9


def expected(mdp):
    """P[S, A, S] of the MDP, from its arrays."""
    kernel = mdp.transition
    if isinstance(kernel, bj.DenseTransition):
        return np.asarray(kernel.probability)
    slots, states, actions = kernel.successor.shape
    dense = np.zeros((states, actions, states))
    where = np.broadcast_to(np.arange(states)[:, None], (slots, states, actions))
    np.add.at(dense, (where, np.arange(actions), np.asarray(kernel.successor)), np.asarray(kernel.probability))
    return dense


def best(transition, reward, discount, available=None):
    """V*[S] in numpy: policy iteration over lists of the actions that each state has."""
    states, actions = reward.shape
    discount = np.broadcast_to(discount, reward.shape)
    choices = [np.flatnonzero(row) for row in (np.ones_like(reward) if available is None else available)]
    policy = np.array([mine[0] for mine in choices])
    rows = np.arange(states)
    for _ in range(actions * states + 10):
        matrix = np.eye(states) - discount[rows, policy][:, None] * transition[rows, policy]
        value = np.linalg.solve(matrix, reward[rows, policy])
        q = reward + discount * (transition @ value)
        improved = np.array([mine[np.argmax(q[s, mine])] for s, mine in enumerate(choices)])
        gain = q[rows, improved] > q[rows, policy] + 1e-12 * np.abs(value).max()
        if not gain.any():
            return value
        policy = np.where(gain, improved, policy)
    raise AssertionError("policy iteration did not end")


def optimal_value(mdp):
    """V* of the MDP's own arrays, by numpy: what is tested here is the arrays."""
    mask = None if mdp.available is None else np.asarray(mdp.available)
    return best(expected(mdp), np.asarray(mdp.reward), np.asarray(mdp.discount), mask)


def assert_same(mdp, transition, reward, available=None):
    mask = np.ones(reward.shape, bool) if available is None else available
    np.testing.assert_allclose(expected(mdp)[mask], transition[mask], rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(np.asarray(mdp.reward)[mask], reward[mask], rtol=1e-14)
    assert (mdp.available is None) == (available is None)
    if available is not None:
        np.testing.assert_array_equal(mdp.available, available)
        # The others stay where they are, so that no solver sees them lead anywhere.
        stay = np.broadcast_to(np.eye(len(reward))[:, None], transition.shape)
        np.testing.assert_array_equal(expected(mdp)[~mask], stay[~mask])
        np.testing.assert_array_equal(np.asarray(mdp.reward)[~mask], 0)


# MDPToolbox


@pytest.mark.parametrize("form", ["array", "list", "sparse", "sparse array", "coo"])
def test_mdptoolbox_transitions(form):
    given = {
        "array": BY_ACTION,
        "list": [m.tolist() for m in BY_ACTION],
        "sparse": MATRICES,
        "sparse array": [sparse.csr_array(m) for m in BY_ACTION],
        "coo": [sparse.coo_matrix(m) for m in BY_ACTION],
    }[form]
    mdp = bj.interchange.from_mdptoolbox(given, R, DISCOUNT, initial=RHO)
    assert_same(mdp, P, R)
    np.testing.assert_array_equal(mdp.initial, RHO)
    kind = bj.DenseTransition if form in ("array", "list") else bj.SuccessorTransition
    assert isinstance(mdp.transition, kind)
    again = bj.interchange.from_mdptoolbox(*bj.interchange.to_mdptoolbox(mdp), initial=RHO)
    assert isinstance(again.transition, kind)
    assert_same(again, P, R)
    assert float(again.discount) == DISCOUNT


@pytest.mark.parametrize("transitions", ["dense", "sparse"])
@pytest.mark.parametrize("form", ["S", "SA", "ASS", "sparse"])
def test_mdptoolbox_rewards(transitions, form):
    rng = np.random.default_rng(1)
    of_next = rng.normal(size=BY_ACTION.shape) * (rng.uniform(size=BY_ACTION.shape) < 0.5)
    reward, want = {
        "S": (R[:, 0], np.repeat(R[:, :1], ACTIONS, 1)),
        "SA": (R, R),
        "ASS": (of_next, np.einsum("asj,asj->sa", BY_ACTION, of_next)),
        "sparse": ([sparse.csr_matrix(m) for m in of_next], np.einsum("asj,asj->sa", BY_ACTION, of_next)),
    }[form]
    mdp = bj.interchange.from_mdptoolbox(BY_ACTION if transitions == "dense" else MATRICES, reward, DISCOUNT)
    np.testing.assert_allclose(mdp.reward, want, rtol=1e-13, atol=1e-15)


@pytest.mark.slow
def test_mdptoolbox_itself():
    mdptoolbox = pytest.importorskip("mdptoolbox.mdp")
    ours = bj.interchange.from_mdptoolbox(BY_ACTION, R, DISCOUNT)
    peer = mdptoolbox.PolicyIteration(*bj.interchange.to_mdptoolbox(ours))
    peer.run()
    solution = bj.solve(ours, bj.Unregularized())
    np.testing.assert_allclose(solution.value, peer.V, rtol=1e-10)
    np.testing.assert_array_equal(np.argmax(solution.policy, -1), peer.policy)


def test_mdptoolbox_forest():
    # Its documented example: values of the forest at discount 0.9.
    example = pytest.importorskip("mdptoolbox.example")
    mdp = bj.interchange.from_mdptoolbox(*example.forest(), 0.9)
    np.testing.assert_allclose(optimal_value(mdp), [26.244, 29.484, 33.484], rtol=1e-12)


# scipy


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", ["list", "stacked"])
def test_scipy(form, masked):
    flat = P.reshape(-1, STATES) * (MASK.reshape(-1, 1) if masked else 1)  # rows that are not read may be empty
    matrices = sparse.csr_matrix(flat)
    if form == "list":
        matrices = [sparse.csr_matrix(flat.reshape(P.shape)[:, a]) for a in range(ACTIONS)]
    reward = np.where(MASK, R, -np.inf) if masked else R
    mdp = bj.interchange.from_scipy(matrices, reward, DISCOUNT)
    assert_same(mdp, P, R, MASK if masked else None)
    assert mdp.transition.successor.shape[0] == (P > 0).sum(-1).max()  # K: the fullest row
    matrix, back, discount = bj.interchange.to_scipy(mdp)
    assert matrix.shape == (STATES * ACTIONS, STATES)
    np.testing.assert_array_equal(back, reward)
    for a in range(ACTIONS):
        np.testing.assert_allclose(matrix[a::ACTIONS].toarray()[MASK[:, a]], P[MASK[:, a], a], rtol=1e-14)
    assert_same(bj.interchange.from_scipy(matrix, back, discount), P, R, MASK if masked else None)


def test_exported_entries_are_merged():
    # Successors that stand in several slots, and slots that are not used, are one entry or none.
    successor = np.zeros((3, 2, 1), int)
    probability = np.array([[[0.25], [0.5]], [[0.75], [0.5]], [[0.0], [0.0]]])
    matrix, _, _ = bj.interchange.to_scipy(
        bj.MDP(bj.SuccessorTransition(successor, probability), np.zeros((2, 1)), 0.5)
    )
    assert matrix.nnz == 2
    np.testing.assert_array_equal(matrix.toarray(), [[1, 0], [1, 0]])


# quantecon


def quantecon_forms():
    reward = np.where(MASK, R, -np.inf)
    s, a = PAIRS.T
    shuffled = np.random.default_rng(2).permutation(len(s))
    rows = P[s, a]
    return {
        "product": (reward, P, DISCOUNT),
        "pairs": (R[s, a], rows, DISCOUNT, s, a),
        "sparse": (R[s, a], sparse.csr_matrix(rows), DISCOUNT, s, a),
        "shuffled": (R[s, a][shuffled], sparse.csr_matrix(rows[shuffled]), DISCOUNT, s[shuffled], a[shuffled]),
    }


FORMS = ("product", "pairs", "sparse", "shuffled")


@pytest.mark.parametrize("form", FORMS)
def test_quantecon_forms(form):
    mdp = bj.interchange.from_quantecon(*quantecon_forms()[form], initial=RHO)
    assert_same(mdp, P, R, MASK)
    kind = bj.DenseTransition if form in ("product", "pairs") else bj.SuccessorTransition
    assert isinstance(mdp.transition, kind)
    assert_same(bj.interchange.from_quantecon(*bj.interchange.to_quantecon(mdp)), P, R, MASK)


@pytest.mark.parametrize("form", FORMS)
def test_quantecon_itself(form):
    DiscreteDP = pytest.importorskip("quantecon.markov").DiscreteDP
    peer = DiscreteDP(*quantecon_forms()[form])
    mdp = bj.interchange.from_quantecon(peer)
    assert_same(mdp, P, R, MASK)
    solved = peer.solve("policy_iteration")
    solution = bj.solve(mdp, bj.Unregularized())
    np.testing.assert_allclose(solution.value, solved.v, rtol=1e-11)
    np.testing.assert_array_equal(np.argmax(solution.policy, -1), solved.sigma)
    np.testing.assert_allclose(
        DiscreteDP(*bj.interchange.to_quantecon(mdp)).solve("policy_iteration").v, solved.v, rtol=1e-12
    )


def test_all_actions_available_is_no_mask():
    s, a = np.argwhere(np.ones_like(MASK)).T
    for mdp in (
        bj.interchange.from_quantecon(R, P, DISCOUNT),
        bj.interchange.from_quantecon(R[s, a], P[s, a], DISCOUNT, s, a),
    ):
        assert_same(mdp, P, R)


# gymnasium

LAKE = ["SFFF", "FHFH", "FFFH", "HFFG"]


def lake_table(rows=LAKE, slippery=True):
    """FrozenLake's P as gymnasium 1 builds it: left, down, right, up; terminal cells absorb."""
    height, width = len(rows), len(rows[0])
    table = {s: {a: [] for a in range(4)} for s in range(height * width)}

    def move(row, column, action):
        steps = [(0, -1), (1, 0), (0, 1), (-1, 0)][action]
        return min(max(row + steps[0], 0), height - 1), min(max(column + steps[1], 0), width - 1)

    for row, column, action in itertools.product(range(height), range(width), range(4)):
        outcomes = table[row * width + column][action]
        if rows[row][column] in "GH":
            outcomes.append((1.0, row * width + column, 0, True))
            continue
        for way in [(action - 1) % 4, action, (action + 1) % 4] if slippery else [action]:
            r, c = move(row, column, way)
            cell = rows[r][c]
            outcomes.append((1 / 3 if slippery else 1.0, r * width + c, float(cell == "G"), cell in "GH"))
    return table


def cliff_table():
    """CliffWalking's P: up, right, down, left on 4 x 12 cells, -1 a step; the cliff costs 100 and leads to the start.

    The goal's own rows lead on as any cell's: only `terminated` says that it is the end.
    """
    table = {}
    for row, column in itertools.product(range(4), range(12)):
        table[row * 12 + column] = {}
        for action, (down, right) in enumerate([(-1, 0), (0, 1), (1, 0), (0, -1)]):
            r, c = min(max(row + down, 0), 3), min(max(column + right, 0), 11)
            fell = r == 3 and 1 <= c <= 10
            outcome = (1.0, 36, -100, False) if fell else (1.0, r * 12 + c, -1, (r, c) == (3, 11))
            table[row * 12 + column][action] = [outcome]
    return table


def values_of_table(table, discount, sweeps):
    """V*[S] by the definition: what follows a termination is worth nothing."""
    value = np.zeros(len(table))
    for _ in range(sweeps):
        value = np.array(
            [
                max(sum(p * (r + discount * (not done) * value[j]) for p, j, r, done in o) for o in mine.values())
                for mine in table.values()
            ]
        )
    return value


def random_table(seed, states=5, actions=3):
    """Successors that repeat, terminations of some of a pair's outcomes, pairs that always end, missing actions."""
    rng = np.random.default_rng(seed)
    table = {}
    for s in range(states):
        table[s] = {}
        for a in range(actions):
            if a > 0 and rng.uniform() < 0.25:
                if rng.uniform() < 0.5:
                    table[s][a] = []
                continue
            chances = rng.dirichlet(np.ones(4)) * [1, 1, 1, 0] if rng.uniform() < 0.3 else rng.dirichlet(np.ones(4))
            chances /= chances.sum()
            ends = rng.uniform(size=4) < rng.choice([0, 0.4, 1])
            outcomes = zip(chances, rng.integers(states, size=4), rng.normal(size=4), ends, strict=True)
            table[s][a] = list(outcomes)
    return table


@pytest.mark.parametrize("slippery", [False, True])
def test_frozen_lake_table(slippery):
    table = lake_table(slippery=slippery)
    mdp = bj.interchange.from_gymnasium(table, 0.95)
    np.testing.assert_allclose(optimal_value(mdp), values_of_table(table, 0.95, 600), rtol=1e-10, atol=1e-12)
    assert mdp.transition.successor.shape[0] == (3 if slippery else 1)
    # Six moves without slipping. With it, 14 of 17 reach the goal in the end (known for this map).
    patient = optimal_value(bj.interchange.from_gymnasium(table, 1 - 1e-9))
    np.testing.assert_allclose(patient[0], 14 / 17 if slippery else 1, rtol=1e-6)
    if not slippery:
        np.testing.assert_allclose(optimal_value(mdp)[0], 0.95**5, rtol=1e-12)


def test_cliff_table():
    table = cliff_table()
    mdp = bj.interchange.from_gymnasium(table, 0.9)
    value = optimal_value(mdp)
    np.testing.assert_allclose(value, values_of_table(table, 0.9, 500), rtol=1e-11)
    np.testing.assert_allclose(value[36], -(1 - 0.9**13) / 0.1, rtol=1e-12)
    np.testing.assert_allclose(optimal_value(bj.interchange.from_gymnasium(table, 1 - 1e-9))[36], -13, rtol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_any_table(seed):
    table = random_table(seed)
    mdp = bj.interchange.from_gymnasium(table, 0.8)
    listed = {s: {a: o for a, o in mine.items() if o} for s, mine in table.items()}
    np.testing.assert_allclose(optimal_value(mdp), values_of_table(listed, 0.8, 200), rtol=1e-10, atol=1e-11)
    for s, a in itertools.product(range(5), range(3)):
        assert (mdp.available is None) or bool(mdp.available[s, a]) == (a in listed[s])


@pytest.mark.parametrize("seed", range(6))
def test_an_end_state_changes_no_value(seed):
    mdp = bj.interchange.from_gymnasium(random_table(seed), 0.8)
    assert mdp.discount.shape == mdp.reward.shape
    ended = bj.interchange.with_end_state(mdp)
    assert ended.num_states == mdp.num_states + 1
    np.testing.assert_allclose(ended.discount, np.max(mdp.discount), rtol=1e-15)
    assert ended.discount.shape == ()
    assert float(ended.initial[-1]) == 0
    np.testing.assert_allclose(optimal_value(ended), np.append(optimal_value(mdp), 0), rtol=1e-11, atol=1e-12)
    free = bj.interchange.with_end_state(mdp, one_action=False)
    assert free.available is None or np.asarray(free.available)[-1].all()
    np.testing.assert_allclose(optimal_value(free), optimal_value(ended), rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_an_end_state_earns_no_entropy():
    mdp = bj.interchange.from_gymnasium(random_table(0), 0.8)
    ours, theirs = (bj.solve(m, bj.ShannonEntropy(0.3)) for m in (mdp, bj.interchange.with_end_state(mdp)))
    np.testing.assert_allclose(theirs.value, np.append(ours.value, 0), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(theirs.policy[:-1], ours.policy, rtol=1e-10, atol=1e-11)


def test_an_end_state_makes_a_table_exportable_and_a_simulator():
    mdp = bj.interchange.from_gymnasium(lake_table(), 0.95)
    with pytest.raises(
        bj.InputError, match=r"discount: this form has one discount, the MDP has 4, .*bj\.interchange\.with_end_state"
    ):
        bj.interchange.to_mdptoolbox(mdp)
    bj.environments.TabularEnvironment(mdp)
    free = bj.interchange.with_end_state(mdp, one_action=False)
    bj.environments.TabularEnvironment(free)
    matrices, reward, discount = bj.interchange.to_mdptoolbox(free)
    transition = np.stack([m.toarray() for m in matrices], 1)
    np.testing.assert_allclose(best(transition, reward, discount)[:-1], optimal_value(mdp), rtol=1e-10, atol=1e-12)


def gymnasium_table(name, **options):
    gymnasium = pytest.importorskip("gymnasium")
    return gymnasium.make(name, **options)


@pytest.mark.parametrize("slippery", [False, True])
def test_frozen_lake_itself(slippery):
    env = gymnasium_table("FrozenLake-v1", map_name="4x4", is_slippery=slippery)
    mdp, ours = (bj.interchange.from_gymnasium(t, 0.99) for t in (env, lake_table(slippery=slippery)))
    np.testing.assert_array_equal(mdp.initial, np.eye(16)[0])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-15), mdp, ours.replace(initial=mdp.initial))
    assert bj.interchange.from_gymnasium(env).discount.max() == 0.99  # the default
    np.testing.assert_array_equal(
        bj.interchange.from_gymnasium(env, initial=np.full(16, 1 / 16)).initial, np.full(16, 1 / 16)
    )


def test_cliff_walking_itself():
    mdp, ours = (bj.interchange.from_gymnasium(t, 0.99) for t in (gymnasium_table("CliffWalking-v1"), cliff_table()))
    np.testing.assert_array_equal(mdp.initial, np.eye(48)[36])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-15), mdp, ours.replace(initial=mdp.initial))


@pytest.mark.slow
def test_taxi_itself():
    env = pytest.importorskip("gymnasium.envs.toy_text").TaxiEnv()
    mdp = bj.interchange.from_gymnasium(env, 0.99)
    assert mdp.reward.shape == (500, 6)
    value = optimal_value(mdp)
    # The goal is at most some 30 steps away, so that 500 sweeps are enough at any discount.
    np.testing.assert_allclose(value, values_of_table(env.P, 0.99, 500), rtol=1e-9)
    np.testing.assert_array_equal(mdp.initial, env.unwrapped.initial_state_distrib)


# what is refused

S, A = PAIRS.T
ROWS = P[S, A]


def put(array, index, value):
    out = np.array(array)
    out[index] = value
    return out


def table_with(outcomes):
    return lake_table() | {3: {0: outcomes, 1: [(1.0, 3, 0.0, False)]}}


plain = bj.MDP(P, R, DISCOUNT)
BAD = {
    "no table": (lambda: bj.interchange.from_gymnasium(object()), r"env: expected a tabular gymnasium .* got object"),
    "empty table": (lambda: bj.interchange.from_gymnasium({}), r"env: expected a tabular"),
    "states from 1": (
        lambda: bj.interchange.from_gymnasium({1: {0: []}}),
        r"env: P has 1 states and none with the index 0",
    ),
    "no action": (
        lambda: bj.interchange.from_gymnasium(table_with([]) | {2: {}}),
        r"available: state \[2\] has no action",
    ),
    "short outcome": (
        lambda: bj.interchange.from_gymnasium(table_with([(1.0, 3)])),
        r"env: P\[3\]\[0\]: expected a list of",
    ),
    "far state": (
        lambda: bj.interchange.from_gymnasium(table_with([(1.0, 16, 0, False)])),
        r"P\[3\]\[0\]: .* of state 16",
    ),
    "half": (lambda: bj.interchange.from_gymnasium(table_with([(0.5, 3, 0, False)])), r"P\[3\]\[0\]: .* sum to 0\.5"),
    "negative": (
        lambda: bj.interchange.from_gymnasium(table_with([(-1.0, 3, 0, False)])),
        r"P\[3\]\[0\]: probability -1",
    ),
    "NaN": (
        lambda: bj.interchange.from_gymnasium(table_with([(np.nan, 3, 0, False)])),
        r"P\[3\]\[0\]: probability nan",
    ),
    "gymnasium discount": (
        lambda: bj.interchange.from_gymnasium(lake_table(), 1.0),
        r"discount must be .* below 1, got 1",
    ),
    "P of [S, A, S]": (lambda: bj.interchange.from_mdptoolbox(P, R, 0.9), r"transition: expected shape \[A, S, S\]"),
    "R of [A, S]": (
        lambda: bj.interchange.from_mdptoolbox(BY_ACTION, R.T, 0.9),
        r"reward: expected shape \[S\] = \[6\]",
    ),
    "too few R": (
        lambda: bj.interchange.from_mdptoolbox(MATRICES, MATRICES[:2], 0.9),
        r"reward: expected shape .* got 2 matrices",
    ),
    "rows of P": (lambda: bj.interchange.from_mdptoolbox(BY_ACTION * 2, R, 0.9), r"transition: .* sum to 2"),
    "text": (lambda: bj.interchange.from_mdptoolbox("P", R, 0.9), r"transition: expected an array of numbers, got str"),
    "traced": (
        lambda: jax.jit(lambda r: bj.interchange.from_mdptoolbox(BY_ACTION, r, 0.9))(R),
        r"reward: expected an array of numbers",
    ),
    "too few matrices": (
        lambda: bj.interchange.from_scipy(MATRICES[:2], R, 0.9),
        r"matrices: expected one for each of 3",
    ),
    "wrong shape": (
        lambda: bj.interchange.from_scipy(MATRICES[0], R, 0.9),
        r"matrices: expected shape \[18, 6\], got \[6, 6\]",
    ),
    "wrong part": (
        lambda: bj.interchange.from_scipy([MATRICES[0], MATRICES[1], MATRICES[2][:2]], R, 0.9),
        r"matrices\[2\]: expected shape \[6, 6\], got \[2, 6\]",
    ),
    "rewards of states": (
        lambda: bj.interchange.from_scipy(MATRICES, R[:, 0], 0.9),
        r"reward: expected shape \[S, A\]",
    ),
    "no rewards left": (
        lambda: bj.interchange.from_scipy(MATRICES, put(R, 2, -np.inf), 0.9),
        r"available: state \[2\] has no action",
    ),
    "empty row": (
        lambda: bj.interchange.from_scipy(sparse.csr_matrix(put(P, (1, 1), 0).reshape(-1, STATES)), R, 0.9),
        r"transition\.probability: probabilities at \[1, 1\] sum to 0",
    ),
    "one index": (lambda: bj.interchange.from_quantecon(R[S, A], ROWS, 0.9, S), r"s_indices, a_indices: give both"),
    "no index": (
        lambda: bj.interchange.from_quantecon(R[S, A], sparse.csr_matrix(ROWS), 0.9),
        r"s_indices: a sparse transition",
    ),
    "no transition": (lambda: bj.interchange.from_quantecon(R), r"transition: give a DiscreteDP"),
    "dense pairs": (
        lambda: bj.interchange.from_quantecon(R[S, A], ROWS, 0.9),
        r"transition: expected shape \[S, A, S\]",
    ),
    "pair twice": (
        lambda: bj.interchange.from_quantecon(R[S, A], ROWS, 0.9, put(S, 1, 0), put(A, 1, 0)),
        r"s_indices: the pair of state 0 and action 0 stands twice",
    ),
    "far pair": (
        lambda: bj.interchange.from_quantecon(R[S, A], ROWS, 0.9, put(S, 2, 6), A),
        r"s_indices\[2\] is 6; .*below 6",
    ),
    "negative action": (
        lambda: bj.interchange.from_quantecon(R[S, A], ROWS, 0.9, S, put(A, 2, -1)),
        r"a_indices\[2\] is -1",
    ),
    "float index": (
        lambda: bj.interchange.from_quantecon(R[S, A], ROWS, 0.9, S * 1.0, A),
        r"s_indices: expected 15 integers",
    ),
    "R of pairs": (
        lambda: bj.interchange.from_quantecon(R[S, A][:3], ROWS, 0.9, S, A),
        r"reward: expected shape \[L\] = \[15",
    ),
    "batch": (lambda: bj.interchange.to_scipy(bj.MDP(P, np.stack([R, R]), 0.9)), r"mdp: has batch axes \[2\]"),
    "traced export": (lambda: jax.jit(lambda m: bj.interchange.to_scipy(m)[1])(plain), r"mdp: holds traced values"),
    "mask to MDPToolbox": (
        lambda: bj.interchange.to_mdptoolbox(bj.MDP(P, R, 0.9, available=MASK)),
        r"available: MDPToolbox has all",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(bj.InputError, match=message):
        call()


def test_float32_stays():
    narrow = [m.astype(np.float32) for m in MATRICES]
    mdp = bj.interchange.from_scipy(narrow, R.astype(np.float32), DISCOUNT)
    assert {leaf.dtype for leaf in jax.tree.leaves(mdp)} == {np.dtype("float32"), np.dtype("int32")}
    assert bj.interchange.to_scipy(mdp)[0].dtype == np.float32
    assert bj.interchange.from_mdptoolbox(narrow, R.astype(np.float32), DISCOUNT).reward.dtype == np.float32


def narrow_process(kind, states=300, seed=0):
    """A process in float32 with rows that sum to 1 as float32 can: random ones, long, and with tiny entries."""
    rng = np.random.default_rng(seed)
    concentration = {"random": 1.0, "long": 50.0, "spiky": 0.02, "sparse": 1.0}[kind]
    probability = rng.dirichlet(np.full(states, concentration), (states, 2)).astype(np.float32)
    if kind == "sparse":
        probability *= rng.uniform(size=probability.shape) < 0.05
        probability[:, :, 0] += 1e-3
    probability /= probability.sum(-1, keepdims=True)
    reward = rng.normal(size=(states, 2)).astype(np.float32)
    if kind != "sparse":
        return bj.MDP(probability, reward, np.float32(0.9))
    return bj.interchange.from_scipy(sparse.csr_matrix(probability.reshape(-1, states)), reward, np.float32(0.9))


@pytest.mark.filterwarnings("ignore:Comparing a sparse matrix")  # mdptoolbox's own check does
@pytest.mark.parametrize("kind", ["random", "long", "spiky", "sparse"])
def test_float32_passes_the_checks_of_peers(kind):
    util = pytest.importorskip("mdptoolbox.util")
    mdp = narrow_process(kind)
    assert mdp.reward.dtype == np.float32
    matrices, reward, discount = bj.interchange.to_mdptoolbox(mdp)
    util.check(matrices, reward)  # raises
    for matrix in matrices:
        util.checkSquareStochastic(matrix)
        assert matrix.dtype == np.float64
    assert util.isStochastic(matrices[0])
    assert reward.dtype == np.float64
    back = bj.interchange.from_mdptoolbox(matrices, reward, discount)
    # What was exported is the process to float32's own rounding.
    np.testing.assert_allclose(expected(back), expected(mdp), rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Comparing a sparse matrix")  # mdptoolbox's own check does
@pytest.mark.parametrize("kind", ["random", "sparse"])
def test_float32_is_solved_by_peers(kind):
    mdptoolbox, quantecon = (pytest.importorskip(name) for name in ("mdptoolbox.mdp", "quantecon"))
    mdp = narrow_process(kind, states=40)
    want = optimal_value(mdp.replace(transition=mdp.transition.astype(np.float64), reward=np.float64(mdp.reward)))
    peer = mdptoolbox.PolicyIteration(*bj.interchange.to_mdptoolbox(mdp))
    peer.run()
    np.testing.assert_allclose(peer.V, want, rtol=1e-5, atol=1e-5)
    arguments = bj.interchange.to_quantecon(mdp)
    assert arguments[0].dtype == arguments[1].dtype == np.float64
    process = quantecon.markov.DiscreteDP(*arguments)
    found = process.solve(method="policy_iteration")
    np.testing.assert_allclose(found.v, want, rtol=1e-5, atol=1e-5)
    sums = np.asarray(found.mc.P.sum(-1)).ravel()  # its chain checks them
    np.testing.assert_allclose(sums, 1, rtol=0, atol=4e-16)


def test_sums_of_very_long_rows_are_1():
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.ones(50_000), 4).astype(np.float32)
    util = pytest.importorskip("mdptoolbox.util")
    limit = 10 * np.spacing(1.0)  # of mdptoolbox.util.isStochastic
    assert np.abs(sums_to_one(rows).sum(-1) - 1).max() <= limit
    made = rows_sum_to_one(sparse.csr_array(rows))
    assert np.abs(made.sum(1) - 1).max() <= limit
    assert util.isStochastic(sparse.csr_matrix(made))
    np.testing.assert_allclose(made.toarray(), rows, rtol=1e-5)
