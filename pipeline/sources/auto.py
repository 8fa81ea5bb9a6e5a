"""``auto``: the best images of digits that can be had here."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.command import InputError, log
from pipeline.sources import Source, digits, idx, tfds

VARIABLE = "MNIST_IDX_DIR"


def open_source(
    environ: Mapping[str, str], num_classes: int | None = None, *, share: bool = True
) -> Source:
    """Opens MNIST from ``$MNIST_IDX_DIR``, else through TFDS, else scikit-learn's digits.

    Says which, and why, in one line.

    Raises:
        InputError: ``$MNIST_IDX_DIR`` is set but holds no readable IDX files, or it is not set
            and a number of classes was asked for.
    """
    if directory := environ.get(VARIABLE):
        source: Source = idx.open_source(directory, num_classes)
        log.info("source auto: MNIST from $%s, %s", VARIABLE, directory)
        return source
    if num_classes is not None:
        raise InputError(
            f"--num_classes {num_classes}: goes with idx: sources alone; ${VARIABLE} is not set"
        )
    try:
        source = tfds.open_source("mnist", share=share)
    except InputError as error:
        log.warning("source auto: MNIST cannot be had (%s); using %s", error, digits.TITLE)
        return digits.open_source("")
    log.info("source auto: MNIST from TensorFlow Datasets")
    return source
