"""The requests that TensorFlow Serving answers by itself before it takes others.

Their messages belong to TensorFlow Serving, whose package is not needed for anything else, so
their few fields are written out here:

    PredictionLog   predict_log = 6        tensorflow_serving/apis/prediction_log.proto
    PredictLog      request = 1
    PredictRequest  model_spec = 1, inputs = 2 (a map: key = 1, value = 2)      predict.proto
    ModelSpec       signature_name = 3                                          model.proto
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from pipeline.dataset import IMAGE_SHAPE, NUM_PIXELS
from pipeline.records import encode_record, frame, message

WARMUP_FILE = "assets.extra/tf_serving_warmup_requests"
BATCHES = (1, 32)  # as single requests come, and as a server gathers them


def requests() -> bytes:
    """The content of the warm-up file: TFRecords, for each signature one of each batch."""
    found = b""
    for size in BATCHES:
        images = np.zeros((size, *IMAGE_SHAPE), np.uint8)
        records = [encode_record(bytes(NUM_PIXELS), 0, "warmup")] * size
        for signature, name, values in (
            ("serving_default", "images", images),
            ("serve_examples", "examples", records),
        ):
            found += frame(prediction_log(signature, {name: tf.make_tensor_proto(values)}))
    return found


def prediction_log(signature: str, inputs: dict[str, tf.compat.v1.TensorProto]) -> bytes:
    """One request as a serialized PredictionLog."""
    request = message(1, message(3, signature.encode()))
    for name, value in inputs.items():
        entry = message(1, name.encode()) + message(2, value.SerializeToString())
        request += message(2, entry)
    return message(6, message(1, request))
