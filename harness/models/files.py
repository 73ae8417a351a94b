"""A trained model as two files, without pickle: weights (safetensors) and configuration (JSON)."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from harness import registry
from harness.config import RunConfig
from harness.data.dataset import Columns
from harness.errors import UserError
from harness.models.vae import VAE, build, lay_out

WEIGHTS, CONFIG = "weights.safetensors", "config.json"


def put(file: Path, content: bytes) -> None:
    """Write a file that other processes find whole or not at all; an OSError leaves an old one."""
    new = file.with_name(f".{file.name}.{os.getpid()}.new")
    try:
        with new.open("wb") as open_file:
            open_file.write(content)
            open_file.flush()
            os.fsync(open_file.fileno())
        new.replace(file)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def put_sealed(file: Path, content: bytes) -> None:
    """Write a file with `put`, its SHA-256 at its end."""
    put(file, content + hashlib.sha256(content).digest())


def read_sealed(file: Path) -> bytes:
    """Return the content of a file of `put_sealed`; a ValueError if it has changed."""
    whole = file.read_bytes()
    content, digest = whole[:-32], whole[-32:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("its contents have changed")
    return content


def save_model(config: RunConfig, model: VAE, folder: Path) -> None:
    """Write a model's weights, the shape and range of its images, and its configuration.

    With a user's network or likelihood, its source too.
    """
    sources = registry.sources(config)
    for setting, kind in registry.SETTINGS.items():  # its files are KIND.py
        if (part := (kind, getattr(config, setting))) in sources:
            (folder / f"{kind}.py").write_text(sources[part], encoding="utf-8")
    metadata = {"image_shape": json.dumps(model.data_shape), "largest": json.dumps(model.largest)}
    if model.columns is not None:
        metadata["columns"] = json.dumps(model.columns)
    plain = torch.contiguous_format  # clones, since safetensors refuses tied weights
    state = {name: value.clone(memory_format=plain) for name, value in model.state_dict().items()}
    put(folder / WEIGHTS, save(state, metadata))  # `save_file` has no OSError and no umask
    (folder / CONFIG).write_text(config.to_json())


def load_model(
    folder: Path, trust: Callable[[str], bool] = lambda code: False
) -> tuple[RunConfig, VAE]:
    """Rebuild a model from the files of `save_model`; a `UserError` if they cannot be used.

    `trust` is that of `registry.restore`, for the source of a user's network or likelihood.
    """
    _restore_parts(folder, trust)
    try:
        config = RunConfig.from_json((folder / CONFIG).read_text())
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shape = json.loads(metadata.get("image_shape", "null"))
        if not isinstance(shape, list) or any(type(n) is not int or n < 1 for n in shape):
            raise ValueError(f"image_shape={shape} in {WEIGHTS}: not whole numbers >= 1")
        # A model of the first edition does not have its grey range.
        largest = json.loads(metadata.get("largest", "null"))
        stored = json.loads(metadata.get("columns", "null"))
        columns = None if stored is None else Columns(*map(tuple, stored))
        if config.model in registry.BUILT_IN:
            with torch.device("meta"):  # sizes that do not fit the weights must take no memory
                model = build(config, shape, largest, columns)
            model.load_state_dict(_renamed(weights, model), assign=True)
            lay_out(model)
        else:  # a user's network may need values for its initial weights
            model = build(config, shape, largest, columns)
            model.to(next(iter(weights.values()), torch.empty(0)).dtype)
            model.load_state_dict(weights)
    except Exception as error:  # of a user's network, any
        why = " ".join(str(error).split())
        raise UserError(f"{folder.name} holds no loadable model ({why})") from error
    return config, model.eval()


def _restore_parts(folder: Path, trust: Callable[[str], bool]) -> None:
    # Before the configuration is read, which is refused without them.
    try:
        config = json.loads((folder / CONFIG).read_text())
        named = [(kind, config.get(setting)) for setting, kind in registry.SETTINGS.items()]
    except (OSError, ValueError, RecursionError, AttributeError):
        return  # refused as a configuration
    for kind, name in named:
        if isinstance(name, str) and name not in registry.TAKEN[kind]:
            file = folder / f"{kind}.py"
            text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
            registry.restore(kind, name, text, trust)


def _renamed(weights: Mapping[str, Tensor], model: VAE) -> dict[str, Tensor]:
    # The encoders of the first edition did not flatten images, and shaped them before convolutions.
    given, names = (
        [name for name in state if name.startswith("encoder.")]
        for state in (weights, model.state_dict())
    )
    if set(given) == set(names):
        return dict(weights)
    given.sort(key=lambda name: (int(name.split(".")[1]), name.endswith("bias")))
    renamed = dict(zip(given, names, strict=False))
    return {renamed.get(name, name): value for name, value in weights.items()}
