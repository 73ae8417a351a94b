"""What a GPU captures and replays is eager training, shown on a CPU: a tape replaces CUDA graphs.

The tape records the operations of one call, which it undoes, and replays them on the same tensors.
A value that Python computed from a tensor, a draw that is not copied in place and a buffer that is
made anew all give other numbers than training step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness import RunConfig, registry
from harness.data.dataset import Dataset
from harness.models.vae import VAE
from harness.training import step
from harness.training.checkpoint import Checkpoints
from harness.training.engine import EpochRecord, train

NO_SETTINGS = {"hidden": RunConfig.hidden, "channels": RunConfig.channels}  # of built-in networks
BASE = RunConfig(hidden=(8,), channels=(2, 3), latent_size=3, epochs=3, batch_size=16)
KINDS = {
    "mlp": {},
    "relu": {"head": "relu"},
    "linear": {"model": "linear"},
    "conv": {"model": "conv"},
    "optimal": {"sigma": "optimal"},
    "learned": {"sigma": "learned"},
    "free bits": {"free_bits": 0.1},
    "warm-up": {"kl_warmup_epochs": 2},
    "stochastic": {"likelihood": "bernoulli", "binarization": "stochastic"},
    "deterministic": {"latent": "deterministic", "kl_weight": 0.0},
    "recipe": {
        **{"optimizer": "adamw", "weight_decay": 0.1, "clip_norm": 0.1, "keep": "best"},
        **{"lr_schedule": "exponential", "lr_factor": 0.1, "lr_warmup_epochs": 1},
    },
    "terms": {"terms": {"moved": 0.5}},
    "normalised": {"model": "normalised", **NO_SETTINGS},
}


class Tape(TorchDispatchMode):
    """Operations that were dispatched, in place of a CUDA graph."""

    replays = 0

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - PyTorch's own form
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:  # noqa: D102 - as of a CUDA graph
        Tape.replays += 1
        for func, args, kwargs, result in self.operations:
            for old, new in zip(tensors(result), tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def taped(
    function: Callable[[], Any], device: torch.device, changed: Sequence[Tensor] = ()
) -> Callable[[], Any]:
    """Stand in for `harness.training.step.repeatable`, as on a GPU."""
    before = [tensor.clone() for tensor in changed]
    tape = Tape()
    for record in (False, True):
        if record:
            with tape:
                result = function()
        else:
            function()
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
    for tensor in tensors(result):  # a capture computes nothing
        tensor.fill_(torch.nan)

    def replay() -> Any:  # noqa: ANN401
        tape.replay()
        return result

    return replay


@pytest.fixture
def users_parts(registered: None) -> None:
    """Register a network with a buffer that training changes, and a loss term."""

    @registry.network("normalised")
    def _network(data_shape: Sequence[int], latent_size: int) -> tuple[nn.Module, nn.Module]:
        pixels = data_shape[-1] * data_shape[-2]
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 8), nn.BatchNorm1d(8), nn.Tanh())
        encoder.append(nn.Linear(8, 2 * latent_size))
        return encoder, nn.Sequential(
            nn.Linear(latent_size, pixels), nn.Unflatten(1, tuple(data_shape))
        )

    @registry.term("moved")
    def _term(batch: Any) -> Tensor:  # noqa: ANN401
        gap = (batch.z.mean(0) - batch.prior.mean(0)).square().sum()
        return gap * batch.progress / batch.training_size


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what makes training replay as on a GPU."""

    def begin() -> None:
        monkeypatch.setattr(step, "repeatable", taped)
        monkeypatch.setattr(Tape, "replays", 0)

    return begin


def runs(count: int, **changes: Any) -> list[RunConfig]:  # noqa: ANN401 - fields of RunConfig
    """Return runs that differ in all that those of a stack may differ in."""
    made = [
        BASE.replace(**changes, seed=s, learning_rate=1e-3 * (1 + s // 2)) for s in range(count)
    ]
    if changes.get("latent") == "deterministic":
        return made
    return [config.replace(kl_weight=0.1 * (s + 1)) for s, config in enumerate(made)]


Epochs = list[tuple[tuple[int, ...], dict[str, list[float]], list[VAE]]]


def epochs(
    configs: list[RunConfig], data: Dataset, dropped: Sequence[int] = (), **settings: Any
) -> Epochs:
    """Return the rows, metrics and models of every epoch; drop rows of the first."""
    found = []
    for record in train(configs, data, **{"device": "cpu"} | settings):
        found.append(of(record))
        if record.epoch == 1:
            record.drop(dropped)
    return found


def of(record: EpochRecord) -> tuple[tuple[int, ...], dict[str, list[float]], list[VAE]]:
    metrics = {f"train/{n}": v.tolist() for n, v in record.train.items()}
    metrics |= {n: v.tolist() for n, v in record.val.items()}
    return record.rows, metrics, [record.model(s) for s in range(len(record.rows))]


def check_same(ours: Epochs, its: Epochs) -> None:
    assert len(ours) == len(its)
    for (rows, metrics, models), (rows_, metrics_, models_) in zip(ours, its, strict=True):
        assert rows == rows_
        assert repr(metrics) == repr(metrics_)  # NaN too
        for model, model_ in zip(models, models_, strict=True):
            state = model_.state_dict()
            for name, value in model.state_dict().items():
                assert torch.equal(value, state[name]), name


ALONE = [
    pytest.param(kind, 1, id=f"{name}-alone", marks=[] if name == "mlp" else pytest.mark.slow)
    for name, kind in KINDS.items()
]
IN_A_STACK = [pytest.param(kind, 3, id=name) for name, kind in KINDS.items()]


@pytest.mark.parametrize(("kind", "count"), [*IN_A_STACK, *ALONE])
def test_what_is_captured_trains_and_measures_as_step_by_step(
    tiny, stacks, users_parts, as_on_a_gpu, kind, count
):
    configs, dropped = runs(count, **kind), [1] if count > 1 else []
    expected = epochs(configs, tiny, dropped)
    as_on_a_gpu()
    check_same(epochs(configs, tiny, dropped), expected)
    steps, measured = len(tiny.train) // BASE.batch_size, 1
    assert Tape.replays == BASE.epochs * (steps + measured)


def test_a_stack_resumed_from_checkpoints_is_captured_as_it_goes_on(
    tiny, stacks, users_parts, as_on_a_gpu, tmp_path
):
    configs = runs(3, model="normalised", **NO_SETTINGS)
    expected = epochs(configs, tiny)
    as_on_a_gpu()
    kept = Checkpoints(tmp_path, every=1)
    for record in train(configs, tiny, "cpu", checkpoints=kept):
        if record.epoch == 2:
            break
    resumed = epochs(configs, tiny, checkpoints=kept)
    check_same(resumed[-1:], expected[-1:])
    assert [metrics for _, metrics, _ in resumed] == [metrics for _, metrics, _ in expected]


def test_a_stack_that_a_gpu_has_no_room_for_takes_turns_in_halves(
    tiny, stacks, users_parts, as_on_a_gpu, monkeypatch
):
    configs = runs(3)
    expected = epochs(configs, tiny)
    as_on_a_gpu()
    free: Iterator[float] = iter([0.01, *[0.5] * 2])
    monkeypatch.setattr(step, "free_memory", lambda device: next(free))
    for (rows, metrics, _), (rows_, metrics_, _) in zip(
        epochs(configs, tiny), expected, strict=True
    ):
        assert rows == rows_
        for name, values in metrics.items():  # of other shapes, summed in another order
            assert values == pytest.approx(metrics_[name], rel=1e-4, abs=1e-6), name
    assert not list(free)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_a_gpu_captures_trains_and_measures_as_step_by_step(
    tiny, users_parts, monkeypatch, caplog, kind
):
    configs, settings = runs(3, **kind), {"device": "cuda", "dtype": torch.float64}
    captured = epochs(configs, tiny, [1], **settings)
    assert not caplog.records  # which say that runs are trained one by one
    monkeypatch.setattr(step, "repeatable", lambda function, *others: function)
    expected = epochs(configs, tiny, [1], **settings)
    for (rows, metrics, models), (rows_, metrics_, models_) in zip(captured, expected, strict=True):
        assert rows == rows_
        for name, values in metrics.items():
            assert values == pytest.approx(metrics_[name], rel=1e-8, abs=1e-12, nan_ok=True), name
        for model, model_ in zip(models, models_, strict=True):
            state = model_.state_dict()
            for name, value in model.state_dict().items():
                torch.testing.assert_close(value, state[name], rtol=1e-8, atol=1e-12)


@pytest.mark.gpu
def test_a_term_that_copies_a_constant_to_the_gpu_is_trained_run_by_run(tiny, registered, caplog):
    @registry.term("first two")
    def _term(batch: Any) -> Tensor:  # noqa: ANN401
        weights = torch.tensor([1.0, 2.0], dtype=batch.z.dtype, device=batch.z.device)
        return (batch.z[:, :2] * weights).square().mean()

    configs = runs(2, terms={"first two": 0.1})
    on_gpu, on_cpu = (
        epochs(configs, tiny, device=name, dtype=torch.float64) for name in ("cuda", "cpu")
    )
    assert "one by one" in caplog.text
    for ours, its in zip(on_gpu, on_cpu, strict=True):
        assert ours[1]["loss"] == pytest.approx(its[1]["loss"], rel=1e-8)
