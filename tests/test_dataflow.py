"""What needs no cloud: options, states, what is made of a job's words, and following one.

`test_dataflow_jobs.py` submits jobs.
"""

import dataclasses
import importlib.metadata
import logging
import os
import signal
import time
from pathlib import Path

import helpers
import memory_bucket
import pytest
from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    StandardOptions,
)

from pipeline import (
    dataflow,
    dataflow_follow,
    dataflow_notes,
    dataflow_options,
    dataflow_packages,
    gcs,
    gcs_publish,
    runners,
)
from pipeline.command import (
    FailedError,
    InputError,
    LockedError,
    StoppedError,
    UnreachableError,
)
from pipeline.gcs import GcsPath
from pipeline.interrupts import Interrupts

ENOUGH = {
    "project": "my-project-1",
    "region": "europe-west1",
    "temp_location": "gs://bucket/temp",
    "sdk_container_image": "image:1",
}
NEEDED = (
    "--project is missing",
    "--region is missing",
    "--temp_location is missing, a folder in gs://",
    "expected one of --setup_file and --sdk_container_image, got neither",
)

# The command where the cloud extra is not installed: Dataflow's client cannot be imported.
WITHOUT_EXTRA = """
import sys
class Absent:
    def find_spec(name, *_):
        if name.startswith("google.cloud.dataflow"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent)
from pipeline import {module}
try:
    {module}.main()
finally:
    assert "apache_beam" not in sys.modules
"""


# Options


def test_nothing_is_wrong_with_enough():
    assert dataflow_options.problems(ENOUGH, [("--output_dir", "gs://bucket/out")]) == []


def test_all_that_is_missing_is_named():
    assert tuple(dataflow_options.problems({}, [])) == NEEDED


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"project": "12345"}, "--project 12345: expected the id of a project"),
        ({"project": "My Project"}, "--project My Project: expected the id of a project"),
        (
            {"job_name": "Nightly"},
            "--job_name Nightly: expected small letters, digits and dashes, a letter first",
        ),
        (
            {"labels": ["team=digits", "Team"]},
            "--labels Team: expected key=value, in small letters, digits, - and _",
        ),
        ({"streaming": True}, "--streaming has no meaning here"),
        ({"template_location": "gs://b/t"}, "--template_location has no meaning here"),
        ({"no_wait_until_finish": True}, "--no_wait_until_finish has no meaning here"),
        ({"temp_location": "gs://bucket"}, "--temp_location gs://bucket: expected a folder in the"),
        (
            {"staging_location": "/tmp"},
            "--staging_location /tmp: expected gs://bucket/path, with the name of a bucket",
        ),
        (
            {"setup_file": "setup.py"},
            "expected one of --setup_file and --sdk_container_image, got both",
        ),
        (
            {"setup_file": "none/setup.py", "sdk_container_image": None},
            "--setup_file none/setup.py: no such file",
        ),
        (
            {"setup_file": __file__, "sdk_container_image": None},
            f"--setup_file {__file__}: expected a file of the name setup.py",
        ),
        ({"num_workers": 0}, "--num_workers 0: expected at least 1"),
        ({"max_num_workers": 0}, "--max_num_workers 0: expected at least 1"),
        (
            {"num_workers": 3, "max_num_workers": 2},
            "--num_workers 3 is above --max_num_workers 2",
        ),
        (
            {"worker_region": "r", "worker_zone": "z"},
            "expected one of --worker_region and --worker_zone, got both",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "-",
)
def test_one_thing_wrong(given, problem):
    (found,) = dataflow_options.problems(ENOUGH | given, [])
    assert found.startswith(problem)


@pytest.mark.parametrize(
    "given",
    [
        {"temp_location": None, "staging_location": "gs://bucket/staging"},
        {"sdk_container_image": None, "worker_harness_container_image": "image:1"},
        {"sdk_container_image": None, "setup_file": str(helpers.ROOT / "setup.py")},
        {"num_workers": 3},
        {"num_workers": 2, "max_num_workers": 2},
        {"labels": ["team=digits", '{"kind": "x"}']},
    ],
    ids=lambda given: " ".join(given),
)
def test_nothing_wrong(given):
    assert dataflow_options.problems(ENOUGH | given, []) == []


@pytest.mark.parametrize(
    ("text", "environ", "is_local"),
    [
        ("idx:/data", {}, True),
        ("idx:gs://bucket/idx", {}, False),
        ("images:png", {}, True),
        ("images:gs://bucket/png", {}, False),
        ("digits", {}, False),
        ("tfds:mnist", {}, True),
        ("tfds:mnist", {"TFDS_DATA_DIR": "gs://bucket/tfds"}, False),
        ("tfds:mnist", {"TFDS_DATA_DIR": "/data/tfds"}, True),
        ("auto", {}, True),
        ("auto", {"MNIST_IDX_DIR": "/data"}, True),
        ("auto", {"MNIST_IDX_DIR": "gs://bucket/idx"}, False),
        ("auto", {"TFDS_DATA_DIR": "gs://bucket/tfds"}, False),
    ],
)
def test_sources_that_workers_cannot_reach(text, environ, is_local):
    assert dataflow_options.is_local("--source", text, environ) is is_local


@pytest.mark.parametrize(
    ("text", "is_local"),
    [("out/mnist", True), ("/gcs/bucket/out", True), ("digits", True), ("gs://bucket/out", False)],
)
def test_folders_that_workers_cannot_reach(text, is_local):
    assert dataflow_options.is_local("--output_dir", text, {}) is is_local


def test_local_folders_are_named_together():
    places = [("--source", "tfds:mnist"), ("--source", "idx:gs://b/x"), ("--output_dir", "out")]
    assert dataflow_options.problems(ENOUGH, places, {}) == [
        "--source tfds:mnist, --output_dir out: local, and workers need gs:// (TFDS_DATA_DIR)"
    ]


def test_what_follows_from_other_options(monkeypatch):
    monkeypatch.chdir(helpers.ROOT / "docs")
    options = PipelineOptions(["--staging_location=gs://b/s", "--setup_file=../setup.py"])
    dataflow_options.complete(options)
    assert options.view_as(StandardOptions).runner == "DataflowRunner"
    assert options.view_as(GoogleCloudOptions).temp_location == "gs://b/s"
    assert options.view_as(GoogleCloudOptions).staging_location == "gs://b/s"
    assert options.view_as(SetupOptions).setup_file == str(helpers.ROOT / "setup.py")
    assert options.view_as(SetupOptions).save_main_session is False
    assert options.view_as(dataflow_options.JobOptions).on_sigterm == "cancel"
    assert options.view_as(DebugOptions).experiments is None


def test_nothing_is_staged_for_workers_beside_an_image():
    given = ["--sdk_container_image=image:1", "--experiments=a", "--temp_location=gs://b/t"]
    options = PipelineOptions(given)
    dataflow_options.complete(options)
    experiments = options.view_as(DebugOptions).experiments
    assert experiments == ["a", "disable_logging_submission_environment"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--runner=DataflowRunner"], True),
        (["--runner", "dataflow"], True),
        (["--runner=apache_beam.runners.dataflow.dataflow_runner.DataflowRunner"], True),
        (["--runner=DirectRunner"], False),
        (["--runner=FlinkRunner", "--labels=dataflow"], False),
        (["--runner"], False),
        ([], False),
    ],
    ids=str,
)
def test_which_runner_is_dataflow(arguments, expected):
    assert runners.is_dataflow(arguments) is expected


@pytest.mark.parametrize(
    "name",
    ["TestDataflowRunner", "apache_beam.runners.dataflow.test_dataflow_runner.TestDataflowRunner"],
)
def test_the_runner_of_beams_own_tests_is_refused(name):
    with pytest.raises(InputError, match="TestDataflowRunner: is for Beam's own tests; try Data"):
        runners.require_complete([f"--runner={name}"], [])


def test_a_job_is_named_by_its_output():
    def name(output):
        return dataflow.job_name(runners.Work(stage="preprocess", output=output))

    assert name("gs://b/out") == "digits-preprocess-6b64d8d86877"
    assert name("gs://b/out") != name("gs://b/out2")
    assert dataflow_options.JOB_NAME.fullmatch(name("gs://b/out"))


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("preprocess", ("--source=digits", "--output_dir=out")),
        ("evaluate", ("--model_dir=m", "--dataset_dir=d", "--report_dir=r")),
    ],
    ids=["preprocess", "evaluate"],
)
def test_without_the_cloud_extra(module, flags, tmp_path):
    program = WITHOUT_EXTRA.format(module=module)
    done = helpers.run_python("-c", program, *flags, "--runner=DataflowRunner", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        f"python -m pipeline.{module}: error: --runner DataflowRunner needs the cloud extra:"
        " pip install 'digits-pipeline[cloud]'\n",
    )
    assert list(tmp_path.iterdir()) == []


def test_all_that_is_wrong_is_told_in_one_line_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(runners, "_require_extra", lambda: None)
    from pipeline import preprocess

    with pytest.raises(InputError) as caught:
        preprocess.parse(
            ["--source=idx:/none", "--source=digits", "--output_dir=out", "--runner=dataflow"]
        )
    assert str(caught.value) == (
        f"--runner DataflowRunner: {'; '.join(NEEDED)};"
        " --source idx:/none, --output_dir out: local, and workers need gs://"
    )


def test_the_folders_of_an_evaluation_that_workers_reach(monkeypatch):
    monkeypatch.setattr(runners, "_require_extra", lambda: None)
    from pipeline import evaluate

    flags = [f"--{name}_dir={name}" for name in ("model", "baseline", "dataset", "report")]
    enough = [f"--{name}={value}" for name, value in ENOUGH.items()]
    with pytest.raises(InputError) as caught:
        evaluate.parse(
            [
                *(*flags, "--compare_dir=gs://b/m", "--compare_dir=third", "--ledger=runs.jsonl"),
                *("--runner=dataflow", *enough),
            ]
        )
    assert str(caught.value) == (
        "--runner DataflowRunner: --model_dir model, --baseline_dir baseline, --dataset_dir"
        " dataset, --report_dir report, --compare_dir third: local, and workers need gs://"
    )


# What the service says


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Workflow failed.", "Workflow failed."),
        ("two\n  lines", "two lines"),
        ("x" * 500, "x" * 397 + "..."),
        ("Authorization: Bearer ya29.SECRET, refused", "Authorization: (left out), refused"),
        (
            "Traceback (most recent call last):\n  File x\nOSError: key"
            " -----BEGIN PRIVATE KEY-----\nMIIE: x\n-----END PRIVATE KEY-----\n",
            "OSError: key (left out)",
        ),
        (
            "Error message from worker:\nTraceback (most recent call last):\n"
            '  File "a.py", line 1, in process\n    fail()\nValueError: torn: twice\n',
            "ValueError: torn: twice",
        ),
        (
            "Traceback (most recent call last):\n  File x\nKeyError: 1\n\nDuring handling of the"
            " above exception, another exception occurred:\n\nTraceback (most recent call last):\n"
            "  File y\nOSError: [Errno 5] gone [while running 'Validate']\n\n",
            "OSError: [Errno 5] gone [while running 'Validate']",
        ),
    ],
    ids=["plain", "lines", "long", "token", "key", "traceback", "two"],
)
def test_a_message_in_one_line(text, line):
    assert dataflow_follow.last_line(text) == line


def test_which_message_explains():
    attempts, reason = "The work item was attempted 4 times", "Workflow failed. Causes: S01"
    trace = "Traceback (most recent call last): ..."
    for said, text, expected in (
        ("", attempts, attempts),
        (attempts, reason, reason),
        (reason, attempts, reason),
        (trace, reason, trace),
        (reason, trace, trace),
        (trace, trace + "2", trace + "2"),
    ):
        assert dataflow_follow.explaining(said, text) == expected


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("JOB_STATE_PENDING", "is pending"),
        ("JOB_STATE_RESOURCE_CLEANING_UP", "is resource cleaning up"),
        ("JOB_STATE_DONE", "is done"),
        ("JOB_STATE_CANCELLED", "was cancelled"),
    ],
)
def test_states_in_words(state, words):
    assert dataflow_follow.plain(state) == words


NOTE = dataflow_notes.Note(
    project="my-project-1", region="r", name="n", request_id="id-1", identity="same", job_id="j1"
)
ASKED = dataclasses.replace(NOTE, job_id="")  # as it is before the service has answered


@pytest.mark.parametrize(
    ("state", "said", "kind", "code", "line"),
    [
        ("FAILED", "pipeline.command.InputError: a: b [while running 'X']", InputError, 2, "a: b"),
        ("FAILED", "Workflow failed.", FailedError, 1, "job j1 failed: Workflow failed."),
        ("CANCELLED", "", FailedError, 1, "job j1 was cancelled: see https://console.cloud"),
        ("DRAINED", "", FailedError, 1, "job j1 was drained: see https://console.cloud.google"),
        ("UPDATED", "", FailedError, 1, "job j1 was replaced by another job: see https://"),
    ],
)
def test_exit_codes_of_jobs_that_end_badly(state, said, kind, code, line):
    error = dataflow_follow.failure(NOTE, f"JOB_STATE_{state}", said)
    assert (type(error), error.exit_code) == (kind, code)
    assert str(error).startswith(line)


# Following


@dataclasses.dataclass
class Answer:
    state: str = ""
    time: str = "now"
    text: str = ""
    is_error: bool = False


class Jobs:
    """Answers as the client does: one state after another, the last for ever."""

    def __init__(self, *states, said=(), known=""):
        self.states = [f"JOB_STATE_{state}" for state in states]
        self.said = list(said)
        self.known = known
        self.cancelled = []

    def find(self, _):
        if isinstance(self.known, Exception):
            raise self.known
        return self.known

    def get(self, _):
        return Answer(state=self.states.pop(0) if len(self.states) > 1 else self.states[0])

    def state(self, note, *, forgotten):
        return self.get(note).state

    def new_messages(self, _):
        return [self.said.pop(0)] if self.said else []

    def cancel(self, note):
        self.cancelled.append(note)
        self.states = ["JOB_STATE_CANCELLING", "JOB_STATE_CANCELLED"]


@pytest.fixture
def naps(monkeypatch):
    """How long was slept; time passes in no other way."""
    naps = []
    monkeypatch.setattr(dataflow_follow.time, "sleep", naps.append)
    monkeypatch.setattr(dataflow_follow.time, "monotonic", lambda: sum(naps))
    return naps


def test_following_a_job_to_its_end(naps):
    jobs = Jobs("QUEUED", "RUNNING", "RUNNING", "DONE")
    assert dataflow_follow.follow(jobs, NOTE) == ("JOB_STATE_DONE", "")
    assert naps == [5.0] * 3


def test_a_failed_job_is_given_time_to_explain(naps):
    said = [Answer(text="starting"), Answer(text=""), Answer(text="torn", is_error=True)]
    assert dataflow_follow.follow(Jobs("FAILED", said=said), NOTE) == ("JOB_STATE_FAILED", "torn")
    assert naps == [1.0] * 2
    naps.clear()
    assert dataflow_follow.follow(Jobs("FAILED"), NOTE) == ("JOB_STATE_FAILED", "")
    assert naps == [1.0] * 50


def test_secrets_of_a_worker_are_in_nothing_said(naps, caplog):
    text = "pipeline.command.InputError: gs://a/b: token=SECRET [while running 'X']"
    said = [Answer(text="with ya29.SECRET"), Answer(text=text, is_error=True)]
    with caplog.at_level(logging.INFO, "digits_pipeline"):
        state, reason = dataflow_follow.follow(Jobs("RUNNING", "FAILED", said=said), NOTE)
    assert "with (left out)" in caplog.text
    assert str(dataflow_follow.failure(NOTE, state, reason)) == "gs://a/b: (left out)"
    assert "SECRET" not in caplog.text + reason


def test_following_for_a_while(naps):
    assert dataflow_follow.follow(Jobs("RUNNING"), NOTE, 12.0) == ("JOB_STATE_RUNNING", "")
    assert naps == [5.0] * 3


# Stopping, and taking up again


@pytest.fixture
def work(monkeypatch):
    """Work in a bucket in memory, with a job at it."""
    memory = memory_bucket.Bucket()
    monkeypatch.setattr(gcs, "bucket", lambda name: memory)
    folder = GcsPath("bucket", ".out.incomplete/token")
    gcs_publish.keep(folder, dataclasses.asdict(NOTE))
    (folder / "part").write_bytes(b"half")
    return runners.Work(stage="s", output="gs://bucket/out", folder=folder, identity="same")


@pytest.mark.parametrize(
    ("states", "said", "is_kept"),
    [
        (("RUNNING",), "job j1 was cancelled", False),
        (("DONE",), "job j1 was done before it could be cancelled; the same command", True),
        (("CANCELLING",), "job j1 is being cancelled", True),
    ],
)
def test_cancelling(work, naps, states, said, is_kept):
    jobs = Jobs(*states)
    if states != ("RUNNING",):
        jobs.cancel = jobs.cancelled.append
    assert dataflow.cancel(jobs, NOTE, work).startswith(said)
    assert jobs.cancelled == [NOTE]
    assert (gcs_publish.kept(work.folder) is not None) is is_kept


def test_a_job_that_cannot_be_cancelled(work, naps):
    jobs = Jobs("RUNNING")

    def refuse(_):
        raise FailedError("HTTP 403: no right")

    jobs.cancel = refuse
    assert dataflow.cancel(jobs, NOTE, work) == (
        "job j1 could not be cancelled (HTTP 403: no right); try: gcloud dataflow jobs cancel j1"
        " --region r --project my-project-1"
    )
    assert gcs_publish.kept(work.folder) is not None


@pytest.mark.parametrize("state", ["RUNNING", "QUEUED", "DONE"])
def test_the_same_work_is_taken_up(work, state):
    assert dataflow_notes.take_up(Jobs(state), work) == NOTE
    assert (work.folder / "part").read_bytes() == b"half"


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED"])
@pytest.mark.parametrize("identity", ["same", "other"])
def test_work_that_failed_is_begun_again(work, state, identity):
    assert dataflow_notes.take_up(Jobs(state), dataclasses.replace(work, identity=identity)) is None
    assert list(work.folder.parent.walk()) == []


@pytest.mark.parametrize("identity", ["same", "other"])
@pytest.mark.parametrize("end", ["CANCELLED", "FAILED", "DONE"])
def test_a_job_that_is_being_cancelled_is_waited_for(work, naps, caplog, end, identity):
    caplog.set_level(logging.INFO, "digits_pipeline")
    wanted = dataclasses.replace(work, identity=identity)
    jobs = Jobs("CANCELLING", "CANCELLING", "CANCELLING", end)
    is_taken = (end, identity) == ("DONE", "same")
    assert dataflow_notes.take_up(jobs, wanted) == (NOTE if is_taken else None)
    assert jobs.states == [f"JOB_STATE_{end}"]
    assert naps[:2] == [5.0, 5.0]
    assert (dataflow_notes.read(work) == NOTE) is is_taken
    assert caplog.messages[0] == "job j1 is being cancelled: waiting for its end"
    said = {"CANCELLED": "was cancelled", "FAILED": "failed", "DONE": "is done"}[end]
    again = f"job j1, which was left running, {said}: starting again"
    assert (caplog.messages[-1] == again) is not is_taken


def test_other_work_is_begun_once_the_job_has_ended(work):
    other = dataclasses.replace(work, identity="other")
    with pytest.raises(LockedError, match="gs://bucket/out: job j1 was left running, and makes"):
        dataflow_notes.take_up(Jobs("RUNNING"), other)
    assert gcs_publish.kept(work.folder) == dataclasses.asdict(NOTE)
    assert dataflow_notes.take_up(Jobs("DONE"), other) is None
    assert gcs_publish.kept(work.folder) is None


@pytest.mark.parametrize("state", ["RUNNING", "DONE"])
def test_a_job_whose_answer_was_lost_is_found_by_its_name(work, state):
    dataflow_notes.write(ASKED, work)
    assert dataflow_notes.take_up(Jobs(state, known="j1"), work) == NOTE
    assert dataflow_notes.read(work) == NOTE  # from now on by its id
    other = dataclasses.replace(work, identity="other")
    dataflow_notes.write(ASKED, work)
    if state == "RUNNING":
        with pytest.raises(LockedError, match="job j1 was left running, and makes something else"):
            dataflow_notes.take_up(Jobs(state, known="j1"), other)
    else:
        assert dataflow_notes.take_up(Jobs(state, known="j1"), other) is None


def test_a_job_that_was_never_made_is_asked_for_again(work, caplog):
    caplog.set_level(logging.INFO, "digits_pipeline")
    dataflow_notes.write(ASKED, work)
    assert dataflow_notes.take_up(Jobs(), work) is None
    assert caplog.messages == ["job n, which was left running, was never made: starting again"]
    assert list(work.folder.parent.walk()) == []


def test_while_nobody_knows_whether_there_is_a_job_its_note_stays(work):
    dataflow_notes.write(ASKED, work)
    with pytest.raises(UnreachableError):
        dataflow_notes.take_up(Jobs(known=UnreachableError("no answer")), work)
    assert dataflow_notes.read(work) == ASKED


@pytest.mark.parametrize(
    ("how", "known", "said", "note"),
    [
        ("cancel", "j1", "job j1 was cancelled", None),
        ("detach", "j1", "job j1 goes on alone, and the same command takes it up again", NOTE),
        ("cancel", "", "job n may have been submitted; the same command takes it up if", ASKED),
        ("detach", UnreachableError("x"), "job n may have been submitted; the same com", ASKED),
    ],
)
def test_stopped_before_the_answer_came(work, naps, how, known, said, note):
    dataflow_notes.write(ASKED, work)
    jobs = Jobs("RUNNING", known=known)
    assert dataflow.stopped(jobs, ASKED, work, how).startswith(said)
    assert dataflow_notes.read(work) == note
    assert jobs.cancelled == ([NOTE] if how == "cancel" and known else [])


def test_stopped_before_anything_was_asked_for(work):
    assert dataflow.stopped(Jobs(), None, work, "cancel") == "no job was submitted"


class Asked:
    """A description of a job, as far as a note is made of it."""

    google_cloud_options = dataflow_options.GoogleCloudOptions(project="my-project-1", region="r")
    proto = type("Proto", (), {"name": "n", "client_request_id": "id-1"})


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (None, NOTE),
        (UnreachableError("no answer"), ASKED),
        (FailedError("no right to look"), ASKED),
        (LockedError("another"), None),
        (InputError("refused"), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_job_is_noted_before_it_is_asked_for(work, error, note):
    dataflow_notes.remove(work)
    jobs, seen = Jobs(), []

    def create(job, asked):
        seen.append((asked, dataflow_notes.read(work)))
        if error is not None:
            raise error
        return "j1"

    jobs.create = create
    announced = dataflow.announce(Asked, work)
    if error is None:
        assert dataflow.submit(jobs, Asked, announced, work) == NOTE
    else:
        with pytest.raises(type(error)):
            dataflow.submit(jobs, Asked, announced, work)
    assert seen == [(ASKED, ASKED)]
    assert dataflow_notes.read(work) == note


@pytest.mark.parametrize(
    ("error", "is_kept"),
    [
        (RuntimeError("not every row was scored"), False),
        (InputError("changed while it was read"), False),
        (KeyError("statistics"), False),
        (UnreachableError("no answer"), True),
        (LockedError("taken over"), True),
        (OSError(28, "No space left on device"), True),
        (StoppedError("a SIGTERM"), True),
        (KeyboardInterrupt(), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_wrong_with_a_result_is_made_anew(work, error, is_kept):
    with pytest.raises(type(error)), runners.accepting(work):
        raise error
    assert dataflow_notes.read(work) == (NOTE if is_kept else None)


def test_the_note_on_a_result_that_is_right_is_for_who_publishes_it(work):
    with runners.accepting(work):
        pass
    assert dataflow_notes.read(work) == NOTE


def test_no_work_to_be_taken_up(work):
    gcs_publish.let_go(work.folder)
    assert dataflow_notes.take_up(Jobs(), work) is None
    assert dataflow_notes.take_up(Jobs(), runners.Work(stage="s", output="o")) is None


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGTERM, StoppedError), (signal.SIGINT, KeyboardInterrupt)]
)
def test_signals_as_exceptions(number, kind):
    before = signal.getsignal(number)
    with pytest.raises(kind), Interrupts():
        os.kill(os.getpid(), number)
        time.sleep(5)
        pytest.fail("nothing was raised")
    assert signal.getsignal(number) is before


def test_a_signal_waits_while_it_is_held():
    done = []
    with pytest.raises(StoppedError), Interrupts() as interrupts:
        with interrupts.held():
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):  # the handler runs between two of these
                done.append(1)
        pytest.fail("nothing was raised")
    assert len(done) == 1000
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_that_was_held_outlives_an_error():
    with pytest.raises(StoppedError) as caught, Interrupts() as interrupts, interrupts.held():
        os.kill(os.getpid(), signal.SIGTERM)
        raise InputError("refused")
    assert str(caught.value.__context__) == "refused"


def test_nothing_is_raised_where_nothing_came():
    with Interrupts() as interrupts, interrupts.held():
        pass


# What workers install


def asked_for(tmp_path, *given):
    options = PipelineOptions(list(given))
    dataflow_packages.ask_for(options, tmp_path)
    return options, options.view_as(SetupOptions).requirements_file


def test_workers_are_told_the_versions_that_are_here(tmp_path, caplog):
    options, path = asked_for(tmp_path, "--setup_file=setup.py")
    lines = Path(path).read_text().splitlines()
    assert f"apache-beam=={importlib.metadata.version('apache-beam')}" in lines
    assert lines == dataflow_packages.pins()
    assert options.view_as(SetupOptions).requirements_cache == "skip"
    dataflow_packages.forget(options, tmp_path)
    assert options.view_as(SetupOptions).requirements_file is None
    assert options.view_as(SetupOptions).requirements_cache is None
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("given", "path"),
    [
        (["--sdk_container_image=image:1", "--no_use_public_ips"], None),
        (["--setup_file=setup.py", "--requirements_file=r.txt"], "r.txt"),
    ],
)
def test_an_image_and_whoever_says_himself_what_to_install_are_left_alone(
    given, path, tmp_path, caplog
):
    options, found = asked_for(tmp_path, *given)
    assert found == path
    dataflow_packages.forget(options, tmp_path)
    assert options.view_as(SetupOptions).requirements_file == path
    assert caplog.messages == []


def test_versions_that_are_not_known_are_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(dataflow_packages, "NAME", "no-such-package")
    assert asked_for(tmp_path, "--setup_file=setup.py")[1] is None
    assert caplog.messages == [
        "no-such-package is not installed here: workers take the newest packages"
    ]


def test_workers_without_the_internet_are_told_of(tmp_path, caplog):
    asked_for(tmp_path, "--setup_file=setup.py", "--no_use_public_ips")
    (said,) = caplog.messages
    assert "takes a Cloud NAT in their network" in said
