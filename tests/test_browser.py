"""The pages in a real browser: nothing goes wrong, nothing is asked of a network, all is there."""

import json
import os
import re
import socketserver
import threading
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest
import sample_report

from docs import browser as chromium
from pipeline import index, page

LAYOUTS = {
    "desktop": {},
    "phone": {"width": 390, "height": 800},
    "small phone": {"width": 320, "height": 600},
    "dark": {"dark": True},
    "print": {"media": "print", "width": 720},
}
COLOURS = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"

SIZES_OF_TEXT = (
    "[...document.querySelectorAll('p, td, th, dd, dt, summary, figcaption')]"
    ".map((e) => parseFloat(getComputedStyle(e).fontSize))"
)


@pytest.fixture(scope="module")
def browser():
    """One tab for all tests."""
    if chromium.find() is None:
        if os.environ.get("CI"):
            pytest.fail(chromium.HOW_TO_INSTALL)
        pytest.skip(chromium.HOW_TO_INSTALL)
    with chromium.Browser() as found:
        yield found


@pytest.fixture(scope="module")
def report_page(tmp_path_factory):
    """A report of ten classes, three models and 400 images."""
    return write_report(tmp_path_factory.mktemp("page"), [str(label) for label in range(10)])


@pytest.fixture(scope="module")
def long_page(tmp_path_factory):
    """The same of thirty classes, some of them with names that cannot be broken."""
    kinds = ("a rather long name of a class", "cat", "x" * 60)
    names = [f"{kinds[i % 3]} {i}" for i in range(30)]
    return write_report(tmp_path_factory.mktemp("long"), names)


def write_report(folder, names):
    random = np.random.default_rng(0)
    labels = random.integers(0, len(names), 400)
    models = []
    for strength in (0.9, 0.7, 0.6):
        noise = random.dirichlet(np.ones(len(names)), 400)
        noise[np.arange(400), labels] += strength * random.random(400)
        models.append((noise / noise.sum(axis=1, keepdims=True)).astype(np.float32))
    pixels = np.zeros((400, 28, 28), np.uint8)
    for i, width in enumerate(random.integers(1, 9, 400)):
        pixels[i, 4:24, 8 : 8 + width] = 200
        pixels[i, i % 28, i // 28] = 255
    pixels = pixels.reshape(400, 784)
    drift = {"test": {"labels": 0.1, "ink": 0.2, "stroke_width": None}}
    html = page.render_html(
        sample_report.full_report(
            labels, models[0], pixels, names, compared=models[1:], drift=drift
        ),
        manifest=sample_report.manifest(names),
        model=sample_report.MODEL,
        curves=sample_report.CURVES,
        counts=sample_report.counts_of(labels, models[0], pixels),
    )
    path = folder / "report.html"
    path.write_text(html)
    return path


@pytest.fixture(scope="module")
def index_page(tmp_path_factory):
    """The index of twenty runs, every fifth of them promoted, all with a report."""
    root = tmp_path_factory.mktemp("root")
    lines = []
    for i in range(1, 21):
        run_id = f"2026-01-{i:02}-core-0123456789ab"
        report = root / "runs" / run_id / "report" / "report.html"
        report.parent.mkdir(parents=True)
        report.write_text(f"<!doctype html><title>{run_id}</title>")
        lines.append(
            {
                "run_id": run_id,
                "outcome": "kept" if i % 5 else "promoted",
                "reason": "correct answers, against the champion's: 9,700, required 9,712",
                "accuracy": 0.9 + i / 1000,
                "per_class_accuracy": {str(label): 0.9 + label / 200 for label in range(10)},
                "version": None if i % 5 else i // 5,
                "time": f"2026-01-{i:02}T03:10:00+00:00",
            }
        )
    (root / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    index.write_index(root)
    return root / "index.html"


@pytest.fixture(params=["report", "long", "index"])
def any_page(request):
    return request.getfixturevalue(f"{request.param}_page")


def outside(requests):
    """The addresses that are neither the page's own nor within it."""
    return [url for url in requests if not url.startswith(("file:", "data:"))]


def column(browser, table, number):
    """The texts of a column, the first being 0, from top to bottom."""
    return browser.evaluate(
        f"[...document.querySelectorAll('table')[{table}].tBodies[0].rows]"
        f".map((row) => row.cells[{number}].innerText.trim())"
    )


def press(browser, table, number):
    """Presses a heading; returns how its column is then sorted."""
    head = f"document.querySelectorAll('table')[{table}].tHead.rows[0].cells[{number}]"
    browser.evaluate(f"{head}.querySelector('[role=button]').click()")
    return browser.evaluate(f"{head}.getAttribute('aria-sort')")


# Opening


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_page_in_each_layout(browser, any_page, layout):
    """Opened once, since a page takes long to be laid out."""
    browser.open(any_page.as_uri(), **LAYOUTS[layout])
    assert browser.problems == []
    assert browser.requests[0] == any_page.as_uri()
    assert outside(browser.requests) == []
    wide = "document.documentElement.scrollWidth <= window.innerWidth"
    assert browser.evaluate(wide), "the page itself must not scroll sideways"
    background, text = (
        sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in browser.evaluate(COLOURS)
    )
    assert (background < 150, text > 600) == (layout == "dark", layout == "dark")
    if layout == "desktop":
        over = "[...document.querySelectorAll('.scroll')].map((e) => e.scrollWidth - e.clientWidth)"
        assert set(browser.evaluate(over)) == {0}, "every table has to fit"
    if layout == "phone":
        assert min(browser.evaluate(SIZES_OF_TEXT)) >= 12


def test_tables_images_and_plots_are_there(browser, report_page):
    browser.open(report_page.as_uri())
    count = "document.querySelectorAll({}).length".format
    # Classes, models, two duels, confused pairs, confidence, two slices, drift.
    assert browser.evaluate(count("'table'")) == 9
    assert browser.evaluate(count("'table tbody tr'")) == 10 + 3 + 2 * 10 + 10 + 15 + 2 * 4 + 1
    assert browser.evaluate(count("'figure > svg, figure .scroll > svg'")) == 9
    images = browser.evaluate("[...document.images].map((i) => [i.naturalWidth, i.naturalHeight])")
    assert images == [[238, 28]] * 10 + [[28, 28]] * 48
    boxes = browser.evaluate(
        "[...document.querySelectorAll('svg, table, img')].filter((e) => !e.closest('details'))"
        ".map((e) => e.getBoundingClientRect()).filter((b) => b.width < 20 || b.height < 20).length"
    )
    assert boxes == 0


def test_the_index_leads_to_its_reports(browser, index_page):
    browser.open(index_page.as_uri())
    links = browser.evaluate("[...document.querySelectorAll('tbody a')].map((a) => a.href)")
    assert len(links) == 20
    browser.open(links[0])
    assert browser.evaluate("document.title") == "2026-01-20-core-0123456789ab"
    assert browser.problems == []


def test_dark_paper_is_never_printed(browser, any_page):
    browser.open(any_page.as_uri(), media="print", dark=True)
    assert browser.evaluate(COLOURS)[0] == "rgb(255, 255, 255)"


def test_prints_what_a_screen_folds_away(browser, report_page):
    shown = "document.querySelector('details table').getBoundingClientRect().height > 0"
    browser.open(report_page.as_uri())
    assert not browser.evaluate(f"{shown} && document.querySelector('details').open")
    visible = (
        "document.querySelector('details table').checkVisibility({contentVisibilityAuto: true})"
    )
    assert browser.evaluate(visible) is False
    browser.open(report_page.as_uri(), media="print")
    assert browser.evaluate(visible) is True
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 10


# Sorting


def test_headings_sort_their_column_both_ways(browser, report_page):
    browser.open(report_page.as_uri())
    labels = [str(label) for label in range(10)]
    accuracies = column(browser, 0, 3)
    assert column(browser, 0, 0) == labels

    def number(text):
        return float(text.split()[0])

    assert press(browser, 0, 3) == "ascending"
    assert column(browser, 0, 3) == sorted(accuracies, key=number)
    assert press(browser, 0, 3) == "descending"
    assert column(browser, 0, 3) == sorted(accuracies, key=number, reverse=True)
    assert press(browser, 0, 0) == "ascending"
    assert column(browser, 0, 0) == labels
    assert column(browser, 0, 3) == accuracies
    sorted_by = "document.querySelectorAll('table')[0].querySelectorAll('[aria-sort]').length"
    assert browser.evaluate(sorted_by) == 1


def test_signs_thousands_and_unknowns_are_sorted_as_numbers(browser, tmp_path):
    cells = ["±0", "1,100", "\N{EN DASH}", "\N{MINUS SIGN}3", "+12", "0.5", "\N{MINUS SIGN}1,000"]
    rows = "".join(f"<tr><td>{cell}</td></tr>" for cell in cells)
    path = tmp_path / "page.html"
    script = page.templates._text("sorting.js")
    path.write_text(
        "<!doctype html><meta charset=utf-8><table class=sortable>"
        f"<thead><tr><th>n</th></tr></thead><tbody>{rows}</tbody></table><script>{script}</script>"
    )
    browser.open(path.as_uri())
    up = ["\N{MINUS SIGN}1,000", "\N{MINUS SIGN}3", "±0", "0.5", "+12", "1,100"]
    assert press(browser, 0, 0) == "ascending"
    assert column(browser, 0, 0) == [*up, "\N{EN DASH}"]
    assert press(browser, 0, 0) == "descending"
    assert column(browser, 0, 0) == [*reversed(up), "\N{EN DASH}"]


def test_headings_work_from_the_keyboard(browser, index_page):
    browser.open(index_page.as_uri())
    for key in ("Enter", " "):
        browser.evaluate(
            "document.querySelector('th [role=button]').dispatchEvent("
            f"new KeyboardEvent('keydown', {{key: '{key}', bubbles: true}}))"
        )
    assert browser.evaluate("document.querySelector('th').ariaSort") == "descending"
    assert column(browser, 0, 0)[0] == "2026-01-20-core-0123456789ab"


# That the checks above can fail


class Recorder(BaseHTTPRequestHandler):
    """A server that notes what it is asked for."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self):
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    "content",
    [
        "<script>throw new Error('here')</script>",
        "<script>console.error('here')</script>",
        "<img src='missing.png'>",
        "<meta http-equiv=Content-Security-Policy content=\"script-src 'none'\"><script>1</script>",
    ],
)
def test_a_faulty_page_is_noticed(browser, tmp_path, content):
    path = tmp_path / "page.html"
    path.write_text(f"<!doctype html><title>x</title>{content}")
    browser.open(path.as_uri(), decode=False)
    assert browser.problems


def test_a_request_is_noticed_and_the_policy_stops_it(browser, report_page, tmp_path):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Recorder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        injected = f"<img src='{url}/image'><script src='{url}/script'></script></body>"
        bare = tmp_path / "bare.html"
        bare.write_text(f"<!doctype html><body>{injected}")
        browser.open(bare.as_uri(), decode=False)
        assert set(outside(browser.requests)) == {f"{url}/image", f"{url}/script"}
        assert set(Recorder.asked) == {"/image", "/script"}
        Recorder.asked.clear()
        guarded = tmp_path / "guarded.html"
        guarded.write_text(report_page.read_text().replace("</body>", injected))
        browser.open(guarded.as_uri(), decode=False)
        assert Recorder.asked == []
        assert len(browser.problems) == 2
        server.shutdown()
