"""Texts of others are shown and harm nothing, broken records are named, no password is printed."""

import io
import json
import logging
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote_plus

import numpy as np
import optuna
import pandas as pd
import pytest
import sqlalchemy
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from analysis import frames, plots, report, tables
from harness import RunConfig, UserError, load_run, provenance
from harness.errors import printable
from harness.tracking import connect
from harness.tracking import record as recording
from harness.tracking.addresses import reason, tracking_address, without_password, without_secrets
from harness.tracking.runs import PROVENANCE, Run
from harness.tracking.store import trusting
from studies import kl_weight, replay
from studies.runner import cli
from studies.runner.database import checked_address
from studies.runner.queue import Queue, noted
from studies.runner.terminal import ANSWERED, Terminal
from tests.test_report import write_folder

# --- passwords -----------------------------------------------------------------------------------

SECRET = "hunter2"
ENDS = st.text(st.sampled_from("@:/?#&=%+;,.'\"\\ \n1a["), max_size=4)


@settings(max_examples=25, deadline=None)
@given(ENDS, ENDS)
def test_no_part_of_a_password_is_shown(before, after):
    password = f"{before}{SECRET}{after}"
    parts = {"username": "u", "password": password, "host": "h", "port": 5432, "database": "d"}
    exact = sqlalchemy.URL.create("postgresql+psycopg", **parts).render_as_string(
        hide_password=False
    )
    assert without_secrets(exact) == "postgresql+psycopg://h:5432/d"
    for scheme in ("postgresql", "http", "postgresql+psycopg"):
        for name in ("password", "sslpassword", "sslkey", "access_token", "%70assword"):
            address = f"{scheme}://h/d?a=b&{name}={quote_plus(password)}"
            assert without_secrets(address) == f"{scheme}://h/d"
            assert SECRET not in without_password(f"cannot open {address}: no")
            assert SECRET not in without_secrets(f"{scheme}://h/d?{name}={password}")
        # As it must not be written, and with a mistyped scheme.
        for address in (f"{scheme}://u:{password}@h/d", f"{scheme}:/u:{password}@h/d"):
            assert SECRET not in without_secrets(address)
    if not set(before + after) & {" ", "\n"}:
        assert SECRET not in without_password(f"at postgresql://u:{password}@h/d, no answer")


KEPT = (
    *("sqlite:////home/me@work/mlflow.db", "sqlite:///a[/b].db", "sqlite:///m.db?mode=ro"),
    *("http://localhost:5000", "https://host/path?a=b", "postgresql://h:5432/d?connect_timeout=4"),
    *("/home/me@work/mlruns", "mlruns", r"sqlite:///C:\me@work\m.db", "postgresql://[::1]:5432/d"),
)


@pytest.mark.parametrize("address", KEPT)
def test_an_address_without_secrets_is_shown_as_it_is(address):
    assert without_secrets(address) == address
    assert without_password(f"{address} is not there") == f"{address} is not there"


MISTYPED = (
    f"--storag=postgresql://u:12/{SECRET}@h/d --tracking-url https://{SECRET}@h {SECRET}@h",
    f"--storage=postgresql://h/d?sslpassword={SECRET} --epochz 3",
    f"--epochs postgresql://u:{SECRET}@h/d",
    f"postgresql://u:{'x' * 90}{SECRET}@h/d",  # longer than the parser's lines
)


@pytest.mark.parametrize("words", MISTYPED)
def test_the_line_on_a_mistyped_option_has_no_password(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(kl_weight.STUDY, words.split())
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert words.split()[0].partition("=")[0][:9] in printed.err or "--epochz" in printed.err
    assert SECRET not in printed.err


@pytest.mark.parametrize(
    "address",
    [f"postgresql://u:a@{SECRET}@h/d", f"postgresql://u:{SECRET}@h:x/d", f"pg://u:{SECRET}@h/d"]
    + [f"postgresql://u:a@b:{SECRET}@h/d", f"postgresql//u:{SECRET}@h/d", f"u:{SECRET}@h"]
    + [f"http://u:12/{SECRET}@h", f"https://{SECRET}@h", f"http://h?token={SECRET}"],
)
def test_a_refused_address_is_shown_without_its_password(address):
    for check in (checked_address, tracking_address):
        with pytest.raises(UserError) as refused:
            check(address)
        assert SECRET not in str(refused.value)


def test_reasons_and_messages_of_libraries_have_no_passwords(capsys):
    error = OSError(f"cannot connect to postgresql://u:{SECRET}@h/d")
    assert reason(error) == "cannot connect to postgresql://h/d"
    assert recording.interruption(error)[1] == "OSError('cannot connect to postgresql://h/d')"
    terminal = Terminal()
    with terminal.shown():
        logging.getLogger("harness").info("%s: waiting", error)
        logging.getLogger("harness").warning("%s: waiting", error)
    printed = capsys.readouterr()
    assert "postgresql://h/d: waiting" in printed.out
    assert SECRET not in printed.out + printed.err


# --- texts where they are shown ------------------------------------------------------------------

NASTY = "[red]x[/] [link=http://a]b[/] \x1b[2J\x1b]8;;http://a\x07\r\x9b31m\u202e$\\foo_$ <b>|`c`"
"""A value with markup of a terminal and of rich, mathtext, HTML and Markdown."""


def test_control_characters_are_shown_as_escapes():
    assert printable("a\x1b[2J\x07\r\x9b\u202e\udc80b") == r"a\x1b[2J\x07\r\x9b\u202e\udc80b"
    assert printable("é 日本\t1\n2 ± ² 👍🏽") == "é 日本\t1\n2 ± ² 👍🏽"


def test_a_terminal_obeys_no_text(capsys):
    frame = pd.DataFrame({"activation": [NASTY, "b"], "neg_elbo": [1.0, 2.0]})
    source = SimpleNamespace(name=NASTY)
    plan = SimpleNamespace(name=NASTY, source=source, sentence=NASTY, experiment="e", command="c")
    outcome = SimpleNamespace(plan=plan, table=frame, folder=Path(NASTY[:30]))
    answered = ANSWERED | {"answer": NASTY, "verdict": [NASTY], "warnings": [NASTY]}
    vars(outcome).update(answered, experiment_id="7", failures=[NASTY], written="")
    terminal = Terminal()
    terminal.out.width = 1000
    terminal.plan(plan, 64)
    terminal.outcome(outcome, "sqlite:///m.db")
    terminal.line(NASTY)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert printable(printed) == printed
    assert printed.count(printable(NASTY)) >= 4
    assert not trusting(trust=None)(NASTY)


def test_an_error_is_one_printable_line(capsys):
    with pytest.raises(SystemExit), cli.clear_errors([]):
        raise UserError(f"{NASTY}\nerror: another")
    printed = capsys.readouterr().err
    assert printed == f"error: {printable(NASTY)}\\nerror: another\n"


def test_a_question_whether_to_trust_code_shows_all_of_it(capsys, monkeypatch):
    terminal = io.StringIO("n\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    assert not trusting(trust=None)("evil()\n\x1b[1A\x1b[2Kgood()\n")
    assert capsys.readouterr().err.startswith("evil()\n\\x1b[1A\\x1b[2Kgood()\n")


def test_markdown_shows_texts_unchanged():
    table = tables.markdown(pd.DataFrame({"val/neg_elbo": ["-1.5 ± 0.2"], "a_b": ["a|b\n<img>"]}))
    assert table.splitlines() == [
        *("| val/neg_elbo | a_b |", "| --: | --: |"),
        r"| -1.5 ± 0.2 | a\|b &lt;img&gt; |",
    ]
    assert tables.unmarked("See [x](javascript:y).\n\nSo.") == "See \\[x\\](javascript:y).\n\nSo."


FORMULAS = [r"$\foo$", "a$b", r"\$", "$1 and $2"]
"""Names of which matplotlib cannot draw the first, taken for a formula."""


@pytest.mark.filterwarnings("error")
def test_matplotlib_draws_texts_unchanged():
    frame = pd.DataFrame({"activation": FORMULAS, "mse": [1.0, 2, 3, 4], "seed": 0})
    frame["class_names"] = json.dumps(FORMULAS)
    plain = frame.map(plots.plain_text)
    assert plain[["mse", "seed"]].equals(frame[["mse", "seed"]])
    assert frames.class_names(plain) == dict(enumerate(FORMULAS))
    assert plain.map(plots.plain_text).equals(plain)
    figure = Figure(figsize=(2, 2))
    figure.subplots().plot(plain["activation"], plain["mse"])  # names are labels of ticks
    figure.savefig(io.BytesIO(), dpi=20)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_every_figure_shows_texts_unchanged():
    frame = pd.DataFrame({"activation": np.repeat(FORMULAS, 2), "seed": [0, 1] * 4})
    numbers = ("neg_elbo", "mse", "rate", "active_units", "val/neg_elbo", "distortion")
    frame = frame.assign(**{name: np.arange(8.0) + 1 for name in numbers}, latent_size=10)
    frame["mse_class/0"], frame["kl/0"], frame["class_names"] = 0.5, 1.0, json.dumps(FORMULAS[:1])
    plain = frame.assign(sigma="fixed").map(plots.plain_text)
    for draw, _ in plots.usual("activation", "").values():
        draw(plain).savefig(io.BytesIO(), dpi=20)
    figure = plots.class_errors(plain, "activation")
    figure.savefig(io.BytesIO(), dpi=20)
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == [r"\$\foo\$"]
    points = pd.DataFrame({"model": FORMULAS[:1], "x": [1.0], "y": [2.0], "class": FORMULAS[:1]})
    plots.latent_scatter(points).savefig(io.BytesIO(), dpi=20)


def test_a_report_has_no_control_characters_and_no_file_from_elsewhere(tmp_path):
    (tmp_path / "private.csv").write_text("my,secret\n1,2\n")
    folder = write_folder(tmp_path / "s", answer=f"{NASTY} \udc80")
    page = report.build(folder).read_text()
    assert printable(page) == page
    for name in (str(tmp_path / "private.csv"), "../private.csv"):
        for kind in ("tables", "figures"):
            write_folder(folder, **{kind: [{"file": name, "caption": "Mine."}]})
            with pytest.raises(UserError, match="names a file elsewhere"):
                report.build(folder)


# --- records -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(empty_database, tmp_path_factory, data) -> SimpleNamespace:
    """Write a finished run without training it; tests change its files and numbers."""
    folder = tmp_path_factory.mktemp("recorded")
    shutil.copy(empty_database, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    store = connect(uri)
    made = provenance.provenance(data, "cpu")
    log = store.start(store.experiment("e-digits", "Why?"), "k", "a run", {"role": "run"}, {})
    log.metrics({"val/mse": 0.5}, 1)
    log.text(json.dumps(made), PROVENANCE)
    log.text(RunConfig(epochs=1).to_json(), "model/config.json")
    log.end()
    run = store.runs("e-digits")[0].run_id
    files = folder / "mlruns" / "e-digits" / run / "artifacts"
    return SimpleNamespace(store=store, uri=uri, run=run, made=made, files=files)


DEEP = "[" * 100_000
RECORDS = [
    # file, its text or other parts, what the line has beside file and run
    (PROVENANCE, DEEP, "RecursionError"),
    (PROVENANCE, '"\udcff"', "UnicodeDecodeError"),
    (PROVENANCE, {"device": None}, "device is None, no dict"),
    (PROVENANCE, {"device": {}}, "KeyError: 'kind'"),
    (PROVENANCE, {"threads": {"blas": "x"}}, "threads blas is 'x', no int"),
    (PROVENANCE, {"parts": {"term ../../x": "0", "sauce x": "0"}}, "cannot be read"),
    (PROVENANCE, {"parts": 5}, "TypeError"),
    ("model/config.json", DEEP, "configuration is not JSON"),
    ("model/config.json", '{"epochz": 1}', "unknown fields ['epochz']"),
    ("model/config.json", '{"epochs": NaN}', "epochs=nan: give a whole number"),
]


@contextmanager
def changed(recorded: SimpleNamespace, file: str, text: str | dict) -> Iterator[None]:
    """Give an artifact another text, or a provenance other parts."""
    path = recorded.files / file
    before = path.read_bytes()
    text = json.dumps(recorded.made | text) if isinstance(text, dict) else text
    path.write_text(text, "utf-8", "surrogateescape")
    yield
    path.write_bytes(before)


@pytest.mark.parametrize(("file", "text", "why"), RECORDS)
def test_a_broken_record_is_named_with_its_cause(recorded, file, text, why):
    with changed(recorded, file, text), pytest.raises(UserError) as refused:
        recorded.store.record(recorded.run)
    assert f"{file} of run {recorded.run}" in str(refused.value) or why == "cannot be read"
    assert why in str(refused.value)


def test_a_broken_record_ends_a_command_in_one_line(recorded, capsys):
    with (
        changed(recorded, PROVENANCE, {"platform": ["\x1b[31m\n"]}),
        pytest.raises(SystemExit) as ended,
    ):
        replay.main([recorded.run, "--tracking-uri", recorded.uri])
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert "platform is ['\\x1b[31m\\n'], no str" in printed.err


def test_a_model_that_cannot_be_loaded_is_named_by_its_run(recorded):
    with pytest.raises(UserError, match=f"run {recorded.run}: model holds no loadable model"):
        load_run(recorded.run, recorded.uri)


@pytest.mark.parametrize("value", ["abc", "", b"\x00"])
def test_text_as_a_metric_is_named(recorded, value):
    def put(metric):
        with closing(sqlite3.connect(recorded.uri.removeprefix("sqlite:///"))) as database:
            for table in ("metrics", "latest_metrics"):
                database.execute(f"update {table} set value = ? where key = 'val/mse'", [metric])
            database.commit()

    put(value)
    try:
        for read in (recorded.store.run, recorded.store.history):
            with pytest.raises(UserError, match=f"metric 'val/mse' of run {recorded.run}"):
                read(recorded.run)
    finally:
        put(0.5)


def test_names_of_classes_that_are_none_are_named():
    for text in (DEEP, "5", "{"):
        with pytest.raises(UserError, match="parameter class_names"):
            frames.class_names(pd.DataFrame({"class_names": [text]}))
    assert frames.class_names(pd.DataFrame({"class_names": ["[1, null]"]})) == {0: "1", 1: "None"}


def test_a_place_may_be_any_text(tracking_uri):
    store = connect(tracking_uri)
    experiment = store.experiment("e-digits", "Why?")
    for place in ("10", "\x1b[31m", "9", "none"):
        tags = {} if place == "none" else {"place": place}
        store.start(experiment, place, place, tags, {}).end()
    names = [run.name for run in store.runs("e-digits")]
    assert [name for name in names if name != "\x1b[31m"] == ["none", "9", "10"]


# --- folders -------------------------------------------------------------------------------------


def record_of(made: dict) -> SimpleNamespace:
    given = {"digest": "0", "image_shape": [1, 4, 4]} | made
    return SimpleNamespace(made_with={"dataset": given}, run_id="1")


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ({"name": "folder:HERE/private"}, "was trained on tensors"),
        ({"name": "folder-HERE/private"}, "folder:DATA: no image in it"),
        ({"name": "torchvision-../../HERE/private"}, "no such classification set"),
        ({"name": "array-x", "options": {"label": "HERE/private/labels.npy"}}, "no such file"),
        ({"name": "array-x", "options": {"label": "../private/labels.npy"}}, "no such file"),
        ({"name": "array-x", "options": {"label": ["x"]}}, "TypeError"),
        ({"name": "folder-x", "options": {"root": "HERE/private"}}, "'root'"),
        ({"name": "folder-x", "options": {"image_size": [1e9, "x"]}}, "image_size="),
        ({"name": "folder-x", "options": {"shape": 5}}, "'shape'"),
        ({"name": "folder-x", "options": [1]}, "TypeError"),
    ],
)
def test_a_record_chooses_no_folder(made, why, tmp_path, monkeypatch):
    (tmp_path / "private").mkdir()
    np.save(tmp_path / "private/labels.npy", np.arange(60) % 2)
    place = tmp_path / "data"
    if "array" in made["name"]:
        place = tmp_path / "x.npy"
        np.save(place, np.zeros((60, 4, 4), np.uint8))
    else:
        place.mkdir()
    made = json.loads(json.dumps(made).replace("HERE", str(tmp_path)))
    with pytest.raises(UserError) as refused:
        replay.load(record_of(made), place)
    assert why.replace("DATA", str(place)) in str(refused.value)


@pytest.mark.parametrize("name", ["seed", "beta", "decoder_variance"])
def test_a_parameter_that_is_no_number_is_named(name):
    runs = [Run("1", "a", "FINISHED", {name: value}, {}, {}) for value in ("0", "abc")]
    with pytest.raises(UserError, match=f"^parameter {name}: ValueError: .*abc"):
        frames.tidy(runs)


@pytest.mark.parametrize(
    ("name", "value"),
    [("cell", "x"), ("keys", 5), ("process", 5), ("result", [1]), ("result", {"a": 5})],
)
def test_an_attribute_of_a_trial_that_is_none_of_ours_is_named(name, value):
    study = optuna.create_study(study_name="s")
    study.add_trial(optuna.create_trial(value=1.0, user_attrs={name: value}))
    storage = SimpleNamespace(url="sqlite:///none.db")
    trials = Queue(study, storage, None, set).trials
    with pytest.raises(UserError, match="trial 0") as refused:
        noted(trials()[0])
    assert name in str(refused.value)
