"""What would take too much memory is refused before it is allocated, with the numbers and a remedy."""

import resource
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

import bilevel_jax as bj
from bilevel_jax.core import memory
from bilevel_jax.core.memory import machine_memory, require_room

S = 12_000
EYE = sparse.csr_array(sparse.eye_array(S))
FULL = sparse.vstack([sparse.csr_array(np.full((1, S), 1 / S)), EYE[1:]], format="csr")
STATE = np.arange(S)
STAY = [(1.0, 0, 0.0, False)]


def table(first):
    """Gymnasium's form of S states with one action, besides those of the first."""
    return {0: first} | {s: {0: STAY} for s in range(1, S)}


def with_a_full_row():
    """An MDP of few entries whose first row has all states, by a dense transition."""
    dense = np.zeros((1500, 3, 1500), np.float32)
    dense[:, :, 0] = 1
    dense[0, 0] = 1 / 1500
    return bj.MDP(dense, np.zeros((1500, 3), np.float32), 0.9)


FULL_ROW = (
    r"transition: lists .* fullest row's 12000 \(state 0, action 0\).* GiB, \d+ times the .* MatrixFreeTransition"
)
ACTIONS = r"tables of 12000 states and 12000 actions, of which \d+ pairs .* GiB, .*number each state's actions from 0"
DENSE = r"transition: a dense transition of 1500 states and 1500 actions, .*scipy sparse matrix"
SIZES = {"states": 10_000, "actions": 1000}
REFUSED = {
    "scipy": (lambda: bj.interchange.from_scipy([FULL, EYE], np.zeros((S, 2)), 0.9), FULL_ROW),
    "scipy, stacked": (lambda: bj.interchange.from_scipy(FULL, np.zeros((S, 1)), 0.9), FULL_ROW),
    "mdptoolbox": (lambda: bj.interchange.from_mdptoolbox([FULL, EYE], np.zeros((S, 2)), 0.9), FULL_ROW),
    "quantecon": (lambda: bj.interchange.from_quantecon(np.zeros(S), FULL, 0.9, STATE, 0 * STATE), FULL_ROW),
    "gymnasium": (
        lambda: bj.interchange.from_gymnasium(table({0: [(1 / S, s, 0.0, False) for s in range(S)]})),
        FULL_ROW,
    ),
    "actions of gymnasium": (
        lambda: bj.interchange.from_gymnasium(table(dict.fromkeys(range(S), STAY))),
        "env: " + ACTIONS,
    ),
    "actions of quantecon": (
        lambda: bj.interchange.from_quantecon(np.zeros(S), EYE, 0.9, STATE, STATE),
        "a_indices: " + ACTIONS,
    ),
    "dense pairs": (
        lambda: bj.interchange.from_quantecon(np.zeros(1500), np.eye(1500), 0.9, STATE[:1500], STATE[:1500]),
        DENSE,
    ),
}


@pytest.fixture
def little_memory():
    """No room for more than 2 GiB beside what is in use, so that what is not refused fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize("name", REFUSED)
def test_unequal_rows_are_refused(name, little_memory):
    call, message = REFUSED[name]
    with pytest.raises(bj.InputError, match=message):
        call()


def test_what_was_dense_already_may_become_lists():
    # K = S: 1.5 times the dense array, however few of its entries are above 0.
    ended = bj.interchange.with_end_state(with_a_full_row())
    assert ended.transition.successor.shape[0] == 1500


def test_small_lists_may_be_padded():
    states = 1000  # 8,000 times what the rows take, but 12 MiB
    rows = sparse.vstack([sparse.csr_array(np.full((1, states), 1 / states)), EYE[1:states, :states]], "csr")
    assert bj.interchange.from_scipy(rows, np.zeros((states, 1)), 0.9).transition.successor.shape == (states, states, 1)


def test_lists_that_were_given_padded_stay():
    # All rows equally long: nothing is padded, whatever the size.
    rows = sparse.csr_array((np.full(400 * S, 1 / 400), np.tile(STATE[:400], S), 400 * np.arange(S + 1)), (S, S))
    require_room("rows", 12 * rows.nnz, "lists", "none", given=rows.data.nbytes + rows.indices.nbytes)


def test_predecessors_of_a_full_column_are_short():
    # All states lead to the first: in-degrees differ by S, and the lists do not.
    lists = bj.SuccessorTransition(np.zeros((1, S, 1), int), np.ones((1, S, 1))).with_predecessors().predecessors
    assert lists.entry.size < 1.1 * S


@pytest.mark.parametrize(
    ("problem", "options", "name"),
    [
        ("garnet", SIZES, "states, actions"),
        ("synthetic", SIZES, "states, actions"),
        ("tabular_rlhf", SIZES | {"length": 1}, "states, actions"),
        ("multi_follower", {"followers": 10_000, "states": 3000, "actions": 3000}, "followers"),
        ("multi_follower", {"states": 3000, "actions": 3000, "features": 10_000}, "features"),
        ("stackelberg", {"leader_actions": 10_000, "states": 2000, "actions": 2000}, "states, actions"),
        ("inverse_rl", {"rows": ("." * 150,) * 150, "features": "pair"}, "features"),
    ],
)
def test_problems_larger_than_the_machine_are_refused(monkeypatch, problem, options, name):
    monkeypatch.setattr(memory, "machine_memory", lambda: 16 * 2**30)
    with pytest.raises(bj.InputError, match=rf"{name}: .* [GT]iB, this machine has 16 GiB"):
        bj.problems.make(problem, **options)


def test_a_dense_map_of_2_to_the_31_entries_is_refused():
    rows = ("s" + "." * 159, *("." * 160,) * 158, "gt" + "." * 158)
    with pytest.raises(bj.InputError, match=r"rows: a dense transition of 25600 cells .* transition='successor'"):
        bj.problems.make("four_rooms", rows=rows)


def test_limits_are_as_documented():
    require_room("x", 256 * 2**20, "it", "none", given=1)
    require_room("x", 32 * 2**24, "it", "none", given=2**24)
    with pytest.raises(bj.InputError, match=r"x: it would take 512 MiB, 33 times the 15\.5 MiB .* 256 MiB on\); less"):
        require_room("x", 2**29, "it", "less", given=2**29 // 33 + 1)
    with pytest.raises(bj.InputError, match=r"x: it would take .* of memory; less"):
        require_room("x", machine_memory() + 1, "it", "less")
    assert 2**28 < machine_memory() < 2**63


@pytest.mark.slow
def test_the_documented_way_of_full_rows():
    text = (Path(__file__).parents[2] / "docs" / "interchange.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("20_000", "60")
    made = {}
    exec(code, made)
    states, rows = made["states"], made["rows"].toarray()
    dense = np.moveaxis(rows.reshape(2, states, states), 0, 1)
    want = bj.solve(made["mdp"].replace(transition=dense), bj.ShannonEntropy(0.1))
    np.testing.assert_allclose(made["solution"].value, want.value, rtol=1e-10)


@pytest.mark.slow
def test_intermediate_states_say_the_same():
    """The documented way around a full row: two steps of discount sqrt(d)."""
    rng = np.random.default_rng(0)
    states, groups = 12, 3
    full = rng.dirichlet(np.ones(states))
    kernel = np.eye(states)[rng.integers(states, size=(states, 2))]
    kernel[0, 0] = full
    reward = rng.normal(size=(states, 2))
    want = bj.solve(bj.MDP(kernel, reward, 0.9), bj.ShannonEntropy(0.3))
    member = np.arange(states) % groups
    wide = np.zeros((states + groups, 2, states + groups))
    wide[:states, :, :states] = kernel
    wide[0, 0] = 0
    for group in range(groups):
        mass = full * (member == group)
        wide[0, 0, states + group] = mass.sum()
        wide[states + group, :, :states] = mass / mass.sum()
    discount = np.full((states + groups, 2), 0.9)
    discount[0, 0] = discount[states:] = 0.9**0.5
    available = np.ones((states + groups, 2), bool)
    available[states:, 1] = False
    mdp = bj.MDP(wide, np.concatenate([reward, np.zeros((groups, 2))]), discount, available=available)
    got = bj.solve(mdp, bj.ShannonEntropy(0.3))
    np.testing.assert_allclose(got.value[:states], want.value, rtol=1e-10)
