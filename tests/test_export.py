import dataclasses
import hashlib
import json
import struct
from types import SimpleNamespace

import helpers
import numpy as np
import numpy_twin
import pytest
import tensorflow as tf
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tensorflow.core.framework import tensor_pb2

from pipeline import __version__
from pipeline.command import InputError
from pipeline.dataset import load_manifest
from pipeline.records import SCALE_TABLE, encode_record, read_frames
from trainer import fresh_check, run_folder, warmup
from trainer.checkpoints import Progress
from trainer.config import PRESETS
from trainer.export import describe, export, weights_sha256
from trainer.fresh_check import ExportError, compare
from trainer.model import MLP

METRICS = '{"epoch": 1, "loss": 0.5}\n'
CLASSES = 7
CONFIG = dataclasses.replace(PRESETS["core"], replicas=1, input="resident")


def random_images(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (size, 28, 28, 1), np.uint8)


def records(images):
    return [encode_record(image.tobytes(), 3, "id") for image in images]


class Kept:
    """In place of a process of its own, which costs seconds: one that was kept from before."""

    def __init__(self, answers):
        self.answers = answers

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, folder, images):
        answers = {}
        loaded = tf.saved_model.load(str(folder))
        for i, weight in enumerate(loaded.weights):
            answers[f"weight_{i}"] = weight.numpy()
        pixels = np.rint(images * 255).astype(np.uint8)
        given = {
            "serving_default": {"images": tf.constant(pixels.reshape(-1, 28, 28, 1))},
            "serve_examples": {"examples": tf.constant(records(pixels), tf.string)},
        }
        for name, arguments in given.items():
            for output, value in loaded.signatures[name](**arguments).items():
                answers[f"{name}/{output}"] = value.numpy()
        return answers | self.answers


@pytest.fixture
def in_process(monkeypatch):
    """Lets exports be checked in this process; gives what to answer instead."""
    instead = {}
    monkeypatch.setattr("trainer.export.fresh_process", lambda: Kept(instead))
    return instead


@pytest.fixture(scope="session")
def manifest(small_dataset):
    return load_manifest(small_dataset)


def export_of(model, folder, manifest=None, progress=None):
    places = run_folder.places(folder, {}, {})
    places.metrics.write_text(METRICS)
    manifest = manifest or SimpleNamespace(
        dataset_id="d", source={}, split_by="hash", class_names=(), splits={}
    )
    weights = [weight.numpy() for weight in model.weights]
    description = describe(
        weights, CONFIG, manifest, progress or Progress(epoch=10), devices=["CPU:0"]
    )
    images = SCALE_TABLE[random_images(5, seed=9).reshape(5, 784)]
    export(model.apply, weights, description, places, images)
    return places.model, description


@pytest.fixture(scope="module")
def exported(tmp_path_factory, manifest):
    """A model that was exported with all that belongs to it, a fresh process included."""
    model = MLP(784, (9,), CLASSES, activation="tanh", seed=5)
    for b in model.weights[1::2]:
        b.assign(tf.random.stateless_normal(b.shape, (1, 2)))
    progress = Progress(epoch=12, best_epoch=7)
    return (model, *export_of(model, tmp_path_factory.mktemp("exported"), manifest, progress))


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
    w0, b0, w1, b1 = (weight.numpy().astype(np.float64) for weight in exported[0].weights)
    images = random_images(200)
    logits = np.tanh(images.reshape(-1, 784) / 255 @ w0 + b0) @ w1 + b1
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


def test_pixels_are_scaled_exactly(tmp_path, in_process):
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


def test_model_json(exported, manifest):
    model, folder, description = exported
    assert json.loads((folder / "model.json").read_text()) == description
    assert list(description) == [
        "model_id",
        "weights_sha256",
        "dataset_id",
        "learned_from",
        "preset",
        "seed",
        "config",
        "devices",
        "epochs_trained",
        "epoch_exported",
        "parameters",
        "dataset",
        "versions",
    ]
    assert description["dataset_id"] == manifest.dataset_id
    own = {"dataset_id": manifest.dataset_id, "splits": ["train"]}
    assert description["learned_from"] == [own]
    assert (description["preset"], description["seed"]) == ("core", 22)
    assert description["config"] == dataclasses.asdict(CONFIG) | {"hidden_units": [700, 500]}
    assert description["devices"] == ["CPU:0"]
    assert (description["epochs_trained"], description["epoch_exported"]) == (12, 7)
    assert description["parameters"] == 784 * 9 + 9 + 9 * 7 + 7
    assert description["dataset"] == {
        "source": manifest.source,
        "split_by": "positional",
        "class_names": [str(i) for i in range(10)],
        "num_examples": {"train": 500, "validation": 100, "test": 120},
    }
    assert description["versions"]["digits-pipeline"] == __version__
    assert description["versions"]["tensorflow"] == tf.__version__
    assert description["weights_sha256"] == weights_sha256([w.numpy() for w in model.weights])
    assert (folder / "metrics.jsonl").read_text() == METRICS
    assert sorted(path.name for path in folder.iterdir()) == [
        "assets",
        "assets.extra",
        "checksums.json",
        "fingerprint.pb",
        "metrics.jsonl",
        "model.json",
        "saved_model.pb",
        "variables",
    ]


def test_every_file_is_noted_with_size_and_checksum(exported):
    files = helpers.tree(exported[1])
    noted = json.loads(files.pop("checksums.json"))
    assert "variables/variables.data-00000-of-00001" in noted
    assert noted == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }


def test_a_model_has_a_name_of_its_weights_and_its_data(manifest):
    weights = [np.ones((2, 3), np.float32), np.zeros(3, np.float32)]
    others = [np.ones((2, 3), np.float32), np.full(3, 1e-9, np.float32)]
    another = dataclasses.replace(manifest, dataset_id="another")
    names = [
        describe(of, CONFIG, data, Progress(epoch=1))["model_id"]
        for of, data in [
            (weights, manifest),
            (weights, another),
            (others, manifest),
            (weights, manifest),
        ]
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


def test_a_folder_that_holds_files_is_left_alone(tmp_path, in_process):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="already holds files"):
        export_of(MLP(784, (), 2, seed=0), tmp_path)
    assert helpers.tree(tmp_path / "export") == {"mine.txt": b"mine"}


def test_a_model_of_fewer_epochs_is_replaced(tmp_path, in_process):
    _, before = export_of(MLP(784, (), 2, seed=0), tmp_path)
    folder, after = export_of(MLP(784, (), 2, seed=1), tmp_path)
    assert before["weights_sha256"] != after["weights_sha256"]
    assert json.loads((folder / "model.json").read_text()) == after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "metrics.jsonl"]


def test_a_network_that_diverged_is_not_exported(tmp_path):
    model = MLP(784, (3,), CLASSES, seed=0)
    model.weights[1].assign([0.0, np.nan, 0.0])
    with pytest.raises(InputError, match="not finite"):
        export_of(model, tmp_path)
    assert not (tmp_path / "export").exists()


# In a fresh process


def test_what_answers_otherwise_is_not_published(tmp_path, in_process):
    in_process["weight_0"] = np.zeros((784, 2), np.float32)
    with pytest.raises(ExportError, match="weight 0 is not the trained one"):
        export_of(MLP(784, (), 2, seed=0), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_cannot_be_loaded_is_not_published(tmp_path):
    (tmp_path / "variables").mkdir()
    (tmp_path / "saved_model.pb").write_bytes(b"not a model")
    with (
        fresh_check.fresh_process() as process,
        pytest.raises(ExportError, match=r"cannot be loaded and asked:\n(.|\n)*saved_model.pb"),
    ):
        process.ask(tmp_path, np.zeros((1, 784), np.float32))


def answers(**changed):
    probabilities = np.float32([[0.25, 0.75], [0.5, 0.5]])
    found = {"weight_0": np.float32([1, 2])}
    for signature in ("serving_default", "serve_examples"):
        found[f"{signature}/probabilities"] = probabilities
        found[f"{signature}/classes"] = np.array([1, 0])
    return found | {name.replace("__", "/"): value for name, value in changed.items()}


EXPECTED = [np.float32([1, 2])], np.float32([[0.25, 0.75], [0.5, 0.5]])
NEXT = np.nextafter(np.float32(0.25), np.float32(1))


def test_equal_answers_pass():
    compare(answers(), *EXPECTED)
    close = np.float32([[NEXT, 0.75], [0.5, 0.5]])
    both = {f"{name}__probabilities": close for name in ("serving_default", "serve_examples")}
    compare(answers(**both), *EXPECTED)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight_0": np.float32([1, np.nextafter(np.float32(2), 3)])}, "weight 0"),
        ({"serving_default__probabilities": np.float32([[0.26, 0.74], [0.5, 0.5]])}, "0.01"),
        ({"serving_default__probabilities": np.float32([[np.nan, 0.75], [0.5, 0.5]])}, "nan"),
        ({"serving_default__probabilities": np.float32([[0.25, 0.75]])}, r"\(1, 2\)"),
        ({"serve_examples__classes": np.array([0, 0])}, "not the likeliest"),
        (
            {"serve_examples__probabilities": np.float32([[NEXT, 0.75], [0.5, 0.5]])},
            "images and records do not give the same probabilities",
        ),
    ],
)
def test_other_answers_do_not(changed, message):
    with pytest.raises(ExportError, match=message):
        compare(answers(**changed), *EXPECTED)


# The warm-up file


def serving_messages():
    """TensorFlow Serving's messages, as far as the file has any of them; by name."""
    file = descriptor_pb2.FileDescriptorProto(
        name="serving_subset.proto",
        package="tensorflow.serving",
        syntax="proto3",
        dependency=[tensor_pb2.DESCRIPTOR.name],
    )
    text, sub = descriptor_pb2.FieldDescriptorProto.TYPE_STRING, "TYPE_MESSAGE"

    def add(name, *fields, into=None):
        made = (into.nested_type if into else file.message_type).add(name=name)
        for number, field, kind, *repeated in fields:
            made.field.add(
                name=field,
                number=number,
                type=text if kind is str else getattr(descriptor_pb2.FieldDescriptorProto, sub),
                type_name=None if kind is str else kind,
                label=3 if repeated else 1,
            )
        return made

    add("ModelSpec", (1, "name", str), (3, "signature_name", str))
    request = add(
        "PredictRequest",
        (1, "model_spec", ".tensorflow.serving.ModelSpec"),
        (2, "inputs", ".tensorflow.serving.PredictRequest.InputsEntry", "repeated"),
    )
    entry = add(
        "InputsEntry", (1, "key", str), (2, "value", ".tensorflow.TensorProto"), into=request
    )
    entry.options.map_entry = True
    add("PredictLog", (1, "request", ".tensorflow.serving.PredictRequest"))
    add("PredictionLog", (6, "predict_log", ".tensorflow.serving.PredictLog"))
    pool = descriptor_pool.Default()
    pool.Add(file)
    return message_factory.GetMessageClass(
        pool.FindMessageTypeByName("tensorflow.serving.PredictionLog")
    )


def test_the_warm_up_requests_are_answered(exported):
    folder = exported[1]
    content = (folder / "assets.extra" / "tf_serving_warmup_requests").read_bytes()
    prediction_log = serving_messages()
    signatures = tf.saved_model.load(str(folder)).signatures
    asked = []
    for record in read_frames(content, "warmup"):
        log = prediction_log.FromString(record)
        assert log.SerializeToString() == record  # nothing in it that the messages do not know
        request = log.predict_log.request
        name = request.model_spec.signature_name
        given = {key: tf.constant(tf.make_ndarray(v)) for key, v in request.inputs.items()}
        answer = signatures[name](**given)
        asked.append((name, *given, len(answer["classes"])))
    assert asked == [
        ("serving_default", "images", 1),
        ("serve_examples", "examples", 1),
        ("serving_default", "images", 32),
        ("serve_examples", "examples", 32),
    ]
    path = str(folder / warmup.WARMUP_FILE)
    assert len(list(tf.data.TFRecordDataset(path))) == len(asked)
