import dataclasses
import hashlib
import io
import logging
import shutil
import struct

import numpy as np
import pytest

from pipeline import storage
from pipeline.command import UNREACHABLE, InputError, UnreachableError
from pipeline.gcs import GcsPath
from trainer import checkpoints, run_folder
from trainer.checkpoints import Checkpoints, DamagedError, Progress
from trainer.config import PRESETS
from trainer.model import MLP
from trainer.optimizers import UpdateState, make_update
from trainer.trained import Trained

ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.float32(0.1) * np.ones((3, 2), np.float32).T,  # not contiguous
    np.array(7, np.int64),
    np.zeros((0, 4), np.float32),
    np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
]


RUN = run_folder.describe(PRESETS["core"], "d1", ["CPU:0"])


class Numbers:
    """What is trained, as far as checkpoints see it: two arrays."""

    def __init__(self):
        self.now = [np.float32([1, 2]), np.array(0, np.int64)]

    def values(self):
        return [array.copy() for array in self.now]

    def assign(self, values):
        self.now = [array.copy() for array in values]

    def become(self, number):
        self.now = [np.float32([number, number]), np.array(number, np.int64)]


def opened(folder, *, numbers=None, **changed):
    options = {"run": RUN, "seconds": 10.0} | changed
    return Checkpoints(folder, numbers or Numbers(), **options)


def saved(folder, *steps, best=()):
    """Saves at some steps; each epoch has 10."""
    numbers = Numbers()
    of_run = opened(folder, numbers=numbers)
    of_run.restore()
    for step in steps:
        numbers.become(step)
        progress = Progress(
            epoch=step // 10, step_in_epoch=step % 10, loss_sum=step / 3, best_weights=best
        )
        of_run.save(progress, step)


def bits(arrays):
    return [(a.dtype, a.shape, a.tobytes()) for a in arrays]


def test_what_is_read_is_what_was_written(tmp_path):
    path = tmp_path / "x"
    with path.open("wb") as file:
        checkpoints.write(file, {"a": [1, 0.1, "é"]}, [*ARRAYS, ARRAYS[0].astype(">f4")])
    header, arrays = checkpoints.read(path)
    assert header == {"a": [1, 0.1, "é"]}
    assert bits(arrays) == bits([*ARRAYS, ARRAYS[0]])
    assert all(array.flags.writeable for array in arrays)


def test_every_cut_and_every_flipped_bit_shows(tmp_path):
    file = io.BytesIO()
    checkpoints.write(file, {"run": "run"}, ARRAYS)
    whole = file.getvalue()
    path = tmp_path / "x"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedError, match="checksum"):
            checkpoints.read(path)
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(DamagedError, match="checksum"):
            checkpoints.read(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(DamagedError):
        checkpoints.read(path)


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path):
    best = (np.float32([[0.5]]), np.float32([0.25]))
    saved(tmp_path, 9, 10, 25, best=best)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000010.ckpt",
        "step-00000025.ckpt",
    ]
    numbers = Numbers()
    progress = opened(tmp_path, numbers=numbers).restore()
    assert (progress.epoch, progress.step_in_epoch, progress.loss_sum) == (2, 5, 25 / 3)
    assert bits(progress.best_weights) == bits(best)
    assert bits(numbers.now) == bits([np.float32([25, 25]), np.array(25, np.int64)])


def test_a_digest_names_a_state_to_the_last_bit(tmp_path):
    best = (np.float32([0.5]),)
    saved(tmp_path / "a", 25, best=best)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    found = []
    for folder in ("a", "b"):
        of_run = opened(tmp_path / folder)
        of_run.restore()
        found.append(of_run.digest())
    of_run.save(Progress(), 30)
    found.append(of_run.digest())
    for step, changed in (
        (26, best),  # another state
        (25, (np.nextafter(np.float32([0.5]), np.float32(1)),)),  # other best weights
        (25, ()),
    ):
        other = tmp_path / str(len(found))
        saved(other, step, best=changed)
        of_run = opened(other)
        of_run.restore()
        found.append(of_run.digest())
    assert found[0] == found[1]
    assert len(set(found)) == len(found) - 1
    assert {len(name) for name in found} == {32}


def test_without_a_checkpoint_it_starts_as_it_is(tmp_path):
    numbers = Numbers()
    assert opened(tmp_path / "none", numbers=numbers).restore() == Progress()
    assert bits(numbers.now) == bits(Numbers().now)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damaged", "stands", "said"),
    [
        ([20], 10, ["going on from step-00000010.ckpt, the one before it"]),
        ([10], 20, []),
        ([10, 20], 0, ["going on from step-00000010.ckpt", "going on from the start"]),
    ],
)
def test_a_damaged_checkpoint_is_told_and_passed_over(tmp_path, caplog, damaged, stands, said):
    caplog.set_level(logging.INFO)
    saved(tmp_path, 10, 20)
    for step in damaged:
        path = tmp_path / f"step-{step:08d}.ckpt"
        path.write_bytes(path.read_bytes()[:-5])
    numbers = Numbers()
    progress = opened(tmp_path, numbers=numbers).restore()
    assert progress.epoch * 10 == stands
    assert numbers.now[1] == stands
    assert len(caplog.messages) == len(said)
    for message, part in zip(caplog.messages, said, strict=True):
        assert str(tmp_path / "step-000000") in message
        assert "damaged (its checksum is wrong)" in message
        assert part in message
        assert "\n" not in message
    left = [int(path.stem[5:]) for path in tmp_path.iterdir()]
    assert sorted(left) == [step for step in (10, 20) if step not in damaged or step < stands]


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("/proc/self/mem", "Input/output error"),  # opens, but its first bytes cannot be read
        ("step-00000030.ckpt", "Too many levels of symbolic links"),  # does not open
    ],
)
def test_a_checkpoint_that_cannot_be_read_stays(tmp_path, target, why):
    saved(tmp_path, 10, 20)
    path = tmp_path / "step-00000030.ckpt"
    path.symlink_to(target)
    with pytest.raises(UnreachableError) as raised:
        opened(tmp_path).restore()
    assert str(raised.value) == f"{path}: cannot be read: {why}"
    assert raised.value.exit_code == UNREACHABLE
    assert sorted(int(p.stem[5:]) for p in tmp_path.iterdir()) == [10, 20, 30]
    path.unlink()
    assert opened(tmp_path).restore().epoch == 2


def test_a_checkpoint_that_goes_meanwhile_is_passed_over(tmp_path, monkeypatch, caplog):
    saved(tmp_path, 10, 20)
    files = checkpoints.newest_first

    def and_one_that_is_gone(directory):
        return [tmp_path / "step-00000030.ckpt", *files(directory)]

    monkeypatch.setattr(checkpoints, "newest_first", and_one_that_is_gone)
    assert opened(tmp_path, writes=False).restore().epoch == 2
    assert "damaged (it is gone); going on from step-00000020.ckpt" in caplog.text


def test_a_checkpoint_of_another_run_is_refused_by_its_difference(tmp_path):
    saved(tmp_path, 10)
    for shown in (None, GcsPath("bucket", "c")):
        with pytest.raises(InputError) as raised:
            opened(tmp_path, run=RUN | {"replicas": 2}, shown=shown).restore()
        assert str(raised.value) == (
            f"{shown or tmp_path}: holds a run with replicas None, not 2; expected a new folder,"
            " or the flags it was started with"
        )
    assert len(list(tmp_path.iterdir())) == 1


def header(**progress):
    return {"run": RUN, "progress": {"epoch": 1} | progress}


@pytest.mark.parametrize(
    ("content", "arrays"),
    [
        (header(lives=9), Numbers().values()),
        (header() | {"progress": 7}, Numbers().values()),
        (header() | {"run": "0123456789abcdef"}, Numbers().values()),
        ({"progress": {}}, Numbers().values()),
        ({"run": RUN}, Numbers().values()),
        (header(), Numbers().values()[:1]),
        (header(), Numbers().values()[::-1]),
    ],
)
def test_a_checkpoint_of_another_version_is_refused_and_stays(tmp_path, content, arrays):
    path = tmp_path / "step-00000010.ckpt"
    with path.open("wb") as file:
        checkpoints.write(file, content, arrays)
    with pytest.raises(InputError, match=f"^{path}: not as this version of the program writes it"):
        opened(tmp_path).restore()
    assert path.exists()


@pytest.mark.parametrize("content", [b"{}", b"[]", b"no header"])
def test_a_whole_file_of_another_form_is_refused_and_stays(tmp_path, content):
    path = tmp_path / "step-00000010.ckpt"
    data = struct.pack("<Q", len(content)) + content + b"x" * 100
    path.write_bytes(data + hashlib.sha256(data).digest())
    with pytest.raises(InputError, match=f"^{path}: not as this version of the program writes it"):
        opened(tmp_path).restore()
    assert path.exists()
    assert checkpoints.newest(tmp_path) is None


def test_the_newest_that_tells_its_run_is_found_by_its_header(tmp_path):
    assert checkpoints.newest(tmp_path / "none") is None
    saved(tmp_path, 99_999_999, 100_000_000)
    newer, older = tmp_path / "step-100000000.ckpt", tmp_path / "step-99999999.ckpt"
    assert checkpoints.newest(tmp_path) == (newer, RUN)
    newer.write_bytes(newer.read_bytes()[:-9])  # of what is cut, the header still tells
    assert checkpoints.newest(tmp_path) == (newer, RUN)
    content = newer.read_bytes()
    for damaged in (content.replace(b'"replicas": null', b'"replicas": 2   '), content[:50], b""):
        assert damaged != content
        newer.write_bytes(damaged)
        assert checkpoints.newest(tmp_path) == (older, RUN)


def test_of_steps_with_more_digits_the_newest_are_kept(tmp_path):
    saved(tmp_path, 99_999_998, 99_999_999, 100_000_000)
    names = [path.name for path in checkpoints.newest_first(tmp_path)]
    assert names == ["step-100000000.ckpt", "step-99999999.ckpt"]


def test_a_save_that_fails_leaves_the_ones_before(tmp_path, monkeypatch):
    saved(tmp_path, 10, 20)

    def fails(file, header, arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "write", fails)
    with pytest.raises(OSError, match="disk full"):
        saved(tmp_path, 30)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000010.ckpt",
        "step-00000020.ckpt",
    ]
    assert opened(tmp_path).restore().epoch == 2


def test_saving_twice_at_a_step_keeps_the_later(tmp_path):
    numbers = Numbers()
    of_run = opened(tmp_path, numbers=numbers)
    of_run.save(Progress(step_in_epoch=10), 10)
    after = Progress(epoch=1, lines=({"epoch": 1, "loss": 0.1, "val_loss": None},))
    of_run.save(after, 10)
    assert opened(tmp_path).restore() == after


def test_rewinding_goes_back_to_what_was_saved_last(tmp_path):
    numbers = Numbers()
    of_run = opened(tmp_path, numbers=numbers)
    of_run.restore()
    numbers.become(5)
    assert of_run.rewind() == Progress()
    assert bits(numbers.now) == bits(Numbers().now)
    numbers.become(20)
    progress = Progress(epoch=2)
    of_run.save(progress, 20)
    progress.epoch = 3  # the loop goes on with the same object
    numbers.become(30)
    assert of_run.rewind() == Progress(epoch=2)
    assert numbers.now[1] == 20


def test_a_worker_that_does_not_write_keeps_step(tmp_path):
    saved(tmp_path, 10)
    numbers = Numbers()
    worker = opened(tmp_path, numbers=numbers, writes=False)
    assert worker.restore().epoch == 1
    numbers.become(20)
    worker.save(Progress(epoch=2), 20)
    numbers.become(30)
    assert worker.rewind() == Progress(epoch=2)
    assert numbers.now[1] == 20
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010.ckpt"]


def test_it_is_due_when_the_time_has_passed(tmp_path):
    now = [100.0]
    of_run = opened(tmp_path, clock=lambda: now[0])
    assert not of_run.due()
    now[0] = 109.9
    assert not of_run.due()
    now[0] = 110
    assert of_run.due()
    of_run.save(Progress(), 1)
    assert not of_run.due()
    assert opened(tmp_path, seconds=0).due()


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd", "momentum": 0.9},
        {"optimizer": "rmsprop"},
        {"optimizer": "adam", "ema_decay": 0.9},
        {"optimizer": "adamw", "weight_decay": 0.1},
    ],
)
def test_weights_slots_and_averages_come_back_bit_for_bit(tmp_path, settings):
    config = dataclasses.replace(PRESETS["core"], **settings)

    def fresh():
        model = MLP(6, (4,), 3, seed=1)
        return model, make_update(config, model.weights, 10)

    model, update = fresh()
    for step in range(3):
        gradients = [w * (step + 1) + 0.1 for w in model.weights]
        weights, state = update.update([w + 0.0 for w in model.weights], gradients, update.state)
        for variable, value in zip(model.weights, weights, strict=True):
            variable.assign(value)
        update.assign(UpdateState(*state))
    trained = Trained(model, update, None, None)
    with storage.open_atomic(tmp_path / "x") as file:
        checkpoints.write(file, {}, trained.values())
    other = Trained(*fresh(), None, None)
    assert bits(other.values()) != bits(trained.values())
    other.assign(checkpoints.read(tmp_path / "x")[1])
    assert bits(other.values()) == bits(trained.values())
    assert bits(other.evaluated()) == bits(trained.evaluated())
    averaged = bits(trained.evaluated()) != bits([w.numpy() for w in model.weights])
    assert averaged == ("ema_decay" in settings)
