import hashlib
import json
import struct

import helpers
import numpy as np
import numpy_twin
import pytest
import tensorflow as tf

from pipeline import __version__
from pipeline.command import InputError
from pipeline.dataset import SCALE_TABLE, encode_record
from trainer.config import PRESETS
from trainer.export import describe, export, weights_sha256
from trainer.model import MLP

DATASET_ID = "0123456789abcdef0123456789abcdef"
METRICS = '{"epoch": 1, "loss": 0.5}\n'
CLASSES = 7

# What a server does: load a folder by its path and call its signatures, with none of our code.
SERVER = """
import json, os, sys
import numpy as np
import tensorflow as tf

folder, asked = sys.argv[1:]
loaded = tf.saved_model.load(folder)
arrays = np.load(asked)
answers = {}
for name in arrays.files:
    size, signature = name.split("-")
    given = arrays[name] if signature == "images" else arrays[name].astype(object)
    key = {"images": "serving_default", "examples": "serve_examples"}[signature]
    answer = loaded.signatures[key](**{signature: tf.constant(given)})
    for output, value in answer.items():
        answers[f"{name}-{output}"] = value.numpy()
for layer in range(2):
    for part in "wb":
        answers[f"{part}{layer}"] = getattr(loaded.model.layers[layer], part).numpy()
assert len(loaded.model.layers) == 2
np.savez(asked.replace("asked", "answers"), **answers)
ours = [name for name in sys.modules if name.split(".")[0] in ("trainer", "pipeline")]
print(json.dumps({"ours": ours, "signatures": sorted(loaded.signatures)}))
"""


def random_images(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (size, 28, 28, 1), np.uint8)


def records(images):
    return [encode_record(image.tobytes(), 3, "id") for image in images]


def export_of(model, folder):
    metrics = folder / "metrics.jsonl"
    metrics.write_text(METRICS)
    description = export(model, PRESETS["core"], DATASET_ID, metrics, folder / "export")
    return folder / "export", description


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = MLP(784, (9,), CLASSES, seed=5)
    for b in model.weights[1::2]:
        b.assign(tf.random.stateless_normal(b.shape, (1, 2)))
    return (model, *export_of(model, tmp_path_factory.mktemp("exported")))


@pytest.fixture(scope="module")
def served(exported):
    """The loaded model's two signatures, as functions from images."""
    signatures = tf.saved_model.load(str(exported[1])).signatures
    return (
        lambda images: signatures["serving_default"](images=tf.constant(images)),
        lambda images: signatures["serve_examples"](
            examples=tf.constant(records(images), tf.string)
        ),
    )


@pytest.mark.parametrize("size", [0, 1, 3, 257])
def test_both_signatures_give_the_same_bits(served, size):
    by_image, by_record = (serve(random_images(size)) for serve in served)
    assert by_image.keys() == by_record.keys() == {"classes", "probabilities"}
    for answer in (by_image, by_record):
        assert answer["classes"].dtype == tf.int64
        assert answer["classes"].shape == (size,)
        assert answer["probabilities"].dtype == tf.float32
        assert answer["probabilities"].shape == (size, CLASSES)
    for name, value in by_image.items():
        np.testing.assert_array_equal(value, by_record[name])


def test_answers_are_those_of_the_network(exported, served):
    weights = [weight.numpy().astype(np.float64) for weight in exported[0].weights]
    images = random_images(200)
    _, logits = numpy_twin.forward(weights, images.reshape(-1, 784) / 255)
    answer = served[0](images)
    np.testing.assert_allclose(answer["probabilities"], numpy_twin.softmax(logits), atol=1e-6)
    np.testing.assert_array_equal(answer["classes"], answer["probabilities"].numpy().argmax(-1))
    assert len(set(answer["classes"].numpy())) > 1


@pytest.mark.parametrize(
    ("name", "given", "dtype", "shape"),
    [
        ("serving_default", "images", tf.uint8, [None, 28, 28, 1]),
        ("serve_examples", "examples", tf.string, [None]),
    ],
)
def test_signatures_are_those_of_the_contract(exported, name, given, dtype, shape):
    signatures = tf.saved_model.load(str(exported[1])).signatures
    assert set(signatures) == {"serving_default", "serve_examples"}
    _, inputs = signatures[name].structured_input_signature
    assert set(inputs) == {given}
    assert (inputs[given].dtype, inputs[given].shape.as_list()) == (dtype, shape)
    outputs = signatures[name].structured_outputs
    assert outputs["classes"].dtype == tf.int64
    assert outputs["classes"].shape.as_list() == [None]
    assert outputs["probabilities"].dtype == tf.float32
    assert outputs["probabilities"].shape.as_list() == [None, CLASSES]


def test_pixels_are_scaled_exactly(tmp_path):
    """A network that answers 1/256 for every class only if 256 pixels are right to the last bit.

    Logit i is 2**30 times (scaled pixel i - i / 255); the error of a single bit would be at
    least 2**30 * 2**-31 = 1/2.
    """
    model = MLP(784, (), 256, seed=0)
    w, b = model.weights
    w.assign(np.eye(784, 256) * 2.0**30)
    b.assign(-SCALE_TABLE * 2.0**30)
    images = np.zeros((1, 784), np.uint8)
    images[0, :256] = np.arange(256)
    folder, _ = export_of(model, tmp_path)
    signatures = tf.saved_model.load(str(folder)).signatures
    by_image = signatures["serving_default"](images=tf.constant(images.reshape(1, 28, 28, 1)))
    by_record = signatures["serve_examples"](examples=tf.constant(records(images)))
    exact = np.full((1, 256), 1 / 256, np.float32)
    np.testing.assert_array_equal(by_image["probabilities"], exact)
    np.testing.assert_array_equal(by_record["probabilities"], exact)

    off_by_one_bit = SCALE_TABLE.copy()
    off_by_one_bit[100] = np.nextafter(off_by_one_bit[100], np.float32(1))
    b.assign(-off_by_one_bit * 2.0**30)
    assert not np.array_equal(tf.nn.softmax(model(SCALE_TABLE[images])), exact)  # it would show


def test_a_record_of_another_shape_is_refused(served, exported):
    short = tf.train.Example()
    short.features.feature["image"].float_list.value.extend([0.5] * 783)
    serve = tf.saved_model.load(str(exported[1])).signatures["serve_examples"]
    with pytest.raises(tf.errors.InvalidArgumentError, match="image"):
        serve(examples=tf.constant([short.SerializeToString()]))


def test_model_json(exported):
    model, folder, description = exported
    assert json.loads((folder / "model.json").read_text()) == description
    assert list(description) == [
        "model_id",
        "weights_sha256",
        "dataset_id",
        "preset",
        "seed",
        "versions",
    ]
    assert description["dataset_id"] == DATASET_ID
    assert (description["preset"], description["seed"]) == ("core", 22)
    assert description["versions"]["digits-pipeline"] == __version__
    assert description["versions"]["tensorflow"] == tf.__version__
    assert description["weights_sha256"] == weights_sha256([w.numpy() for w in model.weights])
    assert (folder / "metrics.jsonl").read_text() == METRICS
    assert sorted(path.name for path in folder.iterdir()) == [
        "assets",
        "fingerprint.pb",
        "metrics.jsonl",
        "model.json",
        "saved_model.pb",
        "variables",
    ]


def test_a_model_has_a_name_of_its_weights_and_its_data():
    weights = [np.ones((2, 3), np.float32), np.zeros(3, np.float32)]
    others = [np.ones((2, 3), np.float32), np.full(3, 1e-9, np.float32)]
    config = PRESETS["core"]
    names = [
        describe(of, config, data)["model_id"]
        for of, data in [(weights, "a"), (weights, "b"), (others, "a"), (weights, "a")]
    ]
    assert names[0] == names[3]
    assert len(set(names)) == 3
    assert all(len(name) == 32 for name in names)


def test_weights_sha256_by_hand():
    content = b"(2, 1)" + struct.pack("<2f", 1.5, -2.0) + b"(1,)" + struct.pack("<f", 0.25)
    weights = [np.float32([[1.5], [-2.0]]), np.float32([0.25])]
    assert weights_sha256(weights) == hashlib.sha256(content).hexdigest()
    assert weights_sha256([w.astype(">f4") for w in weights]) == weights_sha256(weights)
    assert weights_sha256([weights[0].T, weights[1]]) != weights_sha256(weights)


def test_a_folder_that_holds_files_is_left_alone(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="already holds files"):
        export_of(MLP(784, (), 2, seed=0), tmp_path)
    assert helpers.tree(tmp_path / "export") == {"mine.txt": b"mine"}


def test_a_network_that_diverged_is_not_exported(tmp_path):
    model = MLP(784, (3,), CLASSES, seed=0)
    model.weights[1].assign([0.0, np.nan, 0.0])
    with pytest.raises(InputError, match="not finite"):
        export_of(model, tmp_path)
    assert not (tmp_path / "export").exists()


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        export(
            MLP(784, (), 2, seed=0),
            PRESETS["core"],
            DATASET_ID,
            tmp_path / "absent.jsonl",
            tmp_path / "export",
        )
    assert not any(tmp_path.iterdir())


def test_a_process_without_our_code_serves_the_same(exported, served, tmp_path):
    _, folder, description = exported
    asked = {}
    for size in (0, 1, 3):
        asked[f"{size}-images"] = random_images(size)
        asked[f"{size}-examples"] = np.array(records(random_images(size)), "S")
    np.savez(tmp_path / "asked.npz", **asked)
    (tmp_path / "server.py").write_text(SERVER)
    done = helpers.run_python(
        tmp_path / "server.py",
        folder,
        tmp_path / "asked.npz",
        env={"PYTHONPATH": None, "CUDA_VISIBLE_DEVICES": "-1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "ours": [],
        "signatures": ["serve_examples", "serving_default"],
    }
    answers = np.load(tmp_path / "answers.npz")
    for size in (0, 1, 3):
        for serve, given in zip(served, ("images", "examples"), strict=True):
            for name, value in serve(random_images(size)).items():
                np.testing.assert_array_equal(value, answers[f"{size}-{given}-{name}"])
    loaded = [answers[name] for name in ("w0", "b0", "w1", "b1")]
    assert weights_sha256(loaded) == description["weights_sha256"]
