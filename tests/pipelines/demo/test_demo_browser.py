"""The page in a real browser that reaches no other machine: a click draws a three, and what else a visitor does."""

import io
import re
import shutil
import socket
import threading
import time
import urllib.request
import zipfile
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
import pytest
from helpers.digit_painter import digit_painter
from helpers.made import write_classifier

from d_emo import list_packaged
from d_emo.eval.digits_report import real_digits
from d_emo.pipelines.demo import serving
from d_emo.pipelines.demo.app import DemoOptions, LimitOptions, ModelOptions
from d_emo.pipelines.demo.opening import Source, open_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default::DeprecationWarning")]
gradio = pytest.importorskip("gradio", reason="needs the extra demo")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra test-all")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HERE = "127.0.0.1"
# Names of other machines are found by nobody.
ALONE = f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {HERE}"
PATIENCE = 60_000  # milliseconds, of a machine with other things to do


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=found, args=["--no-sandbox", ALONE])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def reached():
    """Addresses of other machines that this process turned to."""
    found = []
    connect = socket.socket.connect

    def noting(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (HERE, "::1", "localhost"):
            found.append(address)
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", noting)
        yield found


@pytest.fixture(scope="module")
def serve(reached, tmp_path_factory):
    """Serves the page of a model, and tells its address."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**serving.SILENT, "GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("gradio"))}.items():
            patch.setenv(name, value)
        pages = []

        def start(model, source, **limits):
            options = DemoOptions(model=ModelOptions(model=source.name), limits=LimitOptions(**limits))
            pages.append(serving.make_page(model, source, options))
            return serving.serve(pages[-1], HERE, None)

        yield start
        for page in pages:
            page.close(verbose=False)


class Gate:
    """Lets the network answer; closed, two steps pass, and others wait for `let` or `open`."""

    def __init__(self):
        self.free, self.steps, self.passed = True, threading.Semaphore(0), 0

    def __call__(self, *_):
        if not self.free:
            self.steps.acquire(timeout=PATIENCE / 1000)
        self.passed += 1

    def close(self):
        self.free, self.steps, self.passed = False, threading.Semaphore(2), 0

    def open(self):
        self.free = True
        self.steps.release(1000)


@pytest.fixture(scope="module")
def painted(serve):
    """The address of a page that draws digits, its pipeline, and the gate that every step passes."""
    pipeline, gate = digit_painter(), Gate()
    pipeline.transformer.register_forward_pre_hook(gate)
    return serve(pipeline, Source(name="digits"), max_waiting=1), pipeline, gate


@pytest.fixture
def digits(painted):
    """The address."""
    return painted[0]


@pytest.fixture
def gate(painted):
    """The gate, closed for this test."""
    painted[2].close()
    yield painted[2]
    painted[2].open()


@pytest.fixture
def visit(browser):
    """Opens a page in a window of its own; all that it asks for is in its list `asked`."""
    contexts = []

    def open_page(address, **window):
        contexts.append(browser.new_context(**window))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.asked, page.complaints = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#status")
        return page

    yield open_page
    for context in contexts:
        context.close()


def says(page, words):
    """Wait until the page says so, and return the whole line."""
    status = page.locator("#status")
    playwright.expect(status).to_contain_text(re.compile(words), timeout=PATIENCE)
    return status.inner_text()


def choose(page, name):
    """Search for a class by its name's beginning and take what is found."""
    page.click("#class input")
    page.keyboard.type(name[:3])
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#class input")).to_have_value(name)


def pictures(page):
    """The pictures of the grid, as the server has them."""
    found = []
    for image in page.locator("#grid .grid-container img").all():
        with urllib.request.urlopen(image.get_attribute("src")) as answer:
            found.append(PIL.Image.open(io.BytesIO(answer.read())).convert("L"))
    return found


def read_digits(images):
    """What the nearest mean of the real digits says of pictures of 8 x 8 or more."""
    points, labels = real_digits(8)
    means = np.stack([points[labels == digit].mean(0) for digit in range(10)])
    shrunk = np.stack([np.asarray(image.resize((8, 8)), float).ravel() / 127.5 - 1 for image in images])
    return ((shrunk[:, None] - means[None]) ** 2).sum(2).argmin(1).tolist()


def others(asked):
    return [url for url in asked if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).hostname != HERE]


def test_a_click_draws_a_three_and_nobody_else_is_asked(digits, visit, reached):
    page = visit(digits)
    choose(page, "three")
    page.click("#draw")
    says(page, "Done, 12 steps")
    page.wait_for_selector("#way img")
    found = read_digits(pictures(page))
    assert len(found) == 8 and found.count(3) >= 6  # the nearest mean misreads some of the real ones, too
    assert 'class_labels="three"' in page.inner_text("#code")
    assert not others(page.asked) and not page.complaints and not reached
    html = urllib.request.urlopen(digits).read().decode()
    assert not re.findall(r'<(?:script|iframe|img)[^>]+src="https?:|<link[^>]+href="https?://(?!127)', html)


@pytest.mark.skipif({"digits", "digits-classifier"} - set(list_packaged()), reason="needs the packaged digits")
def test_the_packaged_model_draws_a_three_that_the_packaged_classifier_reads(serve, visit, tmp_path):
    painter, reader = (Source(name=name, device="cpu") for name in ("digits", "digits-classifier"))
    page = visit(serve(open_model(painter), painter))
    choose(page, "three")
    page.click("#draw")
    says(page, "Done")
    drawn = pictures(page)
    answers = open_model(reader)([image.convert("RGB") for image in drawn], top_k=1)
    assert [answer[0]["label"] for answer in answers].count("three") >= 7
    drawn[0].save(tmp_path / "three.png")
    page = visit(serve(open_model(reader), reader))
    page.set_input_files("#picture input[type=file]", tmp_path / "three.png")
    says(page, "16 x 16 pixels")
    playwright.expect(page.locator("#answer h2")).to_have_text("three")


def test_what_is_downloaded_is_what_was_drawn(digits, visit, tmp_path):
    page = visit(digits)
    page.click("#draw")
    says(page, "Done")
    with page.expect_download() as download:
        page.click("#archive")
    download.value.save_as(tmp_path / "all.zip")
    assert download.value.suggested_filename == "zero-seed-0.zip"
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        stored = [np.asarray(PIL.Image.open(io.BytesIO(archive.read(f"{index}.png")))) for index in range(8)]
    np.testing.assert_array_equal(stored, [np.asarray(image) for image in pictures(page)])


def test_enter_draws_and_the_keyboard_suffices(digits, visit):
    page = visit(digits)
    order = []
    for _ in range(14):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.closest('[id]')?.id"))
        if order[-1] == "class":
            page.keyboard.type("sev")
            page.keyboard.press("Enter")
            playwright.expect(page.locator("#class input")).to_have_value("seven")  # a person is no faster
        if order[-1] == "seed":
            break
    assert order[:2] == ["class", "draw"] and order[-1] == "seed"
    page.keyboard.type("5")
    page.keyboard.press("Enter")
    says(page, "Done")
    assert read_digits(pictures(page)).count(7) >= 6
    assert "image_generator(5, index)" in page.inner_text("#code")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_shows_everything_without_scrolling_sideways(digits, visit, scheme):
    page = visit(digits, viewport={"width": 400, "height": 800}, color_scheme=scheme)
    page.click("#draw")
    says(page, "Done")
    page.wait_for_selector("#code .cm-content")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    for name in ("draw", "stop", "count", "guidance", "steps", "seed", "sampler", "size", "grid", "way", "archive"):
        box = page.locator(f"#{name}").bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= 400, name


def test_stop_stops_and_the_next_drawing_is_whole(digits, gate, visit):
    page = visit(digits)
    page.click("#draw")
    says(page, r"Step [12] of 12")
    page.click("#stop")
    says(page, "Stopping after the step in progress")
    gate.open()
    says(page, r"Stopped after step [23] of 12: the pictures are unfinished")
    page.click("#draw")
    says(page, "Done, 12 steps")


def test_visitors_wait_for_their_turn_and_beyond_the_limit_are_told(digits, gate, visit):
    first, second, third = (visit(digits) for _ in range(3))
    first.click("#draw")
    says(first, r"Step [12] of 12")
    second.click("#draw")
    says(second, "Waits for its turn")
    third.click("#draw")
    says(third, "queue already: 1")
    playwright.expect(third.locator("#draw")).to_be_enabled()
    second.click("#stop")
    says(second, "Stopping")
    gate.open()
    says(first, "Done")
    says(second, "Stopped before it began")


def test_a_visitor_who_closes_the_page_makes_room(digits, gate, visit):
    page = visit(digits)
    page.fill("#steps input[type=number]", "100")
    page.click("#draw")
    says(page, r"Step [12] of 100")
    page.close()
    before = 0
    while gate.passed > before:  # until the drawing takes no step that it might
        before = gate.passed
        gate.steps.release()
        time.sleep(2)
    assert before < 100


def test_errors_are_lines_in_the_page(digits, painted, visit, monkeypatch, capfd):
    page = visit(digits)
    page.fill("#seed input", "-3")
    page.click("#draw")
    assert "seed=-3 is not a whole number from 0" in says(page, "seed")
    page.fill("#seed input", "1.5")
    page.click("#draw")
    assert "seed=1.5 is not a whole number from 0" in says(page, r"1\.5")
    page.fill("#seed input", "2")
    page.fill("#steps input[type=number]", "2.5")
    page.click("#draw")
    assert "steps=2.5 is not a whole number from 1" in says(page, "steps")
    page.wait_for_timeout(1000)  # nothing comes after it
    assert "steps=2.5" in page.inner_text("#status") and page.locator("#stop").is_disabled()
    page.fill("#steps input[type=number]", "3")
    monkeypatch.setattr(painted[1].transformer, "forward", lambda *_, **__: 1 / 0)
    page.fill("#seed input", "3")
    page.click("#draw")
    line = says(page, "failed")
    assert "ZeroDivisionError" in line and "Traceback" not in line
    assert "Traceback" in capfd.readouterr().out  # for whoever started it
    playwright.expect(page.locator("#draw")).to_be_enabled()


def test_a_dropped_picture_is_classified(serve, visit, tmp_path):
    source = Source(name=str(write_classifier(tmp_path / "classifier")), device="cpu")
    page = visit(serve(open_model(source), source), viewport={"width": 400, "height": 800})
    PIL.Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    page.set_input_files("#picture input[type=file]", tmp_path / "red.png")
    says(page, "40 x 30 pixels")
    playwright.expect(page.locator("#answer")).to_contain_text("%")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    (tmp_path / "none.png").write_bytes(b"none")
    page.reload()
    page.set_input_files("#picture input[type=file]", tmp_path / "none.png")
    assert says(page, "none.png") == "none.png cannot be read (no format that Pillow knows)"
    assert page.locator(".toast-body").count() == 0
    assert not others(page.asked)
