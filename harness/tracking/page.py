"""The view of an experiment in MLflow's page: its columns and their order.

MLflow's page shows no metric by default. Its "Save as new view" writes a tag of the experiment, and
so does this (format of MLflow 3.17.2, which completes it by defaults; an older page ignores it).
"""

import base64
import json
import time
import zlib
from collections.abc import Sequence

from harness.tracking.store import Store

TAG = "mlflow.sharedViewState.study"
"""Tag of the experiment that holds the view, "study"."""

LINK = "/runs?viewStateShareKey=study&workflowType=machine_learning"
"""End of a link to the view, after the experiment's address."""


def save_view(store: Store, experiment_id: str, columns: Sequence[str], run_id: str) -> None:
    """Save a view of an experiment's runs, unless it has one.

    Its columns are parameters and metrics that the given run has; "mse" also finds "test/mse". Runs
    are sorted by the first metric.
    """
    if TAG in store.call(store.client.get_experiment, experiment_id).tags:
        return
    run = store.run(run_id)
    known = {name: f"params.`{name}`" for name in run.params}
    known |= {name.removeprefix("test/"): f"metrics.`{name}`" for name in run.metrics}
    chosen = [known[name] for name in columns if name in known]
    metrics = [column for column in chosen if column.startswith("metrics.")]
    order = next(iter(metrics), "attributes.start_time")
    state = {"selectedColumns": chosen, "orderByKey": order, "orderByAsc": True}
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    now = time.time_ns() // 10**6
    view = {"name": "Study", "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"}
    store.call(store.client.set_experiment_tag, experiment_id, TAG, json.dumps(view))
