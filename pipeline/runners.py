"""Which Beam runner, and how its failures are told.

Beam is imported here only where it is used, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.command import InputError

if TYPE_CHECKING:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

# Beam's own `DirectRunner` first tries Prism, a program it downloads; this is the runner that
# runs in the process, and that Beam falls back to.
IN_PROCESS = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"

CONNECT_SECONDS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineMetrics:
    """What a pipeline's steps counted: numbers, and distributions (count, sum, min, max)."""

    counters: dict[str, int]
    distributions: dict[str, dict[str, int]]


def parse_known_args(
    parser: argparse.ArgumentParser, argv: list[str]
) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """Parses a command's own flags, and returns those that are Beam's as they stand.

    They are checked now, so that a bad flag is told before anything is read.

    Raises:
        InputError: Beam does not take one either; see `beam_options`.
    """
    flags, rest = parser.parse_known_args(argv)
    if rest:  # without any, Beam need not be imported yet
        beam_options(rest)
    return flags, tuple(rest)


def beam_options(arguments: Sequence[str]) -> PipelineOptions:
    """Reads what our own flags left over as Beam options.

    Raises:
        InputError: Beam does not know an option either, or refuses its value.
    """
    from apache_beam.options import pipeline_options

    class Strict(pipeline_options._BeamArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(message)

    parser = Strict(allow_abbrev=False)
    for group in pipeline_options.PipelineOptions.__subclasses__():
        group._add_argparse_args(parser)
    _, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise InputError(f"unknown flag {unknown[0]}: neither this command's nor a Beam option")
    options = pipeline_options.PipelineOptions(list(arguments))
    _check_options(options.get_all_options())
    standard = options.view_as(pipeline_options.StandardOptions)
    if (standard.runner or "directrunner").lower() in ("directrunner", "direct"):
        standard.runner = IN_PROCESS
    _check_runner(standard.runner)
    return options


def _check_runner(name: str) -> None:
    """Raises InputError unless there is such a runner, and what it needs is installed."""
    from apache_beam.runners.runner import create_runner

    try:
        create_runner(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise InputError(f"--runner {name}: {str(error).split('. ')[0]}") from None


def _check_options(given: dict[str, Any]) -> None:
    """Refuses what a runner would fail on, deep inside, once the work has begun.

    Raises:
        InputError: a program or job server that is not there, or a number of workers below 0.
    """
    for name in ("prism_location", "flink_job_server_jar"):
        place = given.get(name)
        if place and "://" not in place and not Path(place).is_file():
            raise InputError(f"--{name} {place}: no such file")
    if (given.get("direct_num_workers") or 0) < 0:
        raise InputError(f"--direct_num_workers {given['direct_num_workers']}: expected 0 or more")
    if (given.get("runner") or "").lower() in ("portablerunner", "portable"):
        host, _, port = (given.get("job_endpoint") or "").rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        except (OSError, ValueError) as error:
            raise InputError(
                f"--job_endpoint {given.get('job_endpoint')}: expected the host:port of a job"
                f" server: {error}"
            ) from None


def run(
    options: PipelineOptions, build: Callable[[beam.Pipeline], Any], namespace: str
) -> PipelineMetrics:
    """Builds a pipeline, runs it to its end and returns what it counted in a namespace.

    Raises:
        InputError: there is no such runner, it refuses the options, or a worker met wrong input.
            The type of an exception is lost on its way from another process, so it is
            recognised by its name in the text; Beam adds the step to the message.
        RuntimeError: anything else that failed.
    """
    import apache_beam as beam
    from apache_beam.metrics.metric import MetricsFilter
    from apache_beam.runners.runner import PipelineState

    try:
        pipeline = beam.Pipeline(options=options)
    except (ValueError, ImportError, AttributeError) as error:
        raise InputError(f"Beam refuses its options: {error}") from None
    build(pipeline)
    try:
        result = pipeline.run()
        state = result.wait_until_finish()
    except Exception as error:
        text = f"InputError: {error}" if isinstance(error, InputError) else str(error)
        found = re.search(r"InputError: (.+?)(?: \[while running|\\n|\n|$)", text)
        if found is None:
            if "KeyboardInterrupt" in text:  # which Beam takes for an error of the step
                raise KeyboardInterrupt from None
            raise
        raise InputError(found[1]) from None
    if state != PipelineState.DONE:
        raise RuntimeError(f"the pipeline ended as {state}")
    found = result.metrics().query(MetricsFilter().with_namespace(namespace))
    return PipelineMetrics(
        counters=dict(sorted((entry.key.metric.name, entry.result) for entry in found["counters"])),
        distributions={
            entry.key.metric.name: {
                name: getattr(entry.result, name) for name in ("count", "sum", "min", "max")
            }
            for entry in sorted(found["distributions"], key=lambda entry: entry.key.metric.name)
        },
    )
