"""What a run of the chain starts: the commands of its stages, as far as they are left to do."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence

from pipeline import judging, options, plan, registry, runners, trainers
from pipeline.dataset import load_manifest
from pipeline.plan import REPORT, Request
from pipeline.sources import Source
from pipeline.storage import Place


def dataset_command(request: Request, dataset_dir: Place) -> list[str]:
    """The module that makes the dataset of a run, and its arguments."""
    return [
        "pipeline.preprocess",
        *[f"--source={spec}" for spec in request.sources],
        f"--output_dir={dataset_dir}",
        *options.dataset_arguments(request.preprocess(dataset_dir)),
        *request.beam_arguments,
    ]


def left(
    root: Place,
    request: Request,
    champion: registry.Version | None,
    class_names: Sequence[str] | None = None,
) -> list[list[str]]:
    """The modules that are left to run, each with its arguments, in order.

    Args:
        root: the root.
        request: of the run.
        champion: that its model is compared with, where that can be done.
        class_names: of a dataset that is not there yet; None: taken for those of the champion.
    """
    run_dir = plan.run_folder(root, request.run_id)
    dataset_dir = plan.dataset_folder(root, request.fingerprint)
    found = []
    if (manifest := plan.known_manifest(root, request.fingerprint)) is not None:
        class_names = manifest.class_names
    else:
        found.append(dataset_command(request, dataset_dir))
    if not (run_dir / trainers.EXPORTED).is_file():
        start = root / request.initial_weights if request.initial_weights is not None else None
        found.append(trainers.command_line(root, request, start))
    if class_names is None and champion is not None:
        class_names = champion.class_names
    compared = judging.compared_with(class_names or (), champion)
    is_champion = champion is not None and champion.run_id == request.run_id
    if not is_champion and not judging.compares(plan.read_json(run_dir / REPORT), compared):
        found.append(judging.command_line(root, request, dataset_dir, compared))
    return found


def dataflow_request(commands: Sequence[Sequence[str]], source: Source | None) -> str | None:
    """The exact request for the next job on Dataflow, as JSON; None where there is none yet.

    That of an evaluation is made of its model: it can be told once nothing is left before it.

    Args:
        commands: that are left of a run.
        source: of its dataset, where it is open already.
    """
    if not commands or not runners.is_dataflow(commands[0]):
        return None
    from pipeline import evaluate, preprocess

    module, *arguments = commands[0]
    if module == preprocess.PROG:
        config = dataclasses.replace(preprocess.parse(arguments), dry_run=True)
        sent = preprocess.sent(config, source or options.open_sources_of(config))
    else:
        scored = evaluate.parse(arguments)
        sent = evaluate.sent(scored, load_manifest(scored.dataset_dir))
    return json.dumps(sent, indent=2)


def text(commands: Sequence[Sequence[str]]) -> str:
    """Commands as a shell takes them, a line each."""
    return "\n".join(shlex.join(["python", "-m", *each]) for each in commands)
