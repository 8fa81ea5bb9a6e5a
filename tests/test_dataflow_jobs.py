"""Jobs submitted to a stand-in for Dataflow, staged in fake-gcs-server, and run from there.

Real clients meet real servers: a request is looked at as the service gets it, and what was staged
is run from the bucket, where nothing else of ours can be imported.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
from types import SimpleNamespace

import helpers
import pytest
import test_gcs
from dataflow_service import TOKEN, Script, Service
from emulator import VARIABLE
from faulty_proxy import FORBIDDEN, FaultyProxy
from test_gcs import assert_equal, files_of
from test_vertex import SECRET, fake_account

from pipeline import commands, dataflow_follow, gcs_publish, preprocess, runners, storage
from pipeline.command import UNREACHABLE, InputError
from pipeline.gcs import GcsPath

pytestmark = pytest.mark.cloud

# The command, with a service that is asked often, and little patience.
HASTY = """
from pipeline import dataflow_client, dataflow_follow, leases, {module}
dataflow_follow.POLL_SECONDS, dataflow_follow.EXPLAIN_SECONDS = 0.05, 1.0
dataflow_client.PATIENCE_SECONDS, dataflow_client.SUBMIT_SECONDS = {patience}, 1.0
leases.HEARTBEAT_SECONDS, leases.LAPSE_SECONDS = 0.3, 3.0
{first}
{module}.main()
"""
# Kills the command once its job is done, and its result not published.
KILLED = "import os, signal; {} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)"
IMAGE = ("--sdk_container_image=europe-docker.pkg.dev/p/r/digits:1",)
PACKAGE = ("--setup_file=./setup.py",)
WORKERS = (
    "--job_name=digits-by-hand",
    "--labels=team=digits",
    "--labels=kind=nightly",
    "--service_account_email=workers@my-project-1.iam.gserviceaccount.com",
    "--num_workers=2",
    "--max_num_workers=5",
    "--autoscaling_algorithm=THROUGHPUT_BASED",
    "--machine_type=n2-standard-4",
    "--disk_size_gb=40",
    "--network=net",
    "--subnetwork=regions/europe-west1/subnetworks/sub",
    "--no_use_public_ips",
    "--worker_zone=europe-west1-b",
    "--experiments=some_experiment",
    "--dataflow_service_options=some_option",
)
FOREVER = Script(states=("QUEUED", "RUNNING"))
BUCKET = GcsPath(test_gcs.BUCKET)
TEMP, IDX, MODELS = BUCKET / "temp", BUCKET / "idx", BUCKET / "models"
PATIENCE = 900  # seconds, on a machine that has much else to do
ANSWERS = "predictions/predictions-00000-of-00002.jsonl"


@pytest.fixture(scope="module", autouse=True)
def bucket(small_idx, tmp_path_factory):
    """A server whose bucket holds a set of images."""
    if "CI" not in os.environ:
        pytest.importorskip("google.cloud.dataflow", reason="needs the cloud extra")
    with test_gcs.server(tmp_path_factory.mktemp("buckets") / "data"):
        upload(small_idx, IDX)
        yield


def upload(folder, place):
    for name, content in helpers.tree(folder).items():
        (place / name).write_bytes(content)


@pytest.fixture
def service():
    with Service().running() as service:
        yield service


@pytest.fixture
def output(request):
    return GcsPath(test_gcs.BUCKET, f"{request.node.name.replace('[', '/').strip(']')}/out")


@pytest.fixture(scope="module")
def local(small_idx, tmp_path_factory):
    """The folder of the dataset that a local run makes."""
    folder = tmp_path_factory.mktemp("local") / "out"
    flags = (f"--source=idx:{small_idx}", "--num_shards=2", f"--output_dir={folder}")
    done = helpers.run_cli("pipeline.preprocess", *flags)
    assert done.returncode == 0, done.stderr
    return folder


def dataset(output):
    return (f"--source=idx:{IDX}", "--num_shards=2", f"--output_dir={output}")


def arguments(service, *flags):
    return [
        "--runner=DataflowRunner",
        f"--dataflow_endpoint={service.endpoint}",
        "--no_auth",
        "--project=my-project-1",
        "--region=europe-west1",
        f"--temp_location={TEMP}",
        *flags,
    ]


def run_preprocess(service, output, *flags):
    return run("preprocess", service, *dataset(output), *flags)


def run(module, service, *flags, first=""):
    program = HASTY.format(module=module, patience=PATIENCE, first=first)
    return helpers.run_python("-c", program, *arguments(service, *flags), timeout=PATIENCE)


@pytest.fixture
def refused(service, output, monkeypatch):
    """Runs the command in this process; returns the error that it ends in."""
    from pipeline import dataflow_client  # of the cloud extra

    for module, name, seconds in (
        (dataflow_follow, "POLL_SECONDS", 0.05),
        (dataflow_follow, "EXPLAIN_SECONDS", 0.5),
        (dataflow_client, "SUBMIT_SECONDS", 1.0),
    ):
        monkeypatch.setattr(module, name, seconds)

    def run(*flags, left=()):
        config = preprocess.parse([*dataset(output), *arguments(service, *flags)])
        with pytest.raises(InputError) as caught:
            preprocess.execute(config)
        assert tuple(output.parent.walk()) == left
        return caught.value

    return run


def start(service, output, *flags, patience=PATIENCE):
    return subprocess.Popen(
        [
            *(sys.executable, "-c", HASTY.format(module="preprocess", patience=patience, first="")),
            *arguments(service, *dataset(output), *flags),
        ],
        env=os.environ | {"PYTHONPATH": str(helpers.ROOT)},
        cwd=helpers.ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    """The exit code of a process, and its log."""
    try:
        _, said = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert "Traceback" not in said, said
    return process.returncode, said


def wait_until(happened, process):
    test_gcs.wait_until(happened, process, seconds=PATIENCE)


def beside(output):
    """Names of what stands beside a dataset, with what is in it."""
    return sorted(name for name in output.parent.walk() if not name.startswith("out/"))


# What was staged


def pipeline_of(job):
    """The staged graph: the request says where it is, and what it hashes to."""
    options = job.environment.sdk_pipeline_options["options"]
    data = storage.place(options["pipelineUrl"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == options["pipelineProtoHash"]
    from apache_beam.portability.api import beam_runner_api_pb2

    return data, beam_runner_api_pb2.Pipeline.FromString(data)


def staged_files(job):
    """{name: content} of the files that the graph's environments need, by their checksums."""
    from apache_beam.portability.api import beam_runner_api_pb2 as beam

    found = {}
    for environment in pipeline_of(job)[1].components.environments.values():
        for dependency in environment.dependencies:
            role = beam.ArtifactStagingToRolePayload.FromString(dependency.role_payload)
            payload = beam.ArtifactUrlPayload.FromString(dependency.type_payload)
            data = storage.place(payload.url).read_bytes()
            assert hashlib.sha256(data).hexdigest() == payload.sha256
            found[role.staged_name] = data
    return found


def from_the_bucket(folder):
    """Runs a job as a worker would: with the staged package, and nothing else of ours."""

    def execute(job):
        files = staged_files(job)
        folder.mkdir(parents=True)
        (folder / "workflow.tar.gz").write_bytes(files["workflow.tar.gz"])
        (folder / "pipeline.pb").write_bytes(pipeline_of(job)[0])
        offline = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")
        packages, site = folder / "packages", sysconfig.get_paths()["purelib"]
        pip = (sys.executable, "-m", "pip", "install", *offline, f"--target={packages}")
        subprocess.run([*pip, folder / "workflow.tar.gz"], cwd=folder, check=True)
        done = subprocess.run(
            [
                *(sys.executable, "-I", "-S", helpers.ROOT / "tests/engines/run_staged.py"),
                *(folder / "pipeline.pb", packages, site),
            ],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])

    return execute


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A job that was submitted and run to its end: (service, output, what the command said)."""
    output = GcsPath(test_gcs.BUCKET, "whole/out")
    with Service().running() as service:
        execute = from_the_bucket(tmp_path_factory.mktemp("worker") / "job")
        service.script = Script(execute=execute)
        done = run_preprocess(service, output, *PACKAGE, *WORKERS)
    assert done.returncode == 0, done.stderr
    return service, output, done


def test_same_bytes_as_a_local_run(whole, local):
    _, output, _ = whole
    assert_equal(files_of(output), files_of(local))
    metrics = json.loads((local / "metrics.json").read_bytes())
    found = json.loads((output / "metrics.json").read_bytes())
    assert found["counters"] == metrics["counters"]
    assert found["counters"]["read-train"] == 600
    assert found["distributions"].keys() == metrics["distributions"].keys()
    assert beside(output) == []


def test_the_request_field_by_field(whole):
    service, _, _ = whole
    job = service.only.job
    folder = storage.place(job.environment.sdk_pipeline_options["options"]["pipelineUrl"]).parent
    assert re.fullmatch(r"temp/digits-by-hand\.\d+\.\d{6}", folder.key)
    assert (service.only.project, service.only.region) == ("my-project-1", "europe-west1")
    assert job.name == "digits-by-hand"
    assert job.type_.name == "JOB_TYPE_BATCH"
    assert dict(job.labels) == {"team": "digits", "kind": "nightly"}
    environment = job.environment
    assert environment.service_account_email == "workers@my-project-1.iam.gserviceaccount.com"
    assert environment.worker_zone == "europe-west1-b"
    assert environment.temp_storage_prefix == f"storage.googleapis.com/digits/{folder.key}"
    assert environment.service_options == ["some_option"]
    assert {"some_experiment", "use_runner_v2"} <= set(environment.experiments)
    assert dict(environment.version) == {"job_type": "FNAPI_BATCH", "major": "8"}
    options = environment.sdk_pipeline_options["options"]
    assert "requirements_file" not in options  # it names a file of this machine
    assert options["save_main_session"] is False
    assert options["pickle_library"] == "cloudpickle"
    assert options["pipelineUrl"] == f"{folder}/pipeline.pb"
    (pool,) = environment.worker_pools
    assert pool.num_workers == 2
    assert pool.autoscaling_settings.max_num_workers == 5
    assert pool.autoscaling_settings.algorithm.name == "AUTOSCALING_ALGORITHM_BASIC"
    assert pool.machine_type == "n2-standard-4"
    assert pool.disk_size_gb == 40
    assert pool.network == "net"
    assert pool.subnetwork == "regions/europe-west1/subnetworks/sub"
    assert pool.ip_configuration.name == "WORKER_IP_PRIVATE"
    assert pool.worker_harness_container_image.endswith("/beam_python3.11_sdk:2.77.0")
    names = ["requirements.txt", "submission_environment_dependencies.txt", "workflow.tar.gz"]
    assert sorted(package.name for package in pool.packages) == names
    for package in pool.packages:
        assert package.location == f"storage.googleapis.com/digits/{folder.key}/{package.name}"
    assert sorted(staged_files(job)) == names
    assert sorted(path.name for path in folder.iterdir()) == ["pipeline.pb", *names]


def test_the_staged_package_holds_everything_and_no_tests(whole, tmp_path):
    service, _, _ = whole
    (tmp_path / "package").write_bytes(staged_files(service.only.job)["workflow.tar.gz"])
    with tarfile.open(tmp_path / "package") as package:
        names = {name.partition("/")[2] for name in package.getnames()}
    ours = {name for name in helpers.source_files() if name.startswith(("pipeline/", "trainer/"))}
    assert len(ours) > 90
    assert {"pipeline/page.py", "pipeline/report.html.jinja", "pipeline/sorting.js"} < ours
    assert ours <= names
    assert {name.split("/")[0] for name in names} <= {
        *("", "pipeline", "trainer", "digits_pipeline.egg-info", "setup.py", "setup.cfg"),
        *("pyproject.toml", "constraints.txt", "MANIFEST.in", "README.md", "PKG-INFO", "LICENSE"),
    }


def test_workers_are_told_every_version(whole, tmp_path):
    service, _, done = whole
    path = tmp_path / "requirements.txt"
    path.write_bytes(staged_files(service.only.job)["requirements.txt"])
    pins = path.read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==\S+", line) for line in pins)
    pinned = dict(line.split("==") for line in pins)
    needed = importlib.metadata.requires("digits-pipeline")
    direct = {re.match(r"[\w-]+", line)[0].replace("_", "-") for line in needed if ";" not in line}
    assert direct <= pinned.keys() and len(direct) > 10
    behind = {"h5py", "protobuf", "grpcio", "google-cloud-dataflow-client", "google-auth"}
    assert behind <= pinned.keys()  # what those need, and what Beam on Dataflow needs
    assert not {"pytest", "mypy", "matplotlib", "jax", "digits-pipeline"} & pinned.keys()
    # Every one is what is installed here, and nothing that they need is missing.
    pip = (sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--quiet")
    found = subprocess.run(
        [*pip, "--requirement", path], capture_output=True, text=True, check=True
    )
    assert found.stdout == ""
    assert found.stderr.count("ERROR") == 0
    assert (
        "WARNING: --setup_file with --no_use_public_ips: workers install packages from the"
        " internet, which takes a Cloud NAT in their network; with --sdk_container_image they need"
        " none"
    ) in done.stderr.splitlines()


def test_states_are_told_with_their_time(whole):
    _, _, done = whole
    lines = done.stderr.splitlines()
    job = "job 2026-11-20_03_00_00-1"
    page = "https://console.cloud.google.com/dataflow/jobs/europe-west1/2026-11-20_03_00_00-1"
    assert f"{job}: {page}?project=my-project-1" in lines
    told = [line for line in lines if line.startswith("2026-11-20 03:0")]
    assert told == [
        f"2026-11-20 03:00:00Z  {job} is queued",
        "2026-11-20 03:00:01Z  Worker configuration: n1-standard-1.",
        f"2026-11-20 03:01:00Z  {job} is running",
        f"2026-11-20 03:02:00Z  {job} is done",
    ]
    assert lines[-1].startswith("720 rows read; ")


def test_dry_run_prints_the_very_request_and_sends_nothing(whole, output):
    submitted, _, _ = whole
    before = TEMP.walk()
    with Service().running() as service:
        done = run_preprocess(service, output, "--dry_run", *PACKAGE, *WORKERS)
        assert (done.returncode, service.requests) == (0, []), done.stderr
    assert TEMP.walk() == before
    assert beside(output) == []
    plan = json.loads(done.stdout)
    assert plan["already_there"] is False
    assert plan["reads"] == {
        "sources": [f"idx:{IDX}"],
        "images": {"train": 600, "test": 120},
        "in": 2,
    }
    assert plan["writes"]["folder"] == str(output)
    request = plan["request"]
    assert request["method"] == "POST"
    path = "/v1b3/projects/my-project-1/locations/europe-west1/jobs"
    assert request["url"] == service.endpoint + path
    assert submitted.requests[0] == ("POST", path)
    names = {staged["file"].rpartition("/")[2]: staged for staged in plan["staged"]}
    found = staged_files(submitted.only.job)
    dependencies = "submission_environment_dependencies.txt"
    assert sorted(names) == sorted([*found, "pipeline.pb"])
    assert names[dependencies]["bytes"] == len(found[dependencies])
    assert names[dependencies]["sha256"] == hashlib.sha256(found[dependencies]).hexdigest()
    printed = service._parse(json.dumps(request["body"]).encode())
    assert comparable(printed) == comparable(submitted.only.job)


def comparable(job):
    """A request without what no two have in common: times, ports, what a package hashes to."""
    text = type(job).to_json(job, sort_keys=True)
    text = re.sub(r"(/digits-[\w-]+)\.\d+\.\d{6}", r"\1", text)
    text = re.sub(r"http://localhost:\d+", "http://localhost", text)
    text = re.sub(r'("clientRequestId": ").*"', r'\1"', text)
    return json.loads(re.sub(r'("pipelineProtoHash": ").*"', r'\1"', text))


# An evaluation


@pytest.fixture(scope="module")
def models(local, tmp_path_factory):
    """Two models, here and in the bucket, and the report that a local run makes of them."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("challenger", "champion"), start=1):
        helpers.export_linear_model(folder / name, seed)
        upload(folder / name, MODELS / name)
    flags = scored(folder, local, folder / "report")
    done = helpers.run_cli("pipeline.evaluate", *flags)
    assert done.returncode == 0, done.stderr
    return helpers.tree(folder / "report"), done.stdout


def scored(models, dataset, report):
    return (
        f"--model_dir={models / 'challenger'}",
        f"--baseline_dir={models / 'champion'}",
        f"--dataset_dir={dataset}",
        f"--report_dir={report}",
        "--save_predictions",
    )


def test_same_report_as_a_local_run(whole, service, models, output, tmp_path):
    _, dataset, _ = whole
    files, told = models
    flags = scored(MODELS, dataset, output)
    service.script = Script(execute=from_the_bucket(tmp_path / "job"))
    done = run("evaluate", service, *flags, *PACKAGE)
    assert done.returncode == 0, done.stderr
    assert_equal(files_of(output), files)
    assert ANSWERS in files and len(files) == 4 + 2
    assert done.stdout.splitlines()[:-1] == told.splitlines()[:-1]  # the last names the report
    assert beside(output) == []
    assert re.fullmatch(r"digits-evaluate-[0-9a-f]{12}", service.only.job.name)


# What a job may do in its bucket


class ObjectsOnly(FaultyProxy):
    """Refuses whatever is not about an object, as to one who may read, write and list objects."""

    def _decide(self, request, has_body):
        of_objects = rf"/(upload/|download/)?storage/v1/b/{test_gcs.BUCKET}/o([/?].*)?"
        return ("" if re.fullmatch(of_objects, request.target, re.DOTALL) else FORBIDDEN), False


def test_no_right_is_needed_but_that_to_read_and_write_objects(
    service, models, local, output, tmp_path, monkeypatch
):
    with ObjectsOnly(os.environ[VARIABLE], seed=0) as proxy:
        monkeypatch.setenv(VARIABLE, proxy.address)
        service.script = Script(execute=from_the_bucket(tmp_path / "one"))
        done = run_preprocess(service, output, *PACKAGE)
        assert done.returncode == 0, done.stderr
        service.script = Script(execute=from_the_bucket(tmp_path / "two"))
        report = output.parent / "report"
        done = run("evaluate", service, *scored(MODELS, output, report), *PACKAGE)
        assert done.returncode == 0, done.stderr
        refused = [request for request, kind in proxy.seen if kind]
        served = [request for request, kind in proxy.seen if not kind]
    assert refused == []
    assert {request.method for request in served} == {"GET", "POST", "DELETE"}
    assert_equal(files_of(output), files_of(local))
    assert_equal(files_of(report), models[0])


def test_nor_before_a_job_goes_to_the_real_service(monkeypatch):
    """Of which Beam would ask more than of a stand-in, as it makes a graph."""
    import apache_beam as beam

    given = (*arguments(SimpleNamespace(endpoint="-"), *IMAGE),)
    options = runners.beam_options([each for each in given if "endpoint" not in each])
    assert options.get_all_options()["dataflow_endpoint"] == "https://dataflow.googleapis.com"
    with ObjectsOnly(os.environ[VARIABLE], seed=0) as proxy:
        monkeypatch.setenv(VARIABLE, proxy.address)
        runners._built(options, lambda pipeline: pipeline | beam.Create([1]))
        assert proxy.seen == []


def test_dry_run_of_an_evaluation(whole, service, models, output):
    _, dataset, _ = whole
    done = run("evaluate", service, *scored(MODELS, dataset, output), *IMAGE, "--dry_run")
    assert (done.returncode, service.requests) == (0, []), done.stderr
    assert list(output.parent.walk()) == []
    plan = json.loads(done.stdout)
    assert plan["reads"] == {
        "models": [str(MODELS / "challenger"), str(MODELS / "champion")],
        "dataset": str(dataset),
        "images": 120,
        "files": ["test-00000-of-00002.tfrecord", "test-00001-of-00002.tfrecord"],
    }
    assert plan["writes"]["folder"] == str(output)
    assert sorted(plan["writes"]["files"]) == sorted(models[0])
    assert plan["request"]["body"]["name"].startswith("digits-evaluate-")
    (pool,) = plan["request"]["body"]["environment"]["workerPools"]
    assert pool["workerHarnessContainerImage"] == IMAGE[0].partition("=")[2]
    # Nothing that a worker would have to put in a folder of root's.
    assert [staged["file"].rpartition("/")[2] for staged in plan["staged"]] == ["pipeline.pb"]
    assert "packages" not in pool


# How jobs end


def test_what_cannot_be_staged(service, refused, tmp_path):
    error = refused(*IMAGE, "--temp_location=gs://no-such-bucket/temp")
    assert (error.exit_code, service.jobs) == (2, {})
    assert str(error).endswith(": there is no bucket no-such-bucket")
    (tmp_path / "setup.py").write_text("raise SystemExit('torn')")
    error = refused(f"--setup_file={tmp_path / 'setup.py'}")
    assert (error.exit_code, service.jobs) == (2, {})
    assert str(error).startswith("the job cannot be prepared: ")


@pytest.mark.parametrize(
    ("state", "messages", "code", "line"),
    [
        (
            "FAILED",
            (
                ("ERROR", "Traceback (most recent call last):\n  File x\nValueError: torn [while]"),
                ("ERROR", "The work item was attempted 4 times without success."),
            ),
            1,
            "job 2026-11-20_03_00_00-1 failed: ValueError: torn [while]",
        ),
        (
            "FAILED",
            (
                (
                    "ERROR",
                    "Traceback (most recent call last):\n  File x\npipeline.command.InputError:"
                    " gs://a/b: magic number is 1 [while running 'ReadRows/Read-ptransform-7']\n",
                ),
            ),
            2,
            "gs://a/b: magic number is 1",
        ),
        ("CANCELLED", (), 1, "job 2026-11-20_03_00_00-1 was cancelled: see https://console"),
        ("FAILED", (), 1, "job 2026-11-20_03_00_00-1 failed: see https://console"),
    ],
    ids=["error", "input", "cancelled", "silent"],
)
def test_a_job_that_does_not_end_well(service, refused, state, messages, code, line):
    service.script = Script(states=("RUNNING", state), messages=messages)
    error = refused(*IMAGE)
    assert error.exit_code == code
    assert str(error).startswith(line)


def test_a_service_that_is_unavailable_for_a_while(service, output):
    service.script = Script(states=("QUEUED", "RUNNING", "FAILED"), asked=3)
    process = start(service, output, *IMAGE)
    wait_until(lambda: service.jobs and service.only.state == "RUNNING", process)
    service.failing += [503, 429, 500]
    code, said = end(process)
    assert code == 1
    assert service.failing == []
    assert said.count("no answer from Dataflow") == 1
    assert "no answer from Dataflow (HTTP 503: made to fail); asking on for" in said
    assert "job 2026-11-20_03_00_00-1 failed" in said.splitlines()[-1]


def test_a_service_that_is_gone_for_good(service, output, local, tmp_path):
    going_on = threading.Event()
    execute = from_the_bucket(tmp_path / "job")
    service.script = Script(execute=lambda job: going_on.wait() and execute(job))
    process = start(service, output, *PACKAGE, patience=2)
    wait_until(lambda: service.jobs and service.only.state == "RUNNING", process)
    service.failing += [503] * 1000
    code, said = end(process)
    assert code == 1
    assert said.splitlines()[-1].endswith(
        "no answer from Dataflow for 2 seconds (HTTP 503: made to fail); a job that is at work goes"
        " on there, and the same command finds it"
    )
    assert files_of(output) == {}
    service.failing.clear()
    going_on.set()
    done = run_preprocess(service, output, *PACKAGE)
    assert done.returncode == 0, done.stderr
    assert len(service.jobs) == 1
    assert_equal(files_of(output), files_of(local))
    assert beside(output) == []


@pytest.mark.parametrize(
    ("answer", "code", "line", "left"),
    [
        (
            (403, "no right to create jobs"),
            2,
            "Dataflow: access denied (HTTP 403): no right to create jobs; expected the role",
            (),
        ),
        ((400, "no such machine"), 2, "Dataflow refuses it (HTTP 400): no such machine", ()),
        (
            (429, "Quota exceeded"),
            UNREACHABLE,
            "no answer from Dataflow for 1 seconds (Quota exceeded); a job that is at work goes",
            (".out.incomplete/.kept",),  # one of the requests may have been heard
        ),
        (
            (409, "There is already an active job"),
            75,
            "a job named digits-by-hand is at work in my-project-1, europe-west1; try again",
            (),
        ),
    ],
    ids=["403", "400", "429", "409"],
)
def test_a_job_that_is_refused(service, refused, answer, code, line, left):
    service.refused = answer
    error = refused(*IMAGE, "--job_name=digits-by-hand", left=left)
    assert error.exit_code == code
    assert str(error).startswith(line)


def test_no_credentials_are_said_anywhere(service, output, tmp_path):
    """Real ones reach the service, which repeats them; all that is said and written is searched."""
    account, _, _ = fake_account(tmp_path)
    key = json.loads(account.read_text()) | {"token_uri": f"{service.endpoint}/token"}
    account.write_text(json.dumps(key))
    service.echoing = True
    flags = [flag for flag in arguments(service, *IMAGE) if flag != "--no_auth"]
    done = helpers.run_python(
        *("-c", HASTY.format(module="preprocess", patience=PATIENCE, first="")),
        *(*dataset(output), "--verbosity=1", *flags),
        env={
            "GOOGLE_APPLICATION_CREDENTIALS": account,
            "HTTPS_PROXY": "http://127.0.0.1:9",  # nobody listens: they are for no other server
            "NO_PROXY": "127.0.0.1,localhost",
        },
        timeout=PATIENCE,
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "access denied (HTTP 403): not with Authorization: (left out); expected the" in last
    assert service.tokens == [f"Bearer {TOKEN}"]
    secrets = [SECRET, TOKEN, *key["private_key"].splitlines()[1:-1]]
    assert len(secrets) == 2 + 26
    written = [(TEMP / name).read_bytes().decode(errors="replace") for name in TEMP.walk()]
    said = [done.stdout, done.stderr, *written]
    assert [secret for secret in secrets if any(secret in text for text in said)] == []
    assert list(output.parent.walk()) == []


# The chain


def retrain(*flags, **environ):
    return helpers.run_cli("pipeline.retrain", *flags, env=environ, timeout=PATIENCE)


def test_the_chain_names_all_that_is_wrong_before_anything_is_staged(service, small_idx, tmp_path):
    root = tmp_path / "root"
    asked = arguments(service)
    asked = [flag for flag in asked if not flag.startswith(("--project", "--temp_location"))]
    done = retrain(f"--root={root}", f"--source=idx:{small_idx}", "--source=digits", *asked)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "python -m pipeline.retrain: error: --runner DataflowRunner: --project is missing;"
        " --temp_location is missing, a folder in gs://; expected one of --setup_file and"
        f" --sdk_container_image, got neither; --root {root}, --source idx:{small_idx}: local, and"
        " workers need gs://\n"
    )
    assert service.requests == []
    assert not root.exists()


def test_the_chains_dry_run_prints_commands_and_requests_and_reads_no_secret(service):
    root, before = BUCKET / "planned", BUCKET.walk()
    beam = arguments(service, *IMAGE, "--label=team=digits")  # --labels is the trainer's
    done = retrain(
        f"--root={root}", f"--source=idx:{IDX}", "--num_shards=2", "--epochs=3", *beam,
        "--trainer=vertex", "--vertex_project=my-project-1", "--vertex_region=us-central1",
        "--vertex_image=europe-docker.pkg.dev/p/r/digits:1", "--dry_run", "--window=day",
        GOOGLE_APPLICATION_CREDENTIALS="/none/there.json",
    )  # fmt: skip
    assert (done.returncode, service.requests) == (0, []), done.stderr
    assert BUCKET.walk() == before
    text, brace, requests = done.stdout.partition("\n{")
    beams, end = json.JSONDecoder().raw_decode(brace[1:] + requests)
    job = json.loads((brace[1:] + requests)[end:])["customJob"]
    plan, lines = text.split("\n\n")
    assert plan.startswith(f"read     idx:{IDX}\nmake     the dataset {root}/datasets/")
    dataset, training, report = map(shlex.split, lines.splitlines())
    assert dataset[:4] == ["python", "-m", "pipeline.preprocess", f"--source=idx:{IDX}"]
    assert training[:3] == ["python", "-m", "pipeline.vertex"]
    assert report[:3] == ["python", "-m", "pipeline.evaluate"]
    assert dataset[-len(beam) :] == report[-len(beam) :] == beam
    container = job["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]
    assert container["args"][0] == training[3]
    # Each is a command that its stage takes as it stands, and prints the exact request of; the
    # first one's is printed already.
    made = helpers.run_python(*dataset[1:], "--dry_run", timeout=PATIENCE)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["request"]["body"]["type"] == "JOB_TYPE_BATCH"
    assert same_sent(beams, json.loads(made.stdout))
    assert (BUCKET.walk(), service.requests) == (before, [])


def same_sent(*plans):
    """Whether dry runs tell of the same files and the same request."""
    kinds = [
        (
            sorted(staged["file"].rpartition("/")[2] for staged in plan["staged"]),
            plan["request"]["url"],
            comparable(Service()._parse(json.dumps(plan["request"]["body"]).encode())),
        )
        for plan in plans
    ]
    return all(kind == kinds[0] for kind in kinds)


def test_the_chains_dry_run_tells_of_an_evaluation_once_nothing_is_left_before_it(
    whole, service, models, output
):
    _, dataset, _ = whole
    words = [*scored(MODELS, dataset, output), *arguments(service, *IMAGE)]
    training = ["trainer.task", f"--dataset_dir={dataset}"]
    assert commands.dataflow_request([training, ["pipeline.evaluate", *words]], None) is None
    told = json.loads(commands.dataflow_request([["pipeline.evaluate", *words]], None))
    assert told.keys() == {"staged", "request"}
    done = helpers.run_cli("pipeline.evaluate", *words, "--dry_run", timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert same_sent(told, json.loads(done.stdout))
    assert service.requests == []


# Stopping


def running(service, output, *flags):
    """Starts the command, and waits until it follows its job."""
    process = start(service, output, *flags)
    wait_until(lambda: any(method == "GET" for method, _ in service.requests), process)
    return process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"]
)
def test_told_to_stop_it_cancels(service, output, number, code):
    service.script = FOREVER
    process = running(service, output, *IMAGE)
    process.send_signal(number)
    found, said = end(process)
    assert found == code, said
    assert service.only.cancelled
    assert "2026-11-20_03_00_00-1 was cancelled" in said
    assert list(output.parent.walk()) == []


def test_told_to_stop_while_it_submits_it_cancels(service, output):
    service.script = FOREVER
    submitting = threading.Event()
    create = service._create
    process = start(service, output, *IMAGE)

    def slowly(*request):
        submitting.set()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        return create(*request)

    service._create = slowly
    assert submitting.wait(PATIENCE)
    code, said = end(process)
    assert code == 143, said
    assert service.only.cancelled
    assert list(output.parent.walk()) == []


def test_told_to_detach_it_leaves_the_job_and_takes_it_up_again(service, output, local, tmp_path):
    going_on = threading.Event()
    execute = from_the_bucket(tmp_path / "job")
    service.script = Script(execute=lambda job: going_on.wait() and execute(job))
    process = running(service, output, *PACKAGE, "--on_sigterm=detach")
    process.terminate()
    code, said = end(process)
    assert code == 143, said
    assert not service.only.cancelled
    last = said.splitlines()[-1]
    assert "stopped: job 2026-11-20_03_00_00-1 goes on alone" in last
    assert "gcloud dataflow jobs show 2026-11-20_03_00_00-1 --region europe-west1" in last

    # With other options it would make something else of the same folder.
    done = run_preprocess(service, output, *IMAGE, "--num_shards=5")
    assert done.returncode == 75
    assert "gcloud dataflow jobs cancel 2026-11-20_03_00_00-1" in done.stderr.splitlines()[-1]

    going_on.set()
    wait_until(lambda: not service.only.working, None)
    done = run_preprocess(service, output, *PACKAGE)
    assert done.returncode == 0, done.stderr
    assert "going on with job 2026-11-20_03_00_00-1, which was left running" in done.stderr
    assert len(service.jobs) == 1
    assert_equal(files_of(output), files_of(local))
    assert beside(output) == []


def again(service, output):
    """Gives the command again, once the lock of the one that was killed has lapsed."""
    done = run_preprocess(service, output, *PACKAGE)
    if done.returncode == 75:
        time.sleep(3.0)
        done = run_preprocess(service, output, *PACKAGE)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_job_whose_command_was_killed_is_taken_up_again(service, output, local, tmp_path):
    going_on = threading.Event()
    execute = from_the_bucket(tmp_path / "job")
    service.script = Script(execute=lambda job: going_on.wait() and execute(job))
    process = running(service, output, *PACKAGE)
    process.kill()
    end(process)
    going_on.set()
    again(service, output)
    assert len(service.jobs) == 1
    assert_equal(files_of(output), files_of(local))
    assert beside(output) == []


def test_a_job_whose_command_was_killed_as_it_asked_for_it_is_taken_up_by_its_name(
    service, output, local, tmp_path
):
    service.script = Script(execute=from_the_bucket(tmp_path / "job"))
    process = start(service, output, *PACKAGE)
    create = service._create

    def heard(*request):
        answer = create(*request)
        process.kill()
        process.wait()
        return answer

    service._create = heard
    end(process)
    assert gcs_publish._read_kept(output.parent / ".out.incomplete")[1]["job_id"] == ""
    said = again(service, output)
    assert "going on with job 2026-11-20_03_00_00-1, which was left running" in said
    assert len(service.jobs) == 1
    assert_equal(files_of(output), files_of(local))
    assert beside(output) == []


def test_a_dataset_whose_job_is_done_is_paid_for_once(service, output, local, tmp_path):
    service.script = Script(execute=from_the_bucket(tmp_path / "job"))
    killed = KILLED.format("preprocess.require_unchanged")
    done = run("preprocess", service, *dataset(output), *PACKAGE, first=killed)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert service.only.state == "DONE"
    assert files_of(output) == {}
    assert "going on with job 2026-11-20_03_00_00-1" in again(service, output)
    assert len(service.jobs) == 1
    assert_equal(files_of(output), files_of(local))
    assert beside(output) == []


def test_a_report_whose_job_is_done_is_paid_for_once(whole, service, models, output, tmp_path):
    _, scored_dataset, _ = whole
    files, _ = models
    flags = (*scored(MODELS, scored_dataset, output), *PACKAGE)
    service.script = Script(execute=from_the_bucket(tmp_path / "job"))
    done = run("evaluate", service, *flags, first=KILLED.format("evaluate.page.render_html"))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert files_of(output) == {}
    time.sleep(3.0)
    done = run("evaluate", service, *flags)
    assert done.returncode == 0, done.stderr
    assert len(service.jobs) == 1
    assert_equal(files_of(output), files)
    assert beside(output) == []


def test_a_job_that_failed_alone_is_begun_again(service, output):
    service.script = FOREVER
    process = running(service, output, *IMAGE, "--on_sigterm=detach")
    process.terminate()
    assert end(process)[0] == 143
    (kept,) = output.parent.iterdir()
    assert gcs_publish._read_kept(kept)[1]["job_id"] == "2026-11-20_03_00_00-1"
    service.only.script = Script(states=("FAILED",))
    service.script = Script(states=("CANCELLED",))
    done = run_preprocess(service, output, *IMAGE)
    assert done.returncode == 1
    assert "2026-11-20_03_00_00-1, which was left running, failed: starting again" in done.stderr
    assert "2026-11-20_03_00_00-2 was cancelled" in done.stderr.splitlines()[-1]
    assert list(output.parent.walk()) == []
