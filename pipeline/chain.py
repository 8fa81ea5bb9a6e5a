"""One run from its request to its line in the ledger: dataset, training, report, decision."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from pipeline import (
    command,
    gate,
    ledger,
    options,
    plan,
    registry,
    report,
    storage,
    versions,
)
from pipeline.command import InputError, log, show
from pipeline.dataset import MANIFEST_NAME, Manifest, load_manifest
from pipeline.ledger import Line
from pipeline.models import MODEL_FILE
from pipeline.plan import DECISION_FILE, REPORT, Request
from pipeline.stages import StageError, Stages, trainer_folders

FAILURES_FILE = "failures.jsonl"
MAX_FAILURES = 3  # of one run; then it must not stand in the way of others any longer
SPLIT = "test"  # what models are judged on


class AbandonedError(Exception):
    """A run cannot be finished any more; the message says why."""


def finish(root: Path, request: Request, stages: Stages) -> int:
    """Runs what is left of a run to its end, and enters it in the ledger; returns an exit code.

    Killed anywhere and called again, it comes to the same end.
    """
    run_dir = plan.run_folder(root, request.run_id)
    tidy(run_dir, run_dir / "report", root / registry.MODELS)
    storage.recover_all(root / registry.MODELS)
    try:
        dataset_dir = _make_dataset(root, request, stages)
        manifest = load_manifest(dataset_dir)
        if (twin := _twin(root, request, manifest)) is not None:
            storage.discard(run_dir, plan.REQUEST_FILE)
            log.info("nothing new: the same images as those of run %s", twin)
            return command.DONE
        _train(root, request, dataset_dir, stages)
        decision = _judge(root, request, dataset_dir, manifest, stages)
    except AbandonedError as error:
        log.warning("run %s: abandoned: %s", request.run_id, error)
        _close(root, request, outcome="abandoned", reason=str(error))
        return command.DONE
    except StageError as error:
        return _failed(root, request, error)
    _carry_out(root, request, decision)
    show_outcome(root, run_dir)
    return command.DONE if decision["promoted"] else command.KEPT_CHAMPION


def tidy(*folders: Path) -> None:
    """Removes the files that a process was writing when it was killed."""
    for folder in folders:
        for leftover in folder.glob(".*.*"):  # see `storage.open_atomic`; a lock has no second dot
            if leftover.is_file():
                leftover.unlink(missing_ok=True)


def sweep(root: Path) -> None:
    """Removes folders of runs that were killed before their request stood, or as it was removed."""
    storage.discard_leftovers(root / plan.RUNS)
    for folder in (root / plan.RUNS).glob("*"):
        if folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir()):
            tidy(folder)
            with contextlib.suppress(OSError):  # it holds something else, which is not ours
                folder.rmdir()


def _make_dataset(root: Path, request: Request, stages: Stages) -> Path:
    """Makes the dataset where it is not there yet, and returns its folder.

    Raises:
        AbandonedError: its source is no longer what it was when the run was begun.
    """
    dataset_dir = plan.dataset_folder(root, request.fingerprint)
    storage.recover(dataset_dir)
    if (dataset_dir / MANIFEST_NAME).is_file():
        return dataset_dir
    config = request.preprocess(dataset_dir)
    named = " and ".join(request.sources)
    try:
        fingerprint = options.fingerprint(config, options.open_sources_of(config))
    except InputError as error:
        raise AbandonedError(f"its source cannot be read any more: {error}") from None
    if fingerprint != request.fingerprint:
        raise AbandonedError(f"{named} has changed, and its dataset was not made yet")
    stages.run(
        "pipeline.preprocess",
        *[f"--source={spec}" for spec in request.sources],
        "--output_dir",
        dataset_dir,
        *options.dataset_arguments(config),
        *request.beam_arguments,
    )
    return dataset_dir


def _twin(root: Path, request: Request, manifest: Manifest) -> str | None:
    """The run, if any, in which the same images were judged, although they came otherwise."""
    if request.repeat or request.force_reason is not None:
        return None
    lines = ledger.read(root)
    found = ledger.find_judged(
        lines,
        config_id=request.config_id,
        fingerprint=request.fingerprint,
        dataset_id=manifest.dataset_id,
    )
    if found is None or found["run_id"] == request.run_id or not plan.stands(root, found, lines):
        return None
    return str(found["run_id"])


def _train(root: Path, request: Request, dataset_dir: Path, stages: Stages) -> None:
    initial = request.initial_weights
    stages.run(
        "trainer.task",
        "--dataset_dir",
        dataset_dir,
        *trainer_folders(plan.run_folder(root, request.run_id)),
        *([f"--initial_weights={root / initial}"] if initial is not None else []),
        *request.trainer_arguments,
    )


def _judge(
    root: Path, request: Request, dataset_dir: Path, manifest: Manifest, stages: Stages
) -> dict[str, Any]:
    """Evaluates and decides, as far as that is not done; returns the content of `DECISION_FILE`.

    A report that compares with the present champion serves for a decision by other rules too.
    """
    run_dir = plan.run_folder(root, request.run_id)
    champion = registry.champion(root)
    made = _read(run_dir / DECISION_FILE)
    carried_out = made is not None and _published_for(root, made) is not None
    content = _read(run_dir / REPORT) if made is not None else None
    stands = made is not None and (carried_out or _stands(made, request, champion))
    if made is not None and content is not None and stands:
        return made
    compared = champion if champion and _is_comparable(manifest, champion) else None
    if content is None or _baseline_id(content) != (compared.model_id if compared else None):
        _evaluate(root, request, dataset_dir, compared, stages)
        content = json.loads((run_dir / REPORT).read_text())
    if made is not None and carried_out:
        return made  # only its report was lost
    decision = decide(content, request, manifest, champion)
    storage.write_atomic(run_dir / DECISION_FILE, json.dumps(decision, indent=2) + "\n")
    return decision


def _evaluate(
    root: Path,
    request: Request,
    dataset_dir: Path,
    compared: registry.Version | None,
    stages: Stages,
) -> None:
    run_dir = plan.run_folder(root, request.run_id)
    stages.run(
        "pipeline.evaluate",
        "--model_dir",
        run_dir / "export",
        "--dataset_dir",
        dataset_dir,
        "--report_dir",
        run_dir / "report",
        f"--ledger={root / ledger.LEDGER_FILE}",
        f"--run_id={request.run_id}",
        *([f"--baseline_dir={root / compared.path}"] if compared else []),
        *request.beam_arguments,
    )


def _is_comparable(manifest: Manifest, champion: registry.Version) -> bool:
    return gate.same_classes(manifest.class_names, champion.class_names).passed


def _baseline_id(content: dict[str, Any]) -> str | None:
    """The model that a report compares with, if it does."""
    return content["baseline"]["model_id"] if content["baseline"] is not None else None


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object that the chain has written, if it has."""
    content: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return content


def _published_for(root: Path, decision: dict[str, Any]) -> registry.Version | None:
    """The version that a decision has led to, if it was carried out already.

    Whoever is champion by now: a rollback after it is the operator's word, and stays.
    """
    noted = decision.get("champion_version")
    champion = registry.champion(root)
    if not decision["promoted"] or noted is None or champion is None:
        return None
    for number in versions.numbers(root):
        if noted < number <= champion.version:  # above the champion's: not published yet
            version = versions.load(root, number)
            if version.run_id == decision["run_id"] and version.rolled_back_from is None:
                return version
    return None


def _stands(decision: dict[str, Any], request: Request, champion: registry.Version | None) -> bool:
    """Tells whether what was decided before is still what would be decided."""
    force_reason = _force_reason(request, champion)
    if not gate.is_about(decision, champion) or decision["forced"] > (force_reason is not None):
        return False
    by_these_rules = decision.get("rules") == dataclasses.asdict(request.rules)
    return decision["promoted"] or (force_reason is None and by_these_rules)


def _force_reason(request: Request, champion: registry.Version | None) -> str | None:
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
    champion: registry.Version | None,
) -> dict[str, Any]:
    """Puts a report, the content of ``report.json``, before the gate; see `gate.decision`."""
    checks = gate.judge(
        content,
        request.rules,
        class_names=manifest.class_names,
        leaked=gate.leaked_images(manifest),
        champion_classes=champion.class_names if champion else None,
    )
    made = gate.decision(
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
    }


def _carry_out(root: Path, request: Request, decision: dict[str, Any]) -> None:
    """Does what was decided, then enters it in the ledger.

    A chain killed before the ledger's line carries out the same decision again, to the same end.
    """
    version = None
    if decision["promoted"]:
        champion = registry.champion(root)
        standing = champion if champion and champion.run_id == request.run_id else None
        version = (
            _published_for(root, decision) or standing or _publish(root, request, decision)
        ).version
    _close(
        root,
        request,
        outcome="promoted" if decision["promoted"] else "kept",
        version=version,
        **{
            name: decision[name]
            for name in (
                "promoted", "forced", "reason", "accuracy", "per_class_accuracy", "model_id",
                "dataset_id", "test_id",
            )
        },
    )  # fmt: skip


def _publish(root: Path, request: Request, decision: dict[str, Any]) -> registry.Version:
    run_dir = plan.run_folder(root, request.run_id)
    model = json.loads((run_dir / "export" / MODEL_FILE).read_text())
    version = registry.Version(
        model_id=model["model_id"],
        weights_sha256=model["weights_sha256"],
        dataset_id=model["dataset_id"],
        run_id=request.run_id,
        accuracy=decision["accuracy"],
        class_names=model["dataset"]["class_names"],
        sources=decision["sources"],
    )
    return registry.publish(root, run_dir / "export", version, report=run_dir / REPORT)


def _close(root: Path, request: Request, **known: Any) -> None:
    """Enters the end of a run in the ledger."""
    line = Line(
        run_id=request.run_id,
        window=request.window,
        fingerprint=request.fingerprint,
        config_id=request.config_id,
        **known,
    )
    ledger.append(root, line)


def _failed(root: Path, request: Request, error: StageError) -> int:
    """Says what failed and how to go on; closes a run that is not to be tried again.

    Wrong input stays wrong, so the run is closed at once, and the same command begins it anew.
    """
    if error.code in (command.LOCKED, command.TERMINATED):
        return error.code
    is_over = True
    if error.code == command.BAD_INPUT:
        hope = "once that is put right, the same command begins it anew"
    elif error.code == command.FULL_DISK:  # no fault of the run's: it does not count
        is_over, hope = False, "once there is room, the same command goes on from here"
    elif _count_failure(root, request, error) < MAX_FAILURES:
        is_over, hope = False, "the same command goes on from here"
    else:
        hope = f"given up after {MAX_FAILURES} attempts; the next command begins anew"
    champion = "the champion stays" if registry.champion(root) else "there is no champion yet"
    log.error("run %s: %s; %s; %s", request.run_id, error, champion, hope)
    if is_over:
        _close(root, request, outcome="failed", reason=str(error))
    return command.BAD_INPUT if error.code == command.BAD_INPUT else command.FAILED


def _count_failure(root: Path, request: Request, error: StageError) -> int:
    """Notes that a run failed; returns how often it has since it was begun."""
    path = plan.run_folder(root, request.run_id) / FAILURES_FILE
    entry = {"attempt": request.attempt, "stage": error.stage, "code": error.code}
    with contextlib.suppress(OSError):  # the disk may be full, and then that is what failed
        ledger.append_json(path, entry)
    return sum(each.get("attempt") == request.attempt for each in ledger.read_json(path))


def show_outcome(root: Path, run_dir: Path, *, title: str | None = None) -> None:
    """Prints the decision on a run and who is the champion.

    Args:
        root: the root.
        run_dir: the run's folder, which may have been pruned.
        title: of the data; where given, the report's table comes first.
    """
    if (run_dir / DECISION_FILE).is_file():
        decision = json.loads((run_dir / DECISION_FILE).read_text())
        if title is not None:
            content = json.loads((run_dir / REPORT).read_text())
            show(report.text_table(content))
            show(f"{title}: {SPLIT} accuracy {content['accuracy']:.4f}")
            show(f"report: {run_dir / 'report' / 'report.html'}")
        outcome = "promoted" if decision["promoted"] else "not promoted"
        show(f"{outcome}: {decision['reason']}")
    champion = registry.champion(root)
    if champion is not None:
        show(f"champion: version {champion.version}, of run {champion.run_id}")
