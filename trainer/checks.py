"""Which configs make sense: a preset, what was given instead of its values, and their checks."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pipeline.command import InputError
from trainer.config import PRESETS, VIRTUAL_SHARDS, TrainConfig, choices

_AMPLITUDES = ("rotate", "scale", "shear", "shift", "elastic_alpha")
_ELASTIC = ("elastic_alpha", "elastic_sigma")

# Beyond these, memory or time for a single step, or for laying out the devices, runs out.
_MOST = 1_000_000
_MOST_WIDE = 65_536
_MOST_REPLICAS = 1024

# The least and the largest that float32 holds in full; compiled, what is smaller becomes 0.
_LEAST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127

# Names, what is expected of their values, and whether one is so. NaN is never so.
_RANGES: tuple[tuple[tuple[str, ...], str, Callable[[float], bool]], ...] = (
    (("batch_size", "epochs", "steps_per_call"), f"1 to {_MOST}", lambda x: 1 <= x <= _MOST),
    (("patience", "calm_epochs"), f"0 to {_MOST}", lambda x: 0 <= x <= _MOST),
    (("seed",), f"0 to {2**31 - 1}", lambda x: 0 <= x < 2**31),
    # Without an epsilon, a weight that never had a gradient would become 0 / 0.
    (
        ("learning_rate", "epsilon", "decay_epochs"),
        f"a number above 0 that float32 holds, {_LEAST:.2g} to {_LARGEST:.2g}",
        lambda x: _LEAST <= x <= _LARGEST,
    ),
    # What becomes 1 in float32 would make 0 / 0 of the correction of adam's means, and of dropout.
    (
        ("dropout", "label_smoothing", "momentum", "rho", "ema_decay", "beta_1", "beta_2"),
        "at least 0 and below 1 in float32",
        lambda x: 0 <= x < 1 - 2**-25,
    ),
    (("decay_factor",), "above 0 and at most 1", lambda x: 0 < x <= 1),
    # Within these, and elastic_alpha below, the sums of `trainer.deform` are exact.
    (("rotate",), "0 to 180", lambda x: 0 <= x <= 180),
    (("scale",), "0 to 0.9", lambda x: 0 <= x <= 0.9),
    (("shear",), "0 to 1", lambda x: 0 <= x <= 1),
    (("shift",), "0 to 28", lambda x: 0 <= x <= 28),
    (("elastic_sigma",), "0, or 1 to 28", lambda x: x == 0 or 1 <= x <= 28),
    (
        ("weight_decay", "warmup_epochs", "clip_norm", "elastic_alpha"),
        f"0, or a number that float32 holds, {_LEAST:.2g} to {_LARGEST:.2g}",
        lambda x: x == 0 or _LEAST <= x <= _LARGEST,
    ),
)

# Settings that mean something only under some values of another.
_ONLY_FOR: dict[str, tuple[str, tuple[str, ...]]] = {
    "momentum": ("optimizer", ("sgd", "rmsprop")),
    "rho": ("optimizer", ("rmsprop",)),
    "beta_1": ("optimizer", ("adam", "adamw")),
    "beta_2": ("optimizer", ("adam", "adamw")),
    "epsilon": ("optimizer", ("rmsprop", "adam", "adamw")),
    "weight_decay": ("optimizer", ("adamw",)),
    "decay_epochs": ("schedule", ("step",)),
    "decay_factor": ("schedule", ("step",)),
}

# What the four points of preset xor leave no room for.
_FIXED_FOR_XOR = (
    "loss", "labels", *_AMPLITUDES, "elastic_sigma", "train_on", "patience", "batch_size",
    "replicas", "reproducible", "input", "tf32", "steps_per_call",
)  # fmt: skip


def configure(preset: str, given: Mapping[str, Any]) -> TrainConfig:
    """Returns a preset with the values that were given, if they make sense, each and together.

    What only came along with the preset yields to what was given: it is cut short, or stands at
    its default where nothing uses it any more, so that a config says what is done.

    Args:
        preset: its name.
        given: fields of `TrainConfig` and their values.

    Raises:
        InputError: the first value that makes no sense.
    """
    if preset not in PRESETS:
        raise InputError(f"--preset {preset}: expected {_either(tuple(PRESETS))}")
    config = dataclasses.replace(PRESETS[preset], **given)
    _check_values(config)
    if preset == "xor":
        for name in _FIXED_FOR_XOR:
            if getattr(config, name) != getattr(PRESETS["xor"], name):
                _refuse(config, name, "cannot be changed in preset xor")
    config = _settle(config, given)
    _check_used(config, given)
    _check_combinations(config)
    return config


def _settle(config: TrainConfig, given: Collection[str]) -> TrainConfig:
    """Fits what was not given to what was."""
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(config)}
    unused = [name for name in _ONLY_FOR if not _is_used(config, name)]
    for name, other in (_ELASTIC, _ELASTIC[::-1]):
        if name in given and not getattr(config, name):
            unused.append(other)
    settled = {name: defaults[name] for name in unused if name not in given}
    config = dataclasses.replace(config, **settled)
    if "calm_epochs" not in given:
        calm = min(config.calm_epochs, config.epochs) if is_deforming(config) else 0
        config = dataclasses.replace(config, calm_epochs=calm)
    return config


def is_deforming(config: TrainConfig) -> bool:
    """Whether images are deformed at all."""
    return any(getattr(config, name) for name in _AMPLITUDES)


def _is_used(config: TrainConfig, name: str) -> bool:
    other, values = _ONLY_FOR[name]
    return getattr(config, other) in values


def _refuse(config: TrainConfig, name: str, expected: str) -> typing.NoReturn:
    value = getattr(config, name)
    given = ",".join(map(str, value)) if isinstance(value, tuple) else value
    flag = f"--{name}" if value is True else f"--{name} {given}"
    raise InputError(f"{flag}: {expected}")


def _check_values(config: TrainConfig) -> None:
    for field in dataclasses.fields(config):
        allowed = choices(field.name)
        if allowed and getattr(config, field.name) not in allowed:
            _refuse(config, field.name, f"expected {_either(allowed)}")
    if not config.hidden_units or not all(1 <= n <= _MOST_WIDE for n in config.hidden_units):
        _refuse(config, "hidden_units", f"expected widths of 1 to {_MOST_WIDE}")
    for names, expected, is_so in _RANGES:
        for name in names:
            if not is_so(getattr(config, name)):
                _refuse(config, name, f"expected {expected}")
    if config.replicas is not None and not 1 <= config.replicas <= _MOST_REPLICAS:
        _refuse(config, "replicas", f"expected 1 to {_MOST_REPLICAS}")


def _check_used(config: TrainConfig, given: Collection[str]) -> None:
    for name, (other, values) in _ONLY_FOR.items():
        if name in given and not _is_used(config, name):
            now = getattr(config, other)
            _refuse(config, name, f"only --{other} {_either(values)} uses it, not {now}")


def _check_combinations(config: TrainConfig) -> None:
    if config.warmup_epochs > config.epochs:
        _refuse(config, "warmup_epochs", f"expected at most the {config.epochs} epochs")
    if config.calm_epochs > config.epochs:
        _refuse(config, "calm_epochs", f"expected at most the {config.epochs} epochs")
    if config.calm_epochs and not is_deforming(config):
        _refuse(config, "calm_epochs", "expected a deformation beside it that could be calmed")
    for name, other in (_ELASTIC, _ELASTIC[::-1]):
        if getattr(config, name) and not getattr(config, other):
            _refuse(config, name, f"expected --{other} above 0 beside it")
    if config.tf32 and is_deforming(config):
        _refuse(config, "tf32", "expected no deformations beside it: they need exact products")
    if config.elastic_alpha > 40 * config.elastic_sigma:
        _refuse(config, "elastic_alpha", "expected at most 40 times --elastic_sigma")
    if config.patience and config.train_on != "train":
        _refuse(
            config, "patience", f"--train_on {config.train_on} leaves no validation to judge by"
        )
    if config.replicas is not None or config.reproducible:
        check_divides(config.batch_size, config.replicas or 1, reproducible=config.reproducible)


def _either(values: tuple[str, ...]) -> str:
    """``a, b or c``."""
    return " or ".join(filter(None, (", ".join(values[:-1]), values[-1])))


def check_divides(batch_size: int, replicas: int, *, reproducible: bool = False) -> None:
    """Raises InputError unless every replica gets the same share of a global batch."""
    if reproducible and VIRTUAL_SHARDS % replicas:
        raise InputError(
            f"--reproducible on {replicas} replicas: expected a number that divides"
            f" {VIRTUAL_SHARDS}, the parts that a batch is always cut in"
        )
    if reproducible and batch_size % VIRTUAL_SHARDS:
        raise InputError(
            f"--batch_size {batch_size}: expected a multiple of {VIRTUAL_SHARDS}, the parts that"
            " --reproducible cuts a batch in"
        )
    if batch_size % replicas:
        raise InputError(
            f"--batch_size {batch_size}: expected a multiple of the {replicas} replicas"
        )
