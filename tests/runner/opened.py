"""Storages and queues that are closed after the test that opens them."""

import optuna

from studies.runner.database import open_storage
from studies.runner.proposers import Proposer
from studies.runner.queue import Queue, open_queue

STORAGES: list[optuna.storages.RDBStorage] = []


def storage_at(url: str) -> optuna.storages.RDBStorage:
    """Open a storage."""
    STORAGES.append(open_storage(url))
    return STORAGES[-1]


def queue_at(url: str, proposer: Proposer, name: str = "study", complete=set) -> Queue:
    """Open a study."""
    return open_queue(storage_at(url), name, proposer, complete)
