"""Stage 2: trains a multilayer perceptron on a dataset and exports it as a SavedModel.

python -m trainer.task --dataset_dir out/mnist --run_dir out/run
python -m trainer.task --preset xor    # the four points of XOR, in seconds; reads no dataset

A run that was stopped or killed goes on when the same command is given again, and ends in the
same weights, bit for bit. Folders may be in buckets: gs://bucket/path.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import typing
from collections.abc import Callable
from typing import Any

from pipeline import command, storage
from pipeline.command import InputError, log
from pipeline.storage import Place
from trainer import run_folder, warm_start
from trainer.checks import configure
from trainer.config import PRESETS, TrainConfig, choices
from trainer.run_folder import VERTEX, Places
from trainer.stop import StopSignal
from trainer.workers import in_cluster

PROG = "trainer.task"
SETTINGS = [
    field
    for field in dataclasses.fields(TrainConfig)
    if field.name not in ("preset", "initial_weights")
]
KNOWN = "known"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The flags of this stage; preset xor, and no other, has no folders.

    Attributes:
        initial_weights: the exported model whose weights are the first, if any.
        dry_run: whether to print the config alone.
        unknown: arguments that are not of this command, where a dry run puts up with them.
    """

    dataset_dir: Place | None
    places: Places[Place] | None
    train: TrainConfig
    checkpoint_seconds: float = 10.0
    profile: bool = False
    initial_weights: Place | None = None
    dry_run: bool = False
    unknown: tuple[str, ...] | None = None


def widths(text: str) -> tuple[int, ...]:
    """Parses ``700,500``."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected widths like 700,500, got {text!r}") from None


def duration(text: str) -> float:
    """Parses a number of seconds, 0 or more."""
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text}")


def add_setting(group: argparse._ArgumentGroup, field: dataclasses.Field) -> None:
    """Adds the flag of one field of `TrainConfig`; its value is None where it is not given."""
    flag, kind = f"--{field.name}", typing.get_type_hints(TrainConfig)[field.name]
    usual = getattr(PRESETS["core"], field.name)
    if kind is bool:
        group.add_argument(
            flag, action="store_const", const=True, help=f"{field.metadata['about']} (core: no)"
        )
        return
    shown = ",".join(map(str, usual)) if isinstance(usual, tuple) else usual
    of_text: dict[Any, tuple[Callable[[str], Any], str]] = {
        tuple[int, ...]: (widths, "N,N,..."),
        float: (float, "X"),
    }
    parse_text, metavar = of_text.get(kind, (int, "N"))
    if allowed := choices(field.name):
        parse_text, metavar = str, "|".join(allowed)
    text = field.metadata["about"] + ("" if usual is None else f" (core: {shown})")
    group.add_argument(flag, type=parse_text, metavar=metavar, help=text)


def make_parser() -> command.Parser:
    """The flags of this stage; one that was not given is None, or False."""
    parser = command.Parser(PROG, __doc__)
    parser.add_argument(
        "--dataset_dir", metavar="DIR", help="a dataset written by pipeline.preprocess"
    )
    parser.add_argument("--run_dir", metavar="DIR", help="the run's folder")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="core")
    override = parser.add_argument_group("instead of the preset's values")
    for field in SETTINGS:
        add_setting(override, field)
    about = TrainConfig.__dataclass_fields__["initial_weights"].metadata["about"]
    parser.add_argument(warm_start.FLAG, metavar="DIR", help=about)
    for (flag, variable), what in zip(
        VERTEX.items(), ("the exported model", "checkpoints", "event files"), strict=True
    ):
        parser.add_argument(
            f"--{flag}",
            metavar="DIR",
            help=f"where {what} go: default ${variable}, else in run_dir",
        )
    parser.add_argument(
        "--checkpoint_seconds",
        type=duration,
        metavar="X",
        help="how much work a kill may cost: how often to save"
        f" (default: {TaskConfig.checkpoint_seconds})",
    )
    parser.add_argument(
        "--profile", action="store_true", help="write a trace of a few calls for TensorBoard"
    )
    parser.add_argument(
        "--dry_run",
        nargs="?",
        const="all",
        choices=("all", KNOWN),
        help="check the flags, print the config as JSON and do nothing; known: pass over flags of"
        " other commands, and print them in a second line",
    )
    return parser


def parse(argv: list[str]) -> TaskConfig:
    """Parses the command line."""
    parser = make_parser()
    flags, rest = parser.parse_known_args(argv)
    if rest and flags.dry_run != KNOWN:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    unknown = tuple(rest) if flags.dry_run == KNOWN else None
    dry_run = flags.dry_run is not None
    folders = {"--dataset_dir": flags.dataset_dir, "--run_dir": flags.run_dir}
    missing = [name for name, value in folders.items() if value is None]
    if missing and flags.preset != "xor":
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    values = {field.name: getattr(flags, field.name) for field in SETTINGS}
    given = {name: value for name, value in values.items() if value is not None}
    config = configure(flags.preset, given)
    if flags.preset == "xor":
        _refuse_files(flags)
        return TaskConfig(
            dataset_dir=None, places=None, train=config, dry_run=dry_run, unknown=unknown
        )
    initial = None
    if flags.initial_weights is not None:
        initial = storage.folder(flags.initial_weights, buckets=True)
        checksum = warm_start.checksum(initial, config.hidden_units)
        config = dataclasses.replace(config, initial_weights=checksum)
    seconds = flags.checkpoint_seconds
    return TaskConfig(
        dataset_dir=storage.folder(flags.dataset_dir, buckets=True),
        places=run_folder.places(
            storage.folder(flags.run_dir, buckets=True), vars(flags), os.environ
        ),
        train=config,
        checkpoint_seconds=TaskConfig.checkpoint_seconds if seconds is None else seconds,
        profile=flags.profile,
        initial_weights=initial,
        dry_run=dry_run,
        unknown=unknown,
    )


def _refuse_files(flags: argparse.Namespace) -> None:
    """Refuses what is about files, which preset xor has none of."""
    files = ("dataset_dir", "run_dir", *VERTEX, "initial_weights", "checkpoint_seconds", "profile")
    for name in files:
        value = getattr(flags, name)
        if value is not None and value is not False:
            flag = f"--{name}" if value is True else f"--{name} {value}"
            raise InputError(f"{flag}: preset xor reads and writes no files")


def execute(config: TaskConfig) -> int:
    """Runs the stage."""
    if config.dry_run:
        print(json.dumps(dataclasses.asdict(config.train)))
        if config.unknown is not None:
            print(json.dumps(config.unknown))
        return command.DONE
    if config.dataset_dir is None or config.places is None:
        with command.quiet_import():
            from trainer import xor

        return xor.execute(config.train)
    from pipeline.dataset import load_manifest

    with StopSignal() as stop:
        # The likeliest mistakes, and that nothing is to be done, are told before TensorFlow
        # loads; but one of several workers has to join the others first, to tell them as well.
        if not in_cluster():
            manifest = load_manifest(config.dataset_dir)
            if config.initial_weights is not None:
                warm_start.check_classes(config.initial_weights, manifest)
            asked = run_folder.describe(config.train, manifest.dataset_id, devices=None)
            run_folder.check_same_run(config.places, asked)
            if run_folder.is_finished(config.places, asked):
                storage.recover(config.places.model)  # it was killed just after the model stood
                log.info("%s: already trained and exported", config.places.run)
                return command.DONE
        # The threads that start here never get the signal, whoever takes it later.
        with stop.held(), command.quiet_import():
            from trainer import start
        return start.execute(
            config.train,
            config.dataset_dir,
            config.places,
            stop,
            checkpoint_seconds=config.checkpoint_seconds,
            profile=config.profile,
            initial_weights=config.initial_weights,
        )


def main() -> None:
    """The command."""
    command.run(PROG, parse, execute)


if __name__ == "__main__":
    main()
