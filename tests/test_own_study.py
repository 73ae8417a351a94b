"""Studies of a user's own images, from files on disk to report and replay."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from real_stores import small_study

from harness import load_run, tracking
from harness.linear import pca
from harness.tracking.runs import Run
from studies import kl_weight, replay
from studies.runner import cli

SHAPE = (7, 10)
slow = pytest.mark.slow
SMALL = ["--epochs", "2", "--batch-size", "8", "--seeds", "1"]


def paint(file: Path, colour: tuple[int, int, int], value: int) -> None:
    """Write a small picture in one colour with a dark bar somewhere."""
    pixels = np.full((*SHAPE, 3), colour, dtype=np.uint8)
    pixels[:, value % SHAPE[1]] = 20
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


@pytest.fixture
def store(empty_database, tmp_path) -> Path:
    """Return a folder with an empty MLflow database and a folder of pictures beside it."""
    (tmp_path / "store").mkdir()
    shutil.copy(empty_database, tmp_path / "store" / "mlflow.db")
    return tmp_path / "store"


def classes(folder: Path) -> Path:
    """Return a folder with two classes whose names a page or a figure could stumble over."""
    for i in range(120):
        name, colour = ("<b>red", (200, i, 0)) if i % 2 else ("$blue", (0, i, 200))
        paint(folder / "my pictures" / name / f"{i}.png", colour, i)
    return folder / "my pictures"


def pngs(store: Path, name: str) -> set[tuple[int, ...]]:
    """Return the shapes of the pictures that runs logged under a key."""
    files = store.glob(f"mlruns/**/images/{name}*.png")
    return {np.asarray(Image.open(file)).shape for file in files}


@pytest.mark.slow
def test_convolutions_on_a_folder_of_colour_pictures(store, tmp_path, capsys):
    folder, name = classes(tmp_path), "folder-my-pictures"
    command = ["--dataset", f"folder:{folder}", "--model", "conv", "--channels", "3", "4", *SMALL]
    small_study("kl_weight", [*command, "--values", "0.02", "1"], store)
    printed = capsys.readouterr().out
    assert f"on {name} (210 pixels)" in printed
    assert "Class <b>red reconstructs" in printed or "Class $blue reconstructs" in printed

    # Pictures are in colour, and as many pixels high and wide as the grid needs.
    height, width = SHAPE[0] * 8 + 2, SHAPE[1] * 8 + 2
    assert pngs(store, "reconstructions") == {(2 * height, 10 * width, 3)}
    assert pngs(store, "prior_samples") == {(4 * height, 10 * width, 3)}

    # No name or text holds the place of the folder; settings hold what identifies it.
    uri = f"sqlite:///{store}/mlflow.db"
    (summary,) = (r for r in read(uri, f"kl_weight-{name}") if r.tags["role"] == "summary")
    report = store / "reports" / f"kl_weight-{name}"
    texts = [file.read_text() for file in report.iterdir() if file.suffix in (".json", ".html")]
    texts += [json.dumps([r.params, r.tags]) for r in read(uri, f"kl_weight-{name}")]
    texts += [file.read_text() for file in store.glob("mlruns/**/provenance.json")]
    assert not any(f"{folder.parent}/my" in text for text in texts)
    assert "dataset_digest" in summary.params
    page = (report / "report.html").read_text()
    assert "--dataset &#39;folder:my pictures&#39; --image-size 7 10" in page
    assert "--model conv --channels 3 4" in page
    assert "<b>red" not in page

    # A run is loaded with its colours, and comes out again bit for bit.
    run = next(r for r in read(uri, f"kl_weight-{name}") if r.tags["role"] == "run")
    assert load_run(run.run_id, uri).model.data_shape == (3, *SHAPE)
    capsys.readouterr()
    replay.main([run.run_id, "--tracking-uri", uri, "--data-dir", str(folder)])
    assert "Reproduced: all" in capsys.readouterr().out

    # Other pictures under the same name are another study.
    paint(folder / "$blue" / "new.png", (0, 0, 255), 3)
    with pytest.raises(SystemExit):
        small_study("kl_weight", [*command, "--values", "0.02", "1"], store)
    assert "dataset_digest: " in capsys.readouterr().err


def read(uri: str, experiment: str) -> list[Run]:
    return tracking.connect(uri).runs(experiment)


@pytest.mark.parametrize("study", ["elbo_vs_mse", pytest.param("latent_size", marks=slow)])
def test_pictures_without_classes_and_too_large_for_a_linear_model(
    store, tmp_path, capsys, monkeypatch, study
):
    monkeypatch.setattr(pca, "MOST_PIXELS", 59)
    for i in range(40):
        paint(tmp_path / "flat" / f"{i}.png", (i, 5 * i, 100), i)
    values = {
        "elbo_vs_mse": ["ELBO, calibrated", "MSE only, autoencoder"],
        "latent_size": ["1", "3"],
    }[study]
    command = ["--dataset", f"folder:{tmp_path / 'flat'}", "--image-size", "4", "5", *SMALL]
    small_study(study, [*command, "--values", *values], store)
    printed = capsys.readouterr().out
    assert "(60 pixels)" in printed
    assert "probe_" not in printed
    assert "frechet" not in printed
    assert "linear model" not in printed
    assert "principal components" not in printed
    page = (store / "reports" / f"{study}-folder-flat" / "report.html").read_text()
    assert "coloured by class" not in page


BAD = [
    ("--dataset folder:HERE/none", "there is no such folder"),
    ("--dataset folder:", "no image in it|give --image-size|differ"),
    ("--image-size 4", "only folder:PATH and torchvision:PATH"),
    ("--dataset folder:HERE --image-size 0", "image_size=(0,)"),
    ("--dataset folder:HERE --image-size 1 2 3", "image_size=(1, 2, 3)"),
    ("--dataset folder:HERE --image-size x", "--image-size"),
    ("--channels 3", "--channels with model='mlp'"),
    ("--model conv --channels 0", "channels=0: give a whole number >= 1"),
    ("--model cnn", "'cnn'"),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD)
def test_bad_options_are_one_line(tmp_path, capsys, monkeypatch, arguments, expected):
    paint(tmp_path / "1.png", (1, 2, 3), 0)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(SystemExit) as stop:
        cli.main(kl_weight.STUDY, arguments.replace("HERE", str(tmp_path)).split())
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert any(word in printed for word in expected.split("|"))
