"""Terminals, signals, owners and limits: output never decides over the work (issue 21)."""

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest

from harness import UserError
from harness.tracking import addresses, schema
from studies import kl_normalization, kl_weight, latent_size
from studies.runner import database, terminal

ROOT = Path(__file__).resolve().parents[2]


# --- owners -------------------------------------------------------------------------------------

HERE = ("node", "boot-2", 4026531836)  # host, boot, namespace
OWNERS = {
    # what became of the owner of a trial -> its name, whether it is known to have ended
    "it lives": ("node/boot-2/4026531836:7:100", False),
    "it ended": ("node/boot-2/4026531836:8:100", True),
    "another has its number": ("node/boot-2/4026531836:7:99", True),
    "another container of this name": ("node/boot-2/4026532900:1:100", False),
    "the machine was started anew": ("node/boot-1/4026531836:7:100", False),
    "another machine of this name": ("node/boot-9/4026531836:7:99", False),
    "another machine": ("other/boot-2/4026531836:7:99", False),
    "named by an earlier edition": ("node/4026531836:7:99", False),
}


@pytest.mark.parametrize(("owner", "gone"), OWNERS.values(), ids=OWNERS.keys())
def test_an_owner_is_gone_only_if_this_boot_and_container_show_it(owner, gone, monkeypatch):
    monkeypatch.setattr(database, "_host", lambda: "/".join(map(str, HERE)))
    monkeypatch.setattr(database, "_start", lambda process: {7: "100"}.get(process, ""))
    assert database.is_gone(owner) == gone
    assert database.in_words(owner).endswith(f"on {owner.partition('/')[0]}")
    assert database.process_name(7) == "node/boot-2/4026531836:7:100"


# --- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "text", "printed"),
    [
        ("ascii", "0.5 ± 0.1 pixel² of Fréchet, 日", b"0.5 +- 0.1 pixel^2 of Frechet, ?"),
        ("latin-1", "0.5 ± 0.1 − 日", "0.5 ± 0.1 - ?".encode("latin-1")),
        ("utf-8", "± of \udcff", "± of ?".encode()),  # a name that is no UTF-8
    ],
)
def test_a_terminal_without_a_letter_shows_another(encoding, text, printed):
    assert text.encode(encoding, "plain") == printed


# --- addresses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("sqlite:///{}/what?now/m.db", "write %3F for one in it"),
        ("sqlite:///{}/a%20b/m.db", "a b/m.db; write %25 for a % in a name"),
    ],
)
def test_an_address_that_means_another_file_is_refused(given, message, tmp_path):
    (tmp_path / "a%20b").mkdir()
    with pytest.raises(UserError, match=message):
        schema.check_database(given.format(tmp_path), "--storage")
    assert [path.name for path in tmp_path.iterdir()] == ["a%20b"]


@pytest.mark.parametrize("given", ["./mlruns", "mlruns", "/a/mlruns"])
def test_a_tracking_folder_is_refused_by_name(given, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    with pytest.raises(
        UserError, match=f"{given} .*neither an SQLite file nor .*sqlite:///here.db"
    ):
        addresses.tracking_address(None)


def test_the_default_address_is_of_the_repository_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(addresses, "project_root", lambda: tmp_path / "50%25 {of} what?")
    for url in (addresses.tracking_address(None), addresses.storage_address(None)):
        assert addresses.sqlite_file(url).parent == tmp_path / "50%25 {of} what?"


# --- causes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (BlockingIOError(11, "Resource temporarily unavailable"), "processes"),
        (RuntimeError("can't start new thread"), "processes"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "memory"),
        (RuntimeError("unable to mmap 8 bytes: Cannot allocate memory (12)"), "memory"),
        (OSError(2, "No such file"), None),
    ],
)
def test_what_is_used_up_is_named(error, lacking):
    trouble = addresses.trouble(error)
    assert trouble is None if lacking is None else lacking in trouble


# --- a study of one value -----------------------------------------------------------------------

ONE = {
    "kl_weight": (
        kl_weight.best_weight,
        "kl_weight = 1: decoder variance 0.5 pixel², calibration ratio 1, 0.0 of",
    ),
    "latent_size": (latent_size.useful_latents, "0.0 of 4 latents are active"),
    "decoder_variance": (kl_normalization.paths, "here, 0.5 pixel², is kl_weight = sum 1"),
}


@pytest.mark.parametrize(("answer", "text"), ONE.values(), ids=ONE.keys())
def test_one_value_is_compared_with_no_other(answer, text):
    row = {"kl_weight": 1.0, "latent_size": 4, "decoder_variance": 0.5, "learning_rate": 0.001}
    row |= {"kl_normalization": "sum", "weight": "blog's", "calibration_ratio": 1.0}
    row |= {"active_units": 0.0, "sigma": "fixed", "val/neg_elbo": 8.0}
    frame = pd.DataFrame([row | {"seed": seed, "neg_elbo": 9.0 + seed} for seed in range(2)])
    found = answer(frame)
    assert pd.Series([found]).str.contains(text)[0], found
    assert not any(word in found for word in ("none", "nan", "of 1 values", "lowest")), found


# --- processes ----------------------------------------------------------------------------------


def study(folder: Path, *more: str) -> list[str]:
    """Return the command of a small study whose stores are in a folder."""
    line = ["-m", "studies.kl_weight", "--epochs", "1", "--values", "0.05", "1", "--seeds", "1"]
    line += ["--tracking-uri", f"sqlite:///{folder}/m.db", "--storage", f"sqlite:///{folder}/o.db"]
    return [sys.executable, *line, *more]


def shell(line: str, command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which "$@" is a command."""
    return subprocess.run(
        ["bash", "-c", line, "bash", *command],
        **{"capture_output": True, "text": True, "cwd": ROOT, "check": False},
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
    )


IMPORTED = """
import importlib.abc, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            signal.raise_signal({number})
sys.meta_path.insert(0, Finder())
sys.argv[:] = ["-m", "--help"]
runpy._run_module_as_main("studies.kl_weight")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lazy_loader", "numpy", "tyro", "studies.runner.cli"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_while_modules_are_imported_ends_without_a_traceback(name, number, code):
    code_text = IMPORTED.format(name=name, number=int(number))
    done = shell('"$@"', [sys.executable, "-c", code_text])
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


LINES = {
    # a line of bash -> exit code of the study, text on standard output and on standard error
    "ascii": ('PYTHONIOENCODING=ascii "$@"', 0, "Best: kl_weight =", ""),
    "C": ('LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 "$@"', 0, "Best: kl_weight =", ""),
    "closed": ('"$@" >&-', 0, "", ""),
    "all closed": ('"$@" >&- 2>&- <&-', 0, "", ""),
    "head": ('"$@" | head -1; exit ${PIPESTATUS[0]}', 141, "Which KL", "output was closed"),
    "errors in a closed pipe": ('"$@" --json 2> >(true)', 0, '"exit_code": 0}', ""),
    "errors closed": ('"$@" --json 2>&-', 0, '"exit_code": 0}', ""),
    "warnings are errors": ('PYTHONWARNINGS=error "$@"', 0, "Best: kl_weight =", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize(("line", "code", "out", "err"), LINES.values(), ids=LINES.keys())
def test_output_does_not_decide_over_the_work(line, code, out, err, tmp_path):
    done = shell(line, study(tmp_path))
    assert done.returncode == code, done.stderr
    assert out in done.stdout
    assert err in done.stderr
    assert "Traceback" not in done.stderr
    if code == 0:
        assert list(tmp_path.glob("reports/*/report.html"))


@pytest.mark.slow
def test_a_folder_of_any_name_holds_a_study(tmp_path):
    folder = tmp_path / 'it\'s 50% of #1 {really} "so" é'
    folder.mkdir()
    done = shell('"$@"', study(folder))
    assert done.returncode == 0, done.stderr
    assert {"m.db", "o.db", "mlruns", "reports"} <= {path.name for path in folder.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


# --- namespaces and limits ----------------------------------------------------------------------

needs_root = pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run(["unshare", "-m", "--pid", "--fork", "true"], capture_output=True).returncode,
    reason="no permission to make namespaces",
)


@pytest.mark.slow
@needs_root
def test_a_study_goes_on_in_the_next_container_of_the_name(tmp_path):
    inside = 'exec unshare --pid --fork --kill-child --mount-proc "$@"'
    command = study(tmp_path, "--epochs", "60")
    first = subprocess.Popen(
        ["bash", "-c", inside, "bash", *command],
        **{"cwd": ROOT, "stdout": subprocess.PIPE, "text": True},
        env={**os.environ, "VAE_SWEEP_BEAT": "1"},
    )
    for line in first.stdout:
        if "epoch" in line.partition("%")[2]:
            break
    first.kill()
    first.communicate()
    again = shell(inside, command, VAE_SWEEP_BEAT="1")  # process 1 again
    assert again.returncode == 0, again.stderr
    storage = database.open_storage(f"sqlite:///{tmp_path}/o.db")
    states = Counter(trial.state.name for trial in storage.get_all_trials(1))
    storage.engine.dispose()
    assert states == {"FAIL": 2, "COMPLETE": 2}


@pytest.mark.slow
@needs_root
def test_a_full_shared_memory_is_not_needed(tmp_path):
    full = 'unshare -m bash -c \'mount -t tmpfs -o size=4k none /dev/shm; exec "$@"\' bash "$@"'
    done = shell(full, study(tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("setpriv") or os.geteuid() != 0, reason="needs another user")
@pytest.mark.parametrize("limit", [2, 7])
def test_a_limit_of_processes_is_named(limit, tmp_path):
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents:
        with suppress(PermissionError):
            if folder.owner() == "root" and "pytest" in folder.name:
                folder.chmod(0o755)
    caps = "--inh-caps=-all,+dac_override --ambient-caps=+dac_override"
    line = f"setpriv --reuid 54321 --clear-groups {caps} prlimit --nproc={limit} "
    done = shell(f'{line} "$@"', study(tmp_path), HOME=str(tmp_path), OMP_NUM_THREADS="2")
    assert done.returncode == 2, done
    assert "error: no more processes and threads are allowed (ulimit -u)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_closed_streams_are_opened_on_nothing(tmp_path):
    code = "import os, sys\nfrom studies.runner import terminal\nterminal.reopen()\n"
    code += f"file = open({str(tmp_path / 'x')!r}, 'w')\nprint(3)\nprint(4, file=sys.stderr)\n"
    code += "file.write(str(file.fileno()))"
    assert shell('"$@" >&- 2>&-', [sys.executable, "-c", code]).returncode == 0
    assert int((tmp_path / "x").read_text()) > 2
    assert terminal.CLOSED == 141
