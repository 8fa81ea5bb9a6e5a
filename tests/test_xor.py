import dataclasses

import helpers
import numpy as np
import numpy_twin
import pytest

from trainer import task, xor
from trainer.config import PRESETS

CONFIG = PRESETS["xor"]


def run(*flags, **options):
    return helpers.run_cli("trainer.task", "--preset", "xor", *flags, **options)


@pytest.fixture(scope="module")
def training():
    return xor.make_training(CONFIG)


def test_the_command_learns_it_from_ten_seeds_and_touches_no_file(tmp_path):
    done = run(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    head, *lines, last = done.stdout.splitlines()
    assert " ".join(head.split()) == "seed 0 xor 0 0 xor 1 1 xor 0 1 xor 1 loss learned"
    assert last == "10 of 10 seeds learned XOR"
    assert [int(line.split()[0]) for line in lines] == list(range(22, 32))
    for line in lines:
        _, *outputs, loss, learned = line.split()
        assert [round(float(output)) for output in outputs] == [0, 1, 1, 0]
        assert float(loss) < 0.1
        assert learned == "yes"
    assert not any(tmp_path.iterdir())


def test_the_table():
    first = xor.Result(seed=7, outputs=np.array([0.0625, 1, 1, 0], np.float32), loss=0.03125)
    other = dataclasses.replace(first, seed=2**31 - 1, outputs=first.outputs[::-1], loss=1.25)
    assert xor.table([first, other]).splitlines() == [
        "      seed  0 xor 0  0 xor 1  1 xor 0  1 xor 1      loss  learned",
        "         7   0.0625   1.0000   1.0000   0.0000  0.031250  yes",
        "2147483647   0.0000   1.0000   1.0000   0.0625  1.250000  yes",
        "2 of 2 seeds learned XOR",
    ]


def test_the_command_says_which_seeds_fail(capsys):
    assert xor.execute(task.parse(["--preset=xor", "--epochs=1", "--seed=5"]).train) == 1
    *lines, last = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[-1] for line in lines] == ["no"] * 10
    assert last == "0 of 10 seeds learned XOR; not 5, 6, 7, 8, 9, 10, 11, 12, 13, 14"


def test_the_network_is_the_books():
    model, update = xor.build(CONFIG)
    assert [tuple(w.shape) for w in model.weights] == [(2, 4), (4,), (4, 1), (1,)]
    assert CONFIG.gradients == "manual"
    assert update.iterations.numpy() == 0


def test_a_training_agrees_with_numpy():
    """60 steps: the weights are those of float64 gradient descent with momentum."""
    config = dataclasses.replace(CONFIG, epochs=60)
    model, _ = xor.build(config)
    weights = [w.numpy().astype(np.float64) for w in model.weights]
    twin = numpy_twin.Sgd(weights, learning_rate=1.0, momentum=0.9)
    settings = {"activation": "sigmoid", "loss": "sigmoid"}
    for _ in range(config.epochs):
        loss = numpy_twin.losses(weights, xor.POINTS, xor.ANSWERS, **settings).mean()
        weights = twin.step(
            weights, numpy_twin.gradients(weights, xor.POINTS, xor.ANSWERS, **settings)
        )
    result = xor.train(config, xor.make_training(config))
    _, logits = numpy_twin.forward(weights, xor.POINTS, activation="sigmoid")
    np.testing.assert_allclose(result.outputs, 1 / (1 + np.exp(-logits[:, 0])), atol=1e-5)
    assert result.loss == pytest.approx(loss, abs=1e-5)


def test_a_seed_gives_the_same_outputs_again(training):
    first, again = xor.train(CONFIG, training), xor.train(CONFIG, training)
    assert first.outputs.tobytes() == again.outputs.tobytes()
    other = xor.train(dataclasses.replace(CONFIG, seed=23), training)
    assert first.outputs.tobytes() != other.outputs.tobytes()


def test_the_tape_learns_it_as_well(training):
    tape = dataclasses.replace(CONFIG, gradients="tape")
    result = xor.train(tape, xor.make_training(tape))
    assert result.learned
    np.testing.assert_allclose(result.outputs, xor.train(CONFIG, training).outputs, atol=1e-3)


@pytest.mark.parametrize(
    ("outputs", "learned"),
    [
        ([0, 1, 1, 0], True),
        ([0.09, 0.91, 0.91, 0.09], True),
        ([0.09, 0.91, 0.91, 0.11], False),
        ([0.09, 0.89, 0.91, 0.09], False),
        ([0.5, 0.5, 0.5, 0.5], False),
        ([1, 0, 0, 1], False),
        ([0, 1, 1, float("nan")], False),
    ],
)
def test_what_counts_as_learned(outputs, learned):
    result = xor.Result(seed=1, outputs=np.float32(outputs), loss=0.0)
    assert result.learned == learned


def test_a_table_with_failures_names_them():
    good = xor.Result(seed=4, outputs=np.float32([0, 1, 1, 0]), loss=0.0)
    bad = xor.Result(seed=5, outputs=np.float32([0, 1, 0.5, 0.5]), loss=0.34657)
    assert xor.table([good, bad]).splitlines() == [
        "      seed  0 xor 0  0 xor 1  1 xor 0  1 xor 1      loss  learned",
        "         4   0.0000   1.0000   1.0000   0.0000  0.000000  yes",
        "         5   0.0000   1.0000   0.5000   0.5000  0.346570  no",
        "1 of 2 seeds learned XOR; not 5",
    ]


def test_seeds_wrap_around_at_their_end(capsys):
    config = dataclasses.replace(CONFIG, epochs=1, seed=2**31 - 2)
    assert xor.execute(config) == xor.FAILED
    lines = capsys.readouterr().out.splitlines()
    seeds = [int(line.split()[0]) for line in lines[1:-1]]
    assert seeds == [2**31 - 2, 2**31 - 1, *range(8)]


@pytest.mark.parametrize(
    "changed",
    [
        {"dropout": 0.1},
        {"clip_norm": 0.5},
        {"ema_decay": 0.9},
        {"label_smoothing": 0.02},
        {"optimizer": "adam", "momentum": 0.0, "learning_rate": 0.05},
        {"schedule": "cosine", "warmup_epochs": 10.0},
        {"hidden_units": (8, 8), "activation": "tanh", "learning_rate": 0.1},
    ],
)
def test_every_part_of_the_mathematics_fits_in(changed):
    config = dataclasses.replace(CONFIG, **changed)
    result = xor.train(config, xor.make_training(config))
    assert np.isfinite(result.loss)
    answered = result.outputs > 0.5
    np.testing.assert_array_equal(answered, xor.ANSWERS[:, 0] > 0.5)
