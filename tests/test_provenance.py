"""What a run is made with: the checkout as git sees it, and nothing that is private."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import threadpoolctl
import torch

from harness import provenance
from harness.provenance import Code, read_code
from harness.tracking import record as recording
from studies.replay import differences

ROOT = Path(__file__).resolve().parents[1]


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    command = ["git", *who, *words]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """Return a repository with one commit of two small packages."""
    for package in ("harness", "studies"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text('"""Empty."""\n')
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_a_clean_checkout_is_its_commit(checkout):
    code = read_code(checkout)
    assert code == Code(
        git(checkout, "rev-parse", "HEAD"), dirty=False, untracked=(), sources=code.sources, diff=""
    )


def test_a_changed_file_makes_it_dirty_and_the_diff_restores_it(checkout):
    clean = read_code(checkout)
    changed = checkout / "harness" / "__init__.py"
    changed.write_text('"""Changed."""\n')
    code = read_code(checkout)
    assert (code.commit, code.dirty, code.untracked) == (clean.commit, True, ())
    assert code.sources != clean.sources
    patch = checkout / "diff.patch"
    patch.write_text(code.diff)
    git(checkout, "checkout", "--quiet", "--", ".")
    git(checkout, "apply", "diff.patch")
    assert changed.read_text() == '"""Changed."""\n'


def test_a_staged_change_is_one_too(checkout):
    (checkout / "harness" / "new.py").write_text("x = 1\n")
    git(checkout, "add", ".")
    code = read_code(checkout)
    assert code.dirty
    assert "+x = 1" in code.diff


def test_untracked_sources_are_named_and_ignored_ones_are_not(checkout):
    for name in ("new.py", "ignored.py", "notes.txt"):
        (checkout / "studies" / name).write_text("x = 1\n")
    code = read_code(checkout)
    assert (code.dirty, code.untracked, code.diff) == (True, ("studies/new.py",), "")


def test_files_of_other_kinds_do_not_change_the_digest_of_the_sources(checkout):
    before = read_code(checkout).sources
    (checkout / "README.md").write_text("Hello\n")
    assert read_code(checkout).sources == before


def unknown(code: Code) -> bool:
    return (code.commit, code.dirty, code.untracked, code.diff) == ("unknown", None, (), "")


def test_without_git_the_commit_is_unknown_and_the_sources_are_not(checkout, monkeypatch):
    sources = read_code(checkout).sources
    monkeypatch.setenv("PATH", str(checkout))
    code = read_code(checkout)
    assert unknown(code)
    assert code.sources == sources


def test_a_folder_without_a_repository_has_no_commit(tmp_path):
    assert unknown(read_code(tmp_path))


def test_a_repository_without_a_commit_has_none_either(tmp_path):
    git(tmp_path, "init", "--quiet")
    assert unknown(read_code(tmp_path))


def test_packages_installed_inside_another_project_are_not_its_commit(checkout):
    site = checkout / ".venv" / "site-packages"
    (site / "harness").mkdir(parents=True)
    (site / "harness" / "__init__.py").write_text("")
    assert unknown(read_code(site))


def test_the_code_of_this_process_is_read_once():
    assert provenance.code() is provenance.code()
    assert provenance.code().sources == read_code(ROOT).sources


def test_the_record_is_json_without_paths_and_recognises_the_dataset(tiny):
    made = provenance.provenance(tiny, "cpu")
    text = json.dumps(made)
    assert json.loads(text) == made
    for private in (str(ROOT), str(Path.home()) + "/"):
        assert private not in text
    assert made["dataset"]["digest"] == tiny.digest
    assert made["dataset"]["images"] == {"train": 96, "val": 40, "test": 50}
    assert torch.__version__.startswith(made["versions"]["torch"].split("+")[0])
    assert made["device"]["kind"] == "cpu"


def test_the_tags_are_short(tiny):
    made = provenance.provenance(tiny, "cpu")
    tags = recording.tags_of(made)
    assert tags["git_commit"] == made["code"]["commit"]
    assert tags["git_dirty"] in ("true", "false", "unknown")
    assert tags["sources"] == made["code"]["sources"][:12]
    assert max(map(len, tags.values())) < 250
    assert tags.get("mlflow.source.git.commit", "unknown") == tags["git_commit"]


def test_an_unknown_commit_is_not_shown_as_one(tiny):
    made = provenance.provenance(tiny, "cpu")
    made["code"] = Code("unknown", None, (), "0" * 64, "").record()
    tags = recording.tags_of(made)
    assert (tags["git_commit"], tags["git_dirty"]) == ("unknown", "unknown")
    assert "mlflow.source.git.commit" not in tags


CODE = Code("a" * 40, dirty=False, untracked=(), sources="1" * 64, diff="")
CHANGES = {
    "a commit": ({"commit": "b" * 40}, "code commit: aaaa"),
    "a changed tree": ({"dirty": True}, "code dirty: False then, True now"),
    "untracked files": ({"untracked": ("x.py",)}, "code untracked: [] then, ['x.py'] now"),
    "sources": ({"sources": "2" * 64}, "code sources: 1111"),
}


@pytest.mark.parametrize(("changes", "expected"), CHANGES.values(), ids=CHANGES.keys())
def test_differences_of_code_are_named(tiny, changes, expected):
    then = provenance.provenance(tiny, "cpu") | {"code": CODE.record()}
    now = then | {"code": replace(CODE, **changes).record()}
    assert differences(then, then) == []
    assert any(line.startswith(expected) for line in differences(then, now))


def test_differences_of_versions_device_and_data_are_named(tiny, data):
    then = json.loads(json.dumps(provenance.provenance(tiny, "cpu")))
    now = json.loads(json.dumps(provenance.provenance(data, "cpu")))
    then["versions"]["torch"], then["device"]["name"] = "1.0", "Z80"
    found = differences(then, now)
    assert f"versions torch: 1.0 then, {now['versions']['torch']} now" in found
    assert f"device name: Z80 then, {now['device']['name']} now" in found
    assert any(line.startswith("dataset images:") for line in found)


def test_threads_of_linear_algebra_are_used_as_recorded_and_given_back():
    before = provenance.threads()
    other = 1 + before["blas"] % 2
    with threadpoolctl.threadpool_limits(other, user_api="blas"):
        assert provenance.threads() == before | {"blas": other}
    assert provenance.threads() == before


@pytest.mark.gpu
def test_a_gpu_is_recorded_by_name_beside_the_cpu():
    device = provenance.device("cuda")
    assert device["name"] == torch.cuda.get_device_name()
    assert device["cpu"] == provenance.device("cpu")["name"]
