"""The trainer's mathematics once more, in NumPy float64 and by the book: what tests compare with.

Weights are lists ``[w, b, w, b, ...]``, as `MLP.weights`. Labels are integers [n], or the wanted
answers [n, C]. `noise`, where dropout is meant, holds what each hidden layer's outputs are
multiplied by.
"""

import numpy as np
import scipy.special

# Each activation, and its slope at x.
ACTIVATIONS = {
    "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0) * 1.0),
    "sigmoid": (scipy.special.expit, lambda x: scipy.special.expit(x) * scipy.special.expit(-x)),
    "tanh": (np.tanh, lambda x: 1 / np.cosh(x) ** 2),
    "identity": (lambda x: x, np.ones_like),
}


def forward(weights, x, *, activation="relu", noise=None):
    """The input of every layer, and the logits."""
    inputs, logits, _ = _forward(weights, x, activation, noise)
    return inputs, logits


def _forward(weights, x, activation, noise):
    """The input of every layer, the logits, and the slope of what led to each input."""
    function, slope = ACTIVATIONS[activation]
    inputs, slopes = [x], [None]
    for i, (w, b) in enumerate(zip(weights[0::2], weights[1::2], strict=True)):
        x = inputs[-1] @ w + b
        if 2 * i + 2 < len(weights):
            factor = 1 if noise is None else noise[i]
            inputs.append(function(x) * factor)
            slopes.append(slope(x) * factor)
    return inputs, x, slopes


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def answers(labels, classes, loss, smoothing):
    """The wanted answers as the loss compares them: [n, C]."""
    wanted = np.eye(classes)[labels] if labels.ndim == 1 else labels.astype(np.float64)
    even = 1 / classes if loss == "softmax" else 1 / 2
    return (1 - smoothing) * wanted + smoothing * even


def losses(weights, x, labels, *, activation="relu", loss="softmax", smoothing=0.0, noise=None):
    """The cross-entropy of each row."""
    _, logits = forward(weights, x, activation=activation, noise=noise)
    wanted = answers(labels, logits.shape[-1], loss, smoothing)
    if loss == "softmax":
        return -(wanted * np.log(softmax(logits))).sum(axis=-1)
    yes = scipy.special.log_expit(logits)
    no = scipy.special.log_expit(-logits)
    return -(wanted * yes + (1 - wanted) * no).sum(axis=-1)


def correct(weights, x, labels):
    """How many rows are right."""
    _, logits = forward(weights, x)
    return int((logits.argmax(axis=-1) == labels).sum())


def gradients(weights, x, labels, *, activation="relu", loss="softmax", smoothing=0.0, noise=None):
    """The gradients of the mean of `losses`."""
    inputs, logits, slopes = _forward(weights, x, activation, noise)
    answered = softmax(logits) if loss == "softmax" else scipy.special.expit(logits)
    flow = (answered - answers(labels, logits.shape[-1], loss, smoothing)) / len(labels)
    found = []
    for i in reversed(range(len(inputs))):
        found = [inputs[i].T @ flow, flow.sum(axis=0), *found]
        if i:
            flow = (flow @ weights[2 * i].T) * slopes[i]
    return found


class Sgd:
    """Velocity: a share of the last step, and a step down the gradient."""

    names = ("velocity",)

    def __init__(self, weights, *, learning_rate, momentum=0.0):
        self.learning_rate, self.momentum = learning_rate, momentum
        self.velocity = [np.zeros_like(w, np.float64) for w in weights]

    def step(self, weights, found):
        """The weights after one step."""
        self.velocity = [
            self.momentum * v - self.learning_rate * g
            for v, g in zip(self.velocity, found, strict=True)
        ]
        return [w + v for w, v in zip(weights, self.velocity, strict=True)]


class RmsProp:
    """Each gradient over the root of its running mean square."""

    names = ("v", "velocity")

    def __init__(self, weights, *, learning_rate, rho=0.9, momentum=0.0, epsilon=1e-7):
        self.learning_rate, self.rho, self.momentum = learning_rate, rho, momentum
        self.epsilon = epsilon
        self.v = [np.zeros_like(w, np.float64) for w in weights]
        self.velocity = [np.zeros_like(w, np.float64) for w in weights]

    def step(self, weights, found):
        """The weights after one step."""
        stepped = []
        for i, (w, g) in enumerate(zip(weights, found, strict=True)):
            self.v[i] = self.rho * self.v[i] + (1 - self.rho) * g**2
            down = self.learning_rate * g / np.sqrt(self.v[i] + self.epsilon)
            self.velocity[i] = self.momentum * self.velocity[i] - down
            stepped.append(w + self.velocity[i])
        return stepped


class Adam:
    """Algorithm 1 of Kingma and Ba; with weight decay, algorithm 2 of Loshchilov and Hutter."""

    names = ("m", "v")

    def __init__(
        self, weights, *, learning_rate, beta_1=0.9, beta_2=0.999, epsilon=1e-7, weight_decay=0.0
    ):
        self.learning_rate, self.beta_1, self.beta_2 = learning_rate, beta_1, beta_2
        self.epsilon, self.weight_decay = epsilon, weight_decay
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
            way = m_hat / (np.sqrt(v_hat) + self.epsilon) + self.weight_decay * w
            stepped.append(w - self.learning_rate * way)
        return stepped


OPTIMIZERS = {"sgd": Sgd, "rmsprop": RmsProp, "adam": Adam, "adamw": Adam}


def slots(optimizer):
    """For each weight, the slots of an optimizer."""
    return [
        list(pair) for pair in zip(*(getattr(optimizer, n) for n in optimizer.names), strict=True)
    ]
