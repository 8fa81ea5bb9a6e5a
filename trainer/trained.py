"""What is trained: the network and its update on every replica, and the compiled functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from pipeline.dataset import NUM_PIXELS
from trainer.config import TrainConfig
from trainer.deform import make_deform
from trainer.model import MLP
from trainer.optimizers import Update, make_update
from trainer.sources import Source
from trainer.step import StepsFunction, make_evaluate, make_train_steps

EVALUATION_BATCH = 1000


class Splits(NamedTuple):
    """What to train on, and what to validate with, if anything."""

    train: Source
    validation: Source | None


class Trained:
    """The network and its update on every replica, and the functions that train them.

    Attributes:
        model: the network.
        train: compiled steps.
        evaluate: compiled pass over the validation split, if there is one.
    """

    def __init__(
        self, model: MLP, update: Update, train: StepsFunction, evaluate: StepsFunction | None
    ) -> None:
        self.model = model
        self.train = train
        self.evaluate = evaluate
        self._update = update

    def values(self) -> list[np.ndarray]:
        """The weights, then the parts of the update's state in the order of `tf.nest`."""
        state = tf.nest.flatten(self._update.state)
        return [part.numpy() for part in [*self.model.weights, *state]]

    def assign(self, values: list[np.ndarray]) -> None:
        """Takes over what `values` gave, on every replica."""
        weights = self.model.weights
        for weight, value in zip(weights, values, strict=False):
            weight.assign(value)
        rest = [tf.constant(value) for value in values[len(weights) :]]
        self._update.assign(tf.nest.pack_sequence_as(self._update.state, rest))

    def evaluated(self) -> list[np.ndarray]:
        """The weights that are evaluated and exported."""
        return [weight.numpy() for weight in self._update.evaluated(self.model.weights)]


def make_network(config: TrainConfig, num_classes: int) -> MLP:
    """The network of a config, with the weights that its seed draws."""
    return MLP(
        NUM_PIXELS,
        config.hidden_units,
        num_classes,
        activation=config.activation,
        initializer=config.initializer,
        seed=config.seed,
    )


def build(
    config: TrainConfig,
    strategy: tf.distribute.Strategy,
    splits: Splits,
    num_classes: int,
    initial: Sequence[np.ndarray] | None = None,
) -> Trained:
    """Makes the network on every replica, its update and the compiled functions.

    Args:
        config: how to train.
        strategy: the replicas.
        splits: what to train on and validate with.
        num_classes: how many answers there are.
        initial: the first weights, if not those that the seed draws.
    """
    with strategy.scope():
        model = make_network(config, num_classes)
        if initial is not None:  # before a moving average begins with them
            for weight, value in zip(model.weights, initial, strict=True):
                weight.assign(value)
        update = make_update(config, model.weights, -(-splits.train.size // config.batch_size))
    train = make_train_steps(
        strategy, model, update, splits.train, config, deform=make_deform(config)
    )
    evaluate = None
    if splits.validation is not None:
        batch = evaluation_batch(strategy)
        evaluate = make_evaluate(strategy, model, update, splits.validation, config, batch)
    return Trained(model, update, train, evaluate)


def evaluation_batch(strategy: tf.distribute.Strategy) -> int:
    """A batch for validation that the replicas can share."""
    replicas = strategy.num_replicas_in_sync
    return -(-EVALUATION_BATCH // replicas) * replicas
