"""Stage 2 on Vertex AI: trainer.task as a custom job, followed to its end.

python -m pipeline.vertex --vertex_project my-project --vertex_region us-central1
    --vertex_image us-docker.pkg.dev/my-project/digits/digits-pipeline:latest
    --dataset_dir gs://bucket/mnist --run_dir gs://bucket/run

Takes the flags of trainer.task as well. Ends as the job does: 0, the trainer's own exit code, or
143 where it was cancelled, which SIGTERM does. Killed and given again, the same command finds the
job that is at work for this run folder, and follows that one.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from pipeline import command, models, storage, vertex_checks, vertex_job, vertex_options
from pipeline.command import InputError, log, show
from pipeline.models import MODEL_FILE
from pipeline.stages import StageError, ask_trainer
from pipeline.vertex_client import JobError, Service
from pipeline.vertex_follow import Training
from pipeline.vertex_job import Task
from pipeline.vertex_options import VertexConfig

PROG = "pipeline.vertex"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VertexTask:
    """The flags of this stage.

    Attributes:
        vertex: where, and on what.
        task: what is to be trained there.
        dry_run: whether to print the request alone.
    """

    vertex: VertexConfig
    task: Task
    dry_run: bool


def make_parser() -> command.Parser:
    """The flags of this stage; every other one is the trainer's."""
    parser = command.Parser(PROG, __doc__)
    parser.add_argument("--dataset_dir", required=True, metavar="DIR", help="gs://bucket/dataset")
    parser.add_argument("--run_dir", required=True, metavar="DIR", help="gs://bucket/run")
    parser.add_argument("--initial_weights", metavar="DIR", help="see trainer.task")
    parser.add_argument(
        "--attempt",
        type=command.natural,
        default=0,
        metavar="N",
        help="how often this run had come to an end before (default: 0)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print the exact request, and send nothing"
    )
    vertex_options.add_flags(parser.add_argument_group("Vertex AI"))
    return parser


def parse(argv: list[str]) -> VertexTask:
    """Parses the command line."""
    flags, rest = make_parser().parse_known_args(argv)
    folders = {"--dataset_dir": flags.dataset_dir, "--run_dir": flags.run_dir}
    if flags.initial_weights is not None:
        folders["--initial_weights"] = flags.initial_weights
    return VertexTask(
        vertex=vertex_checks.make_config(vertex_options.given(flags), folders),
        task=Task(
            dataset_dir=flags.dataset_dir,
            run_dir=flags.run_dir,
            attempt=flags.attempt,
            initial_weights=flags.initial_weights,
            arguments=tuple(rest),
        ),
        dry_run=flags.dry_run,
    )


def request_text(config: VertexTask) -> str:
    """The exact request, as JSON."""
    return json.dumps(vertex_job.request(config.vertex, config.task), indent=2)


def execute(config: VertexTask) -> int:
    """Runs the stage."""
    task = config.task
    initial = task.initial_weights if not config.dry_run else None  # which would be looked at
    try:
        training = ask_trainer(
            [*task.arguments, *([] if initial is None else [f"--initial_weights={initial}"])]
        )
    except StageError as error:
        raise JobError(f"{error}; nothing was submitted") from None
    if training.rest:
        raise InputError(f"unknown flag {training.rest[0]}: neither this stage's nor the trainer's")
    vertex_checks.check_training(config.vertex, training.config)
    if config.dry_run:
        show(request_text(config))
        return command.DONE
    if is_trained(task.run_dir, training.config):
        log.info("%s: already trained and exported", task.run_dir)
        return command.DONE
    return Training(Service(config.vertex), config.vertex, task).finish()


def is_trained(run_dir: str, asked: dict[str, Any]) -> bool:
    """Whether a run folder holds this very training's model, whole; in doubt, the trainer tells."""
    folder = storage.place(run_dir) / "export"
    path = folder / MODEL_FILE
    if not path.is_file() or models.damage(folder) is not None:
        return False
    try:
        found = json.loads(path.read_text())["config"]
        return found["epochs"] >= asked["epochs"] and all(
            found[name] == value
            for name, value in asked.items()
            if value not in (None, "auto") and name != "epochs"
        )
    except (ValueError, TypeError, KeyError):
        return False


def main() -> None:
    """The command."""
    command.run(PROG, parse, execute)


if __name__ == "__main__":
    main()
