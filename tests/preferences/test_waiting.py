"""Files that are followed while others write: the same as one reading, and waiting that ends."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bilevel_jax as bj
from bilevel_jax import preferences as pf
from bilevel_jax.preferences.waiting import Follower

TIME = "2025-01-31T12:00:00+00:00"


def made(path, pairs=3):
    file = pf.PreferenceFile.create(
        path, jnp.zeros(2, jnp.float32), bj.environments.Discrete(3), 2, next_observation=False, reward=False
    )
    segments = pf.Segments(
        np.arange(8, dtype=np.float32).reshape(2, 2, 2), np.zeros((2, 2), np.int32), valid=np.ones((2, 2), bool)
    )
    file.append_segments(segments)
    file.append_pairs([[0, 1]] * pairs)
    return file


@pytest.fixture
def file(tmp_path):
    return made(tmp_path / "labels.jsonl")


def raw(file, data):
    with open(file.path, "ab") as opened:
        opened.write(data)


def latest(follower):
    labels = follower.contents.labels
    return [
        {who: given[-1] for who, given in labels.get(pair, {}).items() if given} for pair in follower.contents.pairs
    ]


def says(value):
    return json.dumps(value).encode() + b"\n"


LINES = st.lists(
    st.one_of(
        st.builds(
            lambda pair, value, by: says({"label": pair, "value": value, "by": by, "time": TIME}),
            st.integers(0, 3),  # of which the last is no pair
            st.sampled_from([1, 0.5, 0, None]),
            st.sampled_from("AB"),
        ),
        st.builds(
            lambda pair, by: says({"undo": pair, "by": by, "time": TIME}), st.integers(0, 2), st.sampled_from("AB")
        ),
        st.sampled_from([b"\n", b"no JSON\n", b'{"label": 1, "val\n', b'{"torn": 99}\n', b'{"other": 1}\n', b"TORN"]),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LINES, st.lists(st.integers(0, 10**6), max_size=8), st.booleans())
def test_read_on_in_any_pieces_it_is_one_reading(tmp_path_factory, lines, cuts, ended):
    file = made(tmp_path_factory.mktemp("file") / "labels.jsonl")
    with open(file.path, "rb") as opened:
        number = len(opened.read().splitlines())
    text = b""
    for line in lines:  # of what a crash cuts off, the number must be that of its line
        if line == b"TORN":
            text += b'{"lab\n' + says({"torn": number + 1})
            number += 2
        else:
            text += line
            number += 1
    text = text if ended else text[:-1]
    follower = Follower(file.path)
    places = sorted({cut % (len(text) + 1) for cut in cuts} | {len(text)})
    for start, end in zip([0, *places], places, strict=False):
        raw(file, text[start:end])
        follower.look()
    read = file.read(strict=False)
    assert latest(follower) == list(read.labels)
    assert tuple(follower.refused) == read.refused
    assert tuple(follower.contents.pairs) == read.pair_ids
    assert follower.labelled() == (read.people > 0).sum()
    counts = {who: sum(pair.get(who, []) != [] for pair in follower.contents.labels.values()) for who in "AB"}
    assert {who: len(set(follower.history.get(who, []))) for who in "AB"} == counts


def test_what_was_taken_without_its_end_is_not_taken_twice(file):
    raw(file, says({"label": 0, "value": 1, "by": "Ada", "time": TIME})[:-1])
    follower = Follower(file.path)
    assert latest(follower)[0] == {"Ada": 1}
    file.append_label(1, 0, by="Ada")
    follower.look()
    assert follower.history == {"Ada": [0, 1]}
    assert not follower.refused


def test_history_has_the_order_of_answers_and_forgets_what_was_taken_back(file):
    for pair in (2, 0, 2, 1):
        file.append_label(pair, 1, by="Ada")
    file.undo(2, by="Ada")
    assert Follower(file.path).history == {"Ada": [2, 0, 1]}


def test_another_file_in_its_place_is_read_from_its_beginning(file, tmp_path):
    file.append_label(0, 1, by="Ada")
    follower = Follower(file.path)
    other = made(tmp_path / "other.jsonl", pairs=1)
    os.replace(other.path, file.path)
    before = follower.identity
    follower.look()
    assert follower.identity != before
    assert (len(follower.contents.pairs), follower.labelled(), follower.history) == (1, 0, {})


def test_a_file_that_is_missing_or_none():
    with pytest.raises(bj.InputError, match=r"path: .*nothing.jsonl cannot be read \(No such file"):
        pf.wait_for_labels("nothing.jsonl", 1, timeout=0)
    with pytest.raises(bj.InputError, match=r"line 1: "):
        pf.wait_for_labels(__file__, 1, timeout=0)


def test_labels_end_the_waiting(file):
    def later():
        for pair in (0, 0, 2):
            time.sleep(0.05)
            file.append_label(pair, 1, by="Ada")

    thread = threading.Thread(target=later)
    thread.start()
    assert pf.wait_for_labels(file.path, 2, timeout=60, poll=0.01) == 2  # different pairs
    thread.join()


def test_the_time_ends_the_waiting(file):
    file.append_label(0, 1, by="Ada")
    begin = time.monotonic()
    assert pf.wait_for_labels(file.path, 2, timeout=0.2, poll=3600) == 1
    assert time.monotonic() - begin >= 0.2
    assert pf.wait_for_labels(file.path, 2, timeout=0) == 1
    assert pf.wait_for_labels(file.path, 1, timeout=None) == 1
    assert pf.wait_for_labels(file.path, 0, timeout=None) == 1


def test_what_is_skipped_or_taken_back(file):
    file.append_label(0, None, by="Ada")
    file.append_label(1, 1, by="Ada")
    file.undo(1, by="Ada")
    assert pf.wait_for_labels(file.path, 3, timeout=0) == 0
    assert pf.wait_for_labels(file.path, 3, timeout=0, skipped=True) == 1
    file.append_label(0, 0, by="Ben")
    assert pf.wait_for_labels(file.path, 3, timeout=0) == 1


def test_waiting_needs_no_lock(file):
    """Somebody who writes has the file to themselves, and is not waited for."""
    with file._opened(os.O_RDWR, exclusive=True):
        assert pf.wait_for_labels(file.path, 1, timeout=0.05, poll=0.01) == 0


def test_a_file_that_vanishes(file):
    threading.Timer(0.1, os.unlink, [file.path]).start()
    with pytest.raises(bj.InputError, match="cannot be read"):
        pf.wait_for_labels(file.path, 1, timeout=60, poll=0.02)


@pytest.mark.slow
def test_ctrl_c_ends_a_wait_without_an_end(file):
    code = f"import bilevel_jax as bj; print('go', flush=True); bj.preferences.wait_for_labels({file.path!r}, 1, None)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert b"KeyboardInterrupt" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": -1}, "count: expected an integer of at least 0, got -1"),
        ({"count": 1.5}, "count: expected an integer"),
        ({"timeout": -1}, "timeout: expected seconds from 0 on, or None to wait for ever, got -1"),
        ({"timeout": float("nan")}, "timeout: expected a number of seconds, got nan"),
        ({"timeout": "1"}, "timeout: expected a number of seconds, got '1'"),
        ({"poll": 0}, "poll: expected seconds above 0 and at most 3600, got 0"),
        ({"poll": float("inf")}, "poll: expected seconds above 0"),
        ({"poll": True}, "poll: expected a number of seconds, got True"),
    ],
)
def test_refused(file, arguments, message):
    with pytest.raises(bj.InputError, match=message):
        pf.wait_for_labels(file.path, **({"count": 1, "timeout": 0} | arguments))
