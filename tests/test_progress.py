import io
import logging
import sys

import pytest

from trainer import progress as shown
from trainer.checkpoints import Progress
from trainer.progress import Bar, Pace, describe_epoch, duration, table

LINE = {
    "epoch": 3,
    "loss": 0.12345,
    "accuracy": 0.98765,
    "val_loss": None,
    "val_accuracy": None,
    "seconds": 1.25,
    "examples_per_second": 48000.4,
}


def test_an_epoch_as_a_person_reads_it():
    assert (
        describe_epoch(LINE, 10)
        == "epoch 3/10: loss 0.1235, accuracy 0.9877 (1.2 s, 48,000 examples/s)"
    )
    assert (
        describe_epoch(LINE | {"val_loss": 0.2, "val_accuracy": 0.95}, 10)
        == "epoch 3/10: loss 0.1235, accuracy 0.9877,"
        " validation loss 0.2000, accuracy 0.9500 (1.2 s, 48,000 examples/s)"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (9.4, "0:09"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")],
)
def test_a_duration(seconds, text):
    assert duration(seconds) == text


def test_the_pace_leaves_out_the_call_that_compiles():
    now = [0.0]
    pace = Pace(lambda: now[0])
    now[0] = 5  # compiling
    assert pace.seconds_for(10) is None
    pace.add(100)
    assert pace.seconds_for(10) is None
    now[0] = 7
    pace.add(100)
    assert pace.seconds_for(50) == 1
    now[0] = 9  # validation counts in
    assert pace.seconds_for(50) == 2


def half_way():
    """The second of three epochs of 20 steps, 10 taken, of 8 examples each."""
    return Progress(epoch=1, step_in_epoch=10, loss_sum=20.0, correct=60, seconds=4.0)


def test_a_log_gets_a_line_now_and_then(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    now = [0.0]
    bar = Bar(3, 20, shown=True, clock=lambda: now[0])
    bar.update(half_way(), 80, 10)
    now[0] = shown.LOG_SECONDS / 2
    bar.update(half_way(), 80, 10)
    assert caplog.messages == []
    now[0] = shown.LOG_SECONDS
    bar.update(half_way(), 80, 10)
    # 20 steps in 30 seconds since the first call; 30 steps are left.
    assert caplog.messages == [
        "epoch 2/3, step 10/20: loss 0.2500, accuracy 0.7500, 20 examples/s, 0:45 left"
    ]
    now[0] += shown.LOG_SECONDS - 1
    bar.update(half_way(), 80, 10)
    bar.close()  # another line is written here
    now[0] += shown.LOG_SECONDS - 1
    bar.update(half_way(), 80, 10)
    assert len(caplog.messages) == 1
    assert sys.stderr.getvalue() == ""


def test_a_worker_that_is_not_the_chief_shows_nothing(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    now = [0.0]
    bar = Bar(3, 20, shown=False, clock=lambda: now[0])
    now[0] = 1000
    bar.update(half_way(), 80, 10)
    bar.close()
    assert caplog.messages == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "stderr", Terminal())
    now = [0.0]
    bar = Bar(3, 20, shown=True, clock=lambda: now[0])
    bar.update(half_way(), 80, 10)
    now[0] = 3
    bar.update(half_way(), 80, 10)
    text = sys.stderr.getvalue().replace("█", "#")
    said = "epoch 2/3: loss 0.2500, accuracy 0.7500, 20 examples/s"
    assert f"\r 50%|##########          | {said}" in text
    assert f"{said}, 0:09 left" in text
    bar.close()
    assert sys.stderr.getvalue().endswith("\r")  # nothing of it stays
    assert caplog.messages == []


def lines(count):
    return [
        LINE | {"epoch": epoch, "val_loss": epoch / 10, "val_accuracy": 0.5}
        for epoch in range(1, count + 1)
    ]


def test_the_final_table():
    assert table(lines(2), 1) == [
        "   epoch      loss  accuracy  val_loss  val_accuracy   seconds",
        " *     1    0.1235    0.9877    0.1000        0.5000      1.25",
        "       2    0.1235    0.9877    0.2000        0.5000      1.25",
        "  * exported; 2.5 s of training in all",
    ]
    assert table([LINE | {"epoch": 1}], 1)[1] == (
        " *     1    0.1235    0.9877         -             -      1.25"
    )


@pytest.mark.parametrize("count", [1, 9, 10, 11, 200])
@pytest.mark.parametrize("exported", [1, 0.5, 1.0])
def test_a_long_table_is_cut_to_what_is_worth_seeing(count, exported):
    exported = max(1, round(exported * count))
    rows = table(lines(count), exported)[1:-1]
    assert len(rows) <= shown.TABLE_ROWS + 1
    epochs = [int(row[2:8]) for row in rows]
    assert epochs == sorted(set(epochs))
    assert {1, count, exported} <= set(epochs)
    assert [epoch for epoch, row in zip(epochs, rows, strict=True) if row[1] == "*"] == [exported]
