"""The physics of the classic tasks against gymnasium's own, and against energies; walks against a list of moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment_helpers import assert_law

import bilevel_jax as bj
from bilevel_jax.environments.classic import Acrobot, CartPole, GridWalk, MountainCar, Pendulum
from bilevel_jax.problems.grid import parse_map

KEY = jax.random.key(0)
TASKS = {"Acrobot-v1": Acrobot, "CartPole-v1": CartPole, "MountainCar-v0": MountainCar, "Pendulum-v1": Pendulum}


@pytest.mark.parametrize("name", TASKS)
def test_steps_are_those_of_gymnasium(name):
    """From its states, for 300 random actions: observations, rewards and ends."""
    gymnasium = pytest.importorskip("gymnasium")
    theirs, ours = gymnasium.make(name).unwrapped, TASKS[name]()
    step = jax.jit(lambda key, state, action: ours.step(key, state, action))
    rng = np.random.default_rng(0)
    theirs.reset(seed=0)
    for _ in range(300):
        action = theirs.action_space.sample() if name == "Pendulum-v1" else int(rng.integers(ours.num_actions))
        state = jnp.asarray(theirs.state, float)
        observation, reward, terminated, truncated, _ = theirs.step(action)
        _, made = step(KEY, state, jnp.asarray(action))
        np.testing.assert_allclose(np.asarray(made.observation), observation, rtol=2e-5, atol=1e-6)  # theirs is float32
        np.testing.assert_allclose(np.asarray(made.reward), reward, rtol=1e-6)
        assert (bool(made.terminated), bool(made.truncated)) == (terminated, truncated)
        if terminated:
            theirs.reset()
    low, high = theirs.observation_space.low, theirs.observation_space.high
    starts = np.asarray(jax.vmap(lambda key: ours.observe(ours.reset(key)))(jax.random.split(KEY, 100)))
    assert ((starts >= low) & (starts <= high)).all()
    if name != "CartPole-v1":
        spread = np.stack([theirs.reset(seed=k)[0] for k in range(100)])
        np.testing.assert_allclose(starts.std(0), spread.std(0), atol=0.3 * spread.std(0).max())


def acrobots():
    """Gymnasium's, and its step as a function of the state and the action."""
    gymnasium = pytest.importorskip("gymnasium")
    theirs = gymnasium.make("Acrobot-v1").unwrapped

    def step(state, action):
        theirs.state = np.array(state)
        return theirs.step(action)

    return theirs, step


def test_an_acrobot_anywhere_steps_as_gymnasiums():
    """From states all over the space: angles that are wrapped, speeds that are clipped, tips above the line."""
    theirs, step = acrobots()
    rng = np.random.default_rng(0)
    fastest = np.array([np.pi, np.pi, 4 * np.pi, 9 * np.pi])
    states, actions = rng.uniform(-fastest, fastest, (400, 4)), rng.integers(3, size=400)
    moved, made = jax.vmap(lambda state, action: Acrobot().step(KEY, state, action))(states, actions)
    for k in range(400):
        observation, reward, terminated, _, _ = step(states[k], int(actions[k]))
        # One of the two wraps at the other end where an angle is just there.
        apart = np.abs(np.asarray(moved[k]) - theirs.state)
        np.testing.assert_allclose(np.minimum(apart, np.abs(apart - [2 * np.pi, 2 * np.pi, 0, 0])), 0, atol=1e-10)
        np.testing.assert_allclose(np.asarray(made.observation[k]), observation, rtol=2e-5, atol=1e-6)
        assert (float(made.reward[k]), bool(made.terminated[k])) == (reward, terminated)
    free = np.asarray(moved)[:, 2:]
    assert (np.abs(free) == fastest[2:]).any(0).all(), "no speed was clipped"
    assert 0.1 < np.mean(made.terminated) < 0.9
    assert not np.any(made.truncated)


def test_the_acrobot_is_the_books_and_not_the_papers():
    theirs, step = acrobots()
    state = np.array([0.3, -1.2, 2.0, 1.0])
    ours = Acrobot().step(KEY, jnp.asarray(state), jnp.asarray(2))[1].observation
    try:
        for kind, error in (("book", 1e-6), ("nips", None)):
            theirs.book_or_nips = kind
            apart = np.abs(step(state, 2)[0] - np.asarray(ours)).max()
            assert apart < error if error else apart > 0.01, (kind, apart)
    finally:
        theirs.book_or_nips = "book"


def test_an_acrobot_without_torque_keeps_its_energy():
    """Kinetic and potential energy of two links, of different masses and lengths, over a second of small steps."""
    mass, length, inertia, gravity = (1.0, 1.5), (1.0, 0.7), 0.8, 9.0
    environment = Acrobot(
        gravity=gravity, masses=mass, lengths=length, inertia=inertia, torque=3.0, interval=2e-3, height=5.0
    )

    def energy(state):
        first, second, turn, relative = np.asarray(state)
        # Of the centres of mass, by the angle of each link from hanging.
        both, fast = first + second, turn + relative
        velocity_1 = length[0] / 2 * turn * np.array([np.cos(first), np.sin(first)])
        velocity_2 = 2 * velocity_1 + length[1] / 2 * fast * np.array([np.cos(both), np.sin(both)])
        height_1 = -length[0] / 2 * np.cos(first)
        height_2 = 2 * height_1 - length[1] / 2 * np.cos(both)
        kinetic = mass[0] * velocity_1 @ velocity_1 + mass[1] * velocity_2 @ velocity_2
        kinetic += inertia * (turn**2 + fast**2)
        return kinetic / 2 + gravity * (mass[0] * height_1 + mass[1] * height_2)

    @jax.jit
    def run(state, action):
        return jax.lax.fori_loop(0, 500, lambda _, state: environment.step(KEY, state, action)[0], state)

    start = jnp.array([1.0, -0.5, 0.3, -1.0])
    end = run(start, jnp.asarray(1))
    assert float(jnp.abs(end - start).max()) > 0.5
    np.testing.assert_allclose(energy(end), energy(start), atol=1e-9)
    # The motor works: torque times the angle between the links.
    pushed = run(jnp.zeros(4), jnp.asarray(2))
    np.testing.assert_allclose(energy(pushed) - energy(jnp.zeros(4)), 3.0 * pushed[1], rtol=1e-9)


def test_a_pendulum_without_torque_keeps_its_energy():
    """Kinetic and potential energy of a rod, over half a second of small steps."""
    environment = Pendulum(interval=1e-4)

    def energy(state):
        return state[1] ** 2 / 6 + 10 * jnp.cos(state[0]) / 2

    start = jnp.array([2.0, 0.5])
    end = jax.lax.fori_loop(0, 5000, lambda _, state: environment.step(KEY, state, jnp.zeros(1))[0], start)
    assert float(jnp.abs(end - start).max()) > 0.5
    np.testing.assert_allclose(energy(end), energy(start), atol=2e-3)


def test_a_pole_that_hangs_swings_back():
    environment = CartPole(gravity=-9.8, force=0.0, interval=1e-3)

    def step(state, _):
        moved, _ = environment.step(KEY, state, jnp.asarray(0))
        return moved, moved[2]

    leans = jax.lax.scan(step, jnp.array([0, 0, 0.1, 0.0]), None, length=2000)[1]
    assert 0.09 < float(-leans.min()) < 0.12
    assert 0.09 < float(leans[1000:].max()) < 0.12


@pytest.mark.parametrize("environment", [Acrobot(), CartPole(), GridWalk(slip=0.1), MountainCar(), Pendulum()])
@pytest.mark.parametrize("x64", [False, True])
def test_keeps_the_protocol(environment, x64):
    """Under jit and vmap, in both precisions, with physics that are traced."""
    with jax.enable_x64(x64):
        made = jax.tree.map(
            lambda leaf: leaf if leaf.dtype == bool else jnp.asarray(leaf, jnp.result_type(float)), environment
        )
        processes = bj.environments.start_processes(KEY, bj.environments.with_restarts(made, 50), 4)
        space = made.action_space
        policy = _Uniform(space) if isinstance(space, bj.environments.Box) else (lambda _: jnp.ones(space.n) / space.n)
        _, seen = jax.jit(lambda p: bj.environments.collect(KEY, p, policy, 60))(processes)
        assert seen.reward.dtype == jnp.result_type(float)
        assert bool(jnp.isfinite(seen.observation).all())
        assert bool((seen.terminated | seen.truncated).any())


class _Uniform(bj.environments.Policy):
    space: bj.environments.Box

    def distribution(self, observation):
        return _Flat(self.space)


class _Flat(bj.environments.Distribution):
    space: bj.environments.Box

    def sample(self, key):
        return jax.random.uniform(key, self.space.shape, self.space.dtype, self.space.low, self.space.high)

    def log_prob(self, action):
        return -jnp.sum(jnp.log(self.space.high - self.space.low))

    def entropy(self):
        return jnp.sum(jnp.log(self.space.high - self.space.low))


@pytest.mark.slow
def test_physics_can_be_swept():
    """Heavier gravity makes an idle pole fall sooner."""

    def steps(gravity):
        environment = CartPole(gravity=gravity)
        policy = lambda observation: jnp.array([0.5, 0.5])  # noqa: E731
        return bj.environments.evaluate(KEY, environment, policy, episodes=200, steps=200).mean

    light, heavy = jax.vmap(steps)(jnp.array([2.0, 30.0]))
    assert float(heavy) < float(light) - 3


def test_impossible_physics_are_refused():
    for name in ("cart_mass", "pole_mass", "half_length", "interval", "track", "angle"):
        with pytest.raises(bj.InputError, match=name):
            CartPole(**{name: 0.0})
    for name, value in (("masses", (1.0, 0.0)), ("lengths", (-1.0, 1.0)), ("inertia", 0.0), ("interval", -0.1)):
        with pytest.raises(bj.InputError, match=f"{name} must be above 0"):
            Acrobot(**{name: value})
    with pytest.raises(bj.InputError, match=r"masses: expected shape \[2\]"):
        Acrobot(masses=1.0)


# Walks.

MAPS = (
    """
....x
.x...
x..x.
""",
    """
xxxx.
xx.x.
xx...
""",
    """
.....
.....
.....
""",
)


def walls_of(rows):
    return parse_map(rows).walls


def led_to(environment, grid):
    """The number of the cell that each move leads to from each cell, [S, A], and what is seen there, [S, A, 2]."""
    cells, moves = jnp.asarray(grid.cells, jnp.int32), jnp.arange(4, dtype=jnp.int32)

    def step(cell, move):
        moved, made = environment.step(KEY, cell, move)
        return moved, made.observation, made.reward, made.terminated | made.truncated

    moved, seen, reward, ended = jax.vmap(jax.vmap(step, (None, 0)), (0, None))(cells, moves)
    assert not np.any(reward)
    assert not np.any(ended)
    number = np.full(grid.walls.shape, -1)
    number[tuple(grid.cells.T)] = np.arange(len(grid.cells))
    return number[tuple(np.moveaxis(np.asarray(moved), -1, 0))], np.asarray(seen)


@pytest.mark.parametrize("rows", MAPS)
def test_moves_are_those_of_a_grid(rows):
    grid = parse_map(rows)
    target, seen = led_to(GridWalk(grid.walls), grid)
    np.testing.assert_array_equal(target, grid.moves())
    np.testing.assert_allclose(seen, 2 * grid.cells[target] / (np.array(grid.walls.shape) - 1) - 1, atol=1e-15)


def test_the_usual_map_has_four_rooms():
    """That of the problem `four_rooms`, without the walls around it, and with the same moves."""
    walls = np.asarray(GridWalk().walls)
    theirs = bj.problems.make("four_rooms").grid
    np.testing.assert_array_equal(theirs.walls[1:-1, 1:-1], walls)
    text = ["".join("x" if wall else "." for wall in row) for row in walls]
    np.testing.assert_array_equal(led_to(GridWalk(), parse_map(text))[0], theirs.moves())


def test_slips_are_as_often_as_they_should():
    """One of four moves at random: the chosen one with 1 - 3 slip / 4. A right program fails once in a million; 20,000
    draws would see a slip of 0.4 made to another action each time, or none of them to the chosen one.
    """
    environment = GridWalk(np.zeros((3, 3), bool), slip=0.4)
    keys = jax.random.split(KEY, 20_000)
    for move in range(4):
        moved, _ = jax.vmap(
            lambda key, move=move: environment.step(key, jnp.array([1, 1], jnp.int32), jnp.asarray(move))
        )(keys)
        places = np.asarray(moved) @ [3, 1]
        counts = np.bincount(places, minlength=9)[[1, 5, 7, 3]]
        assert counts.sum() == len(keys), "a step of another length"
        assert_law(counts, np.where(np.arange(4) == move, 0.7, 0.1))


@pytest.mark.parametrize("x64", [False, True])
def test_walls_are_numbers_that_can_be_mapped_over(x64):
    """Three maps of one shape, traced, in one program: their moves, and starts in all free cells and no others.

    Starts by the chi-square test of `assert_law`, which a right program fails once in a million per map; with 4,000
    draws of at most 15 cells it sees one that is drawn half as often again.
    """
    with jax.enable_x64(x64):
        grids = [parse_map(rows) for rows in MAPS]
        walls = jnp.stack([jnp.asarray(grid.walls) for grid in grids])
        cells = jnp.asarray(np.argwhere(np.ones((3, 5), bool)), jnp.int32)

        @jax.jit
        @jax.vmap
        def explored(walls):
            environment = GridWalk(walls)
            starts = jax.vmap(environment.reset)(jax.random.split(KEY, 4000))
            step = jax.vmap(jax.vmap(lambda cell, move: environment.step(KEY, cell, move)[0], (None, 0)), (0, None))
            return starts, step(cells, jnp.arange(4, dtype=jnp.int32)), jax.vmap(environment.observe)(cells)

        starts, moved, seen = jax.tree.map(np.asarray, explored(walls))
        assert (starts.dtype, moved.dtype, seen.dtype) == (np.int32, np.int32, jnp.result_type(float))
        for k, grid in enumerate(grids):
            free = ~grid.walls.reshape(-1)
            assert_law(np.bincount(starts[k] @ [5, 1], minlength=15), free / free.sum())
            np.testing.assert_array_equal(moved[k][free], grid.cells[grid.moves()])


def test_one_row_can_be_seen():
    """A map of one row: its row is at -1, and no number is NaN."""
    environment = GridWalk(np.zeros((1, 3), bool))
    seen = jax.vmap(environment.observe)(jnp.array([[0, 0], [0, 1], [0, 2]], jnp.int32))
    np.testing.assert_array_equal(seen, [[-1, -1], [-1, 0], [-1, 1]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"walls": np.ones((2, 2), bool)}, "walls: there are walls only"),
        ({"walls": np.zeros((2, 2))}, r"walls: expected booleans \[height, width\], got float64"),
        ({"walls": np.zeros(3, bool)}, r"walls: expected booleans \[height, width\], got bool"),
        ({"slip": 1.0}, "slip must be at least 0 and below 1"),
        ({"slip": -0.1}, "slip must be at least 0 and below 1"),
    ],
)
def test_impossible_walks_are_refused(arguments, message):
    with pytest.raises(bj.InputError, match=message):
        GridWalk(**arguments)
