"""The loop on its own, with steps that only count; whole runs are in test_runs.py."""

import dataclasses
import json
import threading

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.tsl.profiler.protobuf.xplane_pb2 import XSpace

from pipeline.command import InputError
from trainer import data, loop, run_folder, stride
from trainer.checkpoints import Checkpoints, Progress
from trainer.config import PRESETS
from trainer.gradients import Totals
from trainer.run import Run
from trainer.step import NOTHING
from trainer.workers import Workers

EPOCHS, STEPS, ROWS, VALIDATION = 3, 5, 17, 7  # 5 steps: four of 4 rows and one of 1
CONFIG = dataclasses.replace(PRESETS["core"], batch_size=4, epochs=EPOCHS, steps_per_call=2)
CONTENT = run_folder.describe(CONFIG, "d1", ["CPU:0"])
NEVER = 1e9  # seconds


class KilledError(Exception):
    pass


class Process:
    """One process of a run whose weights are a number that every step folds its rows into.

    Its moments are the calls, the saves and the lines; at one of them it is killed, or asked to
    stop.
    """

    def __init__(
        self, folder, *, killed_at=None, stopped_at=None, seconds=NEVER, workers=None, **changed
    ):
        self.state, self.step, self.moments = 1, 0, 0
        self.calls, self.rows, self.saved = [], [], []
        self.killed_at, self.stopped_at = killed_at, stopped_at
        self.received = False
        self.losses = changed.pop("losses", {})  # by step, what comes out instead
        self.validation = changed.pop("validation", lambda epoch: (0.5, 3))
        validates, profile = changed.pop("validates", True), changed.pop("profile", None)
        workers = workers or Workers()
        self.metrics = folder / "metrics.jsonl"
        self.events = []
        self.run = Run(
            config=dataclasses.replace(CONFIG, **changed),
            train=self.train,
            evaluate=self.evaluate if validates else None,
            evaluated=lambda: [np.float32([self.state % 1000]), np.float32([0])],
            evaluation_batch=3,
            order=lambda epoch: data.epoch_order(22, epoch, ROWS),
            train_size=ROWS,
            validation_size=VALIDATION,
            checkpoints=self,
            metrics=self.metrics,
            events=self if workers.is_chief else None,
            stop=self,
            workers=workers,
            profile=profile,
        )
        self.files = Checkpoints(
            folder / "checkpoints", self, run=CONTENT, seconds=seconds, writes=workers.is_chief
        )

    def moment(self):
        if self.moments == self.killed_at:
            raise KilledError
        if self.moments == self.stopped_at:
            self.received = True
        self.moments += 1

    # What is trained

    def values(self):
        return [np.array(self.state, np.int64), np.array(self.step, np.int64)]

    def assign(self, values):
        self.state, self.step = map(int, values)

    def train(self, indices, mask, epoch, so_far=NOTHING):
        self.moment()
        self.calls.append(len(indices))
        loss = so_far.loss
        for row, used in zip(indices, mask, strict=True):
            rows = row[used == 1]
            self.rows.extend(rows)
            self.state = (self.state * 1_000_003 + int(rows.sum()) + 7 * int(epoch)) % 2**61
            self.step += 1
            loss += self.losses.get(self.step, float(rows.sum()))
        return Totals(np.float64(loss), so_far.correct + int(mask.sum()))

    def evaluate(self, indices, mask, epoch, so_far=NOTHING):
        self.moment()
        loss, correct = self.validation(int(epoch))
        total = so_far.loss
        for used in mask:
            total += loss * float(used.sum())
        return Totals(total, so_far.correct + correct * (indices[0, 0] == 0))

    # What the run writes

    def due(self):
        return self.files.due()

    def save(self, progress, step):
        self.moment()
        self.files.save(progress, step)
        self.saved.append(step)

    def restore(self):
        return self.files.restore()

    def rewind(self):
        return self.files.rewind()

    def digest(self):
        return self.files.digest()

    def write(self, line, weights):
        self.moment()
        self.events.append((line, weights))

    @staticmethod
    def wants_histograms(epoch, epochs):
        return epoch % 2 == 0

    def go(self):
        """What `loop.train` returns."""
        return loop.train(self.run)


class Stop:
    """`Process` as a stop signal: two of its names mean something else there."""

    def __init__(self, process):
        self.process, self.unsaved = process, False

    @property
    def received(self):
        return self.process.received


@pytest.fixture(autouse=True)
def calls_that_no_clock_cuts(monkeypatch):
    monkeypatch.setattr(loop, "VALIDATION_STEPS_PER_CALL", 1)
    monkeypatch.setattr(stride, "CALL_SECONDS", NEVER)


def process(folder, **options):
    made = Process(folder, **options)
    made.run.stop = Stop(made)
    return made


def lines(folder):
    """The lines of the metrics, without what is never twice the same."""
    found = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        assert line.pop("seconds") >= 0  # rounded
        assert line.pop("examples_per_second") > 0
    return found


def assert_at_the_end(progress, folder):
    written = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert progress == Progress(epoch=EPOCHS, lines=tuple(written))


@pytest.fixture
def whole(tmp_path_factory):
    """A run that nothing disturbed, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    found = process(folder)
    assert_at_the_end(found.go(), folder)
    return found, folder


def test_every_row_of_every_epoch_is_seen_once_in_its_order(whole):
    found, folder = whole
    assert found.calls == [1, 2, 2, *[2, 2, 1] * (EPOCHS - 1)]
    orders = [data.epoch_order(22, epoch, ROWS) for epoch in range(EPOCHS)]
    assert found.rows == np.concatenate(orders).tolist()
    assert lines(folder) == [
        {
            "epoch": epoch,
            "step": STEPS * epoch,
            "loss": sum(range(ROWS)) / ROWS,
            "accuracy": 1.0,
            "val_loss": pytest.approx(0.5),
            "val_accuracy": 3 / 7,
        }
        for epoch in (1, 2, 3)
    ]
    assert found.saved == [15]  # never due before
    assert not found.run.stop.unsaved
    assert [line["epoch"] for line, _ in found.events] == [1, 2, 3]
    assert [weights is not None for _, weights in found.events] == [False, True, False]


# Calls, validation calls, lines; and the call that compiles validation, and one checkpoint.
MOMENTS = EPOCHS * (3 + 3 + 1) + 2


@pytest.mark.parametrize("seconds", [0, NEVER])
@pytest.mark.parametrize("how", ["killed_at", "stopped_at"])
def test_disturbed_at_any_moment_it_ends_the_same(whole, tmp_path, how, seconds):
    moments = MOMENTS if seconds else MOMENTS + EPOCHS * 6 - 1  # and a checkpoint between any two
    for moment in range(moments):
        folder = tmp_path / str(moment)
        folder.mkdir()
        first = process(folder, seconds=seconds, **{how: moment})
        if how == "killed_at":
            with pytest.raises(KilledError):
                first.go()
        else:
            # What is asked for in the last save is for the export to see.
            assert (first.go() is None) == (moment < moments - 1)
            assert first.run.stop.unsaved == (moment < moments - 1)  # time to return
        last = process(folder, seconds=seconds)
        assert_at_the_end(last.go(), folder)
        assert last.state == whole[0].state
        assert lines(folder) == lines(whole[1])
        if how == "stopped_at":  # no step is taken twice
            assert first.rows + last.rows == whole[0].rows
    undisturbed = process(tmp_path, seconds=seconds)
    assert undisturbed.go()
    assert undisturbed.moments == moments  # none was left out


def test_stopped_again_and_again_it_gets_to_the_end(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "VALIDATION_STEPS_PER_CALL", 100)
    attempts, rows, state = 0, [], None
    while state is None:
        now = process(tmp_path, stopped_at=2)  # in the second call that it takes
        if now.go() is not None:
            state = now.state
        rows += now.rows
        attempts += 1
        assert attempts < 100
    assert (rows, state) == (whole[0].rows, whole[0].state)
    assert lines(tmp_path) == lines(whole[1])


INEXACT = {step: 1 / step for step in range(1, EPOCHS * STEPS + 1)}  # losses


@pytest.mark.parametrize("stopped_at", [None, 3, 9, 13])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, NEVER), (NEVER, 0)])
def test_however_its_steps_are_cut_it_ends_the_same(
    tmp_path, monkeypatch, before, after, stopped_at
):
    """The sums too, to the last bit: those of these losses depend on their order."""
    monkeypatch.setattr(loop, "VALIDATION_STEPS_PER_CALL", 100)
    options = {"losses": INEXACT, "validation": lambda epoch: (1 / 3, 3)}
    folders = [tmp_path / "whole", tmp_path / "cut"]
    for folder in folders:
        folder.mkdir()
    whole = process(folders[0], **options)
    assert_at_the_end(whole.go(), folders[0])

    monkeypatch.setattr(stride, "CALL_SECONDS", before)
    first = process(folders[1], stopped_at=stopped_at, **options)
    assert (first.go() is None) == (stopped_at is not None)
    monkeypatch.setattr(stride, "CALL_SECONDS", after)
    last = process(folders[1], **options)
    assert_at_the_end(last.go(), folders[1])
    for seconds, made in ((before, first), (after, last)):
        assert seconds or set(made.calls) <= {1}
    assert first.rows + last.rows == whole.rows
    assert last.state == whole.state
    assert lines(folders[1]) == lines(folders[0])


@pytest.mark.parametrize("seconds", [0, NEVER])
def test_a_torn_line_is_written_again(whole, tmp_path, seconds):
    with pytest.raises(KilledError):
        process(tmp_path, killed_at=21, seconds=seconds).go()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    assert_at_the_end(process(tmp_path).go(), tmp_path)
    assert lines(tmp_path) == lines(whole[1])


@pytest.mark.parametrize("stopped_at", [11, None])
def test_lost_lines_are_those_of_the_checkpoint_again(whole, tmp_path, stopped_at):
    """As where checkpoints are kept and the run folder is not; the run may be at its end."""
    first = process(tmp_path, stopped_at=stopped_at)
    assert (first.go() is None) == (stopped_at is not None)
    path = tmp_path / "metrics.jsonl"
    before = path.read_text()
    assert before.count("\n") == (EPOCHS if stopped_at is None else 1)
    path.unlink()
    assert_at_the_end(process(tmp_path).go(), tmp_path)
    assert path.read_text().startswith(before)
    assert lines(tmp_path) == lines(whole[1])


def test_more_epochs_go_on_from_the_last(whole, tmp_path):
    assert process(tmp_path, epochs=1).go()
    again = process(tmp_path)
    assert again.go()
    assert again.calls == [1, 2, 2, 2, 2, 1]
    assert again.state == whole[0].state
    assert lines(tmp_path) == lines(whole[1])


def test_without_validation_its_numbers_are_null(tmp_path):
    assert process(tmp_path, validates=False).go()
    for line in lines(tmp_path):
        assert line["val_loss"] is line["val_accuracy"] is None


# A loss that is no number


@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("step", [1, 4, 5, 7, 15])
@pytest.mark.parametrize("seconds", [0, NEVER])
def test_a_bad_loss_names_its_step(tmp_path, step, loss, seconds):
    found = process(tmp_path, losses={step: loss}, seconds=seconds)
    epoch = -(-step // STEPS)
    with pytest.raises(InputError, match=f"the loss is {loss} at step {step}, in epoch {epoch};"):
        found.go()
    assert len(lines(tmp_path)) == epoch - 1
    assert all(saved < step for saved in found.saved)


def test_a_bad_loss_that_does_not_come_again_names_the_call(tmp_path):
    found = process(tmp_path, losses={7: np.nan})
    rewind = found.rewind

    def rewind_to_a_good_run():
        found.losses = {}
        return rewind()

    found.rewind = rewind_to_a_good_run
    with pytest.raises(InputError, match="the loss is nan in the 2 steps from step 6;"):
        found.go()


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_bad_validation_names_the_epoch(tmp_path, loss):
    found = process(tmp_path, validation=lambda epoch: (loss if epoch == 1 else 1.0, 4))
    where = "on the validation split after step 10, epoch 2;"
    with pytest.raises(InputError, match=f"the loss is {loss} {where}"):
        found.go()
    assert len(lines(tmp_path)) == len(found.events) == 1
    assert found.saved == []


def test_bad_weights_are_told_before_a_line_is_written(tmp_path):
    found = process(tmp_path, validates=False)
    found.run.evaluated = lambda: [np.float32([np.nan])]
    with pytest.raises(InputError, match="the weights are not finite after step 10;"):
        found.go()
    assert len(lines(tmp_path)) == len(found.events) == 1


# Early stopping


@pytest.mark.parametrize(
    ("patience", "scores", "epochs", "best"),
    [
        # loss and right answers, of 7, of each epoch's validation
        (1, [(1, 5), (1, 5), (0, 7)], 2, 1),
        (2, [(1, 5), (1, 5), (1, 6), (1, 5), (2, 5), (1, 7)], 5, 3),
        (2, [(1, 5), (0.5, 5), (0.25, 4), (1, 5), (0, 7)], 4, 2),  # equal, with a lower loss
        (1, [(1, 5), (2, 6), (3, 7)], 3, 3),  # accuracy decides
        (9, [(1, 5), (1, 4), (1, 3)], 3, 1),  # the end comes first
        (1, [(1, 0), (1, 0)], 2, 1),
    ],
)
@pytest.mark.parametrize("stopped", [False, True])
def test_it_stops_early_and_keeps_the_best(tmp_path, patience, scores, epochs, best, stopped):
    settings = {
        "validation": lambda epoch: scores[epoch],
        "patience": patience,
        "epochs": len(scores),
    }
    after = {}  # the weights after each epoch
    (tmp_path / "states").mkdir()
    states = process(tmp_path / "states", **settings | {"patience": 0, "validates": False})
    states.wants_histograms = lambda epoch, epochs: after.update({epoch: states.state}) or False
    assert states.go()

    folder = tmp_path / "run"
    folder.mkdir()
    progress = None
    for moment in range(200):
        now = process(folder, **settings, **({"stopped_at": moment % 5} if stopped else {}))
        progress = now.go()
        if progress is not None:
            break
    assert progress.epoch == len(lines(folder)) == epochs
    assert progress.best_epoch == best
    loss, correct = scores[best - 1]
    assert (progress.best_loss, progress.best_accuracy) == (loss, correct / VALIDATION)
    assert [w.tolist() for w in progress.best_weights] == [[after[best] % 1000], [0]]
    assert process(folder, **settings).go().best_epoch == best  # again: nothing left to train


# Several workers


class Together:
    """Two workers that ask each other."""

    def __init__(self):
        self.barrier = threading.Barrier(2, timeout=60)
        self.said = [None, None]

    def workers(self, index):
        def exchange(mine):
            self.said[index] = mine
            self.barrier.wait()
            found = list(self.said)
            self.barrier.wait()
            return found

        return Workers(
            is_chief=index == 0,
            total=lambda mine: [sum(each) for each in zip(*exchange(mine), strict=True)],
            exchange=exchange,
            part=self.barrier.wait,
        )

    def go(self, folder, options):
        made = [process(folder, workers=self.workers(i), **options[i]) for i in range(2)]
        results = [None, None]

        def work(i):
            results[i] = made[i].go()

        threads = [threading.Thread(target=work, args=(i,), name=str(i)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return made, results


@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("moment", [0, 2, 4, 6, 9, 17])
def test_a_stop_of_one_worker_stops_all_at_the_same_step(whole, tmp_path, asked, moment):
    options = [{}, {}]
    options[asked] = {"stopped_at": moment}
    made, results = Together().go(tmp_path, options)
    assert results == [None, None]
    assert made[0].state == made[1].state
    assert made[0].saved == made[1].saved
    assert len(made[0].saved) == 1
    made, results = Together().go(tmp_path, [{}, {}])
    assert [progress.epoch for progress in results] == [EPOCHS] * 2
    assert made[0].state == made[1].state == whole[0].state
    assert lines(tmp_path) == lines(whole[1])


def test_workers_that_stand_at_different_steps_are_refused(whole, tmp_path):
    first, other = tmp_path / "first", tmp_path / "other"
    for folder in (first, other):
        folder.mkdir()
    assert process(first, stopped_at=4).go() is None
    together = Together()
    made = [process(f, workers=together.workers(i)) for i, f in enumerate((first, other))]
    for_all = [None, None]

    def work(i):
        with pytest.raises(InputError) as refused:
            made[i].go()
        for_all[i] = str(refused.value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert for_all[0] == for_all[1]
    assert for_all[0].startswith("worker 1 has checkpoint ")
    assert [one.calls for one in made] == [[], []]


class Clocks:
    """What the loop takes for `time`: by it, every call of a worker takes equally long."""

    def __init__(self, seconds):
        self.seconds, self.looks = seconds, [0, 0]

    def monotonic(self):
        worker = int(threading.current_thread().name)
        self.looks[worker] += 1
        return self.looks[worker] * self.seconds[worker]


@pytest.mark.parametrize(
    ("seconds", "calls"),
    [
        ((0.5, 60.0), [1, 2, 2, 4, 1, 2, 3]),
        ((60.0, 0.5), [1] * EPOCHS * STEPS),
    ],
)
def test_workers_cut_alike_by_the_clock_of_the_chief(whole, tmp_path, monkeypatch, seconds, calls):
    monkeypatch.setattr(stride, "CALL_SECONDS", 1.0)
    monkeypatch.setattr(loop, "time", Clocks(seconds))
    made, _ = Together().go(tmp_path, [{"steps_per_call": 4}] * 2)
    assert [each.calls for each in made] == [calls] * 2
    assert made[0].state == made[1].state == whole[0].state
    assert lines(tmp_path) == lines(whole[1])


def test_the_chief_alone_writes_and_all_save_together(whole, tmp_path):
    made, _ = Together().go(tmp_path, [{"seconds": NEVER}, {"seconds": 0}])
    assert made[0].saved == made[1].saved
    assert len(made[0].saved) > EPOCHS * 3
    assert len(made[0].events) == EPOCHS
    assert made[1].events == []
    assert lines(tmp_path) == lines(whole[1])
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


# A profile


def test_a_profile_traces_calls_after_the_first(tmp_path):
    found = process(tmp_path, profile=tmp_path / "tensorboard")
    train = found.run.train

    def traced(*args):
        with tf.profiler.experimental.Trace(f"call {len(found.calls)}"):
            return train(*args)

    found.run.train = traced
    assert found.go()
    (path,) = tmp_path.glob("tensorboard/plugins/profile/*/*.xplane.pb")
    space = XSpace.FromString(path.read_bytes())
    names = {meta.name for plane in space.planes for meta in plane.event_metadata.values()}
    assert {name for name in names if name.startswith("call ")} == {"call 1", "call 2", "call 3"}


def test_a_run_too_short_to_profile_says_so(tmp_path, caplog):
    found = process(tmp_path, profile=tmp_path / "tensorboard", epochs=1, batch_size=ROWS)
    assert found.go()
    assert [m for m in caplog.messages if "too few calls" in m]
    assert not (tmp_path / "tensorboard").exists()


def test_lines_are_dropped_where_there_is_no_checkpoint(tmp_path):
    run_folder.append_line(tmp_path / "metrics.jsonl", {"epoch": 1})
    with pytest.raises(KilledError):
        process(tmp_path, killed_at=0).go()
    assert lines(tmp_path) == []
