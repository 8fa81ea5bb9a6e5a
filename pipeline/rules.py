"""The rules of the gate: what a challenger has to reach, as flags, and how to overrule them."""

from __future__ import annotations

import argparse
import dataclasses

from pipeline import command
from pipeline.command import InputError
from pipeline.dataset import is_line

AT_LEAST_AS_GOOD = "at_least_as_good"
SIGNIFICANTLY_BETTER = "significantly_better"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What the gate asks of a challenger.

    Attributes:
        min_accuracy: over all rows, whatever the champion reaches.
        min_class_accuracy: over the rows of each class that has any.
        min_class_images: how many rows each class has to have: nothing is known of one without.
        promote_if: `AT_LEAST_AS_GOOD` asks for no fewer right answers than the champion's;
            `SIGNIFICANTLY_BETTER` also for a lead that is no chance.
        alpha: how likely a difference may come of chance and still be called significant; above
            0, which would call none so, and below 1. The tests are one-sided: each asks after a
            lead of one of the two models alone, and gives it all of alpha.
    """

    min_accuracy: float = 0.8
    min_class_accuracy: float = 0.5
    min_class_images: int = 1
    promote_if: str = AT_LEAST_AS_GOOD
    alpha: float = 0.05

    def __post_init__(self) -> None:
        if self.promote_if not in (AT_LEAST_AS_GOOD, SIGNIFICANTLY_BETTER):
            raise ValueError(
                f"promote_if is {self.promote_if!r},"
                f" expected {AT_LEAST_AS_GOOD} or {SIGNIFICANTLY_BETTER}"
            )
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha is {self.alpha}, expected above 0 and below 1")


def add_flags(parser: argparse._ActionsContainer) -> None:
    """Adds the flags of the gate."""
    rules = Rules()
    one_sided = "a difference no likelier than this by chance is significant (one-sided tests)"
    for name, kind, default, text in (
        (
            "min_accuracy",
            command.fraction,
            rules.min_accuracy,
            "promote nothing below this test accuracy",
        ),
        (
            "min_class_accuracy",
            command.fraction,
            rules.min_class_accuracy,
            "nor with any class below this",
        ),
        ("alpha", command.open_fraction, rules.alpha, one_sided),
    ):
        parser.add_argument(
            f"--{name}",
            type=kind,
            default=default,
            metavar="X",
            help=f"{text} (default: %(default)s)",
        )
    parser.add_argument(
        "--min_class_images",
        type=command.natural,
        default=rules.min_class_images,
        metavar="N",
        help="nor with fewer test images of any class: what was not looked at may be wrong"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--promote_if",
        choices=(AT_LEAST_AS_GOOD, SIGNIFICANTLY_BETTER),
        default=rules.promote_if,
        help="what a challenger has to be, against the champion (default: %(default)s)",
    )
    parser.add_argument(
        "--force_promote", action="store_true", help="promote whatever the gate says"
    )
    parser.add_argument("--reason", metavar="TEXT", help="why, with --force_promote; is recorded")


def rules_from(flags: argparse.Namespace) -> Rules:
    """The rules of parsed flags."""
    return Rules(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(Rules)})


def force_reason_from(flags: argparse.Namespace) -> str | None:
    """Why to promote whatever the gate says; None where that was not asked for.

    Raises:
        InputError: a reason is missing, is not a line, or has nothing to be the reason of.
    """
    if not flags.force_promote and not flags.reason:  # a script may pass an empty one
        return None
    if not flags.force_promote:
        raise InputError("--reason goes with --force_promote")
    if not is_line(flags.reason):
        raise InputError('--force_promote: expected --reason "...", a line that says why')
    return str(flags.reason)
