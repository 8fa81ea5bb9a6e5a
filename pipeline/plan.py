"""What a run is to do: its request, whether there is anything new, and all that in words."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import command, gcs, ledger, options, storage
from pipeline.command import InputError, UnreachableError, log
from pipeline.dataset import MANIFEST_NAME, Manifest, load_manifest
from pipeline.models import MODEL_FILE
from pipeline.options import PreprocessConfig
from pipeline.rules import Rules
from pipeline.storage import Place

if TYPE_CHECKING:
    from pipeline.state import Files, State

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
        vertex_arguments: how it is trained on Vertex AI; none: in a process here.
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
    vertex_arguments: tuple[str, ...] = ()

    def preprocess(self, dataset_dir: Place) -> PreprocessConfig:
        """The config of the dataset's stage."""
        return PreprocessConfig(
            sources=self.sources, output_dir=dataset_dir, **self.dataset_options
        )


def run_folder(root: Place, run_id: str) -> Place:
    """Where a run is kept."""
    return root / RUNS / run_id


def dataset_folder(root: Place, fingerprint: str) -> Place:
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


def write_request(root: Place, request: Request) -> None:
    """Begins a run."""
    folder = run_folder(root, request.run_id)
    if isinstance(folder, Path):
        folder.parent.mkdir(exist_ok=True)
    text = json.dumps(dataclasses.asdict(request), indent=2) + "\n"
    storage.write_atomic(folder / REQUEST_FILE, text)


def checksum_of_request(root: Place, run_id: str) -> str | None:
    """The CRC32C of a request, as a bucket's listings have it; None if there is none."""
    try:
        return gcs.crc32c((run_folder(root, run_id) / REQUEST_FILE).read_bytes())
    except FileNotFoundError:
        return None


def read_request(folder: Place) -> Request:
    """Reads `write_request` back.

    Raises:
        InputError: it is not a request.
    """
    path = folder / REQUEST_FILE
    try:
        raw = json.loads(path.read_text())
        lists = ("sources", "trainer_arguments", "beam_arguments")
        made: dict[str, Any] = {name: tuple(raw[name]) for name in lists}
        made["vertex_arguments"] = tuple(raw.get("vertex_arguments", ()))
        made["rules"] = Rules(**_known(Rules, raw["rules"]))
        return Request(**_known(Request, raw) | made)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path}: not the request of a run ({error}); expected one, or no folder {folder}"
        ) from None


def read_json(path: Place) -> dict[str, Any] | None:
    """A JSON object that the chain has written, if it has; a torn one counts as none."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("%s: cannot be read, and counts as missing: %s", path, error)
        return None
    if not isinstance(content, dict):
        log.warning("%s: is no JSON object, and counts as missing", path)
        return None
    return content


def _known(kind: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the fields of a dataclass; another version may have written more."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in raw.items() if name in names}


def unfinished(state: State) -> list[Request]:
    """The runs that were begun and have not come to an end, the oldest first.

    Raises:
        InputError: the request of one cannot be read. Of what came to an end nothing is asked.
    """
    requests = [
        read_request(run_folder(state.root, run_id))
        for run_id, files in state.runs.items()
        if REQUEST_FILE in files
        and run_id[0] != "."  # see `storage.discard`
        and not has_ended(run_folder(state.root, run_id), state.lines, files)
    ]
    return sorted(requests, key=lambda request: (request.time, request.run_id))


def has_ended(folder: Place, lines: Sequence[Mapping[str, Any]], files: Files) -> bool:
    """Whether a run came to an end since it was begun, or begun anew.

    Args:
        folder: of the run.
        lines: of the ledger.
        files: in its folder; where that says that the request is the one that its last line is
            the end of, it is not read.
    """
    ends = [line for line in lines if line["run_id"] == folder.name and ledger.is_end(line)]
    if not ends:
        return False
    checksum = files.get(REQUEST_FILE)
    if checksum and checksum == ends[-1].get("request"):
        return True
    try:
        return len(ends) > int(json.loads((folder / REQUEST_FILE).read_text())["attempt"])
    except (OSError, ValueError, TypeError, KeyError):
        return True


# Whether there is anything new


def known_manifest(root: Place, fingerprint: str) -> Manifest | None:
    """The manifest of the dataset that was made from a fingerprint, if it was and can be read."""
    folder = dataset_folder(root, fingerprint)
    if not (folder / MANIFEST_NAME).is_file():
        return None
    try:
        return load_manifest(folder)
    except UnreachableError:  # which says nothing of the file
        raise
    except InputError:
        return None


def known_dataset_id(root: Place, fingerprint: str) -> str | None:
    """The id of that dataset."""
    manifest = known_manifest(root, fingerprint)
    return None if manifest is None else manifest.dataset_id


def stands(state: State, line: Mapping[str, Any]) -> bool:
    """Tells whether what came of a judged run is still there.

    A model that was promoted, or a later one, is the champion; one that was kept out has the
    champion before it. Its folder is whole, or was pruned as a whole.
    """
    champion = state.champion
    promoted = [each["version"] for each in state.lines if each.get("outcome") == "promoted"]
    if promoted and champion is None:
        return False
    if line["outcome"] == "promoted" and champion and champion.version < line["version"]:
        return False
    run_id = line["run_id"]
    whole = all(state.has(run_id, name) for name in (DECISION_FILE, REPORT))
    return whole or run_id not in state.runs


def answers(root: Place, line: Mapping[str, Any], request: Request) -> bool:
    """Whether what was judged before is the answer to a request as well.

    Where it was no, it may be another one by other rules, or by force.
    """
    if line["outcome"] == "promoted":
        return True
    return request.force_reason is None and _rules_of(root, line["run_id"]) in (None, request.rules)


def _rules_of(root: Place, run_id: str) -> Rules | None:
    """The rules that a run was judged by, where its folder still says so."""
    with contextlib.suppress(InputError):
        return read_request(run_folder(root, run_id)).rules
    return None


def days_since(text: str, now: datetime.datetime) -> float:
    """How many days ago a time was, which is in ISO 8601."""
    return (now - datetime.datetime.fromisoformat(text)).total_seconds() / 86_400


# In words


def describe(state: State, request: Request, settled: str | None) -> str:
    """What the command would read, make, skip and compare."""
    others = [each for each in unfinished(state) if each.run_id != request.run_id]
    rows = [("first", f"finish run {other.run_id}, of {other.time}") for other in others]
    for other in others:
        if (other.fingerprint, other.config_id) == (request.fingerprint, request.config_id):
            left = _left_of(request, other)
            settled = f"it is this very training, and once it is finished {left}"
    if settled is not None:
        rows.append(("skip", f"all of it; {settled}"))
        return _table(rows)
    folder, dataset_dir = (
        run_folder(state.root, request.run_id),
        dataset_folder(state.root, request.fingerprint),
    )
    source = " and ".join(request.sources)
    if known_manifest(state.root, request.fingerprint) is not None:
        rows.append(("skip", f"preprocess: {dataset_dir} stands, of {source}"))
    else:
        flags = " ".join(options.dataset_arguments(request.preprocess(dataset_dir)))
        rows.append(("read", source))
        rows.append(("make", f"the dataset {dataset_dir} ({flags})"))
    if state.has(request.run_id, f"export/{MODEL_FILE}"):
        rows.append(("skip", f"training: {folder / 'export'} stands"))
    else:
        files = state.runs.get(request.run_id, ())
        has_checkpoints = any(name.startswith("checkpoints/") for name in files)
        begin = "go on with" if has_checkpoints else "train"
        start = f" from {request.initial_weights}" if request.initial_weights else ""
        flags = " ".join(request.trainer_arguments) or "as the preset has it"
        where = " on Vertex AI" if request.vertex_arguments else ""
        rows.append(("make", f"{begin} run {request.run_id}{where}{start} ({flags})"))
    champion = state.champion
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
    return "\n".join(command.aligned(rows, left=(0, 1), least=8, gap=" "))
