"""Kill a study at random moments, start it again, and count what was lost: nothing should be.

    python -m benchmarks.soak --kills 300

A tiny study is started, killed by a random signal at a random moment, and started again with the
same command until it ends; then its ledger is audited and its results are compared, bit by bit,
with those of a study that was left alone. Then the next study begins. Exit code 1 if anything is
wrong.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from studies.plan import make_plan

import harness
from benchmarks import audit, children, machine
from studies import kl_weight
from studies.runner import cli

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
"""Half of the deaths give no warning."""


@dataclass(frozen=True)
class Soak:
    """What a user can set.

    Attributes:
        kills: how many.
        seed: of signals and moments.
        forked: copy a process that has imported everything instead of starting the command, and
            take few images and draw no figures: more kills a minute, none of them in the imports.
        every: --checkpoint-every of every second study.
    """

    kills: int = 300
    seed: int = 0
    forked: bool = False
    every: int = 1


@dataclass
class Tally:
    """What happened; `longest` is how long the last start took that nobody killed, in seconds."""

    deaths: Counter[str] = field(default_factory=Counter)
    studies: int = 0
    starts: int = 0
    faults: list[str] = field(default_factory=list)
    longest: float = 0.0


def arguments(folder: Path, every: int) -> list[str]:
    """Return the command line of the tiny study in a folder."""
    words = ["--values", "0.02", "1", "--seeds", "2", "--epochs", "4"]
    words += ["--batch-size", "32", "--latent-size", "2"]
    words += ["--checkpoint-every", str(every)]
    words += ["--storage", f"sqlite:///{folder}/optuna.db"]
    return [*words, "--tracking-uri", f"sqlite:///{folder}/mlflow.db"]


def start(folder: Path, every: int, *, forked: bool) -> children.Child:
    """Start the study, or go on with it."""
    words = arguments(folder, every)
    if forked:
        return children.start(lambda: small_main(words), folder)
    command = [sys.executable, "-m", "studies.kl_weight", *words]
    with (folder / "child.out").open("wb") as out:
        started = subprocess.Popen(command, stdout=out, stderr=out, process_group=0)
    started.returncode = 0  # it is waited for here, not by Popen
    return children.Child(started.pid, folder)


def small_main(words: list[str]) -> None:
    """Run the study's command in this process, on few images and without its figures."""
    data = harness.load_dataset("digits")
    cut = {"train": data.train.head(96), "val": data.val.head(40), "test": data.test.head(50)}
    harness.load_dataset = lambda name, root: replace(data, **cut)
    cli.main(replace(kl_weight.STUDY, figures={}), words)


def audited(folder: Path) -> tuple[list[str], dict[Any, Any]]:
    """Return the faults of the study in a folder, and its results; from a child of its own."""

    def both() -> tuple[list[str], dict[Any, Any]]:
        words = arguments(folder, 0)
        plan = make_plan(kl_weight.STUDY, cli.parse("kl_weight", "Why?", float, words))
        places = f"sqlite:///{folder}/mlflow.db", f"sqlite:///{folder}/optuna.db"
        return audit.faults(plan, *places), audit.results(plan, places[0])

    ended = children.start(both, folder).wait()
    return ended.value or ([f"the ledger cannot be read: {ended.said[-300:]}"], {})


def undisturbed(folder: Path, soak: Soak) -> tuple[float, dict[Any, Any]]:
    """Run a study that nobody kills; return its seconds and its results."""
    began = time.monotonic()
    ended = start(folder, 0, forked=soak.forked).wait()
    seconds = time.monotonic() - began
    faults, results = audited(folder)
    if ended.code or faults:
        sys.exit(f"a study that nobody kills fails: {faults} {ended.said[-500:]}")
    return seconds, results


def torment(folder: Path, every: int, soak: Soak, tally: Tally, dice: random.Random) -> None:
    """Kill the study in a folder and start it again until it has ended by itself."""
    while True:
        child = start(folder, every, forked=soak.forked)
        tally.starts += 1
        number = dice.choice(SIGNALS)
        began = time.monotonic()
        moment = began + dice.uniform(0, tally.longest)
        enough = tally.deaths.total() >= soak.kills
        while not child.ended() and (enough or time.monotonic() < moment):
            time.sleep(0.005)
        if child.ended():
            tally.longest = time.monotonic() - began
        else:
            tally.deaths[number.name] += 1
            child.send(number, group=dice.random() < 0.5)
        ended = child.wait()
        if child.left_behind():
            tally.faults.append(f"{number.name} left processes behind")
        if ended.code == ended.signal == 0:
            return
        if (ended.signal, ended.code) not in {(number, 0), (0, 128 + number)}:
            tally.faults.append(f"{number.name}: code {ended.code}: {ended.said[-800:]}")
            if tally.faults[10:]:
                return


def run(soak: Soak, folder: Path, say: Callable[[str], None] = print) -> Tally:
    """Kill studies until there were enough kills."""
    tally, dice = Tally(), random.Random(soak.seed)
    alone = folder / "alone"
    alone.mkdir()
    tally.longest, wanted = undisturbed(alone, soak)
    say(f"A study that nobody kills takes {tally.longest:.1f} s.")
    while tally.deaths.total() < soak.kills and not tally.faults[10:]:
        own = folder / f"study-{tally.studies}"
        own.mkdir()
        torment(own, soak.every * (tally.studies % 2), soak, tally, dice)
        faults, results = audited(own)
        tally.faults += [f"study {tally.studies}: {fault}" for fault in faults]
        if results != wanted:
            tally.faults.append(f"study {tally.studies}: its results are not those of the other")
        tally.studies += 1
        say(f"{tally.deaths.total()} kills, {tally.studies} studies, {len(tally.faults)} faults")
        if not faults:
            shutil.rmtree(own)
    return tally


def main() -> None:
    """Run a soak test from the command line."""
    soak = tyro.cli(Soak, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    if soak.forked:
        children.import_all()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        tally = run(soak, Path(folder))
    minutes = (time.monotonic() - began) / 60
    said = ", ".join(f"{count} {name}" for name, count in sorted(tally.deaths.items()))
    print("\n" + "\n".join(machine.hardware(torch.device("cpu"), "mlflow", "optuna")))
    print(
        f"{tally.deaths.total()} kills ({said}) of {tally.starts} starts in {minutes:.0f} min; "
        f"{tally.studies} studies finished with an exact ledger and the results of one that nobody "
        f"killed, but for {len(tally.faults)} faults"
    )
    print("\n".join(tally.faults))
    sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
