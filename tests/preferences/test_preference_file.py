"""Files of preferences: what is written comes back, what is wrong is told by its line, and nothing is lost."""

import json
import multiprocessing
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import bilevel_jax as bj
from bilevel_jax import preferences as pf
from bilevel_jax.preferences.encoding import decode, encode

LENGTH = 3
SMALL = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def some(count=3, length=LENGTH, seed=0):
    rng = np.random.default_rng(seed)
    return pf.Segments(
        rng.normal(size=(count, length, 2)).astype(np.float32),
        rng.integers(0, 3, (count, length)).astype(np.int32),
        rng.normal(size=(count, length, 2)).astype(np.float32),
        valid=rng.random((count, length)) < 0.7,
        reward=rng.normal(size=(count, length)),
    )


@pytest.fixture
def file(tmp_path):
    return pf.PreferenceFile.create(
        tmp_path / "a.jsonl", jnp.zeros(2, jnp.float32), bj.environments.Discrete(3), LENGTH
    )


@pytest.fixture
def filled(file):
    """Three segments, two pairs, and a label: lines 1 to 7."""
    file.append_segments(some())
    file.append_pairs([[0, 1], [1, 2]], source="uniform", iteration=4)
    file.append_label(0, 1, by="Ada", time="2025-01-31T12:00:00+00:00")
    return file


def lines_of(file):
    with open(file.path, "rb") as opened:
        return opened.read().splitlines(keepends=True)


def rewrite(file, lines):
    with open(file.path, "wb") as opened:
        opened.write(b"".join(lines))


def bits(tree):
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


# What is written comes back.


@SMALL
@given(st.data())
def test_arrays_come_back_with_their_bits(draw):
    dtype = draw.draw(
        st.sampled_from(["bool", "float32", "float64", "uint8", "int8", "uint16", "int32", "int64", "uint64"])
    )
    finite = {"allow_nan": False, "allow_infinity": False} if dtype.startswith("float") else {}
    shape = draw.draw(st.one_of(hnp.array_shapes(max_dims=3, max_side=5), st.sampled_from([(3, 200), (0,), (2, 0)])))
    array = draw.draw(hnp.arrays(dtype, shape, elements=hnp.from_dtype(np.dtype(dtype), **finite)))
    text = json.dumps(encode("x", array), allow_nan=False)
    back = decode("x", json.loads(text), array.dtype, array.shape)
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("length", [2, 70])  # lists, and base64
def test_observations_of_dicts_and_boxes(tmp_path, dtype, length):
    rng = np.random.default_rng(1)

    def observation():
        return {
            "frame": rng.integers(0, 255, (4, length, 3, 3), np.uint8),
            "body": {"speed": rng.normal(size=(4, length, 5)).astype(dtype), "count": rng.integers(-9, 9, (4, length))},
        }

    segments = pf.Segments(
        observation(),
        rng.uniform(-1, 1, (4, length, 2)).astype(dtype),
        observation(),
        valid=rng.random((4, length)) < 0.5,
        reward=rng.normal(size=(4, length)),
    )
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), segments.observation)
    space = bj.environments.Box([-1.0, -np.inf], 1.0, dtype=dtype)
    made = pf.PreferenceFile.create(
        tmp_path / "a.jsonl", shapes, space, length, about={"task": "walk", "seeds": [1, 2]}
    )
    made.append_segments(segments)
    read = pf.PreferenceFile(tmp_path / "a.jsonl").read()
    assert bits(read.preferences.segments) == bits(segments)
    assert jax.tree.structure(read.preferences.segments) == jax.tree.structure(segments)
    assert read.header.about == {"task": "walk", "seeds": [1, 2]}
    assert read.action_space.shape == (2,)
    assert read.action_space.dtype == dtype
    np.testing.assert_array_equal(read.action_space.low, [-1, -np.inf])


def test_an_empty_file_and_one_without_labels(file):
    read = file.read()
    assert (read.preferences.count, read.preferences.segments.count) == (0, 0)
    assert read.preferences.segments.observation.shape == (0, LENGTH, 2)
    ids = file.append_segments(some())
    pairs = file.append_pairs([[ids[2], ids[0]]])
    read = file.read()
    assert (ids, pairs) == ((0, 1, 2), (0,))
    assert read.preferences.pairs.tolist() == [[2, 0]]
    assert read.preferences.weight.tolist() == [0]
    assert read.people.tolist() == [0]


def test_without_rewards_and_next_observations(tmp_path):
    made = pf.PreferenceFile.create(
        tmp_path / "a.jsonl",
        jnp.zeros(2, jnp.float32),
        bj.environments.Discrete(3),
        LENGTH,
        next_observation=False,
        reward=False,
    )
    made.append_segments(some())
    read = made.read().preferences.segments
    assert read.reward is None
    assert read.next_observation is None
    np.testing.assert_array_equal(read.observation, some().observation)


def test_what_a_data_set_becomes_through_a_file(filled):
    read = filled.read().preferences
    assert bits(read.segments) == bits(some())
    assert read.pairs.tolist() == [[0, 1], [1, 2]]
    assert (read.label.tolist(), read.weight.tolist()) == ([1, 0.5], [1, 0])
    assert (read.sources, read.iteration.tolist()) == (("uniform",), [4, 4])


def test_in_float32_as_users_run_it(filled):
    with jax.enable_x64(False):
        read = filled.read().preferences
    assert read.label.dtype == read.segments.reward.dtype == jnp.float32


# Labels of people.


def test_the_latest_label_of_each_person_counts_and_people_average(filled):
    filled.append_label(0, 0, by="Ben")
    filled.append_label(0, None, by="Cleo")
    filled.append_label(0, 0.5, by="Ada")
    read = filled.read()
    assert read.preferences.label[0] == 0.25
    assert read.people.tolist() == [2, 0]
    assert read.labels[0] == {"Ada": 0.5, "Ben": 0.0, "Cleo": None}
    filled.append_label(0, None, by="Ada")  # she skips it after all
    filled.append_label(0, None, by="Ben")
    assert filled.read().preferences.weight.tolist() == [0, 0]


def test_undo_brings_the_label_before_back(filled):
    filled.append_label(0, 0, by="Ada")
    filled.append_label(0, 0.5, by="Ben")
    filled.undo(0, by="Ada")
    assert filled.read().labels[0] == {"Ada": 1.0, "Ben": 0.5}
    filled.undo(0, by="Ada")
    assert filled.read().labels[0] == {"Ben": 0.5}
    filled.undo(0, by="Ada")  # nothing is left
    with pytest.raises(bj.InputError, match=r"line 12: undo: 'Ada' has no label of pair 0 that could be taken back"):
        filled.read()


# Several writers.


def _write(file, name, count, barrier):
    file = pf.PreferenceFile(file) if isinstance(file, str) else file
    barrier.wait()
    for k in range(count):
        ids = file.append_segments(some(2, seed=100 * name + k))
        (pair,) = file.append_pairs([ids], source=f"by {name}", iteration=k)
        file.append_label(pair, 1, by=str(name))


def check_all(file, writers, count):
    read = file.read()
    assert read.preferences.count == writers * count
    assert read.preferences.segments.count == 2 * writers * count
    assert read.segment_ids == tuple(range(2 * writers * count))
    assert read.people.tolist() == [1] * (writers * count)
    sources = [read.preferences.sources[s] for s in read.preferences.source.tolist()]
    made = sorted(zip(sources, read.preferences.iteration.tolist(), strict=True))
    assert made == sorted((f"by {name}", k) for name in range(writers) for k in range(count))
    for p, labels in enumerate(read.labels):
        assert list(labels) == [sources[p].removeprefix("by ")]


def test_threads_that_append_at_once_lose_nothing(file):
    barrier = threading.Barrier(4)
    # Two have the file open for themselves, two share it.
    opened = [file.path, file.path, file, file]
    threads = [threading.Thread(target=_write, args=(opened[name], name, 8, barrier)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_all(file, 4, 8)


@pytest.mark.slow
def test_processes_that_append_at_once_lose_nothing(file):
    """A second process beside this one: importing the library again is what takes the time."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    other = context.Process(target=_write, args=(file.path, 0, 12, barrier))
    other.start()
    _write(file.path, 1, 12, barrier)
    other.join()
    assert other.exitcode == 0
    check_all(file, 2, 12)


# Crashes.


def test_a_crash_at_any_byte_loses_no_earlier_line_and_is_mended(filled):
    whole = b"".join(lines_of(filled))
    before = whole[: whole.rindex(b"\n", 0, -1) + 1]
    for cut in sorted({len(before), len(before) + 1, len(before) + 20, len(whole) - 2, len(whole) - 1}):
        rewrite(filled, [whole[:cut]])
        at_once = filled.read()
        # Without its newline alone the line is whole.
        complete = cut == len(whole) - 1
        labels = [1, 0.5] if complete else [0.5, 0.5]
        assert at_once.preferences.label.tolist() == labels
        assert at_once.torn == ((7,) if len(before) < cut < len(whole) - 1 else ())
        assert lines_of(filled)[-1] == whole[:cut].splitlines(keepends=True)[-1]  # reading changes nothing
        file = pf.PreferenceFile(filled.path)
        file.append_label(1, 0, by="Ben")
        file.append_label(1, 1, by="Cleo")
        mended = file.read()
        assert mended.torn == at_once.torn
        assert mended.preferences.label.tolist() == [labels[0], 0.5]
        assert mended.people.tolist() == [int(complete), 2]
        assert b"".join(lines_of(file)).startswith(whole[:cut])  # not a byte was removed


def test_a_line_that_calls_a_whole_one_torn_is_refused(filled):
    rewrite(filled, [*lines_of(filled), b'{"torn": 7}\n'])
    read = filled.read(strict=False)
    assert [line.line for line in read.refused] == [8]
    assert read.preferences.label.tolist() == [1, 0.5]


def test_only_what_is_no_json_can_be_torn(filled):
    """A wrong line is told, also as the last one without its newline, and also if a later line calls it torn."""
    wrong = as_bytes({**PAIR, "second": 9})
    rewrite(filled, [*lines_of(filled), wrong[:-1]])
    assert [line.line for line in filled.read(strict=False).refused] == [8]
    rewrite(filled, [*lines_of(filled)[:7], wrong, b'{"torn": 8}\n'])
    assert [line.line for line in filled.read(strict=False).refused] == [8, 9]


# Lines that are wrong.

SEGMENT = {
    "segment": 3,
    "observation": [[0, 0]] * 3,
    "next_observation": [[0, 0]] * 3,
    "action": [0, 1, 2],
    "valid": [True, True, False],
    "reward": [0, 0.5, 1],
}
PAIR = {"pair": 2, "first": 0, "second": 2, "source": "a", "iteration": 0}
LABEL = {"label": 1, "value": 0.5, "by": "Ben", "time": "2025-01-31T12:00:00Z"}
WRONG = {
    "nothing": ("", "no JSON"),
    "half": ('{"label": 1, "val', "no JSON"),
    "list": ("[1, 2]", r"expected an object, got \[1, 2\]"),
    "deep": ("[" * 100_000, "no JSON"),
    "bytes": (b"\xff\xfe", "no JSON"),
    "kind": ({"remark": 1}, "expected one of segment, pair, label, undo, torn"),
    "NaN": (json.dumps({**LABEL, "value": float("nan")}), "NaN is no number"),
    "infinite": (json.dumps({**SEGMENT, "reward": [0, 0, float("inf")]}), "Infinity is no number"),
    "huge": (json.dumps(SEGMENT).replace("0.5", "1e999"), "reward: NaN, or a number beyond float64"),
    "huge and whole": (
        {**SEGMENT, "reward": [0, 0.5, 10**400]},
        "reward: expected numbers of float64, got a very large number",
    ),
    "whole, beyond float32": (
        {**SEGMENT, "observation": [[0, 10**200]] * 3},
        "observation: NaN, or a number beyond float32",
    ),
    "beyond float32": ({**SEGMENT, "observation": [[0, 1e39]] * 3}, "observation: NaN, or a number beyond float32"),
    "twice": ('{"undo": 0, "undo": 1, "by": "Ada", "time": "2025-01-31"}', "the field 'undo' is there twice"),
    "missing": ({k: v for k, v in SEGMENT.items() if k != "valid"}, "segment: it has no 'valid'"),
    "unknown": ({**PAIR, "remark": "x"}, "pair: unknown field 'remark'"),
    "two kinds": ({**PAIR, "segment": 5}, "segment: it has no 'observation'"),
    "number taken": ({**SEGMENT, "segment": 1}, "there is a segment 1 already"),
    "pair taken": ({**PAIR, "pair": 1}, "there is a pair 1 already"),
    "number": ({**PAIR, "pair": -1}, "pair: expected a whole number"),
    "true": ({**PAIR, "first": True}, "first: expected a whole number from 0 on, got True"),
    "no segment": ({**PAIR, "second": 9}, "second: there is no segment 9 before this line"),
    "no pair": ({**LABEL, "label": 7}, "label: there is no pair 7"),
    "label": ({**LABEL, "value": 1.5}, r"a label is 1 \(the first is better\), 0.5, 0 or null"),
    "label of text": ({**LABEL, "value": "first"}, "got 'first'"),
    "true label": ({**LABEL, "value": True}, "got True"),
    "nobody": ({**LABEL, "by": ""}, "by: expected a name"),
    "time": ({**LABEL, "time": "yesterday"}, "time: expected ISO 8601"),
    "shape": ({**SEGMENT, "observation": [[0, 0]] * 2}, "observation: expected a list of 3, got 2"),
    "inner shape": (
        {**SEGMENT, "observation": [[0, 0], [0], [0, 0]]},
        r"observation\[1\]: expected a list of 2, got 1",
    ),
    "no action": ({**SEGMENT, "action": [0, 1, 3]}, "action: expected numbers from 0 to 2"),
    "half an action": ({**SEGMENT, "action": [0, 1, 0.5]}, "action: expected numbers of int32, got 0.5"),
    "large action": ({**SEGMENT, "action": [0, 1, 2**40]}, "action: expected numbers of int32"),
    "valid": ({**SEGMENT, "valid": [1, 1, 0]}, "valid: expected numbers of bool, got 1"),
    "base64": (
        {**SEGMENT, "reward": {"dtype": "float64", "shape": [3], "base64": "!"}},
        "reward: its base64 cannot be read",
    ),
    "bytes missing": (
        {**SEGMENT, "reward": {"dtype": "float64", "shape": [3], "base64": "AAAA"}},
        "reward: expected 24 bytes of base64, got 3",
    ),
    "dtype": (
        {**SEGMENT, "reward": {"dtype": "float32", "shape": [3], "base64": ""}},
        r"reward: expected float64\[3\], got float32\[3\]",
    ),
    "hidden NaN": (
        {**SEGMENT, "reward": {"dtype": "float64", "shape": [3], "base64": "////////////////////////////////"}},
        "reward: NaN",
    ),
    "undo": ({"undo": 1, "by": "Ben", "time": "2025-01-31"}, "'Ben' has no label of pair 1"),
}


def as_bytes(line):
    text = json.dumps(line) if isinstance(line, dict) else line
    return (text if isinstance(text, bytes) else text.encode()) + b"\n"


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_is_refused_by_its_number_and_the_rest_is_kept(filled, name):
    line, message = WRONG[name]
    good = lines_of(filled)
    rewrite(filled, [*good[:6], as_bytes(line), good[6]])
    with pytest.raises(bj.InputError, match=rf"line 7: .*{message}"):
        filled.read()
    read = filled.read(strict=False)
    assert [refused.line for refused in read.refused] == [7]
    assert bits(read.preferences.segments) == bits(some())
    assert read.preferences.pairs.tolist() == [[0, 1], [1, 2]]
    assert read.preferences.label.tolist() == [1, 0.5]
    # And it is still possible to append.
    filled.append_pairs([filled.append_segments(some(2))])
    assert filled.read(strict=False).preferences.count == 3


def test_the_lines_of_the_cases_above_are_right_but_for_one_thing(filled):
    rewrite(filled, [*lines_of(filled), *map(as_bytes, (SEGMENT, PAIR, LABEL))])
    read = filled.read()
    assert read.segment_ids == (0, 1, 2, 3)
    assert read.preferences.label.tolist() == [1, 0.5, 0.5]
    assert read.people.tolist() == [1, 1, 0]


@SMALL
@given(st.data())
def test_corrupted_files_are_read_or_refused_and_never_break(filled, draw):
    """Bytes are changed, and lines are swapped, dropped and doubled: reading raises InputError or returns, by line."""
    lines = lines_of(filled)[:7]
    for _ in range(draw.draw(st.integers(1, 3))):
        k = draw.draw(st.integers(1, len(lines) - 1))
        kind = draw.draw(st.sampled_from(["byte", "swap", "drop", "double"]))
        if kind == "byte":
            place = draw.draw(st.integers(0, len(lines[k]) - 2))
            byte = draw.draw(st.integers(32, 255))
            lines[k] = lines[k][:place] + bytes([byte]) + lines[k][place + 1 :]
        elif kind == "swap" and k + 1 < len(lines):
            lines[k], lines[k + 1] = lines[k + 1], lines[k]
        elif kind == "drop" and len(lines) > 3:
            del lines[k]
        elif kind == "double":
            lines.insert(k, lines[k])
    before = lines_of(filled)
    rewrite(filled, lines)
    read = filled.read(strict=False)
    assert read.torn == ()
    # Each line is used or refused.
    used = len(read.segment_ids) + len(read.pair_ids) + sum(map(len, read.labels))
    assert used + len(read.refused) >= len(lines) - 1 - lines.count(before[6])
    assert [line.line for line in read.refused] == sorted({line.line for line in read.refused})
    assert all(2 <= line.line <= len(lines) for line in read.refused)
    if read.refused:
        with pytest.raises(bj.InputError, match=rf"line {read.refused[0].line}: "):
            filled.read()
    rewrite(filled, before[:7])


# What is refused before it is written.


def bad_segments(**changes):
    one = some(2)
    return pf.Segments(
        changes.get("observation", one.observation),
        changes.get("action", one.action),
        changes.get("next_observation", one.next_observation),
        valid=one.valid,
        reward=changes.get("reward", one.reward),
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda f: f.append_segments(bad_segments(observation=np.full((2, 3, 2), np.nan, np.float32))),
            "observation: NaN",
        ),
        (
            lambda f: f.append_segments(bad_segments(action=np.full((2, 3), 3, np.int32))),
            "action: expected numbers from 0 to 2",
        ),
        (lambda f: f.append_segments(bad_segments(reward=None)), "they have no reward"),
        (lambda f: f.append_segments(bad_segments(next_observation=None)), "they have no next_observation"),
        (lambda f: f.append_segments(some(2, length=4)), "expected 3 steps as in the header, got 4"),
        (
            lambda f: f.append_segments(bad_segments(observation=np.zeros((2, 3, 5), np.float32))),
            r"expected a list of 2, got 5",
        ),
        (lambda f: f.append_pairs([[0, 8]]), "pairs: there is no segment 8"),
        (lambda f: f.append_pairs([[0.0, 1.0]]), "pairs: expected whole numbers"),
        (lambda f: f.append_pairs([[0, 1]], source=""), "source: expected a name"),
        (lambda f: f.append_pairs([[0, 1]], iteration=-1), "iteration: expected a whole number from 0 on"),
        (lambda f: f.append_label(9, 1, by="Ada"), "pair: there is no pair 9"),
        (lambda f: f.append_label("0", 1, by="Ada"), "pair: expected an integer"),
        (lambda f: f.append_label(0, 2, by="Ada"), "a label is 1"),
        (lambda f: f.append_label(0, 1, by=3), "by: expected a name"),
        (lambda f: f.append_label(0, 1, by="Ada", time="now"), "time: expected ISO 8601"),
        (lambda f: f.undo(9, by="Ada"), "pair: there is no pair 9"),
        (lambda f: pf.PreferenceFile(f.path + "x"), "cannot be read"),
        (lambda f: pf.PreferenceFile.create(f.path, jnp.zeros(2), bj.environments.Discrete(3), 3), "exists"),
        (
            lambda f: pf.PreferenceFile.create(f.path + "x", (1, 2), bj.environments.Discrete(3), 3),
            "expected an array or a dict",
        ),
        (
            lambda f: pf.PreferenceFile.create(f.path + "x", jnp.zeros(2), bj.environments.Discrete(3), 3, about={1j}),
            "about: it cannot be",
        ),
    ],
)
def test_what_cannot_be_read_is_not_written(filled, call, message):
    before = lines_of(filled)
    with pytest.raises(bj.InputError, match=message):
        call(filled)
    assert lines_of(filled) == before
    assert os.listdir(os.path.dirname(filled.path)) == ["a.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "no header of bilevel_jax.preferences"),
        ({"version": 2}, "version 2 is not known; this library reads 1"),
        ({"length": 0}, "length: expected a whole number from 1 on"),
        ({"action_space": {"discrete": 0}}, "action_space: expected a number of actions"),
        ({"action_space": {"box": {}}}, "action_space: it has no 'shape'"),
        ({"observation": {"shape": [2], "dtype": "complex64"}}, "observation: expected a dtype of"),
        ({"reward": 1}, "reward: expected true or false"),
        ({"remark": 1}, "unknown field 'remark'"),
    ],
)
def test_a_wrong_header_is_refused(filled, change, message):
    lines = lines_of(filled)
    rewrite(filled, [as_bytes({**json.loads(lines[0]), **change}), *lines[1:]])
    with pytest.raises(bj.InputError, match=rf"line 1: .*{message}"):
        pf.PreferenceFile(filled.path)


def test_files_are_written_as_documented(filled):
    lines = [json.loads(line) for line in lines_of(filled)]
    assert lines[0]["format"] == "bilevel_jax.preferences"
    assert lines[0]["version"] == 1
    assert lines[0]["observation"] == {"shape": [2], "dtype": "float32"}
    assert set(lines[1]) == {"segment", "observation", "action", "next_observation", "valid", "reward"}
    assert lines[4] == {"pair": 0, "first": 0, "second": 1, "source": "uniform", "iteration": 4}
    assert lines[6] == {"label": 0, "value": 1.0, "by": "Ada", "time": "2025-01-31T12:00:00+00:00"}
