"""Every notebook runs from top to bottom on a small study made here."""

import ast
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from matplotlib.figure import Figure
from nbclient import NotebookClient
from real_stores import small_study

from harness import UserError
from studies import search

NOTEBOOKS = sorted((Path(__file__).parents[1] / "analysis").glob("*.ipynb"))
SMALL = {
    "kl_weight": ["--values", "0", "0.02", "1"],
    "latent_size": ["--values", "1", "4"],
    "kl_normalization": ["--values", "0.005", "0.5"],
    "elbo_vs_mse": [],
}


@pytest.fixture(scope="module")
def tracking_of_all(empty_database, tmp_path_factory):
    """Run every study on a few values for two epochs, all in one tracking store."""
    folder = tmp_path_factory.mktemp("all")
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    for name, values in SMALL.items():
        small_study(name, [*values, "--seeds", "2", "--epochs", "2"], folder)
    places = ["--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    places += ["--storage", f"sqlite:///{folder}/optuna.db"]
    search.main(["--trials", "6", "--epochs", "2", *places])
    return f"sqlite:///{folder}/mlflow.db"


def executed(path, tracking_uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, resources={"metadata": {"path": path.parents[1]}})
    client.execute()
    return notebook


def shows_a_figure(notebook):
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return any("image/png" in o.get("data", {}) for o in outputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's event loop, not of ours
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_a_figure(path, tracking_of_all, monkeypatch):
    assert shows_a_figure(executed(path, tracking_of_all, monkeypatch))


def shown(path: Path) -> list[Any]:
    """Run a notebook's code in this process; return the values that its cells end with."""
    names: dict[str, Any] = {}
    values = []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            lines = [line for line in cell.source.split("\n") if not line.startswith("%")]
            code = ast.parse("\n".join(lines))
            last = code.body.pop() if isinstance(code.body[-1], ast.Expr) else None
            exec(compile(code, path.name, "exec"), names)
            if last:
                values.append(eval(compile(ast.Expression(last.value), path.name, "eval"), names))
    return values


def test_the_notebook_of_a_finished_study_shows_a_figure(finished, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", finished.tracking_uri)
    path = next(path for path in NOTEBOOKS if path.stem == "kl_weight")
    assert any(isinstance(value, Figure) for value in shown(path))


def test_without_a_study_a_notebook_says_which_command_to_run(tracking_uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    with pytest.raises(UserError, match="python -m studies.kl_weight$"):
        shown(NOTEBOOKS[2])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_small_with_outputs_and_defines_nothing(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert path.stat().st_size < 400_000
    nbformat.validate(notebook)
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)
    assert shows_a_figure(notebook)
    for output in outputs:
        output.get("data", {}).pop("image/png", "")
    assert not re.search(r"/(home|root|tmp|work|Users)\b", nbformat.writes(notebook))
    assert not any(
        line.startswith(("def ", "class ")) for cell in code for line in cell.source.split("\n")
    )
    # What is concluded is computed from the runs, so that no other study makes it false.
    assert notebook.cells[-1].cell_type == "code"
