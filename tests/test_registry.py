"""Names of networks and loss terms."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import harness
from harness import RunConfig, UserError, registry
from harness.models.vae import build

pytestmark = pytest.mark.usefixtures("registered")


def pair(data_shape, latent_size):
    return nn.Linear(4, 2 * latent_size), nn.Linear(latent_size, 4)


def test_a_network_is_built_by_its_name():
    assert harness.network("mine")(pair) is pair
    model = build(RunConfig(model="mine", latent_size=3), (4,))
    assert model(torch.rand(5, 4)).shape == (5, 4)
    assert model.has_sigmoid


def test_the_output_of_a_network_is_that_of_its_registration():
    harness.network("mine", output="identity")(pair)
    assert not build(RunConfig(model="mine"), (4,)).has_sigmoid
    model = build(RunConfig(model="mine", likelihood="bernoulli", latent_size=2), (4,))
    assert torch.equal(model.decode(z := torch.randn(3, 2)), model.decoder(z).sigmoid())


def test_a_second_network_of_a_name_replaces_the_first():
    harness.network("mine")(pair)

    @harness.network("mine")
    def other(data_shape, latent_size):
        return nn.Linear(4, 2 * latent_size, bias=False), nn.Linear(latent_size, 4)

    assert build(RunConfig(model="mine"), (4,)).encoder.bias is None


@pytest.mark.parametrize("name", ["", *registry.BUILT_IN])
def test_names_of_networks_that_are_taken_or_empty_are_refused(name):
    with pytest.raises(UserError, match=f"^network '{name}': choose a name"):
        harness.network(name)
    assert set(registry.NETWORKS) == set(registry.BUILT_IN)


def test_an_unknown_output_is_refused():
    with pytest.raises(UserError, match="output='tanh' of network 'mine': choose sigmoid or"):
        harness.network("mine", output="tanh")


def test_weights_of_a_network_are_drawn_by_pytorch_from_the_runs_stream():
    harness.network("mine")(pair)
    first, again, other, wider = (
        build(RunConfig(model="mine", seed=seed, latent_size=size), (4,)).encoder.weight
        for seed, size in ((0, 3), (0, 3), (1, 3), (0, 4))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, wider[:6])


def test_terms_are_found_by_their_name_and_replaced():
    @harness.term("mine")
    def first(batch):
        return batch.z.sum()

    assert registry.TERMS["mine"] is first

    @harness.term("mine")
    def second(batch):
        return batch.z.mean()

    assert registry.TERMS["mine"] is second


def test_a_term_without_a_name_is_refused():
    with pytest.raises(UserError, match="term '': choose a name of letters, digits and _"):
        harness.term("")


def test_a_term_that_is_not_registered_is_refused_when_it_is_trained(tiny):
    harness.term("known")(lambda batch: batch.z.sum())
    config = RunConfig(terms={"unknown": 1.0})
    with pytest.raises(UserError, match=r"'unknown' is not registered \(registered: .*known\)"):
        next(harness.train([config], tiny, "cpu"))


def test_registering_loads_no_pytorch():
    code = (
        "import sys, harness; harness.term('a')(len); harness.network('b')(len); "
        "harness.RunConfig(model='b', terms={'a': 1}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("def f(:\n", r"SyntaxError: .* \(mine\.py, line 1\)$"),
        ("\nraise SystemExit(3)\n", r"SystemExit: 3 \(mine\.py, line 2: raise SystemExit\(3\)\)$"),
        ("x = 1\n", "the file registers no term of that name"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(text, why, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=why) as refused:
        registry.load(f"{tmp_path}/mine.py:mine", "term")
    assert "\n" not in str(refused.value)
