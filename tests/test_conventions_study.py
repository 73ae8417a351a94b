"""The study of conventions: from its command line to table, anchors and figures."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from analysis import frames
from harness import UserError, load_dataset
from harness.conventions import conventions
from harness.data.dataset import with_official_training
from harness.linear.vae import linear_metrics
from studies import conventions as page
from studies.runner import cli
from studies.runner.options import Options
from studies.runner.study import KNOWN, Source, make_plan

VALUES = ["calibrated", "disentanglement_lib", "world_models", "diffusers"]
VALUES += ["calibrated_laplace", "repa_e", "pytorch_examples", "tensorflow"]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory, empty_database):
    folder = tmp_path_factory.mktemp("study")
    shutil.copy(empty_database, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    places = ["--tracking-uri", uri, "--storage", f"sqlite:///{folder}/optuna.db"]
    places += ["--study-name", "few"]
    cli.main(page.STUDY, ["--epochs", "2", "--seeds", "1", "--values", *VALUES, *places])
    there = folder / "reports" / "few"
    frame = page.prepare(frames.load_study("few", tracking_uri=uri))
    return SimpleNamespace(folder=there, frame=frame, report=(there / "report.html").read_text())


def test_conventions_of_one_configuration_are_one_run_named_by_the_first(study):
    named = study.frame.groupby("convention", sort=False)["equal"].first().dropna().to_dict()
    assert named == {"disentanglement_lib": "world_models"}
    assert study.frame["convention"].nunique() == len(VALUES) - 1
    plan = make_plan(page.STUDY, Options(seeds=1))
    assert len(set(plan.configs)) == len(plan.configs)
    equal = [cell.params.get("equal", "").split(", ") for cell in plan.proposer.cells]
    names = {cell.params["convention"] for cell in plan.proposer.cells}
    assert names | {name for each in equal for name in each} - {""} == set(page.STUDY.axis.values)
    assert set(conventions()) == set(page.STUDY.axis.values) - set(page.REFERENCES)


def test_every_codebase_has_a_paragraph_with_an_anchor(study):
    for name in VALUES:
        assert study.report.count(f'<p id="{name}">{name}: ') == 1
    assert (
        '<p id="world_models">world_models: the same run as disentanglement_lib; it charges '
        in study.report
    )
    assert len(re.findall(r'id="(\w+)"', study.report)) == len(VALUES)


def test_the_numbers_of_the_table_are_the_means_of_the_frame(study):
    table = json.loads((study.folder / "summary.json").read_text())["tables"][0]
    header, *rows = (study.folder / table["file"]).read_text().splitlines()
    assert len(rows) == len(VALUES) - 1
    means = study.frame.groupby("convention")
    for row in rows:
        cells = dict(zip(header.split(","), row.split(","), strict=True))
        runs = means.get_group(cells["convention"])
        for name, digits in {"nats_lost": 2, "rate": 2, "mse": 4, "active_units": 1}.items():
            mean = runs[name].mean()
            assert cells[name].split(" ")[0] == ("-" if mean != mean else f"{mean:.{digits}f}")
    lost = study.frame.set_index(["convention", "seed"])["nats_lost"]
    nats = study.frame.set_index(["convention", "seed"])["neg_elbo"]
    assert lost["diffusers", 0] == nats["diffusers", 0] - nats["calibrated", 0]
    assert lost["repa_e", 0] == nats["repa_e", 0] - nats["calibrated_laplace", 0]
    assert lost[["pytorch_examples", "tensorflow"]].isna().all()


def test_the_best_run_is_the_best_of_those_with_a_density(study):
    best = json.loads((study.folder / "summary.json").read_text())
    means = study.frame.sort_values("val/neg_elbo")
    assert means["convention"].iloc[0] not in ("diffusers", "tensorflow", "pytorch_examples")
    captions = " ".join(picture["caption"] for picture in best["pictures"])
    assert f"convention={means['convention'].iloc[0]} seed=" in captions
    assert "no neg_elbo and are not ranked: pytorch_examples." in best["answer"]
    assert "nats / image of binary pixels" in best["answer"]
    assert {Path(f["file"]).stem for f in best["figures"]} == {
        *page.STUDY.figures,
        "learning_curves",
    }


def test_a_pasted_loss_has_the_beta_of_the_studys_shape():
    base, digits = page.STUDY.base, KNOWN["digits"]
    colour = Source("own", 3 * 64, 0.02, 50, "", {}, 1_000, channels=3)
    assert page.paste(base, "pytorch_vae", digits).kl_weight == pytest.approx(0.00025 * 64)
    assert page.paste(base, "keras", digits).kl_weight == 1
    assert page.paste(base, "keras", colour).kl_weight == 3
    assert page.paste(base, "pytorch_vae_2020", colour).kl_weight == pytest.approx(
        32 / 1_000 * 192 / 4
    )
    assert page.paste(base, "mse:mean + 0.01*kl:sum", digits).kl_weight == pytest.approx(0.64)
    with pytest.raises(UserError, match="choose among keras"):
        page.paste(base, "kera", digits)


def test_the_plans_images_are_those_of_the_training_split():
    assert len(load_dataset("digits").train) == KNOWN["digits"].images


@pytest.mark.slow
@pytest.mark.skipif("VAE_DATA_DIR" not in os.environ, reason="needs MNIST")
def test_the_linear_oracle_counts_latents_above_the_variance_on_mnist():
    data = load_dataset("mnist", root=os.environ["VAE_DATA_DIR"])
    assert len(data.train) == KNOWN["mnist"].images
    counts = {"disentangling_vae": (287, 287), "blog": (23, 23), "pythae": (12, 12)}
    counts |= {"diffusers": (703, 705), "disentangling_vae_plain": (441, 440)}
    counts |= {"beta_vae_1konny": (6, 6), "sigma_vae_mse": (0, 0)}
    for name, (of_55_000, of_60_000) in counts.items():
        config = page.paste(page.STUDY.base, name, KNOWN["mnist"])
        for part, count in ((data, of_55_000), (with_official_training(data), of_60_000)):
            found = linear_metrics(config, part)["linear/latents_above_variance"]
            assert found == count, name
