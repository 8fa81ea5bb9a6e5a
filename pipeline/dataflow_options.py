"""Which options a job on Dataflow needs, and what contradicts itself among them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    StandardOptions,
)

from pipeline import gcs
from pipeline.command import InputError
from pipeline.runners import DATAFLOW

CANCEL, DETACH = "cancel", "detach"
PROJECT = re.compile(r"[a-z][-a-z0-9:.]+[a-z0-9]")
JOB_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL = re.compile(r"[a-z][-_a-z0-9]{0,62}=[-_a-z0-9]{0,63}|\{.*\}")
UNLISTED = "disable_logging_submission_environment"  # of Beam's experiments
LOCATIONS = ("temp_location", "staging_location")
# What Beam would take, and what makes no sense of a job that reads a set once and to its end, and
# whose result this command publishes.
MEANINGLESS = (
    "streaming",
    "update",
    "create_from_snapshot",
    "template_location",
    "no_wait_until_finish",
)


class JobOptions(PipelineOptions):
    """What we ask of a job beyond Beam's options; read with them, by every command."""

    @classmethod
    def _add_argparse_args(cls, parser: Any) -> None:
        parser.add_argument("--on_sigterm", choices=(CANCEL, DETACH), default=CANCEL)


def problems(
    given: Mapping[str, Any],
    places: Iterable[tuple[str, str]],
    environ: Mapping[str, str] = os.environ,
) -> list[str]:
    """What is missing, wrong, or contradicts itself in what a job is asked for.

    Args:
        given: all Beam options, by name.
        places: flags with the sources, folders and files that workers read or write.
        environ: where sources say that they are.
    """
    return [*_of_the_job(given), *_of_its_parts(given), *_of_places(places, environ)]


def _of_the_job(given: Mapping[str, Any]) -> Iterator[str]:
    for name in ("project", "region"):
        if not given.get(name):
            yield f"--{name} is missing"
    if (project := given.get("project")) and not PROJECT.fullmatch(project):
        yield f"--project {project}: expected the id of a project"
    if (job := given.get("job_name")) and not JOB_NAME.fullmatch(job):
        yield f"--job_name {job}: expected small letters, digits and dashes, a letter first"
    for label in given.get("labels") or ():
        if not LABEL.fullmatch(label):
            yield f"--labels {label}: expected key=value, in small letters, digits, - and _"
    for name in MEANINGLESS:
        if given.get(name):
            yield f"--{name} has no meaning here"


def _of_its_parts(given: Mapping[str, Any]) -> Iterator[str]:
    named = {name: given[name] for name in LOCATIONS if given.get(name)}
    if not named:
        yield "--temp_location is missing, a folder in gs://"
    for name, text in named.items():
        try:
            if not gcs.parse(text).key:
                yield f"--{name} {text}: expected a folder in the bucket"
        except InputError as error:
            yield f"--{name} {error}"
    image = given.get("sdk_container_image") or given.get("worker_harness_container_image")
    setup = given.get("setup_file")
    if bool(setup) == bool(image):
        found = "both" if setup else "neither"
        yield f"expected one of --setup_file and --sdk_container_image, got {found}"
    if setup and Path(setup).name not in ("setup.py", "pyproject.toml"):
        yield f"--setup_file {setup}: expected a file of the name setup.py"
    elif setup and not Path(setup).is_file():
        yield f"--setup_file {setup}: no such file"
    counts = {name: given.get(name) for name in ("num_workers", "max_num_workers")}
    for name, count in counts.items():
        if count is not None and count < 1:
            yield f"--{name} {count}: expected at least 1"
    first, most = counts.values()
    if first and most and first > most:
        yield f"--num_workers {first} is above --max_num_workers {most}"
    if given.get("worker_region") and given.get("worker_zone"):
        yield "expected one of --worker_region and --worker_zone, got both"


def _of_places(places: Iterable[tuple[str, str]], environ: Mapping[str, str]) -> Iterator[str]:
    local = [f"{flag} {text}" for flag, text in places if is_local(flag, text, environ)]
    if local:
        hint = " (TFDS_DATA_DIR)" if any(" tfds:" in name for name in local) else ""
        yield f"{', '.join(local)}: local, and workers need gs://{hint}"


def is_local(flag: str, text: str, environ: Mapping[str, str]) -> bool:
    """Whether a folder or file, or what a source is read from, is on this machine alone."""
    if flag == "--source":
        kind, _, text = text.partition(":")
        if kind == "auto":
            text = environ.get("MNIST_IDX_DIR", "")
        if kind == "tfds" or not text:
            text = environ.get("TFDS_DATA_DIR", "")
        if kind == "digits":  # come with a package
            return False
    return not text.startswith(gcs.SCHEME)


def complete(options: PipelineOptions) -> None:
    """Fills in what follows from other options, so that a job is the same wherever it is sent."""
    options.view_as(StandardOptions).runner = DATAFLOW
    cloud = options.view_as(GoogleCloudOptions)
    cloud.temp_location = cloud.temp_location or cloud.staging_location
    cloud.staging_location = cloud.staging_location or cloud.temp_location
    setup = options.view_as(SetupOptions)
    if setup.save_main_session is None:  # as on other runners: all that is run can be imported
        setup.save_main_session = False
    if setup.setup_file:  # Beam goes to its folder, and looks for it from there
        setup.setup_file = str(Path(setup.setup_file).resolve())
    else:  # an image
        # A list of the packages here, of which the image has its own; and where workers would put
        # it may be root's alone.
        options.view_as(DebugOptions).add_experiment(UNLISTED)
