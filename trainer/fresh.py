"""Loads a SavedModel as a server does, with none of this project's code, and queries it.

Reads the name of a folder in one line of stdin, then the arrays to ask with; writes what each
signature answers, and the weights, to stdout. TensorFlow is imported before stdin is read, so
that the process can be started while the model is still being written, and without Keras, which
a server does not have either. It ends with its parent: there is nothing more to read then.
"""

import io
import sys

import numpy as np

INPUTS = {"serving_default": "images", "serve_examples": "examples"}


def main() -> None:
    """Answers one request."""
    sys.modules["keras"] = None  # type: ignore[assignment]  # TensorFlow takes it as not installed
    import tensorflow as tf

    folder = sys.stdin.buffer.readline().decode().rstrip("\n")
    asked = sys.stdin.buffer.read()
    if not folder or not asked:
        sys.exit("nothing was asked")
    arrays = np.load(io.BytesIO(asked))
    loaded = tf.saved_model.load(folder)
    answers = {f"weight_{i}": w.numpy() for i, w in enumerate(loaded.weights)}
    for signature, name in INPUTS.items():
        given = arrays[name].astype(object) if name == "examples" else arrays[name]
        for output, value in loaded.signatures[signature](**{name: tf.constant(given)}).items():
            answers[f"{signature}/{output}"] = value.numpy()
    held = io.BytesIO()
    np.savez(held, **answers)
    sys.stdout.buffer.write(held.getvalue())


if __name__ == "__main__":
    main()
