"""A server that goes away while something is read from it."""

import pytest

from harness import RunConfig, load_run
from harness.models.vae import build
from harness.tracking import connect

pytestmark = pytest.mark.slow


def test_a_model_is_loaded_once_its_server_is_back(proxy, data):
    store = connect(proxy.uri)
    log = store.start(store.experiment("e", "Why?"), "k" * 32, "a run", {"role": "run"}, {})
    config = RunConfig(hidden=(8,), latent_size=2)
    log.metrics({"val/mse": 0.5}, step=1)
    log.model(config, build(config, data.image_shape))
    log.end()
    store.deliver(["k" * 32])
    proxy.lose = {"GET /api/2.0/mlflow-artifacts/artifacts": 3}
    assert load_run("k" * 32, proxy.uri).config == config
    assert set(proxy.lose.values()) == {0}
    run_id = store.run("k" * 32).run_id
    proxy.lose = {"GET /api/2.0/mlflow/metrics/get-history": 1}
    assert store.histories([run_id], "val/mse") == [(run_id, 1, 0.5)]
    assert set(proxy.lose.values()) == {0}
