"""The network: dense layers on `tf.Module`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import tensorflow as tf

Activation = Callable[[tf.Tensor], tf.Tensor]


def identity(x: tf.Tensor) -> tf.Tensor:
    """The activation of an output layer: logits as they are."""
    return x


def relu(x: tf.Tensor) -> tf.Tensor:
    """max(x, 0), element by element."""
    return tf.maximum(x, 0.0)


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
    # Named, because the default generator differs between eager and compiled code.
    return tf.random.stateless_uniform(shape, seed, -bound, bound, alg="philox")


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
        seed: tuple[int, int],
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.activation = activation
        self.w = tf.Variable(xavier_uniform((inputs, outputs), seed), name="w")
        self.b = tf.Variable(tf.zeros(outputs), name="b")

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """float32 [n, inputs] -> float32 [n, outputs]."""
        return self.apply(self.w, self.b, x)

    def apply(self, w: tf.Tensor, b: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        """The same of weights given as values: a pure function."""
        return self.activation(x @ w + b)


class MLP(tf.Module):
    """A multilayer perceptron: ReLU after every layer but the last, which gives logits.

    Attributes:
        layers: the dense layers, in order.
    """

    def __init__(
        self, inputs: int, hidden_units: Sequence[int], num_classes: int, *, seed: int
    ) -> None:
        super().__init__(name="mlp")
        widths = [inputs, *hidden_units, num_classes]
        self.layers = [
            DenseLayer(
                widths[i],
                widths[i + 1],
                activation=relu if i < len(hidden_units) else identity,
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

    def apply(self, weights: Sequence[tf.Tensor], images: tf.Tensor) -> tf.Tensor:
        """The same of weights given as values, in the order of `weights`: a pure function."""
        x = images
        for layer, w, b in zip(self.layers, weights[0::2], weights[1::2], strict=True):
            x = layer.apply(w, b, x)
        return x
