"""Several threads a run: they reach the worker, decide bits, and are in the record."""

import pytest
import torch
from textbook import SMALL, flat

import harness
from harness import RunConfig, UserError, train_and_evaluate
from harness.models.vae import VAE
from harness.tracking import Planned, connect
from harness.tracking.record import log_in, record
from harness.training.engine import check_threads, train
from studies.replay import replay

CONV = SMALL.replace(model="conv", channels=(16, 32), batch_size=32, epochs=1)


@pytest.fixture
def four_cores(_threads_as_before, registered):
    """Use four threads, and register the metric `threads`, how many train a run."""
    torch.set_num_threads(4)

    @harness.metric("threads", every_epoch=True)
    def threads(model, split):
        return torch.get_num_threads()


def trained(configs: list[RunConfig], data, threads: int) -> list[VAE]:
    """Train runs on so many threads each; return their models."""
    *_, last = train(configs, data, "cpu", threads_per_run=threads)
    assert set(last.val["threads"]) == {threads}
    assert torch.get_num_threads() == 4
    return [last.model(row) for row in range(len(configs))]


def test_equal_threads_give_equal_bits_in_any_company(tiny, four_cores):
    configs = [CONV.replace(seed=seed) for seed in range(2)]
    together = trained(configs, tiny, 2)  # in workers
    for config, model in zip(configs, together, strict=True):
        (alone,) = trained([config], tiny, 2)  # in this process
        assert torch.equal(flat(alone), flat(model))
    result = train_and_evaluate(configs[0], tiny, "cpu", threads_per_run=2)
    assert torch.equal(flat(result.model), flat(together[0]))


@pytest.mark.parametrize(
    ("count", "device", "sharing", "words"),
    [
        (0, "cpu", 1, "threads_per_run=0 on 4 cores: give 1 to 4"),
        (5, "cpu", 1, "threads_per_run=5 on 4 cores: give 1 to 4"),
        (3, "cpu", 2, "threads_per_run=3 on 4 cores that 2 processes share: give 1 to 2"),
        (2, "cpu", 3, "threads_per_run=2 on 4 cores that 3 processes share: give 1"),
        (2, "cuda", 1, "threads_per_run=2 on a GPU: give 1"),
    ],
)
def test_more_threads_than_cores_are_refused(four_cores, count, device, sharing, words):
    with pytest.raises(UserError, match=f"^{words}$"):
        check_threads(count, device, sharing)
    check_threads(1, device, sharing)


@pytest.mark.slow
def test_threads_are_recorded_where_they_are_not_1_and_replayed(
    tiny, four_cores, tracking_uri, capsys
):
    store = connect(tracking_uri)
    start = log_in(store, "threads-digits", "How many?")
    for threads in (1, 2):
        run = Planned(CONV, f"{threads:032x}", f"on {threads}", {}, {"role": "run"})
        given = {"pictured": False, "threads_per_run": threads}
        record([run], tiny, "cpu", start, **given)
    one, two = sorted(store.runs("threads-digits"), key=lambda run: run.key)
    assert "threads_per_run" not in one.params
    assert two.params["threads_per_run"] == "2"
    assert [one.metrics["val/threads"], two.metrics["val/threads"]] == [1, 2]
    assert replay(two.run_id, tiny, tracking_uri=tracking_uri, trust=True)
    assert "equal to the last bit" in capsys.readouterr().out
