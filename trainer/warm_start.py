"""A warm start: the weights of an exported model become the first weights of another run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import cache
from pipeline.command import InputError
from pipeline.storage import Place
from trainer.run_folder import MODEL_FILE

if TYPE_CHECKING:
    import numpy as np

    from pipeline.dataset import Manifest

FLAG = "--initial_weights"


def checksum(directory: Place, hidden_units: Sequence[int]) -> str:
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


def check_classes(directory: Place, manifest: Manifest) -> None:
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


def load(directory: Place, sha256: str) -> list[np.ndarray]:
    """Reads the weights of an exported model: w, b, w, b, ..., float32.

    Raises:
        InputError: they are not there, or are not those that the model's description names.
    """
    import tensorflow as tf

    from trainer.export import weights_sha256

    with cache.local(directory / "variables") as folder:
        try:
            weights = _read(folder / "variables")
        # IndexError is what a file of weights that was cut short comes to.
        except (tf.errors.OpError, ValueError, RuntimeError, IndexError) as error:
            said = str(error).replace(str(folder), str(directory / "variables"))
            raise InputError(f"{FLAG} {directory}: its weights cannot be read: {said}") from None
    if weights_sha256(weights) != sha256:
        raise InputError(
            f"{FLAG} {directory}: its weights are not those that its {MODEL_FILE} names; expected"
            " a model as trainer.task exported it"
        )
    return weights


def learned_from(directory: Place) -> list[dict[str, Any]]:
    """The datasets, and their splits, that an exported model was trained on, and those before it.

    Of a model that does not say so one dataset without a name stands for them.
    """
    found = _description(directory).get("learned_from")
    return found if isinstance(found, list) and found else [{"dataset_id": None, "splits": []}]


def _read(prefix: Path) -> list[np.ndarray]:
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(prefix))
    names = [name for name in reader.get_variable_to_shape_map() if name.startswith("weights/")]
    names.sort(key=lambda name: int(name.split("/")[1]))
    return [reader.get_tensor(name) for name in names]


def _description(directory: Place) -> dict[str, Any]:
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
