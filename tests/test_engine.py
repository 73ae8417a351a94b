"""Training a stack is training each of its runs alone, step by step the textbook's training."""

import math
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from textbook import BERNOULLI, MIXED, REMEDIES, SMALL, WIDE, Textbook, flat, plain

from harness import engine
from harness.config import RunConfig, UserError
from harness.data.dataset import Dataset
from harness.engine import EpochRecord, resolve_device, train
from harness.objective import with_decoder_variance
from harness.part import Part, begin
from harness.step import products_in

KINDS = [
    {"model": "mlp", "head": "gaussian"},
    {"model": "mlp", "head": "relu"},
    {"model": "linear", "head": "gaussian"},
    {"model": "conv", "head": "gaussian"},
]
all_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(k.values()))


mlp_or_conv = pytest.mark.parametrize("model", ["mlp", "conv"])


def last_of(configs: list[RunConfig], data: Dataset, **settings) -> EpochRecord:
    *_, last = train(configs, data, **{"device": "cpu"} | settings)
    return last


def of_kind(configs: list[RunConfig], kind: dict[str, str]) -> list[RunConfig]:
    return [c.replace(**kind) for c in configs]


# --- epochs -------------------------------------------------------------------------------------


@pytest.fixture(params=["apart", "together"])
def parts(request, monkeypatch):
    """Compute the runs of a stack each alone, as on a CPU, and all as one, as on a GPU."""
    if request.param == "together":
        monkeypatch.setattr(engine, "groups", lambda runs, device: [list(range(runs))])
    return request.param


@all_kinds
def test_a_stack_trains_as_the_textbook_does_with_torchs_adam(tiny, parts, kind):
    # Mixed weights, normalisations, latent sizes, learning rates, warm-ups and seeds.
    check_training(of_kind(MIXED, kind), tiny)


def check_training(configs: list[RunConfig], data: Dataset) -> None:
    """Train a stack and, with plain PyTorch, each of its runs; compare all weights."""
    last = last_of(configs, data, dtype=torch.float64)
    pixels = data.train.pixels(slice(None), torch.float64)
    for s, config in enumerate(configs):
        textbook = Textbook(config, data.image_shape)
        textbook.train_epochs(pixels)
        torch.testing.assert_close(flat(last.model.run(s)), flat(textbook), rtol=1e-9, atol=1e-9)


@mlp_or_conv
def test_every_remedy_trains_by_its_definition(tiny, parts, model):
    # Cyclical warm-up, free bits, optimal and learned decoder variance, in one stack.
    check_training(of_kind(REMEDIES, {"model": model}), tiny)


def test_a_bernoulli_decoder_trains_on_fixed_binary_pixels(tiny, parts):
    configs = [c.replace(binarization="threshold") for c in BERNOULLI]
    check_training(configs, tiny.binarized("threshold"))


def check_alone(configs: list[RunConfig], data: Dataset, dtype: torch.dtype, limit: float) -> None:
    stacked = last_of(configs, data, dtype=dtype)
    for s, config in enumerate(configs):
        alone = last_of([config], data, dtype=dtype)
        ours, its = flat(stacked.model.run(s)), flat(alone.model.run(0))
        torch.testing.assert_close(ours, its, rtol=limit, atol=limit)
        for name, values in alone.val.items():
            expected = pytest.approx(values[0], rel=10 * limit, abs=limit, nan_ok=True)
            assert stacked.val[name][s] == expected, name


@mlp_or_conv
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_cpu_a_run_is_bitwise_the_same_in_any_company_on_any_number_of_cores(
    tiny, threads, dtype, model
):
    check_alone(of_kind(WIDE, {"model": model}), tiny, dtype, limit=0)


@mlp_or_conv
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_runs_computed_together_are_the_runs_alone(tiny, dtype, limit, model, monkeypatch):
    # Other shapes of matrices are summed in another order: 2.3e-7 in float32 after 80 steps.
    monkeypatch.setattr(engine, "groups", lambda runs, device: [list(range(runs))])
    check_alone(of_kind(WIDE, {"model": model}), tiny, dtype, limit)


def test_convolutions_train_in_this_process_where_autograd_refuses_to_work_in_a_fork():
    # As beside a GPU, or if a model was exported before the process first differentiated. Nothing
    # of the numbers may change.
    code = """
import torch, harness
from harness import autograd

torch.set_num_threads(2)
data = harness.load_dataset("digits")
runs = [harness.RunConfig(model="conv", channels=(2, 2), epochs=1, seed=s) for s in (0, 1)]
assert autograd.may_fork(runs[0])
*_, forked = harness.train(runs, data, "cpu")
torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
autograd._differentiate()
assert not autograd.may_fork(runs[0])
*_, here = harness.train(runs, data, "cpu")
assert all(torch.equal(*pair) for pair in zip(forked.model.parameters(), here.model.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@mlp_or_conv
def test_cores_change_no_bit(tiny, model, monkeypatch):
    by_cores, configs = [], of_kind(WIDE, {"model": model})
    for cores in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda cores=cores: cores)
        by_cores.append(last_of(configs, tiny))
    first, second = by_cores
    for name, weights in first.model.state_dict().items():
        assert torch.equal(weights, second.model.state_dict()[name])
    for name, values in first.val.items():
        np.testing.assert_array_equal(values, second.val[name])


def test_permuting_the_stack_permutes_the_results(tiny, parts):
    order = [3, 0, 4, 2, 1]
    first = last_of(MIXED, tiny, dtype=torch.float64)
    second = last_of([MIXED[i] for i in order], tiny, dtype=torch.float64)
    for row, i in enumerate(order):
        ours, its = flat(second.model.run(row)), flat(first.model.run(i))
        torch.testing.assert_close(ours, its, rtol=1e-9, atol=1e-9)
    for name, values in first.val.items():
        np.testing.assert_allclose(second.val[name], values[order], rtol=1e-9, err_msg=name)


def test_training_repeats_bitwise(tiny, threads, parts):
    first, second = last_of(WIDE, tiny), last_of(WIDE, tiny)
    for name, weights in first.model.state_dict().items():
        assert torch.equal(weights, second.model.state_dict()[name])
    for name, values in first.val.items():
        np.testing.assert_array_equal(values, second.val[name])


def test_a_longer_training_begins_as_a_shorter_one(tiny, parts):
    longer = next(train([c.replace(epochs=9) for c in MIXED], tiny, device="cpu"))
    shorter = last_of([c.replace(epochs=1) for c in MIXED], tiny)
    for name, values in longer.val.items():
        np.testing.assert_array_equal(values, shorter.val[name])


def test_training_leaves_the_global_generator_alone(tiny):
    state = torch.get_rng_state()
    last_of(MIXED, tiny)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_gives_the_threads_back_also_when_it_is_stopped(tiny, threads):
    last_of(MIXED, tiny)
    assert torch.get_num_threads() == threads
    stopped = train(MIXED, tiny, device="cpu")
    next(stopped)
    stopped.close()
    assert torch.get_num_threads() == threads


def test_training_lowers_the_loss(data):
    config = SMALL.replace(kl_weight=0.05, learning_rate=1e-2, epochs=3)
    values = [r.val["loss"][0] for r in train([config], data, device="cpu")]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.9 * values[0]


# --- warm-up ------------------------------------------------------------------------------------


def test_the_first_step_of_a_warm_up_has_weight_zero(tiny):
    one_step = replace(tiny, train=tiny.train.head(SMALL.batch_size))
    warm = SMALL.replace(kl_warmup_epochs=2, epochs=1, kl_weight=5.0)
    first = last_of([warm], one_step).model.run(0)
    without = last_of([warm.replace(kl_weight=0.0)], one_step).model.run(0)
    at_once = last_of([warm.replace(kl_warmup_epochs=0)], one_step).model.run(0)
    assert torch.equal(flat(first), flat(without))
    assert not torch.equal(flat(first), flat(at_once))


def test_a_record_tells_the_warm_up_at_its_last_step(tiny):
    configs = [SMALL.replace(kl_warmup_epochs=n, epochs=3) for n in (0, 1, 2)]
    told = [r.kl_warmup.tolist() for r in train(configs, tiny, device="cpu")]
    assert told == [[1.0, 11 / 12, 11 / 24], [1.0, 1.0, 23 / 24], [1.0, 1.0, 1.0]]


# --- a run that diverges ------------------------------------------------------------------------


def live_weights(record: EpochRecord, row: int) -> list[torch.Tensor]:
    """Return the weights of a run in training, wherever it is computed."""
    rows = [(part, s) for part in record.models for s in range(len(part.configs))]
    part, s = rows[row]
    return [parameter[s : s + 1] for parameter in part.parameters()]


def check_untouched(broken: EpochRecord, whole: EpochRecord, row: int) -> None:
    """Assert that one row is NaN and the others are bitwise those of the whole stack."""
    assert np.isnan(broken.val["mse"][row])
    others = [s for s in range(len(MIXED)) if s != row]
    for s in others:
        assert torch.equal(flat(broken.model.run(s)), flat(whole.model.run(s)))
    for name, values in whole.val.items():
        np.testing.assert_array_equal(broken.val[name][others], values[others])


@mlp_or_conv
@pytest.mark.parametrize("rate", [1e-3, None], ids=["one rate", "mixed rates"])
def test_nan_in_one_run_leaves_the_others_bitwise_untouched(tiny, parts, rate, model):
    configs = [c.replace(learning_rate=rate or c.learning_rate, model=model) for c in MIXED]
    whole = last_of(configs, tiny)
    for record in train(configs, tiny, device="cpu"):
        if record.epoch == 1:
            with torch.no_grad():
                for parameter in live_weights(record, row=2):
                    parameter[:] = math.nan
    check_untouched(record, whole, row=2)


def test_an_enormous_learning_rate_leaves_the_other_runs_bitwise_untouched(tiny, parts):
    wild = [*MIXED[:2], MIXED[2].replace(learning_rate=1e38), *MIXED[3:]]
    check_untouched(last_of(wild, tiny), last_of(MIXED, tiny), row=2)


# --- runs that are dropped ----------------------------------------------------------------------

LONGER = [c.replace(epochs=4) for c in MIXED]
DROPS = {1: [1, 2], 3: [0]}
"""Rows dropped after an epoch; run 2 has the stack's largest latent size."""

one_or_many_rates = pytest.mark.parametrize("rate", [1e-3, None], ids=["one rate", "mixed rates"])


def with_rate(rate: float | None, model: str = "mlp") -> list[RunConfig]:
    return [c.replace(learning_rate=rate or c.learning_rate, model=model) for c in LONGER]


def dropping(configs: list[RunConfig], data: Dataset, **settings) -> list[EpochRecord]:
    records = []
    for record in train(configs, data, device="cpu", **settings):
        record.drop(DROPS.get(record.epoch, []))
        records.append(record)
    return records


@one_or_many_rates
@pytest.mark.parametrize(
    ("model", "dtype", "limit"),
    [("mlp", torch.float64, 1e-9), ("mlp", torch.float32, 1e-5), ("conv", torch.float64, 1e-9)],
)
def test_the_runs_that_are_left_go_on_as_if_none_was_dropped(
    tiny, parts, rate, model, dtype, limit
):
    configs = with_rate(rate, model)
    whole = list(train(configs, tiny, device="cpu", dtype=dtype))
    cut = dropping(configs, tiny, dtype=dtype)
    assert [r.rows for r in cut] == [(0, 1, 2, 3, 4), (0, 3, 4), (0, 3, 4), (3, 4)]
    for ours, its in zip(cut, whole, strict=True):
        assert ours.model.configs == tuple(configs[row] for row in ours.rows)
        assert ours.images == 96 * len(ours.rows)
        for name, values in its.val.items():  # no kl/15 without the run that has it
            left = ours.val.get(name, np.full(len(ours.rows), np.nan))
            expected = values[list(ours.rows)]
            np.testing.assert_allclose(left, expected, rtol=10 * limit, atol=limit, err_msg=name)
    for s, row in enumerate(cut[-1].rows):
        ours, its = flat(cut[-1].model.run(s)), flat(whole[-1].model.run(row))
        torch.testing.assert_close(ours, its, rtol=limit, atol=limit)


def test_dropping_every_run_ends_the_training(tiny, parts):
    records = []
    for record in train(LONGER, tiny, device="cpu"):
        record.drop(range(len(record.rows)) if record.epoch == 2 else [])
        records.append(record.epoch)
    assert records == [1, 2]


def test_a_dropped_run_that_diverged_leaves_nothing_behind(tiny, parts):
    wild = [*MIXED[:2], MIXED[2].replace(learning_rate=1e38), *MIXED[3:]]
    wild = [c.replace(epochs=3) for c in wild]
    for record in train(wild, tiny, device="cpu"):
        record.drop(np.flatnonzero(np.isnan(record.val["mse"])))
    assert record.rows == (0, 1, 3, 4)
    assert np.isfinite(record.val["neg_elbo"]).all()


# --- memory -------------------------------------------------------------------------------------


def test_a_stack_without_room_is_computed_in_halves_with_the_same_results(tiny, monkeypatch):
    monkeypatch.setattr(engine, "groups", lambda runs, device: [list(range(runs))])
    whole = last_of(MIXED, tiny, dtype=torch.float64)
    rehearse = Part.rehearse

    def room_for_two(self):
        rehearse(self)
        if len(self.rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Part, "rehearse", room_for_two)
    narrow = last_of(MIXED, tiny, dtype=torch.float64)
    assert [len(model.configs) for model in narrow.models] == [2, 1, 2]
    assert narrow.rows == whole.rows
    for name, values in whole.val.items():
        np.testing.assert_allclose(narrow.val[name], values, rtol=1e-9, atol=1e-9, err_msg=name)


def test_what_did_not_fit_is_gone_before_the_halves_begin(tiny, monkeypatch):
    monkeypatch.setattr(engine, "groups", lambda runs, device: [list(range(runs))])
    failed = []

    def room_for_two(self):
        assert all(part() is None for part in failed)
        if len(self.rows) > 2:
            failed.append(weakref.ref(self.model))
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")

    monkeypatch.setattr(Part, "rehearse", room_for_two)
    assert len(last_of(MIXED, tiny).models) == 3
    assert len(failed) == 2


def test_another_error_of_a_rehearsal_is_no_lack_of_memory(tiny, monkeypatch):
    def broken(self):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(Part, "rehearse", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        next(train(MIXED, tiny, device="cpu"))


def test_a_run_without_room_says_so(tiny, monkeypatch):
    def no_room(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Part, "rehearse", no_room)
    with pytest.raises(UserError, match="one run needs more memory than is free"):
        next(train(MIXED, tiny, device="cpu"))


# --- records and results ------------------------------------------------------------------------


def test_a_record_an_epoch_with_an_array_per_metric(tiny, parts):
    records = list(train(MIXED, tiny, device="cpu"))
    assert [r.epoch for r in records] == [1, 2]
    for record in records:
        assert record.images == 96 * len(MIXED)
        assert record.seconds > 0
        assert record.images_per_second == record.images / record.seconds
        assert record.train.keys() == record.val.keys()
        assert {"loss", "mse", "rate", "kl/15", "mse_class/9"} <= record.val.keys()
        for values in (*record.train.values(), *record.val.values()):
            assert values.shape == (len(MIXED),)
            assert values.dtype == np.float64


def test_an_incomplete_batch_is_not_counted(tiny):
    record = last_of([SMALL.replace(batch_size=36)], tiny)
    assert record.images == 72


def test_training_metrics_are_those_of_the_first_training_images(tiny):
    # With the first training images as validation split both metrics measure the same images;
    # their noise differs, and a deterministic latent has none.
    same = replace(tiny, val=tiny.train.head(40))
    record = last_of(plain(MIXED), same)
    for name in ("mse", "loss", "active_units", "mse_class/3"):
        np.testing.assert_array_equal(record.train[name], record.val[name])


# --- what cannot be trained ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"hidden": (16,)},
        {"head": "relu"},
        {"model": "linear"},
        {"batch_size": 4},
        {"epochs": 3},
        {"latent": "deterministic", "kl_weight": 0},
    ],
    ids=lambda o: next(iter(o)),
)
def test_static_settings_cannot_be_mixed(tiny, other):
    with pytest.raises(UserError, match="one stack must agree"):
        next(train([SMALL, SMALL.replace(**other)], tiny, device="cpu"))


def test_an_empty_stack_is_refused(tiny):
    with pytest.raises(UserError, match="give at least one"):
        next(train([], tiny, device="cpu"))


def test_a_batch_larger_than_the_data_is_refused(tiny):
    with pytest.raises(UserError, match="batch_size=97: digits has 96 training images"):
        next(train([SMALL.replace(batch_size=97)], tiny, device="cpu"))


def test_an_unknown_device_is_refused(tiny):
    with pytest.raises(UserError, match="device='tpu': choose one of auto, cpu, cuda"):
        next(train([SMALL], tiny, device="tpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(tiny):
    with pytest.raises(UserError, match="no CUDA device"):
        next(train([SMALL], tiny, device="cuda"))
    assert resolve_device("auto") == torch.device("cpu")


# --- CPU and GPU --------------------------------------------------------------------------------


def test_training_in_float64_sees_the_pixels_that_evaluation_sees():
    images = np.arange(40 * 9, dtype=np.uint8).reshape(40, 3, 3)
    data = Dataset.from_tensors("every-grey-level", images)
    config = RunConfig(hidden=(4,), latent_size=1, batch_size=8, epochs=1)
    linear = torch.zeros(2, 1, dtype=torch.float64)
    (part,) = begin([config], [0], data, data, linear, torch.float64)
    part.train(1)
    last = part.step.order[-1]
    assert torch.equal(part.step.x, data.train.pixels(last, torch.float64))


@pytest.mark.parametrize("rows", [[-1], [5], [0, 99]])
def test_rows_that_a_record_does_not_have_cannot_be_dropped(tiny, rows):
    record = next(train(MIXED, tiny, "cpu"))
    with pytest.raises(UserError, match=r"rows of this record are 0 to 4"):
        record.drop(rows)
    assert not record.dropped


def test_a_dtype_that_is_not_trained_in_is_refused(tiny):
    with pytest.raises(UserError, match=r"dtype=torch.float16: choose"):
        next(train(MIXED, tiny, "cpu", torch.float16))


def test_convolutions_go_on_when_every_run_that_learns_its_variance_is_dropped(tiny, monkeypatch):
    monkeypatch.setattr(engine, "groups", lambda runs, device: [list(range(runs))])
    configs = [SMALL.replace(model="conv", epochs=2, sigma=s) for s in ("fixed", "learned")]
    for record in train(configs, tiny, "cpu"):
        record.drop([row for row in range(len(record.rows)) if record.rows[row] == 1])
    assert record.rows == (0,)
    assert np.isfinite(record.val["neg_elbo"]).all()


def test_a_cpu_has_no_tf32(data):
    with pytest.raises(UserError, match="precision='tf32' on a CPU: only a GPU has it"):
        next(train([RunConfig(precision="tf32")], data, "cpu"))


def test_products_are_exact_but_where_tf32_is_asked_for():
    def found():
        return torch.backends.cuda.matmul.fp32_precision

    before = found()
    with products_in("tf32"):
        assert found() == "tf32"
        with products_in("float32"):
            assert found() == "ieee"
    assert found() == before


@pytest.mark.gpu
def test_tf32_changes_training_by_its_rounding_only(data):
    runs = [RunConfig(kl_weight=0.02, epochs=1, precision=p) for p in ("float32", "tf32")]
    exact, rounded = (last_of([run], data, device="cuda") for run in runs)
    ours, its = flat(rounded.model.run(0)), flat(exact.model.run(0))
    assert not torch.equal(ours, its)
    torch.testing.assert_close(ours, its, rtol=0, atol=0.05)
    np.testing.assert_allclose(rounded.val["mse"], exact.val["mse"], rtol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)], ids=["f64", "f32"]
)
@mlp_or_conv
def test_an_epoch_on_the_gpu_is_the_epoch_on_the_cpu(data, dtype, tolerance, model):
    configs = [c.replace(epochs=1, batch_size=32, model=model) for c in MIXED]
    cpu, cuda = (last_of(configs, data, device=d, dtype=dtype) for d in ("cpu", "cuda"))
    assert cuda.model.device.type == "cuda"
    for s in range(len(configs)):
        ours, its = flat(cuda.model.run(s)), flat(cpu.model.run(s))
        torch.testing.assert_close(ours, its, rtol=tolerance, atol=tolerance)
    for name in ("mse", "distortion", "loss", "neg_elbo"):
        np.testing.assert_allclose(cuda.val[name], cpu.val[name], rtol=10 * tolerance)


# --- one curve ----------------------------------------------------------------------------------


def test_at_equal_decoder_variance_the_four_modes_agree_within_the_spread_of_seeds(data):
    modes = ("pixels", "batch", "latent", "sum")
    base = RunConfig(epochs=4)
    configs = [
        with_decoder_variance(base.replace(kl_normalization=mode, seed=seed), 0.01, data.pixels)
        for mode in modes
        for seed in range(3)
    ]
    assert len({c.kl_weight for c in configs}) == 4
    elbo = last_of(configs, data).val["neg_elbo"].reshape(len(modes), 3)
    between_modes, between_seeds = np.ptp(elbo, axis=0).max(), elbo.std(axis=1, ddof=1).min()
    assert between_modes < 1e-3 * between_seeds
