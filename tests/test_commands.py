"""The commands that a dry run of the chain prints are those that the chain then runs."""

import shlex

import pytest
from test_chain import ALL, bucket, bucket_job, job, local_job, make_job  # noqa: F401

from pipeline import commands, plan, registry, retrain, state
from pipeline.command import InputError
from pipeline.stages import Training


@pytest.fixture
def planned(job, monkeypatch, capsys):  # noqa: F811
    """Asks for the plan; returns the modules and their arguments as a shell reads them."""

    def ask(*flags, day=1, seed=22, beam=()):
        champion = registry.champion(job.root)
        initial = {"initial_weights": champion and champion.weights_sha256}
        training = Training(
            arguments=(f"--seed={seed}",),
            rest=tuple(beam),
            config={"preset": "core", "seed": seed} | (initial if "--warm_start" in flags else {}),
        )
        monkeypatch.setattr(retrain, "ask_trainer", lambda *_, **__: training)
        argv = [f"--root={job.root}", f"--source=idx:{job.source}", f"--window=day{day}"]
        capsys.readouterr()
        before = len(job.lines()), sorted(state.look(job.root).runs)
        assert retrain.execute(retrain.parse([*argv, *flags, "--dry_run"])) == 0
        assert (len(job.lines()), sorted(state.look(job.root).runs)) == before
        lines = capsys.readouterr().out.splitlines()
        found = [shlex.split(line) for line in lines if line.startswith("python ")]
        assert all(words[:2] == ["python", "-m"] for words in found)
        return [words[2:] for words in found]

    return ask


@pytest.fixture
def done(job, monkeypatch):  # noqa: F811
    """Runs the chain; returns the modules that it ran, and their arguments."""
    calls = []
    run = job.stages.run
    monkeypatch.setattr(
        job.stages, "run", lambda *words: calls.append([str(word) for word in words]) or run(*words)
    )

    def work(*flags, **given):
        calls.clear()
        job(*flags, **given)
        return list(calls)

    return work


def modules(found):
    return [words[0].rpartition(".")[2] for words in found]


def test_a_first_run_and_one_that_is_compared_with_the_champion(job, planned, done):  # noqa: F811
    first = planned("--num_shards=3", beam=("--direct_num_workers=1", "--job_name=our own"))
    assert modules(first) == ALL
    assert first == done("--num_shards=3", beam=("--direct_num_workers=1", "--job_name=our own"))
    assert "--job_name=our own" in first[0] and "--job_name=our own" in first[2]
    assert planned("--num_shards=3") == []  # nothing is new
    second = planned("--num_shards=3", "--warm_start", day=2, seed=5)
    assert modules(second) == ["task", "evaluate"]
    assert f"--initial_weights={job.root}/models/1" in second[0]
    assert f"--baseline_dir={job.root}/models/1" in second[1]
    assert second == done("--num_shards=3", "--warm_start", day=2, seed=5)


def test_a_run_that_failed_goes_on_from_there(job, planned, done):  # noqa: F811
    job.stages.fails = {"evaluate": 1}
    assert modules(done()) == ALL
    left = planned(day=2)
    assert modules(left) == ["evaluate"]
    other = planned(day=2, seed=5)  # first the one that was begun
    assert modules(other) == ["evaluate", "task", "evaluate"]
    assert other[0] == left[0]
    job.stages.fails = {}
    asked, *ran = done(day=2)  # the trainer is asked again, and finds that it is done
    assert modules([asked]) == ["task"]
    assert left == ran


def test_a_run_that_was_decided_on_needs_no_command(job):  # noqa: F811
    assert job() == (0, ALL)
    champion = registry.champion(job.root)
    request = plan.read_request(job.last_run())
    assert commands.left(job.root, request, champion) == []


def test_they_are_written_for_a_shell():
    text = commands.text([["a.b", "--x=it's $HOME", "--y={1}"], ["c"]])
    assert text == "python -m a.b '--x=it'\"'\"'s $HOME' '--y={1}'\npython -m c"


def test_a_request_that_cannot_be_told_any_more_stands_in_nobodys_way(
    job,  # noqa: F811
    planned,
    monkeypatch,
    caplog,
):
    """That of a run that was begun: what would be done now is told all the same."""
    job.stages.fails = {"preprocess": 1}
    job()
    (begun,) = state.look(job.root).runs
    job.change()
    asked = []

    def tell(left, source):
        asked.append((left[0][0], source is not None))
        if source is None:
            raise InputError("no longer there")

    monkeypatch.setattr(commands, "dataflow_request", tell)
    planned(day=2)
    assert asked == [("pipeline.preprocess", False), ("pipeline.preprocess", True)]
    assert f"run {begun}: its next request cannot be told: no longer there" in caplog.text


def test_a_request_that_cannot_be_told_of_what_is_asked_for_is_an_error(planned, monkeypatch):
    def tell(left, source):
        raise InputError("the job cannot be prepared")

    monkeypatch.setattr(commands, "dataflow_request", tell)
    with pytest.raises(InputError, match="cannot be prepared"):
        planned()
