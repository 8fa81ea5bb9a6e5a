"""A warm start: the weights of an exported model become the first weights of another run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.command import InputError
from trainer.run_folder import MODEL_FILE

if TYPE_CHECKING:
    import numpy as np

    from pipeline.dataset import Manifest

FLAG = "--initial_weights"


def checksum(directory: Path, hidden_units: Sequence[int]) -> str:
    """The ``weights_sha256`` of an exported model whose layers are as wide as these.

    Raises:
        InputError: there is no such model, or its layers have other widths.
    """
    description = _description(directory)
    widths = description["config"]["hidden_units"]
    if widths != list(hidden_units):
        theirs, ours = (",".join(map(str, each)) for each in (widths, hidden_units))
        raise InputError(
            f"{FLAG} {directory}: its hidden layers are {theirs} wide; expected {ours}, as this run"
            " has them"
        )
    return description["weights_sha256"]


def check_classes(directory: Path, manifest: Manifest) -> None:
    """Makes sure that a model answers with the classes of a dataset.

    Raises:
        InputError: it does not.
    """
    names = _description(directory)["dataset"]["class_names"]
    if names != list(manifest.class_names):
        theirs, ours = (" ".join(each) for each in (names, manifest.class_names))
        raise InputError(
            f"{FLAG} {directory}: its classes are {theirs}; expected those of the dataset, {ours}"
        )


def load(directory: Path, sha256: str) -> list[np.ndarray]:
    """Reads the weights of an exported model: w, b, w, b, ..., float32.

    Raises:
        InputError: they are not there, or are not those that the model's description names.
    """
    import tensorflow as tf

    from trainer.export import weights_sha256

    try:
        reader = tf.train.load_checkpoint(str(directory / "variables" / "variables"))
        names = [name for name in reader.get_variable_to_shape_map() if name.startswith("weights/")]
        names.sort(key=lambda name: int(name.split("/")[1]))
        weights = [reader.get_tensor(name) for name in names]
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        raise InputError(f"{FLAG} {directory}: its weights cannot be read: {error}") from None
    if weights_sha256(weights) != sha256:
        raise InputError(
            f"{FLAG} {directory}: its weights are not those that its {MODEL_FILE} names; expected"
            " a model as trainer.task exported it"
        )
    return weights


def _description(directory: Path) -> dict[str, Any]:
    path = directory / MODEL_FILE
    try:
        found = json.loads(path.read_text())
        known = (
            found["weights_sha256"],
            found["config"]["hidden_units"],
            found["dataset"]["class_names"],
        )
        if list(map(type, known)) != [str, list, list]:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{FLAG} {directory}: no {MODEL_FILE} of a model there; expected a folder that"
            " trainer.task exported"
        ) from None
    return found
