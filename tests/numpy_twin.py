"""The trainer's mathematics once more, in NumPy float64 and by the book: what tests compare with.

Weights are lists ``[w, b, w, b, ...]``, as `MLP.weights`.
"""

import numpy as np


def forward(weights, x):
    """The input of every layer, and the logits."""
    inputs = []
    for w, b in zip(weights[0::2], weights[1::2], strict=True):
        inputs.append(x if not inputs else np.maximum(x, 0))
        x = inputs[-1] @ w + b
    return inputs, x


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def losses(weights, x, labels):
    """The cross-entropy of each row."""
    _, logits = forward(weights, x)
    return -np.log(softmax(logits)[np.arange(len(labels)), labels])


def correct(weights, x, labels):
    """How many rows are right."""
    _, logits = forward(weights, x)
    return int((logits.argmax(axis=-1) == labels).sum())


def gradients(weights, x, labels):
    """The gradients of the mean of `losses`."""
    inputs, logits = forward(weights, x)
    flow = softmax(logits)
    flow[np.arange(len(labels)), labels] -= 1
    flow /= len(labels)
    found = []
    for layer_input, w in zip(reversed(inputs), reversed(weights[0::2]), strict=True):
        found = [layer_input.T @ flow, flow.sum(axis=0), *found]
        flow = (flow @ w.T) * (layer_input > 0)
    return found


class Adam:
    """Algorithm 1 of Kingma and Ba."""

    def __init__(self, weights, *, learning_rate, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
        self.learning_rate, self.beta_1, self.beta_2 = learning_rate, beta_1, beta_2
        self.epsilon = epsilon
        self.t = 0
        self.m = [np.zeros_like(w, np.float64) for w in weights]
        self.v = [np.zeros_like(w, np.float64) for w in weights]

    def step(self, weights, found):
        """The weights after one step."""
        self.t += 1
        stepped = []
        for i, (w, g) in enumerate(zip(weights, found, strict=True)):
            self.m[i] = self.beta_1 * self.m[i] + (1 - self.beta_1) * g
            self.v[i] = self.beta_2 * self.v[i] + (1 - self.beta_2) * g**2
            m_hat = self.m[i] / (1 - self.beta_1**self.t)
            v_hat = self.v[i] / (1 - self.beta_2**self.t)
            stepped.append(w - self.learning_rate * m_hat / (np.sqrt(v_hat) + self.epsilon))
        return stepped
