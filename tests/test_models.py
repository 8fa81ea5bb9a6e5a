import hashlib
import json

import helpers
import memory_bucket
import numpy as np
import pytest

from pipeline import checksums, gcs, models, storage
from pipeline.command import InputError
from pipeline.gcs import GcsPath


@pytest.fixture
def folder(tmp_path):
    """What looks like an exported model as long as nobody loads it."""
    for name in ("saved_model.pb", "variables/variables.index"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "model.json").write_text('{"model_id": "m"}')
    return tmp_path


@pytest.mark.parametrize(
    ("trained_on", "said"),
    [
        ({"class_names": ["cat", "cow"]}, "label 1 is 'cow', in the dataset it is 'dog'"),
        ({"class_names": ["dog", "cat"]}, "label 0 is 'dog', in the dataset it is 'cat'"),
        ({"class_names": ["cat", "do g"]}, "label 1 is 'do g', in the dataset it is 'dog'"),
        ({"class_names": ["cat"]}, "answers with 1 classes, the dataset has 2"),
        ({"class_names": ["cat", "dog"]}, None),
        ({"class_names": None}, None),
        ({"class_names": 2}, None),
        ({}, None),
        (None, None),
        (7, None),
    ],
)
def test_a_model_that_names_other_classes(folder, trained_on, said):
    (folder / "model.json").write_text(json.dumps({"model_id": "m", "dataset": trained_on}))
    if said is None:
        models.require_scorable(folder, ("cat", "dog"))
        return
    with pytest.raises(InputError, match=f"^{folder}: {said}$"):
        models.require_scorable(folder, ("cat", "dog"))


@pytest.fixture(params=["local", "bucket"])
def noted(request, tmp_path, monkeypatch):
    """A folder with two files and what was noted of them, here and in a bucket."""
    place = tmp_path
    if request.param == "bucket":
        memory = memory_bucket.Bucket()
        monkeypatch.setattr(gcs, "bucket", lambda name: memory)
        place = GcsPath("bucket", "export")
    else:
        (place / "variables").mkdir()
    for name, content in (("model.json", "{}"), ("variables/data", "weights")):
        storage.write_atomic(place / name, content)
    sums = checksums.plain(checksums.sums(place))
    assert sums["model.json"] == {
        "bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest(),
    }  # fmt: skip
    assert sorted(sums) == ["model.json", "variables/data"]
    storage.write_atomic(place / "checksums.json", json.dumps(sums))
    return place


def test_a_whole_export_whoever_added_to_it(noted):
    assert models.damage(noted) is None
    storage.write_atomic(noted / "a note.txt", "ours")
    assert models.damage(noted) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has 0 bytes, expected 7"),
        (b"wei", "has 3 bytes, expected 7"),
        (None, "missing"),
    ],
)
def test_a_damaged_export(noted, content, said):
    path = noted / "variables/data"
    path.unlink() if content is None else storage.write_atomic(path, content)
    assert models.damage(noted) == f"{path}: {said}"


def test_a_flipped_bit_of_an_export(noted):
    path = noted / "variables/data"
    storage.write_atomic(path, b"weighty")
    said = f"{path}: has another checksum than it was published with"
    # A bucket keeps checksums of its own.
    assert models.damage(noted) == (None if isinstance(noted, GcsPath) else said)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"model.json": {"bytes": 2}}', '{"a": 1}'])
def test_checksums_that_cannot_be_read(noted, text):
    path = noted / "checksums.json"
    storage.write_atomic(path, text)
    assert models.damage(noted) == f"{path}: not the checksums of files"
    path.unlink()
    assert models.damage(noted) is None  # as earlier versions exported it


def test_curves(tmp_path):
    assert models.load_curves(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    assert models.load_curves(tmp_path) == [{"epoch": 1}, {"epoch": 2}]
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"ep')
    with pytest.raises(InputError, match=r"metrics.jsonl: not a file of one JSON object a line"):
        models.load_curves(tmp_path)


def test_models_are_looked_at_without_tensorflow_or_beam():
    found = helpers.run_python(
        "-c",
        "import sys; from pipeline import evaluate;"
        "print([m for m in ('tensorflow', 'apache_beam') if m in sys.modules])",
    )
    assert found.stdout == "[]\n", found.stderr


WITHOUT_KERAS = """
import sys
import numpy as np
from pathlib import Path
from pipeline.inference import SavedModelsHandler
(model,) = SavedModelsHandler([Path(sys.argv[1])], 10).load_model()
images = np.load(sys.argv[2])
np.save(sys.argv[3], model.signatures["serving_default"](images=images)["probabilities"].numpy())
print("keras" in sys.modules)
"""


def test_a_model_made_by_keras_answers_where_keras_is_not_loaded(tmp_path):
    """The evaluation loads TensorFlow without it; see `command.without_keras`."""
    import tensorflow as tf

    layers = tf.keras.layers
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), np.uint8)
    inputs = tf.keras.Input((28, 28, 1), dtype="uint8")
    model = tf.keras.Sequential(
        [inputs, layers.Rescaling(1 / 255), layers.Flatten(), layers.Dense(10, "softmax")]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(images, np.arange(5), verbose=0)  # so that the optimizer has something to be saved

    @tf.function(input_signature=[tf.TensorSpec([None, 28, 28, 1], tf.uint8, name="images")])
    def serve(images):
        return {"probabilities": model(images)}

    tf.saved_model.save(model, str(tmp_path / "model"), signatures=serve)
    np.save(tmp_path / "images.npy", images)
    files = [tmp_path / name for name in ("model", "images.npy", "answers.npy")]
    done = helpers.run_python("-c", WITHOUT_KERAS, *files)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    expected = serve(images)["probabilities"].numpy()
    np.testing.assert_allclose(np.load(files[2]), expected, rtol=0, atol=1e-6)
