"""What an exported model says of itself, read without TensorFlow: fast, and before any work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import checksums, storage
from pipeline.command import InputError, UnreachableError
from pipeline.storage import Place

MODEL_FILE = "model.json"
GRAPH_FILE = "saved_model.pb"
WEIGHTS_FILE = "variables/variables.index"
CURVES_FILE = "metrics.jsonl"
SUMS_FILE = "checksums.json"
SIGNATURE = "serving_default"
OUTPUT = "probabilities"
UNNAMED = "those that its description does not name"


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


def learned_from(path: Place) -> dict[str, set[str]]:
    """The splits that a model has learned from, by the ids of their datasets.

    Where its ``model.json`` does not say so, `UNNAMED` stands for the datasets.
    """
    found: dict[str, set[str]] = {}
    try:
        for entry in json.loads(path.read_text())["learned_from"]:
            found.setdefault(str(entry["dataset_id"] or UNNAMED), set()).update(entry["splits"])
    except UnreachableError:  # which says nothing of the model
        raise
    except (InputError, OSError, ValueError, KeyError, TypeError):
        found[UNNAMED] = set()
    return found or {UNNAMED: set()}


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


def damage(model_dir: Place) -> str | None:
    """What is wrong with an exported model by what was noted of its files, if anything.

    One of an earlier version comes without that, and counts as whole. In a bucket, which keeps
    checksums of its own, the sizes alone are looked at.
    """
    path = model_dir / SUMS_FILE
    try:
        noted = checksums.parse(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        return f"{path}: not the checksums of files"
    look = checksums.deep_damage if isinstance(model_dir, Path) else checksums.damage
    others = storage.walk(model_dir).keys() - noted.keys()  # whoever put them there
    problems = look(model_dir, noted, besides=others)
    return problems[0] if problems else None


def require_scorable(model_dir: Place, class_names: Sequence[str]) -> None:
    """Makes sure that a folder holds a model, and that it names no other classes than a dataset.

    Args:
        model_dir: of the model; one from elsewhere may name none, and is known by its answers.
        class_names: the dataset's, by label.

    Raises:
        InputError: it holds none, or it names others.
    """
    trained_on = load_description(model_dir).get("dataset")
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
