"""A training on Vertex AI as a custom job: a pure function from flags to the request.

Nothing here speaks to the service, or needs its client; `vertex` does.

The trainer is told its folders by its own flags, which come before the ``AIP_MODEL_DIR`` and the
like that Vertex AI sets: those follow a layout of its own, and a run folder has one layout wherever
it was trained. The base output directory, from which they follow, is the run folder all the same,
so that the console shows it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from pipeline import storage
from pipeline.stages import trainer_folders
from pipeline.vertex_checks import in_bucket
from pipeline.vertex_options import ATTEMPT_LABEL, RUN_LABEL, VertexConfig

TRAINER = ("python", "-m", "trainer.task")  # as the image has it
MAX_NAME = 128  # characters of a display name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What the job is to train.

    Attributes:
        dataset_dir: the dataset.
        run_dir: the run folder.
        attempt: how often the run had come to an end before.
        initial_weights: the model to start from, if any.
        arguments: of the trainer, beside those.
    """

    dataset_dir: str
    run_dir: str
    attempt: int = 0
    initial_weights: str | None = None
    arguments: Sequence[str] = ()

    @property
    def folder(self) -> str:
        """The run folder as ``gs://bucket/path``, in whichever way it is written."""
        return in_bucket(self.run_dir) or self.run_dir

    @property
    def run_label(self) -> str:
        """Names the run folder among all jobs of a project."""
        return hashlib.sha256(self.folder.encode()).hexdigest()[:32]

    @property
    def display_name(self) -> str:
        """Names the job for people: the run and its attempt."""
        ending = f"-{self.attempt}"
        name = self.run_dir.rstrip("/").rpartition("/")[2]
        return name[: MAX_NAME - len(ending)] + ending


def request(config: VertexConfig, task: Task) -> dict[str, Any]:
    """The request for a custom job, as the service's JSON has it.

    Returns:
        ``parent`` and ``customJob``, the fields of `CreateCustomJobRequest`.
    """
    labels = dict(label.split("=") for label in config.labels)
    labels |= {RUN_LABEL: task.run_label, ATTEMPT_LABEL: str(task.attempt)}
    spec: dict[str, Any] = {
        "workerPoolSpecs": _pools(config, task),
        "scheduling": _scheduling(config),
        "baseOutputDirectory": {"outputUriPrefix": f"{task.folder}/"},
    }
    if config.service_account is not None:
        spec["serviceAccount"] = config.service_account
    if config.network is not None:
        spec["network"] = config.network
    if config.reserved_ip_ranges:
        spec["reservedIpRanges"] = list(config.reserved_ip_ranges)
    if config.network_attachment is not None:
        spec["pscInterfaceConfig"] = {"networkAttachment": config.network_attachment}
    job = {"displayName": task.display_name, "jobSpec": spec, "labels": labels}
    return {"parent": config.parent, "customJob": job}


def _pools(config: VertexConfig, task: Task) -> list[dict[str, Any]]:
    """One machine; or a chief, and a second pool of the other workers: then TF_CONFIG is set."""
    machine: dict[str, Any] = {"machineType": config.machine_type}
    if config.accelerator_type is not None:
        machine["acceleratorType"] = config.accelerator_type
        machine["acceleratorCount"] = config.accelerator_count
    container = {
        "imageUri": config.image,
        "command": list(TRAINER),
        "args": trainer_arguments(task),
    }
    counts = [1] if config.workers == 1 else [1, config.workers - 1]
    return [
        {"machineSpec": machine, "replicaCount": str(count), "containerSpec": container}
        for count in counts
    ]


def trainer_arguments(task: Task) -> list[str]:
    """The command line of ``trainer.task``."""
    start = [] if task.initial_weights is None else [f"--initial_weights={task.initial_weights}"]
    folders = trainer_folders(storage.place(task.run_dir))
    return [f"--dataset_dir={task.dataset_dir}", *folders, *start, *task.arguments]


def _scheduling(config: VertexConfig) -> dict[str, Any]:
    """Of several workers one alone cannot start again: they have to meet anew, all of them."""
    scheduling: dict[str, Any] = {
        "timeout": f"{config.timeout}s",
        "strategy": "SPOT" if config.spot else "STANDARD",
    }
    if config.spot or config.workers > 1:
        scheduling["restartJobOnWorkerRestart"] = True
    return scheduling
