import csv
import dataclasses
import io
import json
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest

from pipeline import metrics, report
from pipeline.command import InputError
from pipeline.dataset import Manifest, Split
from pipeline.records import image_ids

MODEL = {"model_id": "0123456789abcdef", "weights_sha256": "f" * 64, "preset": "core", "seed": 22}
CURVES = [
    {"epoch": e, "loss": 1 / e, "accuracy": 1 - 0.1 / e, "val_loss": 1.1 / e, "val_accuracy": 0.9}
    for e in (1, 2, 3)
]
CONFUSION = [[8, 1, 1], [2, 6, 2], [0, 0, 5]]
HOSTILE = (
    "<script>alert(1)</script>",
    '" id="x" onload="alert(1)',
    "</svg></style><img src=https://example.invalid/x>",
    "]]>--> {{ 7 * 7 }}",
    "$x^2$",
    "\udc80\x01漢",
)


def manifest(names=("a", "b", "c"), title="three kinds of things"):
    split = Split(num_examples=2 * len(names), label_counts=(2,) * len(names), shards=())
    return Manifest(
        format_version=1,
        dataset_id="d" * 32,
        source={"kind": "idx", "title": title},
        split_by="positional",
        num_classes=len(names),
        class_names=tuple(names),
        image_shape=(28, 28, 1),
        splits={"train": split, "validation": split, "test": split},
        quarantined={"count": 0, "by_reason": {}},
        dropped=0,
        flagged={},
        duplicates={},
    )


def counts(confusion):
    confusion = np.array(confusion)
    return dataclasses.replace(metrics.zero_counts(len(confusion)), confusion=confusion)


def built(confusion, names=("a", "b", "c"), baseline=None):
    return report.build_report(
        counts(confusion), manifest=manifest(names), model=MODEL, split="test", baseline=baseline
    )


def scored(num_classes, rows=60):
    """Counts of random answers, with images."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 100, (rows, 784), dtype=np.uint8)
    probabilities = rng.dirichlet(np.ones(num_classes), rows).astype(np.float32)
    labels = rng.integers(0, num_classes, rows)
    return metrics.count(labels, probabilities, image_ids(pixels), pixels)


def page(names=("a", "b", "c"), title="three kinds of things", curves=CURVES, model=MODEL):
    total, about = scored(len(names)), manifest(names, title)
    content = report.build_report(
        total, manifest=about, model=model, split="test", baseline=(MODEL, scored(len(names)))
    )
    return report.render_html(content, manifest=about, model=model, curves=curves, counts=total)


class Elements(HTMLParser):
    """Collects the elements of a page, and the text in each kind of element."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.open = [], {}, [""]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self.open.pop() != tag:  # elements that have no end tag
            pass

    def handle_data(self, data):
        self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


# The numbers


def test_three_classes_by_hand():
    content = built(CONFUSION)
    assert (content["num_examples"], content["correct"], content["accuracy"]) == (25, 19, 0.76)
    assert content["accuracy_ci95"] == pytest.approx([0.565703, 0.885037], abs=2e-6)
    a, b, c = content["per_class"]
    assert [row["support"] for row in (a, b, c)] == [10, 10, 5]
    assert [row["correct"] for row in (a, b, c)] == [8, 6, 5]
    assert [row["accuracy"] for row in (a, b, c)] == [0.8, 0.6, 1.0]
    assert [row["recall"] for row in (a, b, c)] == [0.8, 0.6, 1.0]
    assert [row["precision"] for row in (a, b, c)] == [8 / 10, 6 / 7, 5 / 8]
    assert [row["f1"] for row in (a, b, c)] == [16 / 20, 12 / 17, 10 / 13]
    assert a["ci95"] == pytest.approx([0.490162, 0.943318], abs=2e-6)
    assert c["ci95"] == pytest.approx([0.565518, 1.0], abs=2e-6)


def test_has_the_fields_of_the_contract():
    content = built(CONFUSION, baseline=({"model_id": "old"}, counts([[7, 3, 0], *CONFUSION[1:]])))
    assert content["dataset_id"] == "d" * 32
    assert content["model_id"] == MODEL["model_id"]
    assert content["split"] == "test"
    assert content["confusion_matrix"] == CONFUSION
    assert content["log_loss"] == content["calibration_error"] == 0
    assert content["baseline"] == {
        "model_id": "old",
        "correct": 18,
        "accuracy": 0.72,
        "log_loss": 0,
        "per_class_correct": [7, 6, 5],
    }
    assert json.loads(report.report_json(content)) == content
    assert built(CONFUSION)["baseline"] is None


def test_a_class_without_support_has_nulls():
    row = built([[8, 0, 2], [0, 9, 0], [0, 0, 0]])["per_class"][2]
    assert row == {
        "label": 2,
        "name": "c",
        "support": 0,
        "correct": 0,
        "accuracy": None,
        "ci95": None,
        "precision": 0.0,
        "recall": None,
        "f1": None,
    }
    never_predicted = built([[8, 0, 0], [0, 9, 0], [1, 0, 0]])["per_class"][2]
    assert never_predicted["precision"] is None
    assert never_predicted["recall"] == never_predicted["f1"] == 0


def test_nothing_evaluated_gives_nulls_and_a_page():
    content = built(np.zeros((3, 3), np.int64))
    assert content["accuracy"] is content["accuracy_ci95"] is content["log_loss"] is None
    assert content["most_confused"] == []
    assert "all         0" in report.text_table(content)
    about = manifest()
    report.render_html(
        content, manifest=about, model=MODEL, curves=[], counts=counts([[0] * 3] * 3)
    )


def test_most_confused_is_ordered_by_count_then_label_then_prediction():
    pairs = built([[9, 1, 3], [3, 9, 0], [1, 4, 9]])["most_confused"]
    assert [(pair["count"], pair["label"], pair["predicted"]) for pair in pairs] == [
        (4, 2, 1),
        (3, 0, 2),
        (3, 1, 0),
        (1, 0, 1),
        (1, 2, 0),
    ]
    many = built(np.ones((5, 5), np.int64), names="abcde")["most_confused"]
    assert len(many) == report.MAX_CONFUSED


# Text


def test_csv_texts():
    content = built([[8, 0, 2], [0, 9, 0], [0, 0, 0]], names=("a", 'b, "b"', "c"))
    low, high = content["per_class"][0]["ci95"]
    lines = report.per_class_csv(content).split("\n")
    assert lines[0] == "label,name,support,correct,accuracy,ci95_low,ci95_high,precision,recall,f1"
    assert lines[1] == f"0,a,10,8,0.8,{low},{high},1.0,0.8,{16 / 18}"
    assert lines[3:] == ["2,c,0,0,,,,0.0,,", ""]
    matrix = report.confusion_matrix_csv(content)
    assert matrix == 'true class,a,"b, ""b""",c\na,8,0,2\n"b, ""b""",0,9,0\nc,0,0,0\n'
    assert next(csv.reader(io.StringIO(matrix)))[2] == 'b, "b"'


def test_text_table():
    content = built([[8, 0, 2], [0, 9, 0], [0, 0, 0]], names=("a", "b" * 40, "c"))
    assert report.text_table(content).splitlines() == [
        "class                           images  correct  accuracy %   95 % interval"
        "  precision  recall      f1",
        "-" * 102,
        "a                                   10        8       80.00   49.02 - 94.33"
        "     1.0000  0.8000  0.8889",
        "bbbbbbbbbbbbbbbbbbbbbbbbbbb...       9        9      100.00  70.09 - 100.00"
        "     1.0000  1.0000  1.0000",
        "c                                    0        0           -               -"
        "     0.0000       -       -",
        "-" * 102,
        "all                                 19       17       89.47   68.61 - 97.06",
    ]


# The page


def test_title_says_what_the_data_is():
    title = "the 1,797 8x8 digits that come with scikit-learn (not MNIST)"
    elements = Elements(page(title=title))
    assert title in elements.text["title"]
    assert title in elements.text["h1"]


def test_page_is_complete():
    text = page()
    elements = Elements(text)
    assert len(elements.all("svg")) == len(elements.all("figure")) == 4
    assert all(f["role"] == "img" and f["aria-label"] for f in elements.all("figure"))
    assert len(elements.all("figcaption")) == 4
    assert all(image["alt"] for image in elements.all("img"))
    samples, mistakes = 3, len(scored(3).mistakes)
    assert len(elements.all("img")) == samples + mistakes
    for value in (*MODEL.values(), "d" * 32):
        assert str(value) in text
    assert len(text) < 400_000


def test_page_asks_nothing_of_a_network():
    text = page()
    for _, attributes in Elements(text).elements:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                assert value.startswith(("data:image/png;base64,", "#"))
    assert not re.search(r"https?://|@import", text)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", text))


def test_ids_are_unique_and_references_resolve():
    text = page()
    ids = [attributes["id"] for _, attributes in Elements(text).elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text)
    assert {clip or use for clip, use in references} == set(ids)


def test_page_follows_the_colours_of_its_style_sheet():
    svg = "".join(re.findall(r"<svg.*?</svg>", page(), re.DOTALL))
    assert "#0101" not in svg
    used = set(re.findall(r"var\((--[\w-]+)\)", svg))
    assert used and all(f"{name}:" in page() for name in used)


def test_hostile_class_names_are_harmless():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = page(names=HOSTILE, title="<b>bold \udc80</b>")
    elements = Elements(text)
    assert not elements.all("script") and not elements.all("b")[len(HOSTILE) :]
    assert not any(name.startswith("on") for _, attrs in elements.elements for name in attrs)
    assert not any("example.invalid" in image["src"] for image in elements.all("img"))
    assert {"x"}.isdisjoint(attrs.get("id") for _, attrs in elements.elements)
    assert "]]>--> {{ 7 * 7 }}" in elements.text["b"]  # shown as it is
    assert "$x^2$" in elements.text["text"]
    assert "<script>alert(1)</script>" in elements.text["b"]
    text.encode()


def test_unprintable_class_names_stay_out_of_every_output():
    content = built(CONFUSION, names=("\udc80", "a\nb", "\x1b[31m"))
    assert [row["name"] for row in content["per_class"]] == ["�", "a b", "�[31m"]
    for text in (report.per_class_csv(content), report.text_table(content)):
        text.encode()


def test_page_is_deterministic():
    assert page() == page()


@pytest.mark.parametrize("num_classes", [2, 13, 256])
def test_any_number_of_classes(num_classes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = page(names=[f"class {i}" for i in range(num_classes)])
    assert len(text) < 1_000_000


def test_tolerates_missing_curves_and_model_fields():
    assert "Training" not in Elements(page(curves=[])).text["h2"]
    unvalidated = [{"epoch": 1, "loss": 0.5, "accuracy": 0.9, "val_loss": None}]
    for curves, validated in ((CURVES, True), (unvalidated, False)):
        (training,) = re.findall("<h2>Training.*?</section>", page(curves=curves), re.DOTALL)
        assert ("validation" in training) == validated
    assert page(model={"model_id": "m"})


def test_probabilities_are_never_rounded_to_certainty():
    shown = [report._probability(p) for p in (0.0, 1e-9, 0.5, 1 - 1e-7, 1.0)]
    assert [text.replace("\N{NARROW NO-BREAK SPACE}%", "") for text in shown] == [
        "0.00",
        "< 0.01",
        "50.00",
        "> 99.99",
        "100.00",
    ]


def test_missing_page_libraries_are_named(monkeypatch):
    report.require_page_libraries()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape("pip install '.[report]'")):
        report.require_page_libraries()
