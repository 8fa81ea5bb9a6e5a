"""What is said of a dataset while it is made, and once it is."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from pipeline.command import log
from pipeline.dataset import SPLITS, Manifest
from pipeline.runners import PipelineMetrics
from pipeline.storage import Place

PROGRESS_SECONDS = 10.0


@contextlib.contextmanager
def lines(done: dict[str, int]) -> Iterator[None]:
    """Logs what has been read and written every `PROGRESS_SECONDS`, as a long run goes on."""
    ended = threading.Event()
    started = time.monotonic()

    def report() -> None:
        while not ended.wait(PROGRESS_SECONDS):
            counts = dict(done)
            read = sum(counts.get(f"read-{part}", 0) for part in ("train", "test"))
            written = sum(counts.get(f"written-{split}", 0) for split in SPLITS)
            if read:
                log.info("%s rows read, %s written", f"{read:,}", f"{written:,}")
            else:  # the work is done in other processes
                log.info("running for %.0f s", time.monotonic() - started)

    done.clear()
    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def summary(directory: Place, manifest: Manifest) -> str:
    """A few lines about a dataset, for the end of the stage."""
    sizes = ", ".join(f"{manifest.splits[split].num_examples:,} {split}" for split in SPLITS)
    files = [shard for split in manifest.splits.values() for shard in split.shards]
    megabytes = sum(shard.bytes for shard in files) / 1e6
    lines = [
        f"{directory}: {sizes}; {manifest.num_classes} classes; {megabytes:.1f} MB in"
        f" {len(files)} files; dataset {manifest.dataset_id}"
    ]
    for count, things, rest in remarks(manifest):
        if count:
            lines.append(f"{count:,} {things}{'' if count == 1 else 's'} {rest}")
    return "\n".join(lines)


def work_done(metrics: PipelineMetrics) -> str:
    """A line on what the steps measured; all of it is in ``metrics.json``."""
    read = sum(metrics.counters.get(f"read-{part}", 0) for part in ("train", "test"))
    writing, encoding = (
        metrics.distributions.get(f"shard-{what}-msec", {}).get("sum", 0) / 1000
        for what in ("write", "encode")
    )
    return (
        f"{read:,} rows read; {metrics.counters.get('written-bytes', 0):,} bytes written in"
        f" {writing:.1f} s of work, {encoding:.1f} s of it encoding"
    )


def remarks(manifest: Manifest) -> list[tuple[int, str, str]]:
    """What is odd about a dataset: how many, of what, and what about them."""
    reasons = ", ".join(f"{n:,} {why}" for why, n in manifest.quarantined["by_reason"].items())
    duplicates = manifest.duplicates
    return [
        (manifest.quarantined["count"], "row", f"set aside ({reasons}), see quarantine/"),
        (manifest.dropped, "row", "left out of train or validation, being in test as well"),
        (manifest.flagged["blank"], "blank image", "written"),
        (duplicates["conflicting"], "image", "with different labels"),
        (duplicates["leaked"], "image", "both in test and in train or validation"),
        (duplicates["held_out"], "image", "both in train and in validation"),
    ]
