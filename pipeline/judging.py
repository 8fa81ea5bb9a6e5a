"""What is decided on a run: its report, made where there is none, before the gate.

``decision.json`` of the run's folder holds it. One that was made before stands while it would be
made again, or once it was carried out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from pipeline import (
    ancestry,
    checksums,
    decisions,
    gate,
    ledger,
    plan,
    registry,
    rollback,
    storage,
    trainers,
    versions,
)
from pipeline.command import InputError, UnreachableError
from pipeline.dataset import Manifest
from pipeline.plan import DECISION_FILE, REPORT, Request
from pipeline.registry import Version
from pipeline.stages import Stages
from pipeline.storage import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to be done.

    Attributes:
        decision: the content of `DECISION_FILE`.
        version: that it has led to, if it was carried out already.
    """

    decision: dict[str, Any]
    version: Version | None = None


def judge(
    root: Place, request: Request, dataset_dir: Place, manifest: Manifest, stages: Stages
) -> Verdict:
    """Evaluates and decides, as far as that is not done.

    A report that compares with the present champion serves for a decision by other rules too.
    """
    run_dir = plan.run_folder(root, request.run_id)
    champion = registry.champion(root)
    # Before it is scored: should a file change after this, it is not the one that was noted.
    files = checksums.plain(checksums.sums(run_dir / "export"))
    model_id = (plan.read_json(run_dir / trainers.EXPORTED) or {}).get("model_id")
    made = _decided(run_dir, model_id, manifest)
    was_no = made is not None and not made["promoted"]
    version = None if was_no else _published(root, request.run_id, model_id, champion)
    if version is None and made is not None and made.get("model_files") != files:
        made = None  # on other files than stand there, or it does not say on which
    content = plan.read_json(run_dir / REPORT) if made is not None else None
    stands = version is not None or (made is not None and _stands(made, request, champion))
    if made is not None and content is not None and stands:
        return Verdict(decision=made, version=version)
    compared = compared_with(manifest.class_names, champion)
    if content is None or not compares(content, compared):
        stages.run(*command_line(root, request, dataset_dir, compared))
        content = plan.read_json(run_dir / REPORT)
        if content is None:
            raise InputError(f"{run_dir / REPORT}: cannot be read; expected the report just made")
    if made is not None and version is not None:
        return Verdict(decision=made, version=version)  # only its report was lost
    decision = decide(
        content,
        request,
        manifest,
        champion,
        inherited=ancestry.inherited(root, run_dir, dataset_dir, manifest),
        was_left=rollback.was_left(ledger.read(root), champion, model_id),
    )
    if version is not None:
        decision = _lost(decision, version)
    decision = ancestry.told(decision | {"model_files": files}, run_dir)
    stages.hold()
    storage.write_atomic(run_dir / DECISION_FILE, json.dumps(decision, indent=2) + "\n")
    return Verdict(decision=decision, version=version)


def _decided(run_dir: Place, model_id: str | None, manifest: Manifest) -> dict[str, Any] | None:
    """What was decided before, if it was on the model and the dataset that stand there now."""
    made = plan.read_json(run_dir / DECISION_FILE)
    if made is None:
        return None
    standing = (model_id, manifest.dataset_id)
    return made if (made.get("model_id"), made.get("dataset_id")) == standing else None


def _lost(decision: dict[str, Any], version: Version) -> dict[str, Any]:
    """A decision in place of one that was carried out, and then lost."""
    was = f"was published as version {version.version}, by a decision that is lost"
    return decision | {
        "promoted": True,
        "reason": f"{was}; against the present champion: {decision['reason']}",
    }


def command_line(
    root: Place, request: Request, dataset_dir: Place, compared: Version | None
) -> list[str]:
    """The module of the stage that makes the report, and its arguments.

    Args:
        root: the root.
        request: of the run.
        dataset_dir: on whose images its model is judged.
        compared: the version it is compared with, if any.
    """
    run_dir = plan.run_folder(root, request.run_id)
    return [
        "pipeline.evaluate",
        f"--model_dir={run_dir / 'export'}",
        f"--dataset_dir={dataset_dir}",
        f"--report_dir={run_dir / 'report'}",
        f"--ledger={root / ledger.LEDGER_FILE}",
        f"--run_id={request.run_id}",
        *([f"--baseline_dir={root / compared.path}"] if compared else []),
        *request.beam_arguments,
    ]


def compared_with(class_names: Sequence[str], champion: Version | None) -> Version | None:
    """The champion, where it answers with these classes."""
    if champion is None or not gate.same_classes(class_names, champion.class_names).passed:
        return None
    return champion


def compares(content: dict[str, Any] | None, compared: Version | None) -> bool:
    """Whether there is a report that compares with this version, or with none."""
    if content is None:
        return False
    return _baseline_id(content) == (compared.model_id if compared else None)


def _baseline_id(content: dict[str, Any]) -> str | None:
    """The model that a report compares with, if it does."""
    return content["baseline"]["model_id"] if content["baseline"] is not None else None


def _published(
    root: Place, run_id: str, model_id: str | None, champion: Version | None
) -> Version | None:
    """The version that the model of a run has become, if it was published already.

    Whoever is champion by now: a rollback after it is the operator's word, and stays.
    """
    for number in reversed(versions.numbers(root)):
        if champion is None or number > champion.version:  # not published yet
            continue
        try:
            version = versions.load(root, number)
        except UnreachableError:  # which says nothing of the version
            raise
        except InputError:  # it is damaged, or was pruned just now
            continue
        mine = (version.run_id, version.model_id) == (run_id, model_id)
        if mine and version.rolled_back_from is None:
            return version
    return None


def _stands(decision: dict[str, Any], request: Request, champion: Version | None) -> bool:
    """Tells whether what was decided before is still what would be decided."""
    force_reason = _force_reason(request, champion)
    if not decisions.is_about(decision, champion) or decision["forced"] > (
        force_reason is not None
    ):
        return False
    by_these_rules = decision.get("rules") == dataclasses.asdict(request.rules)
    return decision["promoted"] or (force_reason is None and by_these_rules)


def _force_reason(request: Request, champion: Version | None) -> str | None:
    """Why the run is promoted whatever the gate says, if it is.

    The reason was given against the champion of that time. Against another one, which may have
    come by a rollback, it has to be given again.
    """
    if champion is None or champion.run_id == request.run_id:
        return request.force_reason
    return request.force_reason if champion.model_id == request.champion else None


def decide(
    content: dict[str, Any],
    request: Request,
    manifest: Manifest,
    champion: Version | None,
    *,
    inherited: gate.Inherited,
    was_left: bool,
) -> dict[str, Any]:
    """Puts a report, the content of ``report.json``, before the gate; see `decisions.make`."""
    checks = gate.judge(
        content,
        request.rules,
        class_names=manifest.class_names,
        leaked=gate.leaked_images(manifest),
        inherited=inherited,
        was_left=was_left,
        champion_classes=champion.class_names if champion else None,
    )
    made = decisions.make(
        content,
        request.rules,
        checks,
        run_id=request.run_id,
        sources=request.sources,
        champion=champion,
        force_reason=_force_reason(request, champion),
    )
    return made | {
        "champion_version": champion.version if champion else 0,
        "rules": dataclasses.asdict(request.rules),
        "inherited": dataclasses.asdict(inherited),
    }
