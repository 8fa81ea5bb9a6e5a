"""Which run it is: what may change between two starts of one, and what makes it another."""

from __future__ import annotations

from typing import Any

from pipeline.command import InputError
from pipeline.storage import Place

# These are known in full only once TensorFlow has seen the machine.
RESOLVED_LATER = ("replicas", "devices", "input")
UNRESOLVED = (None, "auto")


def require_same(path: Place, earlier: Any, asked: dict[str, Any]) -> None:
    """Makes sure that a file was written by the run that is asked for.

    Args:
        path: its config, a checkpoint or the description of its model.
        earlier: the content of ``config.json`` as the file has it.
        asked: the same of the run that is asked for.

    Raises:
        InputError: it was not; the message names the first difference.
    """
    try:
        name = difference(earlier, asked)
    except (TypeError, AttributeError, IndexError):
        raise unknown(path) from None
    if name is not None:
        raise InputError(
            f"{path.parent}: holds a run with {name} {earlier.get(name)}, not {asked.get(name)};"
            " expected a new folder, or the flags it was started with"
        )


def unknown(path: Place) -> InputError:
    """What to say of a file that another program, or another version of this one, has written."""
    return InputError(
        f"{path}: not as this version of the program writes it; expected a new folder"
    )


def difference(earlier: dict[str, Any], asked: dict[str, Any]) -> str | None:
    """The first setting that would make another run of one that was begun, or None.

    A run may be given more epochs, but not where something is counted from the last one, and
    with ``reproducible`` another number of replicas on devices of one kind. What is not resolved
    yet is not compared.
    """
    for name in sorted(earlier | asked):
        before: Any = earlier.get(name)
        now: Any = asked.get(name)
        if before == now or (now in UNRESOLVED and name in RESOLVED_LATER):
            continue
        if name == "epochs" and now > before and not _ends_with_epochs(asked):
            continue
        if asked["reproducible"] and (
            name == "replicas" or (name == "devices" and _kinds(before) == _kinds(now))
        ):
            continue
        return name
    return None


def _ends_with_epochs(content: dict[str, Any]) -> bool:
    return content["schedule"] == "cosine" or content["calm_epochs"] > 0


def _kinds(devices: list[str]) -> set[str]:
    return {device.split(":")[0] for device in devices}
