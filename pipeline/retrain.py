"""The whole job under one root: preprocess, train, evaluate, and promote only what is as good.

python -m pipeline.retrain --root out --source auto

Takes the flags of pipeline.preprocess and of trainer.task, and Beam options, as well. Given
again, the same command goes on where it was stopped, and does nothing where nothing is new.

    ROOT/datasets/<fingerprint>/   ROOT/runs/<run_id>/   ROOT/models/   ROOT/runs.jsonl

ROOT is a local folder or gs://bucket/path.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
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
    retrain_options,
    rollback,
    runners,
    storage,
    trainers,
    vertex_options,
)
from pipeline import state as states
from pipeline.command import InputError, UnreachableError, log, show
from pipeline.plan import REQUEST_FILE, Request
from pipeline.retrain_options import RetrainConfig
from pipeline.sources import Source
from pipeline.stages import StageError, Stages, Training, ask_trainer
from pipeline.state import State
from pipeline.storage import Place

PROG = "pipeline.retrain"


def parse(argv: list[str]) -> RetrainConfig:
    """Parses the command line."""
    parser = command.Parser(PROG, __doc__)
    retrain_options.add_flags(parser)
    return retrain_options.config_from(*parser.parse_known_args(argv))


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
        said = None if settled is None else _nothing_new(settled, state)
        show(plan.describe(state, request, said))
        runs = _runs(config, training, request, state, said)
        _show_runs(config.root, runs, state.champion, {request.fingerprint: source})
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
    sources: Mapping[str, Source],
) -> None:
    """Prints the commands of the stages of runs, and then the exact requests to services.

    Args:
        root: the root.
        runs: what is to be done.
        champion: as things stand.
        sources: that are open, by fingerprint.
    """
    left = []
    for each in runs:
        source = sources.get(each.fingerprint)
        names = None if source is None else source.class_names
        left.append(commands.left(root, each, champion, names))
        show(f"\n{commands.text(left[-1])}")
    for each, todo in zip(runs, left, strict=True):
        for text in (
            _dataflow_request(each, todo, sources.get(each.fingerprint)),
            trainers.job_request(root, each),
        ):
            if text is not None:
                show(text)


def _dataflow_request(
    request: Request, left: Sequence[Sequence[str]], source: Source | None
) -> str | None:
    """The exact request for a run's next job on Dataflow; of one that was begun, where it can be.

    Args:
        request: of the run.
        left: the commands that are left of it.
        source: where it is open: of what is asked for now.
    """
    try:
        return commands.dataflow_request(left, source)
    except UnreachableError:
        raise
    except InputError as error:
        if source is not None:
            raise
        log.warning("run %s: its next request cannot be told: %s", request.run_id, error)
        return None


def run(config: RetrainConfig, training: Training, source: Source, stages: Stages) -> int:
    """Puts the root in order, does what is to be done, and brings the root's page up to date."""
    try:
        chain.put_in_order(config.root, stages.lock)
        code = _work(config, training, source, stages)
        index.write_index(config.root)  # also where nothing is new: a kill may have come before it
    except UnreachableError:
        raise
    except InputError:
        stages.hold()  # nothing here may be ours any more, which may be why it failed
        raise
    return code


def _work(config: RetrainConfig, training: Training, source: Source, stages: Stages) -> int:
    """Finishes what was begun, then does what was asked for, unless nothing is new.

    Whichever way it comes to its end, it says in the end who is champion.
    """
    root = config.root
    code, finished = command.DONE, None
    state = states.look(root)
    if state.champion is None:
        registry.require_pointer(root)
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
            log.info("%s", _nothing_new(settled, state))
            folder = plan.run_folder(root, settled["run_id"])
            chain.show_outcome(folder, title=source.describe()["title"])
        chain.show_champion(state.champion)
        return code
    stages.hold()
    plan.write_request(root, request)
    code = chain.finish(root, request, stages)
    if code in (command.DONE, command.KEPT_CHAMPION):
        chain.show_champion(registry.champion(root))
    return code


def _taken_up(begun: Request, config: RetrainConfig, training: Training) -> Request:
    """A run that any command began: where its stages run is for the one to say that does them."""
    vertex = _vertex_arguments(config)
    return dataclasses.replace(begun, beam_arguments=training.rest, vertex_arguments=vertex)


def _vertex_arguments(config: RetrainConfig) -> tuple[str, ...]:
    return () if config.vertex is None else tuple(vertex_options.arguments(config.vertex))


def _nothing_new(settled: Mapping[str, Any], state: State) -> str:
    became = settled["outcome"]
    if _was_left(state, settled):
        became += ", and rolled back since: no age brings it back"
    return f"nothing new: run {settled['run_id']} has been judged already ({became})"


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
    repeat = (
        judged is not None
        and is_due(config.max_age, champion, judged, now)
        # The same again comes to the same model: a warm start alone changes what is trained.
        and (config.warm_start or not _was_left(state, judged))
    )
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


def _was_left(state: State, judged: Mapping[str, Any]) -> bool:
    """Whether an operator has rolled back from the model that a line of the ledger is of."""
    return rollback.was_left(state.lines, state.champion, judged.get("model_id"))


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
