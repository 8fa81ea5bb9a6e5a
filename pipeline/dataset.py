"""The contract between the stages: what a record is, what a dataset folder is.

A record is a serialized ``tf.train.Example`` with

    image   784 float32 in [0, 1], row-major, exactly ``float32(uint8) / float32(255)``
    label   one int64
    id      bytes: `records.image_ids` of the pixels; further copies get ``-1``, ``-2``, ...

in a TFRecord file. ``manifest.json`` names every file with its size and checksum and is
written last: without it there is no dataset, and nobody globs.

What encodes and decodes records is in `pipeline.records`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline import command, storage
from pipeline.command import InputError

PROG = "pipeline.dataset"
FORMAT_VERSION = 1
IMAGE_SHAPE = (28, 28, 1)
NUM_PIXELS = 784
MAX_CLASSES = 256
SPLITS = ("train", "validation", "test")
MANIFEST_NAME = "manifest.json"
METRICS_NAME = "metrics.json"
QUARANTINE_NAME = "quarantine"
RECORDS_NAME = "records.jsonl"  # in it, what was set aside
DUPLICATES = ("images", "copies", "conflicting", "leaked", "held_out")
KINDS_OF_IMAGES = tuple(kind for kind in DUPLICATES if kind != "copies")  # that have examples
NUM_EXAMPLES = 5  # ids that the manifest names of each kind of duplicate
COMPRESSIONS = {"none": "", "gzip": ".gz"}
SHARD_FILE = re.compile(rf"({'|'.join(SPLITS)})-[0-9]{{5}}-of-[0-9]{{5}}\.tfrecord(\.gz)?")
ID_LENGTH = 32
IMAGE_ID = re.compile(rf"[0-9a-f]{{{ID_LENGTH}}}")


# The manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One file: its name in the dataset's folder, records, size in bytes, checksum.

    The checksum is the SHA-256 of the content, uncompressed, in hex: what gzip makes of equal
    content depends on the machine.
    """

    file: str
    num_examples: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """One split: records in all, records of each class, files in order."""

    num_examples: int
    label_counts: tuple[int, ...]
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset folder holds; see the contract for each field.

    Attributes:
        dataset_id: `dataset_id` of the shards; equal content has equal ids.
        source: what was read, as its source describes itself; no path, no time.
        quarantined: records set aside, ``{"count", "by_reason"}``.
        dropped: records left out on request.
        flagged: records written although something about them is odd, by what it is.
        duplicates: how often the same pixels occur, and how often with different labels, with
            the lowest ids of each kind as ``"examples"``.
    """

    format_version: int
    dataset_id: str
    source: dict[str, Any]
    split_by: str
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]
    splits: dict[str, Split]
    quarantined: dict[str, Any]
    dropped: int
    flagged: dict[str, int]
    duplicates: dict[str, Any]


def dataset_id(shards: Iterable[Shard], class_names: Sequence[str]) -> str:
    """Hashes what a dataset holds: 32 hex digits over checksums, class names and format."""
    files = [[shard.file.removesuffix(".gz"), shard.sha256] for shard in shards]
    content = [FORMAT_VERSION, list(class_names), files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:ID_LENGTH]


def shard_name(split: str, index: int, num_shards: int, compression: str = "none") -> str:
    """The file name of one shard: ``train-00003-of-00008.tfrecord``, with ``.gz`` if it is."""
    return f"{split}-{index:05d}-of-{num_shards:05d}.tfrecord{COMPRESSIONS[compression]}"


def manifest_json(manifest: Manifest) -> str:
    """The text of ``manifest.json``."""
    return json.dumps(dataclasses.asdict(manifest), indent=2) + "\n"


def parse_manifest(text: str, name: str) -> Manifest:
    """Reads `manifest_json` back, trusting nothing in it.

    Raises:
        InputError: not a manifest, of another format version, or naming files elsewhere.
    """
    try:
        raw = json.loads(text)
        version = raw["format_version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{name}: not a dataset manifest") from None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{name}: format_version is {version!r}, expected {FORMAT_VERSION};"
            " run pipeline.preprocess again, with --overwrite or into a new folder"
        )
    try:
        _require(set(raw["splits"]) == set(SPLITS), f"splits are not {', '.join(SPLITS)}")
        manifest = Manifest(
            **raw
            | {
                "class_names": tuple(raw["class_names"]),
                "image_shape": tuple(raw["image_shape"]),
                "splits": {split: _parse_split(raw["splits"][split]) for split in SPLITS},
            }
        )
        _check_manifest(manifest)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{name}: not a valid manifest: {error}") from None
    return manifest


def _parse_split(raw: dict[str, Any]) -> Split:
    shards = tuple(Shard(**shard) for shard in raw["shards"])
    return Split(
        num_examples=raw["num_examples"], label_counts=tuple(raw["label_counts"]), shards=shards
    )


def is_line(text: Any) -> bool:
    """Tells whether something is a string of one line: not empty, no control characters."""
    return (
        isinstance(text, str)
        and text != ""
        and not any(unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp") for each in text)
    )


def _require(right: bool, wrong: str) -> None:
    if not right:
        raise ValueError(wrong)


def _require_counts(counts: Iterable[Any], of: str) -> None:
    for count in counts:
        _require(
            type(count) is int and count >= 0, f"{of} counts {count!r}, expected a whole number"
        )


def _check_manifest(manifest: Manifest) -> None:
    """Raises ValueError, or what a wrong type brings, where the manifest contradicts itself."""
    _require(
        manifest.image_shape == IMAGE_SHAPE,
        f"image_shape is {manifest.image_shape}, expected {IMAGE_SHAPE}",
    )
    _require(
        manifest.split_by in ("positional", "hash"),
        f"split_by is {manifest.split_by!r}, expected positional or hash",
    )
    _check_classes(manifest)
    for name, split in manifest.splits.items():
        _check_split(name, split, manifest.num_classes)
    _check_file_names(manifest)
    _check_remarks(manifest)
    _check_duplicates(manifest.duplicates)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    _require(
        manifest.dataset_id == dataset_id(shards, manifest.class_names),
        "dataset_id does not follow from the checksums",
    )


def _check_classes(manifest: Manifest) -> None:
    number, names = manifest.num_classes, manifest.class_names
    _require(
        type(number) is int and 2 <= number <= MAX_CLASSES,
        f"num_classes is {number!r}, expected 2 to {MAX_CLASSES}",
    )
    _require(len(names) == number, f"{len(names)} class names for {number} classes")
    for name in names:
        _require(is_line(name), f"class name {name!r} is not a string of one line")
    _require(len(set(names)) == number, "a class name occurs twice")


def _check_split(name: str, split: Split, num_classes: int) -> None:
    _require(
        len(split.label_counts) == num_classes, f"{name} counts {len(split.label_counts)} labels"
    )
    in_shards = [shard.num_examples for shard in split.shards]
    sizes = [shard.bytes for shard in split.shards]
    _require_counts((split.num_examples, *split.label_counts, *in_shards, *sizes), name)
    _require(
        split.num_examples == sum(split.label_counts) == sum(in_shards),
        f"{name} has {split.num_examples} examples, but its parts differ",
    )
    for shard in split.shards:
        _require(
            re.fullmatch("[0-9a-f]{64}", shard.sha256) is not None,
            f"{shard.sha256!r} is not a checksum",
        )


def _check_file_names(manifest: Manifest) -> None:
    """Every split has as many files, named as `shard_name` names them, all compressed or none."""
    first = manifest.splits[SPLITS[0]].shards
    _require(len(first) > 0, f"{SPLITS[0]} has no files")
    compression = "gzip" if str(first[0].file).endswith(".gz") else "none"
    for name, split in manifest.splits.items():
        _require(
            len(split.shards) == len(first),
            f"{name} has {len(split.shards)} files, {SPLITS[0]} has {len(first)}",
        )
        for index, shard in enumerate(split.shards):
            expected = shard_name(name, index, len(first), compression)
            _require(shard.file == expected, f"file {shard.file!r}, expected {expected}")


def _check_remarks(manifest: Manifest) -> None:
    """What was noted of the source, and of the rows that were left out or are odd."""
    source, quarantined = manifest.source, manifest.quarantined
    _require(
        isinstance(source, dict) and is_line(source.get("title")),
        "source has no title of one line",
    )
    _require(set(quarantined) == {"count", "by_reason"}, "quarantined is not count and by_reason")
    by_reason = quarantined["by_reason"]
    _require_counts((quarantined["count"], *by_reason.values()), "quarantined")
    _require(all(map(is_line, by_reason)), "a reason in quarantined is not a string of one line")
    _require(
        sum(by_reason.values()) == quarantined["count"] and 0 not in by_reason.values(),
        "quarantined counts more or fewer than its reasons",
    )
    _require_counts([manifest.dropped], "dropped")
    _require(set(manifest.flagged) == {"blank"}, "flagged is not blank alone")
    _require_counts(manifest.flagged.values(), "flagged")


def _check_duplicates(duplicates: dict[str, Any]) -> None:
    _require(
        set(duplicates) == {*DUPLICATES, "examples"},
        f"duplicates is not {', '.join(DUPLICATES)} and examples",
    )
    _require_counts((duplicates[kind] for kind in DUPLICATES), "duplicates")
    examples = duplicates["examples"]
    _require(set(examples) == set(KINDS_OF_IMAGES), "examples of duplicates are of other kinds")
    for kind, ids in examples.items():
        _require(
            isinstance(ids, list) and all(IMAGE_ID.fullmatch(each) for each in ids),
            f"examples of {kind} are not ids",
        )
        _require(
            ids == sorted(set(ids)) and len(ids) == min(NUM_EXAMPLES, duplicates[kind]),
            f"examples of {kind} are not the lowest of {duplicates[kind]}",
        )


def load_manifest(directory: storage.Place) -> Manifest:
    """Reads the manifest of a dataset folder.

    Raises:
        InputError: there is none, or it is not valid.
    """
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise InputError(f"{directory}: no such folder; expected a dataset")
    try:
        return parse_manifest(path.read_text(), str(path))
    except FileNotFoundError:
        raise InputError(
            f"{directory}: no {MANIFEST_NAME}; expected a dataset written by pipeline.preprocess"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def check_files(directory: storage.Place, manifest: Manifest, *splits: str) -> None:
    """Checks that the files of some splits are there, by their sizes alone: without reading them.

    Raises:
        InputError: one is missing or has another size than the manifest says.
    """
    sizes = storage.sizes(directory)
    for shard in (shard for split in splits for shard in manifest.splits[split].shards):
        path = directory / shard.file
        if shard.file not in sizes:
            raise InputError(f"{path}: missing; the manifest names it")
        if (size := sizes[shard.file]) != shard.bytes:
            raise InputError(f"{path}: has {size} bytes, the manifest says {shard.bytes}")


# The command


def parse(argv: list[str]) -> tuple[str, list[storage.Place]]:
    """Parses the command line: the action, and the datasets it is about."""
    parser = command.Parser(PROG, __doc__)
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=argparse.ArgumentParser
    )
    for name, operands, text in (
        ("verify", 1, "check everything the manifest states"),
        ("describe", 1, "print splits, classes and statistics"),
        ("diff", 2, "print what changed from one dataset to another"),
    ):
        action = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        action.error = parser.error
        action.add_argument("dirs", nargs=operands, metavar="DIR")
    flags = parser.parse_args(argv)
    return flags.action, [storage.folder(name, buckets=True) for name in flags.dirs]


def execute(request: tuple[str, list[storage.Place]]) -> int:
    """Runs the command; a dataset that is not what its manifest states is wrong input."""
    from pipeline import comparison, inspection

    action, directories = request
    if action != "verify":
        command.show(
            comparison.describe(*directories)
            if action == "describe"
            else comparison.diff(*directories)
        )
        return command.DONE
    problems = inspection.verify(*directories)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        return command.BAD_INPUT
    manifest = load_manifest(directories[0])
    total = sum(split.num_examples for split in manifest.splits.values())
    command.show(f"{directories[0]}: {total:,} records, all as the manifest states")
    return command.DONE


def main() -> None:
    """The command."""
    command.run(PROG, parse, execute)


if __name__ == "__main__":
    main()
