"""Pictures of a finished study: its models side by side along the axis, and the best one closer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

import harness
from analysis import planes
from harness.data.dataset import Dataset
from harness.metrics import pictures, probes
from harness.models.vae import VAE
from harness.tracking import Store
from studies.plan import Plan

log = logging.getLogger(__name__)

SCATTERED = 1000
"""Test images of a latent scatter."""


def write_pictures(
    folder: Path, plan: Plan, data: Dataset, frame: pd.DataFrame, store: Store
) -> list[dict[str, Any]]:
    """Draw the first seed of every axis value in the study's last group, and the best of them.

    Returns:
        For each picture its file, its caption and the labels of its rows, for the report.
    """
    log.info("drawing pictures of the models")
    models = _models(plan, frame, store)
    return draw_models(folder, models, _best(plan, frame, list(models)), data)


def draw_models(
    folder: Path, models: Mapping[str, VAE], best: str, data: Dataset, seed: int = 0
) -> list[dict[str, Any]]:
    """Draw models side by side, and one of them closer.

    Args:
        folder: the summary's.
        models: label -> model.
        best: label of the one to look at closer.
        data: their dataset.
        seed: of all of them, named in the captions.

    Returns:
        For each picture its file, its caption and the labels of its rows, for the report.
    """
    labels = list(models)
    stack, draw = list(models.values()), pictures
    drawn = [
        (
            "reconstructions",
            draw.reconstructions(stack, data.test),
            "Test images (top row) and their reconstructions from the posterior mean, "
            f"seed {seed}.",
            ["test images", *labels],
        ),
        (
            "prior_samples",
            draw.sample_rows(stack, seed),
            f"Decoder means of z drawn from the prior N(0, I), seed {seed}.",
            labels,
        ),
        (
            "traversals",
            draw.traversals(models[best], data),
            f"{best}: one latent a row from -3 to 3, largest KL first, the others 0.",
            None,
        ),
        (
            "interpolations",
            draw.interpolations(models[best], data.test),
            f"{best}: straight lines between the posterior means of pairs of test images.",
            None,
        ),
    ]
    listed = []
    for name, picture, caption, rows in drawn:
        Image.fromarray(picture).save(folder / f"pictures/{name}.png")
        listed.append({"file": f"pictures/{name}.png", "caption": caption, "rows": rows})
    return [*listed, _scatter(folder, models, data)]


def _models(plan: Plan, frame: pd.DataFrame, store: Store) -> dict[str, VAE]:
    """Load seed 0 of each point of the last group that has one: label -> model."""
    run_ids = dict(zip(frame["name"], frame["run_id"], strict=True))
    there = {point: run_ids.get(f"{plan.label(point)} seed=0") for point in plan.configs}
    group = [point.group for point, run_id in there.items() if run_id][-1]
    return {
        plan.label(point): harness.load_run(run_id, store.uri).model
        for point, run_id in there.items()
        if run_id and point.group == group
    }


def _best(plan: Plan, frame: pd.DataFrame, labels: list[str]) -> str:
    values = frame.set_index("name")[plan.study.objective]
    return min(labels, key=lambda label: values[f"{label} seed=0"])


def _scatter(folder: Path, models: Mapping[str, VAE], data: Dataset) -> dict[str, Any]:
    """Draw where test images lie in each model's latent space."""
    part = data.test.head(SCATTERED)
    classes = [data.class_name(label) if data.classes else "" for label in part.labels.tolist()]
    places = []
    for label, model in models.items():
        x, y = probes.latent_plane(model, part).T
        places.append(pd.DataFrame({"model": label, "x": x, "y": y, "class": classes}))
    planes.latent_scatter(pd.concat(places)).savefig(folder / "pictures/latents.png", dpi=130)
    coloured = ", coloured by class" if data.classes > 1 else ""
    caption = (
        f"Posterior means of {len(classes)} test images{coloured}: both latents of two, the first "
        "two principal components of more. Each panel has its own scale."
    )
    return {"file": "pictures/latents.png", "caption": caption, "rows": None}
