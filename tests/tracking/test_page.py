"""MLflow's own page, on a real server and in a real browser, shows a study's runs and pictures."""

import base64
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_servers import free_port

from harness import tracking, view

CHROMIUM = shutil.which("chromium")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PATIENCE = 180_000
"""Milliseconds for an element to appear; only a broken page needs them."""


def experiment_of(finished) -> tuple[tracking.Store, str, dict[str, str]]:
    """Return a finished study's store, its experiment's id, and its run ids by name."""
    store = tracking.connect(finished.tracking_uri)
    found = store.client.get_experiment_by_name("kl_weight-digits")
    runs = {run.name: run.run_id for run in store.runs("kl_weight-digits")}
    return store, found.experiment_id, runs


def test_a_study_saves_a_view_with_its_columns(finished):
    store, experiment, runs = experiment_of(finished)
    saved = json.loads(store.client.get_experiment(experiment).tags[view.TAG])
    kind, packed = saved["state"].split(";")
    state = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert kind == "deflate"
    assert {"params.`kl_weight`", "params.`seed`"} <= set(state["selectedColumns"])
    assert {"metrics.`test/mse`", "metrics.`val/neg_elbo`"} <= set(state["selectedColumns"])
    assert state["orderByKey"] == "metrics.`val/neg_elbo`"
    there = store.client.get_run(runs["kl_weight=1 seed=0"]).data
    known = {f"metrics.`{name}`" for name in there.metrics}
    known |= {f"params.`{name}`" for name in there.params}
    assert set(state["selectedColumns"]) <= known


def test_a_view_that_was_changed_is_left_alone(finished, tmp_path):
    database = tmp_path / "mlflow.db"
    shutil.copy(finished.folder / "mlflow.db", database)
    store = tracking.connect(f"sqlite:///{database}")
    _, experiment, runs = experiment_of(finished)
    store.client.set_experiment_tag(experiment, view.TAG, "mine")
    tracking.save_view(store, experiment, ["mse"], runs["kl_weight=1 seed=0"])
    assert store.client.get_experiment(experiment).tags[view.TAG] == "mine"


def test_the_last_screen_links_to_that_view(finished):
    _, experiment, _ = experiment_of(finished)
    assert f"http://127.0.0.1:5000/#/experiments/{experiment}{view.LINK}" in finished.printed


@pytest.fixture(scope="module")
def server(finished) -> Iterator[str]:
    """Serve a finished study's store as `make ui` does."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", finished.tracking_uri]
    log = (finished.folder / "ui.log").open("w")
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
def test_the_page_shows_runs_columns_and_pictures(finished, server, page):
    _, experiment, runs = experiment_of(finished)
    page.goto(f"{server}/#/experiments/{experiment}{view.LINK}")
    for name in ("summary", "kl_weight=0.02 seed=0", "kl_weight=1 seed=1"):
        page.get_by_role("link", name=name, exact=True).first.wait_for()
    for column in ("val/neg_elbo", "kl_weight"):
        page.locator("[role=columnheader]", has_text=column).first.wait_for()

    run = runs["kl_weight=0.02 seed=0"]
    page.goto(f"{server}/#/experiments/{experiment}/runs/{run}/model-metrics")
    page.get_by_placeholder("Search metric charts").fill("reconstructions")
    for step in (0, 1):  # untrained, where the slider stands at first, and after an epoch
        picture = page.locator(f"img[src*='reconstructions%2Bstep%2B{step}%2B']").first
        picture.wait_for()
        assert picture.evaluate("image => image.naturalWidth") > 0
        page.locator("[role=slider]:not([data-disabled])").last.press("ArrowRight")

    page.goto(f"{server}/#/experiments/{experiment}/runs/{runs['summary']}")
    page.get_by_text("has the lowest validation neg_elbo").first.wait_for()
