"""Stage 3: scores an exported model on a split and writes a report.

python -m pipeline.evaluate --model_dir RUN/export --dataset_dir DATASET --report_dir REPORT

All models are scored in one pass. The same models and records give the same report.json, on
every runner, with any number of workers, and wherever they lie. Every folder may be gs://.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

from pipeline import (
    command,
    drift,
    evaluate_options,
    ledger,
    models,
    page,
    report,
    runners,
    storage,
)
from pipeline.command import InputError, log, show
from pipeline.dataset import Manifest, load_manifest
from pipeline.drift import REPORT_FILE
from pipeline.evaluate_options import PREDICTIONS, EvaluateConfig
from pipeline.storage import Place

if TYPE_CHECKING:
    import apache_beam as beam

    from pipeline.tally import Tally

PROG = "pipeline.evaluate"
STAGE = "evaluate"
PAGE_FILE, CLASSES_FILE, CONFUSION_FILE = "report.html", "per_class.csv", "confusion_matrix.csv"
OURS = (REPORT_FILE, PAGE_FILE, CLASSES_FILE, CONFUSION_FILE, PREDICTIONS)
TALLY_FILE = ".tally.json"  # in which the workers say what they counted; is not published


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What the graph is built of.

    Attributes:
        config: the flags.
        manifest: of the dataset.
        directory: where the workers write.
    """

    config: EvaluateConfig
    manifest: Manifest
    directory: Place


def parse(argv: list[str]) -> EvaluateConfig:
    """Parses the command line."""
    parser = command.Parser(PROG, __doc__)
    evaluate_options.add_flags(parser)
    given = runners.parse_known_args(parser, argv, evaluate_options.reached_by_workers)
    return evaluate_options.config_from(*given)


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
    if config.save_predictions:
        predictions_dir = job.directory / PREDICTIONS
        _ = scored | "WritePredictions" >> WritePredictions(len(shards), predictions_dir)
    return (
        scored
        | "AddUp" >> beam.CombineGlobally(AddUp(num_classes, len(model_dirs)))  # Tally
        | "WriteTally" >> beam.Map(write_tally, str(job.directory))
    )


def write_tally(total: Tally, directory: str) -> None:
    """Hands on what was counted; what the workers know has no other way to the report."""
    from pipeline.tally import tally_json

    storage.write_atomic(storage.place(directory) / TALLY_FILE, tally_json(total))


def read_tally(directory: Place) -> Tally:
    """Takes what `write_tally` handed on."""
    from pipeline.tally import parse_tally

    return parse_tally((directory / TALLY_FILE).read_text())


def write_report(
    total: Tally, config: EvaluateConfig, manifest: Manifest, directory: Place
) -> dict[str, Any]:
    """Writes the files of the report, and returns the content of ``report.json``.

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
        judged_before=count_challengers_before(config.ledger, config.run_id, None),
    )
    curves = models.load_curves(config.model_dir)
    html = page.render_html(content, manifest=manifest, model=model, curves=curves, counts=counts)
    for name, text in (
        (CLASSES_FILE, report.per_class_csv(content)),
        (CONFUSION_FILE, report.confusion_matrix_csv(content)),
        (PAGE_FILE, html),
        (REPORT_FILE, report.report_json(content)),
    ):
        storage.write_atomic(directory / name, text)
    return content


def count_challengers_before(
    file: Place | None, run_id: str | None, test_id: str | None
) -> int | None:
    """How many models of other runs were judged, by these rows or, for None, by any.

    Returns:
        None where no ledger is given.
    """
    if file is None:
        return None
    others = [line for line in ledger.read_entries(file) if line.get("run_id") != run_id]
    return ledger.count_judged(others, test_id)


def execute(config: EvaluateConfig) -> int:
    """Runs the stage."""
    manifest = load_manifest(config.dataset_dir)
    for model_dir in (config.model_dir, *config.others):
        models.require_scorable(model_dir, manifest.class_names)
    if not manifest.splits[config.split].num_examples:
        raise InputError(f"{config.dataset_dir}: the {config.split} split is empty")
    page.require_page_libraries()
    require_only_ours(config.report_dir)
    if config.dry_run:
        show(json.dumps(plan(config, manifest), indent=2))
        return command.DONE
    storage.require_writable(config.report_dir)
    size = manifest.splits[config.split].num_examples
    with storage.published_whole(
        config.report_dir,
        replace=True,
        last=REPORT_FILE,
        resume=runners.is_dataflow(config.beam_arguments),
        # An evaluation that fails leaves no report of another model in its place.
        cleared=OURS,
        left_out=[TALLY_FILE],
    ) as staging:
        log.info("scoring %s on the %s images of %s", config.model_dir, f"{size:,}", config.split)
        job = Job(config=config, manifest=manifest, directory=staging)
        work = work_of(config, manifest, staging)
        options = runners.beam_options(config.beam_arguments)
        runners.run(options, lambda root: build(root, job), "evaluate", work)
        with runners.accepting(work):
            # Here, and not in the graph: what draws the page need not be installed on the workers.
            content = write_report(read_tally(staging), config, manifest, staging)
    show(report.text_table(content))
    show(f"{report.title(manifest)}: {config.split} accuracy {content['accuracy']:.4f}")
    html = config.report_dir / PAGE_FILE
    show(f"report: {html} ({html.stat().st_size / 1000:,.0f} kB)")
    return command.DONE


def plan(config: EvaluateConfig, manifest: Manifest) -> dict[str, Any]:
    """What the command would read, write, and send to a service; does none of it."""
    from pipeline.predictions import file_name

    split = manifest.splits[config.split]
    count = len(split.shards)
    predictions = [f"{PREDICTIONS}/{file_name(shard, count)}" for shard in range(count)]
    return {
        "runner": runners.beam_options(config.beam_arguments).get_all_options()["runner"],
        "reads": {
            "models": [str(folder) for folder in (config.model_dir, *config.others)],
            "dataset": str(config.dataset_dir),
            "images": split.num_examples,
            "files": [shard.file for shard in split.shards],
        },
        "writes": {
            "folder": str(config.report_dir),
            "files": [
                *(predictions if config.save_predictions else []),
                *(CLASSES_FILE, CONFUSION_FILE, PAGE_FILE, REPORT_FILE),
            ],
        },
    } | sent(config, manifest)


def sent(config: EvaluateConfig, manifest: Manifest) -> dict[str, Any]:
    """What the command would send to a service."""
    job = Job(config=config, manifest=manifest, directory=config.report_dir)
    options = runners.beam_options(config.beam_arguments)
    work = work_of(config, manifest, config.report_dir)
    return runners.request(options, lambda root: build(root, job), work)


def work_of(config: EvaluateConfig, manifest: Manifest, folder: Place) -> runners.Work:
    """What the graph is run for; the workers' part of it is told by models and rows."""
    folders = (config.model_dir, *config.others)
    asked = {
        "dataset": [str(config.dataset_dir), manifest.dataset_id, config.split],
        "models": [[str(each), models.load_description(each)] for each in folders],
        "predictions": config.save_predictions,
    }
    identity = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]
    return runners.Work(stage=STAGE, output=config.report_dir, folder=folder, identity=identity)


def require_only_ours(directory: Place) -> None:
    """Makes sure that a folder, which is to be replaced, holds nothing but a report.

    Raises:
        OccupiedError: it holds something else, or is a file.
    """
    if directory.is_file():
        raise storage.OccupiedError(f"{directory}: is a file; expected a folder")
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.name not in OURS:
            raise storage.OccupiedError(
                f"{directory}: holds {path.name}, which is no part of a report; expected a folder"
                " of its own, which is replaced as a whole"
            )


def main() -> None:
    """The command."""
    command.run(PROG, parse, execute)


if __name__ == "__main__":
    # By the name that workers can import it by: what is pickled of `__main__` goes by value.
    from pipeline import evaluate

    evaluate.main()
