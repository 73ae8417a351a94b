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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    is_gone,
    is_here,
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
        study: the study.
        storage: its database.
        proposer: makes its trials.
        store_complete: returns the keys of the runs that processes which ended left whole on this
            disk.
        me: name of this process.
        lost: numbers of the trials that were reassigned, as of the last heartbeat.
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

    # --- reading ----------------------------------------------------------------------------------

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

    def _others(self) -> dict[int, str]:
        owners = {t.number: t.user_attrs.get(OWNER, "") for t in self.trials("RUNNING")}
        return {number: owner for number, owner in owners.items() if owner != self.me}

    # --- taking -----------------------------------------------------------------------------------

    def take(self, count: int, workers: int = 1) -> list[FrozenTrial]:
        """Take this process's share of the trials that are left, and at most `count`.

        Trials of processes that ended or missed their heartbeats fail first, except for those that
        `adopt` returns: call it before.

        Args:
            count: trials that can be trained together.
            workers: processes that were started together.
        """

        def attempt() -> list[FrozenTrial]:
            self._reassign()
            trials = self.trials()
            sharing = max(workers, len(set(self._others().values())) + 1)
            share = min(count, math.ceil(self.proposer.left(trials) / sharing))
            return self.proposer.propose(self.study, trials, share) if share else []

        return self._hold(attempt)

    def adopt(self) -> list[FrozenTrial]:
        """Take the trials whose runs a process that ended left whole on this disk.

        Their results are in the attribute `result`; the caller delivers the runs and tells them.
        """
        noted = [t for t in self.trials("RUNNING") if RESULT in t.user_attrs]
        return self._hold(self._adoptable) if any(t.number not in self._held for t in noted) else []

    def _hold(self, find: Callable[[], list[FrozenTrial]]) -> list[FrozenTrial]:
        """Sign the found trials, after their first heartbeat: without one they would never fail."""

        def attempt() -> tuple[list[FrozenTrial], dict[int, int]]:
            found = find()
            held = {trial.number: self._id(trial) for trial in found}
            for trial in held.values():
                self.storage.record_heartbeat(trial)
                self.storage.set_trial_user_attr(trial, OWNER, self.me)
            return found, held

        try:
            found, held = self._section(attempt)
        except optuna.exceptions.UpdateFinishedTrialError:
            return []  # this process lost the lock meanwhile, and another took its trials for dead
        self._held |= held
        return found

    def _reassign(self) -> bool:
        """Fail the trials of other processes that ended, in a section; return if there were any."""
        self._beat()  # this process may have been stopped: its trials are kept if they still can be
        adoptable = {trial.number for trial in self._adoptable()}
        found = [t for t in self._abandoned() if t.number not in adoptable]
        for trial in found:
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if self._others():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                optuna.storages.fail_stale_trials(self.study)
        return bool(adoptable or found)

    def _abandoned(self, *, elsewhere: bool = False) -> list[FrozenTrial]:
        """Return the trials that no living process of this machine holds.

        Without owner are trials that were not signed, and those that `give_back` left; this
        process's own that it does not hold are of an attempt that was repeated.
        """

        def is_abandoned(owner: str) -> bool:
            return owner in ("", self.me) or is_gone(owner) or (elsewhere and not is_here(owner))

        running = [t for t in self.trials("RUNNING") if t.number not in self._held]
        return [t for t in running if is_abandoned(t.user_attrs.get(OWNER, ""))]

    def _adoptable(self) -> list[FrozenTrial]:
        noted = [t for t in self._abandoned(elsewhere=True) if RESULT in t.user_attrs]
        complete = self.store_complete() if noted else set()
        return [trial for trial in noted if complete.issuperset(keys(trial))]

    def reassign(self) -> None:
        """Fail the trials of processes that ended, except for those that `adopt` returns."""
        self._section(self._reassign)

    # --- training ---------------------------------------------------------------------------------

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
            if trial.user_attrs.get(OWNER) == self.me and RESULT in trial.user_attrs:
                self.storage.set_trial_user_attr(self._id(trial), OWNER, "")
            elif trial.user_attrs.get(OWNER) == self.me:
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        self._held.clear()

    def judge(self, trials: Sequence[FrozenTrial], record: EpochRecord) -> dict[int, End]:
        """Return which rows of an epoch's record are to be ended, and why.

        Args:
            trials: the trial of each run that is trained, in the order of `train`'s configurations.
            record: the epoch's record.
        """
        rows: dict[int, list[int]] = {}
        for row, run in enumerate(record.rows):
            rows.setdefault(trials[run].number, []).append(row)
        ends: dict[int, End] = {}
        for trial in {trials[run].number: trials[run] for run in record.rows}.values():
            own = rows[trial.number]
            try:
                if trial.number in self.lost:
                    raise LostError
                found = self.proposer.judge(record, own, partial(self._report, trial))
            except LostError:
                found = dict.fromkeys(own, End("KILLED", REASSIGNED))
            if any(end.pruned for end in found.values()):
                self.pruned.add(trial.number)
            ends |= found
        return ends

    def _report(self, trial: FrozenTrial, value: float, epoch: int) -> bool:
        def report() -> bool:
            found = self._id(trial)
            self.storage.set_trial_intermediate_value(found, epoch, value)
            return self.study.pruner.prune(self.study, self.storage.get_trial(found))

        with self._refused(trial):
            return retry(report, self.storage.url)

    # --- telling ----------------------------------------------------------------------------------

    def result(self, trial: FrozenTrial, values: Sequence[float], attrs: Mapping[str, Any]) -> None:
        """Note what will be told of a trial once its runs are delivered, so that it can be adopted.

        Raises:
            LostError: it was reassigned.
        """
        noted = {"values": list(values), "attrs": dict(attrs)}

        def note() -> None:
            self.storage.set_trial_user_attr(self._id(trial), RESULT, noted)

        with self._refused(trial):
            retry(note, self.storage.url)

    def done(self, trial: FrozenTrial, values: Sequence[float], attrs: Mapping[str, Any]) -> None:
        """Complete a trial; like `prune` and `diverged`, this can be repeated.

        Raises:
            LostError: it was reassigned.
        """
        self._tell(trial, "COMPLETE", values, attrs)

    def prune(self, trial: FrozenTrial) -> None:
        """End a trial that was pruned."""
        self._tell(trial, "PRUNED", None, {})

    def diverged(self, trial: FrozenTrial, attrs: Mapping[str, Any]) -> None:
        """Fail a trial for good."""
        self._tell(trial, "FAIL", None, {DIVERGED: True, **attrs})

    def _tell(
        self,
        trial: FrozenTrial,
        state: str,
        values: Sequence[float] | None,
        attrs: Mapping[str, Any],
    ) -> None:
        ended = optuna.trial.TrialState[state]

        def tell() -> None:
            found = self._id(trial)
            now = self.storage.get_trial(found)
            if now.state == ended and attrs.keys() <= now.user_attrs.keys():
                return  # an attempt whose reply was lost
            if now.state.is_finished():
                raise optuna.exceptions.UpdateFinishedTrialError(trial.number)
            for name, value in attrs.items():
                self.storage.set_trial_user_attr(found, name, value)
            self.study.tell(trial.number, values, ended)

        self._held.pop(trial.number, None)
        with self._refused(trial):
            self._section(tell)

    @contextmanager
    def _refused(self, trial: FrozenTrial) -> Iterator[None]:
        try:
            yield
        except optuna.exceptions.UpdateFinishedTrialError as error:
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
                shown = time.monotonic()
                log.info("waiting for %s", _listed(before.values()))
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


def noted(trial: FrozenTrial) -> tuple[list[float], dict[str, Any]]:
    """Return the result that was noted of a trial before it could be told."""
    result = trial.user_attrs[RESULT]
    return result["values"], result["attrs"]


def _listed(owners: Iterable[str]) -> str:
    counted = Counter(owners)
    return "; ".join(f"process {o.rsplit(':', 2)[1]} on {o.partition('/')[0]}" for o in counted)


def check_settings(
    storage: optuna.storages.RDBStorage, name: str, settings: Mapping[str, Any]
) -> bool:
    """Return whether a study exists; nothing is written.

    Raises:
        UserError: it exists with other settings, or is of the first edition, or another program's.
    """
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
    """Create or continue a study.

    Raises:
        UserError: as `check_settings`.
    """

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
