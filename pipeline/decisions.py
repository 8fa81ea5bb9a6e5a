"""What follows from the checks of the gate: the decision, with every number."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pipeline.gate import LEAD, Check
from pipeline.rules import Rules
from pipeline.versions import Version

NAMED_CHECKS = 3  # of those that failed; all stand in the decision


def make(
    report: dict[str, Any],
    rules: Rules,
    checks: Sequence[Check],
    *,
    run_id: str,
    sources: Sequence[str],
    champion: Version | None,
    force_reason: str | None = None,
) -> dict[str, Any]:
    """Says what becomes of a challenger: the content of ``decision.json``.

    Args:
        report: of the challenger.
        rules: what was asked.
        checks: of `judge`.
        run_id: which run it is of.
        sources: what its dataset was read from.
        champion: whose place is at stake, if anybody's.
        force_reason: why it is promoted whatever the checks say; None: it is not.

    Raises:
        ValueError: the report compares with another model than the champion.
    """
    baseline = report["baseline"]
    if baseline is not None and (champion is None or baseline["model_id"] != champion.model_id):
        raise ValueError(f"the report compares with model {baseline['model_id']}, not the champion")
    passed = all(check.passed for check in checks)
    forced = force_reason is not None and not passed
    return {
        "run_id": run_id,
        "promoted": passed or forced,
        "forced": forced,
        "force_reason": force_reason,
        "reason": (f"forced ({force_reason}) although " if forced else "") + reason(report, checks),
        "promote_if": rules.promote_if,
        "checks": [dataclasses.asdict(check) | {"passed": check.passed} for check in checks],
        "accuracy": report["accuracy"],
        "per_class_accuracy": {row["name"]: row["accuracy"] for row in report["per_class"]},
        "model_id": report["model_id"],
        "champion_model_id": champion.model_id if champion else None,
        "dataset_id": report["dataset_id"],
        "test_id": report.get("test_id"),
        "challengers_before": report.get("challengers_before"),
        "sources": list(sources),
    }


def reason(report: dict[str, Any], checks: Sequence[Check]) -> str:
    """Says in a sentence why the gate promotes or does not."""
    failed = [check for check in checks if not check.passed]
    if failed:
        more = [f"and {len(failed) - NAMED_CHECKS} more"] if len(failed) > NAMED_CHECKS else []
        return "; ".join([*map(str, failed[:NAMED_CHECKS]), *more])
    if report["baseline"] is None:
        return "above every floor, and there was no champion"
    correct, champions = report["correct"], report["baseline"]["correct"]
    parts = [f"{correct} correct, the champion {champions} of the same rows"]
    parts += [f"{check.check} {check.value:.2g}" for check in checks if check.check == LEAD]
    return "; ".join([*parts, "no class significantly worse"])


def is_about(decided: dict[str, Any], champion: Version | None) -> bool:
    """Tells whether a decision still stands, with the champion that there is.

    Between a decision and its being carried out another model may have come, by a rollback.

    Args:
        decided: the content of ``decision.json``.
        champion: if there is one; it may be of this very decision.
    """
    own = (decided["run_id"], decided["model_id"])
    if champion is not None and (champion.run_id, champion.model_id) == own:
        return True
    return bool(decided["champion_model_id"] == (champion.model_id if champion else None))
