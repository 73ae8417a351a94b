"""Any list of runs gives its results in order, whatever they were trained with."""

import pytest
import torch
from textbook import MIXED, SMALL, flat, plain

from harness.metrics.evaluate import evaluate
from harness.training import engine
from harness.training.engine import (
    best_epoch,
    flat_record,
    resolve_device,
    together,
    train,
    train_and_evaluate,
)


def test_a_plain_autoencoder_has_no_rate_and_its_loss_is_the_error(tiny):
    (result,) = train_and_evaluate(plain([SMALL]), tiny, device="cpu")
    for named in (result.metrics, *result.history):
        names = {name.split("/", 1)[-1] for name in named}
        assert {"loss", "mse", "distortion", "active_units"} <= names
        assert not {"rate", "neg_elbo"} & names
        assert not any("kl/" in name for name in named)
        assert named["val/loss"] == named["val/mse"]


def test_kl_weight_zero_still_measures_the_rate(tiny):
    (result,) = train_and_evaluate([SMALL.replace(kl_weight=0.0)], tiny, device="cpu")
    assert result.metrics["loss"] == result.metrics["mse"]
    assert result.metrics["calibration_ratio"] == 0
    assert result.metrics["rate"] > 0
    assert result.metrics["neg_elbo"] == result.metrics["distortion"] + result.metrics["rate"]


def test_a_flat_record_has_what_the_run_has(tiny):
    *_, record = train(MIXED, tiny, device="cpu")
    named = flat_record(record, 1)
    assert {k for k in named if "/kl/" in k} == {
        f"{p}/kl/{i}" for p in ("train", "val") for i in range(3)
    }
    assert named["val/mse"] == record.val["mse"][1]
    assert named["train/mse"] == record.train["mse"][1]


def test_results_come_in_order_whatever_their_settings(tiny):
    wide = SMALL.replace(hidden=(20,), seed=4)
    longer = wide.replace(epochs=3)
    configs = [MIXED[0], wide, plain([MIXED[1]])[0], longer, MIXED[2], wide.replace(seed=5)]
    results = train_and_evaluate(configs, tiny, device="cpu", dtype=torch.float64)
    assert [r.config for r in results] == configs
    for result in results:
        (alone,) = train_and_evaluate([result.config], tiny, device="cpu", dtype=torch.float64)
        torch.testing.assert_close(flat(result.model), flat(alone.model), rtol=1e-9, atol=1e-9)
        assert result.metrics == pytest.approx(alone.metrics, rel=1e-8)
        assert len(result.history) == result.config.epochs
        assert result.history[-1]["val/mse"] == result.metrics["val/mse"]


def test_no_configs_give_no_results(tiny):
    assert train_and_evaluate([], tiny, device="cpu") == []


def test_one_run_gives_one_result(tiny):
    result = train_and_evaluate(SMALL, tiny, device="cpu")
    (same,) = train_and_evaluate([SMALL], tiny, device="cpu")
    assert (result.config, result.metrics) == (SMALL, same.metrics)


def test_runs_are_trained_together_by_epochs_precision_and_width():
    longer = SMALL.replace(epochs=9)
    configs = [SMALL, longer, SMALL.replace(hidden=(3,)), SMALL, longer, SMALL.replace(seed=1)]
    assert together(configs, width=8) == [[0, 2, 3, 5], [1, 4]]
    assert together(configs, width=3) == [[0, 2, 3], [5], [1, 4]]
    assert together([SMALL, SMALL.replace(precision="tf32")], width=3) == [[0], [1]]
    assert together([], width=3) == []


def test_the_best_epoch_is_the_first_of_the_lowest():
    assert best_epoch([3.0, 1.0, 2.0, 1.0]) == 2


def test_results_of_stacks_are_those_of_the_runs(tiny, request):
    configs = [SMALL.replace(seed=s, latent_size=n) for s, n in enumerate((2, 3, 2))]
    alone = train_and_evaluate(configs, tiny, device="cpu", dtype=torch.float64)
    request.getfixturevalue("together")
    for ours, its in zip(
        train_and_evaluate(configs, tiny, device="cpu", dtype=torch.float64), alone, strict=True
    ):
        assert ours.metrics == pytest.approx(its.metrics, rel=1e-8)
        for epoch, expected in zip(ours.history, its.history, strict=True):
            assert epoch == pytest.approx(expected, rel=1e-8)


def test_long_lists_are_trained_in_several_calls(tiny, monkeypatch):
    expected = train_and_evaluate(MIXED, tiny, device="cpu", dtype=torch.float64)
    monkeypatch.setitem(engine.STACK_WIDTH, "cpu", 2)
    for a, b in zip(
        train_and_evaluate(MIXED, tiny, device="cpu", dtype=torch.float64), expected, strict=True
    ):
        assert a.config == b.config
        assert a.metrics == pytest.approx(b.metrics, rel=1e-8)


@pytest.mark.gpu
def test_a_run_is_evaluated_where_it_is(tiny):
    (result,) = train_and_evaluate([SMALL], tiny, device="cuda")
    (metrics,) = evaluate([(SMALL, result.model.to("cuda"))], tiny)
    assert metrics == pytest.approx(result.metrics, rel=1e-4, abs=1e-9)
    assert resolve_device("auto") == torch.device("cuda")
