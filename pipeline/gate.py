"""The gate: whether a challenger takes the champion's place.

`judge` puts what a report says before the rules, one `Check` for each condition. What follows is
for `pipeline.decisions` to say.

Both models were scored on the same rows. What counts for "worse" and "better" are the rows where
exactly one of them is right; see `pipeline.significance`.

What is not seen: a class that loses a little with every promotion, never significantly against the
champion before. No champion of the past is asked. `Rules.min_class_accuracy` is where that ends;
`pipeline.registry rollback` undoes it.

Synopsis::

    checks = judge(
        report,
        rules,
        class_names=manifest.class_names,
        leaked=leaked_images(manifest),
        inherited=Inherited(),
        was_left=False,
        champion_classes=None,
    )
    all(check.passed for check in checks)
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.dataset import Manifest
from pipeline.metrics import PAIRED
from pipeline.rules import SIGNIFICANTLY_BETTER, Rules
from pipeline.significance import holm_adjusted, p_value

LEAD = "better than the champion by chance, p"
NAMED = 3  # datasets in a sentence

RELATIONS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    ">=": (operator.ge, "required"),
    ">": (operator.gt, "required more than"),
    "<=": (operator.le, "required at most"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One condition of the gate.

    Attributes:
        check: what is looked at.
        value: the challenger's.
        relation: how it has to stand to what is required; a key of `RELATIONS`.
        required: the bound.
        note: what the value comes from; may be empty.
    """

    check: str
    value: float
    relation: str = ">="
    required: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the challenger meets it."""
        return RELATIONS[self.relation][0](self.value, self.required)

    def __str__(self) -> str:
        asked = f"{RELATIONS[self.relation][1]} {_number(self.required)}"
        return f"{self.check}: {_number(self.value)}, {asked}" + (
            f" ({self.note})" if self.note else ""
        )


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inherited:
    """What a model has learned from before its own dataset, by the weights that it began from.

    Attributes:
        images: of test, that stand in what it has learned from.
        datasets: the ids of those that were asked.
        unknown: the ids of those that could not be asked.
    """

    images: int = 0
    datasets: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def listed(names: Sequence[str]) -> str:
    """The first few of many names, and how many there are."""
    shown = ", ".join(names[:NAMED])
    return shown if len(names) <= NAMED else f"{len(names)} of them ({shown}, ...)"


# The conditions


def judge(
    report: dict[str, Any],
    rules: Rules,
    *,
    class_names: Sequence[str],
    leaked: int,
    inherited: Inherited,
    was_left: bool,
    champion_classes: Sequence[str] | None,
) -> list[Check]:
    """Lists the conditions of the gate with a report's values.

    Args:
        report: of the challenger; its baseline, where it has one, is the champion.
        rules: what is asked.
        class_names: of the challenger's classes, by label; a report has them as they can be
            shown, and so different ones may look alike there.
        leaked: images of test that stand in train or validation too; see `leaked_images`.
        inherited: what it has learned from before.
        was_left: whether a rollback has led away from this very model; see `rollback.was_left`.
        champion_classes: names of the champion's classes, by label; None: there is no champion.

    Raises:
        ValueError: there is a champion of the same classes, but the report does not compare with
            it, or contradicts itself in doing so.
    """
    checks = [
        Check(
            check="images of test in train or validation",
            value=leaked,
            relation="<=",
            required=0,
            note="--drop_leaks leaves them out of both" if leaked else "",
        ),
        *_nothing_inherited(inherited),
        Check(
            check="rollbacks from this very model",
            value=int(was_left),
            relation="<=",
            required=0,
            note="pipeline.registry rollback --version V brings it back" if was_left else "",
        ),
    ]
    if champion_classes is not None:
        checks.append(same_classes(class_names, champion_classes))
        if checks[-1].passed and report["baseline"] is None:
            raise ValueError("the report does not compare with the champion")
    checks += _floors(report, rules)
    if report["baseline"] is not None:
        checks += _against_champion(report, rules)
    return checks


def _nothing_inherited(inherited: Inherited) -> list[Check]:
    """No image of test may have come in by the weights that a model began from.

    What is not known counts like what was found: else a dataset that is gone would hide it.
    """
    unknown = inherited.unknown
    return [
        Check(
            check="images of test in what it had learned from before",
            value=inherited.images,
            relation="<=",
            required=0,
            note="by the weights that it began from" if inherited.images else "",
        ),
        Check(
            check="datasets that it had learned from before and that cannot be read",
            value=len(unknown),
            relation="<=",
            required=0,
            note=listed(unknown),
        ),
    ]


def leaked_images(manifest: Manifest) -> int:
    """How many images of test stand in train or validation as well.

    A manifest counts those of the source; where rows were dropped, it was all such rows.
    """
    return 0 if manifest.dropped else int(manifest.duplicates["leaked"])


def same_classes(names: Sequence[str], champion_names: Sequence[str]) -> Check:
    """A label has to mean what it means to whoever is served by the champion.

    Where this fails, there is nothing to score the champion on, and no baseline to ask for.

    Args:
        names: of the challenger's classes, by label.
        champion_names: of the champion's.
    """
    pairs = itertools.zip_longest(names, champion_names)
    differ = [
        f"label {label} is {_named(name)}, the champion's {_named(other)}"
        for label, (name, other) in enumerate(pairs)
        if name != other
    ]
    return Check(
        check="labels of another class than the champion's",
        value=len(differ),
        relation="<=",
        required=0,
        note=differ[0] if differ else "",
    )


def _named(name: str | None) -> str:
    return "none" if name is None else repr(name)


def _floors(report: dict[str, Any], rules: Rules) -> list[Check]:
    checks = [Check(check="accuracy", value=report["accuracy"], required=rules.min_accuracy)]
    for row in report["per_class"]:
        if row["support"] < rules.min_class_images:
            checks.append(
                Check(
                    check=f"test images of class {row['name']}",
                    value=row["support"],
                    required=rules.min_class_images,
                    note="--min_class_images says how many are enough",
                )
            )
        if row["support"]:
            checks.append(
                Check(
                    check=f"accuracy of class {row['name']}",
                    value=row["accuracy"],
                    required=rules.min_class_accuracy,
                )
            )
    return checks


def _against_champion(report: dict[str, Any], rules: Rules) -> list[Check]:
    baseline = report["baseline"]
    _require_consistent(report["correct"], baseline["correct"], baseline["paired"])
    fewer = Check(
        check="correct answers, against the champion's",
        value=report["correct"],
        required=baseline["correct"],
    )
    checks = [fewer, *_classes_not_worse(report, rules)]
    if rules.promote_if == SIGNIFICANTLY_BETTER:
        wins = sum(row["only_model"] for row in baseline["paired"])
        losses = sum(row["only_baseline"] for row in baseline["paired"])
        checks.append(
            Check(
                check=LEAD,
                value=p_value(wins, losses),
                relation="<=",
                required=rules.alpha,
                note=_alone(wins, losses),
            )
        )
    return checks


def _require_consistent(correct: int, champions: int, paired: list[dict[str, int]]) -> None:
    for one, alone in ((correct, "only_model"), (champions, "only_baseline")):
        if one != (counted := sum(row["both"] + row[alone] for row in paired)):
            raise ValueError(f"{one} correct, but {counted} by the paired counts ({alone})")


def _classes_not_worse(report: dict[str, Any], rules: Rules) -> list[Check]:
    """One check for each class that has rows; their p-values are adjusted to one another."""
    names = {row["label"]: row["name"] for row in report["per_class"]}
    paired = [row for row in report["baseline"]["paired"] if sum(row[o] for o in PAIRED)]
    p_values = holm_adjusted([p_value(row["only_baseline"], row["only_model"]) for row in paired])
    return [
        Check(
            check=f"class {names[row['label']]} worse than the champion's by chance, p",
            value=p,
            relation=">",
            required=rules.alpha,
            note=_alone(row["only_model"], row["only_baseline"]),
        )
        for row, p in zip(paired, p_values, strict=True)
    ]


def _alone(wins: int, losses: int) -> str:
    return (
        f"one-sided: {wins} rows that only this model has right,"
        f" {losses} that only the champion has"
    )
