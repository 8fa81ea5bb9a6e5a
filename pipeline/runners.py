"""Which Beam runner, and how its failures are told.

Beam is imported here only where it is used, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.command import InputError, LockedError, UnreachableError, full_disk

if TYPE_CHECKING:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    from pipeline.storage import Place

# Beam's own `DirectRunner` first tries Prism, a program it downloads; this is the runner that
# runs in the process, and that Beam falls back to.
IN_PROCESS = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"

DATAFLOW = "DataflowRunner"

CONNECT_SECONDS = 5
# Errors of ours as another process tells them: by name, and what each is here.
KINDS = {
    "UnreachableError": UnreachableError,
    "LockedError": LockedError,
    "ChangedError": LockedError,
    "OccupiedError": InputError,
    "InputError": InputError,
}
TOLD = re.compile(rf"({'|'.join(KINDS)}): (.+?)(?: \[while running|\\n|\n|$)")

HELP = """\
every other flag goes to Beam, among them
  --runner NAME          DirectRunner (in this process; the default), DataflowRunner, ...
  --direct_num_workers N --direct_running_mode multi_processing
  --project ID --region NAME --temp_location gs://... (or --staging_location)
  --setup_file ./setup.py | --sdk_container_image IMAGE     how Dataflow's workers get this code
  --num_workers N --max_num_workers N --autoscaling_algorithm NONE --machine_type NAME
  --label key=value --service_account_email NAME --no_use_public_ips --subnetwork NAME
  --on_sigterm cancel|detach    what becomes of a Dataflow job when this command is told to
                         stop; a detached one is taken up again by the same command"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineMetrics:
    """What a pipeline's steps counted: numbers, and distributions (count, sum, min, max)."""

    counters: dict[str, int]
    distributions: dict[str, dict[str, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a pipeline is run for: by it, a service knows its job.

    Attributes:
        stage: in one word.
        output: where the result is found in the end.
        folder: where workers write until it is published.
        identity: equal where the result is.
    """

    stage: str
    output: object
    folder: Place | None = None
    identity: str = ""


def parse_known_args(
    parser: argparse.ArgumentParser,
    argv: list[str],
    places: Callable[[argparse.Namespace], Iterable[tuple[str, str]]] = lambda _: (),
) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """Parses a command's own flags, and returns those that are Beam's as they stand.

    They are checked now, so that a bad flag is told before anything is read.

    Args:
        parser: the command's own.
        argv: the command line.
        places: flags, and what they name, that workers read or write.

    Raises:
        InputError: Beam does not take one either; see `beam_options`, `require_complete`.
    """
    parser.add_argument_group("Beam", HELP)
    flags, rest = parser.parse_known_args(argv)
    if rest:  # without any, Beam need not be imported yet
        require_complete(rest, places(flags))
    return flags, tuple(rest)


def is_dataflow(arguments: Sequence[str]) -> bool:
    """Whether a job is submitted to Dataflow; told without Beam."""
    return _runner_of(arguments) in ("dataflow", "dataflowrunner")


def _runner_of(arguments: Sequence[str]) -> str:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--runner", nargs="?")
    name = parser.parse_known_args(list(arguments))[0].runner or ""
    return name.rpartition(".")[2].lower()


def require_complete(arguments: Sequence[str], places: Iterable[tuple[str, str]]) -> None:
    """Makes sure that a runner gets all it needs; names all that is wrong in one line.

    Args:
        arguments: for Beam.
        places: flags, and what they name, that workers read or write.

    Raises:
        InputError: it does not.
    """
    options = beam_options(arguments)
    if is_dataflow(arguments):
        from pipeline import dataflow_options

        if found := dataflow_options.problems(options.get_all_options(), places):
            raise InputError(f"--runner {DATAFLOW}: {'; '.join(found)}")


def _require_extra() -> None:
    try:
        found = importlib.util.find_spec("google.cloud.dataflow")
    except ImportError:
        found = None
    if found is None:
        raise InputError(
            f"--runner {DATAFLOW} needs the cloud extra: pip install 'digits-pipeline[cloud]'"
        )


def beam_options(arguments: Sequence[str]) -> PipelineOptions:
    """Reads what our own flags left over as Beam options.

    Raises:
        InputError: Beam does not know an option either, or refuses its value, or the runner is
            not installed.
    """
    if _runner_of(arguments) == "testdataflowrunner":  # it would skip all that is checked here
        raise InputError(f"--runner TestDataflowRunner: is for Beam's own tests; try {DATAFLOW}")
    if is_dataflow(arguments):
        _require_extra()
    from apache_beam.options import pipeline_options

    from pipeline import dataflow_options  # whose own are then among Beam's

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
    elif is_dataflow(arguments):
        dataflow_options.complete(options)
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
    options: PipelineOptions,
    build: Callable[[beam.Pipeline], Any],
    namespace: str,
    work: Work | None = None,
) -> PipelineMetrics:
    """Builds a pipeline, runs it to its end and returns what it counted in a namespace.

    Args:
        options: from `beam_options`.
        build: makes the graph.
        namespace: of the counters.
        work: what it is for; a service has to know.

    Raises:
        InputError: there is no such runner, it refuses the options, or a worker met wrong input,
            a silent server or a lock of others. The type of an exception is lost on its way from
            another process, so it is recognised by its name in the text; Beam adds the step to
            the message.
        RuntimeError: anything else that failed.
    """
    pipeline = _built(options, build)
    if options.get_all_options()["runner"] == DATAFLOW:
        from pipeline import dataflow

        assert work is not None
        return _counted(dataflow.run(pipeline, work), namespace)
    return _counted(_run_here(pipeline), namespace)


@contextlib.contextmanager
def accepting(work: Work) -> Iterator[None]:
    """Inside, what a pipeline has made is looked at: what is wrong with it is not taken up again.

    Nothing is where a server is silent, another process has taken over, or there is no room here.
    """
    try:
        yield
    except (UnreachableError, LockedError):
        raise
    except Exception as error:
        if full_disk(error) is None:
            from pipeline import dataflow_notes

            with contextlib.suppress(InputError):
                dataflow_notes.remove(work)
        raise


def request(
    options: PipelineOptions, build: Callable[[beam.Pipeline], Any], work: Work
) -> dict[str, Any]:
    """What `run` would send to a service, and what it would stage; nothing where none is asked."""
    if options.get_all_options()["runner"] != DATAFLOW:
        return {}
    from pipeline import dataflow

    return dataflow.describe(_built(options, build), work)


def _built(options: PipelineOptions, build: Callable[[beam.Pipeline], Any]) -> beam.Pipeline:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import TestOptions

    if options.get_all_options()["runner"] == DATAFLOW:
        # Else Beam asks for the bucket itself, which takes more rights than a job needs.
        options.view_as(TestOptions).dry_run = True
    try:
        pipeline = beam.Pipeline(options=options)
    except (ValueError, ImportError, AttributeError) as error:
        raise InputError(f"Beam refuses its options: {error}") from None
    build(pipeline)
    return pipeline


def _run_here(pipeline: beam.Pipeline) -> Any:
    """Runs a pipeline where it is started from, and returns its metrics (Beam's)."""
    from apache_beam.runners.runner import PipelineState

    try:
        result = pipeline.run()
        state = result.wait_until_finish()
    except Exception as error:
        text = str(error)
        if isinstance(error, InputError):
            text = f"{next(name for name in KINDS if isinstance(error, KINDS[name]))}: {text}"
        if (found := error_in(text)) is None:
            if "KeyboardInterrupt" in text:  # which Beam takes for an error of the step
                raise KeyboardInterrupt from None
            raise
        raise found from None
    if state != PipelineState.DONE:
        raise RuntimeError(f"the pipeline ended as {state}")
    return result.metrics()


def error_in(text: str) -> InputError | None:
    """The error of ours that a text from another process tells of."""
    found = TOLD.search(text)
    return found and KINDS[found[1]](found[2])


def _counted(metrics: Any, namespace: str) -> PipelineMetrics:
    from apache_beam.metrics.metric import MetricsFilter

    found = metrics.query(MetricsFilter().with_namespace(namespace))
    return PipelineMetrics(
        counters=dict(sorted((entry.key.metric.name, entry.result) for entry in found["counters"])),
        distributions={
            entry.key.metric.name: {
                name: getattr(entry.result, name) for name in ("count", "sum", "min", "max")
            }
            for entry in sorted(found["distributions"], key=lambda entry: entry.key.metric.name)
        },
    )
