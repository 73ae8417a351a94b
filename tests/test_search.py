"""A search from its command line to its summary, and how trials leave the stack."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from studies.hunt import open_hunt
from studies.place import Place
from studies.search_options import SearchOptions, make_search_plan
from studies.searching import Judge, confirm, trial_label
from studies.stack import train_stack
from studies.storage import open_storage

import harness
from analysis import search_frames, search_plots
from harness import RunConfig, UserError, tracking
from studies import search, worker
from studies.runner.terminal import Terminal

# MLflow's own type hints, when the best model is logged
pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred")

NAME = "search-digits"
FRONT = "search-digits-front"
SMALL = ["--trials", "5", "--seeds", "2", "--epochs", "2"]
# A setting of the user's is not searched, and its column is nowhere.
FLAT = ["--trials", "5", "--epochs", "1", "--multi-objective", "--kl-warmup-epochs", "0"]


@dataclass(frozen=True)
class Home:
    """A folder with the databases of searches."""

    folder: Path

    @property
    def uri(self) -> str:
        """Address of the MLflow database."""
        return f"sqlite:///{self.folder}/mlflow.db"

    @property
    def places(self) -> list[str]:
        """Options that name both databases."""
        return ["--tracking-uri", self.uri, "--storage", f"sqlite:///{self.folder}/optuna.db"]

    def study(self, name: str) -> optuna.Study:
        """Load the Optuna study."""
        return optuna.load_study(study_name=name, storage=open_storage(self.places[-1]))

    def runs(self, name: str, role: str = "run") -> list[dict]:
        """Read the MLflow runs of a search."""
        store = tracking.connect(self.uri)
        mine = f"tags.study = '{name}' and tags.role = '{role}'"
        return store.runs("search-digits", mine)

    def summary(self, name: str) -> dict:
        """Read the summary.json of a search."""
        return json.loads((self.folder / "reports" / name / "summary.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def _few_images(tiny):
    """Search on cut digits: nothing here depends on how many images there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "load_dataset", lambda name, root: tiny)
        yield


@pytest.fixture(scope="module")
def searched(empty_database, tmp_path_factory) -> Home:
    """Run a small search of each form once; tests only read it."""
    home = Home(tmp_path_factory.mktemp("search"))
    shutil.copy(empty_database, home.folder / "mlflow.db")
    for arguments in (SMALL, FLAT):
        search.main([*arguments, *home.places])
    return home


def part(runs: list[dict], name: str) -> list[dict]:
    return [run for run in runs if run.params["part"] == name]


# --- what a search leaves behind ----------------------------------------------------------------


def test_every_configuration_and_seed_is_one_run_with_a_true_status(searched):
    states = {t.number: t.state.name for t in searched.study(NAME).trials}
    assert len(states) == 5
    runs = part(searched.runs(NAME), "search")
    cells = sorted((int(r.params["trial"]), r.params["seed"]) for r in runs)
    assert cells == [(number, seed) for number in range(5) for seed in "01"]
    for run in runs:
        pruned = states[int(run.params["trial"])] == "PRUNED"
        assert run.status == ("KILLED" if pruned else "FINISHED")
        assert (run.tags.get("pruned") == "true") == pruned
        assert set(RunConfig.__dataclass_fields__) <= run.params.keys()


def test_the_objective_is_the_mean_over_seeds_of_validation_neg_elbo(searched):
    runs = part(searched.runs(NAME), "search")
    frame = pd.DataFrame([r.params | r.metrics for r in runs])
    means = frame.groupby(frame["trial"].astype(int))["val/neg_elbo"].mean()
    for trial in searched.study(NAME).get_trials(states=[optuna.trial.TrialState.COMPLETE]):
        assert trial.value == pytest.approx(means[trial.number], rel=1e-12)


def test_the_best_and_the_default_are_trained_with_three_fresh_seeds(searched):
    best = searched.study(NAME).best_trial
    runs = part(searched.runs(NAME), "confirmation")
    cells = sorted((int(r.params["trial"]), r.params["seed"]) for r in runs)
    assert cells == sorted((number, seed) for number in (-1, best.number) for seed in "234")
    assert {r.status for r in runs} == {"FINISHED"}
    for run in runs:
        if run.params["trial"] == "-1":
            assert (run.params["kl_weight"], run.params["latent_size"]) == ("0.02", "10")
        else:
            assert {k: str(v) for k, v in best.params.items()}.items() <= run.params.items()


def test_the_answer_has_the_fresh_seeds_mean_and_interval(searched):
    summary = searched.summary(NAME)
    best = searched.study(NAME).best_trial
    runs = part(searched.runs(NAME), "confirmation")
    values = [r.metrics["test/neg_elbo"] for r in runs if r.params["trial"] == str(best.number)]
    half = 4.302653 * np.std(values, ddof=1) / np.sqrt(3)  # t quantile, 2 degrees of freedom
    assert f"trial {best.number} is best" in summary["answer"]
    assert f"test neg_elbo {np.mean(values):.2f} ± {half:.2f} nats / image" in summary["answer"]
    assert "The default configuration at its calibrated weight 0.02 has" in summary["answer"]
    assert "What mattered for val/neg_elbo" in summary["answer"]


def test_the_summary_is_one_run_with_its_files_and_makes_a_report(searched):
    (run,) = searched.runs(NAME, "summary")
    assert run.status == "FINISHED"
    assert run.params["trials"] == "5"
    folder, summary = searched.folder / "reports" / NAME, searched.summary(NAME)
    for exhibit in summary["figures"] + summary["pictures"] + summary["tables"]:
        assert (folder / exhibit["file"]).is_file()
    names = {Path(figure["file"]).stem for figure in summary["figures"]}
    assert names == {"history", "parameters", "importances"}
    assert "python -m studies.search --dataset digits --trials 5" in summary["command"]
    assert summary["answer"].split(".")[0] in (folder / "report.html").read_text()


def test_two_objectives_give_a_front_that_holds_the_lowest_neg_elbo(searched):
    study = searched.study(FRONT)
    done = {t.number: t for t in study.trials}
    front = {t.number for t in study.best_trials}
    for trial in done.values():
        beaten = any(
            all(a <= b for a, b in zip(other.values, trial.values, strict=True))
            and other.values != trial.values
            for other in done.values()
        )
        assert (trial.number in front) == (not beaten)
    assert min(done, key=lambda n: done[n].user_attrs["val/neg_elbo"]) in front
    summary = searched.summary(FRONT)
    assert "front" in {Path(figure["file"]).stem for figure in summary["figures"]}
    assert f"{len(front)} trials are on the Pareto front" in summary["answer"]


# --- going on -----------------------------------------------------------------------------------


def test_more_trials_continue_and_a_dead_process_is_told_apart(searched, tmp_path, capsys):
    home = Home(tmp_path / "copy")
    shutil.copytree(searched.folder, home.folder)
    leave_behind(home)
    old = {r.run_id for r in home.runs(NAME)}
    search.main([*SMALL, "--trials", "6", *home.places])
    assert "5 runs are finished; 1 are left" in capsys.readouterr().out
    states = [t.state.name for t in home.study(NAME).trials]
    assert states[5] == "FAIL"
    assert len(states) == 7
    assert "RUNNING" not in states
    dead = [r for r in home.runs(NAME) if r.params["trial"] == "5"]
    assert [(r.status, r.tags["reason"]) for r in dead] == [("KILLED", "its process is gone")]
    new = part([r for r in home.runs(NAME) if r.run_id not in old], "search")
    assert {r.params["trial"] for r in new} == {"6"}
    trials = [r.params["trials"] for r in home.runs(NAME, "summary")]
    assert sorted(trials) == ["5", "6"]


def leave_behind(home: Home) -> None:
    """Leave a trial and a run open as a process does that is killed."""
    plan = make_search_plan(search.SEARCH, SearchOptions(trials=6, seeds=2, epochs=2))
    hunt = open_hunt(plan, open_storage(home.places[-1]))
    hunt.desk.me = worker.name(2**22 + 1)  # above the largest id
    ((trial,),) = [next(hunt.asked(at_once=1))]
    store = tracking.connect(home.uri)
    experiment = tracking.open_experiment(store, NAME, "")
    config, params, tags = plan.planned(trial_label(trial.number), trial.number, plan.base)
    tracking.RunLog(store, experiment, "left", tags, params)


def test_a_finished_search_trains_nothing_and_says_the_same(searched, capsys):
    before = len(searched.runs(FRONT))
    answer = searched.summary(FRONT)["answer"]
    search.main([*FLAT, *searched.places])
    assert "Every run is finished already" in capsys.readouterr().out
    assert len(searched.runs(FRONT)) == before
    assert len(searched.runs(FRONT, "summary")) == 1
    assert searched.summary(FRONT)["answer"] == answer


def refusal(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        search.main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_other_settings_are_refused_with_the_differences(searched, capsys):
    said = refusal([*SMALL, "--epochs", "3", "--pruner", "none", *searched.places], capsys)
    assert "epochs: 2 there, 3 here; pruner: median there, none here" in said


def test_a_search_that_another_process_runs_is_refused(tmp_path):
    plan = make_search_plan(search.SEARCH, SearchOptions(trials=2))
    hunt = open_hunt(plan, open_storage(f"sqlite:///{tmp_path}/optuna.db"))
    hunt.desk.me = worker.name(os.getppid())
    next(hunt.asked(at_once=2))
    hunt.desk.me = worker.name()
    with pytest.raises(UserError, match="is being run by process"):
        hunt.desk.bury()


def test_a_remedy_that_is_set_is_not_searched():
    plan = make_search_plan(search.SEARCH, SearchOptions(sigma="optimal", free_bits=0.1))
    assert not {"sigma", "free_bits"} & set(plan.space)
    assert (plan.base.sigma, plan.base.free_bits) == ("optimal", 0.1)
    assert "--free-bits 0.1 --sigma optimal" in plan.command()
    binary = SearchOptions(likelihood="bernoulli", binarization="stochastic")
    assert "sigma" not in make_search_plan(search.SEARCH, binary).space


def test_a_dry_run_says_what_is_searched_and_writes_nothing(tmp_path, capsys):
    search.main(["--dry-run", "--trials", "40", *Home(tmp_path).places])
    said = " ".join(capsys.readouterr().out.split())
    assert "40 configurations of kl_weight, kl_normalization, latent_size" in said
    assert list(tmp_path.iterdir()) == []


# --- pruning ------------------------------------------------------------------------------------


def test_trials_are_judged_after_every_warm_up_and_before_the_last_epoch():
    for epochs in (1, 2, 3, 10, 30, 50):
        plan = make_search_plan(search.SEARCH, SearchOptions(epochs=epochs))
        longest = plan.space["kl_warmup_epochs"][1]
        assert all(longest <= epoch < epochs for epoch in plan.judged)
        assert len(plan.judged) <= 10
        assert len(plan.judged) > 0 or epochs == 1


def test_a_batch_is_as_wide_as_the_stack_but_a_search_has_rounds():
    plans = [
        make_search_plan(search.SEARCH, SearchOptions(trials=t, seeds=s))
        for t, s in ((400, 1), (400, 3), (400, 20), (40, 1), (2, 1))
    ]
    assert [plan.at_once(width=16) for plan in plans] == [16, 5, 1, 10, 1]


@pytest.fixture
def hunt(tmp_path):
    """Open a search of two seeds among whose finished trials everything else looks bad."""
    plan = make_search_plan(search.SEARCH, SearchOptions(trials=9, seeds=2, epochs=3))
    hunt = open_hunt(plan, open_storage(f"sqlite:///{tmp_path}/optuna.db"))
    for value in (-1000.0, -999.0, -998.0, -997.0, -996.0):
        params = plan.search.baseline(plan.base, plan.source)
        hunt.study.add_trial(
            optuna.trial.create_trial(
                params={name: getattr(params, name) for name in plan.space},
                distributions=hunt.choices,
                intermediate_values=dict.fromkeys(plan.judged, value),
                value=value,
                user_attrs={"val/neg_elbo": value},
            )
        )
    return hunt


def train_batch(hunt, trials, uri, data, configs):
    store = tracking.connect(uri)
    place = Place(None, data, "cpu", store, experiment_of(store), lambda record: None)
    judge = Judge(hunt, trials)
    planned = [
        hunt.plan.planned(trial_label(t.number), t.number, config)
        for t, own in zip(trials, configs, strict=True)
        for config in own
    ]
    hunt.tell(trials, train_stack(planned, place, judge), judge.pruned)
    return {(r.params["trial"], r.params["seed"]): r for r in store.runs(NAME)}


def experiment_of(store):
    return tracking.open_experiment(store, NAME, "Why?")


def test_a_pruned_trial_drops_all_its_rows_and_says_so(hunt, tracking_uri, tiny):
    trials = next(hunt.asked(at_once=2))
    cold = {"kl_warmup_epochs": 0}
    configs = [hunt.plan.configs(t.params | cold) for t in trials]
    runs = train_batch(hunt, trials, tracking_uri, tiny, configs)
    assert len(runs) == 4
    store = tracking.connect(tracking_uri)
    for run in runs.values():
        assert (run.status, run.tags["pruned"]) == ("KILLED", "true")
        assert run.tags["reason"].startswith("pruned at epoch 1: validation neg_elbo")
        history = store.client.get_metric_history(run.run_id, "val/neg_elbo")
        assert [m.step for m in history] == [1]
        assert not any(name.startswith("test/") for name in run.metrics)
    assert [t.state.name for t in hunt.study.trials[5:]] == ["PRUNED", "PRUNED"]
    frame = search_frames.load_search(NAME, hunt.plan.name, tracking_uri)
    assert frame["pruned"].all()
    assert len(search_frames.by_trial(frame, list(hunt.plan.space))) == 2
    assert hunt.left() == 2


def test_no_trial_is_judged_while_a_warm_up_lowers_its_weight(hunt, tracking_uri, tiny):
    trials = next(hunt.asked(at_once=2))
    ramp = [{"kl_warmup_epochs": 1, "kl_cycles": 3}, {"kl_warmup_epochs": 0}]
    configs = [hunt.plan.configs(t.params | r) for t, r in zip(trials, ramp, strict=True)]
    train_batch(hunt, trials, tracking_uri, tiny, configs)
    assert [t.state.name for t in hunt.study.trials[5:]] == ["COMPLETE", "PRUNED"]


def test_a_diverging_seed_ends_its_trial_and_no_other(hunt, tracking_uri, tiny):
    hunt.study.pruner = optuna.pruners.NopPruner()
    trials = next(hunt.asked(at_once=2))
    tame = [hunt.plan.base.replace(seed=seed) for seed in (0, 1)]
    wild = [tame[0], tame[1].replace(learning_rate=1e30)]
    runs = train_batch(hunt, trials, tracking_uri, tiny, [tame, wild])
    first, second = (str(t.number) for t in trials)
    assert [runs[first, s]["status"] for s in "01"] == ["FINISHED", "FINISHED"]
    assert [runs[second, s]["status"] for s in "01"] == ["KILLED", "FAILED"]
    assert "another seed of its configuration diverged" in runs[second, "0"]["tags"]["reason"]
    assert "diverged in epoch 1" in runs[second, "1"]["tags"]["reason"]
    assert [t.state.name for t in hunt.study.trials[5:]] == ["COMPLETE", "FAIL"]
    assert [t.number for t in hunt.diverged()] == [int(second)]


def test_a_trial_that_diverges_where_it_would_be_pruned_has_diverged(hunt, tracking_uri, tiny):
    # Finite, but beyond any constant image; all its runs leave, since none can be summarised.
    (trial,) = next(hunt.asked(at_once=1))
    configs = [
        hunt.plan.base.replace(model="linear", kl_weight=0.02, learning_rate=rate, seed=seed)
        for seed, rate in enumerate((1e-3, 3.0))
    ]
    runs = train_batch(hunt, [trial], tracking_uri, tiny, [configs])
    tame, wild = (runs[str(trial.number), seed] for seed in "01")
    assert wild.status == "FAILED"
    assert wild.tags["reason"].startswith("diverged in epoch 1: training mse is")
    assert (tame.status, "pruned" in tame.tags) == ("KILLED", False)
    assert hunt.study.trials[trial.number].state.name == "FAIL"
    assert [t.number for t in hunt.diverged()] == [trial.number]


def test_a_fresh_seed_that_diverges_is_not_trained_again(hunt, tracking_uri, tiny):
    best = hunt.best().number
    store = tracking.connect(tracking_uri)
    place = Place(None, tiny, "cpu", store, experiment_of(store), lambda record: None)
    for label, number in ((f"best, trial {best}", best), ("default", -1)):
        wild = [1e-3, 1e-3, 1e30] if number == best else [1e-3] * 3
        train_stack(
            [
                hunt.plan.planned(
                    label,
                    number,
                    hunt.plan.base.replace(seed=s, learning_rate=rate, epochs=1),
                    "confirmation",
                )
                for s, rate in zip(hunt.plan.fresh_seeds, wild, strict=True)
            ],
            place,
        )
    before = store.runs(NAME)
    assert sorted(run.status for run in before) == ["FAILED"] + ["FINISHED"] * 5
    confirm(hunt, place, Terminal())
    assert store.runs(NAME) == before


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_a_pruner_stops_the_bad_and_lets_the_good_go_on(pruner, tmp_path):
    plan = make_search_plan(search.SEARCH, SearchOptions(trials=99, epochs=27, pruner=pruner))
    hunt = open_hunt(plan, open_storage(f"sqlite:///{tmp_path}/optuna.db"))
    fates = {}
    for _ in range(3):
        for place, trial in enumerate(next(hunt.asked(at_once=9))):
            value = float(place)
            for epoch in plan.judged:
                trial.report(value, epoch)
                if trial.should_prune():
                    fates[trial.number] = value
                    hunt.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                    break
            else:
                hunt.study.tell(trial, value)
    assert fates
    assert 0.0 not in fates.values()


# --- figures ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trials(searched):
    frame = search_frames.load_search(NAME, NAME, searched.uri)
    plan = make_search_plan(search.SEARCH, SearchOptions())
    table = search_frames.by_trial(frame[frame["part"] == "search"], list(plan.space))
    return table.assign(front=table["trial"] < 3)


def test_the_history_holds_every_trial_and_the_best_so_far(trials):
    panel = search_plots.history(trials).axes[0]
    done, cut, best = panel.get_lines()[:3]
    assert sorted([*done.get_xdata(), *cut.get_xdata()]) == list(trials["trial"])
    finished = trials[~trials["pruned"]]["val/neg_elbo"]
    assert np.allclose(best.get_ydata(), np.minimum.accumulate(finished))


def test_each_setting_has_a_panel_with_every_trial(trials):
    figure = search_plots.parameters(trials)
    for panel, setting in zip(figure.axes, search_plots.PANELS, strict=False):
        dots = np.concatenate([c.get_offsets() for c in panel.collections])
        assert sorted(dots[:, 1]) == pytest.approx(sorted(trials["val/neg_elbo"]))
        if setting not in search_plots.CATEGORIES:
            assert sorted(dots[:, 0]) == pytest.approx(sorted(trials[setting]))


def test_the_front_is_drawn_through_its_trials_alone(trials):
    panel = search_plots.front(trials).axes[0]
    line = next(line for line in panel.get_lines() if line.get_label() == "Pareto front")
    assert sorted(line.get_ydata()) == sorted(trials[trials["front"]]["val/mse"])


@pytest.mark.parametrize("left_out", [[], ["kl_warmup_epochs"], ["kl_weight", "latent_size"]])
def test_the_front_says_the_settings_that_were_searched(trials, left_out):
    searched = {c: n for c, n in search_plots.NAMES.items() if c not in left_out}
    (legend,) = search_plots.front(trials.drop(columns=left_out)).legends
    said = [text.get_text() for text in legend.get_texts()]
    heading = next(i for i, text in enumerate(said) if text.startswith("trial: "))
    assert said[heading] == f"trial: {', '.join(searched.values())}"
    for line in said[heading + 1 :]:
        number, values = line.split(": ")
        trial = trials.set_index("trial").loc[int(number)]
        for value, column in zip(values.split(", "), searched, strict=True):
            assert value == str(trial[column]) or float(value) == pytest.approx(trial[column], 0.05)


def test_one_trial_is_drawn_as_one_point(trials):
    one = trials[~trials["pruned"]][:1].assign(front=True)
    number, value = one["trial"].item(), one["val/neg_elbo"].item()
    done, cut, best = search_plots.history(one).axes[0].get_lines()[:3]
    assert done.get_xydata().tolist() == best.get_xydata().tolist() == [[number, value]]
    assert len(cut.get_xdata()) == 0
    dots = [
        dot for c in search_plots.parameters(one).axes[0].collections for dot in c.get_offsets()
    ]
    assert [dot[1] for dot in dots] == [value]
    (front,) = [
        line
        for line in search_plots.front(one).axes[0].get_lines()
        if line.get_label() == "Pareto front"
    ]
    assert front.get_ydata().tolist() == [one["val/mse"].item()]
    search_plots.importances(search_frames.importances({"val/neg_elbo": {"kl_weight": 1.0}}))
