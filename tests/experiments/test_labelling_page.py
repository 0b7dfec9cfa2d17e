"""The labelling page in headless Chromium, as people use it: keys, buttons, two people, a server that is gone.

It needs `pip install playwright` and a Chromium: Debian's (`apt-get install chromium`), or the one that
`python -m playwright install chromium` fetches where that site can be reached. Without them these tests are skipped.
"""

import os
import shutil
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax import preferences as pf
from bilevel_jax.experiments.labelling.server import LabelServer

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome")
HORIZON = 5


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        path = next(filter(None, map(shutil.which, NAMES)), None) or started.chromium.executable_path
        if not os.path.exists(path):
            pytest.skip("Chromium is not installed; apt-get install chromium")
        # Its sandbox refuses to run as root, as which containers run; the pages are ours.
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Open a page as a person of one's own; nothing may go wrong in it but requests to a server that is gone."""
    contexts, wrong = [], []

    def visit(server, name=None, **options):
        context = browser.new_context(viewport={"width": 1000, "height": 760}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: "Failed to load" in said.text or wrong.append(said.text))
        page.goto(server.url)
        if name is not None:
            page.fill("#entry", name)
            page.keyboard.press("Enter")
            page.wait_for_selector("#task:not([hidden])")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not wrong


def made(directory, pairs=4, about=None, shape=(4,), dtype=np.float32, valid=HORIZON):
    directory.mkdir(exist_ok=True)
    file = pf.PreferenceFile.create(
        directory / "labels.jsonl",
        jnp.zeros(shape, dtype),
        bj.environments.Discrete(2),
        HORIZON,
        next_observation=False,
        reward=False,
        about=about,
    )
    rng = np.random.default_rng(0)
    observation = (rng.normal(size=(2, HORIZON, *shape)) > 0.5).astype(dtype)
    steps = np.arange(HORIZON)[None] < np.array([[HORIZON], [valid]])
    file.append_segments(pf.Segments(observation, np.ones((2, HORIZON), np.int32), valid=steps))
    file.append_pairs(np.tile([0, 1], (pairs, 1)))
    return file


class Serving:
    """A server that can be ended and started again at the same port."""

    def __init__(self, directory, **options):
        self.directory, self.options, self.port = directory, options, 0
        self.start()

    def start(self):
        self.server = LabelServer(self.directory, port=self.port, **self.options)
        self.port, self.url = self.server.server_port, self.server.url
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def end(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def serve(tmp_path):
    started = []

    def serve(directory=tmp_path, **options):
        started.append(Serving(directory, **options))
        return started[-1]

    yield serve
    for serving in started:
        serving.end()


def shown(page):
    number = page.get_attribute("#task", "data-pair")
    return int(number) if number else None


def wait_for_pair(page, number):
    page.wait_for_selector(f'#task[data-pair="{"" if number is None else number}"]', state="attached")
    page.wait_for_timeout(300)  # for as long as it takes no answer


def labels(file):
    return list(file.read().labels)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("ArrowLeft", 1), ("1", 1), ("ArrowRight", 0), ("2", 0)],
        *[("=", 0.5), ("ArrowUp", 0.5), ("s", None), ("ArrowDown", None)],
    ],
)
def test_keys(visit, serve, tmp_path, key, value):
    file = made(tmp_path)
    page = visit(serve(), "Ada")
    wait_for_pair(page, 0)
    page.keyboard.press(key)
    wait_for_pair(page, 1)
    assert labels(file) == [{"Ada": value}, {}, {}, {}]


@pytest.mark.parametrize(
    ("name", "value"),
    [("Left is better", 1), ("Equally good", 0.5), ("Right is better", 0), ("Skip, cannot tell", None)],
)
def test_buttons(visit, serve, tmp_path, name, value):
    file = made(tmp_path)
    page = visit(serve(), "Ada")
    wait_for_pair(page, 0)
    page.get_by_role("button", name=name).click()
    wait_for_pair(page, 1)
    assert labels(file)[0] == {"Ada": value}


def test_by_the_keyboard_alone_with_the_suggested_name(visit, serve, tmp_path):
    file = made(tmp_path)
    page = visit(serve(by="Eva"))
    page.keyboard.press("ArrowLeft")  # in the field for the name
    page.keyboard.press("Enter")
    wait_for_pair(page, 0)
    assert labels(file)[0] == {}
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent").strip().startswith("Right"):
            break
    page.keyboard.press("Space")  # presses the button, and pauses nothing
    wait_for_pair(page, 1)
    assert labels(file)[0] == {"Eva": 0}
    assert page.get_attribute("#pause", "aria-pressed") == "false"


@pytest.mark.parametrize("key", ["u", "Backspace"])
def test_undo_and_counter(visit, serve, tmp_path, key):
    file = made(tmp_path)
    page = visit(serve(), "Ada")
    for n, pressed in enumerate(["ArrowLeft", "s"]):
        wait_for_pair(page, n)
        page.keyboard.press(pressed)
    wait_for_pair(page, 2)
    counter = page.inner_text("#counter")
    assert counter == "2 answered by you (1 skipped) · 1 of 4 labelled by anyone · 2 left for you"
    page.keyboard.press(key)
    wait_for_pair(page, 1)
    page.keyboard.press(key)
    wait_for_pair(page, 0)
    assert "taken back" in page.inner_text("#message")
    assert labels(file) == [{}, {}, {}, {}]
    page.keyboard.press("ArrowRight")
    wait_for_pair(page, 1)
    assert labels(file)[0] == {"Ada": 0}


def test_keys_that_are_no_answers(visit, serve, tmp_path):
    """Those of the browser, one that is held down, and a second press before anybody can have seen the next pair."""
    file = made(tmp_path)
    page = visit(serve(), "Ada")
    wait_for_pair(page, 0)
    page.keyboard.press("Control+ArrowLeft")
    page.keyboard.press("Alt+s")
    page.wait_for_timeout(300)
    assert labels(file)[0] == {}
    page.keyboard.down("ArrowLeft")
    page.keyboard.down("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    wait_for_pair(page, 1)
    page.keyboard.down("ArrowLeft")
    page.wait_for_selector('#task[data-pair="2"]')
    page.keyboard.press("2")
    page.wait_for_timeout(500)
    page.keyboard.down("ArrowLeft")  # repeated, as `down` of a key that is down is
    page.wait_for_timeout(500)
    assert labels(file) == [{"Ada": 1}, {"Ada": 1}, {}, {}]


def test_the_name_is_asked_once(visit, serve, tmp_path):
    made(tmp_path)
    page = visit(serve(), "  Ada ")
    wait_for_pair(page, 0)
    page.reload()
    wait_for_pair(page, 0)
    assert page.inner_text("#name") == "Ada"
    assert not page.is_visible("#naming")
    page.click("#rename")
    page.keyboard.press("Escape")  # and is Ada still
    page.keyboard.press("ArrowLeft")
    wait_for_pair(page, 1)
    page.click("#rename")
    page.fill("#entry", "Ben")
    page.keyboard.press("Enter")
    wait_for_pair(page, 2)  # Ada's is hers for a while
    assert page.inner_text("#counter").startswith("0 answered by you")


def test_without_a_name_there_is_no_labelling(visit, serve, tmp_path):
    file = made(tmp_path)
    page = visit(serve())
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(300)
    assert shown(page) is None
    assert labels(file)[0] == {}


def test_two_people_get_different_pairs_until_nothing_is_left(visit, serve, tmp_path):
    file = made(tmp_path)
    server = serve()
    ada, ben = visit(server, "Ada"), visit(server, "Ben")
    wait_for_pair(ada, 0)
    wait_for_pair(ben, 1)
    for _ in range(4):
        for page, key in ((ada, "ArrowLeft"), (ben, "ArrowRight")):
            before = shown(page)
            assert shown(ada) != shown(ben)
            page.wait_for_timeout(300)
            page.keyboard.press(key)
            page.wait_for_selector(f'#task:not([data-pair="{before}"])', state="attached")
    assert labels(file) == 4 * [{"Ada": 1, "Ben": 0}]
    assert ada.inner_text("#message").startswith("Left is better: written. Nothing is left")
    ada.wait_for_selector("text=/^Nothing is left/")
    assert ada.inner_text("#message") == "Nothing is left for you. New pairs appear here as they come."
    assert not ada.is_visible("#answers")
    (new,) = file.append_pairs([[1, 0]])
    wait_for_pair(ada, new)  # it asks every three seconds


def test_an_answer_is_kept_while_the_server_is_gone(visit, serve, tmp_path):
    """The one that comes back has another token."""
    file = made(tmp_path)
    server = serve()
    page = visit(server, "Ada")
    wait_for_pair(page, 0)
    server.end()
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#message.warning")
    assert "does not answer. Your answer is kept" in page.inner_text("#message")
    page.keyboard.press("ArrowRight")  # not an answer to anything now
    page.wait_for_timeout(300)
    page.keyboard.press("u")
    page.wait_for_selector("#message:not(.warning)")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#message.warning")
    server.start()
    wait_for_pair(page, 1)
    assert labels(file) == [{"Ada": 0}, {}, {}, {}]
    assert page.inner_text("#message") == "Right is better: written."


def test_a_folder_without_pairs_waits_for_them(visit, serve, tmp_path):
    file = made(tmp_path, pairs=0)
    page = visit(serve())
    page.fill("#entry", "Ada")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=There are no pairs yet.")
    file.append_pairs([[0, 1]])
    wait_for_pair(page, 0)
    assert page.is_visible("#answers")


def test_a_kept_answer_outlives_the_page(visit, serve, tmp_path):
    file = made(tmp_path)
    server = serve()
    page = visit(server, "Ada")
    wait_for_pair(page, 0)
    server.end()
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#message.warning")
    page.goto("about:blank")
    server.start()
    page.goto(server.url)
    wait_for_pair(page, 1)
    assert labels(file)[0] == {"Ada": 1}


def test_an_answer_to_another_file_is_dropped_and_said(visit, serve, tmp_path):
    made(tmp_path)
    server = serve()
    page = visit(server, "Ada")
    wait_for_pair(page, 0)
    server.end()
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#message.warning")
    other = made(tmp_path / "other", pairs=1)
    server.directory = tmp_path / "other"
    server.start()
    page.wait_for_selector("text=the answer is to a question of another file")
    page.wait_for_selector("text=of 1 labelled by anyone")
    page.wait_for_timeout(300)
    assert labels(other) == [{}]
    page.keyboard.press("ArrowRight")
    wait_for_pair(page, None)
    assert labels(other) == [{"Ada": 0}]


def test_lines_that_are_wrong_are_listed(visit, serve, tmp_path):
    file = made(tmp_path)
    with open(file.path, "ab") as opened:
        opened.write(b'{"<b>bold</b>": 1}\n')
    page = visit(serve(), "Ada")
    assert page.inner_text("#refused summary") == "1 line of the file cannot be used"
    page.click("#refused summary")
    assert page.inner_text("#refused li").startswith("line 8: expected one of segment")
    assert "<b>bold</b>" in page.inner_text("#refused li")


# What is drawn.


def colours(page, side):
    """How many different colours a canvas has."""
    return page.evaluate(
        """(side) => {
          const canvas = document.querySelectorAll("figure canvas")[side];
          const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          return new Set(new Uint32Array(data.buffer)).size;
        }""",
        side,
    )


def picture(page, side=0):
    return page.evaluate("(side) => document.querySelectorAll('figure canvas')[side].toDataURL()", side)


@pytest.mark.parametrize(
    ("about", "shape", "dtype"),
    [
        ({"environment": "cart_pole", "question": "Which one stays up?"}, (4,), np.float32),
        ({"environment": "mountain_car"}, (2,), np.float32),
        ({"environment": "pendulum"}, (3,), np.float32),
        ({"environment": "cart_pole"}, (3,), np.float32),  # not its shape: plots
        ({"environment": "constructor"}, (30,), np.float32),
        ({}, (), np.int32),
        ({"channels": ["one", "two", "three", "four"]}, (10, 10, 4), bool),
        ({}, (12, 10), np.uint8),
    ],
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_clips_are_drawn_and_move(visit, serve, tmp_path, about, shape, dtype, scheme):
    made(tmp_path, about=about, shape=shape, dtype=dtype)
    page = visit(serve(fps=20), "Ada", color_scheme=scheme)
    wait_for_pair(page, 0)
    assert page.inner_text("#question") == about.get("question", "Which clip is better?")
    assert page.locator("#legend li").all_inner_texts() == about.get("channels", [])
    assert min(colours(page, 0), colours(page, 1)) >= 2
    seen = set()
    for _ in range(40):
        seen.add(picture(page))
        page.wait_for_timeout(20)
    assert len(seen) >= 2


def test_a_drawing_shows_the_state(visit, serve, tmp_path):
    """The pole of the left clip leans to the left, that of the right one to the right."""
    file = pf.PreferenceFile.create(
        tmp_path / "labels.jsonl",
        jnp.zeros(4, jnp.float32),
        bj.environments.Discrete(2),
        1,
        next_observation=False,
        reward=False,
        about={"environment": "cart_pole"},
    )
    observation = np.zeros((2, 1, 4), np.float32)
    observation[:, 0, 2] = -0.2, 0.2
    file.append_segments(pf.Segments(observation, np.array([[0], [1]]), valid=np.ones((2, 1), bool)))
    file.append_pairs([[0, 1]])
    page = visit(serve(), "Ada")
    wait_for_pair(page, 0)
    # Of what is drawn in the upper half, the mean place, from -1 to 1.
    lean = [
        page.evaluate(
            """(side) => {
              const canvas = document.querySelectorAll("figure canvas")[side];
              const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height / 2);
              let [sum, count] = [0, 0];
              for (let i = 0; i < data.length; i += 4)
                if (data[i + 3]) [sum, count] = [sum + i / 4 % canvas.width, count + 1];
              return 2 * sum / count / canvas.width - 1;
            }""",
            side,
        )
        for side in (0, 1)
    ]
    assert -0.3 < lean[0] < -0.03
    assert 0.03 < lean[1] < 0.3
    captions = page.locator("figcaption span").all_inner_texts()
    assert captions == ["step 1 of 1 · push left", "step 1 of 1 · push right"]


def test_steps_that_are_not_valid_are_shown_as_ended(visit, serve, tmp_path):
    made(tmp_path, valid=2)
    page = visit(serve(fps=2), "Ada")
    page.wait_for_selector("figure:nth-child(2) >> text=step 2 of 5")
    before = picture(page, 1)
    page.wait_for_selector("figure:nth-child(2) >> text=ended after 2 steps")
    assert picture(page, 1) != before  # the same step, but pale
    assert page.inner_text("figure:nth-child(1) span").startswith("step ")


def test_pause_stops_both_clips_where_they_are(visit, serve, tmp_path):
    made(tmp_path)
    page = visit(serve(fps=2), "Ada")

    def steps():
        return [int(text.split()[1]) for text in page.locator("figcaption span").all_inner_texts()]

    page.wait_for_selector("text=step 2 of 5")
    page.keyboard.press("Space")
    assert page.get_attribute("#pause", "aria-pressed") == "true"
    page.wait_for_timeout(100)
    assert steps() == [2, 2]
    before = [picture(page, side) for side in (0, 1)]
    page.wait_for_timeout(1300)
    assert [picture(page, side) for side in (0, 1)] == before
    page.keyboard.press("Space")
    page.wait_for_timeout(50)
    assert steps() in ([2, 2], [3, 3])
    page.wait_for_selector("text=step 5 of 5")


@pytest.mark.parametrize("width", [360, 1600])
def test_nothing_sticks_out(visit, serve, tmp_path, width):
    made(tmp_path)
    page = visit(serve(), "Ada")
    page.set_viewport_size({"width": width, "height": 800})
    wait_for_pair(page, 0)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
