"""The parts of `benchmarks.gpu` run on a CPU, and a part that fails leaves the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_parts

CORE = "config data.load linear.vae metrics.evaluate metrics.quality objective training.engine"
"""Modules of harness that import the others of its core."""

LACKING = "mlflow optuna pandas seaborn matplotlib torchvision sqlalchemy cloudpickle requests rich"
"""Libraries that a GPU machine may lack, with the two below."""


def test_the_core_and_this_benchmark_are_imported_without_the_other_libraries():
    lacking = [*LACKING.split(), "lazy_loader", "tyro"]
    modules = ["benchmarks.gpu", "benchmarks.gpu_parts", *(f"harness.{m}" for m in CORE.split())]
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({lacking}))  # None raises ModuleNotFoundError
for module in {modules}:
    importlib.import_module(module)
from harness import RunConfig, train
import harness
assert dir(harness) == harness.__all__
assert "train" in harness.__all__ and "load_run" in harness.__all__
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=gpu.ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def args(tmp_path):
    return gpu.parse(["--short", "--device", "cpu", "--out", str(tmp_path), "--data-dir", "none"])


def written(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "gpu.json").read_text())


def test_a_stack_is_measured_on_a_cpu_and_written(args, tmp_path, capsys):
    gpu_parts.main(["stack", "--short", "--device", "cpu", "--data-dir", "none", "--runs", "2"])
    part = gpu.Part("stack", [], 1, gpu.phases(capsys.readouterr().out))
    gpu.write(gpu.header("cpu"), [part], tmp_path)
    found = written(tmp_path)
    assert {"device", "driver", "torch", "python", "date", "commit"} <= found["header"].keys()
    stack = found["parts"]["stack"]["phases"]
    names = ["start", "throughput", "memory", "step", "profile", "tf32", "float32"]
    assert list(stack) == names
    assert not [values["error"] for values in stack.values() if "error" in values]
    rates = stack["throughput"]["images_per_second"]
    assert len(rates) == 3
    assert min(rates) > 0
    assert stack["profile"]["top"][0]["microseconds"] > 0
    assert "A step of a stack" in (tmp_path / "gpu.md").read_text()


def test_a_part_without_end_keeps_what_it_has_printed_and_one_that_fails_says_why(args, tmp_path):
    line = '{"phase": "step", "seconds": [1e-4]}'
    endless = gpu.Part("endless", ["sh", "-c", f"echo '{line}'; exec sleep 100"], 1)
    failure = '{"phase": "step", "error": "no"}'
    broken = gpu.Part("broken", ["sh", "-c", f"echo '{failure}'; exit 3"], 9)
    late = gpu.Part("late", [], -1)
    for part in (endless, broken, late):
        gpu.run(part, args)
    gpu.write({}, [endless, broken, late], tmp_path)
    parts = written(tmp_path)["parts"]
    assert parts["endless"]["phases"] == {"step": {"seconds": [1e-4]}}
    assert parts["endless"]["error"].startswith("stopped after")
    assert parts["broken"]["error"] == "exit code 3"
    assert parts["late"]["error"] == "no time was left"
    assert "- broken, step: no" in (tmp_path / "gpu.md").read_text()


def test_outcomes_of_tests_are_counted_and_modules_that_lack_a_library_are_named():
    text = """
tests/a.py::one PASSED                [ 25%]
tests/a.py::two FAILED                [ 50%]
tests/a.py::three SKIPPED (no CUDA)   [ 75%]
____ ERROR collecting tests/b.py ____
FAILED tests/a.py::two - assert False
ERROR tests/b.py
"""
    found = gpu.counted(text)
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1, "not imported": 1}
    assert found["names"] == {
        "not imported": ["tests/b.py"],
        "failed": ["tests/a.py::two - assert False"],
    }


@pytest.mark.slow
def test_the_command_runs_every_part(tmp_path):
    gpu.main(["--short", "--device", "cpu", "--out", str(tmp_path), "--data-dir", "none"])
    parts = written(tmp_path)["parts"]
    stacks = [part for name, part in parts.items() if name.startswith("stack")]
    assert len(stacks) == len(gpu.SHORT_STACKS)
    assert not [part["error"] for part in stacks if part["error"]]
    loop = parts["plain loop in memory, one run"]["phases"]["throughput"]
    assert len(loop["images_per_second"]) == 3
    assert "tests" in parts
