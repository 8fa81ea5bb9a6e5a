import base64
import dataclasses
import hashlib
import re
import warnings
from functools import cache

import numpy as np
import pytest
import sample_report
from html_page import Elements
from sample_report import CURVES, MODEL

from pipeline import metrics, page, panels, report, templates
from pipeline.command import InputError

HOSTILE = (
    "<script>alert(1)</script>",
    '" id="x" onload="alert(1)',
    "</svg></style><img src=https://example.invalid/x>",
    "]]>--> {{ 7 * 7 }}",
    "$x^2$",
    "\udc80\x01漢",
)
DRIFT = {
    "train": {"labels": 0.0, "ink": 0.125, "stroke_width": None},
    "validation": {"labels": 0.5, "ink": 1.0, "stroke_width": 0.25},
}
SECTIONS = [
    "Classes",
    "Side by side",
    "Confusions",
    "Confidence",
    "Slices",
    "Training",
    "Data",
    "Samples",
    "Most confident mistakes",
    "Least confident hits",
    "Lineage",
]


@cache
def answers(num_classes, rows=90):
    """Labels, three models' probabilities and images, at random; the first model is the best."""
    random = np.random.default_rng(0)
    labels = random.integers(0, num_classes, rows)
    models = []
    for strength in (0.4, 0.3, 0.1):
        noise = random.dirichlet(np.ones(num_classes), rows)
        noise[np.arange(rows), labels] += strength
        models.append((noise / (1 + strength)).astype(np.float32))
    return labels, models, random.integers(0, 100, (rows, 784), dtype=np.uint8)


def parts(names=("a", "b", "c"), *, title="three kinds of things", **changes):
    """What `page.render_html` is given, every key of the report filled."""
    labels, (own, *compared), pixels = answers(len(names))
    report = sample_report.full_report(labels, own, pixels, names, compared=compared, drift=DRIFT)
    return {
        "report": report,
        "manifest": sample_report.manifest(names, title=title),
        "model": MODEL,
        "curves": CURVES,
        "counts": sample_report.counts_of(labels, own, pixels),
    } | changes


def rendered(names=("a", "b", "c"), *, report=None, **changes):
    given = parts(names, **changes)
    return page.render_html(given.pop("report") | (report or {}), **given)


@cache
def usual():
    """The page of three classes with every section."""
    return rendered()


def headings(text):
    return re.findall("<h2>(.*?)</h2>", text)


def table(text, first):
    """The one table whose first heading this is, without its headings."""
    (found,) = (rows for rows in Elements(text).tables if rows[0][0] == first)
    return found[1:]


def cells(row):
    """The cells of a row that hold text."""
    return [cell for cell in row if cell]


# What stands on it


def test_every_section_is_there():
    assert headings(usual()) == SECTIONS


def test_a_report_of_old_leaves_sections_out():
    given = parts()
    known = ("dataset_id", "model_id", "split", "num_examples", "correct", "accuracy", "log_loss")
    known += ("accuracy_ci95", "per_class", "confusion_matrix", "most_confused")
    known += ("calibration_error",)
    given["report"] = {key: given["report"][key] for key in known} | {"baseline": None}
    given["counts"] = dataclasses.replace(given["counts"], uncertain=())
    left = page.render_html(**given)
    gone = {"Side by side", "Confidence", "Slices", "Least confident hits"}
    assert headings(left) == [name for name in SECTIONS if name not in gone]
    assert "not recorded" in left


def test_nothing_evaluated_gives_a_page():
    names = ("a", "b", "c")
    labels, (own, *_), pixels = (answers(3)[0][:0], [answers(3)[1][0][:0]], answers(3)[2][:0])
    report = sample_report.full_report(labels, own, pixels, names)
    text = rendered(report=report, counts=metrics.zero_counts(3), curves=[])
    assert table(text, "class")[0][:4] == ["a", "0", "0", "-"]
    assert "every answer was right" in text


def test_classes_by_hand():
    row = {
        "label": 0, "name": "a", "support": 1250, "correct": 1000, "accuracy": 0.8,
        "ci95": [0.7769, 0.8212], "precision": 0.25, "recall": 0.8, "f1": 0.5, "log_loss": 1.23456,
        "calibration_error": 0.0321,
    }  # fmt: skip
    empty = dict.fromkeys(row) | {"label": 1, "name": "b", "support": 0, "correct": 0}
    third = parts()["report"]["per_class"][2]
    text = rendered(report={"per_class": [row, empty, third], "most_confused": []})
    first = next(rows for rows in Elements(text).tables)
    assert cells(first[1]) == [
        "a", "1,250", "1,000", "80.00 %", "77.69-82.12 %", "0.2500", "0.8000", "0.5000", "1.2346",
        "3.21 %",
    ]  # fmt: skip
    assert cells(first[2]) == ["b", "0", "0", *["-"] * 7]
    assert len(first[0]) == len(first[1]) == len(first[2]) == 11


def test_side_by_side_by_hand():
    given = parts()
    paired = [
        {"label": 0, "both": 10, "only_model": 5, "only_baseline": 1, "neither": 2},
        {"label": 1, "both": 20, "only_model": 0, "only_baseline": 3, "neither": 0},
        {"label": 2, "both": 30, "only_model": 2, "only_baseline": 2, "neither": 1000},
    ]
    given["report"]["baseline"] |= {"paired": paired, "correct": 1}
    given["report"]["others"][0] |= {"correct": 2}
    tables = Elements(page.render_html(**given)).tables
    models, duel = tables[1:3]
    assert [row[0] for row in models[1:]] == [
        "0123456789abthis model",
        "2" * 12,
        "1" * 12 + "baseline",
    ]
    assert [row[-2:] for row in (models[1], models[3])] == [["-", "-"], ["7", "6"]]
    assert [cells(row) for row in duel[1:]] == [
        ["b", "-3", "0", "3", "20", "0", "23"],
        ["c", "±0", "2", "2", "30", "1,000", "1,034"],
        ["a", "+4", "5", "1", "10", "2", "18"],
        ["all", "+1", "7", "6", "60", "1,002", "1,075"],
    ]


def test_bars_of_a_duel_share_their_scale():
    given = parts()
    given["report"]["baseline"]["paired"] = [
        {"label": 0, "both": 0, "only_model": 8, "only_baseline": 0, "neither": 0},
        {"label": 1, "both": 0, "only_model": 2, "only_baseline": 4, "neither": 0},
        {"label": 2, "both": 9, "only_model": 0, "only_baseline": 0, "neither": 0},
    ]
    rows = panels.duels(given["report"], given["report"]["baseline"])
    assert [(row["name"], row["won"], row["lost"]) for row in rows] == [
        ("b", 12.5, 25.0),
        ("c", 0.0, 0.0),
        ("a", 50.0, 0.0),
    ]


def test_other_models_without_a_baseline():
    given = parts()
    given["report"] |= {"baseline": None}
    text = page.render_html(**given)
    assert headings(text) == SECTIONS
    assert "Against the baseline" not in text and "vs. baseline" not in text
    models, duel = Elements(text).tables[1:3]
    assert {row[0] for row in models[1:]} == {"0123456789abthis model", "2" * 12}
    assert cells(duel[-1])[0] == "all"


@pytest.mark.parametrize(
    ("leaked", "dropped", "split", "told"),
    [
        (0, 0, "test", None),
        (1, 0, "test", "1 image of test stands in train or validation as well."),
        (1234, 0, "test", "1,234 images of test stand in train or validation as well."),
        (1234, 1300, "test", None),  # which --drop_leaks has left out
        (1234, 0, "validation", None),
    ],
)
def test_a_leak_stands_above_every_figure(leaked, dropped, split, told):
    given = parts()
    given["manifest"] = dataclasses.replace(
        given["manifest"],
        dropped=dropped,
        duplicates=given["manifest"].duplicates | {"leaked": leaked},
    )
    given["report"] |= {"split": split}
    text = page.render_html(**given)
    notes = [each for each in Elements(text).all("p") if each.get("role") == "note"]
    if told is None:
        assert notes == [] and "Leak." not in text
        return
    (note,) = notes
    assert note["aria-label"] == "Warning: leak"
    assert 0 < text.index(f"<strong>Leak.</strong> {told}") < text.index('<dl class="cards">')


def test_slices_by_hand():
    slice_ = {"support": 10, "correct": 9, "accuracy": 0.9, "ci95": [0.5958, 0.9821]}
    given = parts()
    given["report"]["slices"] = {
        "ink": [slice_ | {"low": 0.0, "high": 21.25}],
        "stroke_width": [slice_ | {"low": 0.0625, "high": 2.5}],
    }
    given["report"]["baseline"]["slices"] = {"ink": [slice_ | {"correct": 4}], "stroke_width": []}
    text = page.render_html(**given)
    assert [cells(row) for row in table(text, "mean intensity, 0 to 255")] == [
        ["0.0 to 21.2", "10", "9", "90.00 %", "59.58-98.21 %", "+5"]
    ]
    assert [cells(row) for row in table(text, "pixels")] == [
        ["0.06 to 2.50", "10", "9", "90.00 %", "59.58-98.21 %"]
    ]


def test_confidence_by_hand():
    bins = parts()["report"]["reliability"]
    bins[0] |= {"count": 0, "accuracy": None, "confidence": None}
    bins[14] |= {"count": 1500, "accuracy": 0.5, "confidence": 0.96}
    text = rendered(report={"reliability": bins, "calibration_error": 0.12})
    rows = table(text, "confidence")
    assert len(rows) == 15
    assert rows[0] == ["0.00-6.67 %", "0", "-", "-"]
    assert rows[14] == ["93.33-100.00 %", "1,500", "50.00 %", "96.00 %"]
    labels = " ".join(figure["aria-label"] for figure in Elements(text).all("figure"))
    assert "1,500 images of mean confidence 96.00" in labels
    assert "calibration error 12.00" in labels


def test_drift_and_histograms():
    text = usual()
    assert table(text, "split") == [
        ["train", "0.0000", "0.1250", "-"],
        ["validation", "0.5000", "1.0000", "0.2500"],
    ]
    assert "Ink of the images, mean about: train" in text
    without = parts()
    without["report"]["baseline"]["drift"] = None
    for split in without["report"]["data"]["splits"].values():
        split |= {"ink": None, "stroke_width": None}
    text = page.render_html(**without)
    assert "Drift against" not in text and "mean about" not in text
    assert headings(text) == SECTIONS


def test_mean_of_a_histogram():
    (row,) = panels.histograms(
        {"data": {"splits": {"test": {"ink": [1, 0, 3] + [0] * 61, "stroke_width": None}}}},
        ["test"],
    )
    assert row["words"] == "Ink of the images, mean about: test 8."  # (2 + 3 * 10) / 4
    assert row["shares"][0][:3] == [25, 0, 75]


@pytest.mark.parametrize(
    ("before", "in_all", "told"),
    [
        (None, None, "is not recorded. Choosing over and over on one test set flatters"),
        (None, 3, "is not recorded. This root has judged 3 models before it in all, also on sets"),
        (0, 0, "No model was judged on exactly this set of images before this one"),
        (0, 0, "as far as is recorded. Choosing over and over on one test set flatters what is "
               "chosen: the count starts here."),
        (0, 7, "as far as is recorded. This root has judged 7 models before it in all, also on "
               "sets that may share most of these images. Choosing over and over on one test set "
               "flatters what is chosen: part of its lead"),
        (1, 1, "exactly this set of images has judged one model. This root has judged one model "
               "before it in all. Choosing over and over"),
        (2345, None, "this set of images has judged 2,345 models. Choosing over and over"),
    ],
)  # fmt: skip
def test_says_what_choosing_over_and_over_does(before, in_all, told):
    assert told in rendered(report={"challengers_before": before, "judged_before": in_all})


def test_hits_are_shown_with_what_came_second():
    image = metrics.ScoredImage(
        "i", 1, 1, np.array([0.2, 0.5, 0.3], np.float32).tobytes(), b"0" * 784
    )
    answer = page._answer(image)
    assert (answer["other"], answer["other_term"]) == (2, "second")
    assert answer["p_other"] == pytest.approx(0.3)
    mistake = page._answer(image._replace(label=0))
    assert (mistake["other"], mistake["other_term"]) == (1, "predicted")


def test_scale_starts_at_a_round_number_below_every_interval():
    assert panels.scale([[0.91, 0.95], None, [0.97, 1]]) == 0.9
    assert panels.scale([[0.99, 1]]) == 0.98
    assert panels.scale([[0.2, 0.4]]) == panels.scale([None]) == 0


# The file


def test_title_says_what_the_data_is():
    title = "the 1,797 8x8 digits that come with scikit-learn (not MNIST)"
    elements = Elements(rendered(title=title))
    assert title in elements.text["title"]
    assert title in elements.text["h1"]


def test_page_is_complete():
    text = usual()
    elements = Elements(text)
    # Two confusions, two of confidence, two curves, the classes, ink and stroke width.
    assert len(elements.all("svg")) == len(elements.all("figure")) == 9
    assert len(elements.all("figcaption")) == 9
    # Classes, models, two duels, confused pairs, confidence, two slices, drift.
    assert len(elements.tables) == 9
    assert all(len({len(row) for row in rows}) == 1 for rows in elements.tables)
    counts = parts()["counts"]
    assert len(counts.uncertain) == 24
    assert len(elements.all("img")) == 3 + len(counts.mistakes) + 24
    for value in ("d" * 32, "e" * 32, *(MODEL[key] for key in ("model_id", "weights_sha256"))):
        assert value in text


def test_everything_drawn_has_a_text_alternative():
    elements = Elements(usual())
    assert all(f["role"] == "img" and len(f["aria-label"]) > 20 for f in elements.all("figure"))
    assert all(svg["aria-hidden"] == "true" for svg in elements.all("svg"))
    assert all(image["alt"] for image in elements.all("img"))


def test_size_is_modest():
    names = [str(label) for label in range(10)]
    labels, (own, *compared), pixels = answers(10, rows=2000)
    noise = np.random.default_rng(1).integers(0, 256, pixels.shape, dtype=np.uint8)
    report = sample_report.full_report(labels, own, noise, names, compared=compared, drift=DRIFT)
    counts = sample_report.counts_of(labels, own, noise)
    assert (len(counts.mistakes), len(counts.samples)) == (24, 80)
    text = rendered(names, report=report, counts=counts)
    assert len(text.encode()) < 400_000  # of images that no PNG can pack


def test_page_asks_nothing_of_a_network():
    text = usual()
    for _, attributes in Elements(text).elements:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                assert value.startswith(("data:image/png;base64,", "#"))
    assert not re.search(r"https?://|@import", text)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", text))


def test_the_policy_allows_the_one_script_by_its_hash():
    text = usual()
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policies = [meta["content"] for meta in Elements(text).all("meta") if "http-equiv" in meta]
    assert policies == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'"
    ]


def test_ids_are_unique_and_references_resolve():
    text = usual()
    ids = [attributes["id"] for _, attributes in Elements(text).elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text)
    assert {clip or use for clip, use in references} == set(ids)


def test_page_follows_the_colours_of_its_style_sheet():
    text = usual()
    svg = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "#0101" not in svg
    used = set(re.findall(r"var\((--[\w-]+)\)", svg))
    assert used and all(f"{name}:" in text for name in used)


def test_hostile_class_names_are_harmless():
    names = [report._printable(name) for name in HOSTILE]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = rendered(names, title="<b>bold \udc80</b>")
    elements = Elements(text)
    assert len(elements.all("script")) == 1 and not elements.all("b")[len(HOSTILE) :]
    assert not any(name.startswith("on") for _, attrs in elements.elements for name in attrs)
    assert not any("example.invalid" in image["src"] for image in elements.all("img"))
    assert {"x"}.isdisjoint(attrs.get("id") for _, attrs in elements.elements)
    assert "]]>--> {{ 7 * 7 }}" in elements.text["b"]  # shown as it is
    assert "$x^2$" in elements.text["text"]
    assert "<script>alert(1)</script>" in elements.text["b"]
    text.encode()


def test_page_is_deterministic():
    assert rendered() == usual()


@pytest.mark.parametrize("num_classes", [1, 2, 13, 256])
def test_any_number_of_classes(num_classes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = rendered([f"class {i}" for i in range(num_classes)])
    assert len(text) < 1_000_000
    assert headings(text) == SECTIONS


def test_tolerates_missing_curves_and_model_fields():
    assert "Training" not in headings(rendered(curves=[]))
    unvalidated = [{"epoch": 1, "loss": 0.5, "accuracy": 0.9, "val_loss": None}]
    for curves, validated in ((CURVES, True), (unvalidated, False)):
        (training,) = re.findall("<h2>Training.*?</section>", rendered(curves=curves), re.DOTALL)
        assert ("validation" in training) == validated
    assert headings(rendered(model={"model_id": "m"})) == SECTIONS


# Colours

# How colours look to readers who lack one kind of cone, of linear light. Source: Machado,
# Oliveira, Fernandes 2009, "A Physiologically-based Model for Simulation of Color Vision
# Deficiency", severity 1.
COLOUR_BLIND = {
    "none": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# Linear sRGB to XYZ, by the white of D65. Source: IEC 61966-2-1.
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) / [
    [0.9505],
    [1.0],
    [1.089],
]


def schemes():
    """{variable: colour} of the light page and of the dark one, colours as linear light."""
    style = usual()[: usual().index("* { box-sizing")]
    light, dark = (
        {name: linear(colour) for name, colour in re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)}
        for block in style.split("prefers-color-scheme: dark")
    )
    return {"light": light, "dark": dark}


def linear(colour):
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(colour):
    """CIE 1976 L*a*b* of linear light."""
    x = XYZ @ np.clip(colour, 0, 1)
    f = np.where(x > (6 / 29) ** 3, np.cbrt(x), x * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one, other):
    """Of two colours by WCAG 2: from 1 to 21."""
    low, high = sorted(float(XYZ[1] @ colour) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("sight", COLOUR_BLIND)
def test_colour_blind_readers_tell_the_colours_apart(scheme, sight):
    colours = {name: lab(COLOUR_BLIND[sight] @ value) for name, value in schemes()[scheme].items()}

    def distance(one, other):
        return float(np.linalg.norm(colours[one] - colours[other]))

    assert distance("right", "wrong") > 50
    for one, other in (("series-0", "series-1"), ("series-1", "series-2")):
        assert distance(one, other) > 20
    for name in ("right", "wrong", "series-0", "series-1", "series-2"):
        assert distance(name, "page") > 20


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(scheme):
    colours = schemes()[scheme]
    for text, ground in (("ink", "page"), ("muted", "page"), ("ink", "raised"), ("right", "page")):
        assert contrast(colours[text], colours[ground]) >= 4.5
    for mark in ("right", "wrong", "series-1"):
        assert contrast(colours[mark], colours["page"]) >= 3


def test_contrast_of_known_colours():
    assert contrast(linear("#000000"), linear("#ffffff")) == pytest.approx(21, abs=1e-3)
    assert contrast(linear("#777777"), linear("#ffffff")) == pytest.approx(4.48, abs=5e-3)
    assert lab(linear("#ff0000")) == pytest.approx([53.24, 80.09, 67.20], abs=0.05)


# Numbers


def test_probabilities_are_never_rounded_to_certainty():
    shown = [templates.probability(p) for p in (0.0, 1e-9, 0.5, 1 - 1e-7, 1.0)]
    assert [text.replace("\N{NARROW NO-BREAK SPACE}%", "") for text in shown] == [
        "0.00",
        "< 0.01",
        "50.00",
        "> 99.99",
        "100.00",
    ]


def test_numbers_as_people_read_them():
    assert [templates.signed(n) for n in (-1234, 0, 5)] == ["\N{MINUS SIGN}1,234", "±0", "+5"]
    assert (
        templates.interval(None) == templates.percent(None) == templates.rate(None) == "\N{EN DASH}"
    )


def test_missing_page_libraries_are_named(monkeypatch):
    page.require_page_libraries()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape("pip install '.[report]'")):
        page.require_page_libraries()
