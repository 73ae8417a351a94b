"""What every run records of its making, and the command that repeats it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import harness
from harness.places import default_tracking, without_password
from harness.records import DIFF, PROVENANCE

if TYPE_CHECKING:
    from harness.tracking import RunLog
    from studies.place import Place


def made_with(place: Place) -> dict[str, Any]:
    """Return what the runs of a place are made with: provenance, and the study's name if any."""
    study = None if place.study is None else place.study.name
    return {"study": study, **harness.provenance.provenance(place.data, place.device)}


def log_origin(log: RunLog, made: Mapping[str, Any]) -> None:
    """Log what a run is made with, and the changed files of a dirty tree."""
    log.text(json.dumps(made, indent=2), PROVENANCE)
    if harness.provenance.code().diff:
        log.text(harness.provenance.code().diff, DIFF)


def description(run_id: str, tracking_uri: str) -> str:
    """Say in Markdown how a run is repeated; a user's data folder is not part of it."""
    default = tracking_uri == default_tracking()
    where = "" if default else f" --tracking-uri {shlex.quote(without_password(tracking_uri))}"
    return (
        "Train it again from its record and compare every metric:\n\n"
        f"    python -m studies.replay {run_id}{where}"
    )
