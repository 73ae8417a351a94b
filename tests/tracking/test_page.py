"""MLflow's page, on a real server and in a real browser, shows a study's runs and pictures."""

import base64
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from real_servers import free_port

from harness.tracking import connect
from harness.tracking.page import TAG, link, save_view
from harness.tracking.runs import NOTE, PICTURED
from harness.tracking.store import Store

CHROMIUM = shutil.which("chromium")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PATIENCE = 180_000
"""Milliseconds for an element to appear; only a broken page needs them."""

STUDY = "kl_weight-digits"
COLUMNS = ["kl_weight", "seed", "none", "val/neg_elbo", "mse"]


class Written(NamedTuple):
    """A store with three runs of a study, and the id of each by name."""

    store: Store
    experiment: str
    runs: dict[str, str]


@pytest.fixture(scope="module")
def written(empty_database, tmp_path_factory) -> Written:
    folder = tmp_path_factory.mktemp("page")
    shutil.copy(empty_database, folder / "mlflow.db")
    store = connect(f"sqlite:///{folder}/mlflow.db")
    experiment = store.experiment("kl_weight-digits", "Which weight?")
    for weight in (0.02, 1.0):
        name, params = f"kl_weight={weight:g} seed=0", {"kl_weight": weight, "seed": 0}
        log = store.start(
            experiment, uuid.uuid4().hex, name, {"role": "run", "study": STUDY, **PICTURED}, params
        )
        for epoch in range(3):
            log.metrics({"val/neg_elbo": weight / (epoch + 1), "test/mse": 0.1}, epoch)
            log.picture("reconstructions", np.full((8, 20), 9 * epoch, np.uint8), epoch)
        log.end()
    note = "The weight 0.02 has the lowest validation neg_elbo."
    tags = {"role": "summary", NOTE: note}
    store.start(experiment, uuid.uuid4().hex, "summary", tags, {}).end()
    runs = {run.name: run.run_id for run in store.runs("kl_weight-digits")}
    save_view(store, experiment, STUDY, COLUMNS, runs["kl_weight=1 seed=0"])
    return Written(store, experiment, runs)


def test_a_view_has_the_columns_that_the_runs_have(written):
    saved = json.loads(written.store.client.get_experiment(written.experiment).tags[TAG + STUDY])
    kind, packed = saved["state"].split(";")
    state = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert kind == "deflate"
    assert state["selectedColumns"] == [
        *("params.`kl_weight`", "params.`seed`", "metrics.`val/neg_elbo`", "metrics.`test/mse`")
    ]
    assert state["columnOrder"] == state["selectedColumns"]
    assert state["orderByKey"] == "metrics.`val/neg_elbo`"
    assert state["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "configuration"}]
    assert state["compareRunCharts"][0]["metricKey"] == "val/neg_elbo"
    found = written.store.client.search_runs([written.experiment], state["searchFilter"])
    names = {run.info.run_name for run in found}
    assert names == {name for name in written.runs if name != "summary"}


def test_a_view_that_was_changed_is_left_alone(written):
    store = written.store
    experiment = store.experiment("other", "Why?")
    store.client.set_experiment_tag(experiment, f"{TAG}mine", "mine")
    for study in ("mine", "yours"):
        save_view(store, experiment, study, ["mse"], next(iter(written.runs.values())))
    tags = store.client.get_experiment(experiment).tags
    assert tags[f"{TAG}mine"] == "mine"
    assert json.loads(tags[f"{TAG}yours"])["name"] == "yours"


@pytest.fixture(scope="module")
def server(written) -> Iterator[str]:
    """Serve the store as `make ui` does."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", written.store.uri]
    log = (written.store.home / "ui.log").open("w")
    running = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert running.poll() is None, Path(log.name).read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=10).close()
                break
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(0.5)
        yield address
    finally:
        running.terminate()
        running.wait()
        log.close()


@pytest.fixture
def page(tmp_path):
    """Open a page of a headless Chromium with an empty profile."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    driver = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=CHROMIUM,
            args=QUIET,
            viewport={"width": 1800, "height": 1000},
        )
        browser.set_default_timeout(PATIENCE)
        browser.add_init_script(
            "localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');"
            "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"
        )
        yield browser.new_page()
        browser.close()


@pytest.mark.slow
def test_the_page_shows_runs_columns_and_pictures(written, server, page):
    _, experiment, runs = written
    page.goto(f"{server}/#/experiments/{experiment}{link(STUDY)}")
    for name in runs.keys() - {"summary"}:
        page.get_by_role("link", name=name, exact=True).first.wait_for()
    for column in ("val/neg_elbo", "kl_weight"):
        page.locator("[role=columnheader]", has_text=column).first.wait_for()

    run = runs["kl_weight=0.02 seed=0"]
    page.goto(f"{server}/#/experiments/{experiment}/runs/{run}/model-metrics")
    page.get_by_placeholder("Search metric charts").fill("reconstructions")
    for step in (0, 1):
        picture = page.locator(f"img[src*='reconstructions%2Bstep%2B{step}%2B']").first
        picture.wait_for()
        assert picture.evaluate("image => image.naturalWidth") > 0
        page.locator("[role=slider]:not([data-disabled])").last.press("ArrowRight")

    page.goto(f"{server}/#/experiments/{experiment}/runs/{runs['summary']}")
    page.get_by_text("has the lowest validation neg_elbo").first.wait_for()
