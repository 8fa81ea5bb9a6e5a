"""Where, and on what, a training on Vertex AI is to run: its flags, and the config they make."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from pipeline.command import above_zero, positive_int

PREFIX = "vertex_"  # of the flags
RUN_LABEL = "digits_run"
ATTEMPT_LABEL = "digits_attempt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VertexConfig:
    """The flags of a training on Vertex AI.

    Attributes:
        machine_type: of each worker.
        accelerator_type: its GPUs; None: none.
        accelerator_count: how many each worker has.
        workers: machines that train together.
        spot: on machines that may be taken away, and are then replaced.
        timeout: seconds that the job may run.
        service_account: as whom it runs; None: Vertex AI's own for custom code.
        network: to peer with, if any.
        reserved_ip_ranges: of that network, to take addresses from.
        network_attachment: to reach a network through, if any.
        labels: of the job, beside our own.
        poll_seconds: the longest pause between two questions about the job's state.
        patience_seconds: how long to go on asking a service that does not answer.
        endpoint: of the service; None: the region's own.
    """

    project: str
    region: str
    image: str
    machine_type: str = "n1-standard-4"
    accelerator_type: str | None = None
    accelerator_count: int = 0
    workers: int = 1
    spot: bool = False
    timeout: int = 86_400
    service_account: str | None = None
    network: str | None = None
    reserved_ip_ranges: tuple[str, ...] = ()
    network_attachment: str | None = None
    labels: tuple[str, ...] = ()
    poll_seconds: float = 30.0
    patience_seconds: float = 1800.0
    endpoint: str | None = None

    @property
    def parent(self) -> str:
        """Where its jobs are, as the service names it."""
        return f"projects/{self.project}/locations/{self.region}"

    @property
    def devices(self) -> int:
        """The GPUs of all workers, or their CPUs where they have none."""
        return self.workers * max(1, self.accelerator_count)


def parts(text: str) -> tuple[str, ...]:
    """Parses ``A,B``."""
    return tuple(text.split(","))


# A flag that is not given is None: what else one may be, its config says.
FLAGS: dict[str, dict[str, Any]] = {
    "project": {"metavar": "ID", "help": "the project that it runs in"},
    "region": {"metavar": "NAME", "help": "where: us-central1, europe-west4, ..."},
    "image": {"metavar": "URI", "help": "this job's image, in Artifact Registry"},
    "machine_type": {
        "metavar": "TYPE",
        "help": f"of each worker (default: {VertexConfig.machine_type})",
    },
    "accelerator_type": {"metavar": "TYPE", "help": "its GPUs: NVIDIA_L4, ... (default: none)"},
    "accelerator_count": {
        "type": positive_int,
        "metavar": "N",
        "help": "GPUs of each worker (default: as many as the machine type names, else 1)",
    },
    "workers": {
        "type": positive_int,
        "metavar": "N",
        "help": "machines that train together, the first of them the chief (default: 1)",
    },
    "spot": {
        "action": "store_const",
        "const": True,
        "help": "on spot machines: cheaper, may be taken away; the training then starts again"
        " from its last checkpoint",
    },
    "timeout": {
        "type": positive_int,
        "metavar": "SECONDS",
        "help": f"after which the job is ended (default: {VertexConfig.timeout})",
    },
    "service_account": {"metavar": "EMAIL", "help": "as whom it runs"},
    "network": {"metavar": "NAME", "help": "a VPC network to peer with, by its full name"},
    "reserved_ip_ranges": {
        "type": parts,
        "metavar": "NAME,...",
        "help": "ranges of that network to take addresses from",
    },
    "network_attachment": {
        "metavar": "NAME",
        "help": "a network attachment to reach a VPC network through, by its full name",
    },
    "labels": {"type": parts, "metavar": "KEY=VALUE,...", "help": "of the job"},
    "poll_seconds": {
        "type": above_zero("seconds"),
        "metavar": "X",
        "help": "the longest pause between two questions about its state"
        f" (default: {VertexConfig.poll_seconds:g})",
    },
    "patience_seconds": {
        "type": above_zero("seconds"),
        "metavar": "X",
        "help": "how long to go on asking a service that does not answer"
        f" (default: {VertexConfig.patience_seconds:g})",
    },
    "endpoint": {
        "metavar": "URL",
        "help": "of the service; a stand-in at http://host:port is sent no credentials"
        " (default: the region's own)",
    },
}


def add_flags(parser: argparse._ActionsContainer) -> None:
    """Adds the flags of a `VertexConfig`."""
    for name, keywords in FLAGS.items():
        parser.add_argument(f"--{PREFIX}{name}", **keywords)


def given(flags: argparse.Namespace) -> dict[str, Any]:
    """What was given of the flags of `add_flags`, by the names of `VertexConfig`."""
    values = {name: getattr(flags, PREFIX + name) for name in FLAGS}
    return {name: value for name, value in values.items() if value is not None}


def arguments(config: VertexConfig) -> list[str]:
    """The flags of `add_flags` that make this config again."""
    made = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        flag = f"--{PREFIX}{field.name}"
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        made.append(flag if value is True else f"{flag}={text}")
    return made
