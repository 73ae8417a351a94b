"""Bad input, of every kind: one clear line, exit code 2, and nothing changed on disk."""

import json
import shutil
import socket
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from harness import RunConfig
from harness.models.files import load_model, save_model
from harness.models.vae import build
from studies import (
    all as all_studies,
)
from studies import (
    elbo_vs_mse,
    kl_normalization,
    kl_weight,
    latent_size,
    replay,
    reproduce,
    search,
)
from studies.runner import cli
from studies.runner.database import open_storage

MAINS = {
    **{
        study.STUDY.name: lambda args, study=study: cli.main(study.STUDY, args)
        for study in (kl_weight, latent_size, kl_normalization, elbo_vs_mse)
    },
    "search": search.main,
    "all": all_studies.main,
    "reproduce": reproduce.main,
    "replay": replay.main,
}
"""Every command line."""

RUN = "0" * 32

ARGUMENTS = [
    # command, arguments, what the line contains
    ("kl_weight", "--dataset cifar", "'cifar'"),
    ("kl_weight", "--kl-normalization pixel", "'pixel'"),
    ("kl_weight", "--values -1", "kl_weight=-1.0: give a finite number >= 0"),
    ("kl_weight", "--values nan", "kl_weight=nan: give a finite number >= 0"),
    ("kl_weight", "--values inf", "kl_weight=inf"),
    ("kl_weight", "--values 1 x", "kl_weight=x: give a number"),
    ("kl_weight", "--workers x", "--workers 'x': give a whole number; --help"),
    ("kl_weight", "--threads-per-run 0", "threads_per_run=0: give a whole number >= 1"),
    ("kl_weight", "--threads-per-run 9999 --device cpu", "threads_per_run=9999 on "),
    ("kl_weight", "--values 1 1", "every value once"),
    ("kl_weight", "--seeds 0", "seeds=0: give a whole number >= 1"),
    ("kl_weight", "--latent-size 0", "latent_size=0: give a whole number >= 1"),
    ("kl_weight", "--epochs 0", "epochs=0"),
    ("kl_weight", "--epochs 0.5", "--epochs '0.5': give a whole number; --help"),
    ("kl_weight", "--learning-rate x", "--learning-rate 'x': give a number; --help"),
    ("kl_weight", "--hidden 3 x", "--hidden '3', 'x': give whole numbers; --help"),
    ("kl_weight", "--image-range 0", "--image-range '0': give two numbers; --help"),
    ("kl_weight", "--seeds", "--seeds: give a value after it; --help"),
    ("kl_weight", "--seeds 3 4", "'4': no option takes this value; --help"),
    ("kl_weight", "--batch-size 0", "batch_size=0"),
    ("kl_weight", "--batch-size 5000", "digits has 1280 training images; give at most 1280"),
    ("kl_weight", "--wieght 1", "--wieght: no such option (did you mean --kl-weight?); --"),
    ("kl_weight", "--learning_rat=1", "--learning_rat: no such option (did you mean --learning"),
    ("search", "--trails 3", "--trails: no such option (did you mean --trials?); --help"),
    ("kl_weight", "--xyz", "--xyz: no such option; --help"),
    ("kl_weight", "surplus", "surplus"),
    ("kl_weight", "--device tpu", "'tpu'"),
    ("kl_weight", "--sigma free", "--sigma 'free': choose one of fixed, learned, optimal; --help"),
    ("kl_weight", "--free-bits -1", "free_bits=-1.0: give a finite number >= 0"),
    ("kl_weight", "--likelihood bernoulli", "is no likelihood"),
    ("kl_weight", "--binarization threshold", "need likelihood='bernoulli'"),
    ("kl_weight", "--kl-warmup-epochs 20 --kl-cycles 3", "within epochs=50"),
    ("kl_weight", "--kl-warmup-epochs -1", "kl_warmup_epochs=-1"),
    ("kl_weight", "--values", "--values []: give at least one"),
    ("kl_weight", "--image-size", "image_size="),
    ("kl_weight", "--study-name=", "study_name=''"),
    ("kl_weight", "--tracking-uri=", "--tracking-uri is empty"),
    ("search", "--study-name=", "study_name=''"),
    ("replay", f"{RUN} --tracking-uri=", "--tracking-uri is empty"),
    ("latent_size", "--values 0", "latent_size=0: give a whole number >= 1"),
    ("latent_size", "--values 2.5", "latent_size=2.5: give a whole number >= 1"),
    ("latent_size", "--latent-size 4", "latent_size sweeps it"),
    ("latent_size", "--seeds -1", "seeds=-1"),
    ("kl_normalization", "--values -1", "kl_weight=-2.0: give"),
    ("kl_normalization", "--kl-normalization sum", "kl_normalization sweeps it; leave it out"),
    ("kl_normalization", "--epochs nine", "--epochs"),
    ("elbo_vs_mse", "--values plain", "plain"),
    ("elbo_vs_mse", "--batch-size 1e3", "--batch-size"),
    ("search", "--trials 0", "trials=0: give a whole number >= 1"),
    ("search", "--seeds 0", "seeds=0: give a whole number >= 1"),
    ("search", "--epochs 0", "epochs=0"),
    ("search", "--pruner best", "'best'"),
    ("search", "--multi-objective --pruner median", "no order"),
    ("search", "--likelihood bernoulli", "is no likelihood"),
    ("search", "--study-name a/b", "study_name='a/b'"),
    ("search", "--batch-size 5000", "digits has 1280 training images; give at most 1280"),
    ("search", "--values 1", "--values"),
    ("all", "--values 1", "--values: studies differ in it"),
    ("all", "--study-name mine", "--study-name: studies differ in it"),
    ("all", "--latent-size 3", "--latent-size: studies differ in it"),
    ("all", "--trials 3", "--trials"),
    # Of a later study: refused before the first one trains.
    ("all", "--sigma optimal", "studies.kl_normalization: sigma='optimal'"),
    ("all", "--free-bits 0.1", "studies.elbo_vs_mse: free_bits=0.1"),
    ("reproduce", "--study-name a/b", "study_name='a/b'"),
    ("reproduce", "--dataset digits", "--dataset"),
    ("reproduce", "--device abacus", "'abacus'"),
    ("replay", "", "RUN_ID is missing: the run's id in MLflow"),
    ("replay", f"{RUN} {RUN}", RUN),
    ("replay", f"{RUN} --device tpu", "'tpu'"),
    ("replay", f"{RUN} --tracking-uri sqlite:///HERE/none.db", "none.db does not exist"),
]

PLACES = [
    # option, address, what the line contains; HERE is a folder with the files of `databases`
    ("--tracking-uri", "sqlite:///HERE/file/x.db", "not a folder"),
    ("--tracking-uri", "sqlite:///HERE/folder", "is not a file"),
    ("--tracking-uri", "sqlite:////proc/x/m.db", "--tracking-uri"),
    ("--tracking-uri", "sqlite:////dev/null", "is not a file"),
    ("--tracking-uri", "sqlite://", "in memory"),
    ("--tracking-uri", "sqlite:///HERE/text.db", "not a database"),
    ("--tracking-uri", "sqlite:///HERE/cut.db", "malformed"),
    ("--tracking-uri", "sqlite:///HERE/newer.db", "from_the_future"),
    ("--tracking-uri", "HERE/mlruns", "--tracking-uri"),
    ("--tracking-uri", "gopher://there", "--tracking-uri"),
    ("--tracking-uri", "http://", "--tracking-uri"),
    ("--storage", "sqlite:///HERE/file/x.db", "not a folder"),
    ("--storage", "sqlite:///HERE/folder", "is not a file"),
    ("--storage", "sqlite:////proc/x/o.db", "--storage"),
    ("--storage", "sqlite:///:memory:", "in memory"),
    ("--storage", "sqlite:///HERE/text.db", "not a database"),
    ("--storage", "sqlite:///HERE/newer_optuna.db", "pip install -U optuna"),
    ("--storage", "sqlite:///HERE/good.db", "is a database of MLflow"),
    ("--storage", "sqlite:///HERE/new.db", "is the tracking database too"),
    ("--storage", "HERE/optuna.db", "--storage"),
    ("--storage", "gopher://there", "--storage"),
]

NAMES = ["a/b", "..", ".", ".hidden", "-x", "a b", "a\nb", "a\0b", "a'b", "ä", "x" * 101, "<b>"]


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of all there is in a folder.

    Left out is what open databases have beside them: SQLite's logs, and empty lock files.
    """
    beside = ("-wal", "-shm", ".lock")
    there = [p for p in folder.rglob("*") if not p.is_symlink() and not p.name.endswith(beside)]
    stats = {str(path.relative_to(folder)): path.stat() for path in there}
    return {name: (found.st_size, found.st_mtime_ns) for name, found in stats.items()}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run something that must end with one line, exit code 2 and an untouched disk."""
    monkeypatch.chdir(tmp_path)

    def run(work) -> str:
        before = listing(tmp_path)
        with pytest.raises(SystemExit) as stop, cli.clear_errors([]):
            work()
        printed = capsys.readouterr()
        assert stop.value.code == 2
        assert printed.err.startswith("error: ")
        assert len(printed.err.splitlines()) == 1, printed.err
        assert printed.err.endswith("\n")
        assert "Traceback" not in printed.out + printed.err
        assert listing(tmp_path) == before
        return printed.err

    return run


# --- command lines ------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "arguments", "expected"), ARGUMENTS)
def test_a_bad_command_line(command, arguments, expected, refused, tmp_path, monkeypatch):
    # What is not named would be found in the repository.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/m.db")
    words = arguments.replace("HERE", str(tmp_path)).split()
    if command not in ("reproduce", "replay"):
        words += ["--storage", f"sqlite:///{tmp_path}/o.db"]
    assert expected in refused(lambda: MAINS[command](words))


def test_a_place_whose_reports_cannot_be_written(refused, databases, tmp_path):
    shutil.copy(databases / "good.db", tmp_path / "m.db")
    (tmp_path / "reports").touch()
    words = ["--tracking-uri", f"sqlite:///{tmp_path}/m.db"]
    open_storage(f"sqlite:///{tmp_path}/o.db")
    words += ["--storage", f"sqlite:///{tmp_path}/o.db"]
    printed = refused(lambda: cli.main(kl_weight.STUDY, words))
    assert "reports is not a folder), where results go" in printed


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_name(name, refused):
    for command in ("kl_weight", "search", "reproduce"):
        assert "study_name=" in refused(lambda c=command: MAINS[c]([f"--study-name={name}"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", ["kl_weight", "search", "reproduce"])
def test_cuda_where_there_is_none(command, refused):
    printed = refused(lambda: MAINS[command](["--device", "cuda"]))
    assert "no CUDA device is usable here" in printed


# --- databases ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def databases(empty_database, tmp_path_factory) -> Path:
    """Make a folder of good and bad databases."""
    folder = tmp_path_factory.mktemp("databases")
    shutil.copy(empty_database, folder / "good.db")
    open_storage(f"sqlite:///{folder}/good_optuna.db").remove_session()
    for name in ("good.db", "good_optuna.db"):
        newer = folder / name.replace("good", "newer")
        shutil.copy(folder / name, newer)
        with closing(sqlite3.connect(newer)) as connection:
            connection.execute("update alembic_version set version_num = 'from_the_future'")
            connection.commit()
    (folder / "cut.db").write_bytes((folder / "good.db").read_bytes()[:9000])
    (folder / "text.db").write_text("not a database " * 100)
    (folder / "file").write_text("")
    (folder / "folder").mkdir()
    return folder


@pytest.mark.parametrize(("option", "address", "expected"), PLACES)
def test_a_place_that_cannot_be_used(option, address, expected, refused, databases, tmp_path):
    named = [path for path in databases.iterdir() if f"HERE/{path.name}" in address]
    for path in named:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    places = {"--tracking-uri": "sqlite:///HERE/new.db", "--storage": "sqlite:///HERE/o.db"}
    words = [word for pair in (places | {option: address}).items() for word in pair]
    words = [word.replace("HERE", str(tmp_path)) for word in words]
    printed = refused(lambda: cli.main(kl_weight.STUDY, words))
    assert expected in printed
    assert option in printed


@pytest.mark.parametrize("command", ["search", "all", "replay"])
def test_a_broken_database_on_every_command_line(command, refused, databases, tmp_path):
    shutil.copy(databases / "text.db", tmp_path)
    first = [RUN] if command == "replay" else ["--storage=sqlite:///o.db"]
    words = [*first, f"--tracking-uri=sqlite:///{tmp_path}/text.db"]
    assert "not a database" in refused(lambda: MAINS[command](words))


def test_a_run_that_is_not_there(refused, databases, tmp_path):
    shutil.copy(databases / "good.db", tmp_path)
    words = [f"--tracking-uri=sqlite:///{tmp_path}/good.db"]
    assert "is not in" in refused(lambda: replay.main([RUN, *words]))


# --- image files --------------------------------------------------------------------------------


def idx(shape: tuple[int, ...], magic: int, *, claimed: tuple[int, ...] | None = None) -> bytes:
    header = np.array([magic, *(claimed or shape)], dtype=">u4").tobytes()
    return header + np.zeros(shape, np.uint8).tobytes()


IMAGES, LABELS = idx((3, 28, 28), 0x803), idx((3,), 0x801)
TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
NO_IMAGES, NO_LABELS = (
    f"{name} is not an IDX file of bytes" for name in (TRAIN_IMAGES, TRAIN_LABELS)
)

FILES = {
    # files in place of good ones, what the line contains
    "none": (None, "Error downloading train-images"),
    "images cut short": ({TRAIN_IMAGES: IMAGES[:-1]}, "holds 2,351 values, not 3 x 28 x 28"),
    "images without an end of their header": ({TRAIN_IMAGES: IMAGES[:6]}, NO_IMAGES),
    "an empty file": ({TRAIN_IMAGES: b""}, NO_IMAGES),
    "images with a wrong magic number": ({TRAIN_IMAGES: idx((3, 28, 28), 0x903)}, NO_IMAGES),
    "images of floats": ({TRAIN_IMAGES: idx((3, 28, 28), 0xD03)}, NO_IMAGES),
    "labels in place of images": ({TRAIN_IMAGES: LABELS}, "found images (3,) and labels (3,)"),
    "images of another size": ({TRAIN_IMAGES: idx((3, 8, 8), 0x803)}, "found images (3, 8, 8)"),
    "more images than the file holds": (
        {TRAIN_IMAGES: idx((3, 28, 28), 0x803, claimed=(2**32 - 1, 28, 28))},
        "holds 2,352 values, not 4294967295 x 28 x 28",
    ),
    "labels fewer than images": (
        {TRAIN_LABELS: idx((2,), 0x801)},
        "found images (3, 28, 28) and labels (2,)",
    ),
    "labels cut short": ({TRAIN_LABELS: LABELS[:-1]}, "holds 2 values, not 3"),
    "labels with a wrong magic number": ({TRAIN_LABELS: idx((3,), 0x800)}, NO_LABELS),
    "no magic number": ({TRAIN_LABELS: idx((3,), 0)}, NO_LABELS),
    "a page in place of labels": ({TRAIN_LABELS: b"<!DOCTYPE html></html>"}, NO_LABELS),
    "too few images": ({}, "expected 60,000 images of 28 x 28 and labels"),
}


@pytest.fixture
def offline(monkeypatch) -> None:
    """Make every download fail at once, also where there is a network."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])


@pytest.mark.parametrize(("files", "expected"), FILES.values(), ids=FILES.keys())
def test_bad_image_files(files, expected, refused, offline, tmp_path):
    raw = tmp_path / "data" / "MNIST" / "raw"
    if files is not None:
        raw.mkdir(parents=True)
        good = {"images-idx3-ubyte": IMAGES, "labels-idx1-ubyte": LABELS}
        both = {f"{part}-{name}": good[name] for part in ("train", "t10k") for name in good}
        for name, content in (both | files).items():
            (raw / name).write_bytes(content)
    printed = refused(lambda: MAINS["kl_weight"](["--dataset=mnist", "--data-dir=data"]))
    assert f"no usable data in {raw} (" in printed
    assert expected in printed
    assert "Put the files" in printed


def test_a_server_that_does_not_speak_http(refused, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.recv(10_000)
                connection.sendall(b"no HTTP at all\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setenv("no_proxy", "*")
        mirrors = [f"http://127.0.0.1:{server.getsockname()[1]}/"]
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", mirrors)
        printed = refused(lambda: MAINS["kl_weight"](["--dataset=mnist", "--data-dir=data"]))
        thread.join()
    assert "Put the files" in printed


@pytest.mark.parametrize("command", ["search", "all", "reproduce"])
def test_no_data_on_other_command_lines(command, refused, offline):
    dataset = [] if command == "reproduce" else ["--dataset=mnist"]
    assert "no usable data" in refused(lambda: MAINS[command]([*dataset, "--data-dir=none"]))


def test_data_that_cannot_be_stored(refused, offline, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("file", "/proc/none", "/dev/null"):
        words = ["--dataset=mnist", f"--data-dir={folder}"]
        assert "no usable data" in refused(lambda w=words: MAINS["kl_weight"](w))


# --- models -------------------------------------------------------------------------------------


def weights(folder: Path, shape: object = "[1, 8, 8]", **changes: torch.Tensor) -> None:
    """Write the weights of a folder again, with another image shape or other tensors."""
    path = folder / "weights.safetensors"
    metadata = None if shape is None else {"image_shape": str(shape)}
    save_file({**load_file(path), **changes}, path, metadata=metadata)


def config(folder: Path, **changes: object) -> None:
    """Write the configuration of a folder again, with other values; None leaves a field out."""
    values = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def cut(folder: Path, name: str, size: int) -> None:
    """Cut a file short."""
    (folder / name).write_bytes((folder / name).read_bytes()[:size])


MODELS = {
    "no weights": (lambda f: (f / "weights.safetensors").unlink(), "weights.safetensors"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "config.json"),
    "weights cut short": (lambda f: cut(f, "weights.safetensors", 3000), "no loadable model"),
    "a header cut short": (lambda f: cut(f, "weights.safetensors", 5), "no loadable model"),
    "empty weights": (lambda f: cut(f, "weights.safetensors", 0), "no loadable model"),
    "weights of text": (lambda f: (f / "weights.safetensors").write_text("{}"), "no loadable"),
    "no tensors": (lambda f: save_file({}, f / "weights.safetensors", {"image_shape": "[1,8,8]"}),)
    + ("Missing key(s)",),
    "no image shape": (lambda f: weights(f, None), "image_shape=None"),
    "an image shape of words": (lambda f: weights(f, "large"), "Expecting value"),
    "negative sizes": (lambda f: weights(f, "[-1, -8, 8]"), "not whole numbers"),
    "an absurd image shape": (lambda f: weights(f, [1, 10**6, 10**6]), "size mismatch"),
    "one beyond any memory": (lambda f: weights(f, [1, 10**9, 10**9]), "overflowed"),
    "sizes without end": (lambda f: weights(f, "[" * 10_000), "no loadable model"),
    "an absurd width": (lambda f: config(f, hidden=[10**12]), "size mismatch"),
    "another latent size": (lambda f: config(f, latent_size=5), "size mismatch"),
    "a tensor of another shape": (
        lambda f: weights(f, **{"encoder.1.weight": torch.zeros(64, 7)}),
        "size mismatch",
    ),
    "a tensor too many": (lambda f: weights(f, **{"../x": torch.zeros(1)}), "Unexpected key(s)"),
    "a tensor of another name": (
        lambda f: weights(f, **{"../x\nerror: y": torch.zeros(0)}),
        "Unexpected key(s)",
    ),
    "whole numbers": (
        lambda f: weights(f, **{n: t.long() for n, t in load_file(f / WEIGHTS).items()}),
        "no loadable model",
    ),
    "an unknown field": (lambda f: config(f, width=3), "unknown fields ['width']"),
    "a missing field": (lambda f: config(f, hidden=None), "Missing key(s)"),
    "a field of another kind": (lambda f: config(f, batch_size="32"), "batch_size='32'"),
    "a number without end": (lambda f: config(f, kl_weight=10**400), "kl_weight=1000"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object (list)"),
    "half a configuration": (lambda f: cut(f, "config.json", 40), "not JSON"),
    "a configuration of bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "decode"),
}
WEIGHTS = "weights.safetensors"


@pytest.mark.parametrize(("damage", "expected"), MODELS.values(), ids=MODELS.keys())
def test_a_broken_model(damage, expected, refused, data, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    config = RunConfig(hidden=(7,), latent_size=3)
    save_model(config, build(config, data.image_shape), folder)
    damage(folder)
    assert expected in refused(lambda: load_model(folder))
