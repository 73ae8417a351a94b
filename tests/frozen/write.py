"""Write `first_edition.tar.gz` and `values.json` with the code of commit 593445c.

    git worktree add --detach TREE 593445c
    cd TREE && PYTHONPATH=$PWD:ROOT/tests:ROOT/benchmarks python -P ROOT/tests/frozen/write.py

The archive holds a study of the KL weight, 2 weights and 2 seeds, and one run of each of five other
kinds, in studies named after them. Databases are kept as SQL, in which `@HOME@` stands for their
folder, as in artifacts; figures, reports and all but one picture a run are left out.
"""

import gzip
import io
import json
import os
import sqlite3
import sys
import tarfile
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import frozen_probe

from frozen import first_edition, values
from harness import RunConfig
from studies import kl_weight
from studies.runner import cli

SMALL = {"hidden": (16,), "latent_size": 4}
KINDS = {
    "relu": RunConfig.seed_recipe(**SMALL),
    "linear": RunConfig(model="linear", latent_size=4),
    "conv": RunConfig(model="conv", channels=(4, 6), latent_size=4),
    "learned": RunConfig(sigma="learned", **SMALL),
    "bernoulli": RunConfig(likelihood="bernoulli", binarization="stochastic", **SMALL),
}


def study(home: Path, base: RunConfig, *words: str) -> None:
    """Run a study of the KL weight, with databases in a folder."""
    places = ["--tracking-uri", f"sqlite:///{home}/mlflow.db"]
    places += ["--storage", f"sqlite:///{home}/optuna.db", "--device", "cpu"]
    cli.main(replace(kl_weight.STUDY, base=base, figures={}), [*words, *places])


def kept(artifact: Path) -> bool:
    """Return whether a file below mlruns goes into the archive."""
    if artifact.parent.name == "images":
        return artifact.name.startswith("prior_samples") and artifact.suffix == ".png"
    of_summary = artifact.name in ("runs.csv", "summary.json", "table.csv")
    return artifact.parent.name == "model" or artifact.name == "provenance.json" or of_summary


def files(home: Path) -> dict[str, bytes]:
    """Return the archive's files by their names."""
    found = {
        str(path.relative_to(home)): path.read_bytes()
        for path in sorted((home / "mlruns").rglob("*"))
        if path.is_file() and kept(path)
    }
    for name in ("mlflow", "optuna"):
        with closing(sqlite3.connect(home / f"{name}.db")) as database:
            text = "\n".join(database.iterdump())
        found[f"{name}.sql"] = text.encode()
    return {
        name: content.replace(str(home).encode(), first_edition.HOME.encode())
        for name, content in found.items()
    }


def archive(held: dict[str, bytes]) -> bytes:
    """Pack files without owners and times."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in held.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return gzip.compress(packed.getvalue(), mtime=0)


def write_archive(home: Path) -> None:
    """Write the store of small studies of all kinds."""
    study(home, RunConfig(**SMALL), "--values", "0.02", "1", "--seeds", "2", "--epochs", "2")
    for name, base in KINDS.items():
        words = ["--study-name", name, "--values", str(base.kl_weight)]
        study(home, base, *words, "--seeds", "1", "--epochs", "1")
    first_edition.ARCHIVE.write_bytes(archive(files(home)))


def write_values(home: Path) -> None:
    """Write the numbers of trainings, of a study and of models in the archive."""
    study(home, RunConfig(), "--values", "0", "0.02", "1", "--seeds", "2", "--epochs", "3")
    (home / "first").mkdir()
    found = {
        "trained": values.trained(frozen_probe.KINDS),
        "studied": values.studied(f"sqlite:///{home}/mlflow.db"),
        "reconstructed": values.reconstructed(first_edition.unpack(home / "first")),
    }
    values.FILE.write_text(json.dumps(found, indent=1).replace(",\n   ", ", ") + "\n")


def main() -> None:
    sys.argv[0] = "studies/kl_weight.py"  # the source that runs name
    for write in (write_archive, write_values):
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder).resolve()
            os.chdir(home)  # MLflow's default experiment names the current folder
            write(home)


if __name__ == "__main__":
    main()
