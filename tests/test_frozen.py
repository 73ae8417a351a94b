"""What must not change while the core is rewritten: numbers, stores, and what they are read by.

These tests use commands, MLflow and public names alone. `benchmarks.frozen` compares bits.
"""

import json

import pytest
from frozen import audit, first_edition, values
from mlflow import MlflowClient

from analysis import frames
from benchmarks import frozen as comparison
from benchmarks import frozen_probe as probe
from harness import load_dataset, train_and_evaluate

STORED = json.loads(values.FILE.read_text())


@pytest.fixture(scope="module")
def first_store(tmp_path_factory):
    """Return the tracking URI of the store that 593445c wrote."""
    return first_edition.unpack(tmp_path_factory.mktemp("first"))


def near(stored, **tolerance):
    return {key: pytest.approx(numbers, **tolerance) for key, numbers in stored.items()}


def test_training_gives_the_stored_numbers():
    assert values.trained(probe.KINDS) == near(STORED["trained"], rel=values.RELATIVE)


@pytest.mark.parametrize("kind", probe.KINDS)
def test_a_run_has_the_same_bits_alone_and_in_a_stack_of_three(kind):
    data, configs = load_dataset("digits"), probe.stack(probe.KINDS[kind].replace(epochs=1))
    (alone,) = train_and_evaluate(configs[:1], data, device="cpu")
    together = train_and_evaluate(configs, data, device="cpu")
    assert [run.config for run in together] == configs
    results = [probe.result(run) for run in together]
    assert results[0] == probe.result(alone)
    assert len({result["weights"] for result in results}) == 3


def test_a_study_gives_the_stored_numbers(finished):
    found = values.studied(finished.tracking_uri)
    assert found == near(STORED["studied"], rel=values.RELATIVE)


def test_the_store_of_a_study_is_complete(finished):
    weights = ("0.0", "0.02", "1.0")
    uri, experiment = finished.tracking_uri, "kl_weight-digits"
    assert audit.faults(uri, experiment, "kl_weight", weights, seeds=2, epochs=3) == []


def test_an_incomplete_store_is_found_incomplete(tmp_path):
    uri = first_edition.unpack(tmp_path)
    client, frame = MlflowClient(uri), frames.load_study("kl_weight", "digits", uri)
    client.delete_run(frame["run_id"][0])
    client.create_run(client.get_run(frame["run_id"][1]).info.experiment_id)
    found = audit.faults(uri, "kl_weight-digits", "kl_weight", ("0.02", "1.0"), seeds=2, epochs=2)
    assert "('0.02', '0') has 0 finished runs" in found
    assert "6 summaries are finished" in found  # other studies lie beside this one
    for end in ("is RUNNING", "has train/mse of epochs [1]", "has no picture of reconstructions"):
        assert any(fault.endswith(end) for fault in found), end


def test_the_comparison_finds_what_differs_or_is_missing():
    kept = {"weights": "a", "mse": (1.0).hex(), "rate": (2.0).hex(), "loss": "nan"}
    excepted = ("effective_samples", "test/neg_log_likelihood/k8 @3", "neg_log_likelihood_se")
    old = {"run": kept | dict.fromkeys(excepted, "0x0p+0")}
    new = {"run": kept | {"new": "0x0p+0"}, "new": {}}
    equal = comparison.Comparison((1, 1), (3, 3), 0.0, [])
    assert comparison.compare(old, new) == equal
    new["run"]["rate"] = (2.5).hex()
    assert comparison.compare(old, new).worst == 0.2
    del new["run"]["mse"]
    found = comparison.compare(old, new | {"run": new["run"] | {"weights": "b"}})
    missing = ["run: weights", "run: mse", "run: rate"]
    assert found == comparison.Comparison((0, 1), (1, 3), float("inf"), missing)


def test_models_of_the_first_edition_reconstruct_as_they_did(first_store):
    assert values.reconstructed(first_store) == near(STORED["reconstructed"], abs=1e-5)
    assert len(STORED["reconstructed"]) == 9


def test_a_study_of_the_first_edition_is_read_with_its_values(first_store):
    frame = frames.load_study("kl_weight", "digits", first_store)
    assert [*zip(frame["kl_weight"], frame["seed"], strict=True)] == [
        *((0.02, 0), (0.02, 1), (1.0, 0), (1.0, 1))
    ]
    assert frame["decoder_variance"].tolist() == [0.01, 0.01, 0.5, 0.5]
    assert set(frame["hidden"]) == {"(16,)"}
    client = MlflowClient(first_store)
    for _, row in frame.iterrows():
        logged = client.get_run(row["run_id"]).data.metrics
        assert len(logged) > 90
        assert logged == {name: row[name.removeprefix("test/")] for name in logged}
