"""Workers: what goes wrong in one is told here, and nothing waits for ever."""

import os
import signal
import threading

import pytest
import torch

from harness.cores import crew

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_cores():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_an_error_of_a_worker_comes_with_where_it_arose():
    def divide(item):
        return 1 / item

    with crew(divide, 2, CPU) as cores, pytest.raises(ZeroDivisionError) as told:
        cores.map([1, 0])
    assert "return 1 / item" in told.value.__notes__[0]


def test_an_answer_that_cannot_be_sent_is_no_lack_of_memory():
    refused = pytest.raises(RuntimeError, match="answer cannot be sent.*lock")
    with crew(lambda item: threading.Lock(), 2, CPU) as cores, refused:
        cores.map([1, 2])


@pytest.mark.parametrize("when", ["at work", "idle"])
def test_a_worker_that_is_killed_is_told(when):
    def work(item):
        if item:
            os.kill(os.getpid(), signal.SIGKILL)

    with crew(work, 2, CPU) as cores:
        if when == "idle":
            for worker, _ in cores._workers:
                worker.kill()
                worker.join()
        with pytest.raises(RuntimeError, match="a worker process was killed"):
            cores.map([when == "at work", False])
