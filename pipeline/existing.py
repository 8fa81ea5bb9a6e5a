"""What stands in an output folder already: this dataset, another one, or something else."""

from __future__ import annotations

import json
from typing import Any

from pipeline import storage
from pipeline.command import InputError
from pipeline.dataset import (
    MANIFEST_NAME,
    METRICS_NAME,
    QUARANTINE_NAME,
    RECORDS_NAME,
    SHARD_FILE,
    SPLITS,
    Manifest,
    check_files,
    load_manifest,
)
from pipeline.options import PreprocessConfig


def is_there(config: PreprocessConfig, identity: str) -> bool:
    """Tells whether the very dataset stands in the folder already, whole.

    Raises:
        InputError: another one does, or one of another format, and it is not to be replaced.
    """
    if not (config.output_dir / MANIFEST_NAME).is_file():
        return False
    try:
        _require_same(config.output_dir, identity, config.max_quarantined)
    except InputError:
        if config.overwrite:
            return False
        raise
    return True


def require_only_ours(directory: storage.Place) -> None:
    """Makes sure that a folder to be replaced holds nothing but what this command writes.

    Raises:
        OccupiedError: something in it is not.
    """
    if directory.is_file():
        raise storage.OccupiedError(f"{directory}: is a file; expected a folder")
    if not directory.is_dir():
        return
    entries = [*directory.iterdir(), *(directory / QUARANTINE_NAME).glob("*")]
    ours = {MANIFEST_NAME, METRICS_NAME, QUARANTINE_NAME, RECORDS_NAME}
    for path in entries:
        if path.name not in ours and not SHARD_FILE.fullmatch(path.name):
            raise storage.OccupiedError(
                f"{directory}: holds {path.name}, which is no part of a dataset; --overwrite"
                " replaces nothing else"
            )
    if entries and not (directory / MANIFEST_NAME).is_file():  # records of somebody else's
        raise storage.OccupiedError(
            f"{directory}: holds files and no {MANIFEST_NAME}; --overwrite replaces nothing but"
            " a dataset"
        )


def _require_same(directory: storage.Place, identity: str, max_quarantined: float) -> None:
    """Makes sure that the dataset in a folder is whole and is the one that was asked for."""
    manifest = load_manifest(directory)
    try:
        check_files(directory, manifest, *SPLITS)
    except InputError as error:
        raise InputError(f"{error}; --overwrite makes it anew") from None
    require_few(manifest, max_quarantined)
    if read_fingerprint(directory) != identity:
        raise InputError(
            f"{directory}: holds another dataset; expected a new or empty folder, or --overwrite"
        )


def read_fingerprint(directory: storage.Place) -> str | None:
    """The fingerprint that a dataset was made from, kept outside its identity."""
    try:
        metrics: dict[str, Any] = json.loads((directory / METRICS_NAME).read_text())
        return metrics["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def require_few(manifest: Manifest, max_quarantined: float) -> None:
    """Raises InputError if more than this share of all rows was set aside."""
    set_aside = manifest.quarantined["count"]
    num_read = set_aside + manifest.dropped
    num_read += sum(split.num_examples for split in manifest.splits.values())
    # A quotient is rounded as the flag's decimal was: 29 of 100 are no more than 0.29.
    if set_aside and set_aside / num_read > max_quarantined:
        reasons = ", ".join(
            f"{count} {why}" for why, count in manifest.quarantined["by_reason"].items()
        )
        raise InputError(
            f"{set_aside} of {num_read} rows cannot be used ({reasons}), more than"
            f" --max_quarantined {max_quarantined:g} allows"
        )
