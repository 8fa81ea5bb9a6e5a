"""The whole job under one root: preprocess, train, evaluate, and promote only what is as good.

python -m pipeline.retrain --root out --source auto

Takes the flags of pipeline.preprocess and of trainer.task as well. Given again, the same
command goes on where it was stopped, and does nothing where nothing is new.

    ROOT/datasets/<fingerprint>/   ROOT/runs/<run_id>/   ROOT/models/   ROOT/runs.jsonl
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import command, options, registry, report, storage
from pipeline.command import InputError, log, show
from pipeline.dataset import MANIFEST_NAME, load_manifest
from pipeline.evaluate import REPORT_FILE
from pipeline.options import PreprocessConfig
from pipeline.sources import SYNTAX, Source

PROG = "pipeline.retrain"
DECISION_FILE = "decision.json"
LEDGER_FILE = "runs.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """The flags of the chain; `trainer_arguments` are what it does not know itself."""

    root: Path
    preprocess: PreprocessConfig
    gate: registry.Gate
    trainer_arguments: tuple[str, ...]


def parse(argv: list[str]) -> RetrainConfig:
    """Parses the command line."""
    parser = command.Parser(PROG, __doc__)
    parser.add_argument("--root", required=True, metavar="DIR", help="where everything is kept")
    parser.add_argument(
        "--source",
        action="append",
        metavar="SRC",
        help=f"{SYNTAX}; several are joined (default: auto)",
    )
    parser.add_argument(
        "--min_accuracy",
        type=command.fraction,
        default=0.8,
        metavar="X",
        help="promote nothing below this test accuracy (default: %(default)s)",
    )
    parser.add_argument(
        "--min_class_accuracy",
        type=command.fraction,
        default=0.5,
        metavar="X",
        help="nor with any class below this (default: %(default)s)",
    )
    options.add_flags(parser.add_argument_group("the dataset"))
    parser.add_argument_group(
        "the training", "every other flag goes to trainer.task; see its --help"
    )
    flags, rest = parser.parse_known_args(argv)
    flags.source = flags.source or ["auto"]
    return RetrainConfig(
        root=storage.folder(flags.root),
        preprocess=options.config_from(flags, output_dir=Path(), beam_arguments=()),
        gate=registry.Gate(
            min_accuracy=flags.min_accuracy, min_class_accuracy=flags.min_class_accuracy
        ),
        trainer_arguments=tuple(rest),
    )


class StageError(Exception):
    """A stage ended with this exit code; it has said why itself."""

    def __init__(self, stage: str, code: int) -> None:
        super().__init__(f"{stage} ended with exit code {code}")
        self.code = code


class Stages:
    """Runs stages one after another, each as its own process, and hands a SIGTERM on to them."""

    def __init__(self, lock: int) -> None:
        self._lock = lock
        self._process: subprocess.Popen | None = None
        self._stopping = False
        signal.signal(signal.SIGTERM, self._stop)

    def run(self, module: str, *arguments: str | Path) -> None:
        """Runs ``python -m module`` to its end.

        Raises:
            StageError: it did not exit with 0, or a SIGTERM came.
        """
        if self._stopping:
            raise StageError(module, command.TERMINATED)
        # The stage inherits the lock: should this process be killed, nobody starts beside it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)], pass_fds=[self._lock]
        )
        if self._stopping:  # the signal came as the process was being made
            self._process.terminate()
        code = self._process.wait()
        if self._stopping or code == -signal.SIGTERM:
            code = command.TERMINATED
        if code:
            raise StageError(module, code)

    def _stop(self, *_: object) -> None:
        self._stopping = True
        if self._process is not None:
            self._process.terminate()


def execute(config: RetrainConfig) -> int:
    """Runs the chain."""
    report.require_page_libraries()
    # What the user may have got wrong comes first: until here, nothing is written.
    trainer_config = ask_trainer(config)
    source = resolve_source(config)
    fingerprint = options.fingerprint(config.preprocess, source)
    with storage.locked(config.root) as lock:
        stages = Stages(lock)
        try:
            dataset_dir = _preprocess(config, fingerprint, source, stages)
            return _run_chain(config, trainer_config, dataset_dir, source, stages)
        except StageError as error:
            if error.code in (command.BAD_INPUT, command.LOCKED, command.TERMINATED):
                return error.code
            log.error("%s; the same command goes on from here", error)
            return 1


def _run_chain(
    config: RetrainConfig,
    trainer_config: dict[str, Any],
    dataset_dir: Path,
    source: Source,
    stages: Stages,
) -> int:
    title = source.describe()["title"]
    manifest = load_manifest(dataset_dir)
    run_id = make_run_id(manifest.dataset_id, trainer_config)
    run_dir = config.root / "runs" / run_id
    report_dir = run_dir / "report"
    if is_settled(config.root, run_dir):
        log.info("nothing new: run %s has been judged already", run_id)
        _print_outcome(config.root, run_dir, title, with_table=True)
        return command.DONE
    if not ((run_dir / DECISION_FILE).is_file() and (report_dir / REPORT_FILE).is_file()):
        stages.run(
            "trainer.task",
            "--dataset_dir",
            dataset_dir,
            *trainer_folders(run_dir),
            *config.trainer_arguments,
        )
        champion = registry.champion(config.root)
        baseline = ("--baseline_dir", config.root / champion.path) if champion else ()
        stages.run(
            "pipeline.evaluate",
            "--model_dir",
            run_dir / "export",
            "--dataset_dir",
            dataset_dir,
            "--report_dir",
            report_dir,
            *baseline,
        )
        decision = decide(
            json.loads((report_dir / REPORT_FILE).read_text()), config.gate, run_id, source.specs
        )
        storage.write_atomic(run_dir / DECISION_FILE, json.dumps(decision, indent=2) + "\n")
    promoted = _carry_out(config.root, run_dir)
    _print_outcome(config.root, run_dir, title, with_table=False)
    return command.DONE if promoted else command.KEPT_CHAMPION


def ask_trainer(config: RetrainConfig) -> dict[str, Any]:
    """Asks the trainer what the flags that are its own come to.

    Raises:
        InputError: it does not know one, or refuses its value.
    """
    folders = (flag.split("=")[0] for flag in trainer_folders(Path("-")))
    taken = {"--dataset_dir", "--dry_run", *folders}
    if named := [flag for flag in config.trainer_arguments if flag.split("=")[0] in taken]:
        raise InputError(f"{named[0]}: is for trainer.task alone; here it follows from --root")
    answer = subprocess.run(
        [
            sys.executable,
            "-m",
            "trainer.task",
            "--dry_run",
            "--dataset_dir=-",
            *trainer_folders(Path("-")),
            *config.trainer_arguments,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        raise InputError(answer.stderr.strip().removeprefix("python -m trainer.task: error: "))
    return json.loads(answer.stdout)


def trainer_folders(run_dir: Path) -> list[str]:
    """Where the trainer writes: in the run folder, whatever a cloud's environment says."""
    places = {"model": "export", "checkpoint": "checkpoints", "tensorboard": "tensorboard"}
    inside = [f"--{name}_dir={run_dir / folder}" for name, folder in places.items()]
    return [f"--run_dir={run_dir}", *inside]


def resolve_source(config: RetrainConfig) -> Source:
    """Opens the source; ``auto`` stays what it was for the champion of this root."""
    champion = registry.champion(config.root)
    wanted = config.preprocess
    if wanted.sources == ("auto",) and champion is not None:
        names = " and ".join(champion.sources)
        log.info("source auto: %s, as for the champion (--source changes it)", names)
        wanted = dataclasses.replace(wanted, sources=tuple(champion.sources))
    return options.open_sources_of(wanted)


def _preprocess(config: RetrainConfig, fingerprint: str, source: Source, stages: Stages) -> Path:
    """Makes the dataset where it is not there yet, and returns its folder."""
    dataset_dir = config.root / "datasets" / fingerprint
    storage.recover(dataset_dir)
    if not (dataset_dir / MANIFEST_NAME).is_file():
        stages.run(
            "pipeline.preprocess",
            *[f"--source={spec}" for spec in source.specs],
            "--output_dir",
            dataset_dir,
            *options.dataset_arguments(config.preprocess),
        )
    return dataset_dir


def make_run_id(dataset_id: str, trainer_config: dict[str, Any]) -> str:
    """Names a run by what decides its result, so that the same work is found again."""
    content = json.dumps([dataset_id, trainer_config], sort_keys=True)
    return f"{trainer_config['preset']}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def decide(
    content: dict[str, Any], gate: registry.Gate, run_id: str, sources: Sequence[str]
) -> dict[str, Any]:
    """Puts a report before the gate; returns the content of ``decision.json``."""
    checks = registry.run_checks(content, gate)
    return {
        "run_id": run_id,
        "promoted": all(check.passed for check in checks),
        "reason": registry.reason(checks, content["baseline"] is not None),
        "checks": [dataclasses.asdict(check) | {"passed": check.passed} for check in checks],
        "accuracy": content["accuracy"],
        "model_id": content["model_id"],
        "champion_model_id": content["baseline"] and content["baseline"]["model_id"],
        "dataset_id": content["dataset_id"],
        "sources": list(sources),
    }


def _carry_out(root: Path, run_dir: Path) -> bool:
    """Does what was decided, then enters it in the ledger; returns whether it promoted.

    A chain killed before the ledger's line carries out the same decision again, to the same end.
    """
    decision = json.loads((run_dir / DECISION_FILE).read_text())
    champion = registry.champion(root)
    if decision["promoted"] and (champion is None or champion.run_id != decision["run_id"]):
        model = json.loads((run_dir / "export" / "model.json").read_text())
        champion = registry.publish(
            root,
            run_dir / "export",
            registry.Version(
                version=0,
                path="",
                model_id=model["model_id"],
                weights_sha256=model["weights_sha256"],
                dataset_id=model["dataset_id"],
                run_id=decision["run_id"],
                accuracy=decision["accuracy"],
                sources=decision["sources"],
            ),
        )
    entry = {
        key: decision[key]
        for key in ("run_id", "promoted", "reason", "accuracy", "model_id", "dataset_id")
    }
    entry["version"] = champion.version if decision["promoted"] and champion else None
    entry["time"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    append_line(root / LEDGER_FILE, entry)
    return decision["promoted"]


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Appends a JSON line and flushes it to the disk; after a line cut short, on a new line."""
    old = path.read_text() if path.exists() else ""
    with path.open("a") as file:
        file.write(("\n" if old and not old.endswith("\n") else "") + json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def is_settled(root: Path, run_dir: Path) -> bool:
    """Tells whether a run was judged, and what came of it still stands."""
    if run_dir.name not in judged(root):
        return False
    decision_file = run_dir / DECISION_FILE
    if not (decision_file.is_file() and (run_dir / "report" / REPORT_FILE).is_file()):
        return False
    published = {version.run_id for version in registry.versions(root)}
    return run_dir.name in published or not json.loads(decision_file.read_text())["promoted"]


def judged(root: Path) -> set[str]:
    """The runs that the ledger holds; a last line cut short by a crash does not count."""
    found = set()
    path = root / LEDGER_FILE
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.add(json.loads(line)["run_id"])
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _print_outcome(root: Path, run_dir: Path, title: str, *, with_table: bool) -> None:
    """Prints the decision, and before it the table, which the evaluation has printed else."""
    decision = json.loads((run_dir / DECISION_FILE).read_text())
    if with_table:
        content = json.loads((run_dir / "report" / REPORT_FILE).read_text())
        show(report.text_table(content))
        show(f"{title}: test accuracy {content['accuracy']:.4f}")
        show(f"report: {run_dir / 'report' / 'report.html'}")
    outcome = "promoted" if decision["promoted"] else "not promoted"
    show(f"{outcome}: {decision['reason']}")
    champion = registry.champion(root)
    if champion is not None:
        show(f"champion: version {champion.version}, of run {champion.run_id}")


def main() -> None:
    """The command."""
    command.run(PROG, parse, execute)


if __name__ == "__main__":
    main()
