"""Stage 2: trains a multilayer perceptron on a dataset and exports it as a SavedModel.

python -m trainer.task --dataset_dir out/mnist --run_dir out/run

A run that was stopped or killed goes on when the same command is given again, and ends in the
same weights, bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from pipeline import command, storage
from trainer.config import PRESETS, TrainConfig, check

PROG = "trainer.task"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The flags of this stage."""

    dataset_dir: Path
    run_dir: Path
    train: TrainConfig
    dry_run: bool = False


def widths(text: str) -> tuple[int, ...]:
    """Parses ``700,500``."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected widths like 700,500, got {text!r}") from None


def parse(argv: list[str]) -> TaskConfig:
    """Parses the command line."""
    parser = command.Parser(PROG, __doc__)
    parser.add_argument(
        "--dataset_dir",
        required=True,
        metavar="DIR",
        help="a dataset written by pipeline.preprocess",
    )
    parser.add_argument("--run_dir", required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="core")
    override = parser.add_argument_group("instead of the preset's values")
    override.add_argument("--hidden_units", type=widths, metavar="N,N,...")
    override.add_argument("--learning_rate", type=float, metavar="X")
    override.add_argument("--beta_1", type=float, metavar="X")
    override.add_argument("--beta_2", type=float, metavar="X")
    override.add_argument("--epsilon", type=float, metavar="X")
    override.add_argument("--batch_size", type=int, metavar="N", help="over all replicas")
    override.add_argument("--epochs", type=int, metavar="N")
    override.add_argument("--seed", type=int, metavar="N", help="default: 22")
    override.add_argument(
        "--replicas", type=int, metavar="N", help="default: every visible GPU, else one CPU"
    )
    override.add_argument(
        "--steps_per_call",
        type=int,
        metavar="N",
        help="steps between looks at progress and signals (default: 100)",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check the flags, print the config as JSON and do nothing",
    )
    flags = parser.parse_args(argv)
    given = {
        field.name: getattr(flags, field.name)
        for field in dataclasses.fields(TrainConfig)
        if getattr(flags, field.name) is not None
    }
    return TaskConfig(
        dataset_dir=storage.folder(flags.dataset_dir),
        run_dir=storage.folder(flags.run_dir),
        train=check(dataclasses.replace(PRESETS[flags.preset], **given)),
        dry_run=flags.dry_run,
    )


def execute(config: TaskConfig) -> int:
    """Runs the stage."""
    if config.dry_run:
        print(json.dumps(dataclasses.asdict(config.train)))
        return command.DONE
    from pipeline.dataset import load_manifest

    load_manifest(config.dataset_dir)  # the likeliest mistake, told before TensorFlow loads
    with command.quiet_import():
        from trainer import loop

    return loop.execute(config.train, config.dataset_dir, config.run_dir)


def main() -> None:
    """The command."""
    command.run(PROG, parse, execute)


if __name__ == "__main__":
    main()
