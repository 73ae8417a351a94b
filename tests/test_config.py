"""A RunConfig is checked when it is made, and survives JSON."""

import json
import math
from dataclasses import FrozenInstanceError, fields

import pytest

from harness.config import RunConfig, UserError
from harness.objective import beta
from harness.registry import network

WRONG = [
    ("model", "cnn"),
    ("model", []),
    ("terms", ["sparsity"]),
    ("terms", 3),
    ("terms", {1: 1.0}),
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
    ("likelihood", "laplacian"),
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
        ("model", "mlp, linear, conv"),
        ("head", "gaussian, relu"),
        ("latent", "stochastic, deterministic"),
        ("kl_normalization", "pixels, batch, latent, sum"),
        ("sigma", "fixed, optimal, learned"),
        ("likelihood", "gaussian, laplace, bernoulli, continuous_bernoulli, or register"),
        ("precision", "float32, tf32"),
        ("binarization", "none, stochastic, threshold"),
    ],
)
def test_the_message_lists_the_choices(name, choices):
    with pytest.raises(UserError, match=choices):
        RunConfig(**{name: "other"})


def test_a_plain_autoencoder_has_no_kl_weight():
    config = RunConfig(latent="deterministic")
    assert config == RunConfig(latent="deterministic", kl_weight=0)
    assert config == RunConfig.from_json(config.to_json())
    for weight in (1.0, 1, 0.5):
        with pytest.raises(UserError, match="set kl_weight=0"):
            RunConfig(latent="deterministic", kl_weight=weight)
    assert type(RunConfig().kl_weight) is float
    with pytest.raises(UserError, match="set kl_weight=0"):
        RunConfig().replace(latent="deterministic")


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


# --- networks and terms of a user -----------------------------------------------------------------


def test_a_model_is_a_registered_network(registered):
    with pytest.raises(UserError, match="'mine': choose one of .* or register a network of that"):
        RunConfig(model="mine")
    network("mine")(lambda data_shape, latent_size: None)
    assert RunConfig(model="mine").model == "mine"


@pytest.mark.parametrize("weight", [math.nan, math.inf, "1", None, True])
def test_a_weight_of_a_term_is_a_finite_number(weight):
    with pytest.raises(UserError, match=r"^terms\['sparsity'\]=.*give a finite number"):
        RunConfig(terms={"sparsity": weight})
    assert RunConfig(terms={"sparsity": -1}).terms == {"sparsity": -1.0}


def test_terms_are_a_value_whatever_their_order():
    one = RunConfig(terms={"a": 1, "b": 2})
    other = RunConfig(terms={"b": 2.0, "a": 1.0})
    assert one == other
    assert hash(one) == hash(other)
    assert one.to_json() == other.to_json()
    assert RunConfig.from_json(one.to_json()) == one
    assert one != RunConfig(terms={"a": 1, "b": 3})


def test_a_configuration_keeps_its_weights_when_the_callers_change():
    given = {"a": 1.0}
    config = RunConfig(terms=given)
    given["a"] = 2.0
    assert config.terms == {"a": 1.0}


# --- together and as JSON -------------------------------------------------------------------------

CONTRADICTIONS = [
    ({"model": "conv", "channels": ()}, "at least one convolution"),
    ({"latent": "deterministic", "kl_weight": 0, "free_bits": 0.1}, "^free_bits=0.1 .*no KL"),
    ({"latent": "deterministic", "kl_weight": 0, "sigma": "optimal"}, "^sigma='optimal' .*no KL"),
    ({"likelihood": "bernoulli", "sigma": "learned"}, "which has no variance or scale"),
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
