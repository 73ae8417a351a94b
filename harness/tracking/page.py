"""The view of an experiment in MLflow's page, which shows no metric by default.

The format is that of "Save as new view" in MLflow 3.17.2; an older page ignores it.
"""

import base64
import json
import time
import zlib
from collections.abc import Sequence

from harness.tracking.store import Store

TAG = "mlflow.sharedViewState.study"  # tag of the experiment that holds the view, "study"
LINK = "/runs?viewStateShareKey=study&workflowType=machine_learning"  # after its address


def save_view(store: Store, experiment_id: str, columns: Sequence[str], run_id: str) -> None:
    """Save a view of runs with those columns that the given run has, unless there is one."""
    if TAG in store.call(store.client.get_experiment, experiment_id).tags:
        return
    run = store.run(run_id)
    known = {name: f"params.`{name}`" for name in run.params}
    known |= {name.removeprefix("test/"): f"metrics.`{name}`" for name in run.metrics}
    chosen = [known[name] for name in columns if name in known]
    order = next((c for c in chosen if c.startswith("metrics.")), "attributes.start_time")
    state = {"selectedColumns": chosen, "orderByKey": order, "orderByAsc": True}
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    now = time.time_ns() // 10**6
    view = {"name": "Study", "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"}
    store.call(store.client.set_experiment_tag, experiment_id, TAG, json.dumps(view))
