"""What a person sees of a run: a bar on a terminal, plain lines in a log, a table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from pipeline.command import aligned, log
from trainer.checkpoints import Progress

LOG_SECONDS = 30.0  # between two lines of a log within an epoch
TABLE_ROWS = 10


class Pace:
    """How fast steps are taken, the first call aside, which compiles.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: float | None = None
        self._steps = 0

    def add(self, steps: int) -> None:
        """Counts steps that were just taken."""
        if self._since is None:
            self._since = self._clock()
        else:
            self._steps += steps

    def seconds_for(self, steps: int) -> float | None:
        """How long so many more will take, pauses for validation and saving counted in."""
        if not self._steps or self._since is None:
            return None
        return (self._clock() - self._since) / self._steps * steps


class Bar:
    """Progress within an epoch: a bar on a terminal, else a line now and then.

    Args:
        epochs: of the run.
        steps_per_epoch: of each of them.
        shown: whether to show anything.
        clock: gives seconds.
    """

    def __init__(
        self,
        epochs: int,
        steps_per_epoch: int,
        *,
        shown: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._epochs = epochs
        self._steps_per_epoch = steps_per_epoch
        self._shown = shown
        self._on_terminal = sys.stderr.isatty()
        self._clock = clock
        self._pace = Pace(clock)
        self._said_at = clock()
        self._bar: tqdm | None = None

    def update(self, progress: Progress, examples: int, taken: int) -> None:
        """Shows where a run stands.

        Args:
            progress: of the run.
            examples: seen in this epoch.
            taken: steps since the last update.
        """
        self._pace.add(taken)
        if not self._shown:
            return
        text = self._describe(progress, examples)
        if self._on_terminal:
            self._draw(progress, text)
        elif (
            self._clock() - self._said_at >= LOG_SECONDS
            and progress.step_in_epoch < self._steps_per_epoch
        ):
            self._said_at = self._clock()
            steps = f"step {progress.step_in_epoch}/{self._steps_per_epoch}"
            log.info("epoch %d/%d, %s: %s", progress.epoch + 1, self._epochs, steps, text)

    def _describe(self, progress: Progress, examples: int) -> str:
        rate = examples / max(progress.seconds, 1e-9)
        text = (
            f"loss {progress.loss_sum / examples:.4f}, accuracy {progress.correct / examples:.4f},"
            f" {rate:,.0f} examples/s"
        )
        left = (self._epochs - progress.epoch) * self._steps_per_epoch - progress.step_in_epoch
        seconds = self._pace.seconds_for(left)
        return text if seconds is None else f"{text}, {duration(seconds)} left"

    def _draw(self, progress: Progress, text: str) -> None:
        epoch = f"epoch {progress.epoch + 1}/{self._epochs}"
        if self._bar is None:
            self._bar = tqdm(
                total=self._steps_per_epoch,
                desc=epoch,
                bar_format="{percentage:3.0f}%|{bar:20}| {desc}",
                leave=False,
            )
        self._bar.n = progress.step_in_epoch
        self._bar.set_description_str(f"{epoch}: {text}")

    def close(self) -> None:
        """Removes the bar, if there is one, so that another line can be written."""
        self._said_at = self._clock()
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def duration(seconds: float) -> str:
    """``0:09``, ``12:34``, ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe_epoch(line: dict[str, Any], epochs: int) -> str:
    """One line of ``metrics.jsonl`` as a person reads it."""
    text = (
        f"epoch {line['epoch']}/{epochs}: loss {line['loss']:.4f}, accuracy {line['accuracy']:.4f}"
    )
    if line["val_accuracy"] is not None:
        text += f", validation loss {line['val_loss']:.4f}, accuracy {line['val_accuracy']:.4f}"
    return f"{text} ({line['seconds']:.1f} s, {line['examples_per_second']:,.0f} examples/s)"


def table(lines: list[dict[str, Any]], exported: int) -> list[str]:
    """The final table: a few epochs, spread over the run, the one that is exported marked.

    Args:
        lines: of ``metrics.jsonl``.
        exported: the epoch whose weights are exported.
    """
    spread = {round(i * (len(lines) - 1) / (TABLE_ROWS - 1)) for i in range(TABLE_ROWS)}
    rows: list[tuple[str, ...]] = [
        ("epoch", "loss", "accuracy", "val_loss", "val_accuracy", "seconds")
    ]
    for i, line in enumerate(lines):
        if i not in spread and line["epoch"] != exported:
            continue
        mark = "*" if line["epoch"] == exported else ""
        measured = ["-" if line[name] is None else f"{line[name]:.4f}" for name in rows[0][1:5]]
        rows.append((f"{mark}{line['epoch']:6d}", *measured, f"{line['seconds']:.2f}"))
    told = f"  * exported; {sum(line['seconds'] for line in lines):.1f} s of training in all"
    return [*aligned(rows, left=(), least=8), told]
