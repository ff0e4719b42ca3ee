"""Pages: one file without scripts, texts escaped, the worst pictures first."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import PIL.Image

from d_emo.eval.reports.page import POLICY, Table, Tile, picture_html, write_page


class Elements(HTMLParser):
    """The names of a page's elements, their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.names, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.text += data


def grey(value=128, size=(8, 6)):
    return PIL.Image.new("RGB", size, (value, value, value))


def page(tmp_path, *args, **options):
    path = tmp_path / "report.html"
    write_page(path, *args, **options)
    return path.read_text(encoding="utf-8")


def test_a_page_holds_everything_itself_and_runs_nothing(tmp_path):
    evil = "<script>alert(1)</script>\"'&\x1b[31m\udc80"
    text = page(
        tmp_path, evil, {evil: evil}, [Table(evil, [evil], [[evil]])], [Tile(grey(), evil, 0.5)], score_name=evil,
        options={"name": evil, "path": tmp_path},
    )  # fmt: skip
    found = Elements(text)
    assert "script" not in found.names
    assert POLICY in [value for *_, value in found.attributes]
    assert not [value for _, name, value in found.attributes if name.startswith("on") or name == "href"]
    assert all(value.startswith("data:image/") for _, name, value in found.attributes if name == "src")
    assert "alert(1)" in found.text and "\x1b" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_worst_come_first_and_what_has_no_score_last(tmp_path):
    tiles = [Tile(grey(), name, score) for name, score in (("b", 0.5), ("n", None), ("a", 0.1), ("nan", float("nan")))]
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page(tmp_path, "t", {}, [], tiles, score_name="mIoU"))
    assert captions == ["a &middot; mIoU 0.100", "b &middot; mIoU 0.500", "n", "nan"]


def test_numbers_of_tables(tmp_path):
    text = page(tmp_path, "t", {}, [Table("Classes", ["class", "IoU"], [["a", 12.349], ["b", float("nan")]])], [])
    assert '<td>a</td><td class="number">12.35</td>' in text
    assert '<td>b</td><td class="number">&ndash;</td>' in text
    assert "Pictures" not in text


def test_a_picture_is_kept_exactly_where_that_is_smaller():
    flat = picture_html(grey(77, (64, 64)), "x")
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for html, kind in ((flat, "png"), (picture_html(noise, "x"), "jpeg")):
        found = re.search(r"data:image/(\w+);base64,([^\"]+)", html)
        assert found and found[1] == kind
        opened = PIL.Image.open(io.BytesIO(base64.b64decode(found[2])))
        assert opened.size == (64, 64)
        assert opened.format == kind.upper()
