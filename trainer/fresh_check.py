"""Asks an exported model in a fresh process, and holds its answers against the trainer's."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.dataset import IMAGE_SHAPE
from pipeline.records import encode_record, unscale
from trainer import fresh

TOLERANCE = 1e-5  # of a probability: the same sums, added in another order


class ExportError(Exception):
    """The exported model does not load, or does not answer as the trained one does."""


class FreshProcess:
    """A process that imports TensorFlow and waits for a model."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            # -P: a file of this package must not stand in for a library of the same name.
            [sys.executable, "-P", fresh.__file__],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # a signal to the group is for the trainer to answer
        )

    def ask(self, folder: Path, images: np.ndarray) -> dict[str, np.ndarray]:
        """What the model in `folder` answers to float32 [n, 784].

        Raises:
            ExportError: it cannot be loaded or asked.
        """
        pixels = unscale(images)
        # Not label 0: an array of bytes drops zeros at the end.
        records = [encode_record(row.tobytes(), 1, "check") for row in pixels]
        held = io.BytesIO()
        np.savez(held, images=pixels.reshape(-1, *IMAGE_SHAPE), examples=np.array(records, "S"))
        asked = f"{folder.resolve()}\n".encode() + held.getvalue()
        answer, _ = self._process.communicate(asked)
        if self._process.returncode:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip()
            raise ExportError(f"{folder}: cannot be loaded and asked:\n{said}")
        return dict(np.load(io.BytesIO(answer)))

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


@contextlib.contextmanager
def fresh_process() -> Iterator[FreshProcess]:
    """Starts a process early, so that it imports while the trainer writes the model."""
    process = FreshProcess()
    try:
        yield process
    finally:
        process.close()


def compare(
    answers: dict[str, np.ndarray], weights: list[np.ndarray], probabilities: np.ndarray
) -> None:
    """Holds what a fresh process answered against what the trainer has.

    Args:
        answers: of `FreshProcess.ask`.
        weights: as trained; the loaded ones must be equal bit for bit.
        probabilities: float32 [n, C], the trainer's, within `TOLERANCE`.

    Raises:
        ExportError: they differ.
    """
    for i, weight in enumerate(weights):
        if not np.array_equal(answers[f"weight_{i}"], weight):
            raise ExportError(f"the exported model's weight {i} is not the trained one")
    for signature in fresh.INPUTS:
        found = answers[f"{signature}/probabilities"]
        if found.shape != probabilities.shape:
            raise ExportError(f"{signature} gives {found.shape}, not {probabilities.shape}")
        apart = float(np.abs(found - probabilities).max(initial=0))
        if not apart <= TOLERANCE:
            raise ExportError(f"{signature}'s probabilities are {apart:.3g} from the trainer's")
        if not np.array_equal(answers[f"{signature}/classes"], found.argmax(axis=-1)):
            raise ExportError(f"{signature}'s classes are not the likeliest ones")
    for output in ("classes", "probabilities"):
        by_image, by_record = (answers[f"{name}/{output}"] for name in fresh.INPUTS)
        if not np.array_equal(by_image, by_record):
            raise ExportError(f"images and records do not give the same {output}")
