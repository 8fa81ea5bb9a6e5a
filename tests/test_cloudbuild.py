"""cloudbuild.yaml, and the Dockerfile that it builds: read, and run without Cloud Build or Docker.

The steps' commands are the file's own, with its substitutions filled in. Stand-ins are: for the
program docker one that knows images by their names alone; for the image a fresh environment in
which the Dockerfile's own commands were run; for the services those of test_dataflow_jobs.py and
test_vertex.py, which run what they are sent in that same environment; for buckets fake-gcs-server.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import cloud_build
import dockerfile
import helpers
import pytest
import test_gcs

from pipeline import command

FILE = helpers.ROOT / "cloudbuild.yaml"
BUILD = cloud_build.load(FILE)
STEPS = {step["id"]: step for step in BUILD["steps"]}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SERVERS = {"PROJECT_ID": "my-project-1", "COMMIT_SHA": COMMIT}
VALUES = BUILD["substitutions"] | SERVERS
FEW = "tests/test_command.py tests/test_dataflow_client.py"  # tests, some of them of the cloud
IMAGE = "us-central1-docker.pkg.dev/my-project-1/digits/digits-pipeline"


# What it says


def test_every_substitution_is_used_and_defined():
    used = cloud_build.names_in(BUILD)
    own = {name for name in used if name.startswith("_")}
    assert own == BUILD["substitutions"].keys()
    assert used - own == {"PROJECT_ID", "COMMIT_SHA"}
    assert {"PROJECT_ID", "COMMIT_SHA"} <= {*cloud_build.OF_A_BUILD, *cloud_build.OF_A_TRIGGER}
    assert all(re.fullmatch(r"_[A-Z0-9_]{1,99}", name) for name in own)
    assert BUILD["options"]["substitutionOption"] == "MUST_MATCH"
    assert BUILD["options"]["dynamicSubstitutions"] is True  # the defaults name each other


def test_defaults_make_sense():
    filled = cloud_build.substitute(BUILD, VALUES)
    assert filled["steps"][-1]["name"] == f"{IMAGE}:{COMMIT}"
    account = "digits-build@my-project-1.iam.gserviceaccount.com"
    assert filled["serviceAccount"] == f"projects/my-project-1/serviceAccounts/{account}"
    assert filled["options"]["logging"] == "CLOUD_LOGGING_ONLY"  # an own account asks for it
    assert filled["substitutions"]["_BUCKET"] == "my-project-1-digits"


def test_every_step_has_a_name_a_place_and_an_end():
    assert len(STEPS) == len(BUILD["steps"]) == 8
    order = [step["id"] for step in cloud_build.in_order(BUILD["steps"])]
    assert order == list(STEPS)
    longest = {}
    for name in order:
        waits = [wait for wait in STEPS[name]["waitFor"] if wait != "-"]
        before = max((longest[wait] for wait in waits), default=0)
        longest[name] = before + cloud_build.seconds(STEPS[name]["timeout"])
    assert max(longest.values()) <= cloud_build.seconds(BUILD["timeout"]) <= 24 * 3600
    assert set(STEPS["push"]["waitFor"]) == {"cloud", "build"}  # what did not pass has no image
    assert set(STEPS["cloud"]["waitFor"]) == {"test", "emulator"}
    assert STEPS["retrain"]["waitFor"] == ["push"]


def test_a_champion_that_stays_and_another_at_work_are_no_failures():
    assert STEPS["retrain"]["allowExitCodes"] == [command.KEPT_CHAMPION, command.LOCKED] == [3, 75]
    assert not any("allowExitCodes" in step for step in BUILD["steps"] if step["id"] != "retrain")
    assert not any("allowFailure" in step for step in BUILD["steps"])


def test_no_script_holds_what_others_write():
    assert all(cloud_build.names_in(step["args"]) == set() for step in BUILD["steps"])


@pytest.mark.parametrize("name", sorted({*BUILD["substitutions"], "PROJECT_ID"}))
@pytest.mark.parametrize(
    "text", ['a"; touch x; "', "$(touch x)", "`touch x`", "'", "*", "a;touch x", "x\ntouch x"]
)
def test_a_substitution_is_text_to_the_shell(name, text, tmp_path):
    """Also one that whoever may start a trigger has written to be run as the build's account."""
    (tmp_path / "file").touch()
    filled = cloud_build.substitute(BUILD, VALUES | {name: text})
    step = filled["steps"][-1]
    env = dict(setting.split("=", 1) for setting in step["env"])
    words = cloud_build.arguments(step, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "python"]
    assert words[:6] == ["-m", "pipeline.retrain", "--root", env["ROOT"], "--source", env["SOURCE"]]
    assert words[words.index("--sdk_container_image") + 1] == env["IMAGE"]
    assert words[words.index("--vertex_service_account") + 1] == env["JOB_ACCOUNT"]
    split = env["FLAGS"].split()
    assert words[-len(split) :] == split
    used = {"_BUCKET": "ROOT", "_SOURCE": "SOURCE", "_REGION": "REGION", "_IMAGE": "IMAGE",
            "_JOB_ACCOUNT": "JOB_ACCOUNT", "_FLAGS": "FLAGS", "PROJECT_ID": "PROJECT"}  # fmt: skip
    assert name not in used or text in env[used[name]]


def test_it_holds_no_secrets():
    assert "availableSecrets" not in BUILD
    text = FILE.read_text().lower()
    for word in ("password", "secret", "private_key", "credentials", "token", "apikey"):
        assert word not in text


def test_substitution_as_cloud_build_does_it():
    values = {"_A": "1${_B}", "_B": "2", "PROJECT_ID": "p"}
    assert cloud_build.substitute("$_A/${_B}-$PROJECT_ID $$HOME $$$_B", values) == "12/2-p $HOME $2"
    assert cloud_build.names_in(["$_A", {"x": "$$_B ${PROJECT_ID}"}]) == {"_A", "PROJECT_ID"}
    with pytest.raises(KeyError):
        cloud_build.substitute("$_C", values)


def found(folder, *, refusal="", pushed=""):
    """Looks for the image: the process as it ended, and whether it is taken for found."""
    machine = cloud_build.Machine(folder, None, "-", {})
    machine.workspace.mkdir()
    (machine.images / "refusal").write_text(refusal)
    (machine.images / "pushed").write_text(pushed)
    step = cloud_build.substitute(STEPS["find"], VALUES)
    done = cloud_build.run(step, machine.container(step["name"]))
    return done, (machine.workspace / "image.found").exists()


def test_an_image_that_is_there_is_found_and_one_that_is_not_is_made(tmp_path):
    for name, pushed in (("there", f"{IMAGE}:{COMMIT}\n"), ("other", f"{IMAGE}:{COMMIT}0\n")):
        (tmp_path / name).mkdir()
        done, is_found = found(tmp_path / name, pushed=pushed)
        assert (done.returncode, done.stderr, is_found) == (0, "", name == "there")


def test_another_way_of_saying_that_there_is_no_image(tmp_path):
    done, is_found = found(tmp_path, refusal="manifest unknown: Failed to fetch")
    assert (done.returncode, is_found) == (0, False)


@pytest.mark.parametrize("said", ["denied: Permission denied", 'name unknown: "digits" not found'])
def test_a_registry_that_refuses_fails_the_build(said, tmp_path):
    done, is_found = found(tmp_path, refusal=said, pushed=f"{IMAGE}:{COMMIT}\n")
    assert (done.returncode, done.stderr, is_found) == (1, f"{said}\n", False)
    assert cloud_build.fails_the_build(STEPS["find"], done.returncode)


def test_the_emulator_is_the_pinned_one_and_where_it_is_looked_for():
    import install

    version = install.EMULATOR_MODULE.rpartition("@")[2]
    assert re.fullmatch(r"v\d+\.\d+\.\d+", version)
    assert install.EMULATOR.parent == helpers.ROOT / ".engines"


def test_its_own_checks_rehearse_no_build():
    """A build has no Go where its tests run, and is itself what would be rehearsed."""
    (line,) = [text for text in STEPS["cloud"]["args"] if "make" in text]
    assert line.endswith("make cloud-check SHARE=1 TESTS='cloud and not rehearsal'")
    made = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", *shlex.split(line.partition("make ")[2])],
        cwd=helpers.ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert made.splitlines()[-1].endswith("-m 'cloud and not rehearsal' --share 1")
    assert "rehearsal" not in (helpers.ROOT / ".ci/run").read_text()


def test_an_upload_without_git_lists_the_same_files(tmp_path):
    """`gcloud builds submit` brings neither .git nor .gitignore nor what that names."""
    kept = ("Makefile", "a b", "pipeline/x.py", "pipeline/out/x", ".ci/run", ".gitignore")
    left_out = (
        ".git/HEAD", "pipeline/__pycache__/x.pyc", ".venv/bin/python", ".engines/server", "out/x",
        "x.egg-info/PKG-INFO", "tests/.pytest_cache/x", "build/x",
    )  # fmt: skip
    for name in (*kept, *left_out):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert helpers.source_files(tmp_path) == sorted(kept)


def test_what_is_no_source_is_what_git_ignores():
    if not (file := helpers.ROOT / ".gitignore").is_file():
        pytest.skip("an upload holds no .gitignore")
    assert {".git/", *file.read_text().split()} == {
        "/out/", *(f"{name}/" for name in helpers.NO_SOURCES)
    }  # fmt: skip


# What it does

pytest_cloud = pytest.mark.cloud
rehearsal = pytest.mark.rehearsal


@pytest.fixture(scope="module")
def message():
    """The API's own type of a build."""
    if "CI" not in os.environ:
        pytest.importorskip("google.cloud.devtools.cloudbuild_v1", reason="needs the cloud extra")
    from google.cloud.devtools import cloudbuild_v1

    return cloudbuild_v1.Build


@pytest_cloud
def test_cloud_build_knows_every_field(message):
    from google.protobuf import json_format

    made = message.wrap(json_format.ParseDict(BUILD, message.pb(message())))
    assert [step.id for step in made.steps] == list(STEPS)
    assert made.steps[-1].allow_exit_codes == [3, 75]
    assert made.timeout.total_seconds() == cloud_build.seconds(BUILD["timeout"])
    assert made.options.machine_type.name == "E2_STANDARD_2"
    assert made.options.logging.name == "CLOUD_LOGGING_ONLY"
    with pytest.raises(json_format.ParseError, match="waitfor"):
        wrong = BUILD | {"steps": [{"name": "x", "waitfor": ["-"]}]}
        json_format.ParseDict(wrong, message.pb(message()))


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The image, as far as it comes without Docker: every RUN of the Dockerfile was run.

    A compiler is not at hand in it either: what would ask for one fails.
    """
    folder = tmp_path_factory.mktemp("image")
    made = dockerfile.Image(folder, noted=("useradd",), unset=("PIP_NO_CACHE_DIR",))
    for name in ("cc", "gcc", "c++", "g++", "cargo"):
        made.shim(name, "exit 1")
    made.build(dockerfile.read(helpers.ROOT / "Dockerfile"), helpers.ROOT)
    yield made
    shutil.rmtree(folder)


@pytest_cloud
def test_the_image_holds_the_job_and_little_else(image):
    assert image.noted == ["useradd --create-home --uid 1000 job"]
    assert image.user == "1000"
    for module in ("pipeline.retrain", "trainer.task"):
        done = image.run(["python", "-m", module, "--version"])
        assert done.stdout == f"{module} {done.stdout.split()[1]}\n"
    where = image.run(["python", "-c", "import pipeline, trainer; print(pipeline.__file__)"])
    assert Path(where.stdout.strip()).is_relative_to(image.python.parents[1] / "lib")
    assert image.run(["pip", "check"]).stdout == "No broken requirements found.\n"
    listed = json.loads(image.run(["pip", "list", "--format=json"]).stdout)
    versions = {plain(package["name"]): package["version"] for package in listed}
    pinned = pins()
    loose = {name for name in versions if versions[name] != pinned.get(name)}
    assert loose == {"pip", "digits-pipeline"}
    assert not {"pytest", "mypy", "ruff", "jax", "build"} & versions.keys()
    left = [path for path in image.root.rglob("*") if path.is_file()]
    assert left == []


@pytest_cloud
def test_the_gpu_variant_resolves_to_the_pinned_versions(image):
    """Nothing is downloaded but what says which versions go together, and that there are such."""
    done = image.run(
        ["pip", "install", "--dry-run", "--quiet", "--report=-", "--constraint=constraints.txt",
         "--no-build-isolation", "--ignore-installed", ".[report,cloud,gpu]"],
        cwd=helpers.ROOT,
    )  # fmt: skip
    found = [part["metadata"] for part in json.loads(done.stdout)["install"]]
    versions = {plain(each["name"]): each["version"] for each in found}
    assert {"tensorflow", "nvidia-cudnn-cu12", "nvidia-nccl-cu12"} <= versions.keys()
    pinned = pins()
    loose = {name for name in versions if versions[name] != pinned.get(name)}
    assert loose == {"digits-pipeline"}


def pins():
    """{package: version} of constraints.txt."""
    lock = (helpers.ROOT / "constraints.txt").read_text()
    found = re.findall(r"^([\w.-]+)==(\S+)$", lock, re.MULTILINE)
    return {plain(name): version for name, version in found}


def plain(name):
    """The name of a package as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def in_the_image(image, folder):
    """Runs a job of Dataflow's as a worker with the image would: its packages, and no others."""
    from test_dataflow_jobs import pipeline_of, staged_files

    def execute(job):
        (pool,) = job.environment.worker_pools
        assert pool.worker_harness_container_image == f"{IMAGE}:{COMMIT}"
        assert staged_files(job) == {}  # so that a worker writes nothing where only root may
        graph = folder / f"{job.name}.pb"
        graph.write_bytes(pipeline_of(job)[0])
        packages = next(image.python.parents[1].glob("lib/python*/site-packages"))
        script = helpers.ROOT / "tests/engines/run_staged.py"
        done = image.run(
            ["python", "-I", "-S", str(script), str(graph), str(packages), str(packages)],
            cwd=folder, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])

    return execute


@pytest.fixture(scope="module")
def cloud(image, tmp_path_factory):
    """A machine, the services, and a bucket with a source: (machine, services, flags)."""
    import dataflow_service
    import vertex_service

    class Vertex(vertex_service.Service):
        """Runs containers with the image's Python, which finds nothing but what is in it."""

        def command(self, container):
            assert container.image_uri == f"{IMAGE}:{COMMIT}"
            return [str(image.python), *super().command(container)[1:]]

        def environ(self, spec):
            kept = super().environ(spec)
            del kept["PYTHONPATH"]
            return kept

    folder = tmp_path_factory.mktemp("cloud")
    bucket = "my-project-1-digits"
    helpers.write_idx(folder / "buckets" / bucket / "idx", helpers.make_images())
    dataflow = dataflow_service.Service()
    dataflow.script = dataflow_service.Script(execute=in_the_image(image, folder))
    with (
        test_gcs.server(folder / "buckets"),
        dataflow.running(),
        Vertex(folder / "mounts") as vertex,
    ):
        flags = (
            "--preset compact --epochs 2 --num_shards 2 --min_accuracy 0.5 --min_class_accuracy 0"
            f" --no_auth --dataflow_endpoint {dataflow.endpoint}"
            f" --vertex_endpoint {vertex.url} --vertex_poll_seconds 0.1"
        )
        # Of the tests a few; all the rest of the step is the file's.
        machine = cloud_build.Machine(folder, image, f"{IMAGE}:{COMMIT}", {"PYTEST_ADDOPTS": FEW})
        yield machine, (dataflow, vertex), {"_FLAGS": flags, "_SOURCE": f"idx:gs://{bucket}/idx"}


def codes(done):
    return {name: process.returncode for name, process in done.items()}


def told(done):
    """What the last step said."""
    process = [*done.values()][-1]
    return process.stdout[-4000:] + process.stderr[-4000:]


@pytest_cloud
@rehearsal
def test_the_steps_one_after_another(cloud):
    machine, (dataflow, vertex), values = cloud
    done = machine.build(BUILD, VALUES | values)
    assert codes(done) == dict.fromkeys(STEPS, 0), told(done)
    assert all("passed" in done[name].stdout for name in ("test", "cloud"))
    assert (machine.workspace / ".engines/fake-gcs-server").is_file()
    assert "All checks passed!" in done["lint"].stdout
    inspect, build, push = machine.asked()
    assert inspect == ["manifest", "inspect", f"{IMAGE}:{COMMIT}"]
    assert build[:5] == ["build", "--tag", f"{IMAGE}:{COMMIT}", "--tag", f"{IMAGE}:latest"]
    assert {"EXTRAS=report,cloud", f"REVISION={COMMIT}"} < set(build)
    assert push == ["push", "--all-tags", IMAGE]
    assert "champion: version 1" in done["retrain"].stdout
    assert len(dataflow.jobs) == 2  # preprocess and evaluate
    account = "digits-job@my-project-1.iam.gserviceaccount.com"
    assert vertex.job.message.job_spec.service_account == account
    for running in dataflow.jobs.values():
        assert running.job.environment.service_account_email == account


@pytest_cloud
@rehearsal
def test_the_same_commit_again_makes_nothing(cloud):
    """As every night on which neither the code nor the data has changed."""
    machine, (dataflow, vertex), values = cloud
    done = machine.build(BUILD, VALUES | values)
    assert codes(done) == dict.fromkeys(STEPS, 0), told(done)
    assert machine.asked() == [["manifest", "inspect", f"{IMAGE}:{COMMIT}"]]
    assert [done[name].stdout for name in list(STEPS)[:-1]] == [""] * 7
    assert "nothing new" in done["retrain"].stderr
    assert (len(dataflow.jobs), len(vertex.jobs)) == (2, 1)


@pytest_cloud
@rehearsal
def test_what_does_not_pass_makes_no_image(image, tmp_path):
    machine = cloud_build.Machine(
        tmp_path, image, f"{IMAGE}:{COMMIT}", {"PYTEST_ADDOPTS": "tests/no_such_test.py"}
    )
    done = machine.build(BUILD, VALUES)
    assert codes(done) == {"find": 0, "lint": 0, "test": 2}, told(done)
    assert machine.asked() == [["manifest", "inspect", f"{IMAGE}:{COMMIT}"]]
