"""What several test files need: small data, and commands run as a user runs them."""

import fnmatch
import gzip
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np

SCALE_TABLE = np.arange(256, dtype=np.float32) / np.float32(255)
ROOT = Path(__file__).resolve().parent.parent
# What .gitignore names, and git's own: a build's upload holds neither that file nor .git to ask.
NO_SOURCES = (
    ".git", ".venv", ".engines", "build", "dist", "*.egg-info", "__pycache__", ".pytest_cache",
    ".mypy_cache", ".ruff_cache",
)  # fmt: skip
NUM_CLASSES = 10


def source_files(root=ROOT):
    """The files that are or may be committed, as sorted names relative to the root; asks no git."""
    found = []
    for folder, folders, names in os.walk(root):
        inside = Path(folder).relative_to(root)
        ignored = NO_SOURCES if inside.parts else (*NO_SOURCES, "out")
        folders[:] = [name for name in folders if not _is_one_of(name, ignored)]
        found += [str(inside / name) for name in names if name != ".git"]  # a file in a worktree
    return sorted(found)


def _is_one_of(name, patterns):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def make_images(num_train=600, num_test=120, seed=0):
    """{"train": (images, labels), "test": ...}: uint8 [n, 28, 28], uint8 [n]; easy to learn.

    Every class has its own bright block in a noisy image; all ten classes stand in every ten rows.
    """
    random = np.random.default_rng(seed)
    data = {}
    for part, size in (("train", num_train), ("test", num_test)):
        labels = np.concatenate(
            [random.permutation(NUM_CLASSES) for _ in range(-(-size // NUM_CLASSES))]
        )[:size].astype(np.uint8)
        images = random.integers(0, 64, (size, 28, 28), np.uint8)
        for image, label in zip(images, labels, strict=True):
            top, left = 2 + 13 * (label // 5), 1 + 5 * (label % 5)
            image[top : top + 11, left : left + 5] += 160
        data[part] = (images, labels)
    return data


def idx_bytes(array):
    """A uint8 array as the content of an IDX file."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + np.ascontiguousarray(array, np.uint8).tobytes()


def write_idx(folder, data, *, gz=False, test_stem="t10k"):
    """Writes {"train": (images, labels), "test": ...} as IDX files; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for part, (images, labels) in data.items():
        stem = test_stem if part == "test" else part
        for name, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            content = idx_bytes(np.asarray(array))
            if gz:
                (folder / f"{stem}-{name}.gz").write_bytes(gzip.compress(content, mtime=0))
            else:
                (folder / f"{stem}-{name}").write_bytes(content)
    return folder


def export_linear_model(folder, seed, *, num_classes=10, scale=0.1):
    """Exports a model that knows only a weight matrix [784, C] of this seed; returns the folder."""
    import tensorflow as tf

    class Linear(tf.Module):
        def __init__(self, weights):
            super().__init__()
            self.weights = tf.Variable(weights)
            self.table = tf.constant(SCALE_TABLE)

        @tf.function(input_signature=[tf.TensorSpec([None, 28, 28, 1], tf.uint8, name="images")])
        def serve(self, images):
            x = tf.gather(self.table, tf.cast(tf.reshape(images, [-1, 784]), tf.int32))
            probabilities = tf.nn.softmax(x @ self.weights)
            return {"classes": tf.argmax(probabilities, -1), "probabilities": probabilities}

    weights = np.random.default_rng(seed).normal(0, scale, (784, num_classes))
    module = Linear(weights.astype(np.float32))
    tf.saved_model.save(module, str(folder), signatures=module.serve)
    (folder / "model.json").write_text(json.dumps({"model_id": f"m{seed}"}))
    return folder


def run_python(*args, env=None, cwd=None, timeout=300, merged=False):
    """Runs this Python with the repository importable; `env` adds variables, None removes one.

    With `merged`, stderr comes in stdout, as a person sees both.
    """
    environ = os.environ | {"PYTHONPATH": str(ROOT)} | (env or {})
    return subprocess.run(
        [sys.executable, *map(str, args)],
        env={name: str(value) for name, value in environ.items() if value is not None},
        cwd=cwd or ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if merged else subprocess.PIPE,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_cli(module, *args, **options):
    """Runs ``python -m module args``; returns the CompletedProcess with its text output."""
    return run_python("-m", module, *args, **options)


def free_ports(count):
    """Numbers of ports on this machine that nobody listened on a moment ago."""
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def tree(folder):
    """{relative name: content} of every file under a folder, hidden ones included."""
    folder = Path(folder)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
