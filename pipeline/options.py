"""What a dataset is to be: the flags of stage 1, its config, and the fingerprint they make."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from typing import Any

from pipeline import command
from pipeline.command import InputError
from pipeline.dataset import COMPRESSIONS, FORMAT_VERSION, MAX_CLASSES
from pipeline.sources import Source, open_sources
from pipeline.splits import Splitter, make_splitter
from pipeline.storage import Place

MAX_SHARDS = 99_999  # five digits in a file's name
# The flags that say what the dataset is to be.
FLAGS: dict[str, dict[str, Any]] = {
    "num_shards": {
        "type": command.positive_int,
        "default": 8,
        "metavar": "N",
        "help": "files in each split (default: %(default)s)",
    },
    "compression": {"choices": tuple(COMPRESSIONS), "default": "none", "help": "of the shards"},
    "split_by": {
        "choices": ("positional", "hash"),
        "help": "how validation is set apart from train (default: the source's way)",
    },
    "validation_size": {
        "type": int,
        "metavar": "N",
        "help": "rows of train, from its start, that become validation (positional)",
    },
    "validation_fraction": {
        "type": command.fraction,
        "metavar": "F",
        "help": "share of train that becomes validation (hash; default: 1/6)",
    },
    "num_classes": {
        "type": int,
        "metavar": "N",
        "help": "of idx: sources; a label of N or more is then set aside",
    },
    "resize": {"action": "store_true", "help": "resize images: of other sizes to 28x28"},
    "drop_leaks": {
        "action": "store_true",
        "help": "leave out of train and validation what also stands in test",
    },
    "max_quarantined": {
        "type": command.fraction,
        "default": 0.01,
        "metavar": "F",
        "help": "fail if more than this share of all rows is unusable (default: %(default)s)",
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """The flags of this stage. None: as the source has it.

    Attributes:
        max_quarantined: the largest share of all rows that may be set aside.
        overwrite: whether another dataset in the folder is replaced.
        dry_run: whether to print what would be done, and do nothing.
    """

    sources: tuple[str, ...]
    output_dir: Place
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
    dry_run: bool = False
    beam_arguments: tuple[str, ...] = ()


def add_flags(parser: argparse._ActionsContainer) -> None:
    """Adds the flags that say what the dataset is to be, which the whole chain takes as well."""
    for name, keywords in FLAGS.items():
        parser.add_argument(f"--{name}", **keywords)


def config_from(
    flags: argparse.Namespace, *, output_dir: Place, beam_arguments: tuple[str, ...]
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
        **{name: getattr(flags, name) for name in FLAGS},
    )


def dataset_arguments(config: PreprocessConfig) -> list[str]:
    """The flags of `add_flags` that make this config again."""
    given = {name: getattr(config, name) for name in FLAGS}
    switches = [f"--{name}" for name, value in given.items() if value is True]
    valued = [
        f"--{name}={value}"
        for name, value in given.items()
        if value is not None and not isinstance(value, bool)
    ]
    return switches + valued


def open_sources_of(config: PreprocessConfig) -> Source:
    """Opens the sources as the flags say; a dry run shares nothing with others."""
    return open_sources(
        config.sources,
        num_classes=config.num_classes,
        resize=config.resize,
        share=not config.dry_run,
    )


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
