"""The whole job under one root: preprocess, train, evaluate, and promote only what is as good.

python -m pipeline.retrain --root out --source auto

Takes the flags of pipeline.preprocess and of trainer.task, and Beam options, as well. Given
again, the same command goes on where it was stopped, and does nothing where nothing is new.

    ROOT/datasets/<fingerprint>/   ROOT/runs/<run_id>/   ROOT/models/   ROOT/runs.jsonl

ROOT is a local folder or gs://bucket/path.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import (
    chain,
    command,
    commands,
    gate,
    index,
    ledger,
    options,
    page,
    plan,
    registry,
    rules,
    runners,
    storage,
    trainers,
    vertex_options,
)
from pipeline import state as states
from pipeline.command import InputError, UnreachableError, log, show
from pipeline.options import PreprocessConfig
from pipeline.plan import REQUEST_FILE, Request
from pipeline.rules import Rules
from pipeline.sources import SYNTAX, Source
from pipeline.stages import StageError, Stages, Training, ask_trainer
from pipeline.state import State
from pipeline.storage import Place
from pipeline.vertex_options import VertexConfig

PROG = "pipeline.retrain"
WINDOW = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """The flags of the chain.

    Attributes:
        window: when this run was scheduled for.
        max_age: days after which a champion is trained anew although nothing is new; None: never.
        warm_start: whether to start from the champion's weights.
        force_reason: why to promote whatever the gate says, if so.
        dry_run: whether to print the plan alone.
        vertex: where on Vertex AI runs are trained; None: in processes here.
        others: arguments that it does not know itself: the trainer's, and Beam's.
    """

    root: Place
    preprocess: PreprocessConfig
    rules: Rules
    window: str
    max_age: float | None
    warm_start: bool
    force_reason: str | None
    dry_run: bool
    vertex: VertexConfig | None
    others: tuple[str, ...]


def window(text: str) -> str:
    """Parses the name of a scheduled window, which becomes part of a folder's name."""
    if not WINDOW.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"expected up to 64 letters, digits, '.', '_', '+' and '-', got {text!r}"
        )
    return text


def make_parser() -> command.Parser:
    """The flags of the chain itself."""
    parser = command.Parser(PROG, __doc__)
    parser.add_argument("--root", required=True, metavar="DIR", help="where everything is kept")
    parser.add_argument(
        "--source",
        action="append",
        metavar="SRC",
        help=f"{SYNTAX}; several are joined (default: auto)",
    )
    parser.add_argument(
        "--window",
        type=window,
        metavar="TEXT",
        help="the scheduled time this run is for; begins its id (default: the date, UTC)",
    )
    parser.add_argument(
        "--max_age",
        type=command.above_zero("days"),
        metavar="DAYS",
        help="train although nothing is new where the champion is older (default: never)",
    )
    parser.add_argument(
        "--warm_start",
        action="store_true",
        help="start from the champion's weights, unless it has learned from images of test",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print what would be done, the commands of its stages and the requests to a service,"
        " and write nothing",
    )
    rules.add_flags(parser.add_argument_group("the gate"))
    options.add_flags(parser.add_argument_group("the dataset"))
    training = parser.add_argument_group(
        "the training", "every other flag goes to trainer.task, see its --help, or else to Beam"
    )
    training.add_argument("--preset", metavar="NAME", help="what to start from (default: core)")
    trainers.add_flags(parser)
    return parser


def parse(argv: list[str]) -> RetrainConfig:
    """Parses the command line."""
    parser = make_parser()
    flags, others = parser.parse_known_args(argv)
    if flags.preset == "xor":
        raise InputError("--preset xor: learns four points and makes no model that could be served")
    if flags.warm_start and any(other.startswith("--initial_weights") for other in others):
        raise InputError("--warm_start and --initial_weights: expected at most one of them")
    flags.source = flags.source or ["auto"]
    return RetrainConfig(
        root=storage.folder(flags.root, buckets=True),
        preprocess=options.config_from(flags, output_dir=Path(), beam_arguments=()),
        rules=rules.rules_from(flags),
        window=flags.window or datetime.datetime.now(datetime.UTC).date().isoformat(),
        max_age=flags.max_age,
        warm_start=flags.warm_start,
        force_reason=rules.force_reason_from(flags),
        dry_run=flags.dry_run,
        vertex=trainers.vertex_from(flags),
        others=(*([f"--preset={flags.preset}"] if flags.preset is not None else []), *others),
    )


def execute(config: RetrainConfig) -> int:
    """Runs the chain, or says that nothing is new, or what would be done."""
    page.require_page_libraries()
    # What the user may have got wrong comes first: until here, nothing is written.
    champion = registry.champion(config.root)
    start = config.root / champion.path if config.warm_start and champion else None
    try:
        training = ask_trainer(config.others, initial_weights=start)
    except StageError as error:
        log.error("%s; nothing was begun; the same command tries again", error)
        return command.FAILED
    if training.rest:
        sources = wanted_sources(config, champion)
        places = [("--root", str(config.root)), *(("--source", spec) for spec in sources)]
        runners.require_complete(training.rest, places)
    if config.vertex is not None:
        trainers.check_vertex(config.vertex, training.config, dry_run=config.dry_run)
    source = resolve_source(config, champion)
    if config.dry_run:
        state = states.look(config.root)
        request = make_request(config, training, source, state)
        settled = find_settled(config, request, state)
        said = None if settled is None else _nothing_new(settled)
        show(plan.describe(state, request, said))
        names = {request.fingerprint: source.class_names}
        runs = _runs(config, training, request, state, said)
        _show_runs(config.root, runs, state.champion, names)
        return command.DONE
    with storage.locked(config.root, outlasts=True) as lock, Stages(lock) as stages:
        return run(config, training, source, stages)


def _runs(
    config: RetrainConfig, training: Training, request: Request, state: State, settled: str | None
) -> list[Request]:
    """What would be done, in order: the runs that were begun, then what is asked for."""
    begun = [_taken_up(other, config, training) for other in plan.unfinished(state)]
    known = [(other.fingerprint, other.config_id) for other in begun]
    is_new = settled is None and (request.fingerprint, request.config_id) not in known
    return [*begun, request] if is_new else begun


def _show_runs(
    root: Place,
    runs: Sequence[Request],
    champion: registry.Version | None,
    class_names: Mapping[str, Sequence[str]],
) -> None:
    """Prints the commands of the stages of runs, and then the exact requests to a service.

    Args:
        root: the root.
        runs: what is to be done.
        champion: as things stand.
        class_names: of the datasets that are known, by fingerprint.
    """
    for each in runs:
        left = commands.left(root, each, champion, class_names.get(each.fingerprint))
        show(f"\n{commands.text(left)}")
    for each in runs:
        if (job := trainers.job_request(root, each)) is not None:
            show(job)


def run(config: RetrainConfig, training: Training, source: Source, stages: Stages) -> int:
    """Puts the root in order, does what is to be done, and brings the root's page up to date."""
    try:
        chain.put_in_order(config.root)
        code = _work(config, training, source, stages)
        index.write_index(config.root)  # also where nothing is new: a kill may have come before it
    except UnreachableError:
        raise
    except InputError:
        stages.hold()  # nothing here may be ours any more, which may be why it failed
        raise
    return code


def _work(config: RetrainConfig, training: Training, source: Source, stages: Stages) -> int:
    """Finishes what was begun, then does what was asked for, unless nothing is new."""
    root = config.root
    code, finished = command.DONE, None
    state = states.look(root)
    for begun in plan.unfinished(state):
        log.info("going on with run %s, begun at %s", begun.run_id, begun.time)
        code = chain.finish(root, _taken_up(begun, config, training), stages)
        finished = begun.run_id
        index.write_index(root)  # the next one may take long
        if code not in (command.DONE, command.KEPT_CHAMPION):
            return code
    if finished is not None:
        state = states.look(root)
    request = make_request(config, training, source, state)
    if (settled := find_settled(config, request, state)) is not None:
        if settled["run_id"] != finished:
            log.info("%s", _nothing_new(settled))
            folder = plan.run_folder(root, settled["run_id"])
            chain.show_outcome(folder, state.champion, title=source.describe()["title"])
        return code
    stages.hold()
    plan.write_request(root, request)
    return chain.finish(root, request, stages)


def _taken_up(begun: Request, config: RetrainConfig, training: Training) -> Request:
    """A run that any command began: where its stages run is for the one to say that does them."""
    vertex = _vertex_arguments(config)
    return dataclasses.replace(begun, beam_arguments=training.rest, vertex_arguments=vertex)


def _vertex_arguments(config: RetrainConfig) -> tuple[str, ...]:
    return () if config.vertex is None else tuple(vertex_options.arguments(config.vertex))


def _nothing_new(settled: Mapping[str, Any]) -> str:
    return f"nothing new: run {settled['run_id']} has been judged already ({settled['outcome']})"


def wanted_sources(config: RetrainConfig, champion: registry.Version | None) -> tuple[str, ...]:
    """What is to be read; ``auto`` stays what it was for the champion of this root."""
    given = config.preprocess.sources
    return tuple(champion.sources) if given == ("auto",) and champion is not None else given


def resolve_source(config: RetrainConfig, champion: registry.Version | None) -> Source:
    """Opens the source that is wanted."""
    wanted = wanted_sources(config, champion)
    if wanted != config.preprocess.sources:
        log.info("source auto: %s, as for the champion (--source changes it)", " and ".join(wanted))
    given = dataclasses.replace(config.preprocess, sources=wanted, dry_run=config.dry_run)
    source = options.open_sources_of(given)
    if config.warm_start and champion is not None:
        check = gate.same_classes(source.class_names, champion.class_names)
        if not check.passed:
            raise InputError(f"--warm_start: the champion has other classes: {check.note}")
    return source


def make_request(
    config: RetrainConfig,
    training: Training,
    source: Source,
    state: State,
) -> Request:
    """What the flags come to, as things stand.

    Where the same was judged before and what came of it is gone, or is to be forced, the request
    is to go on in that run's folder.
    """
    fingerprint = options.fingerprint(config.preprocess, source)
    config_id = plan.make_config_id(training.config, warm_start=config.warm_start)
    judged = _find_judged(state, config_id=config_id, fingerprint=fingerprint)
    now = datetime.datetime.now(datetime.UTC)
    champion = state.champion
    repeat = judged is not None and is_due(config.max_age, champion, judged, now)
    run_id = plan.make_run_id(config.window, training.config["preset"], fingerprint, config_id)
    if judged is not None and not repeat and state.has(judged["run_id"], REQUEST_FILE):
        run_id = judged["run_id"]
    window, initial = config.window, None
    if config.warm_start and champion is not None:
        initial = champion.path
    if state.has(run_id, REQUEST_FILE):  # it goes on from where it began, whoever is champion
        earlier = plan.read_request(plan.run_folder(state.root, run_id))
        window, initial = earlier.window, earlier.initial_weights
    return Request(
        run_id=run_id,
        window=window,
        time=now.isoformat(timespec="seconds"),
        attempt=ledger.times_closed(state.lines, run_id),
        sources=source.specs,
        dataset_options={name: getattr(config.preprocess, name) for name in options.FLAGS},
        fingerprint=fingerprint,
        trainer_arguments=training.arguments,
        config_id=config_id,
        initial_weights=initial,
        beam_arguments=training.rest,
        rules=config.rules,
        force_reason=config.force_reason,
        repeat=repeat,
        champion=champion.model_id if champion else None,
        vertex_arguments=_vertex_arguments(config),
    )


def is_due(
    max_age: float | None,
    champion: registry.Version | None,
    judged: Mapping[str, Any],
    now: datetime.datetime,
) -> bool:
    """Whether what was judged is trained again: neither is the champion younger, nor the answer.

    Args:
        max_age: days; None: never.
        champion: if there is one.
        judged: the last line of the ledger on this training.
        now: the time.
    """
    if max_age is None or champion is None:
        return False
    promoted = champion.first_promoted_at or champion.promoted_at  # a rollback makes none young
    times = (promoted, judged.get("time") or promoted)
    return min(plan.days_since(time, now) for time in times) > max_age


def _find_judged(state: State, *, config_id: str, fingerprint: str) -> Mapping[str, Any] | None:
    dataset_id = plan.known_dataset_id(state.root, fingerprint)
    return ledger.find_judged(
        state.lines, config_id=config_id, fingerprint=fingerprint, dataset_id=dataset_id
    )


def find_settled(config: RetrainConfig, request: Request, state: State) -> Mapping[str, Any] | None:
    """The line of the ledger that makes a request needless, if one does."""
    judged = _find_judged(state, config_id=request.config_id, fingerprint=request.fingerprint)
    if judged is None or not plan.stands(state, judged):
        return None
    if request.repeat and not request.attempt:  # once in each window
        return None
    return judged if plan.answers(state.root, judged, request) else None


def main() -> None:
    """The command."""
    command.run(PROG, parse, execute)


if __name__ == "__main__":
    main()
