"""docs/cloud.md: its commands, numbers and files are what they say they are."""

import json
import os
import re
import shlex
import subprocess

import cloud_build
import helpers
import pytest

from pipeline import (
    chain,
    dataflow,
    dataflow_options,
    registry,
    retrain,
    runners,
    stages,
    vertex_options,
)
from pipeline.command import InputError

PAGE = (helpers.ROOT / "docs/cloud.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SHELL = [text for language, text in BLOCKS if language == "sh"]
FILES = [json.loads(text) for language, text in BLOCKS if language == "json"]
BUILD = cloud_build.load(helpers.ROOT / "cloudbuild.yaml")
SIGN = "# not run here\n"
NAMES = {
    "PROJECT": "my-project-1",
    "REGION": "us-central1",
    "BUCKET": "my-project-1-digits",
    "IMAGE": "us-central1-docker.pkg.dev/my-project-1/digits/digits-pipeline",
}


def commands(text):
    """The simple commands of a block, as words, its variables filled in."""
    joined = text.replace("\\\n", " ")
    lines = [line.strip() for line in joined.splitlines()]
    filled = [cloud_build.VARIABLE.sub(value_of, line) for line in lines if line[:1] not in "#"]
    return [shlex.split(line) for line in filled]


def value_of(match):
    return NAMES.get(match[2] or match[3], match[0])


def started(text):
    """(module, arguments) of every `python -m`, in a container or not."""
    for words in commands(text):
        if "-m" in words and {"python", "docker"} & set(words):
            module, *arguments = words[words.index("-m") + 1 :]
            yield module, arguments


def accept_retrain(arguments):
    """Reads a retrain's flags to the last: its own, the trainer's, and then Beam's."""
    config = retrain.parse(arguments)
    rest = stages.ask_trainer(config.others).rest
    assert runners.is_dataflow(rest) == ("--runner" in rest)
    if "--runner" in rest:  # read as Beam's here, where Dataflow's client may not be installed
        first = rest.index("--runner")
        rest = rest[:first] + rest[first + 2 :]
        options = runners.beam_options(rest)
        places = [("--root", str(config.root))]
        places += [("--source", text) for text in config.preprocess.sources]
        assert dataflow_options.problems(options.get_all_options(), places) == []
    elif rest:
        runners.require_complete(rest, [])
    return config


PARSERS = {"pipeline.registry": registry.parse, "pipeline.retrain": accept_retrain}


def test_blocks_are_found():
    assert len(SHELL) == PAGE.count("\n```sh\n") > 10
    assert len(FILES) == 4
    assert {language for language, _ in BLOCKS} == {"sh", "json", "python"}


@pytest.mark.parametrize("text", SHELL, ids=range(len(SHELL)))
def test_bash_reads_every_block(text):
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("text", SHELL, ids=range(len(SHELL)))
def test_what_was_not_run_is_marked(text):
    words = {words[0] for words in commands(text) if words}
    assert text.startswith(SIGN) == (words != {"python"})


def test_every_command_of_ours_is_accepted():
    found = [pair for text in SHELL for pair in started(text)]
    assert len(found) == 8
    for module, arguments in found:
        if "--help" not in arguments:
            PARSERS[module](arguments)


def flags_on_the_page():
    quoted = re.findall(r"_FLAGS=([^\";`]+)", PAGE.replace("\\\n", ""))
    return [*quoted, BUILD["substitutions"]["_FLAGS"]]


def accept_flags(flags, folder, monkeypatch):
    """Reads all that the build's last step would give the retrain."""
    values = BUILD["substitutions"] | {"PROJECT_ID": "my-project-1", "COMMIT_SHA": "0" * 40}
    step = cloud_build.substitute(BUILD, values | {"_FLAGS": flags})["steps"][-1]
    (where,) = [text for text in step["env"] if text.startswith("TFDS_DATA_DIR=")]
    monkeypatch.setenv(*where.split("=", 1))
    module, *arguments = cloud_build.arguments(step, folder)[1:]
    assert module == "pipeline.retrain"
    return accept_retrain(arguments)


@pytest.mark.parametrize("flags", flags_on_the_page(), ids=range(4))
def test_flags_for_the_build_are_accepted(flags, tmp_path, monkeypatch):
    config = accept_flags(flags, tmp_path, monkeypatch)
    assert config.vertex.project == "my-project-1"


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--max_num_wrokers 4", "unknown flag --max_num_wrokers: neither"),
        ("--vertex_machine n1-standard-4", "unknown flag --vertex_machine: neither"),
        ("--epochs many", "--epochs"),
        ("--max_num_workers many", "--max_num_workers"),
    ],
)
def test_a_slip_in_the_flags_would_be_found(flag, said, tmp_path, monkeypatch):
    flags = BUILD["substitutions"]["_FLAGS"]
    with pytest.raises(InputError, match=said):
        accept_flags(f"{flags} {flag}", tmp_path, monkeypatch)


def test_substitutions_are_those_of_the_build():
    rows = re.findall(r"^\| `(_\w+)` \| `([^`]*)` \|", PAGE, re.MULTILINE)
    expected = {
        name: re.sub(r"\$\{_?(PROJECT|REGION)(_ID)?\}", r"\1", default)
        for name, default in BUILD["substitutions"].items()
    }
    assert dict(rows) == expected
    assert set(re.findall(r"\b(_[A-Z_]+)=", PAGE)) <= expected.keys()
    assert set(re.findall(r"\b([A-Z]+_SHA)=", PAGE)) == {"COMMIT_SHA"}


def test_the_accounts_are_those_of_the_build():
    values = BUILD["substitutions"] | {"PROJECT_ID": "$$PROJECT"}
    for name in ("BUILD", "JOB"):
        account = cloud_build.substitute(BUILD["substitutions"][f"_{name}_ACCOUNT"], values)
        assert f"export {name}={account}\n" in PAGE


def test_every_role_is_given_and_explained():
    (block,) = [text for text in SHELL if "service-accounts create" in text]
    given = set(re.findall(r"roles/([\w.]+)", block))
    for words in re.findall(r"for role in ([\w. ]+);", block):
        given |= set(words.split())
    table = re.findall(r"^\| (?:digits-\w+)? ?\| `([\w.]+)` \| .+ \| .+ \|$", PAGE, re.MULTILINE)
    assert given == set(table)
    assert not {name for name in given if re.search(r"admin|owner|editor", name, re.IGNORECASE)} - {
        "cloudbuild.builds.editor"
    }


def test_jobs_of_ours_alone_are_cancelled():
    (block,) = [text for text in SHELL if "custom-jobs cancel" in text]
    (pattern,) = re.findall(r'"name~(\S+) AND state:\(Queued Pending Running\)"', block)
    work = [runners.Work(stage=stage, output="x") for stage in ("preprocess", "evaluate")]
    assert all(re.search(pattern, dataflow.job_name(each)) for each in work)
    assert not re.search(pattern, "beamapp-digits-1120")
    states = " ".join(f"JOB_STATE_{name}" for name in ("QUEUED", "PENDING", "RUNNING"))
    assert f'"labels.{vertex_options.RUN_LABEL}:* AND state:({states})"' in block


def test_nothing_of_the_root_goes_by_age():
    lifecycle = FILES[0]["rule"]
    prefixes = []
    for rule in lifecycle:
        if rule["action"]["type"] == "Delete":
            assert rule["condition"]["age"] >= 7
            prefixes += rule["condition"]["matchesPrefix"]
    assert prefixes == ["dataflow/", "builds/"]
    text = (helpers.ROOT / "cloudbuild.yaml").read_text()
    kept = set(re.findall(r"gs://\$_BUCKET/(\w+)", text))
    assert kept == {"digits", "dataflow", "tfds"}
    assert "--gcs-source-staging-dir=gs://$BUCKET/builds" in PAGE


def test_the_arithmetic():
    (text,) = [text for language, text in BLOCKS if language == "python"]
    names, checked = {}, []
    for line in text.splitlines():
        exec(line, names)
        if found := re.match(r"(\w+) = .*# \$?(\d[\d.]*)$", line):
            digits = len(found[2].partition(".")[2])
            assert f"{names[found[1]]:.{digits}f}" == found[2], line
            checked.append(found[1])
    assert len(checked) == 13


@pytest.mark.cloud
def test_cloud_monitoring_knows_every_field_of_the_alert():
    if "CI" not in os.environ:
        pytest.importorskip("google.cloud.monitoring_v3", reason="needs the cloud extra")
    from google.cloud.monitoring_v3 import AlertPolicy
    from google.protobuf import json_format

    message = json_format.ParseDict(FILES[2], AlertPolicy.pb(AlertPolicy()))
    assert message.conditions[0].condition_matched_log.filter.startswith("(resource.type=")
    assert message.alert_strategy.notification_rate_limit.period.seconds == 3600


@pytest.mark.cloud
def test_cloud_monitoring_knows_every_field_of_the_alert_on_silence():
    if "CI" not in os.environ:
        pytest.importorskip("google.cloud.monitoring_v3", reason="needs the cloud extra")
    from google.cloud.monitoring_v3 import AlertPolicy
    from google.protobuf import json_format

    message = json_format.ParseDict(FILES[3], AlertPolicy.pb(AlertPolicy()))
    absent = message.conditions[0].condition_absent
    (period,) = [each.alignment_period.seconds for each in absent.aggregations]
    assert 24 * 3600 < period <= 25 * 3600  # a night is not as long as the other; 25 is the most
    assert 0 < absent.duration.seconds <= 23.5 * 3600


def test_the_metric_counts_what_a_retrain_says_in_the_end(capsys):
    (name,) = re.findall(r"user/(\w+)", FILES[3]["conditions"][0]["conditionAbsent"]["filter"])
    (line,) = [words for text in SHELL for words in commands(text) if name in words]
    assert line[:5] == ["gcloud", "logging", "metrics", "create", name]
    (pattern,) = re.findall(r'textPayload=~"(.*)"$', line[-1])
    champion = registry.Version(
        version=12, path="models/12", model_id="m", weights_sha256="w", dataset_id="d",
        run_id="day-core-0", accuracy=0.9, class_names=["0"], sources=["digits"],
    )  # fmt: skip
    chain.show_champion(champion)
    assert re.search(pattern, f'Step #7 - "retrain": {capsys.readouterr().out}')


def run_block(text, folder, script=""):
    """Runs a block where gcloud and sleep note what they are told; returns [[program, argument]].

    Args:
        text: the block.
        folder: for the stand-ins.
        script: what gcloud does besides.
    """
    for name, own in (("gcloud", script), ("sleep", "")):
        program = folder / name
        noted = f"printf '%s\\0' {name} \"$@\" >> '{folder}/asked'; echo >> '{folder}/asked'"
        program.write_text(f"#!/bin/bash\n{noted}\n{own}\n")
        program.chmod(0o755)
    env = NAMES | {"CHANNEL": "channel", "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [line.split("\0")[:-1] for line in (folder / "asked").read_text().splitlines()]


def settings(flag):
    """What gcloud makes of `--update-substitutions`, whose first characters may set its comma."""
    _, _, text = flag.partition("=")
    _, comma, pairs = text.split("^", 2) if text.startswith("^") else ("", ",", text)
    return dict(pair.split("=", 1) for pair in pairs.split(comma))


def test_both_triggers_are_told_the_same(tmp_path):
    """They work on one root: of two sources, one would be trained on over the other's champion."""
    told = {}
    blocks = [text for text in SHELL if "triggers update" in text]
    for text in blocks:
        for words in run_block(text, tmp_path):
            if words[1:4] == ["builds", "triggers", "update"]:
                told.setdefault(words[5], {}).update(settings(words[-1]))
        (tmp_path / "asked").unlink()
        assert told["digits-push"] == told["digits-nightly"]
    assert len(blocks) == 2
    assert told["digits-push"]["_SOURCE"] == "images:gs://my-project-1-digits/scans"
    assert told["digits-push"]["_EXTRAS"] == "report,cloud,gpu"
    assert set(told) == set(re.findall(r"triggers create \w+ --name=(\S+)", PAGE))


@pytest.mark.parametrize(("refusals", "asked"), [(0, 1), (9, 10), (99, 15)])
def test_a_metric_that_is_not_known_yet_is_waited_for(refusals, asked, tmp_path):
    (text,) = [text for text in SHELL if "silence.json" in text]
    refuse = f"[[ $* != *silence* || $(grep -c silence '{tmp_path}/asked') -gt {refusals} ]]"
    found = run_block(text, tmp_path, refuse)
    assert [words[1:4] for words in found].count(["alpha", "monitoring", "policies"]) == asked
    assert found.count(["sleep", "60"]) == min(refusals, 15)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (helpers.ROOT / "docs" / target).is_file(), target
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= headings
