"""Where the seconds of a study go: CPU seconds by kind of work, and wall time of its process.

`python -m benchmarks.study_time [--repeats N] [WORDS ...]` runs a study, by default
`python -m studies.kl_weight` on digits, in new databases in a temporary folder, with a sampler
(`sampler.py`) in all its processes. "waits" is the wall time that the study's own process spends on
a kind of work, or waiting for workers that do it. Of a worker the last second is not counted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks import machine
from harness.errors import UserError
from harness.training.engine import resolve_device

KINDS = (
    ("imports", r"^<frozen importlib"),
    ("MLflow: params, tags, metrics", r"/mlflow/.*:(log_batch|set_tag)$"),
    ("MLflow: files", r"/mlflow/.*:log_(text|artifacts?)$"),
    ("MLflow: start, input, end", r"/mlflow/.*:(create_run|set_terminated|log_inputs)$"),
    ("MLflow: the rest", r"/mlflow/|harness/tracking/(store|schema)"),
    ("queue", r"/optuna/|studies/runner/(queue|database)"),
    ("training", r"harness/training/"),
    ("likelihood", r"harness/metrics/likelihood"),
    ("Fréchet distances", r"harness/metrics/frechet"),
    ("pictures", r"harness/metrics/pictures|tracking/runs.py:picture"),
    ("other final metrics", r"harness/(metrics|linear)/"),
    ("figures", r"/matplotlib/|/seaborn/|analysis/plots"),
    ("summary, report", r"studies/runner/summary|analysis/"),
    ("workers: pickles, waiting", r"harness/(processes|forkserver)"),
)
"""Kind of work -> functions, "FILE:NAME", in whose calls it is done; the first that matches."""

STUDY = ("-m", "studies.kl_weight")
PARTS = ("CPU s", "CPU s of workers", "waits, s")

Seconds = dict[str, list[float]]
"""Kind of work -> CPU seconds of the study's process, of all others, wall seconds of the former."""

Times = dict[str, float]
"""Event -> seconds since the command's start."""


@machine.clear_errors()
def main() -> None:
    """Run the studies and print."""
    parser = machine.parser("study_time", __doc__, device=False)
    parser.add_argument("--repeats", type=int, default=3, help="default: 3")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    args, words = parser.parse_known_args()
    runs = []
    for turn in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(measured(Path(folder), words or STUDY, args.data_dir))
        print(f"{turn + 1}/{args.repeats}: {runs[-1][1]['whole command']:.1f} s", file=sys.stderr)
    print("\n".join(machine.hardware(resolve_device("cpu"), "mlflow", "optuna")))
    print(f"python {' '.join(words or STUDY)}, n = {args.repeats}: median (range).\n")
    print(table([found for found, _ in runs]))
    print()
    for name in runs[0][1]:
        middle, limits = machine.spread([times[name] for _, times in runs], 1)
        print(f"{name}: {middle} s ({limits})")
    if args.json:
        args.json.write_text(json.dumps(runs, indent=1))


def measured(home: Path, words: Sequence[str], data_dir: Path) -> tuple[Seconds, Times]:
    """Run a study once; return its seconds by kind of work, and those until some events."""
    (home / "samples").mkdir()
    shutil.copy(Path(__file__).with_name("sampler.py"), home / "sitecustomize.py")
    path = [str(home), *filter(None, [os.environ.get("PYTHONPATH"), os.getcwd()])]
    added = {"PYTHONPATH": os.pathsep.join(path), "SAMPLES": str(home / "samples")}
    stores = ["--tracking-uri", f"sqlite:///{home}/mlflow.db", "--storage"]
    stores += [f"sqlite:///{home}/optuna.db", "--data-dir", str(data_dir)]
    began = time.time()
    study = subprocess.Popen(
        [sys.executable, *words, *stores],
        env={**os.environ, **added, "KINDS": json.dumps(KINDS), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    times: Times = {}
    assert study.stdout is not None
    for line in study.stdout:
        if re.match(r" *\d+ %", line):
            times.setdefault("first row of results", time.time() - began)
    if study.wait():
        raise UserError(f"the study ended with code {study.returncode}")
    times["whole command"] = time.time() - began
    found: Seconds = {}
    first = []
    for file in (home / "samples").glob("*.json"):
        is_main = int(file.stem) == study.pid
        for kind, (cpu, wall, seen) in json.loads(file.read_text()).items():
            sums = found.setdefault(kind, [0.0, 0.0, 0.0])
            sums[0 if is_main else 1] += cpu
            sums[2] += wall * is_main
            first += [seen - began] * (kind == "training" and not is_main)
    times["first training step"] = min(first, default=0.0)
    return found, times


def table(runs: list[Seconds]) -> str:
    """Return a Markdown table of the medians, the largest first."""
    kinds = {kind for found in runs for kind in found}
    middle = {k: [median(f.get(k, [0.0] * 3)[i] for f in runs) for i in range(3)] for k in kinds}
    middle["all"] = [sum(values[i] for values in middle.values()) for i in range(3)]
    order = sorted(middle, key=lambda kind: (kind == "all", -middle[kind][0] - middle[kind][1]))
    rows = [[kind, *(f"{value:.1f}" for value in middle[kind])] for kind in order]
    return machine.table(["work", *PARTS], rows)


if __name__ == "__main__":
    main()
