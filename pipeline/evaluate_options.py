"""The flags of stage 3, `pipeline.evaluate`, and the config they make."""

from __future__ import annotations

import argparse
import dataclasses

from pipeline import command, storage
from pipeline.dataset import SPLITS
from pipeline.storage import Place

PREDICTIONS = "predictions"  # the folder in a report of every answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """The flags of this stage."""

    model_dir: Place
    dataset_dir: Place
    report_dir: Place
    split: str = "test"
    baseline_dir: Place | None = None
    compare_dirs: tuple[Place, ...] = ()
    ledger: Place | None = None
    run_id: str | None = None
    save_predictions: bool = False
    dry_run: bool = False
    beam_arguments: tuple[str, ...] = ()

    @property
    def others(self) -> tuple[Place, ...]:
        """The models that are scored beside the one the report is about."""
        return (*([self.baseline_dir] if self.baseline_dir else []), *self.compare_dirs)


def add_flags(parser: command.Parser) -> None:
    """Adds the flags of this stage."""
    parser.add_argument("--model_dir", required=True, metavar="DIR", help="the export of a run")
    parser.add_argument(
        "--dataset_dir",
        required=True,
        metavar="DIR",
        help="a dataset written by pipeline.preprocess",
    )
    parser.add_argument("--report_dir", required=True, metavar="DIR", help="where the report goes")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument(
        "--baseline_dir", metavar="DIR", help="another exported model, scored on the same rows"
    )
    parser.add_argument(
        "--compare_dir",
        action="append",
        default=[],
        metavar="DIR",
        help="one more, in the same pass; may be given several times",
    )
    parser.add_argument(
        "--ledger",
        metavar="FILE",
        help="runs.jsonl of a root: the report says how many models these rows have judged by it",
    )
    parser.add_argument("--run_id", metavar="ID", help="whose lines of the ledger do not count")
    parser.add_argument(
        "--save_predictions",
        action="store_true",
        help=f"write every answer to REPORT/{PREDICTIONS}/, a file for each shard",
    )
    parser.add_argument("--dry_run", action="store_true", help="print what would be done")


def config_from(flags: argparse.Namespace, beam_arguments: tuple[str, ...]) -> EvaluateConfig:
    """The config of parsed flags, and of Beam's."""
    return EvaluateConfig(
        model_dir=_folder(flags.model_dir),
        dataset_dir=_folder(flags.dataset_dir),
        report_dir=_folder(flags.report_dir),
        split=flags.split,
        baseline_dir=_folder(flags.baseline_dir) if flags.baseline_dir is not None else None,
        compare_dirs=tuple(map(_folder, flags.compare_dir)),
        ledger=_folder(flags.ledger) if flags.ledger is not None else None,
        run_id=flags.run_id,
        save_predictions=flags.save_predictions,
        dry_run=flags.dry_run,
        beam_arguments=beam_arguments,
    )


def reached_by_workers(flags: argparse.Namespace) -> list[tuple[str, str]]:
    """The folders that are to be where workers in a cloud reach them, and their flags."""
    named = {
        "--model_dir": flags.model_dir,
        "--baseline_dir": flags.baseline_dir,
        "--dataset_dir": flags.dataset_dir,
        "--report_dir": flags.report_dir,
    }
    compared = [("--compare_dir", name) for name in flags.compare_dir]
    return [(flag, name) for flag, name in named.items() if name is not None] + compared


def _folder(text: str) -> Place:
    return storage.folder(text, buckets=True)
