import functools
import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import helpers
import numpy as np
import numpy_twin
import pytest
import replica_losses

from pipeline.command import InputError
from trainer.checks import check_divides, configure
from trainer.config import PRESETS
from trainer.workers import Cluster, read_cluster

SCRIPT = Path(replica_losses.__file__)
NO_GPU = {"CUDA_VISIBLE_DEVICES": "-1"}


CASES = {
    "plain": {},
    "again": {},
    "cut": {"calls_of": 3},
    "cut up": {"calls_of": 1},
    "reproducible": {"reproducible": True},
    "few": {"reproducible": True, "rows": 7},
}
ALONE = ("from memory", "cut stream")  # what one replica shows
STREAMED = {"window": 64, "reproducible": True}


@pytest.fixture(scope="module")
def cases(small_dataset):
    streamed = STREAMED | {"dataset": str(small_dataset)}
    return CASES | {
        "from memory": streamed | {"input": "as streamed"},
        "stream": streamed | {"input": "stream"},
        "cut stream": streamed | {"input": "stream", "calls_of": 3},
    }


@pytest.fixture(scope="module")
def trained(cases):
    """Gives what a number of replicas finds in each case; each number is run once."""

    @functools.cache
    def of_replicas(replicas):
        asked = {name: cases[name] for name in cases if replicas == 1 or name not in ALONE}
        done = helpers.run_python(SCRIPT, replicas, json.dumps(asked), env=NO_GPU)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return of_replicas


@pytest.fixture(scope="module")
def workers(cases):
    """What each of two worker processes finds."""
    return trained_by_workers(2, {name: cases[name] for name in ("reproducible", "stream")})


def trained_by_workers(count, cases):
    """What each of several processes of `replica_losses` finds, as one cluster on loopback."""
    with_ports = [socket.socket() for _ in range(count)]
    for held in with_ports:
        held.bind(("localhost", 0))
    hosts = [f"localhost:{held.getsockname()[1]}" for held in with_ports]
    for held in with_ports:
        held.close()
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, "0", json.dumps(cases)],
            env=os.environ
            | NO_GPU
            | {
                "PYTHONPATH": str(helpers.ROOT),
                "TF_CONFIG": json.dumps(
                    {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": i}}
                ),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        ended = [worker.communicate(timeout=300) for worker in started]
    finally:
        for worker in started:
            worker.kill()
    for worker, (_, errors) in zip(started, ended, strict=True):
        assert worker.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in ended]


def assert_like_numpy(found):
    """The losses and weights of plain float64 training on the same global batches.

    To 1e-5: float32, and sums over replicas in another order, explain no more than that.
    """
    expected = plain_training([np.array(weight) for weight in found["initial"][0]])
    for steps, (loss, right) in zip(replica_losses.CALLS, found["calls"], strict=True):
        assert loss == pytest.approx(sum(expected["losses"][steps]), rel=1e-5), steps
        assert right == sum(expected["correct"][steps]), steps
    for i, weight in enumerate(expected["weights"]):
        np.testing.assert_allclose(
            found["weights"][0][i], weight, rtol=0, atol=1e-5, err_msg=f"weight {i}"
        )
    assert found["iterations"] == [[len(expected["losses"])]] * len(found["weights"])
    loss, right = found["evaluation"]
    assert loss == pytest.approx(expected["evaluation"][0], rel=1e-5)
    assert right == expected["evaluation"][1]


def plain_training(weights):
    """The same in NumPy: one device, batches without padding."""
    images, labels = replica_losses.examples()
    images = images.astype(np.float64)
    adam = numpy_twin.Adam(weights, **replica_losses.ADAM)
    losses, correct = [], []
    source = replica_losses.Resident(replica_losses.examples(), replica_losses.SEED)
    for _, indices, mask in replica_losses.batches(source):
        for rows in (row[use == 1] for row, use in zip(indices, mask, strict=True)):
            batch = images[rows], labels[rows]
            losses.append(numpy_twin.losses(weights, *batch).sum())
            correct.append(numpy_twin.correct(weights, *batch))
            weights = adam.step(weights, numpy_twin.gradients(weights, *batch))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])  # the steps are long enough to matter
    return {
        "losses": losses,
        "correct": correct,
        "weights": weights,
        "evaluation": (
            numpy_twin.losses(weights, images, labels).sum(),
            numpy_twin.correct(weights, images, labels),
        ),
    }


# Four replicas show what two do, and take two cores a while.
NUMBERS = [1, 2, pytest.param(4, marks=pytest.mark.campaign)]


@pytest.mark.parametrize("replicas", NUMBERS)
def test_replicas_agree_with_numpy(trained, replicas):
    for case in ("plain", "reproducible"):
        found = trained(replicas)[case]
        assert found["replicas"] == replicas
        assert found["placed"] == [f"CPU:{i}" for i in range(replicas)]
        assert found["agreed"] == [False, True, True]
        assert found["exchanged"] == ["1é"]
        for copies in ("initial", "weights", "slots"):
            assert len(found[copies]) == replicas
            assert all(copy == found[copies][0] for copy in found[copies])  # bit for bit
        assert_like_numpy(found)


@pytest.mark.parametrize("replicas", NUMBERS)
def test_a_number_of_replicas_repeats_bit_for_bit(trained, replicas):
    assert trained(replicas)["plain"] == trained(replicas)["again"]


@pytest.mark.parametrize("replicas", NUMBERS)
def test_steps_may_be_cut_into_calls_in_any_way(trained, replicas):
    """The weights, and the sums of every call and validation, are equal bit for bit."""
    for case in ("cut", "cut up"):
        assert trained(replicas)[case] == trained(replicas)["plain"]


# --reproducible, and streams


@pytest.mark.parametrize("replicas", NUMBERS)
def test_reproducible_gives_the_same_bits_on_any_number_of_replicas(trained, replicas):
    for case in ("reproducible", "few", "stream"):
        found, expected = trained(replicas)[case], trained(1)[case]
        assert found["sha256"] == expected["sha256"]
        assert found["calls"] == expected["calls"]
        assert found.get("evaluation") == expected.get("evaluation")
        if case != "stream":
            assert found["slots"] == [expected["slots"][0]] * replicas


@pytest.mark.campaign
@pytest.mark.parametrize("preset", ["accurate", "core", "compact"])
def test_reproducible_gives_the_same_bits_of_a_whole_preset(small_dataset, tmp_path, preset):
    found = set()
    for replicas in (1, 2, 4):
        run = tmp_path / str(replicas)
        flags = ["--preset", preset, "--reproducible", "--replicas", replicas, "--epochs", 2]
        calm = ["--calm_epochs", 1] if preset == "accurate" else []
        folders = ["--dataset_dir", small_dataset, "--run_dir", run]
        done = helpers.run_cli("trainer.task", *folders, *flags, *calm, env=NO_GPU)
        assert done.returncode == 0, done.stderr
        found.add(json.loads((run / "export" / "model.json").read_text())["weights_sha256"])
    assert len(found) == 1


def test_a_validation_is_the_tree_of_compiled_shards():
    """Bit for bit: what is compiled does not depend on how a device's kernels cut their sums."""
    import tensorflow as tf

    from trainer.data import Examples
    from trainer.gradients import totals
    from trainer.model import MLP
    from trainer.optimizers import make_update
    from trainer.sources import Resident
    from trainer.step import add_tree, make_evaluate

    config = configure("core", {"reproducible": True})
    random = np.random.default_rng(7)
    images = random.random((1000, 784), np.float32)
    labels = random.integers(0, 10, 1000)
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model = MLP(784, config.hidden_units, 10, seed=3)
        update = make_update(config, model.weights, 8)
    source = Resident(Examples(images, labels), None)
    evaluate = make_evaluate(strategy, model, update, source, config, 1000)
    found = evaluate(np.arange(1000, dtype=np.int32)[np.newaxis], np.ones((1, 1000), np.float32), 0)

    @tf.function(jit_compile=True)
    def shard(weights, images, labels):
        return list(totals(labels, model.apply(weights, images), tf.ones(250)))

    weights = [tf.constant(weight.numpy()) for weight in model.weights]
    parts = [
        shard(weights, images[rows], labels[rows])
        for rows in (slice(at, at + 250) for at in range(0, 1000, 250))
    ]
    loss, correct = tf.function(add_tree, jit_compile=True)(parts)
    assert (found.loss, found.correct) == (float(loss), int(correct))

    # What XLA cannot compile is refused: nothing of a shard stands outside of its compilation.
    def apply(weights, images, apply=model.apply):
        logits = tf.numpy_function(np.copy, [apply(weights, images)], tf.float32)
        return tf.ensure_shape(logits, [250, 10])

    model.apply = apply
    evaluate = make_evaluate(strategy, model, update, source, config, 1000)
    with pytest.raises(tf.errors.InvalidArgumentError, match="unsupported operations"):
        evaluate(np.arange(1000, dtype=np.int32)[np.newaxis], np.ones((1, 1000), np.float32), 0)


def test_reproducible_gives_the_same_bits_on_two_workers(trained, workers):
    expected = trained(1)
    for i, worker in enumerate(workers):
        for case, found in worker.items():
            assert found["chief"] == (i == 0)
            assert found["replicas"] == 2
            assert found["agreed"] == [False, True, True]  # the second: asked for by one alone
            assert found["exchanged"] == ["1é", ""]
            for name in {"sha256", "calls", "evaluation", "weights", "slots"} & set(found):
                assert found[name] == expected[case][name], (case, name)


def test_a_stream_gives_the_same_bits_as_memory(trained):
    streamed, kept = trained(1)["stream"], trained(1)["from memory"]
    assert streamed["sha256"] == kept["sha256"]
    assert streamed["calls"] == kept["calls"]
    assert trained(1)["cut stream"] == streamed


def test_a_set_smaller_than_the_batch_counts_every_example_once(trained):
    """Seven examples in a batch of 16."""
    found = trained(1)["few"]
    first = [np.array(weight) for weight in found["initial"][0]]
    examples = replica_losses.examples(7)
    assert found["calls"][0][0] == pytest.approx(
        numpy_twin.losses(first, *examples).sum(), rel=1e-6
    )
    assert found["calls"][0][1] == numpy_twin.correct(first, *examples)
    assert found["iterations"] == [[3]]


@pytest.mark.parametrize(
    ("batch_size", "replicas", "reproducible", "message"),
    [
        (128, 3, False, "--batch_size 128: expected a multiple of the 3 replicas"),
        (128, 3, True, "--reproducible on 3 replicas: expected a number that divides 4"),
        (128, 16, True, "--reproducible on 16 replicas: expected a number that divides 4"),
        (102, 1, True, "--batch_size 102: expected a multiple of 4"),
    ],
)
def test_batches_that_cannot_be_shared_are_refused(batch_size, replicas, reproducible, message):
    with pytest.raises(InputError) as error:
        check_divides(batch_size, replicas, reproducible=reproducible)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("size", "rows_per_call", "steps_per_call", "length"),
    [
        (1000, None, 100, 8),  # seven batches and a part of one
        (1024, None, 100, 8),
        (1025, None, 100, 9),
        (1025, None, 5, 5),
        (5, None, 100, 1),
        (1000, 512, 100, 4),
        (1000, 511, 100, 3),  # what a call can hold is not exceeded
        (1000, 16384, 100, 8),
        (1000, 100, 100, 1),
    ],
)
def test_a_call_has_room_for_a_whole_split(size, rows_per_call, steps_per_call, length):
    from trainer.step import call_length

    source = types.SimpleNamespace(size=size, rows_per_call=rows_per_call)
    assert call_length(source, 128, steps_per_call) == length


def test_batches_that_can_be_shared_are_not_refused():
    for replicas in (1, 2, 4):
        check_divides(PRESETS["core"].batch_size, replicas, reproducible=True)


# TF_CONFIG


def tf_config(cluster, task):
    return json.dumps({"cluster": cluster, "task": task})


WORKERS = {"worker": ["a:1", "b:2"]}
WITH_CHIEF = {"chief": ["c:0"]} | WORKERS
TASK = {"type": "worker", "index": 1}


@pytest.mark.parametrize(
    ("text", "cluster"),
    [
        (None, Cluster([])),
        ("", Cluster([])),
        ("{}", Cluster([])),
        (tf_config({}, {}), Cluster([])),
        (tf_config(WORKERS, TASK), Cluster(["a:1", "b:2"], 1)),
        (tf_config({"worker": ["a:1"]}, {"type": "worker", "index": 0}), Cluster(["a:1"], 0)),
        (tf_config(WITH_CHIEF, {"type": "chief"}), Cluster(["c:0", "a:1", "b:2"], 0)),
        (tf_config(WITH_CHIEF, TASK), Cluster(["c:0", "a:1", "b:2"], 2)),
    ],
)
def test_workers_of_a_cluster(text, cluster):
    assert read_cluster(text) == cluster


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "7",
        "null",
        '{"cluster": []}',
        '{"cluster": {"worker": "a:1"}}',
        '{"cluster": {"worker": [1, 2]}}',
        '{"cluster": {"worker": ["a", "b"]}}',
        '{"cluster": {"worker": ["a:b", "c:d"]}}',
        '{"cluster": {"worker": ["a:1", "b:65536"]}}',
        tf_config(WORKERS, {"type": "worker", "index": 2}),
        tf_config(WORKERS, {"type": "worker", "index": -1}),
        tf_config(WORKERS, {"type": "worker", "index": "1"}),
        tf_config(WORKERS, {"type": "worker", "index": True}),
        tf_config(WORKERS, {"type": "chief", "index": 0}),
        tf_config(WORKERS, {"type": "evaluator", "index": 0}),
        tf_config(WORKERS, {"type": ["worker"], "index": 0}),
        tf_config(WORKERS | {"ps": ["c:3"]}, TASK),
        tf_config(WORKERS, []) + "x",
    ],
)
def test_a_tf_config_that_describes_no_worker_is_refused_in_one_line(text):
    with pytest.raises(InputError, match=r"^TF_CONFIG .*: expected ") as error:
        read_cluster(text)
    assert "\n" not in str(error.value)


def test_one_compilation_serves_every_number_of_steps():
    import tensorflow as tf

    from trainer import step

    def add(images, labels, rows, examples, mask, count, epoch, i):
        return step.Totals(tf.reduce_sum(images) * count, tf.cast(i, tf.float32))

    run = step._make_run(tf.distribute.MirroredStrategy(["CPU:0"]), add, whole=True)
    nothing = tf.zeros([5])
    counts = tf.constant([1.0, 2.0, 3.0, 4.0, 5.0])

    def arguments(steps):
        loss, correct = tf.constant(0.5, tf.float64), tf.constant(7, tf.int64)
        given = (nothing + 1.0, *[nothing] * 4, counts, tf.constant(0), tf.constant(steps))
        return *given, loss, correct

    for steps, (loss, correct) in {1: (5.5, 7), 3: (30.5, 10), 5: (75.5, 17)}.items():
        found = run(*arguments(steps))
        assert (float(found.loss), int(found.correct)) == (loss, correct)
    programs = {run.experimental_get_compiler_ir(*arguments(n))(stage="hlo") for n in (1, 3, 5)}
    assert len(programs) == 1
