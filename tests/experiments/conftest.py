"""What tests of experiments share: finished runs, and that nothing is run where only a config is read."""

import pytest
from experiment_helpers import ROOMS, ROOMS_SWEEP, SYNTHETIC, Finished, finished, limit, promotion_as_users_have_it


@pytest.fixture(scope="module")
def as_from_the_shell():
    with promotion_as_users_have_it():
        yield


@pytest.fixture(scope="session")
def rooms(tmp_path_factory) -> Finished:
    with promotion_as_users_have_it():
        return finished(tmp_path_factory.mktemp("rooms"), ROOMS + ROOMS_SWEEP)


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory) -> Finished:
    with promotion_as_users_have_it():
        return finished(tmp_path_factory.mktemp("synthetic"), SYNTHETIC)


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory) -> str:
    """The override that limits the memory to what two runs of SYNTHETIC need."""
    with promotion_as_users_have_it():
        return limit(tmp_path_factory.mktemp("limit"), "sweep.problem.seed=[0, 1]")


@pytest.fixture
def nothing_is_computed(monkeypatch, tmp_path):
    """Every test here ends before the run; what is written by default would go to tmp_path/runs."""

    def run(config, directory, **others):
        pytest.fail(f"the run of {directory} was started with {config.values}")

    monkeypatch.setattr("bilevel_jax.experiments.present.run.run", run)
    monkeypatch.chdir(tmp_path)
