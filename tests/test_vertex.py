"""Training on Vertex AI over the wire: the real client, and a stand-in that runs what it gets."""

import datetime
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import helpers
import pytest

from pipeline import vertex_checks, vertex_follow, vertex_job, vertex_options
from pipeline.command import UNREACHABLE, InputError, UnreachableError
from pipeline.services import RefusedError
from pipeline.vertex_client import JobError, Service, as_job
from pipeline.vertex_job import Task
from pipeline.vertex_options import VertexConfig

pytestmark = pytest.mark.cloud

IMAGE = "us-docker.pkg.dev/my-project/digits/digits-pipeline:1"
PLACE = {"project": "my-project", "region": "us-central1", "image": IMAGE}
TASK = Task(dataset_dir="/gcs/bucket/dataset", run_dir="/gcs/bucket/runs/run")
# Enough epochs to be caught in the middle of them.
TRAINING = (
    "--hidden_units=16,12", "--batch_size=20", "--epochs=20", "--steps_per_call=25",
    "--checkpoint_seconds=0", "--reproducible",
)  # fmt: skip


@pytest.fixture
def service(tmp_path):
    import vertex_service  # which loads the API's types

    with vertex_service.Service(tmp_path / "gcs") as running:
        yield running


@pytest.fixture
def bucket(service, small_dataset):
    """A mounted bucket with a dataset."""
    folder = service.mounts / "bucket"
    shutil.copytree(small_dataset, folder / "dataset")
    return folder


def config_of(service, **values):
    return VertexConfig(
        **PLACE, endpoint=service.url, **{"poll_seconds": 0.05, "patience_seconds": 20.0} | values
    )


def finish(service, *, task=TASK, **values):
    """What the stage does once its flags are checked, in this process."""
    config = config_of(service, **values)
    return vertex_follow.Training(Service(config), config, task).finish()


def flags(service, *more):
    config = config_of(service)
    return (
        *vertex_options.arguments(config), f"--dataset_dir={TASK.dataset_dir}",
        f"--run_dir={TASK.run_dir}", *more,
    )  # fmt: skip


def start_stage(service, *more, **options):
    """The stage in a process of its own, whose stderr can be read."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.vertex", *flags(service, *more)],
        cwd=helpers.ROOT, env=os.environ | {"PYTHONPATH": str(helpers.ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def wait_until(holds, what):
    deadline = time.monotonic() + 240
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def epochs_done(bucket):
    path = bucket / "runs/run/metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def result(run_dir):
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"], line["examples_per_second"]
    return json.loads((run_dir / "export" / "model.json").read_text())["weights_sha256"], lines


@pytest.fixture(scope="module")
def expected(small_dataset, tmp_path_factory):
    """What the same training comes to in a process here."""
    run_dir = tmp_path_factory.mktemp("here") / "run"
    done = helpers.run_cli(
        "trainer.task", f"--dataset_dir={small_dataset}", f"--run_dir={run_dir}", *TRAINING,
        env={"CUDA_VISIBLE_DEVICES": "-1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return result(run_dir)


# The request, in the API's own types


def test_every_field_of_the_request(service):
    from google.cloud.aiplatform_v1 import types
    from google.protobuf.duration_pb2 import Duration

    service.program = "pass"
    accelerators = {"accelerator_type": "NVIDIA_TESLA_A100", "accelerator_count": 2}
    task = Task(
        dataset_dir="gs://bucket/data", run_dir="gs://bucket/runs/day-core-0", attempt=1,
        initial_weights="gs://bucket/models/3", arguments=("--epochs=3", "--seed", "7"),
    )  # fmt: skip
    code = finish(
        service, task=task, machine_type="a2-highgpu-2g", **accelerators, workers=3, spot=True,
        timeout=5400, service_account="a@b", network="projects/1/global/networks/n",
        reserved_ip_ranges=("r", "s"), labels=("team=digits",),
    )  # fmt: skip
    assert code == 0
    container = types.ContainerSpec(
        image_uri=IMAGE,
        command=["python", "-m", "trainer.task"],
        args=[
            "--dataset_dir=gs://bucket/data",
            "--run_dir=gs://bucket/runs/day-core-0",
            "--model_dir=gs://bucket/runs/day-core-0/export",
            "--checkpoint_dir=gs://bucket/runs/day-core-0/checkpoints",
            "--tensorboard_dir=gs://bucket/runs/day-core-0/tensorboard",
            "--initial_weights=gs://bucket/models/3",
            "--epochs=3",
            "--seed",
            "7",
        ],
    )
    machine = types.MachineSpec(
        machine_type="a2-highgpu-2g",
        accelerator_type=types.AcceleratorType.NVIDIA_TESLA_A100,
        accelerator_count=2,
    )
    wanted = types.CustomJob(
        display_name="day-core-0-1",
        job_spec=types.CustomJobSpec(
            worker_pool_specs=[
                types.WorkerPoolSpec(
                    machine_spec=machine, replica_count=count, container_spec=container
                )
                for count in (1, 2)
            ],
            scheduling=types.Scheduling(
                timeout=Duration(seconds=5400),
                strategy=types.Scheduling.Strategy.SPOT,
                restart_job_on_worker_restart=True,
            ),
            base_output_directory=types.GcsDestination(
                output_uri_prefix="gs://bucket/runs/day-core-0/"
            ),
            service_account="a@b",
            network="projects/1/global/networks/n",
            reserved_ip_ranges=["r", "s"],
        ),
        labels={"team": "digits", "digits_run": task.run_label, "digits_attempt": "1"},
    )
    assert service.received == [wanted]
    assert service.job.message.name == "projects/my-project/locations/us-central1/customJobs/1"


def test_the_plainest_request(service):
    from google.cloud.aiplatform_v1 import types
    from google.protobuf.duration_pb2 import Duration

    service.program = "pass"
    attachment = "projects/p/regions/r/networkAttachments/n"
    assert finish(service, network_attachment=attachment) == 0
    (job,) = service.received
    spec = job.job_spec
    assert [pool.replica_count for pool in spec.worker_pool_specs] == [1]
    assert spec.worker_pool_specs[0].machine_spec == types.MachineSpec(machine_type="n1-standard-4")
    assert spec.scheduling == types.Scheduling(
        timeout=Duration(seconds=86400), strategy=types.Scheduling.Strategy.STANDARD
    )
    assert spec.psc_interface_config == types.PscInterfaceConfig(network_attachment=attachment)
    assert (spec.service_account, spec.network, list(spec.reserved_ip_ranges)) == ("", "", [])
    assert not spec.worker_pool_specs[0].container_spec.env
    # What a dry run prints is this message.
    printed = vertex_job.request(config_of(service, network_attachment=attachment), TASK)
    assert types.CustomJob.from_json(json.dumps(printed["customJob"])) == job


def test_the_accelerators_are_those_of_the_api():
    from google.cloud.aiplatform_v1 import types

    known = {kind.name for kind in types.AcceleratorType if kind.name.startswith("NVIDIA_")}
    assert set(vertex_checks.ACCELERATORS) == known


# The whole stage, on real training


def test_success_trains_as_here(service, bucket, expected):
    process = start_stage(service, *TRAINING)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, (said, service.outputs())
    assert result(bucket / "runs/run") == expected
    assert service.job.starts == 1
    assert sorted(path.name for path in (bucket / "runs/run").iterdir() if path.name[0] != ".") == [
        "checkpoints", "config.json", "export", "metrics.jsonl", "tensorboard",
    ]  # fmt: skip
    lines = said.splitlines()
    name = "projects/my-project/locations/us-central1/customJobs/1"
    assert lines[0] == f"submitted {name} (run-0)"
    assert lines[1].startswith("https://console.cloud.google.com/vertex-ai/locations/us-central1/")
    states = [line.split(" after ")[0] for line in lines[2:]]
    assert states[-1] == "succeeded"
    assert [*dict.fromkeys(states)] == states  # each change once
    assert set(states) <= {"pending", "running", "succeeded"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_preempted_and_started_again_it_ends_in_the_same_weights(number, service, bucket, expected):
    task = Task(dataset_dir=TASK.dataset_dir, run_dir=TASK.run_dir, arguments=TRAINING)
    with ThreadPoolExecutor() as pool:
        ending = pool.submit(finish, service, task=task, spot=True)
        wait_until(lambda: epochs_done(bucket) >= 2, "an epoch")
        service.job.preempt(number)
        assert ending.result(600) == 0, service.outputs()
    assert service.job.starts == 2
    assert service.job.codes == [[143 if number == signal.SIGTERM else -number], [0]]
    assert len(service.received) == 1
    assert result(bucket / "runs/run") == expected


def test_two_workers_meet_by_the_cluster_that_the_service_describes(service, bucket, expected):
    task = Task(dataset_dir=TASK.dataset_dir, run_dir=TASK.run_dir, arguments=TRAINING)
    assert finish(service, task=task, workers=2) == 0, service.outputs()
    assert service.job.codes == [[0, 0]]
    assert result(bucket / "runs/run")[0] == expected[0]


def test_wrong_input_of_the_trainer_stays_2(service, tmp_path):
    (service.mounts / "bucket").mkdir(parents=True)  # without a dataset in it
    process = start_stage(service, *TRAINING)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 2, said
    last = said.splitlines()[-1]
    assert "exited with a non-zero status of 2." in last
    assert "; its log: https://console.cloud.google.com/vertex-ai/" in last
    assert "Traceback" not in said
    (output,) = service.outputs()
    assert "no such folder; expected a dataset" in output


# The chain that starts it: what SIGTERM and SIGKILL of it come to

CHAIN = """
import sys
from pathlib import Path
from pipeline import storage
from pipeline.stages import StageError, Stages
with storage.locked(Path(sys.argv[1])) as lock, Stages(lock) as stages:
    try:
        stages.run("pipeline.vertex", *sys.argv[2:])
    except StageError as error:
        sys.exit(error.code)
"""


def start_chain(service, tmp_path):
    return subprocess.Popen(
        [sys.executable, "-c", CHAIN, tmp_path / "root", *flags(service, *TRAINING)],
        env=os.environ | {"PYTHONPATH": str(helpers.ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_sigterm_cancels_and_the_same_command_goes_on(service, bucket, tmp_path, expected):
    (tmp_path / "root").mkdir()
    chain = start_chain(service, tmp_path)
    wait_until(lambda: epochs_done(bucket) >= 2, "an epoch")
    chain.send_signal(signal.SIGTERM)
    _, said = chain.communicate(timeout=300)
    assert chain.returncode == 143, said
    assert service.job.state == "CANCELLED"
    assert service.job.codes == [[143]]
    assert not (bucket / "runs/run/export").exists()
    assert "cancelled; the same command goes on from the last checkpoint" in said
    chain = start_chain(service, tmp_path)
    _, said = chain.communicate(timeout=600)
    assert chain.returncode == 0, said
    assert [job.state for job in service.jobs.values()] == ["CANCELLED", "SUCCEEDED"]
    assert result(bucket / "runs/run") == expected


def test_killed_with_its_chain_the_job_goes_on_and_is_found_again(
    service, bucket, tmp_path, expected
):
    (tmp_path / "root").mkdir()
    chain = start_chain(service, tmp_path)
    wait_until(lambda: epochs_done(bucket) >= 2, "an epoch")
    service.job.send(signal.SIGSTOP)  # so that it is still at work when it is looked for
    chain.kill()
    assert chain.wait() == -signal.SIGKILL
    heard = len(service.heard)
    chain = start_chain(service, tmp_path)
    wait_until(lambda: "get" in service.heard[heard:], "a question")
    service.job.send(signal.SIGCONT)
    _, said = chain.communicate(timeout=600)
    assert chain.returncode == 0, said
    assert "found projects/my-project/locations/us-central1/customJobs/1 (run-0)" in said
    assert service.heard[heard] == "list"
    assert "create" not in service.heard[heard:]
    assert service.job.starts == 1
    assert result(bucket / "runs/run") == expected


# What goes wrong on the way


def test_quota(service):
    text = "The following quota metrics exceed quota limits:\naiplatform.googleapis.com/custom_x"
    service.faults = [("create", (429, "RESOURCE_EXHAUSTED", text))]
    with pytest.raises(JobError) as caught:
        finish(service)
    assert caught.value.exit_code == UNREACHABLE
    message = str(caught.value)
    assert message.startswith(
        "Vertex AI has no room in project my-project, region us-central1: The"
    )
    assert "limits: aiplatform.googleapis.com/custom_x; try --vertex_spot, another" in message
    assert service.url not in message
    assert service.heard == ["list", "create"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ((400, "INVALID_ARGUMENT", "no such machine"), r"it \(HTTP 400\): no such machine$"),
        ((403, "PERMISSION_DENIED", "not you"), r"access denied \(HTTP 403\): not you; expected"),
        ((404, "NOT_FOUND", "no such project"), r"refuses it \(HTTP 404\): no such project$"),
    ],
)
def test_a_refusal_is_wrong_input(fault, said, service):
    service.faults = [("create", fault)]
    with pytest.raises(RefusedError, match=said) as caught:
        finish(service)
    assert caught.value.exit_code == 2
    assert not service.jobs


def test_what_the_service_checks_it_finds_in_order(service):
    # The stand-in refuses as the service would: that it accepts ours in all other tests counts.
    with pytest.raises(RefusedError, match="List of found errors: timeout"):
        finish(service, timeout=0)


LOST = [
    ("list", "drop"), ("list", "cut"), ("list", (503, "UNAVAILABLE", "later")),
    ("list", (429, "RESOURCE_EXHAUSTED", "too often")),
    ("create", "drop"), ("create", "lose"), ("create", "cut"), ("create", (500, "INTERNAL", "x")),
    ("get", "drop"), ("get", "cut"), ("get", (504, "DEADLINE_EXCEEDED", "x")),
    ("get", (429, "RESOURCE_EXHAUSTED", "too often")),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "how"), LOST)
def test_a_lost_connection_makes_no_second_job(verb, how, service, caplog):
    service.program = "pass"
    service.faults = [(verb, how), (verb, how)]
    caplog.set_level("INFO", "digits_pipeline")
    service.may_start.clear()  # so that it has not ended before it is looked for
    with ThreadPoolExecutor() as pool:
        ending = pool.submit(finish, service)
        wait_until(lambda: "get" in service.heard, "a question")
        service.may_start.set()
        assert ending.result(240) == 0
    assert len(service.jobs) == len(service.received) == 1
    # A request for a job that was heard is not made again, so nothing goes wrong with it twice.
    heard_at_once = verb == "create" and how in ("lose", "cut")
    assert len(service.faults) == (1 if heard_at_once else 0)
    assert sum("no answer from Vertex AI" in text for text in caplog.messages) == 1
    assert service.job.state == "SUCCEEDED"


def test_a_service_that_goes_silent_for_good_is_given_up_and_the_job_goes_on(service):
    service.program = "import time; time.sleep(600)"
    with ThreadPoolExecutor() as pool:
        ending = pool.submit(finish, service, patience_seconds=0.5)
        wait_until(lambda: "get" in service.heard, "a question")
        service.is_silent = True
        said = r"no answer from Vertex AI for 0\.5 seconds"
        with pytest.raises(UnreachableError, match=said) as caught:
            ending.result(60)
    assert caught.value.exit_code == UNREACHABLE
    assert service.job.state == "RUNNING"


def test_a_service_that_is_not_there_is_given_up():
    (port,) = helpers.free_ports(1)
    config = VertexConfig(
        **PLACE, endpoint=f"http://127.0.0.1:{port}", poll_seconds=0.05, patience_seconds=0.2
    )
    with pytest.raises(UnreachableError, match=r"no answer .* \(ConnectionError\)"):
        vertex_follow.Training(Service(config), config, TASK).finish()


def test_a_job_that_is_gone_is_told(service):
    service.program = "import time; time.sleep(600)"
    service.faults = [("get", (404, "NOT_FOUND", "The CustomJob does not exist."))]
    with pytest.raises(JobError, match=r"customJobs/1: its state is not told any more: .*404"):
        finish(service)


def test_the_jobs_of_other_runs_and_ended_ones_are_left_alone(service):
    service.program = "pass"
    for attempt in range(3):  # more than a page of the list
        task = Task(dataset_dir=TASK.dataset_dir, run_dir=TASK.run_dir, attempt=attempt)
        assert finish(service, task=task) == 0
    service.may_start.clear()
    other = Task(dataset_dir=TASK.dataset_dir, run_dir="/gcs/bucket/runs/other")
    with ThreadPoolExecutor() as pool:
        theirs = pool.submit(finish, service, task=other)
        wait_until(lambda: len(service.jobs) == 4, "a job")
        ours = pool.submit(finish, service)
        wait_until(lambda: len(service.jobs) == 5, "a job")
        with pytest.raises(InputError, match=r"customJobs/5 \(run-0\) is at work here"):
            finish(service, task=Task(dataset_dir="x", run_dir=TASK.run_dir, attempt=9))
        service.may_start.set()
        assert [theirs.result(60), ours.result(60)] == [0, 0]
    assert len(service.jobs) == 5


def test_a_stop_while_the_job_waits_for_machines(service):
    service.may_start.clear()
    process = start_stage(service, *TRAINING)
    wait_until(lambda: "get" in service.heard, "a question")
    process.terminate()
    wait_until(lambda: "cancel" in service.heard, "a cancellation")
    service.may_start.set()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert said.splitlines()[-1].endswith(
        "stopped: cancelled; the same command goes on from the last checkpoint"
    )
    assert (service.job.state, service.job.starts) == ("CANCELLED", 0)


# Credentials

SECRET = "c2VjcmV0LW9mLW5vYm9keS1idXQtdGhlLXRlc3Q"


def fake_account(folder):
    """Files of a service account, and of a certificate for 127.0.0.1, of one new key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "stand-in")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    account = {
        "type": "service_account",
        "project_id": "my-project",
        "private_key_id": SECRET,
        "private_key": pem.decode(),
        "client_email": "train@my-project.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": "http://127.0.0.1:9/token",
    }
    (folder / "account.json").write_text(json.dumps(account))
    (folder / "ca.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "tls.pem").write_bytes(pem + (folder / "ca.pem").read_bytes())
    return folder / "account.json", folder / "ca.pem", folder / "tls.pem"


@pytest.mark.parametrize("answer", ["echo", "drop"])
def test_no_credentials_are_said_anywhere(answer, tmp_path):
    """Real credentials reach a server, which answers with them; all that is said is searched."""
    import vertex_service

    account, ca, tls = fake_account(tmp_path)
    with vertex_service.Service(tmp_path / "gcs", tls=tls) as service:
        service.faults = [("list", answer)] * 100
        config = config_of(service, patience_seconds=1.0)
        done = helpers.run_cli(
            "pipeline.vertex", *vertex_options.arguments(config), "--verbosity=1",
            f"--dataset_dir={TASK.dataset_dir}", f"--run_dir={TASK.run_dir}",
            env={
                "GOOGLE_APPLICATION_CREDENTIALS": account, "REQUESTS_CA_BUNDLE": ca,
                "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1",  # for nobody else
                "GOOGLE_OAUTH_ACCESS_TOKEN": f"ya29.{SECRET}", "DIGITS_TOKEN": SECRET,
            },
        )  # fmt: skip
    said = done.stdout + done.stderr
    if answer == "echo":
        assert done.returncode == 2, said
        expected = "access denied (HTTP 403): Authorization: (left out); expected the role Vertex"
    else:
        assert done.returncode == 1, said
        expected = "no answer from Vertex AI for 1 seconds (ConnectionError)"
    assert expected in said.splitlines()[-1]
    assert "Traceback" not in said
    token = service.tokens[0]
    assert token.startswith("Bearer eyJ")  # claims that the account has signed
    secrets = [SECRET, *token.removeprefix("Bearer ").split(".")]
    secrets += json.loads(account.read_text())["private_key"].splitlines()[1:-1]
    assert len(secrets) == 1 + 3 + 26
    assert not [secret for secret in secrets if secret in said]


def test_nothing_of_our_environment_goes_into_the_request(service, monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", f"/keys/{SECRET}")
    monkeypatch.setenv("DIGITS_TOKEN", SECRET)
    service.program = "pass"
    assert finish(service) == 0
    (job,) = service.received
    assert SECRET not in type(job).to_json(job)


def test_what_the_service_repeats_of_a_token_is_left_out(service):
    text = f"Request had invalid credentials: Authorization: Bearer ya29.{SECRET}"
    service.faults = [("create", (403, "PERMISSION_DENIED", text))]
    with pytest.raises(RefusedError) as caught:
        finish(service)
    assert SECRET not in str(caught.value)
    assert "invalid credentials: Authorization: (left out)" in str(caught.value)


def test_a_state_that_is_not_known_yet_is_no_end():
    from google.cloud.aiplatform_v1.types import CustomJob

    job = as_job(CustomJob(name="n", state=99))
    assert (job.state, job.is_over) == ("UNSPECIFIED", False)
