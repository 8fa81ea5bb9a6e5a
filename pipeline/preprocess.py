"""Stage 1: images from a source to TFRecord shards and a manifest.

python -m pipeline.preprocess --source idx:/data/mnist --output_dir out/mnist

The same images and options give the same bytes, on every runner and with any number of workers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import command, runners, storage
from pipeline.command import InputError, log
from pipeline.dataset import (
    COMPRESSIONS,
    FORMAT_VERSION,
    MANIFEST_NAME,
    MAX_CLASSES,
    METRICS_NAME,
    QUARANTINE_NAME,
    RECORDS_NAME,
    SHARD_FILE,
    SPLITS,
    Manifest,
    load_manifest,
    manifest_json,
)
from pipeline.sources import SYNTAX, Source, open_sources
from pipeline.splits import Splitter, make_splitter

if TYPE_CHECKING:
    import apache_beam as beam

    from pipeline.shards import ShardOptions, WrittenShards

PROG = "pipeline.preprocess"
MAX_SHARDS = 99_999  # five digits in a file's name
PROGRESS_SECONDS = 10.0
# The flags that say what the dataset is to be.
DATASET_FLAGS = (
    "num_shards",
    "compression",
    "split_by",
    "validation_size",
    "validation_fraction",
    "num_classes",
    "resize",
    "drop_leaks",
    "max_quarantined",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """The flags of this stage. None: as the source has it.

    Attributes:
        max_quarantined: the largest share of all rows that may be set aside.
        overwrite: whether another dataset in the folder is replaced.
    """

    sources: tuple[str, ...]
    output_dir: Path
    num_shards: int = 8
    compression: str = "none"
    split_by: str | None = None
    validation_size: int | None = None
    validation_fraction: float | None = None
    num_classes: int | None = None
    resize: bool = False
    drop_leaks: bool = False
    max_quarantined: float = 0.01
    overwrite: bool = False
    beam_arguments: tuple[str, ...] = ()


def add_flags(parser: argparse._ActionsContainer) -> None:
    """Adds the flags that say what the dataset is to be, which the whole chain takes as well."""
    add = parser.add_argument
    add(
        "--num_shards",
        type=command.positive_int,
        default=8,
        metavar="N",
        help="files in each split (default: %(default)s)",
    )
    add("--compression", choices=tuple(COMPRESSIONS), default="none", help="of the shards")
    add(
        "--split_by",
        choices=("positional", "hash"),
        help="how validation is set apart from train (default: the source's way)",
    )
    add(
        "--validation_size",
        type=int,
        metavar="N",
        help="rows of train, from its start, that become validation (positional)",
    )
    add(
        "--validation_fraction",
        type=command.fraction,
        metavar="F",
        help="share of train that becomes validation (hash; default: 1/6)",
    )
    add(
        "--num_classes",
        type=int,
        metavar="N",
        help="of idx: sources; a label of N or more is then set aside",
    )
    add("--resize", action="store_true", help="resize images: of other sizes to 28x28")
    add(
        "--drop_leaks",
        action="store_true",
        help="leave out of train and validation what also stands in test",
    )
    add(
        "--max_quarantined",
        type=command.fraction,
        default=0.01,
        metavar="F",
        help="fail if more than this share of all rows is unusable (default: %(default)s)",
    )


def parse(argv: list[str]) -> PreprocessConfig:
    """Parses the command line."""
    parser = command.Parser(PROG, __doc__)
    parser.add_argument(
        "--source",
        required=True,
        action="append",
        metavar="SRC",
        help=f"{SYNTAX}; several are joined",
    )
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="the dataset's folder")
    parser.add_argument("--overwrite", action="store_true", help="replace another dataset")
    add_flags(parser)
    flags, beam_arguments = runners.parse_known_args(parser, argv)
    return config_from(
        flags, output_dir=storage.folder(flags.output_dir), beam_arguments=beam_arguments
    )


def config_from(
    flags: argparse.Namespace, *, output_dir: Path, beam_arguments: tuple[str, ...]
) -> PreprocessConfig:
    """Makes a config of parsed flags.

    Raises:
        InputError: a value is out of range.
    """
    if flags.num_shards > MAX_SHARDS:
        raise InputError(f"--num_shards {flags.num_shards}: expected at most {MAX_SHARDS}")
    if flags.validation_size is not None and flags.validation_size < 0:
        raise InputError(f"--validation_size {flags.validation_size}: expected at least 0")
    if flags.num_classes is not None and not 2 <= flags.num_classes <= MAX_CLASSES:
        raise InputError(f"--num_classes {flags.num_classes}: expected 2 to {MAX_CLASSES}")
    return PreprocessConfig(
        sources=tuple(flags.source),
        output_dir=output_dir,
        overwrite=getattr(flags, "overwrite", False),
        beam_arguments=beam_arguments,
        **{name: getattr(flags, name) for name in DATASET_FLAGS},
    )


def dataset_arguments(config: PreprocessConfig) -> list[str]:
    """The flags of `add_flags` that make this config again."""
    given = {name: getattr(config, name) for name in DATASET_FLAGS}
    switches = [f"--{name}" for name, value in given.items() if value is True]
    valued = [
        f"--{name}={value}"
        for name, value in given.items()
        if value is not None and not isinstance(value, bool)
    ]
    return switches + valued


def open_sources_of(config: PreprocessConfig) -> Source:
    """Opens the sources as the flags say."""
    return open_sources(config.sources, num_classes=config.num_classes, resize=config.resize)


def splitter_of(config: PreprocessConfig, source: Source) -> Splitter:
    """What the flags on splitting come to for this source; InputError if they do not go with it."""
    return make_splitter(
        config.split_by or source.default_split_by,
        source,
        config.validation_size,
        config.validation_fraction,
    )


def fingerprint(config: PreprocessConfig, source: Source) -> str:
    """Hashes what decides the dataset, as far as it can be told without reading the images."""
    options = {
        "format_version": FORMAT_VERSION,
        "source": source.describe(),
        "content": source.fingerprint(),
        "split": dataclasses.asdict(splitter_of(config, source)),
        "num_shards": config.num_shards,
        "compression": config.compression,
        "drop_leaks": config.drop_leaks,
        "class_names": source.class_names,
    }
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What the graph is built of.

    Attributes:
        source: what is read.
        splitter: decides the split of each row.
        options: how shards are written.
        max_quarantined: the largest share of all rows that may be set aside.
        directory: where the dataset is written.
    """

    source: Source
    splitter: Splitter
    options: ShardOptions
    max_quarantined: float
    directory: Path


def build(root: beam.Pipeline, job: Job) -> beam.PCollection:
    """The graph of this stage."""
    import apache_beam as beam
    from apache_beam.pvalue import AsSingleton

    from pipeline.transforms import CountRows, ReadRows, Validate, WriteQuarantine, WriteShards

    rows = root | "ReadRows" >> ReadRows(job.source)  # RawRows
    good, bad = rows | "Validate" >> Validate(len(job.source.class_names))
    num_read = rows | "CountRows" >> CountRows()  # int
    by_reason = bad | "WriteQuarantine" >> WriteQuarantine(job.directory)  # {reason: count}
    return (
        good
        | "WriteShards" >> WriteShards(job.splitter, job.options, job.directory)  # WrittenShards
        | "Collect" >> beam.combiners.ToList()  # [WrittenShards]
        | "WriteManifest"
        >> beam.Map(write_manifest, AsSingleton(num_read), AsSingleton(by_reason), job)
    )


def write_manifest(
    written: Sequence[WrittenShards], num_read: int, quarantined: dict[str, int], job: Job
) -> None:
    """Writes the manifest, after making sure that every row that was read has its place.

    Raises:
        InputError: too many rows were set aside.
        RuntimeError: rows were lost or written twice.
    """
    from pipeline.shards import make_manifest

    manifest = make_manifest(
        written,
        source=job.source.describe(),
        split_by=job.splitter.by,
        class_names=job.source.class_names,
        quarantined=quarantined,
    )
    in_splits = sum(split.num_examples for split in manifest.splits.values())
    set_aside = manifest.quarantined["count"]
    expected = sum(job.source.part_sizes.values())
    if not expected == num_read == in_splits + set_aside + manifest.dropped:
        raise RuntimeError(
            f"{expected} rows in the source, {num_read} read, {in_splits} written,"
            f" {set_aside} quarantined, {manifest.dropped} dropped"
        )
    _require_few(manifest, job.max_quarantined)
    storage.write_atomic(job.directory / MANIFEST_NAME, manifest_json(manifest))


def _require_few(manifest: Manifest, max_quarantined: float) -> None:
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


def execute(config: PreprocessConfig) -> int:
    """Runs the stage; does nothing where its result already stands."""
    source = open_sources_of(config)
    identity = fingerprint(config, source)
    storage.recover(config.output_dir)
    if not is_there(config, identity):
        try:
            publish(config, source, identity)
            return command.DONE
        except storage.OccupiedError:  # by another run, perhaps, that began a little earlier
            if not is_there(config, identity):
                raise
    log.info("%s: already there", config.output_dir)
    return command.DONE


def publish(config: PreprocessConfig, source: Source, identity: str) -> None:
    """Makes the dataset."""
    from pipeline import shards, transforms

    if config.overwrite:
        _require_only_ours(config.output_dir)
    with storage.published_whole(config.output_dir, replace=config.overwrite) as staging:
        log.info("reading %s", source.describe()["title"])
        job = Job(
            source=source,
            splitter=splitter_of(config, source),
            options=shards.ShardOptions(
                num_shards=config.num_shards,
                compression=config.compression,
                drop_leaks=config.drop_leaks,
            ),
            max_quarantined=config.max_quarantined,
            directory=staging,
        )
        with progress_lines(transforms.done_here):
            metrics = runners.run(
                runners.beam_options(config.beam_arguments),
                lambda root: build(root, job),
                transforms.NAMESPACE,
            )
        manifest = load_manifest(staging)
        _require_examples(manifest)
        content = {"fingerprint": identity} | dataclasses.asdict(metrics)
        storage.write_atomic(staging / METRICS_NAME, json.dumps(content, indent=2) + "\n")
    log.info("%s", summary(config.output_dir, manifest))


@contextlib.contextmanager
def progress_lines(done: dict[str, int]) -> Iterator[None]:
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


def _require_only_ours(directory: Path) -> None:
    """Makes sure that a folder to be replaced holds nothing but what this command writes.

    Raises:
        OccupiedError: something in it is not.
    """
    if directory.is_file():
        raise storage.OccupiedError(f"{directory}: is a file; expected a folder")
    if not directory.is_dir():
        return
    entries = [*directory.iterdir(), *(directory / QUARANTINE_NAME).glob("*")]
    ours = {MANIFEST_NAME, METRICS_NAME, QUARANTINE_NAME, RECORDS_NAME, storage.LOCK_NAME}
    for path in entries:
        if path.name not in ours and not SHARD_FILE.fullmatch(path.name):
            raise storage.OccupiedError(
                f"{directory}: holds {path.name}, which is no part of a dataset; --overwrite"
                " replaces nothing else"
            )


def _require_same(directory: Path, identity: str, max_quarantined: float) -> None:
    """Makes sure that the dataset in a folder is whole and is the one that was asked for."""
    manifest = load_manifest(directory)
    for split in manifest.splits.values():
        for shard in split.shards:
            path = directory / shard.file
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise InputError(
                    f"{path}: missing or not of {shard.bytes} bytes; --overwrite makes it anew"
                )
    _require_few(manifest, max_quarantined)
    if read_fingerprint(directory) != identity:
        raise InputError(
            f"{directory}: holds another dataset; expected a new or empty folder, or --overwrite"
        )


def read_fingerprint(directory: Path) -> str | None:
    """The fingerprint that a dataset was made from, kept outside its identity."""
    try:
        metrics: dict[str, Any] = json.loads((directory / METRICS_NAME).read_text())
        return metrics["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _require_examples(manifest: Manifest) -> None:
    for split in ("train", "test"):
        if not manifest.splits[split].num_examples:
            raise InputError(f"the {split} split would be empty; expected at least one image")


def summary(directory: Path, manifest: Manifest) -> str:
    """A few lines about a dataset, for the end of the stage."""
    sizes = ", ".join(f"{manifest.splits[split].num_examples:,} {split}" for split in SPLITS)
    files = [shard for split in manifest.splits.values() for shard in split.shards]
    megabytes = sum(shard.bytes for shard in files) / 1e6
    lines = [
        f"{directory}: {sizes}; {manifest.num_classes} classes; {megabytes:.1f} MB in"
        f" {len(files)} files; dataset {manifest.dataset_id}"
    ]
    duplicates = manifest.duplicates
    reasons = ", ".join(f"{n:,} {why}" for why, n in manifest.quarantined["by_reason"].items())
    for count, things, rest in (
        (
            manifest.quarantined["count"],
            "row",
            f"set aside ({reasons}), see quarantine/",
        ),
        (manifest.dropped, "row", "left out of train or validation, being in test as well"),
        (manifest.flagged["blank"], "blank image", "written"),
        (duplicates["conflicting"], "image", "with different labels"),
        (duplicates["leaked"], "image", "both in test and in train or validation"),
        (duplicates["held_out"], "image", "both in train and in validation"),
    ):
        if count:
            lines.append(f"{count:,} {things}{'' if count == 1 else 's'} {rest}")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    command.run(PROG, parse, execute)


if __name__ == "__main__":
    main()
