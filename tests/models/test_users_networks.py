"""Networks of users: trained, stacked, resumed, replayed and reloaded, or refused in one line.

The contract of `tests/test_contract.py` holds for each network of `benchmarks/users_networks.py`
too; here they are brought by their file.
"""

import io
import math
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from textbook import flat
from torch import Tensor, nn

import harness
from benchmarks.networks import FILE, NAMES
from harness import RunConfig, UserError, load_run, network, registry
from harness.models.vae import build, check_network
from harness.tracking import connect, record
from harness.tracking.runs import part_file
from harness.training.checkpoint import Checkpoints
from harness.training.engine import train
from studies import replay

ONE_BY_ONE = {"recurrent", "dropout", "branch"}
BASE = RunConfig(latent_size=4, batch_size=8, epochs=1)
SHAPE = (1, 8, 8)

pytestmark = pytest.mark.usefixtures("registered")
every_network = pytest.mark.parametrize("name", NAMES)


def configs(name: str) -> list[RunConfig]:
    registry.load(f"{FILE}:{name}", "network")
    return [
        BASE.replace(model=name, seed=s, kl_weight=w, learning_rate=0.01)
        for s, w in enumerate((0.02, 0.5, 1.0))
    ]


def of_steps(data, steps: int):
    """Return the data with an epoch of so many steps."""
    return replace(data, train=data.train.head(steps * BASE.batch_size))


# --- training ------------------------------------------------------------------------------------


@pytest.mark.slow  # test_contract.py has most of it
@every_network
def test_a_network_trains_to_the_same_bits_alone_and_beside_others(tiny, name):
    given = configs(name)[:2]
    alone = [harness.train_and_evaluate(config, tiny, "cpu") for config in given]
    torch.set_num_threads(2)
    beside = harness.train_and_evaluate(given, tiny, "cpu")
    for one, other in zip(alone, beside, strict=True):
        assert one.metrics == other.metrics
        assert one.history == other.history
        assert torch.equal(flat(one.model), flat(other.model))
        assert {"neg_elbo", "mse", "rate", "val/neg_elbo"} <= one.metrics.keys()
        assert not torch.equal(flat(one.model), flat(build(one.config, SHAPE)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # attention: a loop over runs
@pytest.mark.parametrize(("steps", "dtype", "limit"), [(1, "float32", 1e-5), (10, "float64", 1e-9)])
@every_network
def test_a_stack_is_each_run_alone(tiny, name, steps, dtype, limit, request, caplog):
    data, given = of_steps(tiny, steps), configs(name)
    (alone,) = train(given, data, "cpu", getattr(torch, dtype))
    request.getfixturevalue("stacks")
    (stacked,) = train(given, data, "cpu", getattr(torch, dtype))
    for row in range(len(given)):
        one, other = stacked.model(row).state_dict(), alone.model(row).state_dict()
        for key, value in other.items():
            torch.testing.assert_close(one[key], value, rtol=limit, atol=limit, msg=key)
    assert ("one by one" in caplog.text) == (name in ONE_BY_ONE)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("steps", "dtype", "limit"), [(1, "float32", 1e-5), (10, "float64", 1e-9)])
@every_network
def test_a_stack_on_a_gpu_is_each_run_alone_on_it(tiny, name, steps, dtype, limit, caplog):
    data, given = of_steps(tiny, steps), configs(name)
    (stacked,) = train(given, data, "cuda", getattr(torch, dtype))
    assert ("one by one" in caplog.text) == (name in ONE_BY_ONE)
    for row, config in enumerate(given):
        (alone,) = train([config], data, "cuda", getattr(torch, dtype))
        # Not the weights: Adam makes whole steps of rounding where a gradient is exactly 0, as
        # those of biases before a normalisation are.
        models = stacked.model(row), alone.model(0)
        images = [model.reconstruct(data.val.images) for model in models]
        torch.testing.assert_close(*images, rtol=limit, atol=limit)


def test_random_layers_draw_from_the_streams_of_the_run(tiny):
    first, again, other = (
        train([c], tiny, "cpu") for c in (*configs("dropout")[:1] * 2, configs("dropout")[1])
    )
    (first,), (again,), (other,) = first, again, other
    torch.manual_seed(5)
    assert torch.equal(flat(first.model(0)), flat(again.model(0)))
    assert not torch.equal(flat(first.model(0)), flat(other.model(0)))


def test_batch_statistics_are_those_of_the_run(tiny, together):
    given = [*configs("batch_norm")[:1], configs("batch_norm")[0].replace(learning_rate=1e-9)]
    (record_,) = train(given, tiny, "cpu", torch.float64)
    norms = [record_.model(row).encoder[2] for row in range(2)]
    assert not torch.allclose(norms[0].running_mean, norms[1].running_mean)
    still = build(given[1], SHAPE).double()
    inputs = tiny.train.pixels(slice(None), torch.float64)
    seen = still.encoder[1](inputs).mean(0) * (1 - 0.9**12)  # 12 batches
    torch.testing.assert_close(norms[1].running_mean, seen, atol=0.02, rtol=0.05)
    assert norms[1].num_batches_tracked == 12


def test_nan_costs_the_run_that_makes_it_alone(tiny, tracking_uri, stacks):
    @network("breaks")
    def breaks(shape, latent_size, *, factor: float = 1.0):
        class Root(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x + (factor * (0.6 - x)).sqrt()

        encoder = nn.Sequential(nn.Flatten(), Root(), nn.Linear(64, 2 * latent_size))
        return encoder, nn.Sequential(nn.Linear(latent_size, 64), nn.Unflatten(1, shape))

    made = [BASE.replace(model="breaks", model_options={"factor": f}) for f in (0.0, 1.0)]
    both = record.train_and_evaluate(made, tiny, experiment="nan", tracking_uri=tracking_uri)
    assert both[0].metrics["mse"] < 1
    assert not both[1].metrics
    runs = connect(tracking_uri).runs("nan")
    assert [run.status for run in runs] == ["FINISHED", "FAILED"]
    assert runs[1].tags["reason"] == "diverged in epoch 1: training loss is nan"
    assert "mse" not in harness.train_and_evaluate(made[1], tiny, "cpu").metrics


# --- refusals ------------------------------------------------------------------------------------


def image(shape):
    return nn.Sequential(nn.Linear(4, math.prod(shape)), nn.Unflatten(1, shape))


def code(*layers):
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 8))


class Layer(nn.Module):
    """A layer with an attribute, and a function that it calls first."""

    def __init__(self, held: object = None, act=lambda layer, x: None) -> None:
        super().__init__()
        self.held, self.act = held, act

    def forward(self, x: Tensor) -> Tensor:
        """Return x, or what the function returns."""
        found = self.act(self, x)
        return x if found is None else found


def keep(layer, x):
    layer.held = x


def count(layer, x):
    layer.held += 1


def append(layer, x):
    layer.held.append(1)


def rebind(layer, x):
    layer.mean = 0.9 * layer.mean + 0.1 * x.mean()


def with_buffer(act):
    layer = Layer(act=act)
    layer.register_buffer("mean", torch.zeros(()))
    return layer


def fails(layer, x):
    raise KeyError("no such thing")


def drawn(layer, x):
    return x + np.random.rand()  # noqa: NPY002


REFUSED = {
    "(3, 7), expected": lambda: (nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), image(SHAPE)),
    "its encoder returns tuple; expected (3, 8)": lambda: (
        nn.Sequential(nn.Flatten(), nn.GRU(64, 8)),
        image(SHAPE),
    ),
    "its decoder returns (3, 64); expected (3, 1, 8, 8), an image each, for (3, 4)": lambda: (
        code(),
        nn.Linear(4, 64),
    ),
    "layer encoder.1 (LazyLinear) is lazy; give it its sizes": lambda: (
        nn.Sequential(nn.Flatten(), nn.LazyLinear(8)),
        image(SHAPE),
    ),
    "its encoder fails on shape (3, 1, 8, 8): KeyError: 'no such thing' (test_users_": lambda: (
        code(Layer(act=fails)),
        image(SHAPE),
    ),
    "has no parameter to train": lambda: (
        code().requires_grad_(requires_grad=False),
        image(SHAPE).requires_grad_(requires_grad=False),
    ),
    "layer encoder.1 (Layer) sets held in its forward": lambda: (
        code(Layer(act=keep)),
        image(SHAPE),
    ),
    "layer decoder.0 (Layer) sets held in": lambda: (
        code(),
        nn.Sequential(Layer(0, count), image(SHAPE)),
    ),
    "layer encoder.1 (Layer) sets held in its": lambda: (code(Layer([], append)), image(SHAPE)),
    "layer encoder.1 (Layer) sets _buffers in": lambda: (code(with_buffer(rebind)), image(SHAPE)),
    "layer encoder.1 (Layer) holds a tensor or module in held that is not": lambda: (
        code(Layer(torch.ones(3))),
        image(SHAPE),
    ),
    "a tensor or module in held that is not registered; use": lambda: (
        code(Layer([nn.Linear(2, 2)])),
        image(SHAPE),
    ),
    "layer encoder.1 (Layer) has a random generator in held": lambda: (
        code(Layer(Random(0))),
        image(SHAPE),
    ),
    "layer encoder.1 (Layer) cannot be copied: held: TypeError": lambda: (
        code(Layer(x for x in "ab")),
        image(SHAPE),
    ),
    "its encoder draws numbers that are not PyTorch's": lambda: (
        code(Layer(act=drawn)),
        image(SHAPE),
    ),
    "returns 3; return two modules: encoder, decoder": lambda: 3,
    "cannot be built: ZeroDivisionError: division by zero (test_users_networks.py, line": lambda: (
        1 / 0
    ),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_trained_is_refused_in_a_line_that_names_the_place(tiny, text, tmp_path):
    @network("mine")
    def mine(shape, latent_size):
        return REFUSED[text]()

    config = BASE.replace(model="mine")
    with pytest.raises(UserError) as refused:
        next(train([config], tiny, "cpu"))
    message = str(refused.value)
    assert message.startswith("network 'mine'")
    assert text.replace(", expected", "; expected") in message
    assert "\n" not in message


@every_network
def test_no_network_here_is_refused_and_no_number_is_drawn(name):
    before = torch.get_rng_state()
    check_network(configs(name)[0], SHAPE)
    check_network(configs(name)[0], (3, 12, 10))
    assert torch.equal(torch.get_rng_state(), before)


# --- resume, record, replay, load ----------------------------------------------------------------


SOURCE = """
from torch import nn
from harness import likelihood, metric, network, term

@network("small")
def small(shape, latent_size, width=6):
    pixels = shape[0] * shape[1] * shape[2]
    layers = nn.Linear(pixels, width), nn.Linear(width, 2 * latent_size)
    decoder = nn.Sequential(nn.Linear(latent_size, pixels), nn.Unflatten(1, shape))
    return nn.Sequential(nn.Flatten(), *layers), decoder

@likelihood("absolute")
class Absolute:
    def error(x, output):
        return (x - output).abs().flatten(1).sum(1)

    def neg_log_density(error, scale, D):
        return D * (2 * scale).log() + error / scale

    def mean(output):
        return output

@term("size")
def size(batch, *, power=2):
    return (batch.z.abs() ** power).sum(1).mean()

@metric("brightness", every_epoch=True)
def brightness(model, split):
    return model.reconstruct(split.images[:20]).mean().item()
"""
PARTS = {
    "model": "small",
    "model_options": {"width": 5},
    "likelihood": "absolute",
    "terms": {"size": 0.1},
    "term_options": {"size": {"power": 1}},
}


def users(**changes) -> RunConfig:
    return BASE.replace(**PARTS | changes)


def forget():
    """Forget all parts, as a new process has none."""
    registry._files.clear()
    kept = {*registry.BUILT_IN, *registry.BUILT_IN_LIKELIHOODS, *registry.BUILT_IN_TERMS}
    for names in (registry.NETWORKS, registry.LIKELIHOODS, registry.TERMS, registry.METRICS):
        for name in set(names) - kept:
            del names[name]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    registry.load(f"{path}:small", "network")
    return path


def change(file, text: str = SOURCE + "\n# changed\n"):
    forget()
    file.write_text(text)
    registry.load(f"{file}:small", "network")


@pytest.mark.parametrize("changed", [False, True])
def test_a_checkpoint_is_resumed_with_the_same_source_alone(tiny, file, tmp_path, caplog, changed):
    config, kept = users(epochs=3), Checkpoints(tmp_path / "kept", every=1)
    whole = list(train([config], tiny, "cpu"))[-1]
    stopped = train([config], tiny, "cpu", checkpoints=kept)
    list(islice(stopped, 2))
    stopped.close()
    if changed:
        change(file)
    *_, again = train([config], tiny, "cpu", checkpoints=kept)
    assert again.resumed == ((0,) if changed else (2,))
    assert (
        "it was made with another network small, likelihood absolute, term size" in caplog.text
    ) == changed
    assert torch.equal(flat(again.model(0)), flat(whole.model(0)))
    assert again.val["brightness"] == whole.val["brightness"]


def test_a_checkpoint_has_the_metrics_of_every_epoch(tiny, tmp_path, caplog):
    config, kept = RunConfig(hidden=(4,), latent_size=2, epochs=3), Checkpoints(tmp_path, every=1)
    stopped = train([config], tiny, "cpu", checkpoints=kept)
    next(stopped)
    stopped.close()
    harness.metric("late")(lambda model, split: 1.0)  # measured at the end alone
    *_, again = train([config], tiny, "cpu", checkpoints=kept)
    assert again.resumed == (1,)
    harness.metric("often", every_epoch=True)(lambda model, split: 2.0)
    *_, anew = train([config], tiny, "cpu", checkpoints=kept)
    assert anew.resumed == (0,)
    assert anew.val["often"].tolist() == [2.0]
    assert "it was made with another metric often" in caplog.text


@pytest.fixture
def run(tiny, data, file, tracking_uri):
    """Record a run with a network, a term and a metric of the user; forget them."""
    record.train_and_evaluate(users(), data, experiment="users", tracking_uri=tracking_uri)
    (found,) = connect(tracking_uri).runs("users")
    forget()
    return found


class Terminal(io.StringIO):
    """Standard input of a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


def test_stored_code_is_executed_with_trust_and_the_model_comes_back(
    run, tracking_uri, data, tmp_path, file, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    without = "network 'small' of the stored run is code that was stored with it"
    for trust in (None, False):
        with pytest.raises(UserError, match=f"{without}.*allow it with trust"):
            load_run(run.run_id, tracking_uri, trust=trust)
    assert "small" not in registry.NETWORKS
    first = load_run(run.run_id, tracking_uri, trust=True)
    assert first.config == users()
    assert "size" in registry.TERMS  # the file has all three
    again = load_run(run.run_id, tracking_uri)  # of the same digest: nothing is asked
    change(file, SOURCE)
    from_file = load_run(run.key, tracking_uri)
    images = data.test.images[:5]
    for loaded in (again, from_file):
        assert torch.equal(loaded.model.reconstruct(images), first.model.reconstruct(images))
    change(file)
    with pytest.raises(UserError, match=without):
        load_run(run.run_id, tracking_uri)
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_the_code_and_is_asked(run, tracking_uri, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    with pytest.raises(UserError, match="register the same code before, or allow it"):
        load_run(run.run_id, tracking_uri)
    assert SOURCE in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert load_run(run.run_id, tracking_uri).config == users()
    assert capsys.readouterr().err.endswith("Execute it? [y/N] ")


def test_terms_and_metrics_are_not_needed_to_load_a_run(data, file, tracking_uri):
    config = users(model="mlp", model_options={}, likelihood="gaussian")
    result = record.train_and_evaluate(config, data, experiment="users", tracking_uri=tracking_uri)
    forget()
    (run,) = connect(tracking_uri).runs("users")
    loaded = load_run(run.run_id, tracking_uri)
    assert torch.equal(flat(loaded.model), flat(result.model))
    assert loaded.config.terms == {"size": 0.1}
    assert loaded.metrics["test/brightness"] == result.metrics["brightness"]
    assert not registry.TERMS.keys() - {*registry.BUILT_IN_TERMS}


def replayed(run, uri: str, *more: str) -> int:
    try:
        replay.main([run.run_id, "--tracking-uri", uri, *more])
    except SystemExit as end:
        return end.code
    return 0


def test_a_replay_needs_trust_and_gives_the_same_bits(run, tracking_uri, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert replayed(run, tracking_uri) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: network 'small' of the stored run is code")
    assert printed.count("\n") == 1
    assert replayed(run, tracking_uri, "--trust") == 0
    assert "equal to the last bit" in "".join(capsys.readouterr())
    history = connect(tracking_uri).history(run.run_id)
    assert {"val/brightness", "test/brightness", "val/term/size"} <= {v.metric for v in history}


def test_what_was_not_stored_must_be_registered(run, tracking_uri, tmp_path):
    (folder,) = tmp_path.rglob(f"{run.run_id}/artifacts/model")
    (folder / "network.py").write_text("")
    with pytest.raises(UserError, match="its source was not stored; register it before"):
        load_run(run.run_id, tracking_uri, trust=True)
    (folder / "network.py").write_text("import no_such_module")
    with pytest.raises(UserError, match="cannot be executed: ModuleNotFoundError: No module"):
        load_run(run.run_id, tracking_uri, trust=True)
    (folder / "network.py").write_text("x = 1")
    with pytest.raises(UserError, match="does not register that name"):
        load_run(run.run_id, tracking_uri, trust=True)


@pytest.mark.slow
def test_every_network_is_recorded_replayed_and_loaded(data, tracking_uri, capsys):
    given = [configs(name)[0].replace(batch_size=32) for name in NAMES]
    results = record.train_and_evaluate(
        given, data, experiment="users", tracking_uri=tracking_uri, device="cpu"
    )
    runs = connect(tracking_uri).runs("users")
    forget()
    for name, run, result in zip(NAMES, runs, results, strict=True):
        assert replayed(run, tracking_uri, "--trust") == 0, name
        assert "equal to the last bit" in "".join(capsys.readouterr()), name
        loaded = load_run(run.run_id, tracking_uri, trust=False)  # registered by the replay
        assert torch.equal(flat(loaded.model), flat(result.model)), name
        assert loaded.metrics["test/mse"] == result.metrics["mse"], name
        stored = connect(tracking_uri).client.list_artifacts(run.run_id, "parts")
        assert [file.path for file in stored] == [part_file(f"network {name}")]


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_a_source_is_the_same_whichever_way_its_file_was_executed(tmp_path, monkeypatch, ending):
    file = tmp_path / "imported_network.py"
    text = SOURCE.strip().replace("\n", ending or "\n") + ending
    file.write_bytes(f"# \u00e9\n{text}".encode("utf-8-sig"))
    registry.load(f"{file}:small", "network")
    loaded = registry.source("network", "small")
    monkeypatch.syspath_prepend(tmp_path)
    import imported_network  # noqa: F401, PLC0415

    monkeypatch.delitem(sys.modules, "imported_network")
    assert registry.source("network", "small") == loaded
    assert "brightness" in loaded


@pytest.mark.parametrize("function", [len, __import__("functools").partial(max, 1)])
def test_the_source_of_a_part_is_the_file_that_registers_it(function):
    harness.term("mine")(function)
    assert registry.source("term", "mine") == Path(__file__).read_text()
    exec(compile('harness.term("typed")(len)', "<stdin>", "exec"))
    assert registry.source("term", "typed") == ""
