"""Stage 1: images from a source to TFRecord shards and a manifest.

python -m pipeline.preprocess --source idx:/data/mnist --output_dir out/mnist

The same images and options give the same bytes, on every runner and with any number of workers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline import command, existing, progress, runners, storage
from pipeline.command import InputError, log, show
from pipeline.dataset import (
    MANIFEST_NAME,
    METRICS_NAME,
    QUARANTINE_NAME,
    RECORDS_NAME,
    SPLITS,
    load_manifest,
    manifest_json,
    shard_name,
)
from pipeline.options import (
    PreprocessConfig,
    add_flags,
    config_from,
    fingerprint,
    open_sources_of,
    splitter_of,
)
from pipeline.sources import SYNTAX, Source
from pipeline.splits import Splitter

if TYPE_CHECKING:
    import apache_beam as beam

    from pipeline.shards import ShardOptions, WrittenShards

PROG = "pipeline.preprocess"
STAGE = "preprocess"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What the graph is built of.

    Attributes:
        source: what is read.
        splitter: decides the split of each row.
        options: how shards are written.
        directory: where the dataset is written.
    """

    source: Source
    splitter: Splitter
    options: ShardOptions
    directory: storage.Place


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
        RuntimeError: rows were lost or written twice.
    """
    from pipeline.shards import make_manifest, merge_statistics

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
    # To be completed once the pipeline has ended; what the workers know has no other way there.
    content = json.dumps({"statistics": merge_statistics(written)})
    storage.write_atomic(job.directory / METRICS_NAME, content)
    storage.write_atomic(job.directory / MANIFEST_NAME, manifest_json(manifest))


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
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="a folder, or gs://")
    parser.add_argument("--overwrite", action="store_true", help="replace another dataset")
    parser.add_argument("--dry_run", action="store_true", help="print what would be done")
    add_flags(parser)
    flags, beam_arguments = runners.parse_known_args(
        parser,
        argv,
        lambda flags: [
            *(("--source", spec) for spec in flags.source),
            ("--output_dir", flags.output_dir),
        ],
    )
    config = config_from(
        flags,
        output_dir=storage.folder(flags.output_dir, buckets=True),
        beam_arguments=beam_arguments,
    )
    return dataclasses.replace(config, dry_run=flags.dry_run)


def execute(config: PreprocessConfig) -> int:
    """Runs the stage; does nothing where its result already stands."""
    source = open_sources_of(config)
    identity = fingerprint(config, source)
    if config.dry_run:
        show(json.dumps(plan(config, source, identity), indent=2))
        return command.DONE
    storage.recover(config.output_dir)
    if not existing.is_there(config, identity):
        try:
            publish(config, source, identity)
            return command.DONE
        except storage.OccupiedError:  # by another run, perhaps, that began a little earlier
            if not existing.is_there(config, identity):
                raise
    log.info("%s: already there", config.output_dir)
    return command.DONE


def plan(config: PreprocessConfig, source: Source, identity: str) -> dict[str, Any]:
    """What the command would read, write, and send to a service; does none of it."""
    _require_examples(source.part_sizes)
    files = [
        shard_name(split, index, config.num_shards, config.compression)
        for split in SPLITS
        for index in range(config.num_shards)
    ]
    return {
        "already_there": existing.is_there(config, identity),
        "runner": runners.beam_options(config.beam_arguments).get_all_options()["runner"],
        "reads": {"sources": source.specs, "images": source.part_sizes, "in": len(source.blocks())},
        "writes": {
            "folder": str(config.output_dir),
            "files": [*files, f"{QUARANTINE_NAME}/{RECORDS_NAME}", METRICS_NAME, MANIFEST_NAME],
        },
    } | sent(config, source)


def sent(config: PreprocessConfig, source: Source) -> dict[str, Any]:
    """What the command would send to a service."""
    job = make_job(config, source, config.output_dir)
    work = runners.Work(stage=STAGE, output=config.output_dir)
    options = runners.beam_options(config.beam_arguments)
    return runners.request(options, lambda root: build(root, job), work)


def make_job(config: PreprocessConfig, source: Source, directory: storage.Place) -> Job:
    """What the graph is built of."""
    from pipeline import shards

    return Job(
        source=source,
        splitter=splitter_of(config, source),
        options=shards.ShardOptions(
            num_shards=config.num_shards,
            compression=config.compression,
            drop_leaks=config.drop_leaks,
        ),
        directory=directory,
    )


def publish(config: PreprocessConfig, source: Source, identity: str) -> None:
    """Makes the dataset."""
    from pipeline import transforms

    _require_examples(source.part_sizes)  # before the work; after it again, as rows are set aside
    if config.overwrite:
        existing.require_only_ours(config.output_dir)
    with storage.published_whole(
        config.output_dir,
        replace=config.overwrite,
        last=MANIFEST_NAME,
        resume=runners.is_dataflow(config.beam_arguments),
    ) as staging:
        log.info("reading %s", source.describe()["title"])
        job = make_job(config, source, staging)
        work = runners.Work(
            stage=STAGE, output=config.output_dir, folder=staging, identity=identity
        )
        with progress.lines(transforms.done_here):
            metrics = runners.run(
                runners.beam_options(config.beam_arguments),
                lambda root: build(root, job),
                transforms.NAMESPACE,
                work,
            )
        with runners.accepting(work):
            require_unchanged(config, source, identity)
            manifest = load_manifest(staging)
            statistics = json.loads((staging / METRICS_NAME).read_text())["statistics"]
        # Here, and not in the graph: what a worker process raises comes with Beam's traceback. And
        # what a job has made stays: with other flags it may do.
        existing.require_few(manifest, config.max_quarantined)
        _require_examples({name: split.num_examples for name, split in manifest.splits.items()})
        content = {"fingerprint": identity} | dataclasses.asdict(metrics)
        content |= {"statistics": statistics}
        storage.write_atomic(staging / METRICS_NAME, json.dumps(content, indent=2) + "\n")
    summary = progress.summary(config.output_dir, manifest)
    log.info("%s\n%s", summary, progress.work_done(metrics))


def require_unchanged(config: PreprocessConfig, source: Source, identity: str) -> None:
    """Makes sure that a source is still what it was when it was opened.

    Rows of one that changes while it is read can be missed, or be read twice.

    Raises:
        InputError: it is not.
    """
    again = dataclasses.replace(config, sources=source.specs)  # as `auto` was understood
    if fingerprint(again, open_sources_of(again)) != identity:
        raise InputError(f"{' and '.join(source.specs)}: changed while it was read; run it again")


def _require_examples(sizes: dict[str, int]) -> None:
    for split in ("train", "test"):
        if not sizes[split]:
            raise InputError(f"the {split} split would be empty; expected at least one image")


def main() -> None:
    """The command."""
    command.run(PROG, parse, execute)


if __name__ == "__main__":
    # By the name that workers can import it by: what is pickled of `__main__` goes by value.
    from pipeline import preprocess

    preprocess.main()
