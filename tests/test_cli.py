"""The command line: bad input is one clear line and exit code 2, and writes nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness import UserError
from studies import cli, kl_weight

BAD = {
    "an unknown dataset": (["--dataset", "cifar"], "'cifar'"),
    "an unknown mode": (["--kl-normalization", "pixel"], "'pixel'"),
    "a negative weight": (["--values", "-1"], "kl_weight=-1.0: give a finite number >= 0"),
    "a NaN weight": (["--values", "nan"], "kl_weight=nan: give a finite number >= 0"),
    "an infinite weight": (["--values", "inf"], "kl_weight=inf"),
    "a weight that is no number": (["--values", "1", "x"], "--values"),
    "a weight given twice": (["--values", "1", "1"], "give every value once"),
    "no seeds": (["--seeds", "0"], "seeds=0: give a whole number >= 1"),
    "no latents": (["--latent-size", "0"], "latent_size=0: give a whole number >= 1"),
    "no epochs": (["--epochs", "0"], "epochs=0"),
    "no batch": (["--batch-size", "0"], "batch_size=0"),
    "a batch larger than the data": (["--batch-size", "5000"], "digits has 1280 training images"),
    "half an epoch": (["--epochs", "0.5"], "--epochs"),
    "an unknown option": (["--wieght", "1"], "--wieght"),
    "an unknown device": (["--device", "tpu"], "'tpu'"),
    "an unknown sigma": (["--sigma", "free"], "'free'"),
    "negative free bits": (["--free-bits", "-1"], "free_bits=-1.0: give a finite number >= 0"),
    "grey cross-entropy": (["--likelihood", "bernoulli"], "is no likelihood"),
    "a binary Gaussian": (["--binarization", "threshold"], "need likelihood='bernoulli'"),
    "cycles without room": (["--kl-warmup-epochs", "20", "--kl-cycles", "3"], "within epochs=50"),
    "a bad name": (["--study-name", "a/b"], "study_name='a/b'"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_exit_code_2(arguments, says, capsys, tmp_path):
    places = ["--tracking-uri", f"sqlite:///{tmp_path}/m.db"]
    places += ["--storage", f"sqlite:///{tmp_path}/o.db"]
    with pytest.raises(SystemExit) as stop:
        cli.main(kl_weight.STUDY, [*arguments, *places])
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert says in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(kl_weight.STUDY, ["--device", "cuda"])
    assert stop.value.code == 2
    assert "no CUDA device is usable here" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tracking-uri", "--storage"])
def test_an_unwritable_place_is_refused(option, tracking_uri, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    places = {"--tracking-uri": tracking_uri, "--storage": f"sqlite:///{tmp_path}/o.db"}
    places |= {option: f"sqlite:///{tmp_path}/file/x.db"}
    with pytest.raises(SystemExit) as stop:
        cli.main(kl_weight.STUDY, [word for pair in places.items() for word in pair])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert option in said


def test_a_data_folder_without_data_is_refused(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    options = cli.parse(
        "kl_weight", "Why?", float, ["--dataset", "mnist", "--data-dir", str(tmp_path)]
    )
    with pytest.raises(UserError, match="Offline, put the files"):
        cli.execute(kl_weight.STUDY, options)


def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path, capsys):
    places = ["--tracking-uri", f"sqlite:///{tmp_path}/m.db"]
    cli.main(kl_weight.STUDY, ["--dry-run", "--values", "0.5", "1", *places])
    assert "2 values of kl_weight (0.5, 1) x 3 seeds = 6 runs" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_help_loads_neither_torch_nor_mlflow_nor_optuna_nor_pandas():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['kl_weight', '--help']\n"
        "try:\n    runpy.run_module('studies.kl_weight', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        # optuna and seaborn themselves are there as empty stand-ins
        "heavy = {'torch', 'mlflow', 'optuna.study', 'seaborn.utils', 'pandas', 'sklearn'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr
    for option in ("--dataset", "--values", "--seeds", "--storage", "--tracking-uri", "--fresh"):
        assert option in done.stdout
