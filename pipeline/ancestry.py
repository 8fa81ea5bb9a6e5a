"""What a model has learned from before its own dataset: images of the test that judges it.

No manifest shows them: they stood in train of another dataset, which the model that it began
from, or one before that, was trained on. ``model.json`` names all of these datasets; those that
the root still holds are asked for the ids of their records. Of the others nothing is known, and
what is not known counts like an image that was found.

It is asked twice. Before a warm start, which then begins with new weights; and of every model
before it is judged, whatever it began from.

Synopsis::

    # None: from new weights.
    start = starting_model(root, run_dir, "models/3", dataset_dir, manifest)
    found = inherited(root, run_dir, dataset_dir, manifest)
    decision = told(decision, run_dir)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pipeline import gate, plan, storage, tables
from pipeline.command import InputError, UnreachableError, log
from pipeline.dataset import SPLITS, Manifest, load_manifest
from pipeline.gate import Inherited
from pipeline.matching import HASH
from pipeline.models import MODEL_FILE, learned_from
from pipeline.plan import DATASETS
from pipeline.storage import Place
from pipeline.trainers import EXPORTED

NOTE_FILE = "warm_start.json"
COVERED = {"train", "validation"}  # of its own dataset, whose manifest counts such images


def starting_model(
    root: Place, run_dir: Place, start: str | None, dataset_dir: Place, manifest: Manifest
) -> Place | None:
    """The model that a run begins from; None where it is to begin from new weights.

    What is found is noted in the run's folder before anything is trained: the run goes on by it,
    whatever becomes of the other datasets.

    Args:
        root: the root.
        run_dir: the run's folder.
        start: the model that a warm start asks for, relative to the root, if one does.
        dataset_dir: what it is to be trained and judged on.
        manifest: of that.
    """
    if start is None:
        return None
    note = read_note(run_dir)
    if note is None:
        learned = learned_from(root / start / MODEL_FILE)
        found = examine(root, learned, dataset_dir, manifest)
        note = {"model": start} | dataclasses.asdict(found)
        storage.write_atomic(run_dir / NOTE_FILE, json.dumps(note, indent=2) + "\n")
        if (said := in_words(note)) is not None:
            log.warning("%s", said)
    return root / start if in_words(note) is None else None


def read_note(run_dir: Place) -> dict[str, Any] | None:
    """What `starting_model` found, if the run was to start from another model."""
    return plan.read_json(run_dir / NOTE_FILE)


def told(decision: dict[str, Any], run_dir: Place) -> dict[str, Any]:
    """A decision that says from what the run began, and what is to be said of it."""
    note = read_note(run_dir)
    words = in_words(note) if note is not None else None
    reason = decision["reason"] if words is None else f"{decision['reason']}; {words}"
    return decision | {"reason": reason, "warm_start": note}


def in_words(note: Mapping[str, Any]) -> str | None:
    """Why a warm start begins with new weights, if it does."""
    begins = "trained from new weights:"
    if note["images"]:
        return f"{begins} {note['model']} has learned from {note['images']} of the images of test"
    if note["unknown"]:
        named = gate.listed(note["unknown"])
        return (
            f"{begins} whether {note['model']} has learned from images of test is not known of all"
            f" datasets that it was trained on: {named} cannot be read"
        )
    return None


def inherited(root: Place, run_dir: Place, dataset_dir: Place, manifest: Manifest) -> Inherited:
    """What the model of a run has learned from before its own dataset.

    What was found for a warm start is not asked again: its datasets may be gone by now.

    Args:
        root: the root.
        run_dir: the run's folder, with the exported model.
        dataset_dir: whose test judges it.
        manifest: of that.

    Raises:
        InputError: the files of test are not what the manifest says.
    """
    learned = learned_from(run_dir / EXPORTED)
    if (own := learned.pop(manifest.dataset_id, set())) - COVERED:
        learned[manifest.dataset_id] = own
    note = read_note(run_dir)
    asked = note["datasets"] if note is not None and not note["images"] else []
    left = {name: splits for name, splits in learned.items() if name not in asked}
    found = examine(root, left, dataset_dir, manifest) if left else Inherited()
    known = tuple(name for name in learned if name not in found.unknown)
    return dataclasses.replace(found, datasets=known)


def examine(
    root: Place, learned: Mapping[str, set[str]], dataset_dir: Place, manifest: Manifest
) -> Inherited:
    """Counts the images of test that stand in other datasets.

    Args:
        root: the root.
        learned: splits by the ids of their datasets, as `models.learned_from` tells them.
        dataset_dir: whose test is meant.
        manifest: of that.

    Raises:
        InputError: the files of test are not what the manifest says.
    """
    images = np.unique(_hashes(dataset_dir, manifest, ["test"]))
    seen = np.zeros(len(images), bool)
    datasets = _datasets(root)
    read: list[str] = []
    unknown: list[str] = []
    for dataset_id, splits in learned.items():
        try:
            folder, other = datasets[dataset_id]
            seen |= np.isin(images, _hashes(folder, other, splits))
            (read if splits else unknown).append(dataset_id)
        except UnreachableError:  # which says nothing of the dataset
            raise
        except (InputError, ValueError, KeyError):  # not whole, or not there any more
            unknown.append(dataset_id)
    return Inherited(images=int(seen.sum()), datasets=tuple(read), unknown=tuple(unknown))


def _datasets(root: Place) -> dict[str, tuple[Place, Manifest]]:
    """The folders and manifests of the datasets of the root, by their ids."""
    parent = root / DATASETS
    found: dict[str, tuple[Place, Manifest]] = {}
    for folder in parent.iterdir() if parent.is_dir() else ():
        try:
            manifest = load_manifest(folder)
        except UnreachableError:
            raise
        except InputError:  # it is no dataset, or not whole
            continue
        found.setdefault(manifest.dataset_id, (folder, manifest))
    return found


def _hashes(directory: Place, manifest: Manifest, splits: Iterable[str]) -> np.ndarray:
    """The hashes of the images of some splits; `HASH` [n].

    Raises:
        InputError: a file is missing or is not what the manifest says.
        KeyError: there is no such split.
        ValueError: an id is none.
    """
    parts = [np.empty(0, HASH)]
    for split in splits:
        for shard in manifest.splits[split].shards:
            for records in tables.batches(directory, shard):
                entries = tables.entries(records, SPLITS.index(split))
                parts.append(entries["key"].astype(HASH))
    return np.concatenate(parts)
