"""One run from its request to its line in the ledger: dataset, training, report, decision."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from pipeline import (
    ancestry,
    checksums,
    command,
    commands,
    decisions,
    ends,
    existing,
    judging,
    ledger,
    options,
    plan,
    records,
    registry,
    report,
    state,
    storage,
    trainers,
)
from pipeline.command import InputError, LockedError, UnreachableError, log, show
from pipeline.dataset import MANIFEST_NAME, SPLITS, Manifest, check_files, load_manifest
from pipeline.judging import Verdict
from pipeline.models import MODEL_FILE
from pipeline.plan import DECISION_FILE, REPORT, Request
from pipeline.stages import StageError, Stages
from pipeline.storage import Lock, Place

SPLIT = "test"  # what models are judged on


class AbandonedError(Exception):
    """A run cannot be finished any more; the message says why."""


def finish(root: Place, request: Request, stages: Stages) -> int:
    """Runs what is left of a run to its end, and enters it in the ledger; returns an exit code.

    Killed anywhere and called again, it comes to the same end.

    Raises:
        LockedError: another process has taken the root over.
        InputError: a file is damaged; the run is closed as failed.
    """
    run_dir = plan.run_folder(root, request.run_id)
    stages.hold()
    storage.tidy(run_dir, run_dir / "report", root / registry.MODELS)
    try:
        dataset_dir = _make_dataset(root, request, stages)
        manifest = load_manifest(dataset_dir)
        existing.require_few(manifest, request.dataset_options["max_quarantined"])
        if (twin := _twin(root, request, manifest)) is not None:
            storage.discard(run_dir, last=plan.REQUEST_FILE)
            log.info("nothing new: the same images as those of run %s", twin)
            return command.DONE
        start = ancestry.starting_model(
            root, run_dir, request.initial_weights, dataset_dir, manifest
        )
        stages.run(*trainers.command_line(root, request, start))
        verdict = judging.judge(root, request, dataset_dir, manifest, stages)
    except AbandonedError as error:
        log.warning("run %s: abandoned: %s", request.run_id, error)
        ends.close(root, request, stages, outcome="abandoned", reason=str(error))
        return command.DONE
    except StageError as error:
        return ends.failed(root, request, stages, error)
    except (LockedError, UnreachableError):
        raise
    except InputError as error:  # it stays wrong, and would stand in the way of what is new
        ends.close(root, request, stages, outcome="failed", reason=str(error))
        raise
    _carry_out(root, request, stages, verdict)
    show_outcome(run_dir)
    return command.DONE if verdict.decision["promoted"] else command.KEPT_CHAMPION


def put_in_order(root: Place, lock: Lock) -> None:
    """Ends what processes left half done that were killed in the middle of a change of the root.

    Of runs, those go that were killed before their request stood, or as it was removed. In a
    bucket there is no folder without files, and a request is its first and its last.
    """
    registry.discard_unpromoted(root, lock=lock)
    storage.recover_all(root / registry.MODELS)
    storage.discard_leftovers(root / plan.RUNS)
    storage.discard_leftovers(root / plan.DATASETS)
    if not isinstance(root, Path):
        return
    for folder in (root / plan.RUNS).glob("*"):
        if folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir()):
            storage.tidy(folder)
            with contextlib.suppress(OSError):  # it holds something else, which is not ours
                folder.rmdir()


def _make_dataset(root: Place, request: Request, stages: Stages) -> Place:
    """Makes the dataset where it is not there yet, or is damaged, and returns its folder.

    Raises:
        AbandonedError: its source is no longer what it was when the run was begun.
    """
    dataset_dir = plan.dataset_folder(root, request.fingerprint)
    storage.recover(dataset_dir)
    stands = (dataset_dir / MANIFEST_NAME).is_file()
    problem = _damage(dataset_dir) if stands else None
    if stands and problem is None:
        return dataset_dir
    config = request.preprocess(dataset_dir)
    named = " and ".join(request.sources)
    try:
        fingerprint = options.fingerprint(config, options.open_sources_of(config))
    except UnreachableError:  # which says nothing of the source
        raise
    except InputError as error:
        raise AbandonedError(f"its source cannot be read any more: {error}") from None
    if fingerprint != request.fingerprint:
        state = "is damaged" if stands else "was not made yet"
        raise AbandonedError(f"{named} has changed, and its dataset {state}")
    if stands:
        log.warning("the dataset is damaged and is made anew: %s", problem)
        stages.hold()
        storage.discard(dataset_dir, MANIFEST_NAME)
    stages.run(*commands.dataset_command(request, dataset_dir))
    return dataset_dir


def _damage(dataset_dir: Place) -> str | None:
    """What is wrong with the files of a dataset, if anything.

    In a bucket, which keeps checksums of its own, the sizes alone are looked at.
    """
    try:
        manifest = load_manifest(dataset_dir)
        check_files(dataset_dir, manifest, *SPLITS)
        if isinstance(dataset_dir, Path):
            for split in manifest.splits.values():
                for shard in split.shards:
                    records.verify_shard(dataset_dir, shard)
    except UnreachableError:  # which says nothing of the files
        raise
    except InputError as error:
        return str(error)
    return None


def _twin(root: Place, request: Request, manifest: Manifest) -> str | None:
    """The run, if any, in which the same images were judged, although they came otherwise."""
    if request.repeat:
        return None
    found = ledger.find_judged(
        ledger.read(root),
        config_id=request.config_id,
        fingerprint=request.fingerprint,
        dataset_id=manifest.dataset_id,
    )
    if found is None or found["run_id"] == request.run_id:
        return None
    stands = plan.stands(state.look(root), found)
    return str(found["run_id"]) if stands and plan.answers(root, found, request) else None


def _carry_out(root: Place, request: Request, stages: Stages, verdict: Verdict) -> None:
    """Does what was decided, then enters it in the ledger.

    A chain killed before the ledger's line carries out the same decision again, to the same end.
    """
    decision, version = verdict.decision, verdict.version
    if decision["promoted"] and version is None:
        stages.hold()
        champion = registry.champion(root)
        own = (request.run_id, decision["model_id"])
        standing = champion if champion and (champion.run_id, champion.model_id) == own else None
        if standing is None and not decisions.is_about(decision, champion):
            raise LockedError(f"{root}: another process has put another champion in place")
        version = standing or _publish(root, request, decision, stages.lock)
    ends.close(
        root,
        request,
        stages,
        outcome="promoted" if decision["promoted"] else "kept",
        version=version.version if version else None,
        **{
            name: decision[name]
            for name in (
                "promoted", "forced", "reason", "accuracy", "per_class_accuracy", "model_id",
                "dataset_id", "test_id",
            )
        },
    )  # fmt: skip


def _publish(
    root: Place, request: Request, decision: dict[str, Any], lock: Lock
) -> registry.Version:
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
        files=checksums.parse(decision["model_files"]),
    )
    return registry.publish(root, run_dir / "export", version, report=run_dir / REPORT, lock=lock)


def show_outcome(run_dir: Place, *, title: str | None = None) -> None:
    """Prints the decision on a run.

    Args:
        run_dir: the run's folder, which may have been pruned.
        title: of the data; where given, the report's table comes first.
    """
    if (decision := plan.read_json(run_dir / DECISION_FILE)) is not None:
        if title is not None and (content := plan.read_json(run_dir / REPORT)) is not None:
            show(report.text_table(content))
            show(f"{title}: {SPLIT} accuracy {content['accuracy']:.4f}")
            show(f"report: {run_dir / 'report' / 'report.html'}")
        outcome = "promoted" if decision["promoted"] else "not promoted"
        show(f"{outcome}: {decision['reason']}")


def show_champion(champion: registry.Version | None) -> None:
    """Prints who is the champion, if there is one: the line by which a retrain's end is known."""
    if champion is not None:
        show(f"champion: version {champion.version}, of run {champion.run_id}")
