"""The server of the labelling page, by HTTP: who gets which pair, what is written, and which requests are refused."""

import base64
import collections
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax import preferences as pf
from bilevel_jax.experiments import cli
from bilevel_jax.experiments.labelling.clips import COLOURS, as_clip, as_pictures
from bilevel_jax.experiments.labelling.desk import LEASE, Desk
from bilevel_jax.experiments.labelling.server import LARGEST, LabelServer
from bilevel_jax.preferences.lines import Segment

LENGTH = 3


def made(directory, pairs=4, about=None):
    file = pf.PreferenceFile.create(
        directory / "labels.jsonl", jnp.zeros(2, jnp.float32), bj.environments.Discrete(3), LENGTH, about=about
    )
    rng = np.random.default_rng(0)
    observation = rng.normal(size=(5, LENGTH + 1, 2)).astype(np.float32)
    file.append_segments(
        pf.Segments(
            observation[:, :-1],
            rng.integers(0, 3, (5, LENGTH)).astype(np.int32),
            observation[:, 1:],
            valid=np.arange(LENGTH)[None] < np.array([[3], [2], [0], [3], [1]]),
            reward=np.full((5, LENGTH), 7654.25),
        )
    )
    file.append_pairs([[n % 5, (n + 1) % 5] for n in range(pairs)])
    return file


@pytest.fixture
def file(tmp_path):
    return made(tmp_path)


@contextlib.contextmanager
def serving(directory, **options):
    with LabelServer(directory, port=0, **options) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server(file, tmp_path):
    with serving(tmp_path) as server:
        yield server


def raw(server, method, path, body=None, headers=None):
    """Status, headers, and body of an answer; `headers` of None leave one out."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    usual = {"Host": f"127.0.0.1:{server.server_port}"}
    if method == "POST":
        usual |= {"Content-Type": "application/json", "X-Token": server.token, "Content-Length": str(len(body or b""))}
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in (usual | (headers or {})).items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders()
    with contextlib.suppress(ConnectionError):  # the server may refuse before it has read all
        connection.send(body or b"")
    response = connection.getresponse()
    answer = response.status, response.headers, response.read()
    connection.close()
    return answer


def post(server, path, **request):
    status, _, body = raw(server, "POST", path, json.dumps(request).encode())
    return status, json.loads(body)


def ask(server, path, **request):
    status, answer = post(server, path, **request)
    assert status == 200, answer
    return answer


def label(server, by, answer, value):
    return ask(server, "/label", by=by, file=answer["file"], pair=answer["pair"]["number"], value=value)


def number(answer):
    return None if answer["pair"] is None else answer["pair"]["number"]


def labels(file):
    return list(file.read().labels)


# Who gets which pair, and what is written.


def test_a_person_goes_through_all_pairs(server, file):
    answer = ask(server, "/next", by="Ada")
    assert answer["counts"] == {"mine": 0, "skipped": 0, "all": 0, "pairs": 4, "left": 4}
    for n, value in enumerate([1, 0.5, 0, None]):
        assert number(answer) == n
        answer = label(server, " Ada ", answer, value)
    assert labels(file) == [{"Ada": 1}, {"Ada": 0.5}, {"Ada": 0}, {"Ada": None}]
    assert answer["pair"] is None
    assert answer["counts"] == {"mine": 4, "skipped": 1, "all": 3, "pairs": 4, "left": 0}


def test_what_another_program_appends_appears(server, file):
    answer = ask(server, "/next", by="Ada")
    for _ in range(4):
        answer = label(server, "Ada", answer, 1)
    assert answer["pair"] is None
    (new,) = file.append_pairs([[4, 0]])
    assert number(ask(server, "/next", by="Ada")) == new == 4


def test_pairs_that_nobody_has_judged_come_first(server, file):
    file.append_label(0, 1, by="Ben")
    file.append_label(1, None, by="Ben")  # which is no judgement
    seen = []
    answer = ask(server, "/next", by="Ada")
    while answer["pair"]:
        seen.append(number(answer))
        answer = label(server, "Ada", answer, 1)
    assert seen == [2, 3, 1, 0]


def test_a_pair_is_one_persons_while_others_are_free(server, file):
    people = ["Ada", "Ben", "Cem", "Dan"]
    assert [number(ask(server, "/next", by=name)) for name in people] == [0, 1, 2, 3]
    assert [number(ask(server, "/next", by=name)) for name in people] == [0, 1, 2, 3]  # they keep theirs
    assert number(ask(server, "/next", by="Eva")) == 0  # nothing is free
    file.append_pairs([[0, 1]])
    assert number(ask(server, "/next", by="Eva")) == 4


def test_a_pair_is_free_again_when_its_time_is_over(file, tmp_path):
    clock = [0.0]
    desk = Desk(tmp_path, now=lambda: clock[0])
    assert number(desk.next("Ada")) == 0
    clock[0] = 0.9 * LEASE
    assert number(desk.next("Ada", holding=0)) == 0  # which holds it for longer
    clock[0] = 1.8 * LEASE
    assert number(desk.next("Ben")) == 1
    clock[0] = 2.0 * LEASE
    assert number(desk.next("Cem")) == 0
    assert number(desk.next("Ada", holding=0)) == 2  # somebody else looks at it now
    clock[0] = 9 * LEASE
    assert number(desk.next("Ben", holding=3)) == 3  # their own lease was over, and nobody took it


def test_clips_are_sent_once(server):
    first = ask(server, "/next", by="Ada")
    assert len(first["pair"]["clips"]) == 2
    assert ask(server, "/next", by="Ada", file=first["file"], holding=0)["pair"] == {"number": 0, "clips": None}


def test_people_at_once_lose_nothing_and_share_no_pair(tmp_path):
    file = made(tmp_path, pairs=40)
    people = ["Ada", "Ben", "Cem"]
    given = collections.defaultdict(dict)  # of a pair, the label of each person
    failures = []
    with serving(tmp_path) as server:
        together = threading.Barrier(len(people))

        def work(name):
            try:
                together.wait()
                answer = ask(server, "/next", by=name)
                for n in range(12):
                    pair, value = number(answer), (1, 0, 0.5, None)[n % 4]
                    given[pair][name] = value
                    answer = label(server, name, answer, value)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(name,)) for name in people]
        # A program that trains appends at the same time.
        threads.append(threading.Thread(target=lambda: [file.append_pairs([[0, 2]]) for _ in range(10)]))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    read = file.read()
    assert [dict(given[pair]) for pair in range(50)] == list(read.labels)
    # Never two of them at the same pair, while there were free ones.
    assert sorted(len(given[pair]) for pair in range(50)) == 14 * [0] + 36 * [1]


def test_one_request_at_a_time_reads_and_writes(file, tmp_path, monkeypatch):
    desk = Desk(tmp_path)
    inside, most = [], []
    look = desk.follower.look

    def slowly():
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        look()
        inside.pop()

    monkeypatch.setattr(desk.follower, "look", slowly)
    work = [lambda: desk.label("Ada", 0, 1), lambda: desk.undo("Ben"), lambda: desk.next("Cem")]
    file.append_label(1, 1, by="Ben")
    threads = [threading.Thread(target=each) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert labels(file)[:2] == [{"Ada": 1}, {}]


def test_undo_takes_back_ones_own_last_answer_and_shows_its_pair(server, file):
    answer = ask(server, "/next", by="Ada")
    for value in (1, 0):
        answer = label(server, "Ada", answer, value)
    label(server, "Ben", ask(server, "/next", by="Ben"), 1)
    assert number(ask(server, "/next", by="Ada")) == 2
    answer = ask(server, "/undo", by="Ada")
    assert (number(answer), answer["counts"]["mine"]) == (1, 1)
    assert len(answer["pair"]["clips"]) == 2
    assert labels(file) == [{"Ada": 1}, {}, {}, {"Ben": 1}]
    assert number(label(server, "Ada", answer, 0.5)) == 2
    assert labels(file)[1] == {"Ada": 0.5}
    assert [number(ask(server, "/undo", by="Ada")) for _ in range(2)] == [1, 0]  # and further back
    assert labels(file) == [{}, {}, {}, {"Ben": 1}]
    status, answer = post(server, "/undo", by="Ada")
    assert (status, answer["error"]) == (400, "undo: Ada has no answer that could be taken back")
    assert not file.read().refused


def test_undo_of_an_earlier_day(server, file):
    file.append_label(2, 1, by="Ada")
    assert number(ask(server, "/undo", by="Ada")) == 2


def test_an_answer_that_is_sent_again_is_written_once(server, file):
    """Where the server wrote it, and the page did not hear so."""
    answer = ask(server, "/next", by="Ada")
    for _ in range(2):
        assert number(label(server, "Ada", answer, 1)) == 1
    ask(server, "/undo", by="Ada")
    assert labels(file)[0] == {}


def test_an_answer_to_another_file_is_not_written(server, file, tmp_path):
    answer = ask(server, "/next", by="Ada")
    (tmp_path / "other").mkdir()
    other = made(tmp_path / "other")
    os.replace(other.path, file.path)
    request = {"by": "Ada", "pair": 0, "value": 1}
    assert post(server, "/label", **request, file=answer["file"])[0] == 409
    assert post(server, "/label", **request)[0] == 409
    again = ask(server, "/next", by="Ada", file=answer["file"], holding=0)
    assert again["pair"]["clips"] is not None  # number 0 of the one is not number 0 of the other
    assert labels(pf.PreferenceFile(file.path))[0] == {}
    label(server, "Ada", again, 1)
    assert labels(pf.PreferenceFile(file.path))[0] == {"Ada": 1}


def test_a_file_that_is_away_for_a_while(server, file):
    answer = ask(server, "/next", by="Ada")
    os.rename(file.path, file.path + ".away")
    request = {"by": "Ada", "file": answer["file"], "pair": 0, "value": 1}
    status, said = post(server, "/label", **request)
    assert status == 503
    assert "cannot be read (No such file" in said["error"]
    os.rename(file.path + ".away", file.path)
    ask(server, "/label", **request)
    assert labels(file)[0] == {"Ada": 1}


def test_a_disk_that_is_full(server, file, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    answer = ask(server, "/next", by="Ada")
    with monkeypatch.context() as patch:
        patch.setattr("bilevel_jax.preferences.file.os.fsync", full)
        status, said = post(server, "/label", by="Ada", file=answer["file"], pair=0, value=1)
    assert (status, said["error"]) == (503, "the answer cannot be written (No space left on device)")


def test_lines_that_are_wrong_are_told_and_the_others_used(tmp_path, capfd):
    file = made(tmp_path)
    with open(file.path, "ab") as opened:
        opened.write(b'nonsense\n{"label": 77, "value": 1, "by": "Ada", "time": "2025-01-31"}\n')
    file.append_pairs([[0, 1]])
    with serving(tmp_path) as server:
        answer = ask(server, "/next", by="Ada")
    assert answer["counts"]["pairs"] == 5
    assert answer["refused"]["count"] == 2
    assert [line["line"] for line in answer["refused"]["lines"]] == [11, 12]
    assert answer["refused"]["lines"][1]["reason"] == "label: there is no pair 77 before this line"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"by": ""}, "by: expected a name of 1 to 80 printable letters"),
        ({"by": "A" * 81}, "by: "),
        ({"by": "A\nB"}, "by: "),
        ({"by": 3}, "by: "),
        ({"by": None}, "by: "),
        ({"value": 0.7}, "value: expected 1, 0.5, 0 or null, got 0.7"),
        ({"value": True}, "value: expected"),
        ({"value": [1]}, "value: expected"),
        ({"pair": 4}, "pair: there is no pair 4"),
        ({"pair": True}, "pair: "),
        ({"pair": [0]}, "pair: "),
    ],
)
def test_answers_that_are_none(server, file, request_, message):
    known = {"by": "Ada", "pair": 0, "value": 1, "file": ask(server, "/next", by="Ben")["file"]}
    status, answer = post(server, "/label", **(known | request_))
    assert (status, answer["error"][: len(message)]) == (400, message)
    del known["value"]
    assert post(server, "/label", **known) == (400, {"error": "value: it is missing"})
    assert labels(file) == [{}, {}, {}, {}]


# Which requests are refused.


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}", "127.0.0.2:{port}", "", None]
)
def test_another_host_is_refused(server, host):
    """A page of another name may have its name point here."""
    headers = {"Host": host if host is None else host.format(port=server.server_port)}
    for method, path in (("GET", "/"), ("GET", "/page.js"), ("POST", "/next")):
        status, _, body = raw(server, method, path, b'{"by": "Ada"}', headers)
        assert status == 403
        assert server.token.encode() not in body


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:{port}", "LOCALHOST", "127.0.0.1:9999"])
def test_ones_own_hosts(server, host):
    """The port may be that of a tunnel."""
    headers = {"Host": host.format(port=server.server_port)}
    assert raw(server, "GET", "/", headers=headers)[0] == 200


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/next", {}, 200),
        ("/next", {"X-Token": None}, 403),
        ("/next", {"X-Token": "x" * 43}, 403),
        ("/next", {"X-Token": "\xff"}, 403),
        ("/next", {"Origin": "http://evil.example"}, 403),
        ("/next", {"Origin": "null"}, 403),
        ("/next", {"Content-Type": "text/plain"}, 415),
        ("/next", {"Content-Type": None}, 415),
        ("/next", {"Content-Length": None}, 411),
        ("/next", {"Content-Length": "-1"}, 411),
        ("/next", {"Content-Length": str(LARGEST + 1)}, 413),
        ("/next", {"Content-Length": "0" * 10 + "99999"}, 413),
        ("/next", {"Content-Length": "9" * 5000}, 413),
        ("/next", {"Content-Length": "0"}, 400),
        ("/", {}, 404),
        ("/page.js", {}, 404),
    ],
)
def test_what_a_request_needs(server, path, headers, status):
    assert raw(server, "POST", path, b'{"by": "Ada"}', headers)[0] == status


def test_the_origin_is_the_host(server):
    host = f"localhost:{server.server_port}"
    headers = {"Host": host, "Origin": f"http://{host}"}
    assert raw(server, "POST", "/next", b'{"by": "Ada"}', headers)[0] == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"[" * 4000, b"\xff"])
def test_bodies_that_are_no_object(server, body):
    assert raw(server, "POST", "/next", body)[0] == 400


@pytest.mark.parametrize(
    "path",
    ["/labels.jsonl", "/../labels.jsonl", "/desk.py", "/page.js/..", "/%2e%2e/server.py", "page.js"],
)
def test_no_file_is_served_by_its_path(server, path):
    assert raw(server, "GET", path)[0] == 404


def test_the_page_and_its_parts(server):
    status, headers, body = raw(server, "GET", "/")
    assert status == 200
    page = body.decode()
    assert server.token in page
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "Access-Control-Allow-Origin" not in headers
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=", page)  # nothing that the policy would stop
    for name in re.findall(r'(?:href|src)="((?!data:)[^"]+)"', page):
        status, _, body = raw(server, "GET", f"/{name}")
        assert status == 200
        assert b"http" not in body  # nothing from elsewhere
    assert raw(server, "GET", "/drawings.js")[1]["Content-Type"] == "text/javascript; charset=utf-8"


def test_a_suggested_name_is_no_html(tmp_path, file):
    with serving(tmp_path, by='"><script>') as server:
        page = raw(server, "GET", "/")[2].decode()
    assert '"><script>' not in page


def test_each_run_has_a_token_of_its_own(tmp_path, file):
    with serving(tmp_path) as one, serving(tmp_path) as two:
        assert one.token != two.token


# Where and what is served.


@pytest.mark.parametrize("host", ["::1", "localhost", "0.0.0.0"])
def test_other_addresses(tmp_path, file, host):
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
    except OSError:
        pytest.skip(f"this machine has no {host}")
    with serving(tmp_path, host=host) as server:
        url = server.url if host != "0.0.0.0" else f"http://127.0.0.1:{server.server_port}/"
        with urllib.request.urlopen(url) as page:
            assert page.status == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0.0}, "--fps: expected steps per second above 0"),
        ({"fps": float("nan")}, "--fps: "),
        ({"port": 65536}, "--port: expected 0 .* to 65535, got 65536"),
        ({"port": -1}, "--port: "),
        ({"host": ""}, "--host: expected an address"),
        ({"host": "192.0.2.1"}, "--host, --port: 192.0.2.1, 0 cannot be served"),
        ({"host": "no such host"}, "--host, --port: no such host, 0 cannot be served"),
    ],
)
def test_options_that_are_refused(tmp_path, file, options, message):
    with pytest.raises(bj.InputError, match=message), LabelServer(tmp_path, **({"port": 0} | options)):
        pass


def test_errors_of_the_command(tmp_path, capsys):
    def error(*arguments):
        assert cli.main(["label", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert f"there is no directory {tmp_path}/none; make one" in error(tmp_path / "none")
    assert f"{tmp_path} holds no labels.jsonl; make it by" in error(tmp_path)
    (tmp_path / "labels.jsonl").write_text("{}\n")
    assert "labels.jsonl, line 1: the first line is no header" in error(tmp_path)
    (tmp_path / "labels.jsonl").unlink()
    made(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port: {port} is in use on 127.0.0.1; name another, or 0" in error(tmp_path, "--port", port)


@pytest.mark.slow
def test_the_command_until_ctrl_c(tmp_path):
    file = made(tmp_path)
    with open(file.path, "ab") as opened:
        opened.write(b"nonsense\n")
    command = [sys.executable, "-m", "bilevel_jax.experiments.cli", "label", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        port = re.match(r"http://127\.0\.0\.1:(\d+)/ shows pairs of ", line)
        assert port, line
        with urllib.request.urlopen(f"http://127.0.0.1:{port[1]}/") as page:
            assert page.status == 200
        file.append_label(0, 1, by="Ada")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == "\n1 of 4 pairs have labels\n"
    assert re.fullmatch(r".*labels\.jsonl, line 11: no JSON .*; the line is not used\n", err)


# Clips.


def test_a_clip_has_the_valid_steps_and_what_they_led_to(server, file):
    clips = ask(server, "/next", by="Ada")["pair"]["clips"]
    segments = file.read().preferences.segments
    for n, steps in ((0, 3), (1, 2)):
        seen = np.concatenate([segments.observation[n, :steps], segments.next_observation[n, steps - 1 : steps]])
        np.testing.assert_array_equal(np.asarray(clips[n]["entries"], np.float32), seen)
        assert clips[n]["actions"] == segments.action[n, :steps, None].tolist()
        assert (clips[n]["steps"], clips[n]["length"], clips[n]["size"]) == (steps, LENGTH, 2)
    assert b"7654.25" not in raw(server, "POST", "/next", b'{"by": "Ada"}')[2]  # who labels does not see rewards
    ask(server, "/next", by="Ben")
    empty = ask(server, "/next", by="Cem")["pair"]["clips"][0]
    assert (empty["steps"], empty["entries"], empty["actions"]) == (0, [], [])


def test_words_for_people(tmp_path):
    about = {"question": "Which is faster?", "environment": "cart_pole", "channels": 3, "actions": ["stay", "go", 2]}
    made(tmp_path, about=about)
    answer = Desk(tmp_path).next("Ada")
    assert (answer["question"], answer["environment"]) == ("Which is faster?", "cart_pole")
    assert (answer["actions"], answer["legend"]) == (["stay", "go", "2"], [])


def header(observation, about=None, following=False):
    return pf.Header(observation, {"discrete": 2}, 2, following, False, about)


def test_images_are_sent_as_colours():
    frames = np.zeros((2, 10, 9, 4), bool)
    frames[0, 1, 2, 0] = frames[1, 3, 4, 3] = True
    segment = Segment({"speed": np.zeros(2), "frame": frames}, np.zeros(2, int), None, np.ones(2, bool), None)
    clip = as_clip(segment, header(None))
    shown = np.frombuffer(base64.b64decode(clip["pixels"]), np.uint8).reshape(2, clip["height"], clip["width"], 3)
    expected = np.zeros((2, 10, 9, 3), np.uint8)
    expected[0, 1, 2], expected[1, 3, 4] = COLOURS[0], COLOURS[3]
    np.testing.assert_array_equal(shown, expected)
    assert "entries" not in clip


def test_large_images_are_sent_smaller():
    frames = np.arange(2 * 600 * 300, dtype=np.uint8).reshape(2, 600, 300, 1)
    clip = as_clip(Segment(frames, np.zeros(2, int), None, np.ones(2, bool), None), header(None))
    assert (clip["height"], clip["width"]) == (200, 100)


@pytest.mark.parametrize(
    ("frame", "shown"),
    [
        (np.array([[7]], np.uint8), [7, 7, 7]),
        (np.array([[[1, 2, 3]]], np.uint8), [1, 2, 3]),
        (np.array([[[1, 2, 3, 4]]], np.uint8), [4, 4, 4]),
        (np.array([[0.2]], np.float32), [51, 51, 51]),
        (np.array([[[0.0, 0.2, 1.0]]]), [0, 51, 255]),
        (np.array([[[0.0, 51.0, 255.0]]]), [0, 51, 255]),
        (np.array([[[0.0, 1.0, 1.0, 0.0]]]), COLOURS[1 + 1].tolist()),
        (np.array([[[True]]]), COLOURS[0].tolist()),
    ],
)
def test_colours(frame, shown):
    assert as_pictures(frame[None])[0, 0, 0].tolist() == shown


def test_dicts_and_numbers_have_names():
    observation = {"body": {"speed": np.ones((2, 2)), "on": np.array([True, False])}, "state": np.array([3, 4])}
    clip = as_clip(Segment(observation, np.zeros((2, 1)), None, np.ones(2, bool), None), header(None))
    assert clip["names"] == ["body.speed 0", "body.speed 1", "body.on", "state"]
    assert clip["entries"] == [[1, 1, 1, 3], [1, 1, 0, 4]]
