import dataclasses
import json

import pytest

from pipeline import registry
from pipeline.command import InputError
from pipeline.registry import Gate, Version, run_checks


def make_report(correct=90, total=100, classes=((45, 50), (45, 50)), champion=None):
    return {
        "accuracy": correct / total,
        "correct": correct,
        "per_class": [
            {
                "name": str(label),
                "support": support,
                "accuracy": hits / support if support else None,
            }
            for label, (hits, support) in enumerate(classes)
        ],
        "baseline": None if champion is None else {"correct": champion, "model_id": "old"},
    }


def verdict(report, **gate):
    return all(check.passed for check in run_checks(report, Gate(**gate)))


@pytest.mark.parametrize(
    ("report", "gate", "promoted"),
    [
        (make_report(), {}, True),
        (make_report(correct=80), {}, True),
        (make_report(correct=79), {}, False),
        (make_report(classes=((25, 50), (50, 50))), {}, True),
        (make_report(classes=((24, 50), (50, 50))), {}, False),
        (make_report(classes=((0, 0), (50, 50))), {}, True),
        (make_report(champion=89), {}, True),
        (make_report(champion=90), {}, True),
        (make_report(champion=91), {}, False),
        (make_report(correct=70), {"min_accuracy": 0.7}, True),
        (make_report(classes=((24, 50), (50, 50))), {"min_class_accuracy": 0.48}, True),
    ],
)
def test_gate(report, gate, promoted):
    assert verdict(report, **gate) == promoted


def test_reason_names_every_failed_check_with_its_numbers():
    report = make_report(correct=70, classes=((10, 50), (50, 50)), champion=71)
    text = registry.reason(run_checks(report, Gate()), has_champion=True)
    assert "accuracy: 0.7, required 0.8" in text
    assert "accuracy of class 0: 0.2, required 0.5" in text
    assert "the champion's: 70, required 71" in text


def test_reason_of_a_promotion():
    checks = run_checks(make_report(champion=88), Gate())
    assert registry.reason(checks, True) == "90 correct, the champion 88 of the same rows"
    assert "no champion" in registry.reason(run_checks(make_report(), Gate()), False)


def make_model(tmp_path, name):
    folder = tmp_path / name
    (folder / "variables").mkdir(parents=True)
    (folder / "saved_model.pb").write_text(name)
    (folder / "variables" / "variables.index").write_text(name * 2)
    version = Version(
        version=0,
        path="",
        model_id=f"id-{name}",
        weights_sha256=f"sha-{name}",
        dataset_id="data",
        run_id=f"run-{name}",
        accuracy=0.9,
        sources=["digits"],
    )
    return folder, version


def publish(root, tmp_path, name):
    return registry.publish(root, *make_model(tmp_path, name))


def test_versions_count_up_and_the_pointer_follows(tmp_path):
    root = tmp_path / "root"
    assert registry.champion(root) is None
    assert registry.versions(root) == []
    for number, name in enumerate("abc", start=1):
        published = publish(root, tmp_path, name)
        assert (published.version, published.path) == (number, f"models/{number}")
        assert registry.champion(root) == published
    assert [version.model_id for version in registry.versions(root)] == ["id-a", "id-b", "id-c"]
    assert (root / "models/2/variables/variables.index").read_text() == "bb"
    names = sorted(path.name for path in (root / "models").iterdir())
    assert names == ["1", "2", "3", "champion.json"]


def test_champion_file_is_the_contract(tmp_path):
    publish(tmp_path / "root", tmp_path, "a")
    content = json.loads((tmp_path / "root/models/champion.json").read_text())
    contract = {
        "version", "path", "model_id", "weights_sha256", "dataset_id", "run_id", "accuracy",
    }  # fmt: skip
    assert contract <= content.keys()


def test_versions_sort_as_numbers(tmp_path):
    root = tmp_path / "root"
    for index in range(11):
        publish(root, tmp_path, f"m{index}")
    assert [version.version for version in registry.versions(root)] == list(range(1, 12))


def test_publish_takes_up_a_copy_whose_pointer_was_not_swapped(tmp_path):
    root = tmp_path / "root"
    publish(root, tmp_path, "a")
    old_pointer = (root / "models/champion.json").read_bytes()
    folder, version = make_model(tmp_path, "b")
    registry.publish(root, folder, version)
    (root / "models/champion.json").write_bytes(old_pointer)  # as a crash in between leaves it
    again = registry.publish(root, folder, version)
    assert again.version == 2
    assert registry.champion(root) == again
    assert not (root / "models/3").exists()


def test_publish_leaves_nothing_when_the_copy_fails(tmp_path):
    root = tmp_path / "root"
    first = publish(root, tmp_path, "a")
    _, version = make_model(tmp_path, "b")
    with pytest.raises(OSError, match="missing"):
        registry.publish(root, tmp_path / "missing", version)
    assert registry.champion(root) == first
    names = sorted(path.name for path in (root / "models").iterdir())
    assert names == ["1", "champion.json"]


def test_rollback_publishes_the_old_model_as_the_highest_version(tmp_path):
    root = tmp_path / "root"
    for name in "abc":
        publish(root, tmp_path, name)
    back = registry.rollback(root, None)
    assert (back.version, back.model_id, back.rolled_back_from) == (4, "id-b", 2)
    assert registry.champion(root) == back
    assert (root / "models/4/saved_model.pb").read_text() == "b"
    further = registry.rollback(root, None)
    assert (further.version, further.model_id) == (5, "id-a")
    with pytest.raises(InputError, match="no version before 1"):
        registry.rollback(root, None)
    forward = registry.rollback(root, 3)
    assert (forward.version, forward.model_id) == (6, "id-c")


@pytest.mark.parametrize(
    ("number", "message"), [(7, "expected one of 1, 2"), (2, "is the champion already")]
)
def test_rollback_refuses(tmp_path, number, message):
    root = tmp_path / "root"
    publish(root, tmp_path, "a")
    publish(root, tmp_path, "b")
    with pytest.raises(InputError, match=message):
        registry.rollback(root, number)
    assert len(registry.versions(root)) == 2


def test_rollback_without_champion(tmp_path):
    with pytest.raises(InputError, match="no champion"):
        registry.rollback(tmp_path, None)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}'])
def test_a_broken_pointer_is_one_clear_line(tmp_path, text):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/champion.json").write_text(text)
    with pytest.raises(InputError, match=r"champion\.json: cannot be read"):
        registry.champion(tmp_path)


def test_table_marks_the_champion(tmp_path):
    root = tmp_path / "root"
    for name in "ab":
        publish(root, tmp_path, name)
    registry.rollback(root, None)
    lines = registry.table(registry.versions(root), registry.champion(root)).splitlines()
    assert [line[0] for line in lines[1:]] == [" ", " ", "*"]
    assert lines[3].endswith("run-a (version 1 again)")


def run(capsys, *argv):
    code = registry.execute(registry.parse(list(argv)))
    return code, capsys.readouterr().out


def test_commands(tmp_path, capsys):
    root = tmp_path / "root"
    for name in "ab":
        publish(root, tmp_path, name)
    assert run(capsys, "list", "--root", str(root))[0] == 0
    code, out = run(capsys, "current", "--root", str(root))
    assert json.loads(out) == dataclasses.asdict(registry.champion(root))
    code, out = run(capsys, "rollback", "--root", str(root), "--version", "1")
    assert (code, out) == (0, "version 3 is version 1 again\n")


@pytest.mark.parametrize(
    "argv", [[], ["list"], ["promote"], ["list", "--root", "x", "--version", "1"]]
)
def test_bad_command_lines(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        registry.parse(argv)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_missing_root(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        registry.execute(registry.parse(["list", "--root", str(tmp_path / "none")]))
