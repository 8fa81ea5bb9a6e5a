"""What a run is to do: its request, whether there is anything new, and all that in words."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import ledger, options, registry, storage
from pipeline.command import InputError
from pipeline.dataset import MANIFEST_NAME, load_manifest
from pipeline.models import MODEL_FILE
from pipeline.options import PreprocessConfig
from pipeline.rules import Rules

REQUEST_FILE = "request.json"
DECISION_FILE = "decision.json"
REPORT = "report/report.json"  # in a run folder
RUNS = "runs"
DATASETS = "datasets"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """All that decides a run; the content of ``request.json``, the first file of its folder.

    Attributes:
        run_id: names it.
        window: when it was scheduled for.
        time: when it was begun, UTC.
        attempt: how often it had come to an end before.
        sources: what to read, as `pipeline.sources.open_sources` takes it.
        dataset_options: the flags of `options.FLAGS` and their values.
        fingerprint: what sources and options came to.
        trainer_arguments: of the trainer's own flags.
        config_id: what they came to; see `make_config_id`.
        initial_weights: the model to start from, relative to the root; None: from new weights.
        beam_arguments: how the Beam stages are run.
        rules: of the gate that judges it.
        force_reason: why it is promoted whatever they say, if it is.
        repeat: whether it is run although the same has been judged before.
        champion: the model_id of the champion as it was begun; None: there was none. Fields from
            here on have defaults: requests of earlier versions lack them.
    """

    run_id: str
    window: str
    time: str
    attempt: int
    sources: tuple[str, ...]
    dataset_options: dict[str, Any]
    fingerprint: str
    trainer_arguments: tuple[str, ...]
    config_id: str
    initial_weights: str | None
    beam_arguments: tuple[str, ...]
    rules: Rules
    force_reason: str | None
    repeat: bool
    champion: str | None = None

    def preprocess(self, dataset_dir: Path) -> PreprocessConfig:
        """The config of the dataset's stage."""
        return PreprocessConfig(
            sources=self.sources, output_dir=dataset_dir, **self.dataset_options
        )


def run_folder(root: Path, run_id: str) -> Path:
    """Where a run is kept."""
    return root / RUNS / run_id


def dataset_folder(root: Path, fingerprint: str) -> Path:
    """Where a dataset is kept."""
    return root / DATASETS / fingerprint


def make_config_id(trainer_config: Mapping[str, Any], *, warm_start: bool) -> str:
    """Names how a model is trained: 32 hex digits.

    Of a warm start it counts that there is one; which model it starts from follows from what
    came before.
    """
    config = dict(trainer_config)
    if warm_start:
        del config["initial_weights"]
    return _hash([config, warm_start])


def make_run_id(window: str, preset: str, fingerprint: str, config_id: str) -> str:
    """Names a run by when it was scheduled and by what decides its result."""
    return f"{window}-{preset}-{_hash([fingerprint, config_id])[:12]}"


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def write_request(root: Path, request: Request) -> None:
    """Begins a run."""
    folder = run_folder(root, request.run_id)
    folder.parent.mkdir(exist_ok=True)
    text = json.dumps(dataclasses.asdict(request), indent=2) + "\n"
    storage.write_atomic(folder / REQUEST_FILE, text)


def was_begun(root: Path, run_id: str) -> bool:
    """Whether a run has a folder with its request."""
    return (run_folder(root, run_id) / REQUEST_FILE).is_file()


def read_request(folder: Path) -> Request:
    """Reads `write_request` back.

    Raises:
        InputError: it is not a request.
    """
    path = folder / REQUEST_FILE
    try:
        raw = json.loads(path.read_text())
        lists = ("sources", "trainer_arguments", "beam_arguments")
        made: dict[str, Any] = {name: tuple(raw[name]) for name in lists}
        made["rules"] = Rules(**_known(Rules, raw["rules"]))
        return Request(**_known(Request, raw) | made)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path}: not the request of a run ({error}); expected one, or no folder {folder}"
        ) from None


def rules_of(root: Path, run_id: str) -> Rules | None:
    """The rules that a run was judged by, where its folder still says so."""
    with contextlib.suppress(InputError):
        return read_request(run_folder(root, run_id)).rules
    return None


def _known(kind: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the fields of a dataclass; another version may have written more."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in raw.items() if name in names}


def unfinished(root: Path, lines: Sequence[Mapping[str, Any]]) -> list[Request]:
    """The runs that were begun and have not come to an end, the oldest first.

    Raises:
        InputError: the request of one cannot be read. Of what came to an end nothing is asked.
    """
    folders = [path.parent for path in (root / RUNS).glob(f"*/{REQUEST_FILE}")]
    begun = [folder for folder in folders if folder.name[0] != "."]  # see `storage.discard`
    requests = [read_request(folder) for folder in begun if not _has_ended(folder, lines)]
    return sorted(requests, key=lambda request: (request.time, request.run_id))


def _has_ended(folder: Path, lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a run came to an end since it was begun, or begun anew."""
    closed = ledger.times_closed(lines, folder.name)
    if closed == 0:
        return False
    try:
        return closed > int(json.loads((folder / REQUEST_FILE).read_text())["attempt"])
    except (OSError, ValueError, TypeError, KeyError):
        return True


# Whether there is anything new


def known_dataset_id(root: Path, fingerprint: str) -> str | None:
    """The id of the dataset that was made from a fingerprint, if it was."""
    folder = dataset_folder(root, fingerprint)
    return load_manifest(folder).dataset_id if (folder / MANIFEST_NAME).is_file() else None


def stands(root: Path, line: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> bool:
    """Tells whether what came of a judged run is still there.

    A model that was promoted, or a later one, is the champion; one that was kept out has the
    champion before it. Its folder is whole, or was pruned as a whole.
    """
    champion = registry.champion(root)
    promoted = [each["version"] for each in lines if each.get("outcome") == "promoted"]
    if promoted and champion is None:
        return False
    if line["outcome"] == "promoted" and champion and champion.version < line["version"]:
        return False
    folder = run_folder(root, line["run_id"])
    return not folder.exists() or all((folder / name).is_file() for name in (DECISION_FILE, REPORT))


def days_since(text: str, now: datetime.datetime) -> float:
    """How many days ago a time was, which is in ISO 8601."""
    return (now - datetime.datetime.fromisoformat(text)).total_seconds() / 86_400


# In words


def describe(
    root: Path, request: Request, settled: str | None, lines: Sequence[Mapping[str, Any]]
) -> str:
    """What the command would read, make, skip and compare."""
    others = [each for each in unfinished(root, lines) if each.run_id != request.run_id]
    rows = [("first", f"finish run {other.run_id}, of {other.time}") for other in others]
    for other in others:
        if (other.fingerprint, other.config_id) == (request.fingerprint, request.config_id):
            left = _left_of(request, other)
            settled = f"it is this very training, and once it is finished {left}"
    if settled is not None:
        rows.append(("skip", f"all of it; {settled}"))
        return _table(rows)
    folder, dataset_dir = (
        run_folder(root, request.run_id),
        dataset_folder(root, request.fingerprint),
    )
    source = " and ".join(request.sources)
    if (dataset_dir / MANIFEST_NAME).is_file():
        rows.append(("skip", f"preprocess: {dataset_dir} stands, of {source}"))
    else:
        flags = " ".join(options.dataset_arguments(request.preprocess(dataset_dir)))
        rows.append(("read", source))
        rows.append(("make", f"the dataset {dataset_dir} ({flags})"))
    if (folder / "export" / MODEL_FILE).is_file():
        rows.append(("skip", f"training: {folder / 'export'} stands"))
    else:
        begin = "go on with" if (folder / "checkpoints").is_dir() else "train"
        start = f" from {request.initial_weights}" if request.initial_weights else ""
        flags = " ".join(request.trainer_arguments) or "as the preset has it"
        rows.append(("make", f"{begin} run {request.run_id}{start} ({flags})"))
    champion = registry.champion(root)
    rows.append(
        (
            "compare",
            f"with the champion, version {champion.version} of run {champion.run_id}"
            if champion
            else "with the floors alone: there is no champion",
        )
    )
    rules = dataclasses.asdict(request.rules)
    asked = ", ".join(f"{name} {value}" for name, value in rules.items())
    rows.append(("gate", asked if request.force_reason is None else f"forced, whatever: {asked}"))
    return _table(rows)


def _left_of(request: Request, other: Request) -> str:
    """What is left to be done of a request when another run of the same training has ended."""
    if request.force_reason is not None:
        return "it is promoted by force, if the gate keeps it out"
    if request.rules != other.rules:
        return "the rules of this command are asked, if its own keep it out"
    return "nothing is new"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"{what:<8} {text}" for what, text in rows)
