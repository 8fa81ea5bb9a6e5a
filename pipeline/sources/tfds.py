"""``tfds:NAME``: an image classification set of TensorFlow Datasets, in that library's order.

A set is kept where TFDS keeps it: under ``TFDS_DATA_DIR``, by default ``~/tensorflow_datasets``.
Where that is ``gs://bucket/folder``, workers on any machine read it: whoever opens a set that is
not there prepares it and publishes it there, and each worker brings it down through
`pipeline.cache`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
import tempfile
import threading
import time
import types
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from pipeline import cache, checksums, command, gcs, storage
from pipeline.command import InputError
from pipeline.dataset import IMAGE_SHAPE, MAX_CLASSES, NUM_PIXELS
from pipeline.gcs import GcsPath
from pipeline.sources import Block, NumberedRows, RawRows, ranges

VARIABLE = "TFDS_DATA_DIR"
INFO_FILE = "dataset_info.json"  # without which TFDS takes a folder for no set
DOWNLOAD_HOST = "storage.googleapis.com"
DOWNLOADS = "downloads"
CONFIGURATIONS = ".config"
PROBE_SECONDS = 8
SETTLE_SECONDS = 1.0
ROWS_PER_BLOCK = 16384
ROWS_AT_ONCE = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsSource:
    """A prepared set of TensorFlow Datasets; see `pipeline.sources.Source`."""

    specs: tuple[str, ...]
    full_name: str
    data_path: str
    class_names: tuple[str, ...]
    part_sizes: dict[str, int]
    default_split_by: str = "positional"
    has_order: bool = True

    def describe(self) -> dict[str, Any]:
        """Names the set and its version."""
        title = f"{self.full_name} from TensorFlow Datasets"
        return {"kind": "tfds", "title": title, "name": self.full_name}

    def fingerprint(self) -> list[Any]:
        """Name, version and sizes: a version's content does not change."""
        return [self.full_name, self.part_sizes]

    def blocks(self) -> list[Block]:
        """Ranges of rows."""
        return ranges(self.part_sizes, ROWS_PER_BLOCK)

    def read(self, block: Block) -> Iterator[RawRows]:
        """Yields the rows of a block."""
        import tensorflow_datasets as tfds

        split = f"{block.part}[{block.first}:{block.first + block.size}]"
        with cache.local(storage.place(self.data_path)) as directory:
            builder = tfds.builder_from_directory(str(directory))
            rows = builder.as_dataset(split=split, shuffle_files=False, batch_size=ROWS_AT_ONCE)
            first = block.first
            for batch in rows.as_numpy_iterator():
                labels = batch["label"].astype(np.int64)
                pixels = batch["image"].reshape(len(labels), NUM_PIXELS)
                positions = np.arange(first, first + len(labels))
                origins = NumberedRows(f"{self.full_name}/{block.part}", positions)
                yield RawRows(block.part, positions, pixels, labels, origins)
                first += len(labels)


def open_source(name: str, *, share: bool = True) -> TfdsSource:
    """Downloads and prepares the set where that has not been done, and opens it.

    Args:
        name: of the set.
        share: whether one that had to be prepared is published in the bucket; if not, it is
            prepared for its description alone, and is gone then.

    Raises:
        InputError: unknown, not downloadable, or not a set of 28x28 grey images in classes.
    """
    with command.quiet_import():
        import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    kept = os.environ.get(VARIABLE, "")
    if not kept.startswith(gcs.SCHEME):
        builder = _builder(name)
        _prepare(name, builder)
        return _source(name, builder, str(builder.data_path))
    with tempfile.TemporaryDirectory(prefix="digits-") as temporary:
        builder = _builder(name, data_dir=temporary)
        shared = gcs.parse(kept) / builder.info.full_name
        if not (shared / INFO_FILE).is_file():
            _prepare(name, builder)
            if not share:
                return _source(name, builder, str(shared))
            _share(Path(str(builder.data_path)), shared)
    with cache.local(shared) as directory:
        return _source(name, tfds.builder_from_directory(str(directory)), str(shared))


def _builder(name: str, **where: str) -> Any:
    """What TFDS knows of a set of this name.

    Raises:
        InputError: nothing, or it is not a set of 28x28 grey images in classes.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, **where)
    except Exception as error:  # a name can fail in ways that are TFDS's own, all the user's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"--source tfds:{name}: no such data set: {reason}") from None
    _check_features(name, builder.info.features)
    return builder


def _source(name: str, builder: Any, data_path: str) -> TfdsSource:
    """A prepared set; its files are in a folder that workers read as well."""
    _check_parts(name, builder.info.splits)
    return TfdsSource(
        specs=(f"tfds:{name}",),
        full_name=builder.info.full_name,
        data_path=data_path,
        class_names=tuple(builder.info.features["label"].names),
        part_sizes={part: builder.info.splits[part].num_examples for part in ("train", "test")},
    )


def _share(prepared: Path, shared: GcsPath) -> None:
    """Publishes a prepared set for all to read; another process may have been faster."""
    try:
        with storage.published_whole(shared, last=INFO_FILE) as staging:
            for name in storage.walk(prepared):
                checksums.copy_file(prepared / name, staging / name)
    except storage.OccupiedError:
        if not (shared / INFO_FILE).is_file():
            raise


def _check_features(name: str, features: Any) -> None:
    image, label = (
        features[key] if features and key in features else None for key in ("image", "label")
    )
    if image is None or tuple(image.shape) != IMAGE_SHAPE:
        shape = "none" if image is None else tuple(image.shape)
        raise InputError(f"--source tfds:{name}: image is {shape}, expected {IMAGE_SHAPE}")
    if not 2 <= getattr(label, "num_classes", 0) <= MAX_CLASSES:
        raise InputError(f"--source tfds:{name}: expected a label of 2 to {MAX_CLASSES} classes")


def _check_parts(name: str, splits: Any) -> None:
    if missing := [part for part in ("train", "test") if part not in splits]:
        raise InputError(f"--source tfds:{name}: has no {' and no '.join(missing)} split")


def _prepare(name: str, builder: Any) -> None:
    """Prepares the set from the network or from what an earlier download left."""
    if builder.data_path.exists():
        return
    root = Path(str(builder.data_path)).parents[builder.info.full_name.count("/")]
    absent = [folder for folder in _folders(root, builder) if not folder.exists()]
    mark = uuid.uuid4().hex[:16]
    try:
        with (
            contextlib.nullcontext() if network_reachable() else _no_requests(),
            _marked_files(mark),
            contextlib.redirect_stdout(io.StringIO()),  # the first line is not to be TFDS's
        ):
            builder.download_and_prepare()
    except Exception as error:  # the network, a checksum, the disk: one line tells which
        _clear(root / DOWNLOADS, mark, absent)
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--source tfds:{name}: cannot be prepared: {reason}") from None


def _folders(root: Path, builder: Any) -> Iterator[Path]:
    """The folders that TFDS makes for a set where they are missing, innermost first."""
    downloads = root / DOWNLOADS
    yield from list(Path(str(builder.data_path)).parents)[: builder.info.full_name.count("/")]
    yield from (downloads / builder.name, downloads / "extracted", downloads, root)


@contextlib.contextmanager
def _marked_files(mark: str) -> Iterator[None]:
    """Puts a mark in the names of what TFDS has not finished downloading or extracting.

    The folder is shared with other processes, and their names differ by a UUID alone.
    """
    from tensorflow_datasets.core.download import download_manager, extractor

    marked = types.SimpleNamespace(uuid4=lambda: uuid.UUID(mark + uuid.uuid4().hex[:16]))
    with (
        mock.patch.object(download_manager, "uuid", marked),
        mock.patch.object(extractor, "uuid", marked),
    ):
        yield


def _clear(downloads: Path, mark: str, absent: list[Path]) -> None:
    """Removes what a failed attempt left, and nothing that another process may have made.

    What was downloaded whole stays, for all to use. The unfinished set TFDS has removed itself.

    Args:
        downloads: where the files with the mark are.
        mark: `_marked_files`'s.
        absent: folders that were not there before, innermost first; removed where nothing is left
            in them but what TFDS notes of a set's configurations.
    """
    for left in downloads.glob(f"*/*{mark}*"):
        storage.remove(left)
    for folder in absent:
        with contextlib.suppress(OSError):  # it holds something, or was never made
            if [path.name for path in folder.iterdir()] == [CONFIGURATIONS]:
                storage.remove(folder / CONFIGURATIONS)
            folder.rmdir()


def network_reachable() -> bool:
    """Tells within `PROBE_SECONDS` whether the host of most data sets answers, proxies included.

    TFDS itself retries for minutes. The look-up of a name cannot be given a time limit, so the
    attempt runs beside and is left alone when time is up.
    """
    import requests

    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError):  # what requests raises is one
            requests.head(f"https://{DOWNLOAD_HOST}", timeout=PROBE_SECONDS)
            answered.set()

    attempt = threading.Thread(target=ask, daemon=True)
    attempt.start()
    attempt.join(PROBE_SECONDS)
    return answered.is_set()


@contextlib.contextmanager
def _no_requests() -> Iterator[None]:
    """Makes every HTTP request fail at once: what was downloaded before is all there is."""
    import requests

    def refuse(*_: Any, **__: Any) -> Any:
        raise requests.ConnectionError(f"{DOWNLOAD_HOST} cannot be reached")

    with mock.patch.object(requests.adapters.HTTPAdapter, "send", refuse):
        before = set(threading.enumerate())
        try:
            yield
        finally:  # of several downloads the first to fail ends the wait: the others are to fail too
            deadline = time.monotonic() + SETTLE_SECONDS
            for thread in set(threading.enumerate()) - before:
                thread.join(max(0.0, deadline - time.monotonic()))
