"""The numbers over seeds and tasks that the benchmark of soft PQN reports."""

import numpy as np
import pytest

from benchmarks.deep.soft_pqn import TASKS, aggregate, main, middle, profile


def test_the_interquartile_mean():
    assert middle(np.array([100.0, 1.0, 2.0, -100.0])) == 1.5
    assert middle(np.arange(10.0)) == pytest.approx(4.5)
    assert middle(np.array([0.0, 0, 0, 0, 10])) == pytest.approx(0.0)
    assert middle(np.array([0.0, 0, 0, 10])) == pytest.approx(0.0)
    assert middle(np.array([0.0, 0, 10, 10])) == pytest.approx(5.0)


def made(name, returns):
    return {"published": TASKS[name]["published"], "returns": returns}


def test_tasks_are_normalized_and_drawn_each_by_itself():
    published, least = TASKS["Acrobot-v1"]["published"], TASKS["Acrobot-v1"]["least"]
    alike = aggregate({"CartPole-v1": made("CartPole-v1", [500.0] * 4), "Acrobot-v1": made("Acrobot-v1", [least] * 4)})
    # Half of the eight at 1, half at 0; where seeds of a task are alike, no resample can change that.
    assert alike["interquartile_mean"] == 0.5
    assert alike["interval"] == [0.5, 0.5]
    spread = aggregate({"Acrobot-v1": made("Acrobot-v1", [published, published, least, least])})
    assert spread["interquartile_mean"] == 0.5
    assert spread["interval"][0] == 0 < spread["interval"][1] == 1


@pytest.mark.slow
def test_it_runs_at_toy_size(tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["", "--only", "CartPole-v1", "--seeds", "2", "--steps", "2048", "--out", str(out)])
    main()
    text = out.read_text()
    assert '"interquartile_mean"' in text
    main()  # what is there is not measured again
    assert out.read_text() == text
    shares = profile("CartPole-v1", TASKS["CartPole-v1"], seeds=1, repeats=2)
    assert shares["environment"] + shares["acting"] + shares["learning"] == pytest.approx(1, abs=0.01)
