"""A search from its command line to its summary, and how trials leave the stack."""

import json
import shlex
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from real_stores import copy_home

import harness
from analysis import frames, plots
from analysis.frames import is_numeric
from analysis.plots.search import PANELS
from analysis.plots.style import top_of
from harness import RunConfig, objective, tracking
from harness.linear.pca import pca
from harness.tracking import record as recording
from harness.tracking.runs import Run
from studies import search
from studies.runner.database import open_storage, process_name
from studies.runner.proposers import TPE, Range
from studies.runner.queue import Queue, open_queue
from studies.runner.run import Site, work
from studies.runner.study import KNOWN, calibrated
from studies.runner.terminal import Steps, Terminal
from studies.search import SearchOptions, make_plan

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

    def runs(self, name: str, role: str = "run") -> list[Run]:
        """Read the MLflow runs of a search."""
        return tracking.connect(self.uri).runs("search-digits", study=name, role=role)

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


def part(runs: list[Run], name: str) -> list[Run]:
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
        assert RunConfig().named().keys() <= run.params.keys()


def test_the_objective_is_the_mean_over_seeds_of_validation_neg_elbo(searched):
    runs = part(searched.runs(NAME), "search")
    frame = pd.DataFrame([r.params | r.metrics for r in runs])
    means = frame.groupby(frame["trial"].astype(int))["val/neg_elbo"].mean()
    for trial in searched.study(NAME).get_trials(states=[optuna.trial.TrialState.COMPLETE]):
        assert trial.value == pytest.approx(means[trial.number], rel=1e-12)


def test_the_default_is_the_first_trial(searched):
    first = searched.study(NAME).trials[0]
    assert first.params["decoder_variance"] == 0.01
    for run in part(searched.runs(NAME), "search")[:2]:
        assert (run.params["trial"], run.params["kl_weight"], run.params["sigma"]) == (
            *("0", "0.02"),
            "fixed",
        )


def test_the_best_other_trial_and_the_default_are_trained_with_three_fresh_seeds(searched):
    study = searched.study(NAME)
    best = search.rival(study)
    others = [t for t in study.trials[1:] if t.state.name == "COMPLETE"]
    assert best.value == min(trial.value for trial in others)
    runs = part(searched.runs(NAME), "confirmation")
    cells = sorted((int(r.params["trial"]), r.params["seed"]) for r in runs)
    assert cells == sorted((number, seed) for number in (-1, best.number) for seed in "234")
    assert {r.status for r in runs} == {"FINISHED"}
    for run in runs:
        if run.params["trial"] == "-1":
            assert (run.params["kl_weight"], run.params["latent_size"]) == ("0.02", "10")
        else:
            assert {k: str(v) for k, v in best.params.items()}.items() <= run.params.items()


def test_the_answer_compares_the_best_with_the_default_by_fresh_seeds(searched):
    summary, best = searched.summary(NAME), search.rival(searched.study(NAME))
    runs = part(searched.runs(NAME), "confirmation")
    both = [[r for r in runs if r.params["trial"] == str(n)] for n in (best.number, -1)]
    is_default = summary["verdict"][0].startswith("Best: default (")
    values = [r.metrics["test/neg_elbo"] for r in both[is_default]]
    half = 4.302653 * np.std(values, ddof=1) / np.sqrt(3)  # t quantile, 2 degrees of freedom
    assert f" is {np.mean(values):.2f} ± {half:.2f} nats / image." in summary["answer"]
    gaps = np.subtract(*([r.metrics["val/neg_elbo"] for r in part] for part in both))
    half = 4.302653 * np.std(gaps, ddof=1) / np.sqrt(3)
    words = "better than" if np.mean(gaps) < 0 else "worse than"
    words = words if abs(np.mean(gaps)) > half else "not distinguishable from"
    shown = f"trial {best.number} is {words} the default: {np.mean(gaps):.2f} ± {half:.2f} nats"
    assert shown in summary["verdict"][1]


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        (frames.Difference(-2.0, 1.0, 3), "trial 7 is better than the default: -2.00 ± 1.00 nats"),
        (frames.Difference(2.0, 1.0, 3), "trial 7 is worse than the default: 2.00 ± 1.00 nats"),
        (frames.Difference(-1.0, 1.5, 3), "trial 7 is not distinguishable from the default: -1.00"),
        (frames.Difference(-1.0, float("nan"), 1), "no other configuration than the default"),
    ],
)
def test_a_difference_that_chance_makes_is_not_called_one(gap, words):
    assert search.how_sure("trial 7", gap).startswith(words)


def finished(value, active, **attrs):
    """Return a complete trial."""
    attrs = {"val/neg_elbo": value, "val/active_units": active, **attrs}
    return optuna.trial.create_trial(values=[value], user_attrs=attrs)


def test_a_collapsed_trial_is_compared_only_where_all_have_collapsed():
    study = optuna.create_study()
    study.add_trial(finished(1.0, 3.0, default=True))
    assert search.rival(study) is None
    study.add_trial(finished(4.0, 0.0))
    study.add_trial(finished(2.0, 0.0))
    assert search.rival(study).number == 2
    study.add_trial(finished(3.0, 1.0))
    assert search.rival(study).number == 3


def test_the_summary_is_one_run_with_its_files_and_makes_a_report(searched):
    (run,) = searched.runs(NAME, "summary")
    assert run.status == "FINISHED"
    assert run.params["trials"] == "5"
    folder, summary = searched.folder / "reports" / NAME, searched.summary(NAME)
    for exhibit in summary["figures"] + summary["pictures"] + summary["tables"]:
        assert (folder / exhibit["file"]).is_file()
    names = {Path(figure["file"]).stem for figure in summary["figures"]}
    assert names == {"history", "parameters", "importances", "learning_curves"}
    assert "python -m studies.search --dataset digits --epochs 2 --trials 5" in summary["command"]
    assert summary["answer"].split(".")[0] in (folder / "report.html").read_text()


def test_the_recommended_configuration_has_the_lower_mean_and_its_median_seed_is_saved(searched):
    summary, runs = searched.summary(NAME), part(searched.runs(NAME), "confirmation")
    seeds = {trial: [r for r in runs if r.params["trial"] == trial] for trial in ("-1", *"01234")}
    values = {
        trial: sorted((r.metrics["val/neg_elbo"], r.run_id) for r in found)
        for trial, found in seeds.items()
        if found
    }
    best = min(values, key=lambda trial: np.mean([value for value, _ in values[trial]]))
    assert summary["model_run_id"] == values[best][1][1]
    label = "default" if best == "-1" else f"trial {best}"
    first, sure, following = summary["verdict"]
    assert first.startswith(f"Best: {label} (")
    fixed = seeds[best][0].params["sigma"] == "fixed"
    assert ("decoder_variance = " in first) == ("decoder_variance" in summary["best"]) == fixed
    assert sure.startswith("How sure: trial ")
    assert following.endswith(summary["next_command"])
    assert summary["best"]["latent_size"] == int(seeds[best][0].params["latent_size"])
    row = summary["rows"][summary["best_row"]]
    assert row["trial"] == max(0, int(best))
    words = shlex.split(summary["next_command"].partition("studies.search ")[2])
    longer = make_plan(search.parse(words))  # still improving after 2 epochs
    assert (longer.configs[0].epochs, len(longer.configs)) == (50, 5 * 2 + 6)
    assert any("No latent is active" in warning for warning in summary["warnings"]) == (
        all(r.metrics["test/active_units"] == 0 for r in seeds[best])
    )


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
    knee = search.rival(study).number
    sums = {n: t.values[0] + t.values[1] for n, t in done.items()}
    assert sums[knee] == min(value for n, value in sums.items() if n)  # of all but the default
    answer = f"{len(front)} trials are on the front of rate and distortion; its knee is trial "
    assert f"{answer}{min(sums, key=sums.__getitem__)}." in summary["answer"]


# --- going on -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_more_trials_continue_and_the_trial_of_a_dead_process_is_repeated(
    searched, tmp_path, capsys
):
    home = Home(tmp_path / "copy")
    copy_home(searched.folder, home.folder)
    left_behind(home)
    old = {r.run_id for r in home.runs(NAME)}
    search.main([*SMALL, "--trials", "6", *home.places])
    assert "10 runs are finished; 2 are left" in capsys.readouterr().out
    states = [t.state.name for t in home.study(NAME).trials]
    assert states[5] == "FAIL"
    assert len(states) == 7
    assert "RUNNING" not in states
    dead = [r for r in home.runs(NAME) if r.params["trial"] == "5"]
    reason = "its process ended, or missed its heartbeats"
    assert [(r.status, r.tags["reason"]) for r in dead] == [("KILLED", reason)]
    new = part([r for r in home.runs(NAME) if r.run_id not in old], "search")
    assert {r.params["trial"] for r in new} == {"6"}
    summaries = {r.params["trials"]: r.status for r in home.runs(NAME, "summary")}
    assert summaries == {"5": "KILLED", "6": "FINISHED"}


def left_behind(home: Home) -> None:
    """Leave a trial and one of its runs open, as a process does that is killed."""
    plan = make_plan(SearchOptions(trials=6, seeds=2, settings={"epochs": 2}))
    storage = open_storage(home.places[-1])
    queue = open_queue(storage, plan.name, plan.proposer, set)
    queue.me = process_name(2**22 + 1) + "1"  # an id above the largest
    (trial,) = queue.take(1)
    run, _ = queue.proposer.planned(trial)
    tags = {"study": plan.name, "role": "run", "configuration": "left"}
    start = recording.log_in(tracking.connect(home.uri), plan.experiment, "Why?")
    start(run._replace(tags={**run.tags, **tags}))
    storage.engine.dispose()


def test_a_finished_search_trains_nothing_and_says_the_same(searched, capsys):
    before = len(searched.runs(FRONT))
    answer = searched.summary(FRONT)["answer"]
    search.main([*FLAT, *searched.places])
    assert "are finished; 0 are left" in capsys.readouterr().out
    assert len(searched.runs(FRONT)) == before
    assert len(searched.runs(FRONT, "summary")) == 1
    assert searched.summary(FRONT)["answer"] == answer


def refusal(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        search.main(arguments)
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    return printed


def test_other_settings_are_refused_with_the_differences(searched, capsys):
    printed = refusal([*SMALL, "--epochs", "3", "--pruner", "none", *searched.places], capsys)
    assert "epochs: 2 there, 3 here; pruner: median there, none here" in printed


def test_a_remedy_that_is_set_is_not_searched():
    plan = make_plan(SearchOptions(settings={"sigma": "optimal", "free_bits": 0.1}))
    assert not {"sigma", "free_bits", "decoder_variance", "kl_weight"} & set(plan.proposer.space)
    assert (plan.proposer.base.sigma, plan.proposer.base.free_bits) == ("optimal", 0.1)
    assert "--sigma optimal --free-bits 0.1" in plan.command
    given = make_plan(SearchOptions(settings={"kl_weight": 0.3})).proposer
    assert not {"kl_weight", "decoder_variance"} & set(given.space)
    assert given.configure(given.base, **given.default).kl_weight == 0.3


@pytest.mark.parametrize("normalization", ["pixels", "batch", "latent", "sum"])
def test_a_trials_decoder_variance_is_that_of_its_weight_in_the_given_normalisation(normalization):
    proposer = make_plan(SearchOptions(settings={"kl_normalization": normalization})).proposer
    data, default = KNOWN["digits"], calibrated(proposer.base, KNOWN["digits"])
    assert proposer.configure(proposer.base, **proposer.default) == default
    low, high, _ = proposer.space["decoder_variance"]
    for variance in (low, high):
        config = proposer.configure(proposer.base, decoder_variance=variance, latent_size=5)
        assert objective.decoder_variance(config, data.pixels) == pytest.approx(variance)
    for sigma in ("optimal", "learned"):
        config = proposer.configure(proposer.base, sigma=sigma, latent_size=5)
        assert objective.beta(config, data.pixels) == pytest.approx(1.0)


def test_the_decoder_variances_reach_from_a_small_error_to_the_collapse_of_the_linear_model(data):
    low, high, _ = make_plan(SearchOptions()).proposer.space["decoder_variance"]
    assert low < (1 / 255) ** 2
    assert high > pca(data).variances[0]


def test_a_likelihood_without_a_variance_is_searched_by_its_kl_weight():
    binary = SearchOptions(settings={"likelihood": "bernoulli", "binarization": "stochastic"})
    proposer = make_plan(binary).proposer
    assert "sigma" not in proposer.space
    default = proposer.configure(proposer.base, **proposer.default)
    assert objective.beta(default, 64) == pytest.approx(1.0)
    laplace = make_plan(SearchOptions(settings={"likelihood": "laplace"})).proposer
    default = laplace.configure(laplace.base, **laplace.default)
    assert objective.decoder_std(default, 64) == pytest.approx(0.1)  # of the Gaussian default
    assert {"kl_weight", "sigma"} <= set(laplace.space)


def test_the_command_of_a_report_is_one_that_the_search_takes():
    plan = make_plan(SearchOptions(trials=9, seeds=2, multi_objective=True))
    words = shlex.split(plan.command.partition("studies.search ")[2])
    assert make_plan(search.parse(words)).proposer == plan.proposer


def test_a_dry_run_shows_what_is_searched_and_writes_nothing(tmp_path, capsys):
    search.main(["--dry-run", "--trials", "40", *Home(tmp_path).places])
    printed = " ".join(capsys.readouterr().out.split())
    assert "40 configurations of decoder_variance, latent_size, learning_rate" in printed
    assert list(tmp_path.iterdir()) == []


# --- trials that end early ----------------------------------------------------------------------


def test_trials_are_judged_after_every_warm_up():
    for epochs in (1, 2, 3, 10, 30, 50):
        proposer = make_plan(SearchOptions(settings={"epochs": epochs})).proposer
        assert all(proposer.space["kl_warmup_epochs"].high <= e < epochs for e in proposer.judged)


def test_a_batch_is_as_wide_as_the_stack_but_a_search_has_rounds():
    plans = [
        make_plan(SearchOptions(trials=t, seeds=s))
        for t, s in ((400, 1), (400, 3), (400, 20), (40, 1), (2, 1))
    ]
    assert [plan.proposer.at_once(16) for plan in plans] == [16, 5, 1, 10, 1]


@dataclass
class Uneven(TPE):
    """A search whose trials have another learning rate with every seed."""

    rates: tuple[tuple[float, ...], ...] = ()

    def configs(self, trial):
        """Return the settings of a trial's runs."""
        rates = self.rates[trial.number % len(self.rates)]
        runs = zip(super().configs(trial), rates, strict=True)
        return [run.replace(learning_rate=rate) for run, rate in runs]


@pytest.fixture
def train_uneven(tracking_uri, tmp_path, tiny):
    """Return a function that searches beside five trials among which all others look bad."""
    storage = open_storage(f"sqlite:///{tmp_path}/optuna.db")

    def train(rates, **changes) -> tuple[Queue, list[Run]]:
        plan = make_plan(SearchOptions(trials=5 + len(rates), seeds=2, settings={"epochs": 3}))
        given = {field.name: getattr(plan.proposer, field.name) for field in fields(TPE)[:-1]}
        given |= {"space": {"kl_weight": Range(0.02, 0.05)}, "rates": rates}
        plan = replace(plan, proposer=Uneven(**given | changes))
        queue = open_queue(storage, plan.name, plan.proposer, set)
        for value in (-1000.0, -999.0, -998.0, -997.0, -996.0):
            reports = dict.fromkeys(plan.proposer.judged, value)
            queue.study.add_trial(
                optuna.trial.create_trial(
                    value=value, intermediate_values=reports, user_attrs={"val/neg_elbo": value}
                )
            )
        work(queue, site(plan, tracking_uri, tiny), Steps(Terminal(), 1))
        return queue, tracking.connect(tracking_uri).runs(NAME)

    yield train
    storage.engine.dispose()


def site(plan, uri, data) -> Site:
    """Return where a plan is trained."""
    store = tracking.connect(uri)
    start = recording.log_in(store, plan.experiment, "Why?")
    return Site(plan, data, "cpu", store, start, None)


def test_a_pruned_trial_ends_all_its_runs_and_the_reason_is_kept(train_uneven, tracking_uri):
    queue, runs = train_uneven(((1e-3, 1e-3),) * 2)
    assert len(runs) == 4
    store = tracking.connect(tracking_uri)
    for run in runs:
        assert (run.status, run.tags["pruned"]) == ("KILLED", "true")
        assert run.tags["reason"].startswith("pruned at epoch 1: validation neg_elbo")
        history = store.client.get_metric_history(run.run_id, "val/neg_elbo")
        assert [m.step for m in history] == [1]
        assert not any(name.startswith("test/") for name in run.metrics)
    assert [t.state.name for t in queue.trials()[5:]] == ["PRUNED", "PRUNED"]
    frame = frames.load_study(NAME, tracking_uri=tracking_uri, pruned=True)
    assert frame["pruned"].all()
    assert len(frames.by_trial(frame, list(queue.proposer.space))) == 2
    assert queue.left() == 0


def test_a_diverging_seed_ends_its_trial_and_no_other(train_uneven):
    queue, runs = train_uneven(((1e-3, 1e30), (1e-3, 1e-3)), pruner="none")
    found = {(r.params["trial"], r.params["seed"]): r for r in runs}
    assert [found["5", s].status for s in "01"] == ["FINISHED", "FINISHED"]
    assert [found["6", s].status for s in "01"] == ["KILLED", "FAILED"]
    assert "another seed of its configuration diverged" in found["6", "0"].tags["reason"]
    assert "diverged in epoch 1" in found["6", "1"].tags["reason"]
    assert [t.state.name for t in queue.trials()[5:]] == ["COMPLETE", "FAIL"]
    assert queue.failed_keys() == []  # diverged for good
    assert queue.left() == 0


def test_a_trial_that_diverges_where_it_would_be_pruned_has_diverged(train_uneven):
    # Finite, but beyond any constant image; all its runs leave, since none can be summarised.
    base = RunConfig(model="linear", epochs=3)
    queue, (tame, wild) = train_uneven(((1e-3, 3.0),), base=base)
    assert wild.status == "FAILED"
    assert wild.tags["reason"].startswith("diverged in epoch 1: training mse is")
    assert (tame.status, "pruned" in tame.tags) == ("KILLED", False)
    assert [t.state.name for t in queue.trials()[5:]] == ["FAIL"]
    assert queue.failed_keys() == []


@pytest.mark.slow
def test_a_fresh_seed_that_diverges_is_not_trained_again(searched, tmp_path, tiny):
    home = Home(tmp_path / "copy")
    copy_home(searched.folder, home.folder)
    plan = make_plan(SearchOptions(trials=5, seeds=2, study_name="other", settings={"epochs": 2}))
    listed = search.confirm(plan.proposer, home.study(NAME))
    wild = listed.cells[0]._replace(config=listed.cells[0].config.replace(learning_rate=1e30))
    storage = open_storage(home.places[-1])
    for left in (6, 0):
        confirming = replace(listed, cells=[wild, *listed.cells[1:]])
        queue = open_queue(storage, "other/after", confirming, set)
        assert queue.left() == left
        work(queue, site(plan, home.uri, tiny), Steps(Terminal(), 1))
        assert [r.status for r in home.runs("other")] == ["FAILED"] + ["FINISHED"] * 5
    storage.engine.dispose()


# --- figures ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trials(searched):
    frame = frames.load_study(NAME, tracking_uri=searched.uri, pruned=True)
    space = make_plan(SearchOptions()).proposer.space
    table = frames.by_trial(frame[frame["part"] == "search"], list(space))
    return table.assign(front=table["trial"] < 3)


def test_the_history_holds_every_trial_and_the_best_so_far(trials):
    panel = plots.search_history(trials).axes[0]
    done, cut, best = panel.get_lines()[:3]
    assert sorted([*done.get_xdata(), *cut.get_xdata()]) == list(trials["trial"])
    finished = trials[~trials["pruned"]]["val/neg_elbo"]
    assert np.allclose(best.get_ydata(), np.minimum.accumulate(finished))


def test_each_setting_has_a_panel_with_every_trial(trials):
    figure = plots.search_parameters(trials)
    for panel, setting in zip(figure.axes, (n for n in PANELS if n in trials), strict=False):
        dots = np.concatenate([c.get_offsets() for c in panel.collections])
        assert sorted(dots[:, 1]) == pytest.approx(sorted(trials["val/neg_elbo"]))
        if is_numeric(trials[setting]):
            assert sorted(dots[:, 0]) == pytest.approx(sorted(trials[setting]))


def test_the_front_is_drawn_through_its_trials_alone(trials):
    front = trials[trials["front"]]
    knee = front.loc[front["val/neg_elbo"].idxmin()]
    panel = plots.search_front(trials, knee["trial"]).axes[0]
    line = next(line for line in panel.get_lines() if line.get_label() == "Pareto front")
    shown = front[front["val/neg_elbo"] <= top_of(trials["val/neg_elbo"])]
    assert sorted(line.get_ydata()) == sorted(shown["val/distortion"])
    (mark,) = [line for line in panel.get_lines() if line.get_label().startswith("knee")]
    assert mark.get_xydata().tolist() == [[knee["val/rate"], knee["val/distortion"]]]


def test_one_trial_is_drawn_as_one_point(trials):
    one = trials[~trials["pruned"]][:1].assign(front=True)
    number, value = one["trial"].item(), one["val/neg_elbo"].item()
    done, cut, best = plots.search_history(one).axes[0].get_lines()[:3]
    assert done.get_xydata().tolist() == best.get_xydata().tolist() == [[number, value]]
    assert len(cut.get_xdata()) == 0
    dots = [
        dot for c in plots.search_parameters(one).axes[0].collections for dot in c.get_offsets()
    ]
    assert [dot[1] for dot in dots] == [value]
    (front,) = [
        line
        for line in plots.search_front(one, number).axes[0].get_lines()
        if line.get_label() == "Pareto front"
    ]
    assert front.get_ydata().tolist() == [one["val/distortion"].item()]
    plots.search_importances(pd.DataFrame({"val/neg_elbo": {"kl_weight": 1.0}}))
