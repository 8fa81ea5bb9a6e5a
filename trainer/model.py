"""The network: dense layers on `tf.Module`, their activations, first weights and dropout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

Activation = Callable[[tf.Tensor], tf.Tensor]
Initializer = Callable[[tuple[int, int], tuple[int, int]], tf.Tensor]
# (hidden layer, its outputs [n, width]) -> what to multiply them by, of the same shape
Noise = Callable[[int, tf.Tensor], tf.Tensor]

NORMAL_DEVIATION = 0.05  # of the plain normal initialiser


def identity(x: tf.Tensor) -> tf.Tensor:
    """x; also the activation of an output layer: logits as they are."""
    return x


def relu(x: tf.Tensor) -> tf.Tensor:
    """max(x, 0), element by element, with a slope of 0 at 0; NaN stays NaN."""
    return tf.where(x <= 0.0, 0.0, x)


def sigmoid(x: tf.Tensor) -> tf.Tensor:
    """1 / (1 + exp(-x)), element by element.

    Below 0 it is exp(x) / (1 + exp(x)), so that no exponential overflows, in the value or in its
    gradient. The sign is chosen with `where`, because the tape gives `abs` no slope at 0.
    """
    small = tf.exp(tf.where(x >= 0.0, -x, x))
    return tf.where(x >= 0.0, 1.0, small) / (1.0 + small)


ACTIVATIONS: dict[str, Activation] = {
    "relu": relu,
    "sigmoid": sigmoid,
    "tanh": tf.tanh,
    "identity": identity,
}


# The generator is named below, because the default one depends on the device and the compiler.


def xavier_uniform(shape: tuple[int, int], seed: tuple[int, int]) -> tf.Tensor:
    """Draws weights from U(-a, a), a = sqrt(6 / (inputs + outputs)).

    Keeps the variance of activations and of gradients about equal from layer to layer.
    Source: Glorot and Bengio 2010, "Understanding the difficulty of training deep feedforward
    neural networks", equation 16.

    Args:
        shape: (inputs, outputs).
        seed: two integers; equal seeds give equal weights.

    Returns:
        float32 of this shape.
    """
    bound = math.sqrt(6 / sum(shape))
    return tf.random.stateless_uniform(shape, seed, -bound, bound, alg="philox")


def he_normal(shape: tuple[int, int], seed: tuple[int, int]) -> tf.Tensor:
    """Draws weights from N(0, 2 / inputs): Xavier's idea, where ReLU halves the variance.

    Source: He et al. 2015, "Delving Deep into Rectifiers", equation 10. Arguments and result are
    those of `xavier_uniform`.
    """
    return tf.random.stateless_normal(shape, seed, 0.0, math.sqrt(2 / shape[0]), alg="philox")


def plain_normal(shape: tuple[int, int], seed: tuple[int, int]) -> tf.Tensor:
    """Draws weights from N(0, 0.05 ** 2), whatever the shape; else as `xavier_uniform`."""
    return tf.random.stateless_normal(shape, seed, 0.0, NORMAL_DEVIATION, alg="philox")


INITIALIZERS: dict[str, Initializer] = {
    "xavier": xavier_uniform,
    "he": he_normal,
    "normal": plain_normal,
}


def dropout_noise(rate: float, seed: int, key: tf.Tensor) -> Noise | None:
    """Makes the noise of dropout: 0 with probability `rate`, else 1 / (1 - rate).

    The division keeps the expected output what it is without dropout, so that nothing has to be
    scaled when the network is used. The noise depends on the arguments and the layer alone.

    Source: Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from
    Overfitting", in the form of its section 10.

    Args:
        rate: from 0, which gives None, to below 1.
        seed: the run's, below 2**31.
        key: int32 [2], (step, share of the batch), neither negative.
    """
    if not rate:
        return None
    step, share = tf.unstack(tf.cast(key, tf.int64))
    threshold = tf.constant(min(round(rate * 2**32), 2**32 - 1), tf.uint32)

    def noise(layer: int, outputs: tf.Tensor) -> tf.Tensor:
        words = tf.stack([seed + layer * 2**32, step + share * 2**32])
        # Compared as integers, because XLA makes other floats of the same random bits.
        bits = tf.random.stateless_uniform(
            tf.shape(outputs), words, None, None, tf.uint32, alg="philox"
        )
        return tf.where(bits < threshold, 0.0, 1.0 / (1.0 - rate))

    return noise


class DenseLayer(tf.Module):
    """``activation(x @ w + b)``.

    Attributes:
        w: float32 [inputs, outputs].
        b: float32 [outputs], zero at first.
        activation: applied to every element.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        activation: Activation,
        initializer: Initializer = xavier_uniform,
        seed: tuple[int, int],
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.activation = activation
        self.w = tf.Variable(initializer((inputs, outputs), seed), name="w")
        self.b = tf.Variable(tf.zeros(outputs), name="b")

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """float32 [n, inputs] -> float32 [n, outputs]."""
        return self.apply(self.w, self.b, x)

    def apply(self, w: tf.Tensor, b: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        """The same of weights given as values: a pure function."""
        return self.activation(x @ w + b)


class Pass(NamedTuple):
    """What went through one layer.

    Attributes:
        inputs: float32 [n, inputs].
        outputs: float32 [n, outputs], after the activation, before dropout.
        noise: what dropout multiplied the outputs by; None: nothing.
    """

    inputs: tf.Tensor
    outputs: tf.Tensor
    noise: tf.Tensor | None


class MLP(tf.Module):
    """A multilayer perceptron: an activation after every layer but the last, which gives logits.

    Attributes:
        layers: the dense layers, in order.
    """

    def __init__(
        self,
        inputs: int,
        hidden_units: Sequence[int],
        num_classes: int,
        *,
        activation: str = "relu",
        initializer: str = "xavier",
        seed: int,
    ) -> None:
        super().__init__(name="mlp")
        widths = [inputs, *hidden_units, num_classes]
        self.layers = [
            DenseLayer(
                widths[i],
                widths[i + 1],
                activation=ACTIVATIONS[activation] if i < len(hidden_units) else identity,
                initializer=INITIALIZERS[initializer],
                seed=(seed, i),
                name=f"dense_{i}",
            )
            for i in range(len(widths) - 1)
        ]

    @property
    def weights(self) -> list[tf.Variable]:
        """Every variable, layer by layer: w, b, w, b, ..."""
        return [variable for layer in self.layers for variable in (layer.w, layer.b)]

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        """float32 [n, inputs] -> logits float32 [n, C]."""
        return self.apply(self.weights, images)

    def apply(
        self, weights: Sequence[tf.Tensor], images: tf.Tensor, dropout: Noise | None = None
    ) -> tf.Tensor:
        """The same of weights given as values, in the order of `weights`: a pure function."""
        return self.trace(weights, images, dropout)[-1].outputs

    def trace(
        self, weights: Sequence[tf.Tensor], images: tf.Tensor, dropout: Noise | None = None
    ) -> list[Pass]:
        """What goes through each layer; the outputs of the last are the logits.

        Args:
            weights: values in the order of `weights`.
            images: float32 [n, inputs].
            dropout: gives what the outputs of each hidden layer are multiplied by; None: nothing.
        """
        x, passes = images, []
        pairs = zip(self.layers, weights[0::2], weights[1::2], strict=True)
        for i, (layer, w, b) in enumerate(pairs):
            outputs = layer.apply(w, b, x)
            hidden = i < len(self.layers) - 1
            noise = dropout(i, outputs) if dropout is not None and hidden else None
            passes.append(Pass(x, outputs, noise))
            x = outputs if noise is None else outputs * noise
        return passes
