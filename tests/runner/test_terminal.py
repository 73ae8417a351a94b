"""The last screen: a table that fits, and a link that opens the store that was written."""

from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
import rich.console
from studies.console import NEXT, Console

from harness import places, view
from studies.summary import Outcome

WIDE = {
    "weight": ["calibrated weight"],
    "latent_size": [10],
    **{name: [0.012345] for name in ("val/neg_elbo", "neg_elbo", "mse", "rate")},
    **{name: [0.012345] for name in ("best/epoch", "pca_floor", "calibration_ratio")},
    **{f"{name}±": [0.0012345] for name in ("val/neg_elbo", "mse", "pca_floor")},
    "seeds": [3],
}


def screen(width: int, tracking_uri: str | None = None) -> str:
    out = StringIO()
    outcome = Outcome(pd.DataFrame(WIDE), "It is so.", Path("reports/x"), "7")
    console = Console(rich.console.Console(file=out, width=width, highlight=False))
    console.outcome(None, outcome, tracking_uri)
    return out.getvalue()


@pytest.mark.parametrize("width", [100, 70])
def test_a_table_that_is_too_wide_loses_columns_and_no_digits(width):
    printed = screen(width)
    assert "…" not in printed
    assert "calibrated weight" in printed
    assert ("pca_" in printed) == (width == 100)


@pytest.mark.parametrize("named", ["option", "environment"])
def test_the_link_is_to_the_store_that_was_written(named, monkeypatch, tmp_path):
    uri = f"sqlite:///{tmp_path}/m.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if named == "environment":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    printed = screen(100, uri if named == "option" else None)
    assert f"mlflow ui --workers 1 --backend-store-uri {uri}, then http://127.0.0.1:5000" in printed
    assert f"/#/experiments/7{view.LINK}" in printed
    assert NEXT in printed


def test_the_default_store_is_shown_by_make(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert (places.project_root() / "Makefile").exists()
    assert "make ui, then http://127.0.0.1:5000/#/experiments/7" in screen(100)


def test_no_link_shows_a_password():
    printed = screen(100, "https://me:secret@host:5000/")
    assert f"Every run: https://host:5000/#/experiments/7{view.LINK}" in printed
    assert "secret" not in printed + screen(100, "postgresql://me:secret@host/db")
