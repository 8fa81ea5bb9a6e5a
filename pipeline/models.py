"""What an exported model says of itself, read without TensorFlow: fast, and before any work."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.command import InputError
from pipeline.records import read_varint
from pipeline.storage import Place

MODEL_FILE = "model.json"
GRAPH_FILE = "saved_model.pb"
WEIGHTS_FILE = "variables/variables.index"
CURVES_FILE = "metrics.jsonl"
SIGNATURE = "serving_default"
OUTPUT = "probabilities"


def load_description(model_dir: Place) -> dict[str, Any]:
    """Reads ``model.json`` of an exported model.

    Raises:
        InputError: the folder holds no exported model.
    """
    path = model_dir / MODEL_FILE
    try:
        description = json.loads(path.read_text())
        description["model_id"]
    except OSError:
        raise InputError(f"{model_dir}: no {MODEL_FILE}; expected the export of a run") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not the description of a model") from None
    for name in (GRAPH_FILE, WEIGHTS_FILE):
        if not (model_dir / name).is_file():
            raise InputError(f"{model_dir}: no {name}; expected the export of a run")
    return description


def load_curves(model_dir: Place) -> list[dict[str, Any]]:
    """Reads the training's ``metrics.jsonl``; a model from elsewhere may have none.

    Raises:
        InputError: it is not what the trainer writes.
    """
    path = model_dir / CURVES_FILE
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return []
    except ValueError:
        raise InputError(f"{path}: not a file of one JSON object a line") from None


def require_scorable(model_dir: Place, class_names: Sequence[str]) -> None:
    """Makes sure that a model is one that answers with the classes of a dataset.

    Args:
        model_dir: of the model; one from elsewhere may not name its classes.
        class_names: the dataset's, by label.

    Raises:
        InputError: it is none, or answers with another number of classes, or names others.
    """
    description = load_description(model_dir)
    found = classes_answered(model_dir)
    if found is not None and found != len(class_names):
        raise other_classes(model_dir, found, len(class_names))
    trained_on = description.get("dataset")
    named = trained_on.get("class_names") if isinstance(trained_on, dict) else None
    if not isinstance(named, list):
        return
    if len(named) != len(class_names):
        raise other_classes(model_dir, len(named), len(class_names))
    for label, (name, expected) in enumerate(zip(named, class_names, strict=True)):
        if name != expected:
            raise InputError(
                f"{model_dir}: label {label} is {name!r}, in the dataset it is {expected!r}"
            )


def other_classes(model_dir: Place | str, found: int, expected: int) -> InputError:
    """What is said of a model of another number of classes."""
    return InputError(f"{model_dir}: answers with {found} classes, the dataset has {expected}")


def classes_answered(model_dir: Place) -> int | None:
    """How many classes a SavedModel answers with; None where its signature leaves that open.

    The numbers of the fields are those of TensorFlow's ``saved_model.proto``,
    ``meta_graph.proto`` and ``tensor_shape.proto``.

    Raises:
        InputError: the file is no SavedModel, or has no such signature.
    """
    path = model_dir / GRAPH_FILE
    try:
        (graph,) = _messages(path.read_bytes(), 2)
        signature = _entries(_messages(graph, 5))[SIGNATURE]
        (shape,) = _messages(_entries(_messages(signature, 2))[OUTPUT], 3)
        dimensions = _messages(shape, 2)
        sizes = [dict(_fields(dimension)).get(1, 0) for dimension in dimensions]
    except (OSError, ValueError, KeyError, IndexError, UnicodeDecodeError):
        raise InputError(
            f"{path}: expected a SavedModel whose {SIGNATURE} gives {OUTPUT}"
        ) from None
    # An open size is -1: as an unsigned number, the largest of 64 bits.
    return sizes[1] if len(sizes) == 2 and 0 < sizes[1] < 1 << 32 else None


def _entries(messages: list[bytes]) -> dict[str, bytes]:
    """The entries of a map from strings to messages."""
    pairs = [dict(_fields(entry)) for entry in messages]
    return {pair[1].decode(): pair.get(2, b"") for pair in pairs}


def _messages(data: bytes, number: int) -> list[bytes]:
    """The messages that stand in a field."""
    found = [value for field, value in _fields(data) if field == number]
    if not all(isinstance(value, bytes) for value in found):
        raise ValueError("not a message")
    return found


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yields (number, value) of the fields of a protocol-buffer message: integers, or bytes.

    Source: https://protobuf.dev/programming-guides/encoding/.
    """
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = read_varint(data, at)
            yield tag >> 3, value
            continue
        size, at = read_varint(data, at) if kind == 2 else ({1: 8, 5: 4}.get(kind, -1), at)
        if size < 0 or at + size > len(data):
            raise ValueError("not a protocol buffer")
        yield tag >> 3, data[at : at + size]
        at += size
