"""What handing out trials costs, and how it scales: `python -m benchmarks.coordination`.

Workers are processes that take trials, send one heartbeat, note and tell a result, and train
nothing: the most that a study of many machines can ask of its database. Each takes up to
`--at-once` trials at a time, as a stack does. PostgreSQL is named by `--storage` (an empty
database; every repetition makes a study of its own) and SQLite is measured beside it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from multiprocessing.synchronize import Barrier
from typing import Any, NamedTuple

import torch

from benchmarks import machine
from studies import kl_weight
from studies.runner.database import open_storage
from studies.runner.options import Options
from studies.runner.proposers import Value
from studies.runner.queue import Queue, open_queue
from studies.runner.study import make_plan

WORKERS = (1, 2, 4, 8)


class Asked(NamedTuple):
    """Trials of a study, trials of a stack, studies."""

    trials: int
    at_once: int
    repeat: int


def opened(url: str, name: str, trials: int) -> Queue:
    """Open a study of so many points, one run each."""
    values = tuple((i + 1) / trials for i in range(trials))
    plan = make_plan(kl_weight.STUDY, Options(values=values, seeds=1, study_name=name))
    return open_queue(open_storage(url), name, plan.proposer, set)


def work(url: str, names: list[str], asked: Asked, workers: int, start: Barrier) -> None:
    """Be a worker: take, beat, tell until nothing is left, in one study after the other."""
    for name in names:
        queue = opened(url, name, asked.trials)
        start.wait()
        with queue.working():
            while queue.left():
                taken = queue.take(asked.at_once, workers)
                queue._beat()
                for trial in taken:
                    queue.note(trial, Value([0.0], {}))
                    queue.finish(trial, Value([0.0], {}))
                if not taken:
                    queue.wait()
        start.wait()


def rates(url: str, asked: Asked, workers: int) -> list[float]:
    """Return trials per second of so many workers, once per repetition; starts do not count."""
    names = [f"b{time.time_ns()}-{i}" for i in range(asked.repeat)]
    queues = [opened(url, name, asked.trials) for name in names]
    context = multiprocessing.get_context("forkserver")  # imports are dear
    preloaded = ["studies.runner.queue", "studies.runner.study", "optuna.storages"]
    context.set_forkserver_preload([*preloaded, "alembic.command"])
    start = context.Barrier(workers + 1)
    arguments = (url, names, asked, workers, start)
    team: list[Any] = [context.Process(target=work, args=arguments) for _ in range(workers)]
    for process in team:
        process.start()
    found = []
    for queue in queues:
        start.wait()
        since = time.perf_counter()
        start.wait()
        found.append(asked.trials / (time.perf_counter() - since))
        if len(queue.trials("COMPLETE")) != asked.trials:
            raise RuntimeError("a study is not complete")
    for process in team:
        process.join()
    return found


@machine.clear_errors()
def main() -> None:
    """Print a table of rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", help="a PostgreSQL database, beside SQLite")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--at-once", type=int, default=5, help="trials of a stack (5)")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    asked = Asked(options.trials, options.at_once, options.repeat)
    if options.storage:
        open_storage(options.storage)  # refused before anything is measured
    print("\n".join(machine.hardware(torch.device("cpu"), "optuna", "sqlalchemy", "psycopg")))
    print(f"{asked.trials} trials, up to {asked.at_once} at once, n = {asked.repeat}.\n")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        urls = {"SQLite": f"sqlite:///{folder}/optuna.db"}
        if options.storage:
            urls["PostgreSQL"] = options.storage
        for database, url in urls.items():
            for workers in WORKERS:
                found = machine.spread(rates(url, asked, workers), 1)
                print(f"{database}, {workers} workers: {found[0]}/s", file=sys.stderr)
                rows.append([database, str(workers), *found])
    print(machine.table(["database", "workers", "trials/s, median", "range"], rows))


if __name__ == "__main__":
    main()
