"""The whole chain with a root in a bucket, trained on Vertex AI: a real server, and a stand-in."""

import os
import signal
import subprocess
import sys

import helpers
import pytest
import test_gcs
from test_chain_gcs import contents, lines
from test_gcs import wait_until

from pipeline import leases, registry, vertex_options
from pipeline.gcs import GcsPath
from pipeline.vertex_options import VertexConfig

pytestmark = pytest.mark.cloud

FLAGS = (
    "--source=digits", "--num_shards=2", "--min_class_accuracy=0", "--window=w",
    "--hidden_units=16,12", "--min_accuracy=0",
)  # fmt: skip
LEASE_SECONDS = "20"


@pytest.fixture(scope="module", autouse=True)
def running(tmp_path_factory):
    with (
        test_gcs.server(tmp_path_factory.mktemp("buckets") / "data") as process,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("DIGITS_LEASE_SECONDS", LEASE_SECONDS)
        yield process


@pytest.fixture
def service(tmp_path):
    import vertex_service  # which loads the API's types

    with vertex_service.Service(tmp_path / "gcs") as running:
        yield running


def on_vertex(service):
    config = VertexConfig(
        project="my-project", region="us-central1", image="us-docker.pkg.dev/p/r/i:1",
        endpoint=service.url, poll_seconds=0.2, spot=True,
    )  # fmt: skip
    return ("--trainer=vertex", *vertex_options.arguments(config))


def retrain(root, *flags):
    return helpers.run_cli("pipeline.retrain", f"--root={root}", *FLAGS, *flags, timeout=1800)


def start(root, *flags):
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.retrain", f"--root={root}", *FLAGS, *flags],
        cwd=helpers.ROOT, env=os.environ | {"PYTHONPATH": str(helpers.ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_killed_before_its_machines_come_the_chain_finds_its_job_again(service, tmp_path):
    root = GcsPath(test_gcs.BUCKET, "killed/root")
    service.may_start.clear()  # no machines yet
    one = start(root, "--epochs=1", *on_vertex(service))
    wait_until(lambda: "get" in service.heard or one.poll() is not None, seconds=900)
    one.kill()
    _, said = one.communicate()
    assert one.returncode == -signal.SIGKILL, said
    assert len(service.jobs) == 1
    heard = len(service.heard)
    two = start(root, "--epochs=1", *on_vertex(service))
    while two.poll() is None and "get" not in service.heard[heard:]:
        try:
            two.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
        if two.returncode == 75:  # the lock of the killed one has to lapse first
            two = start(root, "--epochs=1", *on_vertex(service))
    service.may_start.set()
    _, said = two.communicate(timeout=1800)
    assert two.returncode == 0, (said, service.outputs())
    assert "found projects/my-project/locations/us-central1/customJobs/1 (w-core-" in said
    assert (len(service.received), service.job.starts, service.job.codes) == (1, 1, [[0]])
    (champion,) = registry.versions(root)
    (line,) = lines(root)
    assert (line["outcome"], line["run_id"]) == ("promoted", champion.run_id)
    spec = service.received[0].job_spec
    assert spec.base_output_directory.output_uri_prefix == f"{root}/runs/{champion.run_id}/"
    # Where it was trained is no part of what it is.
    done = retrain(root, "--epochs=1")
    assert (done.returncode, "nothing new" in done.stderr) == (0, True), done.stderr
    local = tmp_path / "root"
    assert retrain(local, "--epochs=1").returncode == 0
    (here,) = registry.versions(local)
    for name in ("model_id", "weights_sha256", "dataset_id", "run_id", "accuracy"):
        assert getattr(champion, name) == getattr(here, name)
    names = [{name.partition("events.out")[0] for name in contents(each)} for each in (root, local)]
    assert names[0] == names[1]


def test_preempted_twice_while_it_holds_the_lock_of_its_run_it_ends_in_the_same_weights(
    service, tmp_path
):
    root = GcsPath(test_gcs.BUCKET, "preempted/root")
    flags = ("--epochs=60", "--checkpoint_seconds=0")
    one = start(root, *flags, *on_vertex(service))

    def saved():
        found = root / "runs"
        return any("checkpoints/step-" in name for name in found.walk()) or one.poll() is not None

    def owner():
        """Whose the lock of the only run is, if it is anybody's."""
        (run,) = (root / "runs").iterdir()
        lock = run / leases.LOCK_NAME
        return leases.parse_owner(lock.read_bytes()).token if lock.is_file() else None

    wait_until(saved, seconds=900)
    killed = owner()
    service.job.preempt(signal.SIGKILL)
    wait_until(lambda: len(service.jobs) == 2 or one.poll() is not None, seconds=300)
    wait_until(lambda: owner() not in (None, killed) or one.poll() is not None, seconds=300)
    list(service.jobs.values())[-1].preempt(signal.SIGKILL)
    _, said = one.communicate(timeout=1800)
    assert one.returncode == 0, (said, service.outputs())
    assert said.count("exited with a non-zero status of 75.") == 2
    assert [each.codes for each in service.jobs.values()] == [[[-9], [75]], [[-9], [75]], [[0]]]
    (champion,) = registry.versions(root)
    local = tmp_path / "root"
    assert retrain(local, *flags).returncode == 0
    assert registry.versions(local)[0].weights_sha256 == champion.weights_sha256
