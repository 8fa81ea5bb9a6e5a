"""Stage 3: scores an exported model on a split and writes a report.

python -m pipeline.evaluate --model_dir RUN/export --dataset_dir DATASET --report_dir REPORT
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import command, report, runners, storage
from pipeline.command import InputError, log, show
from pipeline.dataset import SPLITS, Manifest, load_manifest

if TYPE_CHECKING:
    import apache_beam as beam

    from pipeline.metrics import Counts

PROG = "pipeline.evaluate"
REPORT_FILE = "report.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """The flags of this stage."""

    model_dir: Path
    dataset_dir: Path
    report_dir: Path
    split: str = "test"
    baseline_dir: Path | None = None
    beam_arguments: tuple[str, ...] = ()


def parse(argv: list[str]) -> EvaluateConfig:
    """Parses the command line."""
    parser = command.Parser(PROG, __doc__)
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
    flags, beam_arguments = runners.parse_known_args(parser, argv)
    return EvaluateConfig(
        model_dir=storage.folder(flags.model_dir),
        dataset_dir=storage.folder(flags.dataset_dir),
        report_dir=storage.folder(flags.report_dir),
        split=flags.split,
        baseline_dir=storage.folder(flags.baseline_dir) if flags.baseline_dir is not None else None,
        beam_arguments=beam_arguments,
    )


def build(root: beam.Pipeline, config: EvaluateConfig, manifest: Manifest) -> beam.PCollection:
    """The graph of this stage."""
    import apache_beam as beam

    from pipeline.inference import ReadRecords, ScoreModel

    shards = manifest.splits[config.split].shards
    blocks = root | "ReadRecords" >> ReadRecords(shards, config.dataset_dir)  # RecordBlock
    counts = blocks | "ScoreModel" >> ScoreModel(config.model_dir, manifest.num_classes)  # Counts
    baseline = None
    if config.baseline_dir is not None:
        baseline = beam.pvalue.AsSingleton(
            blocks | "ScoreBaseline" >> ScoreModel(config.baseline_dir, manifest.num_classes)
        )
    return counts | "WriteReport" >> beam.Map(write_report, baseline, config, manifest)


def write_report(
    counts: Counts, baseline: Counts | None, config: EvaluateConfig, manifest: Manifest
) -> None:
    """Writes the files of the report, ``report.json`` last.

    Raises:
        RuntimeError: not every record of the split was scored once.
    """
    from pipeline.inference import load_description

    expected = manifest.splits[config.split].num_examples
    if counts.num_examples != expected:
        raise RuntimeError(f"{counts.num_examples} records scored, the manifest says {expected}")
    model = load_description(config.model_dir)
    other = None
    if config.baseline_dir is not None and baseline is not None:
        other = (load_description(config.baseline_dir), baseline)
    content = report.build_report(
        counts, manifest=manifest, model=model, split=config.split, baseline=other
    )
    curves = read_curves(config.model_dir)
    page = report.render_html(content, manifest=manifest, model=model, curves=curves, counts=counts)
    for name, text in (
        ("per_class.csv", report.per_class_csv(content)),
        ("confusion_matrix.csv", report.confusion_matrix_csv(content)),
        ("report.html", page),
        (REPORT_FILE, report.report_json(content)),
    ):
        storage.write_atomic(config.report_dir / name, text)


def read_curves(model_dir: Path) -> list[dict[str, Any]]:
    """Reads the training's ``metrics.jsonl``; a model from elsewhere may have none."""
    path = model_dir / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return []
    except ValueError:
        raise InputError(f"{path}: not a file of one JSON object a line") from None


def execute(config: EvaluateConfig) -> int:
    """Runs the stage."""
    manifest = load_manifest(config.dataset_dir)
    from pipeline.inference import load_description

    for model_dir in filter(None, (config.model_dir, config.baseline_dir)):
        load_description(model_dir)
    if not manifest.splits[config.split].num_examples:
        raise InputError(f"{config.dataset_dir}: the {config.split} split is empty")
    report.require_page_libraries()
    storage.require_writable(config.report_dir)
    (config.report_dir / REPORT_FILE).unlink(missing_ok=True)  # it marks a complete report
    size = manifest.splits[config.split].num_examples
    log.info("scoring %s on the %s images of %s", config.model_dir, f"{size:,}", config.split)
    runners.run(
        runners.beam_options(config.beam_arguments),
        lambda root: build(root, config, manifest),
        "evaluate",
    )
    content = json.loads((config.report_dir / REPORT_FILE).read_text())
    show(report.text_table(content))
    show(f"{report.title(manifest)}: {config.split} accuracy {content['accuracy']:.4f}")
    show(f"report: {config.report_dir / 'report.html'}")
    return command.DONE


def main() -> None:
    """The command."""
    command.run(PROG, parse, execute)


if __name__ == "__main__":
    main()
