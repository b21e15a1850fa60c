"""The HTML report in a real browser: opened from its file, on a desk and on a phone, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, found

from vtprune.eval.cli import main
from vtprune.eval.world import KINDS

DESK, PHONE = 1280, 390
PROGRAM = found()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium or Chrome on PATH; install one or name it in VTPRUNE_CHROMIUM"
)

OVERFLOW = """
[...document.querySelectorAll('body *')]
  .filter(e => !e.closest('.scroll') && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map(e => e.outerHTML.slice(0, 80))
"""
PLOTS = """
[...document.querySelectorAll('figure svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  const inside = [...svg.querySelectorAll('path, use, text')].filter(e => {
    const b = e.getBoundingClientRect(); return b.width + b.height > 0 && b.left >= box.left - 1 && b.right <= box.right + 1;
  });
  return {width: box.width, height: box.height, drawn: inside.length, text: svg.textContent};
})
"""
# Size on the page, and how much the pixels differ: 0 for a picture of one colour or of none.
PICTURES = """
(async () => Promise.all([...document.images].map(async image => {
  try { await image.decode(); } catch { return {src: image.src.slice(0, 40), width: 0, height: 0, spread: 0, alt: image.alt}; }
  const canvas = document.createElement('canvas');
  canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  const context = canvas.getContext('2d');
  context.drawImage(image, 0, 0);
  const values = context.getImageData(0, 0, canvas.width, canvas.height).data.filter((_, i) => i % 4 === 0);
  const box = image.getBoundingClientRect();
  const spread = values.reduce((a, b) => Math.max(a, b)) - values.reduce((a, b) => Math.min(a, b));
  return {src: image.src.slice(0, 40), width: box.width, height: box.height, spread, alt: image.alt};
})))()
"""
SMALLEST_TEXT = """
Math.min(...[...document.querySelectorAll('body *')]
  .filter(e => !e.closest('svg') && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
  .map(e => parseFloat(getComputedStyle(e).fontSize)))
"""
LIGHTNESS = """
['color', 'backgroundColor'].map(name => {
  const [r, g, b] = getComputedStyle(document.body)[name].match(/[\\d.]+/g).map(Number);
  return (0.299 * r + 0.587 * g + 0.114 * b) / 255;
})
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small comparison on the shipped model, as a user gets it."""
    folder = tmp_path_factory.mktemp("report") / "out"
    methods = [x for name in ("no-image", "vtprune", "fastv", "random") for x in ("--method", name)]
    assert (
        main(["eval", *methods, "--keep", "48", "--keep", "16", "--limit", "2", "--output", str(folder)]) == 0
    )
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert PROGRAM is not None
    with Browser(PROGRAM) as page:
        yield page


@pytest.mark.parametrize(("width", "dark"), [(DESK, False), (PHONE, False), (PHONE, True)])
def test_report_opens_without_errors_and_fits(report: Path, browser: Browser, width: int, dark: bool) -> None:
    browser.open(report, width, dark=dark)
    browser.run("document.querySelectorAll('details').forEach(e => e.open = true)")
    pictures = browser.run(PICTURES)
    assert browser.errors == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(OVERFLOW) == []
    assert browser.run(SMALLEST_TEXT) >= 10
    ink, paper = browser.run(LIGHTNESS)
    assert (ink - paper if dark else paper - ink) > 0.6

    plots = browser.run(PLOTS)
    assert len(plots) == 5
    for plot in plots:
        assert plot["width"] > min(width, 600) * 0.8
        assert plot["height"] > 150
        assert plot["drawn"] > 30
        assert {"vtprune", "fastv", "random"} <= set(plot["text"].split())

    # One whole picture and one per method of the smaller budget's setting, for two questions of every kind; two on top.
    assert len(pictures) == 2 + 2 * len(KINDS) * (1 + 3)
    for picture in pictures:
        assert picture["width"] > 100
        assert picture["height"] > 100
        assert picture["spread"] > 50
        assert picture["alt"]


def test_report_explains_itself(report: Path, browser: Browser) -> None:
    browser.open(report, DESK)
    words = " ".join(browser.run("document.body.innerText").split())
    heads = browser.run("[...document.querySelectorAll('thead th')].map(e => e.textContent)")
    told = browser.run("[...document.querySelectorAll('dt')].map(e => e.textContent).join(' ')")
    for head in heads:
        name = head.split(",")[0]
        assert name in told or name in ("GFLOPs", "tokens in → out", "each further"), (
            f"column {head!r} is not explained"
        )
    for name in ("vtprune", "fastv", "random", "dense", "no-image"):
        assert name in told
    assert "144" in words
    assert "With 16 of 144 tokens" in words
    best = browser.run("[...document.querySelectorAll('td.best')].map(e => e.textContent)")
    assert set(best) <= {"vtprune", "fastv"}
    assert len(best) >= 4  # both budgets, both splits
    dead = browser.run(
        "[...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.hash.slice(1)).filter(i => !document.getElementById(i))"
    )
    assert dead == []


def test_a_broken_page_is_noticed(tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "broken.html"
    page.write_text(
        '<!doctype html><meta name="viewport" content="width=device-width, initial-scale=1"><body><div style="width:900px">wide</div><img src="data:image/png;base64,AAAA" alt="x">'
        '<img src="gone.png" alt="y"><figure><svg width="0" height="0"></svg></figure>'
        '<script>console.error("bad"); throw new Error("worse")</script></body>',
        encoding="utf-8",
    )
    browser.open(page, PHONE)
    pictures = browser.run(PICTURES)
    told = " ".join(browser.errors)
    assert "bad" in told
    assert "worse" in told
    assert "ERR_FILE_NOT_FOUND" in told
    assert browser.run(OVERFLOW)
    assert [picture["spread"] for picture in pictures] == [0, 0]
    assert browser.run(PLOTS)[0]["drawn"] == 0
