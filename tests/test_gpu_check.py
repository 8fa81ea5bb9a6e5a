import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Found


def lines(*losses):
    return [{"loss": loss} for loss in losses]


def check(monkeypatch, capsys, tmp_path, gpus, **changed):
    """What is said of runs that come to the same, but for those whose names are given."""
    monkeypatch.setattr(gpu_check, "start", lambda *words, **options: words)
    monkeypatch.setattr(gpu_check, "finish", lambda words: b"0.5")
    usual = Found("one", lines(2.0, 1.0))

    def train(folder, name, *flags, cpu=False, killed=False):
        assert killed == name.startswith(("killed-", "same-"))
        return changed.get(name.replace("-", "_"), usual)

    monkeypatch.setattr(gpu_check, "train", train)
    good = gpu_check.check(gpus, tmp_path)
    return good, capsys.readouterr().out.splitlines()


def test_all_is_well(monkeypatch, capsys, tmp_path):
    good, said = check(monkeypatch, capsys, tmp_path, 2)
    assert good
    assert said == [
        "ok    1 x GPU: losses within 0.0e+00 of a CPU's",
        "ok    1 x GPU: killed and gone on, the same weights bit for bit",
        "told  1 x GPU: 100,000 examples/s",
        "ok    2 x GPU: losses within 0.0e+00 of a CPU's",
        "ok    2 x GPU: killed and gone on, the same weights bit for bit",
        "told  2 x GPU: 100,000 examples/s",
        "ok    --reproducible: 1 sha256 over [1, 2] GPUs, killed on each",
        "not checked: --reproducible over [4] GPUs; this machine has 2",
        "told  --tf32: losses within 0.0e+00 of a CPU's",
    ]


@pytest.mark.parametrize(
    ("name", "found", "line"),
    [
        ("gpu_1", Found("one", lines(2.0, 1.001)), "1 x GPU: losses within 1.0e-03 of a CPU's"),
        ("killed_1", Found("other", lines(2.0, 1.0)), "1 x GPU: killed and gone on, the same"),
        ("same_1", Found("other", lines(2.0, 1.0)), "--reproducible: 2 sha256 over [1] GPUs"),
    ],
)
def test_one_thing_differs(monkeypatch, capsys, tmp_path, name, found, line):
    good, said = check(monkeypatch, capsys, tmp_path, 1, **{name: found})
    assert not good
    (failed,) = [text for text in said if text.startswith("FAIL")]
    assert failed.startswith(f"FAIL  {line}")


@pytest.mark.campaign
def test_real_runs_on_logical_cpus(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setattr(gpu_check, "speed", lambda replicas: 1.0)
    assert gpu_check.check(2, tmp_path)
    assert capsys.readouterr().out.count("ok  ") == 5
