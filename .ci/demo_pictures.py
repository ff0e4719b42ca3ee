"""The pictures of the page in the browser that docs/how_to/demo.md shows, taken in Chromium.

    python .ci/demo_pictures.py

Needs the extra `demo`, playwright, and Chromium on the PATH; no network. Fonts are the machine's, so that another one's
pictures look a little different.
"""

import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import PIL.Image
from playwright import sync_api as playwright

from d_emo.pipelines.demo import serving
from d_emo.pipelines.demo.app import DemoOptions, ModelOptions

DOCS = Path(__file__).resolve().parent.parent / "docs"
HERE, PATIENCE = "127.0.0.1", 120_000
SIZE = {"width": 960, "height": 720}
PHONE = {"width": 390, "height": 720}
COLORS = 128  # of a picture's palette, which is a third as large a file


def main() -> None:
    """Draw threes on a wide, light page, then drop one on a classifier's, narrow and dark."""
    os.environ.update(serving.SILENT)
    with tempfile.TemporaryDirectory() as folder, playwright.sync_playwright() as started:
        os.environ["GRADIO_TEMP_DIR"] = folder
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        context = browser.new_context(viewport=SIZE)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.goto(address_of("digits"))
        page.click("#class input")
        page.keyboard.type("three")
        page.keyboard.press("Enter")
        page.click("#draw")
        wait_for(page, "Done")
        page.wait_for_selector("#code .cm-content")
        take(page, "demo.png")
        drawn = page.request.get(page.locator("#grid .grid-container img").first.get_attribute("src"))
        (Path(folder) / "three.png").write_bytes(drawn.body())
        context = browser.new_context(viewport=PHONE, color_scheme="dark")
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.goto(address_of("digits-classifier"))
        page.set_input_files("#picture input[type=file]", Path(folder) / "three.png")
        wait_for(page, "pixels")
        page.wait_for_selector("#answer h2")
        take(page, "demo_classifier.png")
        browser.close()


def address_of(name: str) -> str:
    """Serve a packaged model; where."""
    from d_emo.pipelines.demo.opening import Source, open_model

    source = Source(name=name, device="cpu")
    page = serving.make_page(open_model(source), source, DemoOptions(model=ModelOptions(model=name)))
    return serving.serve(page, HERE, None)


def wait_for(page: Any, words: str) -> None:
    """Until the page says so."""
    playwright.expect(page.locator("#status")).to_contain_text(words, timeout=PATIENCE)


def take(page: Any, name: str) -> None:
    """The whole page as a small file in docs/."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)  # bars grow
    image = PIL.Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    image.quantize(COLORS).save(DOCS / name, optimize=True)


if __name__ == "__main__":
    main()
