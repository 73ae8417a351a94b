"""A RunConfig is checked when made, survives JSON, and says what a stack must share."""

import json
import math
from dataclasses import FrozenInstanceError, fields

import pytest

from harness.config import SWEPT, RunConfig, UserError
from harness.objective import beta

WRONG = [
    ("model", "cnn"),
    ("head", "GAUSSIAN"),
    ("latent", None),
    ("kl_normalization", "mean"),
    ("hidden", (256, 0)),
    ("hidden", (256, 6.5)),
    ("hidden", 256),
    ("latent_size", 0),
    ("latent_size", 2.0),
    ("latent_size", True),
    ("kl_weight", -1e-9),
    ("kl_weight", math.nan),
    ("kl_weight", math.inf),
    ("kl_weight", "1"),
    ("kl_weight", True),
    ("kl_warmup_epochs", -1),
    ("kl_cycles", 0),
    ("free_bits", -0.1),
    ("sigma", "free"),
    ("likelihood", "laplace"),
    ("precision", "float16"),
    ("binarization", "otsu"),
    ("learning_rate", 0.0),
    ("learning_rate", math.inf),
    ("batch_size", 0),
    ("epochs", 0),
    ("seed", -1),
    ("seed", 1.5),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{n}={v}" for n, v in WRONG])
def test_a_wrong_value_is_refused_with_its_name(name, value):
    with pytest.raises(UserError, match=f"^{name}="):
        RunConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("model", "mlp, linear"),
        ("head", "gaussian, relu"),
        ("latent", "stochastic, deterministic"),
        ("kl_normalization", "pixels, batch, latent, sum"),
        ("sigma", "fixed, optimal, learned"),
        ("likelihood", "gaussian, bernoulli"),
        ("precision", "float32, tf32"),
        ("binarization", "none, stochastic, threshold"),
    ],
)
def test_the_message_lists_the_choices(name, choices):
    with pytest.raises(UserError, match=choices):
        RunConfig(**{name: "other"})


def test_a_plain_autoencoder_has_no_kl_weight():
    with pytest.raises(UserError, match="set kl_weight=0"):
        RunConfig(latent="deterministic")
    assert RunConfig(latent="deterministic", kl_weight=0).kl_weight == 0


def test_replace_checks_again():
    with pytest.raises(UserError, match="^epochs="):
        RunConfig().replace(epochs=0)


def test_whole_numbers_and_floats_make_the_same_run():
    whole, real = RunConfig(kl_weight=1, free_bits=0), RunConfig(kl_weight=1.0, free_bits=0.0)
    assert whole.to_json() == real.to_json()
    assert beta(RunConfig(kl_weight=10**308, kl_normalization="sum"), 784) == math.inf


def test_a_config_is_a_value():
    config = RunConfig(hidden=[8, 4])
    assert config == RunConfig(hidden=(8, 4))
    assert hash(config) == hash(RunConfig(hidden=(8, 4)))
    with pytest.raises(FrozenInstanceError):
        config.seed = 1


def test_the_seed_recipe_is_the_blogs():
    assert RunConfig.seed_recipe() == RunConfig(
        model="mlp",
        hidden=(256, 64),
        latent_size=10,
        head="relu",
        latent="stochastic",
        kl_weight=1.0,
        kl_normalization="pixels",
        kl_warmup_epochs=0,
        learning_rate=1e-3,
        batch_size=32,
    )
    assert RunConfig.seed_recipe(seed=4).seed == 4


@pytest.mark.parametrize("name", SWEPT)
def test_swept_fields_leave_the_stack_as_it_is(name):
    words = {"kl_normalization": "sum", "sigma": "learned"}
    value = words[name] if name in words else getattr(RunConfig(), name) + 1
    assert RunConfig(**{name: value}).static() == RunConfig().static()


def test_every_other_field_splits_stacks():
    other = {
        "model": "linear",
        "hidden": (8,),
        "channels": (8,),
        "head": "relu",
        "latent": "deterministic",
        "likelihood": "bernoulli",
        "batch_size": 16,
        "epochs": 2,
        "precision": "tf32",
    }
    assert {*other, *SWEPT, "binarization"} == {f.name for f in fields(RunConfig)}
    base = RunConfig(kl_weight=0)
    for name, value in other.items():
        assert base.replace(**{name: value}).static() != base.static(), name
    grey = base.replace(likelihood="bernoulli")
    assert grey.replace(binarization="threshold").static() != grey.static()


CONTRADICTIONS = [
    ({"model": "conv", "channels": ()}, "at least one convolution"),
    ({"latent": "deterministic", "kl_weight": 0, "free_bits": 0.1}, "^free_bits=0.1 .*no KL"),
    ({"latent": "deterministic", "kl_weight": 0, "sigma": "optimal"}, "^sigma='optimal' .*no KL"),
    ({"likelihood": "bernoulli", "sigma": "learned"}, "only a Gaussian decoder has a variance"),
    ({"binarization": "stochastic"}, "need likelihood='bernoulli'"),
    ({"epochs": 10, "kl_warmup_epochs": 4, "kl_cycles": 3}, "must end within epochs=10"),
]


@pytest.mark.parametrize(("settings", "message"), CONTRADICTIONS, ids=lambda v: str(v)[:40])
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        RunConfig(**settings)


@pytest.mark.parametrize("name", [f.name for f in fields(RunConfig)])
def test_a_field_that_an_earlier_version_lacked_takes_its_default(name):
    config = RunConfig(hidden=(7,), kl_weight=0.5, seed=3)
    values = json.loads(config.to_json())
    del values[name]
    assert RunConfig.from_json(json.dumps(values)) == config.replace(
        **{name: getattr(RunConfig(), name)}
    )


def test_json_with_an_unknown_field_is_refused_by_name():
    values = json.loads(RunConfig().to_json()) | {"width": 3}
    with pytest.raises(UserError, match=r"^configuration has unknown fields \['width'\]"):
        RunConfig.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null"])
def test_what_is_no_config_is_refused(text):
    with pytest.raises(UserError, match="^configuration "):
        RunConfig.from_json(text)


def test_json_with_a_wrong_value_is_refused():
    values = json.loads(RunConfig().to_json()) | {"batch_size": "32"}
    with pytest.raises(UserError, match="^batch_size="):
        RunConfig.from_json(json.dumps(values))
