"""A view of MLflow's run table, saved with an experiment: which columns, sorted by what.

MLflow's page shows no metric by default. What its "Save as new view" writes is a tag of the
experiment, so a program can write it too (format seen in MLflow 3.17.2; an older page ignores it).
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence

KEY = "study"
"""What the link names the view by."""

TAG = f"mlflow.sharedViewState.{KEY}"
"""Tag of the experiment that holds it."""

LINK = f"/runs?viewStateShareKey={KEY}&workflowType=machine_learning"
"""What follows an experiment's address in the link to the view."""


def saved_view(name: str, columns: Sequence[str], order_by: str, now: int) -> str:
    """Return the tag's value.

    Args:
        name: shown in the page's list of views.
        columns: such as "params.`kl_weight`" or "metrics.`test/mse`".
        order_by: column that the runs are sorted by, lowest first.
        now: milliseconds since 1970.
    """
    state = {
        **{"searchFilter": "", "orderByKey": order_by, "orderByAsc": True, "startTime": "ALL"},
        **{"lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs"},
        **{"selectedColumns": list(columns), "columnOrder": [], "columnWidths": {}},
        **{"runsHiddenMode": "FIRST_10_RUNS", "viewMaximized": False, "runListHidden": False},
        **{"isAccordionReordered": False, "useGroupedValuesInCharts": True},
        **{"hideEmptyCharts": True, "groupBy": None, "groupsExpanded": {}},
        "globalLineChartConfig": {
            **{"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""}
        },
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    view = {"name": name, "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"}
    return json.dumps(view)
