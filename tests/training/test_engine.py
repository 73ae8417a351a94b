"""Training many runs is training each of them alone, step by step the textbook's training."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from textbook import ALIKE, BERNOULLI, KINDS, MIXED, REMEDIES, SMALL, WIDE, Textbook, flat, plain

import harness
from harness import streams
from harness.config import RunConfig, UserError
from harness.data.dataset import Dataset
from harness.objective import with_decoder_variance
from harness.training.engine import EpochRecord, resolve_device, train
from harness.training.step import Step

all_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(k.values()))


mlp_or_conv = pytest.mark.parametrize("model", ["mlp", "conv"])


def last_of(configs: list[RunConfig], data: Dataset, **settings) -> EpochRecord:
    *_, last = train(configs, data, **{"device": "cpu"} | settings)
    return last


def of_kind(configs: list[RunConfig], kind: dict[str, str]) -> list[RunConfig]:
    return [c.replace(**kind) for c in configs]


# --- epochs -------------------------------------------------------------------------------------


@pytest.fixture
def runs(parts):
    """Return runs, of different shapes where each is computed alone."""
    return MIXED if parts == "apart" else ALIKE


@all_kinds
def test_runs_train_as_the_textbook_does_with_torchs_adam(tiny, runs, kind):
    # Mixed weights, normalisations, learning rates, warm-ups and seeds.
    check_training(of_kind(runs, kind), tiny)


def check_training(configs: list[RunConfig], data: Dataset) -> None:
    """Train runs together and, with plain PyTorch, each of them; compare all weights."""
    last = last_of(configs, data, dtype=torch.float64)
    pixels = data.train.pixels(slice(None), torch.float64)
    for s, config in enumerate(configs):
        textbook = Textbook(config, data.image_shape)
        textbook.train_epochs(pixels)
        torch.testing.assert_close(flat(last.model(s)), flat(textbook), rtol=1e-9, atol=1e-9)


@mlp_or_conv
def test_every_remedy_trains_by_its_definition(tiny, parts, model):
    # Cyclical warm-up, free bits, optimal and learned decoder variance.
    latents = {} if parts == "apart" else {"latent_size": 3}
    check_training(of_kind(REMEDIES, {"model": model} | latents), tiny)


def test_a_bernoulli_decoder_trains_on_fixed_binary_pixels(tiny, parts):
    configs = [c.replace(binarization="threshold") for c in BERNOULLI]
    check_training(configs, tiny.drawn("threshold"))


def trained_alone(
    configs: list[RunConfig], data: Dataset, dtype: torch.dtype = torch.float32
) -> list[EpochRecord]:
    return [last_of([config], data, dtype=dtype) for config in configs]


def check_same(together: EpochRecord, alone: list[EpochRecord], limit: float) -> None:
    for s, one in enumerate(alone):
        ours, its = flat(together.model(s)), flat(one.model(0))
        torch.testing.assert_close(ours, its, rtol=limit, atol=limit)
        for name, values in one.val.items():
            expected = pytest.approx(values[0], rel=10 * limit, abs=limit, nan_ok=True)
            assert together.val[name][s] == expected, name


@mlp_or_conv
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_cpu_a_run_is_bitwise_the_same_in_any_company_on_any_number_of_cores(
    tiny, threads, dtype, model
):
    configs = of_kind(WIDE, {"model": model})
    alone = trained_alone(configs, tiny, dtype)
    check_same(last_of(configs, tiny, dtype=dtype), alone, limit=0)


@mlp_or_conv
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_the_runs_of_a_stack_are_the_runs_alone(tiny, dtype, limit, model, request):
    # Other shapes of matrices are summed in another order: 2.3e-7 in float32 after 80 steps.
    configs = [c.replace(latent_size=4) for c in of_kind(WIDE, {"model": model})]
    alone = trained_alone(configs, tiny, dtype)
    request.getfixturevalue("together")
    check_same(last_of(configs, tiny, dtype=dtype), alone, limit)


def check_bitwise(ours: EpochRecord, its: EpochRecord) -> None:
    assert ours.rows == its.rows
    for row in range(len(ours.rows)):
        assert torch.equal(flat(ours.model(row)), flat(its.model(row)))
    for name, values in ours.val.items():
        np.testing.assert_array_equal(values, its.val[name])


@mlp_or_conv
def test_cores_change_no_bit(tiny, model, monkeypatch):
    by_cores, configs = [], of_kind(WIDE, {"model": model})
    for cores in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda cores=cores: cores)
        by_cores.append(last_of(configs, tiny))
    check_bitwise(*by_cores)


def test_permuting_the_runs_permutes_the_results(tiny, runs):
    order = [3, 0, 4, 2, 1]
    first = last_of(runs, tiny, dtype=torch.float64)
    second = last_of([runs[i] for i in order], tiny, dtype=torch.float64)
    for row, i in enumerate(order):
        ours, its = flat(second.model(row)), flat(first.model(i))
        torch.testing.assert_close(ours, its, rtol=1e-9, atol=1e-9)
    for name, values in first.val.items():
        np.testing.assert_allclose(second.val[name], values[order], rtol=1e-9, err_msg=name)


def test_training_repeats_bitwise(tiny, threads):
    check_bitwise(last_of(WIDE, tiny), last_of(WIDE, tiny))


def test_training_a_stack_repeats_bitwise(tiny, together):
    check_bitwise(last_of(ALIKE, tiny), last_of(ALIKE, tiny))


def test_a_longer_training_begins_as_a_shorter_one(tiny, runs):
    longer = next(train([c.replace(epochs=9) for c in runs], tiny, device="cpu"))
    shorter = last_of([c.replace(epochs=1) for c in runs], tiny)
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
    first = last_of([warm], one_step).model(0)
    without = last_of([warm.replace(kl_weight=0.0)], one_step).model(0)
    at_once = last_of([warm.replace(kl_warmup_epochs=0)], one_step).model(0)
    assert torch.equal(flat(first), flat(without))
    assert not torch.equal(flat(first), flat(at_once))


def test_a_record_tells_the_warm_up_at_its_last_step(tiny):
    configs = [SMALL.replace(kl_warmup_epochs=n, epochs=3) for n in (0, 1, 2)]
    told = [r.kl_warmup.tolist() for r in train(configs, tiny, device="cpu")]
    assert told == [[1.0, 11 / 12, 11 / 24], [1.0, 1.0, 23 / 24], [1.0, 1.0, 1.0]]


# --- a run that diverges ------------------------------------------------------------------------


def check_untouched(broken: EpochRecord, whole: EpochRecord, row: int) -> None:
    """Assert that one row is NaN and the others are bitwise those of another training."""
    assert np.isnan(broken.val["mse"][row])
    others = [s for s in range(len(whole.rows)) if s != row]
    for s in others:
        assert torch.equal(flat(broken.model(s)), flat(whole.model(s)))
    for name, values in whole.val.items():
        np.testing.assert_array_equal(broken.val[name][others], values[others])


def with_one_diverging(configs: list[RunConfig]) -> list[RunConfig]:
    return [*configs[:2], configs[2].replace(learning_rate=1e38), *configs[3:]]


@mlp_or_conv
@pytest.mark.parametrize("rate", [1e-3, None], ids=["one rate", "mixed rates"])
def test_nan_in_one_run_leaves_the_others_bitwise_untouched(tiny, runs, rate, model):
    configs = [c.replace(learning_rate=rate or c.learning_rate, model=model) for c in runs]
    broken = last_of(with_one_diverging(configs), tiny)
    check_untouched(broken, last_of(configs, tiny), row=2)


# --- runs that are dropped ----------------------------------------------------------------------

DROPS = {1: [1, 2], 3: [0]}
"""Rows dropped after an epoch; run 2 of MIXED has the largest latent size."""

one_or_many_rates = pytest.mark.parametrize("rate", [1e-3, None], ids=["one rate", "mixed rates"])


def longer(configs: list[RunConfig], rate: float | None = None, model: str = "mlp"):
    return [
        c.replace(epochs=4, learning_rate=rate or c.learning_rate, model=model) for c in configs
    ]


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
def test_the_runs_that_are_left_go_on_as_if_none_was_dropped(tiny, runs, rate, model, dtype, limit):
    configs = longer(runs, rate, model)
    whole = list(train(configs, tiny, device="cpu", dtype=dtype))
    cut = dropping(configs, tiny, dtype=dtype)
    assert [r.rows for r in cut] == [(0, 1, 2, 3, 4), (0, 3, 4), (0, 3, 4), (3, 4)]
    for ours, its in zip(cut, whole, strict=True):
        assert ours.configs == tuple(configs[row] for row in ours.rows)
        assert ours.images == 96 * len(ours.rows)
        for name, values in its.val.items():  # no kl/15 without the run that has it
            left = ours.val.get(name, np.full(len(ours.rows), np.nan))
            expected = values[list(ours.rows)]
            np.testing.assert_allclose(left, expected, rtol=10 * limit, atol=limit, err_msg=name)
    for s, row in enumerate(cut[-1].rows):
        ours, its = flat(cut[-1].model(s)), flat(whole[-1].model(row))
        torch.testing.assert_close(ours, its, rtol=limit, atol=limit)


def test_records_keep_the_order_of_the_list_whatever_stacks_it_makes(tiny, together):
    mixed = [SMALL.replace(latent_size=n, seed=s, epochs=3) for s, n in enumerate((2, 3, 2, 3, 4))]
    for record in train(mixed, tiny, "cpu"):
        assert record.configs == tuple(mixed[row] for row in record.rows)
        for s, config in enumerate(record.configs):
            assert record.model(s).latent_size == config.latent_size
        record.drop([1, 2] if record.epoch == 1 else [])
    assert record.rows == (0, 3, 4)


def test_dropping_every_run_ends_the_training(tiny, runs):
    records = []
    for record in train(longer(runs), tiny, device="cpu"):
        record.drop(range(len(record.rows)) if record.epoch == 2 else [])
        records.append(record.epoch)
    assert records == [1, 2]


def test_a_dropped_run_that_diverged_leaves_nothing_behind(tiny, runs):
    for record in train(longer(with_one_diverging(runs)), tiny, device="cpu"):
        record.drop(np.flatnonzero(np.isnan(record.val["mse"])))
    assert record.rows == (0, 1, 3, 4)
    assert np.isfinite(record.val["neg_elbo"]).all()


# --- memory -------------------------------------------------------------------------------------


def test_a_stack_without_room_is_computed_in_halves_with_the_same_results(
    tiny, together, monkeypatch
):
    whole, parts, capture = last_of(ALIKE, tiny, dtype=torch.float64), [], Step.capture

    def room_for_two(self):
        if len(self.state.rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        parts.append(self.state.rows)
        capture(self)

    monkeypatch.setattr(Step, "capture", room_for_two)
    narrow = last_of(ALIKE, tiny, dtype=torch.float64)
    assert parts == [[0, 1], [2], [3, 4]]
    assert narrow.rows == whole.rows
    for name, values in whole.val.items():
        np.testing.assert_allclose(narrow.val[name], values, rtol=1e-9, atol=1e-9, err_msg=name)


def test_what_did_not_fit_is_gone_before_the_halves_begin(tiny, together, monkeypatch):
    failed, capture = [], Step.capture

    def room_for_two(self):
        assert all(state() is None for state in failed)
        if len(self.state.rows) > 2:
            failed.append(weakref.ref(self.state))
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED") from torch.OutOfMemoryError
        capture(self)

    monkeypatch.setattr(Step, "capture", room_for_two)
    assert last_of(ALIKE, tiny).rows == (0, 1, 2, 3, 4)
    assert len(failed) == 2


def test_another_error_of_a_capture_is_no_lack_of_memory(tiny, stacks, monkeypatch):
    def broken(self):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(Step, "capture", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        next(train(MIXED, tiny, device="cpu"))


def test_a_run_without_room_is_a_user_error(tiny, stacks, monkeypatch):
    def no_room(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Step, "capture", no_room)
    with pytest.raises(UserError, match="one run needs more memory than is free"):
        next(train(MIXED, tiny, device="cpu"))


# --- records and results ------------------------------------------------------------------------


def test_a_record_an_epoch_with_an_array_per_metric(tiny, runs):
    records = list(train(runs, tiny, device="cpu"))
    assert [r.epoch for r in records] == [1, 2]
    for record in records:
        assert record.images == 96 * len(runs)
        assert record.configs == tuple(runs)
        assert record.seconds > 0
        assert record.images_per_second == record.images / record.seconds
        assert record.train.keys() == record.val.keys()
        assert {"loss", "mse", "rate", "kl/3", "mse_class/9"} <= record.val.keys()
        for values in (*record.train.values(), *record.val.values()):
            assert values.shape == (len(runs),)
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


def test_runs_of_any_shape_are_trained_at_once(tiny, parts):
    configs = [
        SMALL,
        SMALL.replace(hidden=(16,)),
        SMALL.replace(model="linear", head="relu", seed=1),
        SMALL.replace(model="conv", batch_size=4),
        SMALL.replace(seed=1, likelihood="bernoulli", binarization="stochastic"),
        *plain([SMALL]),
    ]
    check_same(last_of(configs, tiny), trained_alone(configs, tiny), limit=0)


def test_epochs_cannot_be_mixed(tiny):
    with pytest.raises(UserError, match="epochs: .* must agree; given 2, 3"):
        next(train([SMALL, SMALL.replace(epochs=3)], tiny, device="cpu"))


def test_precisions_cannot_be_mixed(tiny):
    with pytest.raises(UserError, match="precision: .* must agree; given float32, tf32"):
        next(train([SMALL, SMALL.replace(precision="tf32")], tiny, device="cpu"))


def test_an_empty_list_is_refused(tiny):
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


def test_training_in_float64_sees_the_pixels_that_evaluation_sees(registered):
    images = np.arange(40 * 9, dtype=np.uint8).reshape(40, 3, 3)
    data, seen = Dataset.from_tensors("every-grey-level", images), []

    @harness.term("seen")
    def look(batch):
        if torch.is_grad_enabled():
            seen.append(batch.x)
        return batch.x.sum() * 0

    config = RunConfig(hidden=(4,), latent_size=1, batch_size=8, epochs=1, terms={"seen": 1})
    last_of([config], data, dtype=torch.float64)
    rows = streams.batches(config, len(data.train), 1)
    pixels = data.train.pixels(rows, torch.float64)
    assert len(seen) == 4
    assert torch.equal(seen[-1].flatten(1), pixels[-8:])  # a batch's buffer is written anew


@pytest.mark.parametrize("rows", [[-1], [5], [0, 99]])
def test_rows_that_a_record_does_not_have_cannot_be_dropped(tiny, rows):
    record = next(train(MIXED, tiny, "cpu"))
    with pytest.raises(UserError, match=r"rows of this record are 0 to 4"):
        record.drop(rows)
    assert not record.dropped


def test_a_dtype_that_is_not_trained_in_is_refused(tiny):
    with pytest.raises(UserError, match=r"dtype=torch.float16: choose"):
        next(train(MIXED, tiny, "cpu", torch.float16))


def test_a_cpu_has_no_tf32(data):
    with pytest.raises(UserError, match="precision='tf32' on a CPU: only a GPU has it"):
        next(train([RunConfig(precision="tf32")], data, "cpu"))


@pytest.mark.gpu
def test_tf32_changes_training_by_its_rounding_only(data):
    both = [RunConfig(kl_weight=0.02, epochs=1, precision=p) for p in ("float32", "tf32")]
    exact, rounded = (last_of([run], data, device="cuda") for run in both)
    ours, its = flat(rounded.model(0)), flat(exact.model(0))
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
    assert cuda.model(0).device.type == "cuda"
    for s in range(len(configs)):
        ours, its = flat(cuda.model(s)), flat(cpu.model(s))
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
