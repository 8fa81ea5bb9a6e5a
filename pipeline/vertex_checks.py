"""Which configs of a training on Vertex AI make sense; what does not is told before it costs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.command import InputError
from pipeline.gcs import SCHEME
from pipeline.vertex_options import ATTEMPT_LABEL, PREFIX, RUN_LABEL, VertexConfig

REQUIRED = ("project", "region", "image")
MOUNTS = "/gcs/"  # where its machines have every bucket
MAX_LABELS = 64

# Of its `AcceleratorType` what TensorFlow's mirrored strategies train on.
ACCELERATORS = (
    "NVIDIA_TESLA_K80", "NVIDIA_TESLA_P100", "NVIDIA_TESLA_V100", "NVIDIA_TESLA_P4",
    "NVIDIA_TESLA_T4", "NVIDIA_TESLA_A100", "NVIDIA_A100_80GB", "NVIDIA_L4", "NVIDIA_H100_80GB",
    "NVIDIA_H100_MEGA_80GB", "NVIDIA_H200_141GB", "NVIDIA_B200", "NVIDIA_GB200",
    "NVIDIA_RTX_PRO_6000",
)  # fmt: skip
WITH_GPUS = re.compile(r"(a2|a3|a4|a4x|g2|g4)-")  # machines that are not to be had without
WITHOUT_GPUS = re.compile(r"(c2|c2d|c3|c3d|c4|e2|m1|m2|m3|n2|n2d|n4|t2d)-")

LABEL_KEY = re.compile(r"[a-z][a-z0-9_-]{0,62}")
LABEL_VALUE = re.compile(r"[a-z0-9_-]{0,63}")
PATTERNS = {
    "project": (r"[a-z][a-z0-9.:-]{4,61}[a-z0-9]|[0-9]+", "the id of a project"),
    "region": (r"[a-z]+(-[a-z]+)+[0-9]+", "a region such as us-central1"),
    "image": (r"[^\s/]+/[^\s]+", "an image such as us-docker.pkg.dev/PROJECT/REPOSITORY/IMAGE:TAG"),
    "machine_type": (r"[a-z][a-z0-9]*(-[a-z0-9]+)+", "a machine type such as n1-standard-4"),
    "accelerator_type": ("|".join(ACCELERATORS), "one of " + ", ".join(ACCELERATORS)),
    "service_account": (r"[^\s@]+@[^\s@]+", "the address of a service account"),
    "network": (r"projects/[0-9]+/global/networks/[a-z0-9-]+",
                "projects/NUMBER/global/networks/NAME"),
    "network_attachment": (r"projects/[^/\s]+/regions/[^/\s]+/networkAttachments/[^/\s]+",
                           "projects/PROJECT/regions/REGION/networkAttachments/NAME"),
    "endpoint": (r"https?://[^\s/]+", "https://host, or http://host:port of a stand-in"),
}  # fmt: skip


def make_config(values: Mapping[str, Any], folders: Mapping[str, str]) -> VertexConfig:
    """Makes a config of what was given.

    Args:
        values: of the flags; see `given`.
        folders: that its machines have to reach, by the flags that name them.

    Raises:
        InputError: something is missing, wrong, or does not go together; names all of it.
    """
    problems = [*_missing(values), *_wrong(values), *_contradictions(values)]
    problems += [
        f"{flag} {folder}: expected gs://bucket/folder or {MOUNTS}bucket/folder, which machines of"
        " Vertex AI can reach"
        for flag, folder in folders.items()
        if in_bucket(folder) is None
    ]
    if problems:
        raise InputError("; ".join(problems))
    return VertexConfig(**{"accelerator_count": _usual_count(values), **values})


def _usual_count(values: Mapping[str, Any]) -> int:
    """How many GPUs a machine has unless another number is given."""
    if values.get("accelerator_type") is None:
        return 0
    return _count_in_name(values.get("machine_type", "")) or 1


def _count_in_name(machine_type: str) -> int | None:
    """The GPUs of ``a2-highgpu-4g``: 4. Of other machines the name does not tell."""
    found = re.fullmatch(r".*-(\d+)g", machine_type)
    return int(found[1]) if found else None


def _missing(values: Mapping[str, Any]) -> Iterator[str]:
    if missing := [f"--{PREFIX}{name}" for name in REQUIRED if name not in values]:
        yield f"{', '.join(missing)}: missing"


def _wrong(values: Mapping[str, Any]) -> Iterator[str]:
    for name, (pattern, expected) in PATTERNS.items():
        if name in values and not re.fullmatch(pattern, values[name]):
            yield f"--{PREFIX}{name} {values[name]}: expected {expected}"
    for label in values.get("labels", ()):
        key, equals, value = label.partition("=")
        if not equals or not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
            yield (
                f"--{PREFIX}labels {label}: expected key=value, of small letters, digits, '_' and"
                " '-', up to 63 each"
            )
        elif key in (RUN_LABEL, ATTEMPT_LABEL):
            yield f"--{PREFIX}labels {label}: this label is the job's own"
    if len(values.get("labels", ())) > MAX_LABELS - 2:
        yield f"--{PREFIX}labels: expected at most {MAX_LABELS - 2}"


def _contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    machine = values.get("machine_type", VertexConfig.machine_type)
    kind, count = values.get("accelerator_type"), values.get("accelerator_count")
    if kind is None and WITH_GPUS.match(machine):
        yield f"--{PREFIX}machine_type {machine}: expected its --{PREFIX}accelerator_type beside it"
    elif kind is None and count is not None:
        yield f"--{PREFIX}accelerator_count {count}: expected --{PREFIX}accelerator_type beside it"
    if kind is not None and WITHOUT_GPUS.match(machine):
        yield f"--{PREFIX}accelerator_type {kind}: a machine {machine} takes none"
    named = _count_in_name(machine)
    if count is not None and named is not None and count != named:
        yield f"--{PREFIX}accelerator_count {count}: a machine {machine} has {named}"
    if "reserved_ip_ranges" in values and "network" not in values:
        yield f"--{PREFIX}reserved_ip_ranges: expected --{PREFIX}network beside it"
    if "network_attachment" in values and "network" in values:
        yield f"--{PREFIX}network and --{PREFIX}network_attachment: expected at most one of them"


def check_training(config: VertexConfig, training: Mapping[str, Any]) -> None:
    """Makes sure that what is to be trained suits the machines.

    Args:
        config: of the machines.
        training: the trainer's settings.

    Raises:
        InputError: it does not; the trainer would say so there, minutes later.
    """
    replicas = training.get("replicas")
    alone_on_cpu = config.workers == 1 and not config.accelerator_count
    if replicas is not None and not alone_on_cpu:
        least = 1 if config.workers == 1 else config.devices
        if not least <= replicas <= config.devices:
            raise InputError(
                f"--replicas {replicas}: the workers on Vertex AI have {config.devices} devices"
            )
    used = replicas or config.devices
    if training["batch_size"] % used:
        raise InputError(
            f"--batch_size {training['batch_size']}: expected a multiple of the {used} replicas on"
            " Vertex AI"
        )


def in_bucket(folder: str) -> str | None:
    """The ``gs://`` name of a folder in a bucket, mounted or not; None: it is in none."""
    if folder.startswith(SCHEME):
        return folder.rstrip("/")
    path = os.path.normpath(folder)
    return SCHEME + path.removeprefix(MOUNTS) if path.startswith(MOUNTS) else None
