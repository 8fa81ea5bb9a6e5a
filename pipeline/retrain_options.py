"""The flags of the chain, `pipeline.retrain`, and the config they make."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import re
from collections.abc import Sequence
from pathlib import Path

from pipeline import command, options, rules, storage, trainers
from pipeline.command import InputError
from pipeline.options import PreprocessConfig
from pipeline.rules import Rules
from pipeline.sources import SYNTAX
from pipeline.storage import Place
from pipeline.vertex_options import VertexConfig

WINDOW = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """The flags of the chain.

    Attributes:
        window: when this run was scheduled for.
        max_age: days after which a champion is trained anew although nothing is new; None: never.
        warm_start: whether to start from the champion's weights.
        force_reason: why to promote whatever the gate says, if so.
        dry_run: whether to print the plan alone.
        vertex: where on Vertex AI runs are trained; None: in processes here.
        others: arguments that it does not know itself: the trainer's, and Beam's.
    """

    root: Place
    preprocess: PreprocessConfig
    rules: Rules
    window: str
    max_age: float | None
    warm_start: bool
    force_reason: str | None
    dry_run: bool
    vertex: VertexConfig | None
    others: tuple[str, ...]


def window(text: str) -> str:
    """Parses the name of a scheduled window, which becomes part of a folder's name."""
    if not WINDOW.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"expected up to 64 letters, digits, '.', '_', '+' and '-', got {text!r}"
        )
    return text


def add_flags(parser: command.Parser) -> None:
    """Adds the flags of the chain itself."""
    parser.add_argument("--root", required=True, metavar="DIR", help="where everything is kept")
    parser.add_argument(
        "--source",
        action="append",
        metavar="SRC",
        help=f"{SYNTAX}; several are joined (default: auto)",
    )
    parser.add_argument(
        "--window",
        type=window,
        metavar="TEXT",
        help="the scheduled time this run is for; begins its id (default: the date, UTC)",
    )
    parser.add_argument(
        "--max_age",
        type=command.above_zero("days"),
        metavar="DAYS",
        help="train although nothing is new where the champion is older (default: never)",
    )
    parser.add_argument(
        "--warm_start",
        action="store_true",
        help="start from the champion's weights, unless it has learned from images of test",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print what would be done, the commands of its stages and the requests to a service,"
        " and write nothing",
    )
    rules.add_flags(parser.add_argument_group("the gate"))
    options.add_flags(parser.add_argument_group("the dataset"))
    training = parser.add_argument_group(
        "the training", "every other flag goes to trainer.task, see its --help, or else to Beam"
    )
    training.add_argument("--preset", metavar="NAME", help="what to start from (default: core)")
    trainers.add_flags(parser)


def config_from(flags: argparse.Namespace, others: Sequence[str]) -> RetrainConfig:
    """The config of parsed flags, and of arguments that are the trainer's or Beam's.

    Raises:
        InputError: some do not go together, or cannot be.
    """
    if flags.preset == "xor":
        raise InputError("--preset xor: learns four points and makes no model that could be served")
    if flags.warm_start and any(other.startswith("--initial_weights") for other in others):
        raise InputError("--warm_start and --initial_weights: expected at most one of them")
    flags.source = flags.source or ["auto"]
    return RetrainConfig(
        root=storage.folder(flags.root, buckets=True),
        preprocess=options.config_from(flags, output_dir=Path(), beam_arguments=()),
        rules=rules.rules_from(flags),
        window=flags.window or datetime.datetime.now(datetime.UTC).date().isoformat(),
        max_age=flags.max_age,
        warm_start=flags.warm_start,
        force_reason=rules.force_reason_from(flags),
        dry_run=flags.dry_run,
        vertex=trainers.vertex_from(flags),
        others=(*([f"--preset={flags.preset}"] if flags.preset is not None else []), *others),
    )
