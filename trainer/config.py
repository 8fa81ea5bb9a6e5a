"""What a run is: a frozen config, and the named presets it starts from."""

from __future__ import annotations

import dataclasses

from pipeline.command import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the weights, given a dataset, and how fast they are found.

    Attributes:
        preset: the name this started from.
        hidden_units: width of each hidden layer.
        learning_rate: Adam's step size.
        beta_1: decay of Adam's mean of gradients.
        beta_2: decay of Adam's mean of squared gradients.
        epsilon: added to Adam's denominator.
        batch_size: the global batch, over all replicas.
        epochs: passes over the train split.
        seed: decides the initial weights and the order of the examples.
        replicas: copies of the model that share each global batch; None: every visible GPU,
            else one CPU.
        steps_per_call: steps in one call of the compiled function; progress, and a request to
            stop, are seen between calls.
    """

    preset: str
    hidden_units: tuple[int, ...]
    learning_rate: float
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7
    batch_size: int
    epochs: int
    seed: int = 22
    replicas: int | None = None
    steps_per_call: int = 100


PRESETS = {
    # The network and recipe of TensorFlow's Core-API tutorial.
    "core": TrainConfig(
        preset="core", hidden_units=(700, 500), learning_rate=1e-3, batch_size=128, epochs=10
    ),
}


def check(config: TrainConfig) -> TrainConfig:
    """Returns the config if its values make sense, each and together.

    Raises:
        InputError: the first that does not.
    """
    for name in ("batch_size", "epochs", "steps_per_call"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name} {getattr(config, name)}: expected at least 1")
    if not config.hidden_units or min(config.hidden_units) < 1:
        given = ",".join(map(str, config.hidden_units))
        raise InputError(f"--hidden_units {given}: expected widths of at least 1")
    if not config.learning_rate > 0 or config.learning_rate == float("inf"):
        raise InputError(f"--learning_rate {config.learning_rate}: expected a number above 0")
    for name in ("beta_1", "beta_2"):
        if not 0 <= getattr(config, name) < 1:
            raise InputError(f"--{name} {getattr(config, name)}: expected at least 0 and below 1")
    if not 0 < config.epsilon < float("inf"):  # 0 / 0 for a weight that never had a gradient
        raise InputError(f"--epsilon {config.epsilon}: expected a number above 0")
    if not 0 <= config.seed < 2**31:
        raise InputError(f"--seed {config.seed}: expected 0 to {2**31 - 1}")
    if config.replicas is not None:
        if config.replicas < 1:
            raise InputError(f"--replicas {config.replicas}: expected at least 1")
        check_divides(config.batch_size, config.replicas)
    return config


def check_divides(batch_size: int, replicas: int) -> None:
    """Raises InputError unless every replica gets the same share of a global batch."""
    if batch_size % replicas:
        raise InputError(
            f"--batch_size {batch_size}: expected a multiple of the {replicas} replicas"
        )
