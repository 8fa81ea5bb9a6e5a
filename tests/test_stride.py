import pytest

from trainer import stride
from trainer.stride import Stride


@pytest.fixture(autouse=True)
def a_second(monkeypatch):
    monkeypatch.setattr(stride, "CALL_SECONDS", 1.0)


def test_calls_take_a_second_at_most():
    found = Stride(100)
    assert found.steps == 1  # nobody knows yet
    for steps, seconds, following in (
        (1, 2.5, 1),  # it compiled
        (1, 0.125, 8),
        (8, 0.5, 16),
        (10, 0.5, 20),  # the last of an epoch
        (20, 4.0, 5),
        (5, 20.0, 1),
        (1, 20.0, 1),
        (1, 0.001, 100),
        (100, 0.0, 100),
        (100, 1.0, 100),
    ):
        found.took(steps, seconds)
        assert found.steps == following
