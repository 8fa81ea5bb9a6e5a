"""What a warm start has learned from: images that stand in test where it is judged.

No manifest shows them: they stood in train of another dataset, which the starting model, or one
that it began from, was trained on. ``model.json`` names all of these datasets; those that the root
still holds are asked for the ids of their records.

Synopsis::

    # None: from new weights.
    start = starting_model(root, run_dir, "models/3", dataset_dir, manifest)
    decision = told(decision, run_dir)
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pipeline import plan, storage, tables
from pipeline.command import InputError, log
from pipeline.dataset import SPLITS, Manifest, load_manifest
from pipeline.matching import HASH
from pipeline.models import MODEL_FILE
from pipeline.plan import DATASETS
from pipeline.storage import Place

NOTE_FILE = "warm_start.json"
NAMED = 3  # datasets in a sentence
UNNAMED = "those that its description does not name"


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
        note = examine(root, start, dataset_dir, manifest)
        storage.write_atomic(run_dir / NOTE_FILE, json.dumps(note, indent=2) + "\n")
        if (said := in_words(note)) is not None:
            log.warning("%s", said)
    return None if note["images"] else root / start


def read_note(run_dir: Place) -> dict[str, Any] | None:
    """What `starting_model` found, if the run was to start from another model."""
    return plan.read_json(run_dir / NOTE_FILE)


def told(decision: dict[str, Any], run_dir: Place) -> dict[str, Any]:
    """A decision that says from what the run began, and what is to be said of it."""
    note = read_note(run_dir)
    words = in_words(note) if note is not None else None
    reason = decision["reason"] if words is None else f"{decision['reason']}; {words}"
    return decision | {"reason": reason, "warm_start": note}


def in_words(note: dict[str, Any]) -> str | None:
    """What there is to be said of a warm start, if anything."""
    if note["images"]:
        return (
            f"trained from new weights: {note['model']} has learned from {note['images']} of the"
            " images of test"
        )
    if note["unknown"]:
        return (
            f"whether {note['model']} has learned from images of test is not known of all datasets"
            f" that it was trained on: {_listed(note['unknown'])} cannot be read"
        )
    return None


def _listed(names: Sequence[str]) -> str:
    """The first few of many names, and how many there are."""
    shown = ", ".join(names[:NAMED])
    return shown if len(names) <= NAMED else f"{len(names)} of them ({shown}, ...)"


def examine(root: Place, start: str, dataset_dir: Place, manifest: Manifest) -> dict[str, Any]:
    """Counts the images of test that a model has learned from; the content of `NOTE_FILE`.

    Args:
        root: the root.
        start: the model, relative to it.
        dataset_dir: whose test is meant.
        manifest: of that.

    Raises:
        InputError: the files of test are not what the manifest says.
    """
    images = np.unique(_hashes(dataset_dir, manifest, ["test"]))
    seen = np.zeros(len(images), bool)
    datasets = _datasets(root)
    read, unknown = [], []
    for dataset_id, splits in _learned_from(root / start / MODEL_FILE).items():
        try:
            folder, other = datasets[dataset_id]
            seen |= np.isin(images, _hashes(folder, other, splits))
            read.append(dataset_id)
        except (InputError, ValueError, KeyError):  # not whole, or not there any more
            unknown.append(dataset_id)
    return {"model": start, "images": int(seen.sum()), "datasets": read, "unknown": unknown}


def _learned_from(path: Place) -> dict[str, set[str]]:
    """The splits that a model has learned from, by the ids of their datasets."""
    found: dict[str, set[str]] = {}
    try:
        for entry in json.loads(path.read_text())["learned_from"]:
            splits = found.setdefault(str(entry["dataset_id"] or UNNAMED), set())
            splits |= {split for split in SPLITS if split in entry["splits"]}
    except (OSError, ValueError, KeyError, TypeError):
        found[UNNAMED] = set()
    return found


def _datasets(root: Place) -> dict[str, tuple[Place, Manifest]]:
    """The folders and manifests of the datasets of the root, by their ids."""
    parent = root / DATASETS
    found: dict[str, tuple[Place, Manifest]] = {}
    for folder in parent.iterdir() if parent.is_dir() else ():
        with contextlib.suppress(InputError):  # it is no dataset, or not whole
            manifest = load_manifest(folder)
            found.setdefault(manifest.dataset_id, (folder, manifest))
    return found


def _hashes(directory: Place, manifest: Manifest, splits: Iterable[str]) -> np.ndarray:
    """The hashes of the images of some splits; `HASH` [n].

    Raises:
        InputError: a file is missing or is not what the manifest says.
        ValueError: an id is none.
    """
    parts = [np.empty(0, HASH)]
    for split in splits:
        for shard in manifest.splits[split].shards:
            for records in tables.batches(directory, shard):
                entries = tables.entries(records, SPLITS.index(split))
                parts.append(entries["key"].astype(HASH))
    return np.concatenate(parts)
