"""The trials of a study, shared by the processes that run it.

A trial belongs to one process as long as it is RUNNING. A process that ends or misses its
heartbeats loses its trials: they fail, their work is proposed again under new numbers, and a late
result is refused. Functions that read and then write hold the study's lock and can be repeated, so
that a database that goes away costs only time.
"""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, TypeVar

import optuna

from harness.config import RunConfig, UserError
from harness.errors import reading
from harness.tracking import End, addresses
from studies.runner import database, stopping
from studies.runner.proposers import CELL, DIVERGED, KEYS, Proposer, Value, keys

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from harness.training.engine import EpochRecord

Result = TypeVar("Result")

log = logging.getLogger(__name__)

# User attributes of a trial: the process that runs it ("": none), and its `Value` once trained.
OWNER, RESULT = "process", "result"
KINDS = {CELL: dict, KEYS: list, OWNER: str, RESULT: dict}
LOST = "lost"  # of a study: the numbers of ended trials of whose runs one was deleted

AFTER = "/after"  # ends the name of a study's companion, which holds confirmation and summary
FORMAT = 2  # edition of studies: trials with keys, in a grid one trial per run
DEFAULTS = json.loads(RunConfig().to_json())  # settings that a study did not have when it began
LONGEST_WAIT = 15.0  # seconds, at most, between two queries, and at least between messages
REASSIGNED = "trial reassigned: its process missed its heartbeats"


class _Study(optuna.Study):
    """A study in which a trial of whose runs one was deleted in MLflow counts as failed."""

    def get_trials(  # with Optuna's parameters
        self,
        deepcopy: bool = True,  # noqa: FBT001, FBT002
        states: Container[optuna.trial.TrialState] | None = None,
    ) -> list[FrozenTrial]:
        trials = super().get_trials(deepcopy)
        for number in self.user_attrs.get(LOST, ()):
            trials[number] = found = copy(trials[number])  # Optuna keeps the other
            found.state = optuna.trial.TrialState.FAIL
            found.user_attrs = {k: v for k, v in found.user_attrs.items() if k != DIVERGED}
        return [trial for trial in trials if states is None or trial.state in states]


@dataclass
class Queue:
    """The trials of a study.

    Attributes:
        store_complete: returns the keys of whole runs that ended processes left on this disk.
        me: name of this process.
        pruned: numbers of the trials that `judge` pruned.
    """

    study: optuna.Study = field(repr=False)
    storage: optuna.storages.RDBStorage = field(repr=False)
    proposer: Proposer = field(repr=False)
    store_complete: Callable[[], set[str]] = field(repr=False)
    me: str = field(default_factory=database.process_name)
    pruned: set[int] = field(default_factory=set)
    _held: dict[int, int] = field(default_factory=dict, repr=False)  # number -> id in the storage

    def trials(self, *states: str) -> list[FrozenTrial]:
        """Return the trials in the named states, by default in any."""
        wanted = tuple(optuna.trial.TrialState[state] for state in states) or None
        get = partial(self.study.get_trials, deepcopy=False, states=wanted)
        found = database.retry(get, self.storage.url)
        for trial, (name, of) in product(found, KINDS.items()):
            if not isinstance(value := trial.user_attrs.get(name, of()), of):
                where = f"trial {trial.number} of study {self.study.study_name!r} in --storage"
                raise UserError(f"{where}: {name} is {value!r}, no {of.__name__}")
        return found

    def left(self) -> int:
        """Return how many trials have no result yet, running trials included."""
        trials = self.trials()
        return self.proposer.left(trials) + sum(t.state.name == "RUNNING" for t in trials)

    def failed_keys(self) -> list[str]:
        """Return the keys of the runs of failed trials, without those that diverged."""
        return keys(*(t for t in self.trials("FAIL") if DIVERGED not in t.user_attrs))

    def lost_keys(self) -> list[str]:
        """Return the keys of the runs of the trials that `lose` counted as failed."""
        lost = self.study.user_attrs.get(LOST, ())
        return keys(*(trial for trial in self.trials("FAIL") if trial.number in lost))

    def lose(self, lost: Collection[FrozenTrial]) -> None:
        """Count ended trials as failed, since a run of each was deleted in MLflow."""

        def lose() -> None:
            before = self.study.user_attrs.get(LOST, [])
            self.study.set_user_attr(LOST, sorted({*before, *(trial.number for trial in lost)}))

        self._alone(lose)

    def take(self, count: int, workers: int = 1) -> list[FrozenTrial]:
        """Take trials: those that can be adopted, else this process's share of the rest.

        A trial is adopted if its process has ended and left all its runs on this disk; its value
        is `noted`. Otherwise at most `count` new trials are made, by one of `workers` processes
        that were started together. Trials of other processes that ended or missed their heartbeats
        fail first.
        """

        def take() -> tuple[list[FrozenTrial], dict[int, int]]:
            if not (found := self._reassign()):
                sharing = max(workers, len(set(self._others().values())) + 1)
                trials = self.trials()
                share = min(count, math.ceil(self.proposer.left(trials) / sharing))
                made = self.proposer.propose(self.study, trials, share)
                found = [t for t in self.trials("RUNNING") if made.intersection(keys(t))]
            held = {trial.number: self._id(trial) for trial in found}
            for trial in held.values():
                self.storage.record_heartbeat(trial)  # first: without one it would never fail
                self.storage.set_trial_user_attr(trial, OWNER, self.me)
            return found, held

        try:
            found, held = self._alone(take)
        except optuna.exceptions.UpdateFinishedTrialError:
            return []  # this process lost the lock, and another reassigned the trials meanwhile
        self._held |= held
        return found

    def reassign(self) -> list[FrozenTrial]:
        """Fail the trials of processes that ended; return those that `take` would adopt."""
        return self._alone(self._reassign)

    def _reassign(self) -> list[FrozenTrial]:
        self._beat()  # if this process was stopped, its trials are kept unless others have them
        running = [trial for trial in self.trials("RUNNING") if trial.number not in self._held]
        # Of ended processes, of none, and of an attempt of this one to take trials that failed.
        ended = [t for t in running if _owner(t) in ("", self.me) or database.is_gone(_owner(t))]
        complete = self.store_complete() if ended else set()
        adoptable = []
        for trial in ended:
            if noted(trial) and complete.issuperset(keys(trial)):
                self.storage.record_heartbeat(self._id(trial))
                adoptable.append(trial)
            else:
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if self._others():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                optuna.storages.fail_stale_trials(self.study)
        return adoptable

    def _others(self) -> dict[int, str]:
        return {t.number: _owner(t) for t in self.trials("RUNNING") if _owner(t) != self.me}

    @contextmanager
    def working(self) -> Iterator[None]:
        """Send heartbeats for the trials of this process; give back those left at the end."""
        try:
            with database.pulse(self._beat, database.heartbeat_seconds()):
                yield
        except BaseException:
            with suppress(Exception):  # the interruption is what counts
                self.give_back()
            raise
        self._alone(self.give_back)

    def _beat(self) -> None:
        for trial in list(self._held.values()):
            self.storage.record_heartbeat(trial)

    def give_back(self) -> None:
        """Fail the trials of this process; those with a noted value can be adopted."""
        for trial in self.trials("RUNNING"):
            if _owner(trial) == self.me and noted(trial):
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
            found = self.proposer.judge(record, rows, partial(self._report, trial))
            if any(end.pruned for end in found.values()):
                self.pruned.add(number)
            ends |= found
        return ends

    def _report(self, trial: FrozenTrial, value: float, epoch: int) -> bool:
        def report() -> bool:
            found = self._id(trial)
            self.storage.set_trial_intermediate_value(found, epoch, value)
            median = self.study.pruner  # Optuna's default
            return median.prune(self.study, self.storage.get_trial(found))

        with suppress(optuna.exceptions.UpdateFinishedTrialError):  # as in `note`
            return database.retry(report, self.storage.url)
        return False

    def note(self, trial: FrozenTrial, value: Value) -> None:
        """Note the value of a trial before its runs are delivered, so that it can be adopted."""

        def note() -> None:
            self.storage.set_trial_user_attr(self._id(trial), RESULT, value._asdict())

        with suppress(optuna.exceptions.UpdateFinishedTrialError):  # reassigned, as `finish` warns
            self._alone(note)

    def finish(self, trial: FrozenTrial, value: Value | None) -> bool:
        """Complete a trial; without a value it was pruned, or diverged and fails for good.

        Return False if the trial was reassigned, so that its result is discarded.
        """
        values, attrs = value or (None, {})
        state = optuna.trial.TrialState.COMPLETE
        if value is None:
            pruned, states = trial.number in self.pruned, optuna.trial.TrialState
            state, attrs = (states.PRUNED, {}) if pruned else (states.FAIL, {DIVERGED: True})

        def tell() -> None:
            found = self._id(trial)
            now = self.storage.get_trial(found)
            if now.state == state and attrs.keys() <= now.user_attrs.keys():
                return  # an attempt whose reply was lost
            for name, attr in attrs.items():
                self.storage.set_trial_user_attr(found, name, attr)
            self.storage.check_trial_is_updatable(found, now.state)
            self.study.tell(trial.number, values, state)

        try:
            self._alone(tell)
        except optuna.exceptions.UpdateFinishedTrialError:
            log.warning("%s; the result of trial %d is discarded", REASSIGNED, trial.number)
            return False
        finally:
            self._held.pop(trial.number, None)
        return True

    def wait(self) -> None:
        """Wait until a trial of another process ends or can be adopted."""
        before, pause, shown = self._others(), 0.5, -math.inf
        while before and not self.reassign() and self._others() == before:
            if time.monotonic() - shown >= LONGEST_WAIT:
                shown, owners = time.monotonic(), dict.fromkeys(before.values())
                log.info("waiting for %s", "; ".join(map(database.in_words, owners)))
            stopping.check()
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_WAIT)

    def _alone(self, work: Callable[[], Result]) -> Result:
        return database.alone(self.storage.url, self.study.study_name, work)

    def _id(self, trial: FrozenTrial) -> int:
        if trial.number in self._held:
            return self._held[trial.number]
        study = self.storage.get_study_id_from_name(self.study.study_name)
        return self.storage.get_trial_id_from_study_id_trial_number(study, trial.number)


def _owner(trial: FrozenTrial) -> str:
    return trial.user_attrs.get(OWNER, "")


def noted(trial: FrozenTrial) -> Value | None:
    """Return the value that was noted of a trial before it could be finished, if any."""
    with reading(f"result of trial {trial.number}"):
        return Value(**trial.user_attrs[RESULT]) if RESULT in trial.user_attrs else None


def check_settings(
    storage: optuna.storages.RDBStorage, name: str, settings: Mapping[str, Any]
) -> bool:
    """Return whether a study exists; raise UserError if it has other settings. Write nothing."""
    if name not in optuna.get_all_study_names(storage):
        return False
    study = optuna.load_study(study_name=name, storage=storage)
    stored, given = study.user_attrs.get("settings"), {**settings, "format": FORMAT}
    if stored is None and not study.get_trials(deepcopy=False):
        return False
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise UserError(
            f"study {name!r} in --storage was made by the first edition of this harness or by "
            "another program and cannot be continued; start another with --study-name"
        )
    stored = {key: value for key, value in DEFAULTS.items() if key in given} | stored
    then, now = stored.pop("parts", {}), given.pop("parts", {})
    for part in sorted(then.keys() & now.keys()):
        if then[part] != now[part]:
            raise UserError(
                f"study {name!r}: the file of {part} has changed since its first runs; restore it "
                "to continue the study, or start another with --fresh or --study-name"
            )
    stored["metrics"], given["metrics"] = (
        sorted(p for p in one if p.startswith("metric ")) for one in (then, now)
    )
    if changed := sorted(key for key in stored | given if stored.get(key) != given.get(key)):
        listed = "; ".join(f"{k}: {stored.get(k)} there, {given.get(k)} here" for k in changed)
        raise UserError(
            f"study {name!r} exists with other settings ({listed}); repeat its settings to "
            "continue it, or start another with --fresh or --study-name"
        )
    return True


def read_queue(storage: optuna.storages.RDBStorage, name: str, proposer: Proposer) -> Queue:
    """Return a study that exists, to be read alone."""
    return Queue(_Study(name, storage), storage, proposer, set)


def open_queue(
    storage: optuna.storages.RDBStorage,
    name: str,
    proposer: Proposer,
    store_complete: Callable[[], set[str]],
) -> Queue:
    """Create or continue a study."""

    def open_study() -> _Study:
        settings = {**proposer.settings, "format": FORMAT}
        if check_settings(storage, name, proposer.settings):
            there = _Study(name, storage).user_attrs["settings"]
            parts = there.get("parts", {}) | settings.get("parts", {})  # it may grow by values
            settings = there | ({"parts": parts} if parts else {})
        else:
            ways: Any = ["minimize"] * len(proposer.objectives)
            optuna.create_study(
                storage=storage, study_name=name, directions=ways, load_if_exists=True
            )
        study = _Study(name, storage)
        study.set_user_attr("settings", settings)
        return study

    study = database.alone(storage.url, name, open_study)
    return Queue(study, storage, proposer, store_complete)


class Stored:
    """A study in Optuna that is to be removed; `names` are its own and its companion's there."""

    def __init__(self, url: str | None, name: str) -> None:
        self._name, self._url = name, database.checked_address(url)
        self.where, is_new = addresses.without_secrets(self._url), addresses.is_new(self._url)
        every = () if is_new else (name, name + AFTER)
        self.names = [each for each in every if database.has_study(self._url, each)]
        self._storage: Any = database.open_storage(self._url) if self.names else None

    def check_ended(self) -> None:
        """Raise UserError if a process runs the study: one that goes on sending heartbeats."""
        for name in self.names:
            number = self._storage.get_study_id_from_name(name)
            stale = self._storage._get_stale_trial_ids(number)
            for trial in self._storage.get_all_trials(number, deepcopy=False):
                owner = _owner(trial) if trial.state.name == "RUNNING" else ""
                if owner and not database.is_gone(owner) and trial._trial_id not in stale:
                    by = database.in_words(owner)
                    raise UserError(f"study {self._name!r} is being run by {by}; end it first")

    def delete(self) -> None:
        """Delete the study, unless a process runs it."""

        def delete() -> None:
            self.check_ended()
            while self.names:
                optuna.delete_study(study_name=self.names[0], storage=self._storage)
                self.names.pop(0)

        database.alone(self._url, self._name, delete)
