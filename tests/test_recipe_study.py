"""A study of recipes: its runs keep the weights of the best epoch, stop early and are replayed."""

import pytest
import torch
from textbook import flat

import harness
from harness import RunConfig, load_run
from harness.tracking import connect
from studies import Axis, Study, replay, run

WILD = {"learning_rate": 0.1, "kl_weight": 0.1}
"""Settings of runs whose best epoch is not the last."""

STUDY = Study(
    name="patience",
    question="How long is it worth to wait?",
    base=RunConfig(hidden=(16, 12), latent_size=4, batch_size=8, keep="best", **WILD),
    axis=Axis("patience", [0, 2]),
    figures={},
    answer=lambda runs: "Not long.",
)


def test_a_study_sweeps_a_recipe_and_keeps_the_best_weights(
    tracking_uri, tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(harness, "load_dataset", lambda name, root: tiny)
    places = {"tracking_uri": tracking_uri, "storage": f"sqlite:///{tmp_path}/optuna.db"}
    outcome = run(STUDY, seeds=1, epochs=12, device="cpu", adam_betas=(0.9, 0.9991), **places)
    assert outcome.table["patience"].tolist() == [0, 2]
    store = connect(tracking_uri)
    found = {r.params["patience"]: r for r in store.runs("patience-digits", role="run")}
    for patience, logged in found.items():
        best = int(logged.metrics["best/epoch"])
        last = best + 2 if patience == "2" else 12
        assert best < last
        why = f"stopped at epoch {last}: 2 epochs without a better val/neg_elbo"
        assert logged.tags.get("reason", "") == (why if patience == "2" else "")
        assert (logged.status, logged.params["adam_betas"]) == ("FINISHED", "(0.9, 0.9991)")
        # The last values, at the step after the last epoch, are those of the best one.
        values = [v for v in store.history(logged.run_id) if v.metric == "val/mse"]
        assert [v.step for v in values] == [*range(1, last + 2)]
        assert values[-1].value == values[best - 1].value == logged.metrics["val/mse"]
        assert logged.metrics["val/neg_elbo"] == logged.metrics["best/val/neg_elbo"]
        loaded = load_run(logged.run_id, tracking_uri)
        short = loaded.config.replace(epochs=best, patience=0, keep="last")
        expected = harness.train_and_evaluate(short, tiny, "cpu")
        assert torch.equal(flat(loaded.model), flat(expected.model))
        pictures = {f.path for f in store.client.list_artifacts(logged.run_id, "images")}
        for key in ("reconstructions", "prior_samples"):
            assert any(name.startswith(f"images/{key}+step+{last}+") for name in pictures)
    with pytest.raises(SystemExit, match="0"):
        replay.main([found["2"].run_id, "--tracking-uri", tracking_uri])
    assert "values are equal to the last bit" in capsys.readouterr().out
