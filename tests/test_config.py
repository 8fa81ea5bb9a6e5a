import dataclasses
import inspect
import json
import math

import pytest

from pipeline.command import InputError
from trainer.checks import configure
from trainer.config import PRESETS, TrainConfig, choices

NAN, INF = math.nan, math.inf
AT_LEAST_0 = "expected 0, or a number that float32 holds, 1.2e-38 to 3.4e+38"
BELOW_1 = "expected at least 0 and below 1 in float32"
ABOVE_0 = "expected a number above 0 that float32 holds, 1.2e-38 to 3.4e+38"


def changed(base="core", /, **values):
    return dataclasses.replace(PRESETS[base], **values)


def refused(base="core", /, **given):
    with pytest.raises(InputError) as error:
        configure(given.pop("preset", base), given)
    return str(error.value)


# Values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "huge"}, "--preset huge: expected core, compact, accurate or xor"),
        *(
            ({name: value}, f"--{name} {value}: expected 1 to 1000000")
            for name in ("epochs", "batch_size", "steps_per_call")
            for value in (-1, 0, 1_000_001, 3_000_000_000, 99_999_999_999)
        ),
        *(
            ({name: value}, f"--{name} {value}: expected 0 to 1000000")
            for name in ("patience", "calm_epochs")
            for value in (-1, 1_000_001, 99_999_999_999)
        ),
        ({"hidden_units": ()}, "--hidden_units : expected widths of 1 to 65536"),
        ({"hidden_units": (5, 0)}, "--hidden_units 5,0: expected widths of 1 to 65536"),
        ({"hidden_units": (65537,)}, "--hidden_units 65537: expected widths of 1 to 65536"),
        (
            {"hidden_units": (5, 99_999_999_999)},
            "--hidden_units 5,99999999999: expected widths of 1 to 65536",
        ),
        ({"seed": -1}, "--seed -1: expected 0 to 2147483647"),
        ({"seed": 2**31}, "--seed 2147483648: expected 0 to 2147483647"),
        ({"replicas": 0}, "--replicas 0: expected 1 to 1024"),
        ({"replicas": 2048}, "--replicas 2048: expected 1 to 1024"),
        ({"activation": "gelu"}, "--activation gelu: expected relu, sigmoid, tanh or identity"),
        ({"initializer": "zero"}, "--initializer zero: expected xavier, he or normal"),
        ({"loss": "mse"}, "--loss mse: expected softmax or sigmoid"),
        ({"labels": "text"}, "--labels text: expected integer or one_hot"),
        ({"optimizer": "lion"}, "--optimizer lion: expected sgd, rmsprop, adam or adamw"),
        ({"schedule": ""}, "--schedule : expected constant, step or cosine"),
        ({"gradients": "Tape"}, "--gradients Tape: expected tape or manual"),
        ({"train_on": "test"}, "--train_on test: expected train or train+validation"),
        ({"input": "disk"}, "--input disk: expected auto, resident or stream"),
        ({"rotate": -1.0}, "--rotate -1.0: expected 0 to 180"),
        ({"rotate": 180.5}, "--rotate 180.5: expected 0 to 180"),
        ({"rotate": NAN}, "--rotate nan: expected 0 to 180"),
        ({"decay_factor": 0.0}, "--decay_factor 0.0: expected above 0 and at most 1"),
        ({"decay_factor": 1.1}, "--decay_factor 1.1: expected above 0 and at most 1"),
        ({"decay_factor": NAN}, "--decay_factor nan: expected above 0 and at most 1"),
        *(
            ({name: value}, f"--{name} {value}: {ABOVE_0}")
            for name in ("learning_rate", "epsilon", "decay_epochs")
            for value in (0.0, -1.0, 1e-46, 1e-38, 3.5e38, 1e39, 1e300, NAN, INF)
        ),
        *(
            ({name: value}, f"--{name} {value}: {BELOW_1}")
            for name in (
                "dropout",
                "label_smoothing",
                "momentum",
                "rho",
                "ema_decay",
                "beta_1",
                "beta_2",
            )
            for value in (1.0, 0.99999999, 1 - 2**-25, -0.1, NAN)
        ),
        *(
            ({name: value}, f"--{name} {value}: {AT_LEAST_0}")
            for name in (
                "weight_decay",
                "warmup_epochs",
                "clip_norm",
                "elastic_alpha",
            )
            for value in (-0.5, 1e-39, 1e39, NAN, INF)
        ),
        ({"scale": 0.95}, "--scale 0.95: expected 0 to 0.9"),
        ({"shear": -0.1}, "--shear -0.1: expected 0 to 1"),
        ({"shift": 29.0}, "--shift 29.0: expected 0 to 28"),
        ({"calm_epochs": 11}, "--calm_epochs 11: expected at most the 10 epochs"),
        ({"elastic_alpha": 1.0}, "--elastic_alpha 1.0: expected --elastic_sigma above 0 beside it"),
        (
            {"elastic_alpha": 1.0, "elastic_sigma": 0.9},
            "--elastic_sigma 0.9: expected 0, or 1 to 28",
        ),
        (
            {"elastic_alpha": 201.0, "elastic_sigma": 5.0},
            "--elastic_alpha 201.0: expected at most 40 times --elastic_sigma",
        ),
    ],
)
def test_a_value_without_sense_is_named(values, message):
    assert refused(**values) == message


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 1, "batch_size": 1, "steps_per_call": 1, "hidden_units": (1,)},
        {"epochs": 1_000_000, "batch_size": 1_000_000, "steps_per_call": 1_000_000},
        {"hidden_units": (65536, 1), "patience": 1_000_000},
        {"learning_rate": 3.4e38, "epsilon": 1.2e-38, "clip_norm": 3.4e38},
        {"seed": 2**31 - 1, "beta_1": 0.0, "beta_2": 0.0, "epsilon": 1e-30},
        {"beta_1": 0.99999997, "beta_2": 0.99999997},
        {"seed": 0, "replicas": 128, "learning_rate": 1e-30},
        {"dropout": 0.99, "label_smoothing": 0.99, "ema_decay": 0.99999, "clip_norm": 1e30},
        {"optimizer": "sgd", "momentum": 0.99},
        {"optimizer": "rmsprop", "momentum": 0.5, "rho": 0.0, "epsilon": 1.0},
        {"optimizer": "adamw", "weight_decay": 2.0},
        {"schedule": "step", "decay_epochs": 0.1, "decay_factor": 1.0},
        {"schedule": "cosine", "warmup_epochs": 10.0},
        {"rotate": 180.0, "scale": 0.9, "shear": 1.0, "shift": 28.0},
        {"elastic_alpha": 40.0, "elastic_sigma": 1.0},
        {"elastic_alpha": 1120.0, "elastic_sigma": 28.0, "calm_epochs": 10},
        {"train_on": "train+validation"},
        {"patience": 1, "reproducible": True, "tf32": True, "input": "stream"},
        {"loss": "sigmoid", "labels": "integer", "label_smoothing": 0.1},
        {"gradients": "manual", "dropout": 0.5, "activation": "tanh", "initializer": "he"},
    ],
)
def test_values_at_the_edge_make_sense(values):
    assert configure("core", values) == changed(**values)


# Values that do not go together


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replicas": 3}, "--batch_size 128: expected a multiple of the 3 replicas"),
        ({"momentum": 0.9}, "--momentum 0.9: only --optimizer sgd or rmsprop uses it, not adam"),
        ({"rho": 0.5}, "--rho 0.5: only --optimizer rmsprop uses it, not adam"),
        (
            {"optimizer": "sgd", "beta_1": 0.5},
            "--beta_1 0.5: only --optimizer adam or adamw uses it, not sgd",
        ),
        (
            {"optimizer": "rmsprop", "beta_2": 0.5},
            "--beta_2 0.5: only --optimizer adam or adamw uses it, not rmsprop",
        ),
        (
            {"optimizer": "sgd", "epsilon": 0.1},
            "--epsilon 0.1: only --optimizer rmsprop, adam or adamw uses it, not sgd",
        ),
        ({"weight_decay": 0.1}, "--weight_decay 0.1: only --optimizer adamw uses it, not adam"),
        (
            {"decay_epochs": 3.0},
            "--decay_epochs 3.0: only --schedule step uses it, not cosine",
        ),
        (
            {"schedule": "cosine", "decay_factor": 0.5},
            "--decay_factor 0.5: only --schedule step uses it, not cosine",
        ),
        ({"warmup_epochs": 10.5}, "--warmup_epochs 10.5: expected at most the 10 epochs"),
        (
            {"elastic_alpha": 8.0},
            "--elastic_alpha 8.0: expected --elastic_sigma above 0 beside it",
        ),
        (
            {"elastic_sigma": 4.0},
            "--elastic_sigma 4.0: expected --elastic_alpha above 0 beside it",
        ),
        (
            {"tf32": True, "shift": 2.0},
            "--tf32: expected no deformations beside it: they need exact products",
        ),
        (
            {"train_on": "train+validation", "patience": 3},
            "--patience 3: --train_on train+validation leaves no validation to judge by",
        ),
    ],
)
def test_values_that_do_not_go_together_are_named(values, message):
    assert refused(**values) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 2}, "--batch_size 2: cannot be changed in preset xor"),
        ({"replicas": 2}, "--replicas 2: cannot be changed in preset xor"),
        (
            {"reproducible": True},
            "--reproducible: cannot be changed in preset xor",
        ),
        ({"loss": "softmax"}, "--loss softmax: cannot be changed in preset xor"),
        ({"labels": "integer"}, "--labels integer: cannot be changed in preset xor"),
        ({"input": "stream"}, "--input stream: cannot be changed in preset xor"),
        ({"shift": 2.0}, "--shift 2.0: cannot be changed in preset xor"),
        ({"patience": 1}, "--patience 1: cannot be changed in preset xor"),
    ],
)
def test_what_the_four_points_of_xor_leave_no_room_for_is_named(values, message):
    assert refused("xor", **values) == message


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_units": (8, 8), "activation": "tanh", "initializer": "he"},
        {"learning_rate": 0.05, "momentum": 0.0},
        {"dropout": 0.1, "label_smoothing": 0.1, "ema_decay": 0.9, "clip_norm": 1.0},
        {"schedule": "cosine", "warmup_epochs": 5.0, "epochs": 100, "gradients": "tape"},
    ],
)
def test_xor_takes_all_of_the_mathematics(values):
    assert configure("xor", values) == changed("xor", **values)


# What only came along with a preset


@pytest.mark.parametrize(
    ("preset", "given", "settled"),
    [
        ("accurate", {"epochs": 10}, {"calm_epochs": 10}),
        ("accurate", {"epochs": 51}, {}),
        ("accurate", {"epochs": 2, "calm_epochs": 1}, {}),
        ("accurate", {"elastic_alpha": 0.0}, {"elastic_sigma": 0.0}),
        ("accurate", {"elastic_sigma": 0.0}, {"elastic_alpha": 0.0}),
        ("accurate", {"elastic_sigma": 1.0}, {}),
        (
            "accurate",
            {"rotate": 0.0, "scale": 0.0, "shear": 0.0, "shift": 0.0, "elastic_alpha": 0.0},
            {"elastic_sigma": 0.0, "calm_epochs": 0},
        ),
        ("accurate", {"optimizer": "adam"}, {"weight_decay": 0.0}),
        ("accurate", {"optimizer": "rmsprop"}, {"weight_decay": 0.0}),
        ("xor", {"optimizer": "adam"}, {"momentum": 0.0}),
        ("xor", {"optimizer": "rmsprop"}, {}),
    ],
)
def test_what_came_along_with_a_preset_yields_to_what_was_given(preset, given, settled):
    assert configure(preset, given) == changed(preset, **given | settled)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 10, "calm_epochs": 50}, "--calm_epochs 50: expected at most the 10 epochs"),
        (
            {"elastic_alpha": 0.0, "elastic_sigma": 5.5},
            "--elastic_sigma 5.5: expected --elastic_alpha above 0 beside it",
        ),
        (
            {"elastic_alpha": 300.0},
            "--elastic_alpha 300.0: expected at most 40 times --elastic_sigma",
        ),
        (
            {"optimizer": "adam", "weight_decay": 0.05},
            "--weight_decay 0.05: only --optimizer adamw uses it, not adam",
        ),
        (
            {"optimizer": "sgd", "beta_1": 0.9},
            "--beta_1 0.9: only --optimizer adam or adamw uses it, not sgd",
        ),
        (
            {"decay_epochs": 10.0},
            "--decay_epochs 10.0: only --schedule step uses it, not cosine",
        ),
    ],
)
def test_what_was_given_is_used_or_refused_whatever_the_preset_holds(given, message):
    assert refused("accurate", **given) == message


def test_nothing_is_calmed_where_nothing_is_deformed():
    message = "--calm_epochs 3: expected a deformation beside it that could be calmed"
    assert refused(calm_epochs=3) == message


# Presets and fields


@pytest.mark.parametrize("name", PRESETS)
def test_presets_make_sense_and_know_their_names(name):
    assert PRESETS[name].preset == name
    assert configure(name, {}) == PRESETS[name]


def test_presets_are_what_they_are_known_for():
    def values(name, *fields):
        return tuple(getattr(PRESETS[name], field) for field in fields)

    recipe = ("hidden_units", "optimizer", "labels", "batch_size", "epochs")
    assert values("core", *recipe) == ((700, 500), "adam", "integer", 128, 10)
    assert values("compact", *recipe) == ((128, 128), "rmsprop", "one_hot", 64, 21)
    assert values("accurate", "hidden_units", "train_on") == ((700, 500), "train+validation")
    example = ("hidden_units", "activation", "loss", "gradients")
    assert values("xor", *example) == ((4,), "sigmoid", "sigmoid", "manual")


def test_every_field_says_what_it_is():
    for field in dataclasses.fields(TrainConfig):
        assert field.kw_only
        text = field.metadata["about"]
        assert text and not text.endswith(".") and "%" not in text, field.name


def test_choices_are_those_of_the_field():
    assert choices("optimizer") == ("sgd", "rmsprop", "adam", "adamw")
    assert choices("epochs") == choices("hidden_units") == choices("tf32") == ()


def test_choices_are_what_the_mathematics_knows():
    from trainer import gradients, losses, model, optimizers

    assert set(choices("activation")) == set(model.ACTIVATIONS) == set(gradients.ACTIVATION_SLOPES)
    assert set(choices("initializer")) == set(model.INITIALIZERS)
    assert set(choices("loss")) == set(losses.LOSSES) == set(losses.LOSS_SLOPES)
    assert set(choices("optimizer")) == set(optimizers.RULES)
    for name, (rule, num_slots, settings) in optimizers.RULES.items():
        parameters = inspect.signature(rule).parameters.values()
        assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == set(settings), name
        assert len(parameters) == 4 + num_slots + len(settings), name
        # And what no rule takes is refused.
        for setting in ("momentum", "rho", "beta_1", "beta_2", "epsilon", "weight_decay"):
            given = {"optimizer": name, setting: 0.25}
            if setting in settings:
                assert configure("core", given) == changed(**given)
            else:
                assert f"--{setting} 0.25: only --optimizer " in refused(**given)


def test_a_config_is_frozen_and_goes_into_json_and_back():
    config = PRESETS["accurate"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3
    read = json.loads(json.dumps(dataclasses.asdict(config)))
    assert TrainConfig(**read | {"hidden_units": tuple(read["hidden_units"])}) == config
