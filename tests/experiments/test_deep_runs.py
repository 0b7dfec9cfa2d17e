"""Experiments with networks: what a run records, keeps and shows of an agent that has no table."""

import sys

import jax
import numpy as np
import pytest
from experiment_helpers import command, read_rows, run, write
from PIL import Image
from test_interruptions import Signal, found, no_torn_file

import bilevel_jax as bj
from bilevel_jax.experiments.config import load
from bilevel_jax.experiments.present.clips import as_picture
from bilevel_jax.experiments.program import Limits, Program
from bilevel_jax.experiments.trained import trained

pytestmark = pytest.mark.usefixtures("as_from_the_shell", "single_precision")

AGENTS = {
    "soft_pqn": "{name: soft_pqn, processes: 4, steps: 8, epochs: 1, network: {name: mlp, width: 8}}",
    "soft_actor_critic": "{name: soft_actor_critic, processes: 4, capacity: 64, learning_starts: 8, batch: 8, "
    "network: {name: mlp, width: 8}}",
}
DEEP = """\
problem: {{name: incentives, environment: cart_pole, width: 4, horizon: 12}}
algorithm:
  name: sobirl
  batch: 2
  max_ratio: 2.0
  response: {{name: nested_rollouts, length: 3, visits: 1}}
  agent: {agent}
optimizer: {{name: adam, learning_rate: 0.01}}
iterations: 12
record_every: 2
samples: 8
precision: float32
checkpoint: {{points: 1}}
sweep: {{seed: [0, 1], problem.price: [0.0, 0.1]}}
"""
ALONE = """\
problem: {name: task, environment: cart_pole, horizon: 20}
algorithm:
  name: agent_alone
  improvements: 2
  batch: 2
  agent: {name: soft_pqn, processes: 4, steps: 8, epochs: 1, network: {name: mlp, width: 8}}
iterations: 4
record_every: 1
samples: 8
precision: float32
sweep: {seed: [0, 1]}
"""


@pytest.fixture
def single_precision():
    """That of the runs."""
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    called = run(write(directory, ALONE), directory / "out")
    assert called.code == 0, called.err
    return directory / "out", called


@pytest.mark.slow
def test_what_a_run_ends_with(alone):
    out, called = alone
    rows = read_rows(out / "runs.csv")
    assert len(rows) == 2
    for row in rows:
        number = {name: float(row[name]) for name in row if name not in ("result", "ended_by")}
        assert number["objective_low"] < number["final_value"] < number["objective_high"]
        assert number["return_low"] <= number["return"] <= number["return_high"]
        np.testing.assert_allclose(number["return"], -number["final_value"], rtol=1e-6)  # the loss of a task
        assert 1 <= number["greedy_return"] <= 20
    assert "return " in called.err
    assert "loss " in called.err
    metrics = read_rows(out / "metrics.csv")
    assert {"agent_loss", "agent_episode_return"} <= set(metrics[0])
    assert (out / "learning_curves.png").stat().st_size > 5_000
    assert not (out / "clip.gif").exists()


@pytest.mark.slow
def test_the_trained_policy_is_read_with_one_call(alone):
    """It is that of a loop by hand with the same keys."""
    out, _ = alone
    config = load(out / "resolved.yaml")
    found = trained(out, 1)
    algorithm = config.cell.algorithm(0)
    key = jax.random.key(1)
    state = algorithm.init(jax.random.fold_in(key, 0), algorithm.problem.start(key))
    for iteration in range(4):
        state, _ = algorithm.step(jax.random.fold_in(key, 1 + iteration), state)
    policy = algorithm.policy(state)
    observations = jax.random.normal(jax.random.key(2), (5, 4))
    want, got = (jax.vmap(lambda o, p=p: p.distribution(o).probabilities)(observations) for p in (policy, found.policy))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_array_equal(found.x, state.x)


def test_trained_says_what_is_wrong(alone):
    out, _ = alone
    with pytest.raises(bj.InputError, match=r"run: 7 is not one of the finished runs of .*, 0 to 1"):
        trained(out, 7)
    with (
        jax.enable_x64(True),
        pytest.raises(bj.InputError, match=r"run is of float32; call it with jax.enable_x64\(False"),
    ):
        trained(out)


@pytest.mark.slow
@pytest.mark.parametrize("agent", AGENTS)
def test_goes_on_to_the_bit_after_a_signal(agent, tmp_path):
    path = write(tmp_path, DEEP.format(agent=AGENTS[agent]))
    called = run(path, tmp_path / "whole")
    assert called.code == 0, called.err
    for at in (2, 5):
        out = tmp_path / f"out{at}"
        with pytest.MonkeyPatch.context() as patch:
            Signal(patch, 15, at)
            assert run(path, out).code == 143
        assert list((out / "checkpoints").glob("*.npz"))
        assert run(path, out).code == 0
        assert found(out) == found(tmp_path / "whole")
        assert no_torn_file(out)
    rows = read_rows(tmp_path / "whole" / "metrics.csv")
    assert {"direct_norm", "implicit_norm", "cosine"} <= set(rows[0])
    free = [row for row in rows if row["run"] == "0" and row["direct_norm"]]
    assert all(float(row["direct_norm"]) == 0 for row in free)  # at a price of 0


@pytest.mark.slow
def test_nothing_compiles_anew_and_memory_stays(tmp_path):
    config = load(write(tmp_path, DEEP.format(agent=AGENTS["soft_actor_critic"])))
    cell = config.cell
    program = Program([cell.algorithm(place) for place, _ in cell.runs], [seed for _, seed in cell.runs])
    inputs = program.inputs(range(4))
    progress = program.start(inputs)
    limits = Limits.of(np.inf, np.inf)
    live, counts = [], []
    for _ in range(4):
        progress, _, made = jax.block_until_ready(program.advance(inputs, progress, limits, np.int32(3)))
        del made
        live.append(sum(array.nbytes for array in jax.live_arrays()))
        counts.append(program.advance._cache_size())
    assert len(set(counts)) == 1, counts
    assert len(set(live[1:])) == 1, live


IMAGES = '''
"""A walk on a line of ten cells, seen as an image."""
import dataclasses
import jax.numpy as jnp
import bilevel_jax as bj


class Line(bj.environments.Environment):
    @property
    def action_space(self):
        return bj.environments.Discrete(2)

    def reset(self, key):
        return jnp.asarray(3, jnp.int32)

    def observe(self, state):
        return jnp.zeros((10, 10, 2), bool).at[5, state, 0].set(True).at[5, 9, 1].set(True)

    def step(self, key, state, action):
        state = jnp.clip(state + 2 * action.astype(jnp.int32) - 1, 0, 9)
        ended = state == 9
        return state, bj.environments.TimeStep(
            self.observe(state), ended.astype(float), ended, jnp.zeros_like(ended)
        )


@dataclasses.dataclass(frozen=True)
class Options:
    """A walk that is seen as an image, for tests."""

    temperature: float = 0.1


def build(options):
    return bj.problems.Task(Line(), temperature=options.temperature, horizon=15)


bj.problems.register("line", Options, build)
'''


@pytest.mark.slow
def test_an_agent_that_sees_images_has_a_clip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, IMAGES, "line_problem.py")
    text = ALONE.replace("{name: task, environment: cart_pole, horizon: 20}", "{name: line}")
    path = write(tmp_path, "modules: [line_problem.py]\n" + text)
    try:
        called = run(path, tmp_path / "out")
        assert called.code == 0, called.err
        assert "clip.gif" in called.out
        with Image.open(tmp_path / "out" / "clip.gif") as clip:
            assert clip.size == (160, 160)
            assert 1 <= getattr(clip, "n_frames", 1) <= 15
        (tmp_path / "out" / "clip.gif").unlink()
        assert command("plot", tmp_path / "out").code == 0
        assert (tmp_path / "out" / "clip.gif").exists()
    finally:
        from bilevel_jax.problems import registry

        registry._SPECS.pop("line", None)
        sys.modules.pop("line_problem", None)


def test_frames_are_pictures():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    np.testing.assert_array_equal(as_picture(grey)[..., 1], grey)
    stacked = np.stack([grey, grey + 1, grey + 2, grey + 3], -1)
    np.testing.assert_array_equal(as_picture(stacked)[..., 2], grey + 3)
    colours = np.stack([grey, grey + 1, grey + 2], -1)
    np.testing.assert_array_equal(as_picture(colours), colours)
    channels = np.zeros((8, 8, 2), bool)
    channels[1, 2, 0] = channels[1, 3, 1] = channels[4, 4, 0] = channels[4, 4, 1] = True
    made = as_picture(channels)
    assert len({tuple(made[1, 2]), tuple(made[1, 3]), tuple(made[0, 0])}) == 3
    np.testing.assert_array_equal(made[4, 4], made[1, 3])
