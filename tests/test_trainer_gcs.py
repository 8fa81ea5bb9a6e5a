"""The whole trainer on buckets: killed, stopped, and the same weights as in a local folder."""

import concurrent.futures
import json
import re
import signal
import time

import helpers
import kept_bucket
import memory_bucket
import pytest
import signalled_trainer
import test_gcs
from signalled_trainer import CALLS, NEVER, STANDS, arguments

from pipeline import storage
from pipeline.gcs import GcsPath

DATASET, RUN, CHECKPOINTS = "gs://digits/data", "gs://digits/runs/r", "gs://digits/ckpt"
# The command where a client of Cloud Storage, and Beam, cannot be loaded.
LOCAL = """
import sys
for name in ("google.cloud.storage", "google.auth", "apache_beam"):
    sys.modules[name] = None
from trainer import task
task.main()
"""
WITHOUT_TENSORFLOW = """
import sys
sys.path.insert(0, "tests")
sys.modules["tensorflow"] = None
import kept_bucket
kept_bucket.use(sys.argv.pop(1))
from trainer import task
task.main()
"""
RUNS = ("first", "second")


def run(*given, temporary, **environ):
    """Runs Python with a folder for temporary files of its own; (exit code, what it said)."""
    temporary.mkdir(exist_ok=True)
    done = helpers.run_python(
        *given,
        env={"CUDA_VISIBLE_DEVICES": "-1", "TMPDIR": temporary} | environ,
        merged=True,
    )
    assert "Traceback" not in done.stdout, done.stdout
    return done.returncode, done.stdout


def ours(temporary):
    """What the trainer, not TensorFlow, left among temporary files."""
    return sorted(temporary.glob("digits-*"))


def timeless(text):
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        del line["seconds"], line["examples_per_second"]
    return lines


def result(files):
    """What a run wrote that is the same however often it was stopped, of {name: content}."""
    events = [name for name in files if name.startswith("tensorboard/")]
    assert all(name.startswith("tensorboard/events.out.tfevents.") for name in events)
    names = sorted(files.keys() - set(events) - {".lock"})
    assert files["export/metrics.jsonl"] == files["metrics.jsonl"]
    return (
        names,
        files["config.json"],
        timeless(files["metrics.jsonl"].decode()),
        json.loads(files["export/model.json"]),
    )


@pytest.fixture(scope="module")
def local(small_dataset, tmp_path_factory):
    """What a run in a local folder comes to, where no client of a bucket can be loaded."""
    folder = tmp_path_factory.mktemp("local")
    run_dir = folder / "run"
    code, said = run("-c", LOCAL, *arguments(small_dataset, run_dir), temporary=folder / "tmp")
    assert code == 0, said
    assert ours(folder / "tmp") == []
    return result(helpers.tree(run_dir))


def objects(bucket, prefix):
    return {
        name.removeprefix(prefix): content
        for name, content in kept_bucket.Bucket(bucket).contents().items()
        if name.startswith(prefix)
    }


def names_no_local_folder(said, folder):
    """Of what is said, TensorFlow's own lines aside."""
    lines = [line for line in said.splitlines() if not re.match(r"[IWE]\d{4} |INFO:", line)]
    return not any(str(folder) in line for line in lines)


def steps(files):
    return [int(name[-13:-5]) for name in sorted(files) if name.endswith(".ckpt")]


def test_stopped_it_goes_on_and_ends_as_in_a_local_folder(local, small_dataset, tmp_path):
    bucket, cache = tmp_path / "bucket", tmp_path / "cache"
    held = kept_bucket.Bucket(bucket)
    for name, content in helpers.tree(small_dataset).items():
        held.store(memory_bucket.Blob(held, f"data/{name}"), content)

    def train(call=NEVER):
        return run(
            *(signalled_trainer.SCRIPT, call, "SIGTERM", *arguments(DATASET, RUN)),
            temporary=tmp_path / "tmp",
            BUCKET=bucket,
            DIGITS_CACHE_DIR=cache,
            CHECKPOINTS=f"{RUN}/checkpoints",
        )

    code, said = train(CALLS + 2)
    assert code == 143, said
    assert f"{DATASET}: brought here, " in said
    assert "stopped by SIGTERM" in said.splitlines()[-1]
    stopped = objects(bucket, "runs/r/")
    assert sorted(name.split("/")[0] for name in stopped) == [
        *("checkpoints", "checkpoints", "config.json", "metrics.jsonl", "tensorboard")
    ]
    assert steps(stopped)[-1] in STANDS[CALLS : CALLS + 2]  # before the call, or after it
    assert stopped["metrics.jsonl"].count(b"\n") == 1
    shards = helpers.tree(cache)
    assert len(shards) == 6

    code, said = train()
    assert code == 0, said
    assert "brought here" not in said
    assert "epoch 1/3" not in said
    assert said.splitlines()[-1].startswith(f"{RUN}/export: exported, weights sha256 ")
    assert names_no_local_folder(said, tmp_path), said
    assert result(objects(bucket, "runs/r/")) == local
    left = objects(bucket, "").keys() - {f"data/{name}" for name in helpers.tree(small_dataset)}
    assert all(name.startswith("runs/r/") and "/." not in name for name in left)
    assert helpers.tree(cache) == shards
    assert ours(tmp_path / "tmp") == []

    program = ("-c", WITHOUT_TENSORFLOW, bucket)
    again = run(*program, *arguments(DATASET, RUN), temporary=tmp_path / "tmp")
    assert again == (0, f"{RUN}: already trained and exported\n")


# Over the wire


@pytest.mark.cloud
def test_killed_on_one_machine_it_goes_on_on_another(local, small_dataset, tmp_path):
    with test_gcs.server(tmp_path / "data"):
        for name, content in helpers.tree(small_dataset).items():
            storage.write_atomic(GcsPath("digits", f"data/{name}"), content)

        def train(machine, call=NEVER, **environ):
            return run(
                *(signalled_trainer.SCRIPT, call, "SIGKILL", *arguments(DATASET, RUN)),
                f"--checkpoint_dir={CHECKPOINTS}",
                temporary=tmp_path / machine,
                CHECKPOINTS=CHECKPOINTS,
                **environ,
            )

        code, said = train("first", CALLS + 2, LAPSE="3")
        assert code == -signal.SIGKILL, said
        found = GcsPath("digits", "runs/r").walk()
        assert {"config.json", ".lock"} < found.keys()
        assert "export/model.json" not in found
        time.sleep(3)
        code, said = train("second")
        assert code == 0, said
        assert "epoch 1/3" not in said
        assert names_no_local_folder(said, tmp_path), said
        assert ours(tmp_path / "second") == []
        assert result(uploaded()) == local


@pytest.mark.cloud
def test_two_workers_each_bring_down_what_they_go_on_from(local, small_dataset, tmp_path):
    with test_gcs.server(tmp_path / "data"):
        for name, content in helpers.tree(small_dataset).items():
            storage.write_atomic(GcsPath("digits", f"data/{name}"), content)

        def train(attempt, call=NEVER):
            """Both workers, the second of which is sent a SIGTERM; exit codes, what they said."""
            addresses = [f"127.0.0.1:{port}" for port in helpers.free_ports(2)]
            with concurrent.futures.ThreadPoolExecutor() as pool:
                both = [
                    pool.submit(
                        run,
                        *(signalled_trainer.SCRIPT, call if rank else NEVER, "SIGTERM"),
                        *arguments(DATASET, RUN),
                        temporary=tmp_path / f"{attempt}{rank}",
                        CHECKPOINTS=f"{RUN}/checkpoints",
                        **signalled_trainer.cluster(addresses, rank),
                    )
                    for rank in range(2)
                ]
            return zip(*[each.result() for each in both], strict=True)

        codes, said = train(RUNS[0], CALLS + 2)
        assert codes == (143, 143), said
        stopped = GcsPath("digits", "runs/r").walk()
        assert "config.json" in stopped
        assert steps(stopped)[-1] in STANDS[CALLS:]  # the call itself is not waited for
        assert not {".lock", "export/model.json"} & stopped.keys()
        codes, said = train(RUNS[1])
        assert codes == (0, 0), said
        assert "epoch 2/3" in said[0]
        assert "epoch 1/3" not in said[0]
        names, _, lines, model = result(uploaded())
        assert (names, lines) == (local[0], local[2])
        assert model["weights_sha256"] == local[3]["weights_sha256"]
        assert [ours(tmp_path / f"{each}{rank}") for each in RUNS for rank in range(2)] == [[]] * 4


def uploaded():
    run_dir, checkpoints = GcsPath("digits", "runs/r"), GcsPath("digits", "ckpt")
    return {name: (run_dir / name).read_bytes() for name in run_dir.walk()} | {
        f"checkpoints/{name}": (checkpoints / name).read_bytes() for name in checkpoints.walk()
    }
