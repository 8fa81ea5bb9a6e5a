import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.util.event_pb2 import Event

from trainer.events import EventWriter, histogram

LINE = {
    "step": 63,
    "loss": 0.5,
    "accuracy": 0.25,
    "val_loss": None,
    "val_accuracy": 1.0,
    "examples_per_second": 1e6,
}


def read(folder):
    """[(tag, step, plugin, value)] of the one event file."""
    (path,) = folder.iterdir()
    found = []
    for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
        event = Event.FromString(record)
        for value in event.summary.value:
            plugin = value.metadata.plugin_data.plugin_name
            found.append((value.tag, event.step, plugin, tf.make_ndarray(value.tensor)))
    return found


def test_a_histogram_by_hand():
    values = np.float32([[0, 1, 2], [3, 3, 30]])
    expected = np.zeros((30, 3))
    expected[:, 0] = range(30)
    expected[:, 1] = range(1, 31)
    expected[[0, 1, 2, 29], 2] = 1
    expected[3, 2] = 2
    found = histogram(values)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, expected)


def test_a_histogram_of_equal_values_counts_them_all():
    found = histogram(np.zeros(500, np.float32))
    assert found.shape == (30, 3)
    assert found[:, 2].sum() == 500
    assert found[0, 0] < 0 < found[-1, 1]


def test_what_is_written_is_read_back(tmp_path):
    weights = [np.float32([[0, 30]]), np.float32([1, 2]), np.float32([[5], [5]]), np.float32([7])]
    EventWriter(tmp_path).write(LINE, weights)
    found = read(tmp_path)
    assert [(tag, step, plugin) for tag, step, plugin, _ in found] == [
        ("loss", 63, "scalars"),
        ("accuracy", 63, "scalars"),
        ("val_accuracy", 63, "scalars"),
        ("examples_per_second", 63, "scalars"),
        ("layer_0/w", 63, "histograms"),
        ("layer_0/b", 63, "histograms"),
        ("layer_1/w", 63, "histograms"),
        ("layer_1/b", 63, "histograms"),
    ]
    assert [value for *_, value in found[:4]] == [0.5, 0.25, 1.0, 1e6]
    for (*_, value), weight in zip(found[4:], weights, strict=True):
        np.testing.assert_array_equal(value, histogram(weight))


@pytest.mark.parametrize(
    ("epochs", "wanted"),
    [(1, [1]), (3, [1, 2, 3]), (50, list(range(1, 51))), (51, [*range(2, 51, 2), 51])],
)
def test_a_long_run_has_about_fifty_histograms(epochs, wanted):
    assert [e for e in range(1, epochs + 1) if EventWriter.wants_histograms(e, epochs)] == wanted
