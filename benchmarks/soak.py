"""Kill a study at random moments, start it again, and count what was lost: nothing should be.

    python -m benchmarks.soak --kills 300

A tiny study is started, killed by a random signal at a random moment, and started again with the
same command until it ends; then its ledger is audited and its results are compared, bit by bit,
with those of a study that was left alone. Then the next study begins. Every second one has an
MLflow server that is stopped, or killed and started again, meanwhile, and every fourth is in
PostgreSQL and run by four workers. Exit code 1 if anything is wrong.
"""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import tyro

import harness
from benchmarks import audit, children, machine
from studies import kl_weight
from studies.runner import cli, stopping
from studies.runner.study import make_plan

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))  # servers of MLflow and PostgreSQL

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
"""Half of the deaths give no warning."""

WORKERS = 4
"""Processes that share a study in PostgreSQL."""

CALM, HELD = 30.0, 15.0
"""Seconds, at most, between two disturbances of a server, and for which it is held by one."""


AWAY = "cannot be used (", "the same command"
"""What an end with code 2 contains, at the start and later, where a server is away."""


@dataclass(frozen=True)
class Soak:
    """What a user can set.

    Attributes:
        kills: how many.
        seed: of signals and moments.
        forked: copy a process that has imported everything instead of starting the command, and
            take few images and draw no figures: more kills a minute, none of them in the imports.
        every: --checkpoint-every of every third study.
    """

    kills: int = 300
    seed: int = 0
    forked: bool = False
    every: int = 1


@dataclass
class Tally:
    """What happened.

    Attributes:
        deaths: by signal.
        studies: that ended.
        starts: of commands.
        away: starts that ended with code 2 while their server was disturbed.
        faults: what was lost.
        usual: how long the last start took that nobody killed, in seconds, and 5 % more for each
            kill since, so that kills reach every step when the machine becomes slower.
        longest: how long any such start took.
    """

    deaths: Counter[str] = field(default_factory=Counter)
    studies: int = 0
    starts: int = 0
    away: int = 0
    faults: list[str] = field(default_factory=list)
    usual: float = 0.0
    longest: float = 0.0


@dataclass(frozen=True)
class Case:
    """A study that is killed.

    Attributes:
        name: of the study.
        folder: of its databases, and of what its processes print.
        home: copy of the project that it is run from.
        every: its --checkpoint-every.
        storage: its --storage, "" for a file in the folder.
        server: of MLflow, None for a file in the folder.
        workers: processes that run it.
        forked: as of `Soak`.
    """

    name: str
    folder: Path
    home: Path
    every: int = 0
    storage: str = ""
    server: Any = None
    workers: int = 1
    forked: bool = False

    @property
    def stores(self) -> tuple[str, str]:
        """Its tracking URI and its storage."""
        tracking = self.server.uri if self.server else f"sqlite:///{self.folder}/mlflow.db"
        return tracking, self.storage or f"sqlite:///{self.folder}/optuna.db"

    @property
    def words(self) -> list[str]:
        """Its command line."""
        tracking, storage = self.stores
        words = ["--values", "0.02", "1", "--seeds", "2", "--epochs", "4"]
        words += ["--batch-size", "32", "--latent-size", "2"]
        words += ["--checkpoint-every", str(self.every), "--study-name", self.name]
        return [*words, "--storage", storage, "--tracking-uri", tracking]

    def start(self, number: int = 0) -> children.Child:
        """Start the study, or go on with it, as the worker of a number."""
        folder = self.folder / f"worker-{number}"
        folder.mkdir(exist_ok=True)
        if self.forked:
            return children.start(partial(small_main, self), folder)
        command = [sys.executable, "-m", "studies.kl_weight", *self.words]
        with (folder / "child.out").open("wb") as out:
            started = subprocess.Popen(
                command, stdout=out, stderr=out, process_group=0, cwd=self.home
            )
        started.returncode = 0  # it is waited for here, not by Popen
        return children.Child(started.pid, folder)

    def audited(self) -> tuple[list[str], dict[Any, Any]]:
        """Return the study's faults and results; from a child of its own."""

        def both() -> tuple[list[str], dict[Any, Any]]:
            live_in(self.home)
            options = cli.parse(kl_weight.STUDY, self.words)
            plan = make_plan(kl_weight.STUDY, options)
            faults = audit.faults(plan, *self.stores, [self.home])
            return faults, audit.results(plan, self.stores[0])

        ended = children.start(both, self.folder).wait()
        return ended.value or ([f"the ledger cannot be read: {ended.printed[-300:]}"], {})


def live_in(home: Path) -> None:
    """Keep what this process spools and caches in a copy of the project."""
    for module in ("addresses", "record"):
        vars(sys.modules[f"harness.tracking.{module}"])["project_root"] = lambda: home


def small_main(case: Case) -> None:
    """Run the study's command in this process, on few images and without its figures."""
    live_in(case.home)
    data = harness.load_dataset("digits")
    cut = {"train": data.train.head(96), "val": data.val.head(40), "test": data.test.head(50)}
    harness.load_dataset = lambda name, root: replace(data, **cut)
    cli.main(replace(kl_weight.STUDY, figures={}), case.words)


def undisturbed(case: Case, tally: Tally) -> dict[Any, Any]:
    """Run a study that nobody kills; return its results."""
    began = time.monotonic()
    ended = case.start().wait()
    tally.usual = time.monotonic() - began
    faults, results = case.audited()
    if ended.code or faults:
        sys.exit(f"a study that nobody kills fails: {faults} {ended.printed[-500:]}")
    return results


@dataclass
class Member:
    """A process that runs a study, and its death.

    Attributes:
        child: the process.
        number: of the signal.
        began: when it was started.
        moment: when it gets the signal.
        sent: whether it has got it.
    """

    child: children.Child
    number: signal.Signals
    began: float
    moment: float
    sent: bool = False


def torment(case: Case, soak: Soak, tally: Tally, dice: random.Random) -> None:
    """Kill a study's processes and start them again until all have ended by themselves."""

    def begin(worker: int) -> Member:
        tally.starts += 1
        now = time.monotonic()
        moment = now + dice.uniform(0, tally.usual * case.workers)
        return Member(case.start(worker), dice.choice(SIGNALS), now, moment)

    team = {worker: begin(worker) for worker in range(case.workers)}
    disturbance, held = time.monotonic() + dice.uniform(0, CALM), False
    try:
        while team and not tally.faults[10:]:
            time.sleep(0.005)
            now = time.monotonic()
            if case.server and now > disturbance:
                if held:
                    case.server.send(signal.SIGCONT)
                    held = False
                elif held := dice.random() < 0.5:
                    case.server.send(signal.SIGSTOP)
                else:
                    case.server.kill()
                    case.server.start()  # seconds, in which it is away
                disturbance = time.monotonic() + dice.uniform(0, HELD if held else CALM)
            for worker, member in [*team.items()]:
                if member.child.ended():
                    if judged(case, member, tally):
                        team[worker] = begin(worker)
                    else:
                        del team[worker]
                elif not member.sent and now > member.moment and tally.deaths.total() < soak.kills:
                    tally.deaths[member.number.name] += 1
                    tally.usual *= 1.05
                    member.child.send(member.number, group=dice.random() < 0.5)
                    member.sent = True
    finally:
        if held:
            case.server.send(signal.SIGCONT)
        for member in team.values():  # of a soak that is given up
            with contextlib.suppress(ProcessLookupError):
                member.child.send(signal.SIGKILL, group=True)


def judged(case: Case, member: Member, tally: Tally) -> bool:
    """Note how a process ended; return whether it is to be started again."""
    number, seconds = member.number, time.monotonic() - member.began
    ended = member.child.wait()
    if member.child.left_behind():
        tally.faults.append(f"{number.name} left processes behind")
    if re.search(r"^(?!Next: ).*(--fresh|broken)", ended.printed, re.MULTILINE):
        tally.faults.append(f"it advises what time mends: {ended.printed[-800:]}")
    if ended.code == ended.signal == 0:
        if not member.sent:
            tally.usual, tally.longest = seconds, max(tally.longest, seconds)
        return False
    if case.server and ended.code == 2 and any(words in ended.printed for words in AWAY):
        tally.away += 1
    elif not member.sent or (ended.signal, ended.code) not in {
        (number, 0),
        (0, stopping.CODES.get(number)),
    }:
        tally.faults.append(f"{number.name}: code {ended.code}: {ended.printed[-800:]}")
    return True


@contextlib.contextmanager
def servers(soak: Soak, folder: Path) -> Iterator[Callable[[int, Path, Path], Case]]:
    """Yield what makes the case of a number in a folder; a server starts with its first case."""
    with contextlib.ExitStack() as stack:
        mlflow = cache(lambda: stack.enter_context(_mlflow(folder)))
        postgres = cache(lambda: stack.enter_context(_postgres()))

        def case(number: int, folder: Path, home: Path) -> Case:
            every = soak.every * (number % 3 == 1)
            found = Case(f"soak-{number}", folder, home, every, forked=soak.forked)
            if number % 2:
                found = replace(found, server=mlflow())
            if number % 4 == 3 and postgres():
                storage = postgres().create(f"soak_{number}")
                found = replace(found, storage=storage, workers=WORKERS)
            return found

        yield case


@contextlib.contextmanager
def _postgres() -> Iterator[Any]:
    import real_postgres

    if why := real_postgres.lacking():
        print(f"Without PostgreSQL: {why}.")
        yield None
    else:
        with real_postgres.running() as server:
            yield server


@contextlib.contextmanager
def _mlflow(folder: Path) -> Iterator[Any]:
    from real_servers import MlflowServer

    (folder / "empty").mkdir()
    (folder / "server").mkdir()
    empty = folder / "empty" / "mlflow.db"

    def make() -> None:
        harness.tracking.connect(f"sqlite:///{empty}")

    assert children.start(make, folder).wait().code == 0
    server = MlflowServer(folder / "server", empty)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def run(soak: Soak, folder: Path, show: Callable[[str], None] = print) -> Tally:
    """Kill studies until there were enough kills."""
    tally, dice = Tally(), random.Random(soak.seed)
    home = children.copy_project(folder / "project")
    with servers(soak, folder) as case:
        (folder / "alone").mkdir()
        wanted = undisturbed(replace(case(0, folder / "alone", home), every=0), tally)
        show(f"A study that nobody kills takes {tally.usual:.1f} s.")
        while tally.deaths.total() < soak.kills and not tally.faults[10:]:
            own = folder / f"study-{tally.studies}"
            own.mkdir()
            one = case(tally.studies, own, home)
            before = len(tally.faults)
            torment(one, soak, tally, dice)
            faults, results = one.audited()
            tally.faults += [f"study {tally.studies}: {fault}" for fault in faults]
            if results != wanted:
                tally.faults.append(f"study {tally.studies}: its results are not the other's")
            tally.studies += 1
            for fault in tally.faults[before:]:
                show(fault)
            show(
                f"{tally.deaths.total()} kills, {tally.studies} studies, {tally.away} ends while a "
                f"server was away, {len(tally.faults)} faults"
            )
            if not faults:
                shutil.rmtree(own)
    return tally


def main() -> None:
    """Run a soak test from the command line."""
    soak = tyro.cli(Soak, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    children.import_all()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        tally = run(soak, Path(folder), partial(print, flush=True))
    minutes = (time.monotonic() - began) / 60
    signals = ", ".join(f"{count} {name}" for name, count in sorted(tally.deaths.items()))
    print("\n" + "\n".join(machine.hardware(torch.device("cpu"), "mlflow", "optuna")))
    print(
        f"{tally.deaths.total()} kills ({signals}) of {tally.starts} starts in {minutes:.0f} min, "
        f"the longest start {tally.longest:.0f} s; {tally.away} starts ended with code 2 while "
        f"their server was away; {tally.studies} studies finished with an exact ledger and the "
        f"results of one that nobody killed, but for {len(tally.faults)} faults"
    )
    sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
