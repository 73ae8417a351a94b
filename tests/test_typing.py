"""A user's script checks under mypy's strict rules, against the types that the packages hold."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
from torch import Tensor, nn

from harness import RunConfig, RunResult, load_dataset, load_run, network, term
from harness import train, train_and_evaluate
from harness.objective import Batch
from studies import Axis, Study, main


@network("small")
def small(data_shape: tuple[int, ...], latent_size: int) -> tuple[nn.Module, nn.Module]:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 2 * latent_size))
    return encoder, nn.Sequential(nn.Linear(latent_size, 64), nn.Unflatten(1, data_shape))


@term("brightness")
def brightness(batch: Batch) -> Tensor:
    return batch.reconstruction.mean()


data = load_dataset("digits")
config = RunConfig(model="small", kl_weight=0.1, terms={"brightness": 0.5})
one: RunResult = train_and_evaluate(config, data)
many: list[RunResult] = train_and_evaluate([config, config.replace(seed=1)], data, device="cpu")
best: float = one.metrics["neg_elbo"]
images: Tensor = one.model.sample(10, seed=1)
for record in train([config], data):
    if record.val["loss"][0] > 1:
        record.drop([0])
reconstructions: Tensor = load_run("0123").model.reconstruct(images)
axis = Axis("learning_rate", (1e-3, 1e-2))
study = Study("rates", "Which?", RunConfig(), axis, {}, answer=lambda frame: f"{len(frame)} runs")
if __name__ == "__main__":
    main(study)
"""


@pytest.mark.slow
def test_a_users_script_checks_strictly(tmp_path):
    for package in ("harness", "studies", "analysis"):
        assert (ROOT / package / "py.typed").is_file()
    assert checked(tmp_path, SCRIPT) == "Success: no issues found in 1 source file\n"
    wrong = SCRIPT.replace("one: RunResult", "one: int").replace("many: list", "many: tuple")
    assert checked(tmp_path, wrong).count("Incompatible types in assignment") == 2


def checked(folder: Path, script: str) -> str:
    """Return the output of mypy; as for installed packages, it is of errors in the script alone."""
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "script.py"]
    env = os.environ | {"MYPYPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True).stdout
