import apache_beam as beam
import pytest
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import (
    DirectOptions,
    GoogleCloudOptions,
    StandardOptions,
    WorkerOptions,
)
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.runner import create_runner

from pipeline import runners
from pipeline.command import InputError, LockedError, UnreachableError
from pipeline.gcs import ChangedError, GcsPath
from pipeline.storage import OccupiedError


@pytest.mark.parametrize(
    "arguments",
    [[], ["--runner=DirectRunner"], ["--runner", "directrunner"], ["--runner=direct"]],
    ids=lambda arguments: " ".join(arguments) or "none",
)
def test_direct_runner_is_the_one_in_the_process(arguments):
    runner = runners.beam_options(arguments).view_as(StandardOptions).runner
    assert isinstance(create_runner(runner), FnApiRunner)


@pytest.mark.parametrize(
    "name",
    ["PrismRunner", pytest.param("DataflowRunner", marks=pytest.mark.cloud), "FlinkRunner"],
)
def test_other_runners_are_left_as_they_are(name):
    assert runners.beam_options([f"--runner={name}"]).view_as(StandardOptions).runner == name


def test_options_reach_beam():
    options = runners.beam_options(
        ["--direct_num_workers", "3", "--project=p", "--max_num_workers=9", "--streaming"]
    )
    assert options.view_as(DirectOptions).direct_num_workers == 3
    assert options.view_as(GoogleCloudOptions).project == "p"
    assert options.view_as(WorkerOptions).max_num_workers == 9
    assert options.view_as(StandardOptions).streaming is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no_such_flag"], "unknown flag --no_such_flag: neither this command's nor a Beam"),
        (["--no_such_flag=3", "--other"], "unknown flag --no_such_flag=3"),
        (["stray"], "unknown flag stray"),
        (["--direct_num_worker=2"], "unknown flag --direct_num_worker=2"),  # no abbreviation
        (["--direct_num_workers=two"], "argument --direct_num_workers: invalid int value: 'two'"),
        (["--direct_num_workers"], "argument --direct_num_workers: expected one argument"),
        (["--direct_running_mode=fast"], "argument --direct_running_mode: invalid choice: 'fast'"),
    ],
)
def test_options_that_beam_does_not_take(arguments, message):
    with pytest.raises(InputError) as caught:
        runners.beam_options(arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--runner=NoSuchRunner", "Unexpected pipeline runner: NoSuchRunner"),
        ("--runner=no_such_module.Runner", "No module named 'no_such_module'"),
        ("--runner=os.path.NoSuchRunner", "no attribute 'NoSuchRunner'"),
    ],
)
def test_a_runner_that_does_not_exist_is_refused_before_anything_is_read(argument, message):
    with pytest.raises(InputError, match="--runner ") as caught:
        runners.beam_options([argument])
    assert message in str(caught.value)


def test_options_that_the_runner_refuses():
    options = runners.beam_options(["--type_check_additional=nothing"])
    with pytest.raises(InputError, match=r"Beam refuses its options: [^:]+: \nUnrecognized"):
        runners.run(options, lambda _: pytest.fail("was built"), "any")


def run(function, *arguments):
    return runners.run(
        runners.beam_options(arguments),
        lambda root: root | beam.Create([1, 2, 3]) | beam.Map(function),
        "any",
    )


def test_metrics_of_one_namespace():
    def counted(n):
        Metrics.counter("any", "rows").inc()
        Metrics.counter("any", "sum").inc(n)
        Metrics.counter("another", "rows").inc()
        Metrics.distribution("any", "sizes").update(10 * n)

    assert run(counted) == runners.PipelineMetrics(
        counters={"rows": 3, "sum": 6},
        distributions={"sizes": {"count": 3, "sum": 60, "min": 10, "max": 30}},
    )
    assert run(lambda n: n) == runners.PipelineMetrics(counters={}, distributions={})


@pytest.mark.parametrize(
    "message",
    [
        "/data/x.gz: cannot be read: 'what' [1]",
        "shard 7: label 12, expected 0 to 9 (see: the InputError above)",
        "some/file: 2 x 3 = 6",
        "één [with brackets] and {braces}",
    ],
)
def test_input_error_on_a_worker_stays_one(message):
    def fail(n):
        if n == 2:
            raise InputError(message)

    with pytest.raises(InputError) as caught:
        run(fail)
    assert str(caught.value) == message


@pytest.mark.parametrize("flags", [(), ("--direct_running_mode=multi_threading",)])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UnreachableError("gs://b/k: no answer"), UnreachableError),
        (LockedError("gs://b/k: another"), LockedError),
        (ChangedError(GcsPath("b", "k")), LockedError),
        (OccupiedError("gs://b/k: holds files"), InputError),
    ],
)
def test_errors_of_servers_and_locks_stay_what_they_are(error, kind, flags):
    def fail(_):
        raise error

    with pytest.raises(InputError) as caught:
        run(fail, *flags)
    assert (type(caught.value), str(caught.value)) == (kind, str(error))


def test_input_error_of_another_thread_or_process_stays_one():
    def fail(_):
        raise InputError("a/b: 'quoted' text")

    with pytest.raises(InputError) as caught:
        run(fail, "--direct_running_mode=multi_threading", "--direct_num_workers=2")
    assert str(caught.value) == "a/b: 'quoted' text"


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError])
def test_other_errors_stay_failures_of_the_job(error):
    def fail(_):
        raise error("broken")

    with pytest.raises(Exception, match="broken") as caught:
        run(fail)
    assert not isinstance(caught.value, InputError)


def test_pipeline_that_does_not_end_well(monkeypatch):
    class Result:
        def wait_until_finish(self):
            return "CANCELLED"

    monkeypatch.setattr(beam.Pipeline, "run", lambda self: Result())
    with pytest.raises(RuntimeError, match="the pipeline ended as CANCELLED"):
        run(lambda n: n)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--runner=PrismRunner", "--prism_location=/none/prism"],
        ["--runner=FlinkRunner", "--flink_job_server_jar=/none/server.jar"],
        ["--runner=PortableRunner"],
        ["--runner=PortableRunner", "--job_endpoint=localhost:1"],
        ["--runner=PortableRunner", "--job_endpoint=nowhere"],
        ["--direct_num_workers=-3"],
    ],
    ids=" ".join,
)
def test_what_a_runner_would_fail_on_is_refused_before(arguments):
    with pytest.raises(InputError, match=r"expected|no such file") as caught:
        runners.beam_options(arguments)
    assert "\n" not in str(caught.value)


def interrupt(_):
    raise KeyboardInterrupt


def test_an_interrupt_is_one_and_no_failure_of_a_step():
    def build(root):
        return root | beam.Create([1]) | beam.Map(interrupt)

    with pytest.raises(KeyboardInterrupt):
        runners.run(runners.beam_options([]), build, "n")
