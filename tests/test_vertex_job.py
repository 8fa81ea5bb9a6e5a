"""What a training on Vertex AI is to be: flags, the request that they make, how its end is told."""

import argparse
import dataclasses
import datetime
import json
import os
import signal
from types import SimpleNamespace

import pytest
from helpers import run_cli

from pipeline import (
    leases,
    plan,
    retrain,
    trainers,
    vertex,
    vertex_checks,
    vertex_client,
    vertex_follow,
    vertex_job,
)
from pipeline import vertex_options as options
from pipeline.command import InputError, LockedError, StoppedError, UnreachableError
from pipeline.gcs import Stat
from pipeline.redaction import one_line
from pipeline.rules import Rules
from pipeline.services import NoAnswerError, QuotaError
from pipeline.stages import Training
from pipeline.vertex_client import Job, JobError
from pipeline.vertex_job import Task
from pipeline.vertex_options import VertexConfig

IMAGE = "us-docker.pkg.dev/my-project/digits/digits-pipeline:1"
PLACE = ("--vertex_project=my-project", "--vertex_region=us-central1", f"--vertex_image={IMAGE}")
FOLDERS = {"--run_dir": "gs://bucket/runs/day-core-0"}
CONFIG = VertexConfig(project="my-project", region="us-central1", image=IMAGE)
TASK = Task(
    dataset_dir="gs://bucket/data", run_dir="gs://bucket/runs/day-core-0", arguments=("--epochs=3",)
)


def config_of(*argv, folders=FOLDERS):
    parser = argparse.ArgumentParser()
    options.add_flags(parser)
    return vertex_checks.make_config(options.given(parser.parse_args(argv)), folders)


def test_what_is_not_given_is_as_the_config_has_it():
    assert config_of(*PLACE) == CONFIG
    assert (CONFIG.machine_type, CONFIG.accelerator_count, CONFIG.workers) == (
        "n1-standard-4", 0, 1,
    )  # fmt: skip
    assert CONFIG.parent == "projects/my-project/locations/us-central1"


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("--vertex_spot", "--vertex_workers=3", "--vertex_timeout=60"),
        ("--vertex_machine_type=a2-highgpu-4g", "--vertex_accelerator_type=NVIDIA_TESLA_A100"),
        ("--vertex_accelerator_type=NVIDIA_TESLA_T4", "--vertex_accelerator_count=2"),
        ("--vertex_network=projects/1/global/networks/ours", "--vertex_reserved_ip_ranges=a,b",
         "--vertex_labels=team=digits,stage=", "--vertex_service_account=a@b"),
        ("--vertex_network_attachment=projects/p/regions/r/networkAttachments/n",
         "--vertex_poll_seconds=0.5", "--vertex_patience_seconds=9.5", "--vertex_endpoint=http://h:1"),
    ],
)  # fmt: skip
def test_a_config_makes_the_flags_that_make_it_again(argv):
    config = config_of(*PLACE, *argv)
    made = options.arguments(config)
    assert config_of(*made) == config
    assert set(argv) <= set(made)
    assert len(set(made)) == len(made)


@pytest.mark.parametrize(
    ("machine", "kind", "given", "count"),
    [
        ("n1-standard-4", None, None, 0),
        ("n1-standard-4", "NVIDIA_TESLA_T4", None, 1),
        ("n1-standard-4", "NVIDIA_TESLA_T4", 4, 4),
        ("a2-highgpu-8g", "NVIDIA_TESLA_A100", None, 8),
        ("a3-ultragpu-8g", "NVIDIA_H200_141GB", 8, 8),
        ("g2-standard-24", "NVIDIA_L4", 2, 2),
    ],
)
def test_how_many_gpus_a_machine_has(machine, kind, given, count):
    argv = [f"--vertex_machine_type={machine}"]
    argv += [f"--vertex_accelerator_type={kind}"] if kind else []
    argv += [f"--vertex_accelerator_count={given}"] if given else []
    config = config_of(*PLACE, *argv)
    assert (config.accelerator_type, config.accelerator_count) == (kind, count)


WRONG = {
    "--vertex_project=X": "expected the id of a project",
    "--vertex_region=us": "expected a region",
    "--vertex_image=name": "expected an image",
    "--vertex_machine_type=big": "expected a machine type",
    "--vertex_accelerator_type=TPU_V3": "expected one of NVIDIA_TESLA_K80, ",
    "--vertex_service_account=me": "expected the address of a service account",
    "--vertex_network=default": "expected projects/NUMBER/global/networks/NAME",
    "--vertex_network_attachment=n": "expected projects/PROJECT/regions/REGION/",
    "--vertex_endpoint=localhost:1": "expected https://host",
    "--vertex_labels=Team=a": "expected key=value",
    "--vertex_labels=team": "expected key=value",
    "--vertex_labels=digits_run=1": "this label is the job's own",
    "--vertex_accelerator_count=2": "expected --vertex_accelerator_type beside it",
    "--vertex_machine_type=g2-standard-4": "expected its --vertex_accelerator_type beside it",
    "--vertex_machine_type=e2-standard-4 --vertex_accelerator_type=NVIDIA_L4": "takes none",
    "--vertex_machine_type=a2-highgpu-1g --vertex_accelerator_type=NVIDIA_TESLA_A100"
    " --vertex_accelerator_count=2": "--vertex_accelerator_count 2: a machine a2-highgpu-1g has 1",
    "--vertex_reserved_ip_ranges=a": "expected --vertex_network beside it",
    "--vertex_network=projects/1/global/networks/n"
    " --vertex_network_attachment=projects/p/regions/r/networkAttachments/n": "at most one of them",
}


@pytest.mark.parametrize("argv", list(WRONG))
def test_what_is_wrong_is_named_with_its_value(argv):
    given = dict.fromkeys(part.split("=")[0] for part in argv.split())
    with pytest.raises(InputError) as caught:
        config_of(*(flag for flag in PLACE if flag.split("=")[0] not in given), *argv.split())
    assert WRONG[argv] in str(caught.value)
    assert ";" not in str(caught.value)  # it alone
    assert argv.split()[-1].split("=")[0] in str(caught.value)


def test_all_that_is_wrong_is_named_at_once():
    with pytest.raises(InputError) as caught:
        config_of("--vertex_region=us", "--vertex_accelerator_count=2", folders={"--root": "out"})
    assert str(caught.value).split("; ") == [
        "--vertex_project, --vertex_image: missing",
        "--vertex_region us: expected a region such as us-central1",
        "--vertex_accelerator_count 2: expected --vertex_accelerator_type beside it",
        "--root out: expected gs://bucket/folder or /gcs/bucket/folder, which machines of Vertex AI"
        " can reach",
    ]


@pytest.mark.parametrize(
    ("folder", "bucket"),
    [
        ("gs://b/a/c", "gs://b/a/c"),
        ("gs://b/a/", "gs://b/a"),
        ("/gcs/b/a/c", "gs://b/a/c"),
        ("/gcs/b/x/../a/", "gs://b/a"),
        ("/gcs/../etc", None),
        ("/gcs", None),
        ("gcs/b", None),
        ("/data/b", None),
        ("s3://b/a", None),
    ],
)
def test_which_folders_its_machines_reach(folder, bucket):
    assert vertex_checks.in_bucket(folder) == bucket


@pytest.mark.parametrize(
    ("argv", "training", "problem"),
    [
        ((), {"replicas": None, "batch_size": 128}, None),
        ((), {"replicas": 3, "batch_size": 126}, None),  # logical CPUs
        ((), {"replicas": 3, "batch_size": 128}, "--batch_size 128: expected a multiple of the 3"),
        (("--vertex_workers=2",), {"replicas": None, "batch_size": 128}, None),
        (("--vertex_workers=2",), {"replicas": 2, "batch_size": 128}, None),
        (("--vertex_workers=2",), {"replicas": 1, "batch_size": 128}, "--replicas 1: .* 2 devices"),
        (("--vertex_workers=3",), {"replicas": None, "batch_size": 128}, "of the 3 replicas"),
        (("4",), {"replicas": None, "batch_size": 128}, None),
        (("4",), {"replicas": 2, "batch_size": 2}, None),
        (("4",), {"replicas": 8, "batch_size": 128}, "--replicas 8: .* 4 devices"),
        (("4",), {"replicas": None, "batch_size": 2}, "of the 4 replicas"),
        (("4", "--vertex_workers=2"), {"replicas": None, "batch_size": 8}, None),
        (("4", "--vertex_workers=2"), {"replicas": 4, "batch_size": 8}, "--replicas 4: .* 8 dev"),
    ],
)
def test_a_training_has_to_suit_the_machines(argv, training, problem):
    if argv and argv[0].isdigit():
        gpus = (
            "--vertex_accelerator_type=NVIDIA_TESLA_T4",
            f"--vertex_accelerator_count={argv[0]}",
        )
        argv = (*gpus, *argv[1:])
    config = config_of(*PLACE, *argv)
    if problem is None:
        vertex_checks.check_training(config, training)
    else:
        with pytest.raises(InputError, match=problem):
            vertex_checks.check_training(config, training)


def test_the_request_is_written_out():
    config = config_of(
        *PLACE, "--vertex_machine_type=a2-highgpu-2g", "--vertex_spot", "--vertex_timeout=3600",
        "--vertex_accelerator_type=NVIDIA_TESLA_A100", "--vertex_labels=team=digits",
        "--vertex_service_account=train@my-project.iam.gserviceaccount.com",
        "--vertex_network=projects/12/global/networks/ours", "--vertex_reserved_ip_ranges=a,b",
    )  # fmt: skip
    assert vertex_job.request(config, TASK) == {
        "parent": "projects/my-project/locations/us-central1",
        "customJob": {
            "displayName": "day-core-0-0",
            "jobSpec": {
                "workerPoolSpecs": [
                    {
                        "machineSpec": {
                            "machineType": "a2-highgpu-2g",
                            "acceleratorType": "NVIDIA_TESLA_A100",
                            "acceleratorCount": 2,
                        },
                        "replicaCount": "1",
                        "containerSpec": {
                            "imageUri": IMAGE,
                            "command": ["python", "-m", "trainer.task"],
                            "args": [
                                "--dataset_dir=gs://bucket/data",
                                "--run_dir=gs://bucket/runs/day-core-0",
                                "--model_dir=gs://bucket/runs/day-core-0/export",
                                "--checkpoint_dir=gs://bucket/runs/day-core-0/checkpoints",
                                "--tensorboard_dir=gs://bucket/runs/day-core-0/tensorboard",
                                "--epochs=3",
                            ],
                        },
                    }
                ],
                "scheduling": {
                    "timeout": "3600s",
                    "strategy": "SPOT",
                    "restartJobOnWorkerRestart": True,
                },
                "baseOutputDirectory": {"outputUriPrefix": "gs://bucket/runs/day-core-0/"},
                "serviceAccount": "train@my-project.iam.gserviceaccount.com",
                "network": "projects/12/global/networks/ours",
                "reservedIpRanges": ["a", "b"],
            },
            "labels": {
                "team": "digits",
                # sha256("gs://bucket/runs/day-core-0")
                "digits_run": "4b7cd4c947eaf53aa1a29a80782ef130",
                "digits_attempt": "0",
            },
        },
    }


def test_several_workers_are_a_chief_and_a_pool_of_others():
    job = vertex_job.request(config_of(*PLACE, "--vertex_workers=4"), TASK)["customJob"]
    chief, others = job["jobSpec"]["workerPoolSpecs"]
    assert (chief.pop("replicaCount"), others.pop("replicaCount")) == ("1", "3")
    assert chief == others
    assert job["jobSpec"]["scheduling"] == {
        "timeout": "86400s",
        "strategy": "STANDARD",
        "restartJobOnWorkerRestart": True,
    }
    alone = vertex_job.request(CONFIG, TASK)["customJob"]["jobSpec"]
    assert len(alone["workerPoolSpecs"]) == 1
    assert alone["scheduling"] == {"timeout": "86400s", "strategy": "STANDARD"}


def test_a_job_is_named_by_its_run_folder_and_its_attempt():
    mounted = Task(dataset_dir="/gcs/bucket/data", run_dir="/gcs/bucket/runs/day-core-0", attempt=2)
    elsewhere = Task(dataset_dir="gs://bucket/data", run_dir="gs://other/runs/day-core-0")
    assert mounted.run_label == TASK.run_label != elsewhere.run_label
    assert (TASK.display_name, mounted.display_name) == ("day-core-0-0", "day-core-0-2")
    long = Task(dataset_dir="gs://b/d", run_dir="gs://b/" + "r" * 200, attempt=12)
    assert long.display_name == "r" * 125 + "-12"
    labels = vertex_job.request(CONFIG, mounted)["customJob"]["labels"]
    assert labels == {"digits_run": TASK.run_label, "digits_attempt": "2"}


def test_a_mounted_folder_stays_one_for_the_trainer():
    mounted = Task(
        dataset_dir="/gcs/b/data", run_dir="/gcs/b/run", initial_weights="/gcs/b/models/1"
    )
    assert vertex_job.trainer_arguments(mounted) == [
        "--dataset_dir=/gcs/b/data",
        "--run_dir=/gcs/b/run",
        "--model_dir=/gcs/b/run/export",
        "--checkpoint_dir=/gcs/b/run/checkpoints",
        "--tensorboard_dir=/gcs/b/run/tensorboard",
        "--initial_weights=/gcs/b/models/1",
    ]
    base = vertex_job.request(CONFIG, mounted)["customJob"]["jobSpec"]["baseOutputDirectory"]
    assert base == {"outputUriPrefix": "gs://b/run/"}


# The command


def test_a_dry_run_prints_the_request_and_needs_no_network(tmp_path):
    key = tmp_path / "key.json"
    key.write_text("what is in here is nobody's business")
    done = run_cli(
        "pipeline.vertex", *PLACE, "--dataset_dir=gs://bucket/data", "--epochs=3", "--dry_run",
        "--run_dir=gs://bucket/runs/day-core-0", "--initial_weights=gs://bucket/models/1",
        env={"GOOGLE_APPLICATION_CREDENTIALS": key},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    task = Task(
        dataset_dir=TASK.dataset_dir, run_dir=TASK.run_dir, arguments=TASK.arguments,
        initial_weights="gs://bucket/models/1",
    )  # fmt: skip
    assert json.loads(done.stdout) == vertex_job.request(CONFIG, task)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--run_dir=out", *PLACE], "--run_dir out: expected gs://bucket/folder"),
        (["--run_dir=gs://b/r"], "--vertex_project, --vertex_region, --vertex_image: missing"),
        (["--run_dir=gs://b/r", *PLACE, "--epochs=0"], "--epochs 0"),
        (["--run_dir=gs://b/r", *PLACE, "--nonsense"], "--nonsense"),
        (["--run_dir=gs://b/r", *PLACE, "--vertex_workers=0"], "--vertex_workers"),
        (["--run_dir=gs://b/r", *PLACE, "--vertex_poll_seconds=0"], "--vertex_poll_seconds"),
        (["--run_dir=gs://b/r", *PLACE, "--vertex_workers=3"], "--batch_size 128"),
        (["--run_dir=gs://b/r", *PLACE, "--model_dir=gs://b/m"], "--model_dir"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line(flags, word):
    done = run_cli("pipeline.vertex", "--dataset_dir=gs://b/d", *flags)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert word in done.stderr


def test_without_the_extra_one_line_names_it(monkeypatch):
    monkeypatch.setattr(vertex_client.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        vertex_client.Service(CONFIG)
    assert "pip install 'digits-pipeline[cloud]'" in str(caught.value)
    with pytest.raises(InputError, match="needs the cloud extra"):
        trainers.check_vertex(CONFIG, {"replicas": None, "batch_size": 128}, dry_run=False)
    trainers.check_vertex(CONFIG, {"replicas": None, "batch_size": 128}, dry_run=True)


# Of the chain


def parse(*argv):
    return retrain.parse(["--source=digits", *argv])


def test_the_chain_takes_its_flags_and_leaves_the_rest_to_the_trainer():
    config = parse("--root=/gcs/b/digits", "--trainer=vertex", *PLACE, "--epochs=3")
    assert config.vertex == CONFIG
    assert config.others == ("--epochs=3",)
    assert parse("--root=out").vertex is None


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (("--root=out", "--trainer=vertex", *PLACE), r"^--root out: expected gs://"),
        (("--root=out", "--trainer=vertex"), r"--vertex_image: missing; --root out: expected"),
        (
            ("--root=out", *PLACE),
            r"^--vertex_project, --vertex_region, --vertex_image: expected --t",
        ),
    ],
)
def test_the_chain_refuses_what_does_not_go_together(argv, problem):
    with pytest.raises(InputError, match=problem):
        parse(*argv)


def request_of(vertex_arguments=(), initial_weights=None):
    return plan.Request(
        run_id="day-core-0", window="day", time="2026-11-20T00:00:00+00:00", attempt=3,
        sources=("digits",), dataset_options={}, fingerprint="f", trainer_arguments=("--epochs=3",),
        config_id="c", initial_weights=initial_weights, beam_arguments=("--runner=X",),
        rules=Rules(), force_reason=None, repeat=False, vertex_arguments=vertex_arguments,
    )  # fmt: skip


def test_where_a_run_is_trained_is_kept_with_it(tmp_path):
    request = request_of(tuple(options.arguments(CONFIG)))
    plan.write_request(tmp_path, request)
    assert plan.read_request(tmp_path / "runs" / "day-core-0") == request
    path = tmp_path / "runs/day-core-0/request.json"
    raw = json.loads(path.read_text())
    del raw["vertex_arguments"]  # as earlier versions wrote it
    path.write_text(json.dumps(raw))
    assert plan.read_request(path.parent) == request_of()


def test_the_stage_that_trains(tmp_path):
    run_dir, data = tmp_path / "runs/day-core-0", tmp_path / "datasets/f"
    folders = [
        f"--{name}_dir={run_dir / folder}"
        for name, folder in (
            ("model", "export"),
            ("checkpoint", "checkpoints"),
            ("tensorboard", "tensorboard"),
        )
    ]
    start = f"--initial_weights={tmp_path / 'models/1'}"
    assert trainers.command_line(tmp_path, request_of(), tmp_path / "models/1") == [
        "trainer.task", f"--dataset_dir={data}", start, f"--run_dir={run_dir}", *folders,
        "--epochs=3",
    ]  # fmt: skip
    given = ("--vertex_project=p",)
    assert trainers.command_line(tmp_path, request_of(given), tmp_path / "models/1") == [
        "pipeline.vertex", f"--dataset_dir={data}", start, f"--run_dir={run_dir}", "--attempt=3",
        *given, "--epochs=3",
    ]  # fmt: skip


def test_its_dry_run_prints_the_plan_and_then_the_request(tmp_path):
    done = run_cli(
        "pipeline.retrain", "--root=/gcs/nowhere/digits", "--source=digits", "--dry_run",
        "--window=day", "--trainer=vertex", *PLACE, "--epochs=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table, brace, text = done.stdout.partition("{")
    request = json.loads(brace + text)
    run = request["customJob"]["displayName"].removesuffix("-0")
    assert f"make     train run {run} on Vertex AI (--epochs=3)\n" in table
    args = request["customJob"]["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]["args"]
    assert args[1] == f"--run_dir=/gcs/nowhere/digits/runs/{run}"
    assert args[-1] == "--epochs=3"
    # Where it is trained is no part of what it is: here it would be the same run.
    here = run_cli(
        "pipeline.retrain", "--root", tmp_path, "--source=digits", "--dry_run", "--window=day",
        "--epochs=3",
    )  # fmt: skip
    assert f"train run {run} (--epochs=3)" in here.stdout


@pytest.mark.parametrize(
    ("place", "beam"), [(CONFIG, ()), (None, ("--runner=FnApiRunner",)), (None, ())]
)
def test_where_it_is_run_is_for_the_command_to_say_that_does_it(place, beam, tmp_path, monkeypatch):
    """Also of a run that another command began: where that was to be there may be no room, or no
    image of its commit any more."""
    plan.write_request(tmp_path, request_of(("--vertex_region=nowhere",)))
    done = []
    monkeypatch.setattr(retrain.chain, "finish", lambda _, request, __: done.append(request) or 0)
    config = dataclasses.replace(parse(f"--root={tmp_path}"), vertex=place)
    training = Training(arguments=(), rest=beam, config={"preset": "core"})
    source = retrain.resolve_source(config, None)
    stages = SimpleNamespace(lock=-1, hold=lambda: None)
    assert retrain.run(config, training, source, stages) == 0
    begun, ours = done
    assert begun.run_id == "day-core-0" != ours.run_id
    arguments = () if place is None else tuple(options.arguments(place))
    assert begun.vertex_arguments == ours.vertex_arguments == arguments
    assert begun.beam_arguments == ours.beam_arguments == beam
    assert begun.trainer_arguments == ("--epochs=3",)


# How its end is told


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The replica workerpool0-0 exited with a non-zero status of 2. To find out", 2),
        ("The replica workerpool1-1 exited with a non-zero status of 143.", 143),
        ("Replica exited with a non-zero status code 1", 1),
        ("The replica workerpool0-0 exited with a non-zero status of 0.", 1),
        ("The replica workerpool0-0 exited with a non-zero status of 999.", 1),
        ("Internal error occurred", 1),
        ("", 1),
    ],
)
def test_the_trainers_exit_code_is_in_the_message(text, code):
    assert vertex_follow.exit_code(text) == code


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one\n two\t three", "one two three"),
        ("Authorization: Bearer abc.def-ghi rest", "Authorization: (left out) rest"),
        ("Authorization: Basic dXNlcjpwYXNz rest", "Authorization: (left out) rest"),
        ("{'authorization': 'Basic dXNlcjpwYXNz'}", "{'authorization': '(left out)'}"),
        ("https://h/o?X-Goog-Signature=0a1b&x=1", "https://h/o?X-Goog-(left out)&x=1"),
        ("https://h/o?x=1&X-Goog-Signature=0a1b", "https://h/o?x=1&X-Goog-(left out)"),
        ("password=p%40ss, user=me", "(left out), user=me"),
        ('{"Password": "p-1", "db_passwd":"p-2"}', '{"(left out)", "db_(left out)"}'),
        (
            "client_secret = s-1; api_key=k-1 apikey: k-2",
            "client_(left out); (left out) (left out)",
        ),
        (r'"{\"password\": \"p-1\"}"', r'"{\"(left out)\"}"'),
        ("api-key: zz1, pwd=p-1; Cookie: SID=1", "(left out), (left out); (left out)"),
        ("Unexpected token: <EOF> at 3", "Unexpected token: <EOF> at 3"),
        ("no signature: serving_default", "no signature: serving_default"),
        ("proxy http://me:p-1@host:3128/x refuses", "proxy http://(left out)@host:3128/x refuses"),
        ("with ya29.a0Af_x-y.z and AIzaSyA-1_2", "with (left out) and (left out)"),
        ('{"access_token": "secret-1"}', '{"access_(left out)"}'),
        ("signed eyJhbGciOi.eyJpc3Mi.c2ln!", "signed (left out)!"),
        ("-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY-----\n.", "(left out) ."),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE", "(left out)"),
        ("no basic tier; signatures differ; the password is wrong", None),  # as it stands
        ("user me@example.com at https://host/a@b lacks a token", None),
        ("x" * 500, "x" * 397 + "..."),
    ],
)
def test_what_a_server_says_comes_in_one_line_without_secrets(text, shown):
    assert one_line(text) == (text if shown is None else shown)
    assert one_line(one_line(text)) == one_line(text)


def job(number, state, *, attempt="0", error="", code=0):
    return Job(
        name=f"projects/1/locations/us-central1/customJobs/{number}", display_name=f"job {number}",
        state=state, attempt=attempt, created=datetime.datetime.now(datetime.UTC),
        error=error, error_code=code,
    )  # fmt: skip


class Script:
    """In place of the service: answers from a script, and notes what was asked.

    Attributes:
        answers: {verb: what comes next, an exception or an answer}; the last one stays.
    """

    def __init__(self, **answers):
        self.answers = answers
        self.asked = []

    def _next(self, verb):
        self.asked.append(verb)
        left = self.answers[verb]
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def create(self, request):
        return self._next("create")

    def get(self, name):
        return self._next("get")

    def unfinished(self, run_label):
        assert run_label == TASK.run_label
        return self._next("unfinished")

    def cancel(self, name):
        self.asked.append(f"cancel {name[-1]}")


def finish(service, **settings):
    config = VertexConfig(
        project="my-project", region="us-central1", image=IMAGE, poll_seconds=0.001, **settings
    )
    return vertex_follow.Training(service, config, TASK).finish()


def test_it_is_followed_through_silences(caplog):
    silence = NoAnswerError("HTTP 503")
    service = Script(
        unfinished=[silence, []],
        create=[silence, job(1, "PENDING")],
        get=[job(1, "RUNNING"), silence, silence, job(1, "RUNNING"), job(1, "SUCCEEDED")],
    )
    caplog.set_level("INFO", "digits_pipeline")
    assert finish(service) == 0
    # Before a request for a job, and after one whose answer was lost, comes a look.
    assert service.asked[:5] == ["unfinished", "unfinished", "create", "unfinished", "create"]
    assert service.asked[5:] == ["get"] * 5
    states = [line.split(" after ")[0] for line in caplog.messages if " after " in line]
    assert states == ["pending", "running", "succeeded"]
    assert sum(line.startswith("no answer") for line in caplog.messages) == 3


def test_a_lost_answer_makes_no_second_job():
    service = Script(
        unfinished=[[], [job(1, "PENDING")]],
        create=[NoAnswerError("ConnectionError")],
        get=[job(1, "SUCCEEDED")],
    )
    assert finish(service) == 0
    assert service.asked == ["unfinished", "create", "unfinished", "get"]


@pytest.mark.parametrize("state", ["QUEUED", "PENDING", "RUNNING", "PAUSED", "UPDATING"])
def test_a_job_that_is_at_work_is_followed(state):
    service = Script(unfinished=[[job(1, state)]], get=[job(1, "SUCCEEDED")])
    assert finish(service) == 0
    assert service.asked == ["unfinished", "get"]


def test_one_that_is_being_cancelled_is_waited_for_and_followed_by_another():
    service = Script(
        unfinished=[[job(1, "CANCELLING")], []],
        create=[job(2, "PENDING")],
        get=[job(1, "CANCELLED"), job(2, "SUCCEEDED")],
    )
    assert finish(service) == 0
    assert service.asked == ["unfinished", "get", "unfinished", "create", "get"]


def test_one_that_ends_well_although_it_was_cancelled_is_enough():
    service = Script(unfinished=[[job(1, "CANCELLING")]], get=[job(1, "SUCCEEDED")])
    assert finish(service) == 0


LOCKED = job(1, "FAILED", error="The replica exited with a non-zero status of 75.")
STANDING = Stat(0, 7, "", datetime.datetime.now(datetime.UTC))


@pytest.fixture
def lock(monkeypatch):
    """What is found of the lock of the run folder, one after the other; the last one stays."""
    found = [STANDING]
    owner = leases.Owner(host="h", pid=1, token="t", beat=3, lapse_seconds=0.01)
    content = leases.owner_json(owner)  # of the trainer: its machine may have other times
    monkeypatch.setattr(vertex_follow.gcs.GcsPath, "read_bytes", lambda path: content)
    monkeypatch.setenv(leases.VARIABLE, "1e9")

    def find(path):
        assert str(path) == f"{TASK.run_dir}/.lock"
        return found.pop(0) if len(found) > 1 else found[0]

    monkeypatch.setattr(vertex_follow.gcs.GcsPath, "find", find)
    return found


@pytest.mark.parametrize("times", [1, 2, 5])
def test_the_locks_of_killed_trainers_are_waited_for(lock, times):
    lock[:] = [STANDING, STANDING, None]  # or it goes meanwhile
    service = Script(
        unfinished=[[]],
        create=[job(1, "PENDING")],
        get=[*[LOCKED] * times, job(1, "SUCCEEDED")],
    )
    assert finish(service) == 0
    assert service.asked == ["unfinished", "create", "get"] * (times + 1)


def test_a_lock_that_is_renewed_is_another_ones(lock):
    lock[:] = [STANDING, STANDING._replace(generation=8)]
    service = Script(unfinished=[[]], create=[job(1, "PENDING")], get=[LOCKED])
    with pytest.raises(JobError, match="status of 75") as caught:
        finish(service)
    assert caught.value.exit_code == 75
    assert service.asked == ["unfinished", "create", "get"]


def test_trainers_that_are_killed_without_end_are_given_up(lock):
    service = Script(unfinished=[[]], create=[job(1, "PENDING")], get=[LOCKED])
    with pytest.raises(JobError, match="status of 75") as caught:
        finish(service)
    assert caught.value.exit_code == 75
    assert service.asked == ["unfinished", "create", "get"] * (vertex_follow.MAX_WAITS + 1)


def test_one_of_another_attempt_locks_the_folder():
    service = Script(unfinished=[[job(7, "RUNNING", attempt="1")]])
    with pytest.raises(LockedError, match=r"customJobs/7 \(job 7\) is at work here") as caught:
        finish(service)
    assert caught.value.exit_code == 75
    assert service.asked == ["unfinished"]


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        (job(1, "FAILED", error="exited with a non-zero status of 2."), 2, "status of 2"),
        (job(1, "FAILED", error="Internal error"), 1, "ended as failed: Internal error; its log"),
        (job(1, "FAILED", error="no T4", code=8), 69, "has no room .*: no T4; try --vertex_spot, "),
        (job(1, "EXPIRED"), 1, "ended as expired; its log: https://"),
        (job(1, "PARTIALLY_SUCCEEDED"), 1, "ended as partially_succeeded"),
    ],
)
def test_a_failure_ends_with_its_code_and_reason(end, code, said):
    service = Script(unfinished=[[]], create=[job(1, "PENDING")], get=[end])
    with pytest.raises(JobError, match=said) as caught:
        finish(service)
    assert caught.value.exit_code == code


def test_one_that_somebody_cancels_ends_in_143():
    service = Script(unfinished=[[]], create=[job(1, "PENDING")], get=[job(1, "CANCELLED")])
    assert finish(service) == 143


def test_a_quota_is_told_with_what_may_help():
    service = Script(unfinished=[[]], create=[QuotaError("Quota exceeded for custom_model_x")])
    with pytest.raises(JobError, match=r"Quota exceeded for custom_model_x; try ano") as caught:
        finish(service, spot=True)
    assert caught.value.exit_code == 69  # for the chain: it is no fault of the run's; else 1
    assert service.asked == ["unfinished", "create"]


@pytest.mark.parametrize("silent", ["unfinished", "create", "get"])
def test_a_service_that_stays_silent_is_given_up(silent):
    answers = {"unfinished": [[]], "create": [job(1, "PENDING")], "get": [job(1, "RUNNING")]}
    service = Script(**answers | {silent: [NoAnswerError("HTTP 502")]})
    said = r"no answer from Vertex AI for 0\.01 seconds \(HTTP 502\); a job that is at work goes on"
    with pytest.raises(UnreachableError, match=said) as caught:
        finish(service, patience_seconds=0.01)
    assert caught.value.exit_code == 69


SIGNALS = [(signal.SIGTERM, StoppedError), (signal.SIGINT, KeyboardInterrupt)]
CANCELLED = "cancelled; the same command goes on from the last checkpoint"


def signalled(service, verb, number):
    """Sends this process a signal in the middle of the first question of a kind."""
    ask = getattr(service, verb)

    def interrupted(*asked):
        setattr(service, verb, ask)
        os.kill(os.getpid(), number)
        return ask(*asked)

    setattr(service, verb, interrupted)


@pytest.mark.parametrize(("number", "kind"), SIGNALS)
def test_a_stop_cancels_what_is_at_work(number, kind):
    service = Script(
        unfinished=[[], [job(1, "RUNNING")]],
        create=[job(1, "PENDING")],
        get=[job(1, "CANCELLING"), job(1, "CANCELLED")],
    )
    signalled(service, "get", number)
    with pytest.raises(kind, match=CANCELLED):
        finish(service)
    assert service.asked == ["unfinished", "create", "unfinished", "cancel 1", "get", "get"]


def test_a_stop_waits_for_the_answer_to_a_request_for_a_job():
    service = Script(  # whose list does not have the job yet
        unfinished=[[]], create=[job(1, "PENDING")], get=[job(1, "CANCELLED")]
    )
    signalled(service, "create", signal.SIGTERM)
    with pytest.raises(StoppedError, match=CANCELLED):
        finish(service)
    assert service.asked == ["unfinished", "create", "unfinished", "cancel 1", "get"]


def test_a_stop_finds_the_job_whose_answer_was_lost():
    service = Script(
        unfinished=[[], [job(1, "PENDING"), job(2, "PENDING", attempt="1")]],
        create=[NoAnswerError("ConnectionError")],
        get=[job(1, "CANCELLED")],
    )
    signalled(service, "create", signal.SIGTERM)
    with pytest.raises(StoppedError, match=CANCELLED):
        finish(service)
    assert service.asked == ["unfinished", "create", "unfinished", "cancel 1", "get"]


def test_a_stop_before_anything_makes_nothing():
    service = Script(unfinished=[[]])
    signalled(service, "unfinished", signal.SIGTERM)
    with pytest.raises(StoppedError, match="no job was at work"):
        finish(service)
    assert service.asked == ["unfinished"]


def test_a_stop_to_a_service_that_has_gone_silent():
    service = Script(
        unfinished=[[], NoAnswerError("HTTP 503")], create=[job(1, "PENDING")], get=[job(1, "X")]
    )
    signalled(service, "get", signal.SIGTERM)
    with pytest.raises(StoppedError, match="the job may not be cancelled: no answer from Vertex"):
        finish(service, patience_seconds=0.01)


@pytest.mark.parametrize(
    ("found", "asked", "is_done"),
    [
        ({"config": {"epochs": 3, "seed": 1, "replicas": 2}}, {"epochs": 3, "seed": 1}, True),
        ({"config": {"epochs": 4, "seed": 1}}, {"epochs": 3, "seed": 1}, True),
        ({"config": {"epochs": 2, "seed": 1}}, {"epochs": 3, "seed": 1}, False),
        ({"config": {"epochs": 3, "seed": 2}}, {"epochs": 3, "seed": 1}, False),
        ({"config": {"epochs": 3, "input": "stream"}}, {"epochs": 3, "input": "auto"}, True),
        ({"config": {"epochs": 3, "replicas": 2}}, {"epochs": 3, "replicas": None}, True),
        ({"config": {"epochs": 3}}, {"epochs": 3, "seed": 1}, False),
        ({}, {"epochs": 3}, False),
        ([], {"epochs": 3}, False),
        (None, {"epochs": 3}, False),
    ],
)
def test_what_is_trained_already(tmp_path, found, asked, is_done):
    if found is not None:
        (tmp_path / "export").mkdir()
        (tmp_path / "export/model.json").write_text(json.dumps(found))
    assert vertex.is_trained(str(tmp_path), asked) is is_done


def test_what_is_damaged_is_not_trained_yet(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export/model.json").write_text('{"config": {"epochs": 3}}')
    assert vertex.is_trained(str(tmp_path), {"epochs": 3})
    (tmp_path / "export/checksums.json").write_text('{"weights": {"bytes": 1, "sha256": ""}}')
    assert not vertex.is_trained(str(tmp_path), {"epochs": 3})
