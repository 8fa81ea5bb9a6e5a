"""What the files of a registry say: its versions, and the pointer to one of them."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pipeline import checksums, ledger, storage
from pipeline.checksums import FileSum
from pipeline.command import InputError
from pipeline.gcs import GcsPath
from pipeline.storage import Place

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
MODELS = "models"
CHAMPION_FILE = "champion.json"
VERSION_FILE = "version.json"
NOBODY = "null\n"  # in a pointer that names no version yet; see `promotion.fence`
REPAIR = "pipeline.registry rollback --version V puts a version in its place"
NUMBER = re.compile("0|[1-9][0-9]*")
UNREADABLE = (OSError, ValueError, TypeError, KeyError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Version:
    """One promoted model; the content of ``champion.json`` and of ``version.json``.

    `registry.publish` sets number, path and time, and holds the files to those it is given.

    Attributes:
        version: its number.
        path: its folder, relative to the root.
        model_id: of the model.
        weights_sha256: of the model.
        dataset_id: what it was trained on.
        run_id: which run made it.
        accuracy: on the test split when it was promoted.
        class_names: by label.
        sources: what the dataset was read from, as `pipeline.sources.open_sources` takes it.
        rolled_back_from: the version it is a copy of, if any.
        promoted_at: when, in ISO 8601, UTC.
        first_promoted_at: the same of the version that it is a copy of, else its own. Empty in
            files of earlier releases.
        files: of its folder, by name; all but ``version.json``.
    """

    version: int = 0
    path: str = ""
    model_id: str
    weights_sha256: str
    dataset_id: str
    run_id: str
    accuracy: float
    class_names: list[str]
    sources: list[str]
    rolled_back_from: int | None = None
    promoted_at: str = ""
    first_promoted_at: str = ""
    files: dict[str, FileSum] = dataclasses.field(default_factory=dict)


class Pointer(NamedTuple):
    """What ``champion.json`` says, and of which generation the object is: 0 if there is none.

    Of one that cannot be read, `problem` says why, and the version is None; of any other,
    `text` is what it says.
    """

    version: Version | None
    generation: int
    problem: str = ""
    text: str = ""


def version_json(version: Version) -> str:
    """The text of ``version.json`` and of ``champion.json``."""
    return json.dumps(dataclasses.asdict(version), indent=2) + "\n"


def parse_version(text: str) -> Version:
    """Reads `version_json` back, of another release as well: fields it does not know are left out.

    Raises:
        ValueError, TypeError, KeyError: it is nothing of the kind.
    """
    raw = json.loads(text)
    version = _known(Version, raw | {"files": checksums.parse(raw["files"])})
    if type(version.version) is not int or version.path != path_of(version.version):
        raise ValueError(f"version {version.version!r} at path {version.path!r}")
    return version


def _known(kind: type[T], raw: dict[str, Any]) -> T:
    """Makes a dataclass of those of its fields that there are."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in dict(raw).items() if name in names})


def path_of(number: int) -> str:
    """Where a version is, relative to the root."""
    return f"{MODELS}/{number}"


def folders(root: Place) -> list[int]:
    """The numbers of all folders of versions, in order; one may be a rest, without its file."""
    found = (path.name for path in (root / MODELS).glob("*"))
    return sorted(int(name) for name in found if NUMBER.fullmatch(name))


def numbers(root: Place) -> list[int]:
    """The numbers of all versions, in order."""
    found = (name.split("/") for name in storage.walk(root / MODELS))
    whole = (parts[0] for parts in found if parts[1:] == [VERSION_FILE])
    return sorted(int(name) for name in whole if NUMBER.fullmatch(name))


def load(root: Place, number: int) -> Version:
    """Reads what a version says of itself.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    path = root / path_of(number) / VERSION_FILE
    try:
        version = _read(path)
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    if version.version != number:
        raise InputError(f"{path}: says that it is version {version.version}")
    return version


def versions(root: Place) -> list[Version]:
    """All versions, oldest first; one that is removed meanwhile is none."""
    found = []
    for number in numbers(root):
        try:
            found.append(load(root, number))
        except InputError:
            if (root / path_of(number) / VERSION_FILE).is_file():
                raise
    return found


def pointer(root: Place) -> Pointer:
    """Reads ``champion.json``, without a look at what it points to.

    Raises:
        InputError: it cannot be read; says how to put another in its place.
    """
    found = find_pointer(root)
    if found.problem:
        raise InputError(f"{found.problem}; {REPAIR}")
    return found


def find_pointer(root: Place) -> Pointer:
    """The same of one that may be damaged."""
    path = root / MODELS / CHAMPION_FILE
    generation = 0
    # The generation comes first: should the object change before it is read, then nobody who
    # goes by what was read can replace it.
    if isinstance(path, GcsPath) and (stat := path.find()):
        generation = stat.generation
    try:
        text = path.read_text()
        version = None if text == NOBODY else parse_version(text)
    except FileNotFoundError:
        return Pointer(None, generation)
    except UNREADABLE as error:
        return Pointer(None, generation, _problem(path, error))
    return Pointer(version, generation, text=text)


def unpromoted(root: Place) -> list[int]:
    """The versions, or rests of them, that the pointer never came to name: those above it.

    Without a pointer that can be read, nothing tells them from others, but for the very first:
    where it stands alone and the ledger of the root names no version, none was promoted yet.
    """
    (current, _, problem, _), found = find_pointer(root), folders(root)
    if current is not None:
        return [number for number in found if number > current.version]
    if problem or found != [1]:
        return []
    return found if all(line.get("version") is None for line in ledger.read(root)) else []


def _read(path: Place) -> Version:
    try:
        return parse_version(path.read_text())
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise InputError(_problem(path, error)) from None


def _problem(path: Place, error: Exception) -> str:
    return f"{path}: cannot be read as a version: {error}"
