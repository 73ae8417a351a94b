"""Optuna's database: how it is opened, and whose study is in it."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import lazy_loader

import harness
from harness import places
from harness.config import RunConfig, UserError
from harness.places import without_password
from studies.databases import check_kind, engine_options, exclusive
from studies.runner.options import first_unused
from studies.worker import SILENT, beat

if TYPE_CHECKING:
    import optuna

    from harness.tracking import Store
    from studies.runner.options import Common
else:
    optuna = lazy_loader.load("optuna")

DEFAULTS = json.loads(RunConfig().to_json())
"""Settings of a study that was begun before the harness had them."""


def open_storage(url: str | None) -> optuna.storages.RDBStorage:
    """Open Optuna's database, creating its tables if need be.

    Args:
        url: SQLAlchemy URL; None means `optuna.db` in the repository.

    Raises:
        UserError: the storage cannot be used.
    """
    url = places.storage_address(url)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    places.check_database(url, "--storage")
    check_kind(url)
    seconds = beat()
    try:
        with exclusive(url, "tables"), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.storages.RDBStorage(
                url, engine_options(url), heartbeat_interval=seconds, grace_period=SILENT * seconds
            )
    except Exception as error:  # any driver's error
        raise places.unusable(url, "--storage", error) from error


def open_both(options: Common) -> tuple[Store, optuna.storages.RDBStorage]:
    """Open tracking store and storage, so that one that cannot be used leaves no other behind.

    Raises:
        UserError: one of them cannot be used, they are the same file, or nothing can be written
            beside the tracking store.
    """
    tracking = places.tracking_address(options.tracking_uri)
    storage = places.storage_address(options.storage)
    places.check_database(tracking, "--tracking-uri")
    places.check_database(storage, "--storage")
    check_kind(storage)
    if places.sqlite_file(tracking) == places.sqlite_file(storage) is not None:
        raise UserError(f"--storage {storage} is the tracking database too; give each its own file")
    if places.is_new(storage) or places.is_server(tracking):  # opening a server writes nothing
        store, found = harness.tracking.connect(tracking), open_storage(storage)
    else:
        found = open_storage(storage)
        store = harness.tracking.connect(tracking)
    store.check_home()
    return store, found


def new_name(storage: optuna.storages.RDBStorage, store: Store, experiment: str, name: str) -> str:
    """Return the name, or the first of NAME-2, NAME-3, ... that neither Optuna nor MLflow knows."""
    runs = harness.tracking.read_runs(store, experiment)
    tracked = {run["tags"].get("study") for run in runs}
    return first_unused(name, {*optuna.get_all_study_names(storage), *tracked})


def check_storage(
    storage: optuna.storages.RDBStorage, store: Store, experiment: str, name: str
) -> None:
    """Refuse a study of which MLflow has runs and the storage knows nothing.

    Its points would be trained again, and its summary would count both runs of each.

    Raises:
        UserError: it is one.
    """
    if name in optuna.get_all_study_names(storage):
        return
    runs = harness.tracking.read_runs(store, experiment, f"tags.study = '{name}'")
    # Asked again: who writes runs created the study before, maybe just now.
    if runs and name not in optuna.get_all_study_names(storage):
        raise UserError(
            f"{without_password(store.uri)} has {len(runs)} runs of study {name!r}, of which "
            f"--storage {without_password(storage.url)} knows nothing; name the storage that it "
            "was run with, start another with --fresh or --study-name, or delete those runs"
        )


def agree(study: optuna.Study, here: dict[str, Any]) -> None:
    """Write down the settings of a new study, or check that they are those of an old one.

    Raises:
        UserError: the study exists with other settings.
    """
    there = study.user_attrs.get("settings")
    if there is None and study.get_trials(deepcopy=False):
        raise UserError(
            f"study {study.study_name!r} in --storage was not made by this harness; start another "
            "with --study-name"
        )
    if there is None:
        study.set_user_attr("settings", here)
        return
    there = {name: value for name, value in DEFAULTS.items() if name in here} | there
    if there != here:
        changed = sorted(k for k in there | here if there.get(k) != here.get(k))
        listed = "; ".join(f"{k}: {there.get(k)} there, {here.get(k)} here" for k in changed)
        raise UserError(
            f"study {study.study_name!r} exists with other settings ({listed}); repeat its "
            "settings to continue it, or start another with --fresh or --study-name"
        )
