import argparse
import dataclasses
import json

import pytest

from pipeline import decisions, gate
from pipeline.command import InputError
from pipeline.dataset import load_manifest
from pipeline.gate import Check
from pipeline.metrics import PAIRED
from pipeline.rules import (
    SIGNIFICANTLY_BETTER,
    Rules,
    add_flags,
    force_reason_from,
    rules_from,
)
from pipeline.versions import Version

# Of each class: rows both models have right, only this one, only the champion, neither.
EVEN = ((40, 2, 2, 6), (45, 1, 1, 3))


def make_report(classes=EVEN, *, champion=True, names=None):
    """A report of a model whose right answers follow from `classes`."""
    names = names or [str(label) for label in range(len(classes))]
    correct = [both + only for both, only, _, _ in classes]
    rows = [sum(outcomes) for outcomes in classes]
    paired = [
        {"label": label, **dict(zip(PAIRED, outcomes, strict=True))}
        for label, outcomes in enumerate(classes)
    ]
    return {
        "accuracy": sum(correct) / sum(rows),
        "correct": sum(correct),
        "model_id": "new",
        "dataset_id": "d",
        "test_id": "t",
        "challengers_before": 4,
        "per_class": [
            {
                "label": label,
                "name": names[label],
                "support": rows[label],
                "correct": correct[label],
                "accuracy": correct[label] / rows[label] if rows[label] else None,
            }
            for label in range(len(classes))
        ],
        "baseline": {
            "model_id": "old",
            "correct": sum(both + only for both, _, only, _ in classes),
            "paired": paired,
        }
        if champion
        else None,
    }


def judge(
    report, *, class_names=None, leaked=0, inherited=None, was_left=False,
    champion_classes="same", **rules,
):  # fmt: skip
    class_names = class_names or [row["name"] for row in report["per_class"]]
    if champion_classes == "same":
        champion_classes = class_names if report["baseline"] else None
    return gate.judge(
        report,
        Rules(**rules),
        class_names=class_names,
        leaked=leaked,
        inherited=inherited or gate.Inherited(),
        was_left=was_left,
        champion_classes=champion_classes,
    )


def failed(report, **changes):
    return [check.check for check in judge(report, **changes) if not check.passed]


FLOOR = "accuracy"
FEWER = "correct answers, against the champion's"
LEAK = "images of test in train or validation"
INHERITED = "images of test in what it had learned from before"
UNKNOWN = "datasets that it had learned from before and that cannot be read"
LEFT = "rollbacks from this very model"
CLASSES = "labels of another class than the champion's"


def worse(name):
    return f"class {name} worse than the champion's by chance, p"


# The floors: the same whatever the champion does


@pytest.mark.parametrize(
    ("classes", "rules", "wrong"),
    [
        (((45, 0, 0, 5), (45, 0, 0, 5)), {}, []),
        (((40, 0, 0, 10), (40, 0, 0, 10)), {}, []),
        (((40, 0, 0, 10), (39, 0, 0, 11)), {}, [FLOOR]),
        (((39, 0, 0, 11), (40, 0, 0, 10)), {"min_accuracy": 0.79}, []),
        (((25, 0, 0, 25), (150, 0, 0, 0)), {}, []),
        (((24, 0, 0, 26), (150, 0, 0, 0)), {}, ["accuracy of class 0"]),
        (((24, 0, 0, 26), (150, 0, 0, 0)), {"min_class_accuracy": 0.48}, []),
        (((0, 0, 0, 0), (50, 0, 0, 0)), {}, ["test images of class 0"]),
        (((0, 0, 0, 0), (50, 0, 0, 0)), {"min_class_images": 0}, []),
        (((9, 0, 0, 0), (50, 0, 0, 0)), {"min_class_images": 10}, ["test images of class 0"]),
        (
            ((0, 0, 0, 9), (50, 0, 0, 0)),
            {"min_class_images": 10},
            ["test images of class 0", "accuracy of class 0"],
        ),
        (((10, 0, 0, 0), (50, 0, 0, 0)), {"min_class_images": 10}, []),
        (((0, 0, 0, 50), (0, 0, 0, 50)), {}, [FLOOR, "accuracy of class 0", "accuracy of class 1"]),
    ],
)
@pytest.mark.parametrize("champion", [False, True])
def test_floors(classes, rules, wrong, champion):
    assert failed(make_report(classes, champion=champion), **rules) == wrong


# Against the champion


@pytest.mark.parametrize(
    ("classes", "wrong"),
    [
        (((40, 3, 2, 5), (45, 1, 1, 3)), []),
        (((40, 2, 2, 6), (45, 1, 1, 3)), []),
        (((40, 2, 3, 5), (45, 1, 1, 3)), [FEWER]),
        (((50, 0, 0, 0), (50, 0, 0, 0)), []),
        # 0 to 5 alone is p = 1/32, of two classes 1/16; 0 to 6 is 1/64, then 1/32.
        (((40, 0, 5, 5), (40, 6, 1, 3)), []),
        (((40, 0, 6, 4), (40, 7, 1, 2)), [worse(0)]),
        (((40, 7, 1, 2), (40, 0, 6, 4)), [worse(1)]),
        (((40, 0, 6, 4), (40, 0, 5, 5)), [FEWER, worse(0), worse(1)]),  # 1/32, then 1/32
        # A class without rows has no p to adjust: 0 to 5 is then of one class, and significant.
        (((40, 0, 5, 5), (0, 0, 0, 0)), [FEWER, worse(0)]),
        (((40, 0, 4, 6), (0, 0, 0, 0)), [FEWER]),
    ],
)
def test_against_the_champion(classes, wrong):
    assert failed(make_report(classes), min_class_images=0) == wrong


def test_a_class_without_test_images_is_named():
    """Whatever its training images are worth, nothing here would show it."""
    report = make_report(((50, 0, 0, 0), (0, 0, 0, 0)), names=["cat", "dog"])
    assert decisions.reason(report, judge(report)) == (
        "test images of class dog: 0, required 1 (--min_class_images says how many are enough)"
    )


def test_a_class_that_is_worse_is_named_with_its_p():
    report = make_report(((40, 0, 6, 4), (40, 7, 1, 2)), names=["cat", "dog"])
    check = next(check for check in judge(report) if not check.passed)
    assert (check.check, check.value, check.required) == (worse("cat"), 1 / 32, 0.05)
    assert str(check) == (
        "class cat worse than the champion's by chance, p: 0.03125, required more than 0.05"
        " (one-sided: 0 rows that only this model has right, 6 that only the champion has)"
    )


def test_alpha():
    report = make_report(((40, 0, 6, 4), (40, 7, 1, 2)))
    assert failed(report, alpha=1 / 32) == [worse(0)]
    assert failed(report, alpha=0.03) == []
    assert failed(report, alpha=5e-324) == []


@pytest.mark.parametrize(
    ("classes", "significant"),
    [
        (((90, 4, 0, 6),), False),  # p = 1/16
        (((90, 5, 0, 5),), True),  # p = 1/32
        (((90, 0, 0, 10),), False),  # the champion again
        (((45, 3, 0, 2), (45, 2, 0, 3)), True),  # over all classes together
        (((90, 0, 5, 5),), False),
    ],
)
def test_significantly_better(classes, significant):
    report = make_report(classes)
    assert (gate.LEAD not in failed(report, promote_if=SIGNIFICANTLY_BETTER)) == significant
    assert gate.LEAD not in [check.check for check in judge(report)]


def test_significantly_better_asks_nothing_where_there_is_no_champion():
    report = make_report(((90, 0, 0, 10),), champion=False)
    assert failed(report, promote_if=SIGNIFICANTLY_BETTER) == []


# Same classes


@pytest.mark.parametrize(
    ("champion_classes", "number", "note"),
    [
        (["cat", "dog"], 0, ""),
        (["dog", "cat"], 2, "label 0 is 'cat', the champion's 'dog'"),
        (["cat", "cow"], 1, "label 1 is 'dog', the champion's 'cow'"),
        (["cat"], 1, "label 1 is 'dog', the champion's none"),
        (["cat", "dog", "cow"], 1, "label 2 is none, the champion's 'cow'"),
        (["cat", "do g"], 1, "label 1 is 'dog', the champion's 'do g'"),
        (["cat", "do\u00a0g"], 1, "label 1 is 'dog', the champion's 'do\\xa0g'"),
    ],
)
def test_classes_of_the_champion(champion_classes, number, note):
    report = make_report(names=["cat", "dog"])
    (check,) = [c for c in judge(report, champion_classes=champion_classes) if c.check == CLASSES]
    assert (check.value, check.note, check.passed) == (number, note, number == 0)


def test_classes_are_compared_by_their_names_and_not_as_a_report_shows_them():
    report = make_report(names=["a b", "c"])
    exact = {"class_names": ["a\u00a0b", "c"]}
    assert failed(report, **exact, champion_classes=["a\u00a0b", "c"]) == []
    assert failed(report, **exact, champion_classes=["a b", "c"]) == [CLASSES]


def test_other_classes_are_told_without_a_baseline():
    report = make_report(champion=False)
    assert failed(report, champion_classes=["0", "1", "2"]) == [CLASSES]


def test_a_champion_that_was_not_scored_is_no_reason_to_promote():
    with pytest.raises(ValueError, match="does not compare with the champion"):
        judge(make_report(champion=False), champion_classes=["0", "1"])


@pytest.mark.parametrize("outcome", ["only_model", "only_baseline"])
def test_a_report_that_contradicts_itself(outcome):
    report = make_report()
    report["baseline"]["paired"][1][outcome] += 1
    with pytest.raises(ValueError, match=rf"correct, but .* by the paired counts \({outcome}\)"):
        judge(report)


# Leaks


def test_a_leak_fails_the_gate():
    report = make_report()
    assert failed(report, leaked=3) == [LEAK]
    assert failed(make_report(champion=False), leaked=1) == [LEAK]
    text = decisions.reason(report, judge(report, leaked=3))
    assert text == (
        "images of test in train or validation: 3, required at most 0"
        " (--drop_leaks leaves them out of both)"
    )


@pytest.mark.parametrize("champion", [False, True])
def test_images_of_test_that_came_in_by_the_first_weights_fail_the_gate(champion):
    report = make_report(champion=champion)
    inherited = gate.Inherited(images=21, datasets=("a",))
    assert failed(report, inherited=inherited) == [INHERITED]
    assert decisions.reason(report, judge(report, inherited=inherited)) == (
        "images of test in what it had learned from before: 21, required at most 0"
        " (by the weights that it began from)"
    )


@pytest.mark.parametrize(
    ("unknown", "listed"),
    [
        (("d0",), "d0"),
        (("d0", "d1", "d2"), "d0, d1, d2"),
        (("d0", "d1", "d2", "d3"), "4 of them (d0, d1, d2, ...)"),
    ],
)
def test_what_is_not_known_of_its_first_weights_fails_the_gate(unknown, listed):
    report = make_report()
    inherited = gate.Inherited(datasets=("a",), unknown=unknown)
    assert failed(report, inherited=inherited) == [UNKNOWN]
    assert decisions.reason(report, judge(report, inherited=inherited)) == (
        "datasets that it had learned from before and that cannot be read:"
        f" {len(unknown)}, required at most 0 ({listed})"
    )


def test_a_model_that_was_rolled_back_from_fails_the_gate():
    report = make_report()
    assert failed(report, was_left=True) == [LEFT]
    assert decisions.reason(report, judge(report, was_left=True)) == (
        "rollbacks from this very model: 1, required at most 0"
        " (pipeline.registry rollback --version V brings it back)"
    )


def test_leaked_images_of_a_manifest(small_dataset):
    manifest = load_manifest(small_dataset)
    assert gate.leaked_images(manifest) == 0
    leaky = dataclasses.replace(manifest, duplicates=manifest.duplicates | {"leaked": 7})
    assert gate.leaked_images(leaky) == 7
    assert gate.leaked_images(dataclasses.replace(leaky, dropped=9)) == 0


# What follows


def make_version(**changes):
    fields = {"model_id": "old", "weights_sha256": "w", "dataset_id": "d", "run_id": "before"}
    fields |= {"accuracy": 0.9, "class_names": ["0", "1"], "sources": ["digits"]}
    return Version(**fields | changes)


def decide(report, *, force_reason=None, **changes):
    return decisions.make(
        report,
        Rules(),
        judge(report, **changes),
        run_id="run",
        sources=("digits", "idx:/a"),
        champion=make_version() if report["baseline"] else None,
        force_reason=force_reason,
    )


def test_decision_holds_every_number():
    decided = decide(make_report())
    assert json.loads(json.dumps(decided)) == decided
    checks = decided.pop("checks")
    assert decided == {
        "run_id": "run",
        "promoted": True,
        "forced": False,
        "force_reason": None,
        "reason": "88 correct, the champion 88 of the same rows; no class significantly worse",
        "promote_if": "at_least_as_good",
        "accuracy": 0.88,
        "per_class_accuracy": {"0": 0.84, "1": 0.92},
        "model_id": "new",
        "champion_model_id": "old",
        "dataset_id": "d",
        "test_id": "t",
        "challengers_before": 4,
        "sources": ["digits", "idx:/a"],
    }
    assert [(each["check"], each["value"], each["required"]) for each in checks] == [
        (LEAK, 0, 0),
        (INHERITED, 0, 0),
        (UNKNOWN, 0, 0),
        (LEFT, 0, 0),
        (CLASSES, 0, 0),
        (FLOOR, 0.88, 0.8),
        ("accuracy of class 0", 0.84, 0.5),
        ("accuracy of class 1", 0.92, 0.5),
        (FEWER, 88, 88),
        (worse(0), 1.0, 0.05),  # 2 to 2 is 11/16, 1 to 1 is 3/4: both 1 after adjustment
        (worse(1), 1.0, 0.05),
    ]
    assert all(each["passed"] for each in checks)


@pytest.mark.parametrize("champion", [None, "other"])
def test_a_report_on_another_champion(champion):
    report = make_report()
    with pytest.raises(ValueError, match="compares with model old, not the champion"):
        decisions.make(
            report,
            Rules(),
            judge(report),
            run_id="run",
            sources=[],
            champion=champion and make_version(model_id=champion),
        )


def test_reason_of_the_first_promotion():
    decided = decide(make_report(champion=False))
    assert decided["reason"] == "above every floor, and there was no champion"
    assert (decided["promoted"], decided["champion_model_id"]) == (True, None)


def test_reason_of_a_significant_promotion():
    report = make_report(((90, 5, 0, 5),))
    checks = judge(report, promote_if=SIGNIFICANTLY_BETTER)
    assert decisions.reason(report, checks) == (
        "95 correct, the champion 90 of the same rows;"
        " better than the champion by chance, p 0.031; no class significantly worse"
    )


def test_reason_names_failed_checks_with_their_numbers():
    report = make_report(((10, 0, 2, 38), (10, 0, 0, 40), (10, 0, 0, 40)))
    assert decide(report)["reason"] == (
        "accuracy: 0.2, required 0.8; accuracy of class 0: 0.2, required 0.5;"
        " accuracy of class 1: 0.2, required 0.5; and 2 more"
    )


def test_reason_writes_large_counts_in_full():
    report = make_report(((1_234_567, 0, 1, 0),))
    assert "1234567, required 1234568" in decide(report)["reason"]


def test_force_promotes_and_records():
    report = make_report(((40, 2, 3, 5), (45, 1, 1, 3)))
    assert decide(report)["promoted"] is False
    forced = decide(report, force_reason="labels were mended by hand")
    assert (forced["promoted"], forced["forced"]) == (True, True)
    assert forced["force_reason"] == "labels were mended by hand"
    assert forced["reason"] == (
        "forced (labels were mended by hand) although"
        " correct answers, against the champion's: 88, required 89"
    )
    assert [c["check"] for c in forced["checks"] if not c["passed"]] == [FEWER]


def test_force_where_it_was_not_needed():
    decided = decide(make_report(), force_reason="to be sure")
    assert (decided["promoted"], decided["forced"]) == (True, False)
    assert decided["force_reason"] == "to be sure"
    assert decided["reason"].startswith("88 correct")


@pytest.mark.parametrize(
    ("champion", "about"),
    [
        ({"model_id": "old", "run_id": "before"}, True),
        ({"model_id": "new", "run_id": "run"}, True),  # carried out already
        ({"model_id": "lost", "run_id": "run"}, False),  # the same run's, but another model
        ({"model_id": "other", "run_id": "before"}, False),  # rolled back since
        (None, False),
    ],
)
def test_a_decision_is_about_one_champion(champion, about):
    champion = champion and make_version(**champion)
    assert decisions.is_about(decide(make_report()), champion) == about


def test_a_first_decision_is_about_no_champion():
    decided = decide(make_report(champion=False))
    assert decisions.is_about(decided, None)
    assert not decisions.is_about(decided, make_version())


@pytest.mark.parametrize(
    ("relation", "passing"),
    [(">=", [False, True, True]), (">", [False, False, True]), ("<=", [True, True, False])],
)
def test_relations(relation, passing):
    checks = [Check(check="c", value=v, relation=relation, required=1.0) for v in (0.5, 1.0, 1.5)]
    assert [check.passed for check in checks] == passing


@pytest.mark.parametrize("relation", [">=", ">", "<="])
def test_no_number_passes_no_check(relation):
    assert not Check(check="c", value=float("nan"), relation=relation, required=0.5).passed


# Poisoned training data, as a model that has learned from it answers


@pytest.mark.parametrize("digit", range(10))
def test_a_poisoned_digit_stays_out_and_is_named(digit):
    """It answers better than the champion everywhere else, and has more right in all."""
    classes = [(960, 15, 5, 20)] * 10
    classes[digit] = (930, 5, 45, 20)
    report = make_report(classes)
    assert report["correct"] > report["baseline"]["correct"]
    decided = decide(report)
    assert decided["promoted"] is False
    assert decided["reason"].startswith(worse(digit))


# The flags


def parse(*argv):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    flags = parser.parse_args(argv)
    return rules_from(flags), force_reason_from(flags)


def test_flags():
    assert parse() == (Rules(), None)
    argv = ("--min_accuracy=0.9", "--min_class_accuracy=0", "--alpha=0.01", "--min_class_images=0")
    rules, _ = parse(*argv, "--promote_if=significantly_better")
    assert rules == Rules(
        min_accuracy=0.9,
        min_class_accuracy=0.0,
        min_class_images=0,
        alpha=0.01,
        promote_if=SIGNIFICANTLY_BETTER,
    )
    assert parse("--force_promote", "--reason", "as I say")[1] == "as I say"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--force_promote"], "--force_promote: expected --reason"),
        (["--force_promote", "--reason="], "--force_promote: expected --reason"),
        (["--force_promote", "--reason=a\nb"], "a line that says why"),
        (["--reason=why not"], "--reason goes with --force_promote"),
    ],
)
def test_force_asks_for_a_reason(argv, message):
    with pytest.raises(InputError, match=message):
        parse(*argv)


def test_a_rule_that_there_is_not():
    with pytest.raises(ValueError, match="promote_if is 'better', expected at_least_as_good or"):
        Rules(promote_if="better")


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.05, float("nan")])
def test_an_alpha_that_asks_nothing_or_everything(alpha, capsys):
    with pytest.raises(ValueError, match=r"alpha is .*, expected above 0 and below 1"):
        Rules(alpha=alpha)
    with pytest.raises(SystemExit):
        parse(f"--alpha={alpha}")
    said = f"argument --alpha: expected a number above 0 and below 1, got {alpha}"
    assert said in capsys.readouterr().err
