"""Stage 3: scores an exported model on a split and writes a report.

python -m pipeline.evaluate --model_dir RUN/export --dataset_dir DATASET --report_dir REPORT

All models are scored in one pass. The same models and records give the same report.json, on
every runner and with any number of workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import command, drift, ledger, models, page, report, runners, storage
from pipeline.command import InputError, log, show
from pipeline.dataset import SPLITS, Manifest, load_manifest
from pipeline.drift import REPORT_FILE

if TYPE_CHECKING:
    import apache_beam as beam

    from pipeline.tally import Tally

PROG = "pipeline.evaluate"
UNPUBLISHED = ".report.json"  # until all that belongs to it is in its place
PREDICTIONS = "predictions"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """The flags of this stage."""

    model_dir: Path
    dataset_dir: Path
    report_dir: Path
    split: str = "test"
    baseline_dir: Path | None = None
    compare_dirs: tuple[Path, ...] = ()
    ledger: Path | None = None
    run_id: str | None = None
    save_predictions: bool = False
    beam_arguments: tuple[str, ...] = ()

    @property
    def others(self) -> tuple[Path, ...]:
        """The models that are scored beside the one the report is about."""
        return (*([self.baseline_dir] if self.baseline_dir else []), *self.compare_dirs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What the graph is built of.

    Attributes:
        config: the flags.
        manifest: of the dataset.
        predictions_dir: where the answers go, if they are saved.
    """

    config: EvaluateConfig
    manifest: Manifest
    predictions_dir: Path | None


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
    flags, beam_arguments = runners.parse_known_args(parser, argv)
    return EvaluateConfig(
        model_dir=storage.folder(flags.model_dir),
        dataset_dir=storage.folder(flags.dataset_dir),
        report_dir=storage.folder(flags.report_dir),
        split=flags.split,
        baseline_dir=storage.folder(flags.baseline_dir) if flags.baseline_dir is not None else None,
        compare_dirs=tuple(storage.folder(name) for name in flags.compare_dir),
        ledger=storage.folder(flags.ledger) if flags.ledger is not None else None,
        run_id=flags.run_id,
        save_predictions=flags.save_predictions,
        beam_arguments=beam_arguments,
    )


def build(root: beam.Pipeline, job: Job) -> beam.PCollection:
    """The graph of this stage."""
    import apache_beam as beam
    from apache_beam.ml.inference.base import RunInference

    from pipeline.inference import AddUp, ReadRecords, SavedModelsHandler
    from pipeline.predictions import WritePredictions

    config, num_classes = job.config, job.manifest.num_classes
    shards = job.manifest.splits[config.split].shards
    model_dirs = (config.model_dir, *config.others)
    scored = (
        root
        | "ReadRecords" >> ReadRecords(shards, config.dataset_dir)  # RecordBlock
        | "Score" >> RunInference(SavedModelsHandler(model_dirs, num_classes))  # ScoredBlock
    )
    if job.predictions_dir is not None:
        _ = scored | "WritePredictions" >> WritePredictions(len(shards), job.predictions_dir)
    return (
        scored
        | "AddUp" >> beam.CombineGlobally(AddUp(num_classes, len(model_dirs)))  # Tally
        | "WriteReport" >> beam.Map(write_report, config, job.manifest)
    )


def write_report(total: Tally, config: EvaluateConfig, manifest: Manifest) -> None:
    """Writes the files of the report; its numbers last, and not yet under their name.

    Raises:
        RuntimeError: not every record of the split was scored once.
    """
    from pipeline.tally import make_test_id, require_all_read_once

    require_all_read_once(total, manifest.splits[config.split].shards)
    counts = total.models[0]
    test_id = make_test_id(total, manifest.class_names)
    model = models.load_description(config.model_dir)
    compared = [
        report.Compared(
            model=models.load_description(folder),
            counts=others_counts,
            paired=paired,
            data=drift.load_data(folder) if folder == config.baseline_dir else None,
        )
        for folder, others_counts, paired in zip(
            config.others, total.models[1:], total.paired, strict=True
        )
    ]
    has_baseline = config.baseline_dir is not None
    content = report.build_report(
        counts,
        manifest=manifest,
        model=model,
        split=config.split,
        baseline=compared[0] if has_baseline else None,
        others=compared[has_baseline:],
        histograms=drift.load_histograms(config.dataset_dir),
        test_id=test_id,
        challengers_before=count_challengers_before(config.ledger, config.run_id, test_id),
    )
    curves = models.load_curves(config.model_dir)
    html = page.render_html(content, manifest=manifest, model=model, curves=curves, counts=counts)
    for name, text in (
        ("per_class.csv", report.per_class_csv(content)),
        ("confusion_matrix.csv", report.confusion_matrix_csv(content)),
        ("report.html", html),
        (UNPUBLISHED, report.report_json(content)),
    ):
        storage.write_atomic(config.report_dir / name, text)


def count_challengers_before(file: Path | None, run_id: str | None, test_id: str) -> int | None:
    """How many models of other runs the same rows have judged; None where no ledger is given."""
    if file is None:
        return None
    others = [line for line in ledger.read_json(file) if line.get("run_id") != run_id]
    return ledger.challengers_before(others, test_id)


def execute(config: EvaluateConfig) -> int:
    """Runs the stage."""
    manifest = load_manifest(config.dataset_dir)
    for model_dir in (config.model_dir, *config.others):
        models.require_scorable(model_dir, manifest.class_names)
    if not manifest.splits[config.split].num_examples:
        raise InputError(f"{config.dataset_dir}: the {config.split} split is empty")
    page.require_page_libraries()
    storage.require_writable(config.report_dir)
    for name in (REPORT_FILE, UNPUBLISHED):  # which mark a complete report
        (config.report_dir / name).unlink(missing_ok=True)
    size = manifest.splits[config.split].num_examples
    log.info("scoring %s on the %s images of %s", config.model_dir, f"{size:,}", config.split)
    with place_of_predictions(config) as predictions_dir:
        job = Job(config=config, manifest=manifest, predictions_dir=predictions_dir)
        runners.run(
            runners.beam_options(config.beam_arguments), lambda root: build(root, job), "evaluate"
        )
    (config.report_dir / UNPUBLISHED).replace(config.report_dir / REPORT_FILE)
    content = json.loads((config.report_dir / REPORT_FILE).read_text())
    show(report.text_table(content))
    show(f"{report.title(manifest)}: {config.split} accuracy {content['accuracy']:.4f}")
    html = config.report_dir / "report.html"
    show(f"report: {html} ({html.stat().st_size / 1000:,.0f} kB)")
    return command.DONE


@contextlib.contextmanager
def place_of_predictions(config: EvaluateConfig) -> Iterator[Path | None]:
    """Yields where predictions go, if they are saved, and publishes them in the end.

    Those of an earlier report do not stay beside this one.
    """
    final = config.report_dir / PREDICTIONS
    storage.recover(final)
    if config.save_predictions:
        with storage.published_whole(final, replace=True) as staging:
            yield staging
    else:
        storage.remove(final)
        yield None


def main() -> None:
    """The command."""
    command.run(PROG, parse, execute)


if __name__ == "__main__":
    main()
