"""Stage 1: images from a source to TFRecord shards and a manifest.

python -m pipeline.preprocess --source idx:/data/mnist --output_dir out/mnist

The same images and options give the same bytes, on every runner and with any number of workers.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import command, storage
from pipeline.command import InputError, log
from pipeline.dataset import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    METRICS_NAME,
    SPLITS,
    Manifest,
    load_manifest,
    manifest_json,
)
from pipeline.sources import SYNTAX, Source, open_source

if TYPE_CHECKING:
    import apache_beam as beam

    from pipeline.shards import WrittenShards
    from pipeline.transforms import Splitter

PROG = "pipeline.preprocess"
MAX_SHARDS = 99_999  # five digits in a file's name


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """The flags of this stage. None: as the source has it."""

    source: str
    output_dir: Path
    num_shards: int = 8
    split_by: str | None = None
    validation_size: int | None = None
    validation_fraction: float | None = None
    beam_arguments: tuple[str, ...] = ()


def add_flags(parser: argparse._ActionsContainer) -> None:
    """Adds the flags that say what the dataset is to be, which the whole chain takes as well."""
    parser.add_argument(
        "--num_shards",
        type=command.positive_int,
        default=8,
        metavar="N",
        help="files in each split (default: %(default)s)",
    )
    parser.add_argument(
        "--split_by",
        choices=("positional", "hash"),
        help="how validation is set apart from train (default: the source's way)",
    )
    parser.add_argument(
        "--validation_size",
        type=int,
        metavar="N",
        help="rows of train, from its start, that become validation (positional)",
    )
    parser.add_argument(
        "--validation_fraction",
        type=command.fraction,
        metavar="F",
        help="share of train that becomes validation (hash; default: 1/6)",
    )


def parse(argv: list[str]) -> PreprocessConfig:
    """Parses the command line."""
    parser = command.Parser(PROG, __doc__)
    parser.add_argument("--source", required=True, metavar="SRC", help=SYNTAX)
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="the dataset's folder")
    add_flags(parser)
    flags, rest = parser.parse_known_args(argv)
    if rest:  # checked now, so that a bad flag is told before anything is read
        from pipeline.runners import beam_options

        beam_options(rest)
    return config_from(
        flags, output_dir=storage.folder(flags.output_dir), beam_arguments=tuple(rest)
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
    return PreprocessConfig(
        source=flags.source,
        output_dir=output_dir,
        num_shards=flags.num_shards,
        split_by=flags.split_by,
        validation_size=flags.validation_size,
        validation_fraction=flags.validation_fraction,
        beam_arguments=beam_arguments,
    )


def dataset_arguments(config: PreprocessConfig) -> list[str]:
    """The flags of `add_flags` that make this config again."""
    names = ("num_shards", "split_by", "validation_size", "validation_fraction")
    given = {name: getattr(config, name) for name in names}
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def fingerprint(config: PreprocessConfig, source: Source) -> str:
    """Hashes what decides the dataset, as far as it can be told without reading the images."""
    options = {
        "format_version": FORMAT_VERSION,
        "source": source.describe(),
        "content": source.fingerprint(),
        "split_by": config.split_by or source.default_split_by,
        "validation_size": config.validation_size,
        "validation_fraction": config.validation_fraction,
        "num_shards": config.num_shards,
    }
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:32]


def build(
    root: beam.Pipeline, source: Source, splitter: Splitter, num_shards: int, directory: Path
) -> beam.PCollection:
    """The graph of this stage."""
    import apache_beam as beam

    from pipeline.transforms import ReadRows, WriteShards

    return (
        root
        | "ReadRows" >> ReadRows(source)  # RawRows
        | "WriteShards" >> WriteShards(splitter, num_shards, directory)  # WrittenShards
        | "Collect" >> beam.combiners.ToList()  # [WrittenShards]
        | "WriteManifest" >> beam.Map(write_manifest, source, splitter.by, directory)
    )


def write_manifest(
    written: Sequence[WrittenShards], source: Source, split_by: str, directory: Path
) -> None:
    """Writes the manifest, after making sure that every row that was there was written.

    Raises:
        RuntimeError: rows were lost or written twice.
    """
    from pipeline.shards import make_manifest

    manifest = make_manifest(written, source.describe(), split_by, source.class_names)
    read = sum(source.part_sizes.values())
    total = sum(split.num_examples for split in manifest.splits.values())
    if total != read:
        raise RuntimeError(f"{read} rows in the source, {total} written")
    storage.write_atomic(directory / MANIFEST_NAME, manifest_json(manifest))


def execute(config: PreprocessConfig) -> int:
    """Runs the stage; does nothing where its result already stands."""
    source = open_source(config.source)
    identity = fingerprint(config, source)
    if (config.output_dir / MANIFEST_NAME).is_file():
        _require_same(config.output_dir, identity)
        log.info("%s: already there", config.output_dir)
        return command.DONE

    from pipeline import runners, transforms

    splitter = transforms.make_splitter(
        config.split_by or source.default_split_by,
        source.part_sizes["train"],
        config.validation_size,
        config.validation_fraction,
    )
    with storage.published_whole(config.output_dir) as staging:
        log.info("reading %s", source.describe()["title"])
        counters = runners.run(
            runners.beam_options(config.beam_arguments),
            lambda root: build(root, source, splitter, config.num_shards, staging),
        )
        manifest = load_manifest(staging)
        _require_examples(manifest)
        metrics = {"fingerprint": identity, "counters": dict(sorted(counters.items()))}
        storage.write_atomic(staging / METRICS_NAME, json.dumps(metrics, indent=2) + "\n")
    log.info("%s", summary(config.output_dir, manifest))
    return command.DONE


def _require_same(directory: Path, identity: str) -> None:
    """Makes sure that the dataset in a folder is whole and is the one that was asked for."""
    manifest = load_manifest(directory)
    for split in manifest.splits.values():
        for shard in split.shards:
            path = directory / shard.file
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise InputError(
                    f"{path}: missing or not of {shard.bytes} bytes; remove the folder"
                )
    if read_fingerprint(directory) != identity:
        raise InputError(f"{directory}: holds another dataset; expected a new or empty folder")


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
    """A line or two about a dataset, for the end of the stage."""
    sizes = ", ".join(f"{manifest.splits[split].num_examples:,} {split}" for split in SPLITS)
    lines = [f"{directory}: {sizes}; {manifest.num_classes} classes; dataset {manifest.dataset_id}"]
    if leaked := manifest.duplicates["leaked"]:
        lines.append(f"{leaked} images stand both in test and in train or validation")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    command.run(PROG, parse, execute)


if __name__ == "__main__":
    main()
