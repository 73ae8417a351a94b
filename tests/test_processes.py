"""Worker processes: what crosses to them and back, and that none is left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torch import nn

from harness import processes
from harness.processes import Pool, one_thread, shared

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def two_cores(_threads_as_before):
    torch.set_num_threads(2)


def mapped(pool, function, items):
    return [result for _, result in sorted(pool.map(function, items))]


def in_workers(function, items, *common):
    with Pool(2, common) as pool:
        assert pool._workers
        return mapped(pool, function, items)


def pids(pool):
    return mapped(pool, lambda _: os.getpid(), range(2))


def test_every_item_gives_its_result():
    with Pool(2, (10,)) as pool:
        for count in (0, 1, 2, 7):
            results = dict(pool.map(lambda ten, item: ten * item, range(count)))
            assert results == {i: 10 * i for i in range(count)}


def test_results_come_as_they_are_done():
    with Pool(2) as pool:
        first, _ = next(pool.map(time.sleep, [30, 0]))
    assert first == 1


def test_functions_are_called_here_with_the_very_objects_on_one_core():
    common = []
    with Pool(1, (common,)) as pool:
        assert not pool._workers
        calls = pool.map(lambda c, item: c.append(item) or torch.get_num_threads(), [1, 2])
        assert [(number, torch.get_num_threads()) for _, number in calls] == [(1, 2), (1, 2)]
    assert common == [1, 2]


def test_there_are_no_more_workers_than_cores():
    assert len(set(in_workers(lambda item: time.sleep(0.01) or os.getpid(), range(9)))) == 2
    torch.set_num_threads(1)
    with Pool(3) as pool:
        assert not pool._workers


class Costly:
    """Counts how often it is pickled, and what was done with it in a worker."""

    def __init__(self):
        self.pickled, self.used = 0, 0

    def __getstate__(self):
        self.pickled += 1
        return {"pickled": 0, "used": 0}


def test_common_crosses_once_and_keeps_what_is_changed_in_it():
    def use(costly, item):
        costly.used += 1
        return os.getpid(), costly.used

    costly = Costly()
    with Pool(2, (costly,)) as pool:
        uses = [count for _ in range(5) for count in mapped(pool, use, range(4))]
    assert costly.pickled == 1
    assert costly.used == 0
    for worker in {process for process, _ in uses}:
        counts = [count for process, count in uses if process == worker]
        assert sorted(counts) == list(range(1, len(counts) + 1))


@pytest.mark.parametrize(
    "tensor",
    [
        *(torch.arange(6).to(kind) for kind in (torch.uint8, torch.bool, torch.bfloat16)),
        *(torch.ones(2, 3).t(), torch.tensor(2.0), torch.zeros(0, 4), torch.ones(3).cfloat()),
    ],
)
def test_a_shared_tensor_equals_its_origin_here_and_there(tensor):
    copy = shared(tensor)
    (there,) = in_workers(lambda copy, _: copy, [0], copy)
    for other in (copy, there):
        assert torch.equal(other, tensor)
        assert other.dtype == tensor.dtype
        assert other.is_contiguous()
        assert other.data_ptr() != tensor.data_ptr() or not tensor.numel()


def test_both_sides_see_what_is_written_in_a_shared_tensor():
    common, item = shared(torch.zeros(3)), shared(torch.zeros(2))

    def add(common, place_and_item):
        place, item = place_and_item
        seen = common[2].item()
        common[place] += 1
        item[place] += 1
        return seen

    with Pool(2, ({"counts": [common]}["counts"][0],)) as pool:
        mapped(pool, add, [(0, item), (1, item)])
        common[2] = 5
        assert mapped(pool, add, [(0, item), (1, item)]) == [5, 5]
    assert common.tolist() == [2, 2, 5]
    assert item.tolist() == [2, 2]


def test_memory_of_a_shared_tensor_is_released():
    def files():
        return len(os.listdir("/proc/self/fd"))

    before, kept = files(), len(processes._files)
    tensors = [shared(torch.zeros(5)) for _ in range(10)]
    assert files() == before + 10
    view = tensors[3][1:]
    tensors.clear()
    assert files() == before
    assert view.tolist() == [0] * 4
    assert len(processes._files) == kept


@pytest.mark.parametrize("order", ["as they are", "transposed"])
def test_other_tensors_are_copied_with_their_layout(order):
    tensor = torch.rand(5, 3)
    tensor = tensor.t() if order == "transposed" else tensor
    (there,) = in_workers(lambda tensor, _: tensor.add_(1), [0], tensor)
    assert torch.equal(there, tensor + 1)
    assert there.stride() == tensor.stride()


def gradients(model, x):
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("kind", ["mlp", "convolution"])
def test_numbers_are_the_same_to_the_bit_in_a_worker(kind):
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 784))
    x = 1e-18 * torch.rand(32, 784)  # squares are denormal
    if kind == "convolution":
        model = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.ConvTranspose2d(8, 1, 3, 2))
        x = torch.rand(32, 1, 28, 28)
    with one_thread():
        here = gradients(model, x)
    there = in_workers(gradients, [x, x], model)
    assert all(torch.equal(a, b) for pair in there for a, b in zip(here, pair, strict=True))


def flushes(*_):
    return (torch.tensor(1e-38) * 1e-2).item() == 0


def test_denormals_are_flushed_in_workers_and_as_before_elsewhere():
    assert in_workers(flushes, [0, 1]) == [True, True]
    assert not flushes()
    with one_thread():
        assert flushes()
        with one_thread():
            pass
        assert flushes()
    assert not flushes()
    assert torch.get_num_threads() == 2


def test_an_error_of_a_worker_comes_with_where_it_arose():
    def divide(item):
        return 1 / item

    with Pool(2) as pool:
        with pytest.raises(ZeroDivisionError) as raised:
            list(pool.map(divide, [1, 0]))
        assert "return 1 / item" in raised.value.__notes__[0]
        with pytest.raises(RuntimeError, match="the pool is closed"):
            list(pool.map(divide, [1]))


class Unreadable(Exception):
    """Cannot be unpickled: its arguments are not its constructor's."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize("answer", ["result", "error"])
def test_what_cannot_be_sent_back_is_no_lack_of_memory(answer):
    def work(item):
        if answer == "error":
            raise Unreadable("this", "that")
        return threading.Lock()

    expected = {"result": (TypeError, "lock"), "error": (RuntimeError, "this and that")}[answer]
    with Pool(2) as pool, pytest.raises(expected[0], match=expected[1]):
        list(pool.map(work, [1]))


@pytest.mark.parametrize("when", ["at work", "answering", "idle"])
def test_a_worker_that_is_killed_is_an_error_and_closes_the_pool(when):
    def work(item):
        if item and when == "answering":
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return bytes(10**7)  # more than fits between two processes
        if item:
            os.kill(os.getpid(), signal.SIGKILL)
        return None

    with Pool(2) as pool:
        workers = pids(pool)
        if when == "idle":
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
            await_end(*workers)
        with pytest.raises(RuntimeError, match="a worker process was killed"):  # noqa: PT012
            for _ in pool.map(work, [False, when != "idle"]):
                await_end(*workers[1:])
        assert not pool._workers
        await_end(*workers)


@pytest.mark.parametrize("how", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_leaving_a_map_ends_the_workers(how):
    def leave(pool):
        results = pool.map(time.sleep, [0, 1000, 1000])
        next(results)
        if how is KeyboardInterrupt:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            next(results)
        if how is GeneratorExit:
            results.close()
            assert not pool._workers
        raise how

    pool = Pool(2)
    workers = pids(pool)
    with pytest.raises(how), pool:
        leave(pool)
    await_end(*workers)


def test_a_process_that_a_worker_has_forked_does_not_keep_its_pool_open():
    def fork(_):
        if (child := os.fork()) == 0:
            time.sleep(1000)
        return child

    (child,) = in_workers(fork, [0])
    os.kill(child, signal.SIGKILL)


def test_two_maps_at_once_are_refused():
    with Pool(2) as pool:
        for _ in pool.map(abs, [1, 2, 3]):
            with pytest.raises(RuntimeError, match="in another map"):
                list(pool.map(abs, [1]))
            break


def test_pools_work_in_threads():
    results = []

    def work(offset):
        results.append(in_workers(lambda item: item + offset, range(3)))

    threads = [threading.Thread(target=work, args=(10 * i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]


def test_a_pool_in_a_worker_works_there():
    def outer(item):
        with Pool(2) as pool:
            return bool(pool._workers), list(pool.map(lambda i: i + item, [1, 2])), flushes()

    assert in_workers(outer, [10]) == [(False, [(0, 11), (1, 12)], True)]


def forked(function):
    """Call a function in a forked process with a group of its own, which then exits with 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            function()
            code = 0
        finally:
            os._exit(code)
    return child


def test_a_forked_child_leaves_the_pools_of_its_parent_alone():
    with Pool(2) as pool:
        assert os.waitpid(forked(pool.close), 0)[1] == 0
        assert mapped(pool, lambda item: item + 1, [1, 2]) == [2, 3]


def server_of(worker):
    return int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_server_that_was_killed_is_started_again():
    with Pool(2) as pool:
        server = server_of(pids(pool)[0])
        os.kill(server, signal.SIGKILL)
        await_end(server)
        workers = pids(pool)  # they go on
        assert in_workers(abs, [-1, -2]) == [1, 2]
    await_end(*workers)


def ended(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return state in "ZX" and len(os.listdir(f"/proc/{process}/task")) == 1  # all its threads
    except (FileNotFoundError, ProcessLookupError):
        return True


def await_end(*of):
    while not all(map(ended, of)):
        time.sleep(0.01)


def program(folder, text):
    file = folder / "program.py"
    file.write_text(textwrap.dedent(text))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "2"}
    return subprocess.Popen(
        [sys.executable, "-W", "error", file],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


SCRIPT = """
    import os, time
    from harness import forkserver
    forkserver.start()
    import torch
    from harness.processes import Pool
    from beside import SCALE

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1, bias=False)
        def forward(self, x):
            return SCALE * self.layer(x)

    class Result:
        def __init__(self, value):
            self.value = value

    def work(network, item):
        assert type(network).__module__ == "__main__"
        from beside import SCALE
        return Result((os.getpid(), network(torch.full((2,), float(item))).item()))

    network = Network()
    torch.nn.init.ones_(network.layer.weight)
    with Pool(2, (network,)) as pool:
        assert pool._workers
        results = list(pool.map(work, range(4)))
    assert all(type(result) is Result for _, result in results)
    assert all(result.value[0] != os.getpid() for _, result in results)
"""


def test_a_script_without_a_guard_trains_its_network(tmp_path):
    (tmp_path / "beside.py").write_text("SCALE = 3")
    text = SCRIPT + "    print(sorted((index, result.value[1]) for index, result in results))\n"
    running = program(tmp_path, text)
    printed, _ = running.communicate()
    assert printed == "[(0, 0.0), (1, 6.0), (2, 12.0), (3, 18.0)]\n"
    assert running.returncode == 0


def multiply():
    a = torch.ones(300, 300)
    while True:
        a @ a


def hold_the_lock():
    sum(range(10**12))


@pytest.mark.parametrize(
    ("by", "work"), [("SIGKILL", hold_the_lock), ("SIGTERM to the group", multiply)]
)
def test_nothing_outlives_the_parent(by, work):
    out = shared(torch.zeros(2, 2, dtype=torch.int64))

    def busy(out, item):
        out[item] = torch.tensor([os.getpid(), os.getppid()])
        work()

    child = forked(lambda: in_workers(busy, [0, 1], out))
    while not out.all():
        time.sleep(0.01)
    processes = set(out.flatten().tolist())
    assert len(processes) == 3
    if by == "SIGKILL":
        os.kill(child, signal.SIGKILL)
    else:
        os.killpg(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -getattr(signal, by.split()[0])
    await_end(*processes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_and_their_server_ignore_what_a_scheduler_sends(number):
    with Pool(2) as pool:
        workers = pids(pool)
        for process in [server_of(workers[0]), *workers]:
            os.kill(process, number)
        assert mapped(pool, abs, [-1, -2]) == [1, 2]
    assert in_workers(abs, [-1, -2]) == [1, 2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's event loop
def test_a_notebook_cell_trains_its_network(tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("SCALE = 3")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    cells = [*textwrap.dedent(SCRIPT).split("\nnetwork = "), "len(results)"]
    cells[1] = f"network = {cells[1]}"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, resources={"metadata": {"path": tmp_path}}).execute()
    assert notebook.cells[-1].outputs[0]["data"]["text/plain"] == "4"
