"""The stage that trains a run: in a process of its own here, or as a job on Vertex AI."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from pipeline import plan, vertex, vertex_checks, vertex_client, vertex_options
from pipeline.command import InputError
from pipeline.models import MODEL_FILE
from pipeline.plan import Request
from pipeline.stages import trainer_folders
from pipeline.storage import Place
from pipeline.vertex_options import PREFIX, VertexConfig

EXPORTED = f"export/{MODEL_FILE}"  # in a run folder


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say where a run is trained."""
    group = parser.add_argument_group("where it trains")
    group.add_argument(
        "--trainer",
        choices=("local", "vertex"),
        default="local",
        help="in a process here, or as a custom job on Vertex AI (default: %(default)s)",
    )
    vertex_options.add_flags(group)


def vertex_from(flags: argparse.Namespace) -> VertexConfig | None:
    """The config of Vertex AI; None: trained here.

    Raises:
        InputError: flags are missing, wrong, do not go together, or name what a cloud cannot reach.
    """
    given = vertex_options.given(flags)
    if flags.trainer == "vertex":
        return vertex_checks.make_config(given, {"--root": flags.root})
    if given:
        named = ", ".join(f"--{PREFIX}{name}" for name in given)
        raise InputError(f"{named}: expected --trainer vertex beside it")
    return None


def check_vertex(config: VertexConfig, training: Mapping[str, Any], *, dry_run: bool) -> None:
    """Makes sure, before anything is begun, that a training can be submitted.

    Args:
        config: where, and on what.
        training: the trainer's settings.
        dry_run: whether nothing is going to be sent.

    Raises:
        InputError: it cannot.
    """
    vertex_checks.check_training(config, training)
    if not dry_run:
        vertex_client.require_extra()


def job_request(root: Place, request: Request) -> str | None:
    """The exact request for a job, as JSON; None where none would be made."""
    if not request.vertex_arguments or (plan.run_folder(root, request.run_id) / EXPORTED).is_file():
        return None
    start = root / request.initial_weights if request.initial_weights is not None else None
    return vertex.request_text(vertex.parse(command_line(root, request, start)[1:]))


def command_line(root: Place, request: Request, start: Place | None) -> list[str]:
    """The module of the stage, and its arguments.

    Args:
        root: the root.
        request: what is asked of the run.
        start: the model whose weights are the first, if any.
    """
    run_dir = plan.run_folder(root, request.run_id)
    given = [f"--dataset_dir={plan.dataset_folder(root, request.fingerprint)}"]
    if start is not None:
        given.append(f"--initial_weights={start}")
    if not request.vertex_arguments:
        return ["trainer.task", *given, *trainer_folders(run_dir), *request.trainer_arguments]
    place = [f"--run_dir={run_dir}", f"--attempt={request.attempt}", *request.vertex_arguments]
    return ["pipeline.vertex", *given, *place, *request.trainer_arguments]
