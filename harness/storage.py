"""A trained run as two files, without pickle: weights (safetensors) and configuration (JSON)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from harness import networks
from harness.config import RunConfig, UserError
from harness.vae import SingleVAE, empty

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
            shape = _image_shape(file.metadata() or {})
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _check_size(config, shape, weights)
        model = empty(config, shape).to(next(iter(weights.values())).dtype)
        model.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{folder} holds no loadable model ({said})") from error
    return model


def _image_shape(metadata: Mapping[str, str]) -> tuple[int, int, int]:
    said = metadata.get("image_shape", "")
    try:
        shape = json.loads(said)
    except (ValueError, RecursionError):
        shape = None
    whole = isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
    if not whole or len(shape) != 3:
        raise ValueError(f"image_shape={said[:40]!r} in {WEIGHTS}: not three whole numbers >= 1")
    return shape[0], shape[1], shape[2]


def _check_size(
    config: RunConfig, shape: tuple[int, int, int], weights: Mapping[str, Tensor]
) -> None:
    """Refuse weights of another number than the model has, before it takes memory."""
    expected = networks.numbers(config, shape) + (config.sigma == "learned")
    found = sum(tensor.numel() for tensor in weights.values())
    if found != expected:
        raise ValueError(
            f"{WEIGHTS} has {found:,} numbers; the configuration has {expected:,} on images of "
            f"{' x '.join(map(str, shape))}"
        )
