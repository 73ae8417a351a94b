"""The trials of a study, shared by the processes that run it.

A trial has one process as long as it is RUNNING. A process that ends or misses its heartbeats loses
its trials: they fail, their work is proposed again under new numbers, and a late result is refused.
What reads and then writes happens in the study's lock and can be repeated, so a database that goes
away costs time and nothing else.
"""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import lazy_loader

from harness.config import RunConfig, UserError
from harness.tracking import End
from studies.runner import stopping
from studies.runner.database import (
    exclusive,
    heartbeat_seconds,
    in_words,
    is_gone,
    process_name,
    pulse,
    retry,
)
from studies.runner.proposers import DIVERGED, Proposer, keys

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from harness.training.engine import EpochRecord
else:
    optuna = lazy_loader.load("optuna")

Result = TypeVar("Result")

log = logging.getLogger(__name__)

OWNER, RESULT = "process", "result"
"""User attributes of a trial: the process that runs it ("": none), and what is to be told of it."""

FORMAT = 2
"""Edition of studies: trials with keys, in a grid one a run."""

LONGEST_WAIT = 15.0
"""Seconds, at most, between two looks of a process that waits, and at least between messages."""

DEFAULTS = json.loads(RunConfig().to_json())
"""Settings of a study that was begun before the harness had them."""

REASSIGNED = "trial reassigned: its process missed its heartbeats"


class LostError(Exception):
    """The trial was reassigned; its result is discarded."""


@dataclass
class Queue:
    """The trials of a study.

    Attributes:
        store_complete: returns the keys of whole runs that ended processes left on this disk.
        me: name of this process.
        lost: numbers of the trials that were reassigned, as far as is known.
        pruned: numbers of the trials that `judge` pruned.
    """

    study: optuna.Study = field(repr=False)
    storage: optuna.storages.RDBStorage = field(repr=False)
    proposer: Proposer = field(repr=False)
    store_complete: Callable[[], set[str]] = field(repr=False)
    me: str = field(default_factory=process_name)
    lost: set[int] = field(default_factory=set)
    pruned: set[int] = field(default_factory=set)
    _held: dict[int, int] = field(default_factory=dict, repr=False)  # number -> id in the storage

    def trials(self, *states: str) -> list[FrozenTrial]:
        """Return the trials in the named states, of none the trials in any."""
        wanted = tuple(optuna.trial.TrialState[state] for state in states) or None
        return retry(lambda: self.study.get_trials(deepcopy=False, states=wanted), self.storage.url)

    def left(self) -> int:
        """Return how many trials have no result yet, those that are running among them."""
        trials = self.trials()
        return self.proposer.left(trials) + sum(t.state.name == "RUNNING" for t in trials)

    def failed_keys(self) -> list[str]:
        """Return the keys of the runs of failed trials, without those that diverged."""
        failed = [t for t in self.trials("FAIL") if DIVERGED not in t.user_attrs]
        return [key for trial in failed for key in keys(trial)]

    def take(self, count: int, workers: int = 1) -> list[FrozenTrial]:
        """Take this process's share of the trials that are left, and at most `count`.

        Trials of processes that ended or missed their heartbeats fail first, except for those that
        `adopt` returns: call it before. `workers` processes were started together.
        """

        def find() -> list[FrozenTrial]:
            self._reassign()
            sharing = max(workers, len(set(self._others().values())) + 1)
            trials = self.trials()
            share = min(count, math.ceil(self.proposer.left(trials) / sharing))
            return self.proposer.propose(self.study, trials, share) if share else []

        return self._sign(find)

    def adopt(self) -> list[FrozenTrial]:
        """Take the trials whose runs an ended process of this machine left whole on this disk.

        The caller delivers the runs, then tells what was `noted`.
        """
        found = [t for t in self.trials("RUNNING") if RESULT in t.user_attrs]
        return self._sign(self._adoptable) if {t.number for t in found} - self._held.keys() else []

    def _sign(self, find: Callable[[], list[FrozenTrial]]) -> list[FrozenTrial]:
        """Sign the found trials, after their first heartbeat: without one they would never fail."""

        def sign() -> tuple[list[FrozenTrial], dict[int, int]]:
            found = find()
            held = {trial.number: self._id(trial) for trial in found}
            for trial in held.values():
                self.storage.record_heartbeat(trial)
                self.storage.set_trial_user_attr(trial, OWNER, self.me)
            return found, held

        try:
            found, held = self._section(sign)
        except optuna.exceptions.UpdateFinishedTrialError:
            return []  # this process lost the lock, and another reassigned the trials meanwhile
        self._held |= held
        return found

    def reassign(self) -> None:
        """Fail the trials of processes that ended, except for those that `adopt` returns."""
        self._section(self._reassign)

    def _reassign(self) -> bool:
        self._beat()  # if this process was stopped, its trials are kept unless others have them
        adoptable = {trial.number: self._id(trial) for trial in self._adoptable()}
        for trial_id in adoptable.values():
            self.storage.record_heartbeat(trial_id)
        failing = [t for t in self._abandoned() if t.number not in adoptable]
        for trial in failing:
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if self._others():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                optuna.storages.fail_stale_trials(self.study)
        return bool(adoptable or failing)

    def _adoptable(self) -> list[FrozenTrial]:
        found = [trial for trial in self._abandoned() if RESULT in trial.user_attrs]
        complete = self.store_complete() if found else set()
        return [trial for trial in found if complete.issuperset(keys(trial))]

    def _abandoned(self) -> list[FrozenTrial]:
        """Return the running trials of ended processes, of none, and of a repeated `_sign`."""
        running = [t for t in self.trials("RUNNING") if t.number not in self._held]
        return [t for t in running if _owner(t) in ("", self.me) or is_gone(_owner(t))]

    def _others(self) -> dict[int, str]:
        return {t.number: _owner(t) for t in self.trials("RUNNING") if _owner(t) != self.me}

    @contextmanager
    def working(self) -> Iterator[None]:
        """Keep the trials of this process alive; in the end, give back those that are not told."""
        try:
            with pulse(self._beat, heartbeat_seconds()):
                yield
        except BaseException:
            with suppress(Exception):  # the interruption is what counts
                self.give_back()
            raise
        self._section(self.give_back)

    def _beat(self) -> None:
        for number, trial in list(self._held.items()):
            self.storage.record_heartbeat(trial)
            if self.storage.get_trial(trial).state.is_finished() and number in self._held:
                self.lost.add(number)

    def give_back(self) -> None:
        """Fail the trials of this process; those with a result are left for `adopt`."""
        for trial in self.trials("RUNNING"):
            if _owner(trial) == self.me and RESULT in trial.user_attrs:
                self.storage.set_trial_user_attr(self._id(trial), OWNER, "")
            elif _owner(trial) == self.me:
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        self._held.clear()

    def judge(self, trials: Sequence[FrozenTrial], record: EpochRecord) -> dict[int, End]:
        """Return which rows of an epoch's record are to be ended, and why.

        `trials` are those of the runs that are trained, in the order of `train`'s configurations.
        """
        ends: dict[int, End] = {}
        for number, trial in {trials[run].number: trials[run] for run in record.rows}.items():
            rows = [row for row, run in enumerate(record.rows) if trials[run].number == number]
            if number in self.lost:
                ends |= dict.fromkeys(rows, End("KILLED", REASSIGNED))
                continue
            found = self.proposer.judge(record, rows, partial(self._report, trial))
            if any(end.pruned for end in found.values()):
                self.pruned.add(number)
            ends |= found
        return ends

    def _report(self, trial: FrozenTrial, value: float, epoch: int) -> bool:
        def report() -> bool:
            found = self._id(trial)
            self.storage.set_trial_intermediate_value(found, epoch, value)
            return self.study.pruner.prune(self.study, self.storage.get_trial(found))

        try:
            return retry(report, self.storage.url)
        except optuna.exceptions.UpdateFinishedTrialError:
            self.lost.add(trial.number)
            return False

    def result(self, trial: FrozenTrial, values: Sequence[float], attrs: Mapping[str, Any]) -> None:
        """Note what will be told of a trial once its runs are delivered, so that it can be adopted.

        Raises:
            LostError: it was reassigned; `done`, `prune` and `diverged` raise it too.
        """
        noted = {"values": list(values), "attrs": dict(attrs)}
        self._write(trial, lambda found: self.storage.set_trial_user_attr(found, RESULT, noted))

    def done(self, trial: FrozenTrial, values: Sequence[float], attrs: Mapping[str, Any]) -> None:
        """Complete a trial; like `prune` and `diverged`, this can be repeated."""
        self._tell(trial, "COMPLETE", values, attrs)

    def prune(self, trial: FrozenTrial) -> None:
        """End a trial that was pruned."""
        self._tell(trial, "PRUNED", None, {})

    def diverged(self, trial: FrozenTrial, attrs: Mapping[str, Any]) -> None:
        """Fail a trial for good."""
        self._tell(trial, "FAIL", None, {DIVERGED: True, **attrs})

    def _tell(
        self, trial: FrozenTrial, name: str, values: Sequence[float] | None, attrs: Mapping
    ) -> None:
        state = optuna.trial.TrialState[name]

        def tell(found: int) -> None:
            now = self.storage.get_trial(found)
            if now.state == state and attrs.keys() <= now.user_attrs.keys():
                return  # an attempt whose reply was lost
            for name, value in attrs.items():
                self.storage.set_trial_user_attr(found, name, value)
            self.storage.check_trial_is_updatable(found, now.state)
            self.study.tell(trial.number, values, state)

        self._write(trial, tell)
        self._held.pop(trial.number, None)

    def _write(self, trial: FrozenTrial, write: Callable[[int], None]) -> None:
        try:
            self._section(lambda: write(self._id(trial)))
        except optuna.exceptions.UpdateFinishedTrialError as error:
            self._held.pop(trial.number, None)
            raise LostError(
                f"trial {trial.number} was reassigned, for this process missed its heartbeats; its "
                "result is discarded"
            ) from error

    def wait(self) -> None:
        """Wait until a trial of another process ends, or something can be taken or adopted."""
        before, pause, shown = self._others(), 0.5, -math.inf
        while before and self._others() == before:
            if self._section(self._reassign):
                return
            if time.monotonic() - shown >= LONGEST_WAIT:
                shown, owners = time.monotonic(), dict.fromkeys(before.values())
                log.info("waiting for %s", "; ".join(map(in_words, owners)))
            stopping.check()
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_WAIT)

    def _section(self, work: Callable[[], Result]) -> Result:
        """Call an idempotent function alone among all processes of the study."""

        def alone() -> Result:
            with exclusive(self.storage.url, self.study.study_name):
                return work()

        return retry(alone, self.storage.url)

    def _id(self, trial: FrozenTrial) -> int:
        if trial.number in self._held:
            return self._held[trial.number]
        study = self.storage.get_study_id_from_name(self.study.study_name)
        return self.storage.get_trial_id_from_study_id_trial_number(study, trial.number)


def _owner(trial: FrozenTrial) -> str:
    return trial.user_attrs.get(OWNER, "")


def noted(trial: FrozenTrial) -> tuple[list[float], dict[str, Any]]:
    """Return the result that was noted of a trial before it could be told."""
    result = trial.user_attrs[RESULT]
    return result["values"], result["attrs"]


def check_settings(
    storage: optuna.storages.RDBStorage, name: str, settings: Mapping[str, Any]
) -> bool:
    """Return whether a study exists; UserError if with other settings. Nothing is written."""
    if name not in optuna.get_all_study_names(storage):
        return False
    study = optuna.load_study(study_name=name, storage=storage)
    there = study.user_attrs.get("settings")
    if there is None and not study.get_trials(deepcopy=False):
        return False
    if there is None or there.get("format") != FORMAT:
        by = "another program" if there is None else "the first edition of this harness"
        raise UserError(
            f"study {name!r} in --storage was made by {by} and cannot be continued; start another "
            "with --study-name"
        )
    here = {**settings, "format": FORMAT}
    there = {key: value for key, value in DEFAULTS.items() if key in here} | there
    if there != here:
        changed = sorted(key for key in there | here if there.get(key) != here.get(key))
        listed = "; ".join(f"{k}: {there.get(k)} there, {here.get(k)} here" for k in changed)
        raise UserError(
            f"study {name!r} exists with other settings ({listed}); repeat its settings to "
            "continue it, or start another with --fresh or --study-name"
        )
    return True


def open_queue(
    storage: optuna.storages.RDBStorage,
    name: str,
    proposer: Proposer,
    store_complete: Callable[[], set[str]],
) -> Queue:
    """Create or continue a study."""

    def open_study() -> optuna.Study:
        with exclusive(storage.url, name):
            if check_settings(storage, name, proposer.settings):
                return optuna.load_study(study_name=name, storage=storage)
            study = optuna.create_study(
                storage=storage,
                study_name=name,
                directions=list(proposer.directions),
                load_if_exists=True,
            )
            study.set_user_attr("settings", {**proposer.settings, "format": FORMAT})
            return study

    return Queue(retry(open_study, storage.url), storage, proposer, store_complete)
