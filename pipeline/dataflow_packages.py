"""The packages that Dataflow's workers install beside the code of ``--setup_file``.

Left alone, pip would take the newest of each on the day of the job. It is told the versions that
are installed here: what was tried is what runs.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions, WorkerOptions
from apache_beam.runners.portability.stager import SKIP_REQUIREMENTS_CACHE
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.command import log

NAME, EXTRA = "digits-pipeline", "cloud"  # which the image of Dataflow's workers has as well
FILE = "requirements.txt"


def pins() -> list[str]:
    """``name==version`` of all that this program needs, in order; none if it is not installed."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    left = [(NAME, ""), (NAME, EXTRA)]
    while left:
        name, extra = found = left.pop()
        if found in seen:
            continue
        seen.add(found)
        try:
            here = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # not needed on this machine
            continue
        versions[name] = here.version
        for needed in map(Requirement, here.requires or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                other = canonicalize_name(needed.name)
                left += [(other, ""), *((other, each) for each in needed.extras)]
    versions.pop(NAME, None)
    return [f"{name}=={version}" for name, version in sorted(versions.items())]


def ask_for(options: PipelineOptions, scratch: Path) -> None:
    """Has Beam stage the versions that are here beside the code, unless told others.

    Args:
        options: of the job.
        scratch: a folder that stays until all is staged.
    """
    setup = options.view_as(SetupOptions)
    if setup.setup_file is None:
        return
    if options.view_as(WorkerOptions).use_public_ips is False:
        log.warning(
            "--setup_file with --no_use_public_ips: workers install packages from the internet,"
            " which takes a Cloud NAT in their network; with --sdk_container_image they need none"
        )
    if setup.requirements_file is not None:
        return
    if not (found := pins()):
        log.warning("%s is not installed here: workers take the newest packages", NAME)
        return
    path = scratch / FILE
    path.write_text("".join(f"{line}\n" for line in found))
    # No packages are downloaded here: those for this machine may not be for a worker's.
    setup.requirements_file, setup.requirements_cache = str(path), SKIP_REQUIREMENTS_CACHE


def forget(options: PipelineOptions, scratch: Path) -> None:
    """Takes that back: the request for a job names no file of this machine."""
    setup = options.view_as(SetupOptions)
    if setup.requirements_file == str(scratch / FILE):
        setup.requirements_file = setup.requirements_cache = None
