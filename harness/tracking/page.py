"""The view of a study in MLflow's page, which by default shows no metric and mixes all studies.

The format is that of "Save as new view" in MLflow 3.17.2; an older page ignores it.
"""

import base64
import json
import time
import zlib
from collections.abc import Sequence

from harness.tracking.store import Store

TAG = "mlflow.sharedViewState."  # start of the tags of an experiment that hold views
CURVES = ("val/neg_elbo", "val/rate", "val/mse")  # the first charts
FINISHED = "tags.role = 'run' and attributes.status = 'FINISHED'"  # neither killed nor a summary


def link(study: str) -> str:
    """Return what leads to the view of a study, after the address of its experiment."""
    return f"/runs?viewStateShareKey={study}&workflowType=machine_learning"


def save_view(
    store: Store,
    experiment_id: str,
    study: str,
    columns: Sequence[str],
    run_id: str,
) -> None:
    """Save a view of the finished runs of a study, unless there is one.

    The columns that the given run has are shown in their order, and the first metric sorts. Runs
    are grouped by their configuration, so that charts show means over seeds.
    """
    tag = f"{TAG}{study}"
    if tag in store.call(store.client.get_experiment, experiment_id).tags:
        return
    run = store.run(run_id)
    known = {name: f"params.`{name}`" for name in run.params}
    known |= {name.removeprefix("test/"): f"metrics.`{name}`" for name in run.metrics}
    chosen = [known[name] for name in dict.fromkeys(columns) if name in known]
    order = next((c for c in chosen if c.startswith("metrics.")), "attributes.start_time")
    keys = [{"mode": "tag", "groupByData": "configuration"}]
    section = "learning curves"
    state = {
        "searchFilter": f"tags.study = '{study}' and {FINISHED}",
        "selectedColumns": chosen,
        "columnOrder": chosen,
        "orderByKey": order,
        "orderByAsc": True,
        "groupBy": {"aggregateFunction": "average", "groupByKeys": keys},
        "runsHiddenMode": "SHOWALL",
        "isAccordionReordered": True,  # keeps the order of the sections
        "compareRunSections": [{"uuid": section, "name": section, "display": True}],
        "compareRunCharts": [
            {
                **{"type": "LINE", "uuid": name, "metricSectionId": section, "metricKey": name},
                **{"selectedMetricKeys": [name], "xAxisKey": "step", "yAxisKey": "metric"},
                **{"displayPoints": False, "runsCountToCompare": 100, "range": {}},
                **{"useGlobalXaxisKey": True, "useGlobalLineSmoothing": True},
            }
            for name in CURVES
            if name in run.metrics
        ],
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    now = time.time_ns() // 10**6
    view = {"name": study, "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"}
    store.call(store.client.set_experiment_tag, experiment_id, tag, json.dumps(view))
