"""A trained run as two files, without pickle: weights (safetensors) and configuration (JSON)."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from harness.config import RunConfig, UserError
from harness.vae import SingleVAE

WEIGHTS, CONFIG = "weights.safetensors", "config.json"


def save_model(model: SingleVAE, folder: Path) -> None:
    """Write a run's weights, image shape and configuration into a folder."""
    shape = json.dumps(model.image_shape)
    save_file(model.state_dict(), folder / WEIGHTS, metadata={"image_shape": shape})
    (folder / CONFIG).write_text(model.config.to_json())


def load_model(folder: Path) -> SingleVAE:
    """Rebuild a run from the files of `save_model`.

    Raises:
        UserError: a file is missing, broken, or does not fit the other.
    """
    try:
        config = RunConfig.from_json((folder / CONFIG).read_text())
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            shape = json.loads(file.metadata()["image_shape"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model = SingleVAE(config, tuple(shape)).to(next(iter(weights.values())).dtype)
        model.load_state_dict(weights)
    except UserError:
        raise
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{folder} holds no loadable model ({reason})") from error
    return model
