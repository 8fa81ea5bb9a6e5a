"""The shards of a dataset in a bucket, brought to this machine one by one and checked.

Where `pipeline.cache` keeps what it brings down, shards are kept as well, for every run of the
same dataset. Its folders come whole; of a dataset a run needs some files, which its manifest knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline import cache, storage
from pipeline.command import InputError, log
from pipeline.dataset import Manifest, Shard
from pipeline.gcs import GcsPath
from pipeline.records import check_shard, verify_shard
from pipeline.storage import Place

AT_ONCE = 4  # shards, each of which is held in memory until it is checked


def bring_dataset(
    directory: Place, manifest: Manifest, shards: Sequence[Shard], scratch: Callable[[], Path]
) -> Path:
    """The local folder where these shards of a dataset are, and are what the manifest says.

    Args:
        directory: the dataset's; a local one is used as it is.
        manifest: of the dataset.
        shards: those that are needed.
        scratch: gives a folder to bring them to where no cache is named.

    Raises:
        InputError: one is missing or is not what the manifest says, or the cache cannot be used.
    """
    if isinstance(directory, Path):
        return directory
    folder = (cache.kept_folder() or scratch()) / "datasets" / manifest.dataset_id
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        brought = list(pool.map(lambda shard: _bring(directory, shard, folder), shards))
    if sum(brought):
        log.info("%s: brought here, %.1f MB", directory, sum(brought) / 1e6)
    return folder


def _bring(directory: GcsPath, shard: Shard, folder: Path) -> int:
    """Brings one shard, unless it is there and whole; says how many bytes that took."""
    try:
        verify_shard(folder, shard)
        return 0
    except InputError:  # it is not there, or not all of it
        path = directory / shard.file
        content = _download(path)
        check_shard(content, path, shard)
        storage.write_atomic(folder / shard.file, content)
        return len(content)


def _download(path: GcsPath) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: missing; the manifest names it") from None
