"""Examples of docstrings run, the citation names this version, and the documentation builds."""

import doctest
import importlib
import inspect
import pydoc
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

import harness

ROOT = Path(__file__).resolve().parents[1]
WITH_EXAMPLES = (
    *("harness.config", "harness.conventions", "harness.models.vae"),
    *("harness.tracking.record", "analysis.frames"),
)
LOADED = re.compile(r'<(?:script|img|iframe|source)[^>]*src="?(?:https?:)?//[^">]*')
LINKED = re.compile(r'<link[^>]*href="?(?:https?:)?//[^">]*')


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_of_docstrings_give_what_they_say(name, tracking_uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0
    assert failed == 0


def test_help_lists_every_public_name():
    text = pydoc.plain(pydoc.render_doc(harness))
    for name in harness.__all__:
        assert re.search(rf"^    (class )?{name}\b", text, re.MULTILINE)
        assert inspect.getdoc(getattr(harness, name))


def test_the_page_on_python_runs(registered):
    page = (ROOT / "docs" / "from-python.md").read_text()
    found: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(block, found)
    model, images, data = found["model"], found["images"], found["data"]
    assert found["mean"].shape == found["log_variance"].shape == (8, 10)
    assert found["decoded"].shape == found["again"].shape == (8, 1, 8, 8)
    assert torch.equal(found["decoded"], found["again"])
    assert found["drawn"].shape == (16, 1, 8, 8)
    assert found["lines"].shape == (4, 7, 1, 8, 8)
    # The model was trained: its reconstructions are closer than the mean image.
    x = images.view(8, 1, 8, 8) / 16
    mean = data.train.images.float().mean(0).view(1, 8, 8) / 16
    assert (x - model.reconstruct(images)).square().mean() < 0.8 * (x - mean).square().mean()


def test_modules_with_examples_are_tested():
    files = [path for package in ("harness", "studies", "analysis") for path in _python(package)]
    found = {path for path in files if re.search(r"^\s*>>> ", path.read_text(), re.MULTILINE)}
    assert found == {ROOT / f"{name.replace('.', '/')}.py" for name in WITH_EXAMPLES}


def _python(package):
    return (ROOT / package).glob("**/*.py")


def test_the_drawing_of_how_a_study_runs_is_that_of_the_code():
    # If not: `make docs`, and the stations in the page.
    command = [sys.executable, "docs/walk.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "docs" / "how-a-study-runs.svg").read_text()
    assert 14 <= done.stdout.count("<rect") <= 18


def test_links_of_pages_to_the_repository_lead_to_files():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]*)?\)", page.read_text()):
            made = page.parent.name == "docs" and link in ("benchmarks.md", "reference/index.md")
            assert made or (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_citation_names_this_version_and_licence():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["version"] == project["version"]
    assert cited["license"] == project["license"] == "MIT"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="the extra `docs` is not installed")
def test_the_documentation_builds_without_a_warning_and_loads_nothing_from_a_network(tmp_path):
    # Not --quiet: it would hide warnings from --strict.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path: path.read_text() for path in tmp_path.rglob("*.html")}
    assert tmp_path / "reference" / "harness.objective.html" in pages
    assert "RATES" in pages[tmp_path / "own-study.html"]  # of the example that the page shows
    for path, page in pages.items():
        assert not LOADED.findall(page) + LINKED.findall(page), path
    for path in tmp_path.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?https?:", path.read_text()), path
