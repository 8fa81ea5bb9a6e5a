"""What a run is: a frozen config, and the named presets it starts from."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal

# With `reproducible`, a batch is cut in this many parts, on however many replicas.
VIRTUAL_SHARDS = 4


def _about(text: str, default: Any = dataclasses.MISSING) -> Any:
    """A field with its description, which is also the help text of its flag."""
    return dataclasses.field(default=default, metadata={"about": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the weights, given a dataset, and how fast they are found."""

    preset: str = _about("the name this started from")

    hidden_units: tuple[int, ...] = _about("width of each hidden layer")
    activation: Literal["relu", "sigmoid", "tanh", "identity"] = _about(
        "after each hidden layer", "relu"
    )
    initializer: Literal["xavier", "he", "normal"] = _about("of the weights", "xavier")
    dropout: float = _about("share of each hidden layer's outputs to drop in a step", 0.0)

    loss: Literal["softmax", "sigmoid"] = _about(
        "cross-entropy of one choice among the classes, or of a yes or no for each", "softmax"
    )
    labels: Literal["integer", "one_hot"] = _about("how the loss is given them", "integer")
    label_smoothing: float = _about("share of each label spread evenly over all answers", 0.0)

    optimizer: Literal["sgd", "rmsprop", "adam", "adamw"] = _about("the update rule", "adam")
    learning_rate: float = _about("the optimizer's step size, at its highest")
    momentum: float = _about("of sgd and rmsprop: share of the last step in the next", 0.0)
    rho: float = _about("of rmsprop: decay of the mean of squared gradients", 0.9)
    beta_1: float = _about("of adam and adamw: decay of the mean of gradients", 0.9)
    beta_2: float = _about("of adam and adamw: decay of the mean of squared gradients", 0.999)
    epsilon: float = _about("added to the denominator of rmsprop, adam and adamw", 1e-7)
    weight_decay: float = _about("of adamw: share of a weight taken off, times the rate", 0.0)

    schedule: Literal["constant", "step", "cosine"] = _about("of the learning rate", "constant")
    warmup_epochs: float = _about("epochs in which the rate rises from 0, straight", 0.0)
    decay_epochs: float = _about("of schedule step: epochs from one drop to the next", 10.0)
    decay_factor: float = _about("of schedule step: what the rate is multiplied by", 0.1)

    ema_decay: float = _about("of the moving average of the weights; 0: none", 0.0)
    clip_norm: float = _about("longest gradient, all weights together; 0: any", 0.0)
    gradients: Literal["tape", "manual"] = _about(
        "through tf.GradientTape, or by the backward pass derived by hand", "tape"
    )

    rotate: float = _about("images: rotation to either side, in degrees", 0.0)
    scale: float = _about("images: growth or shrinking, as a share of the size", 0.0)
    shear: float = _about("images: slant to either side, in pixels a pixel", 0.0)
    shift: float = _about("images: shift to any side, in pixels", 0.0)
    elastic_alpha: float = _about("images: strength of the elastic deformation, in pixels", 0.0)
    elastic_sigma: float = _about("images: its smoothness, in pixels", 0.0)
    calm_epochs: int = _about("last epochs, in which images are deformed half as much", 0)

    train_on: Literal["train", "train+validation"] = _about("the splits to learn from", "train")
    patience: int = _about("epochs without a better validation before stopping; 0: never", 0)
    batch_size: int = _about("examples in a step, over all replicas")
    epochs: int = _about("passes over the examples")
    seed: int = _about("decides initial weights, order, dropout and deformations", 22)

    replicas: int | None = _about("copies of the model; none: every visible GPU, else one", None)
    reproducible: bool = _about("the same weights from any number of replicas", False)
    input: Literal["auto", "resident", "stream"] = _about(
        "keep the examples on the device, or stream them; auto: keep up to 1/8 of memory",
        "auto",
    )
    tf32: bool = _about("let GPUs round factors of matrix products to 10 bits", False)
    steps_per_call: int = _about("steps between looks at progress and signals, at most", 100)

    # In a config, the model's weights_sha256.
    initial_weights: str | None = _about("an exported model to take the first weights from", None)


PRESETS = {
    # The network and recipe of TensorFlow's Core-API tutorial, on a rate that falls to 0: at a
    # constant one, what the last of its steps comes to differs by a per cent.
    "core": TrainConfig(
        preset="core",
        hidden_units=(700, 500),
        learning_rate=1e-3,
        schedule="cosine",
        batch_size=128,
        epochs=10,
    ),
    "compact": TrainConfig(
        preset="compact",
        hidden_units=(128, 128),
        labels="one_hot",
        optimizer="rmsprop",
        learning_rate=1e-3,
        schedule="cosine",
        batch_size=64,
        epochs=21,
    ),
    "accurate": TrainConfig(
        preset="accurate",
        hidden_units=(700, 500),
        label_smoothing=0.1,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=0.05,
        schedule="cosine",
        rotate=12.0,
        scale=0.12,
        shear=0.12,
        shift=2.0,
        elastic_alpha=36.0,
        elastic_sigma=5.5,
        calm_epochs=50,
        train_on="train+validation",
        batch_size=256,
        epochs=250,
    ),
    # Four points, each an epoch's one batch; see trainer/xor.py.
    "xor": TrainConfig(
        preset="xor",
        hidden_units=(4,),
        activation="sigmoid",
        loss="sigmoid",
        labels="one_hot",
        optimizer="sgd",
        learning_rate=1.0,
        momentum=0.9,
        gradients="manual",
        batch_size=4,
        epochs=2000,
    ),
}


def choices(name: str) -> tuple[str, ...]:
    """The values that a setting is chosen from; () for one that is not."""
    hint = typing.get_type_hints(TrainConfig)[name]
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
