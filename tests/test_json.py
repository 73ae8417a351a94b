"""`--json`: one document of every command on standard output, of docs/outcome.schema.json."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pandas as pd
import pytest

from studies import all as every
from studies import kl_weight, reproduce, runs, search, sweep, translate
from studies.runner import cli
from studies.runner.terminal import ANSWERED, records

PLAN = SimpleNamespace(
    name="x", source=SimpleNamespace(name="digits"), sentence="3 runs", command="python x"
)
DOCS = Path(__file__).parents[1] / "docs"
SCHEMA = json.loads((DOCS / "outcome.schema.json").read_text())


def document(text: str) -> dict:
    """Return the only document of a text, valid by the schema; NaN is no JSON."""
    found = json.loads(text, parse_constant=pytest.fail)
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    return found


def printed(main, words: list[str], capfd) -> dict:
    """Run a command with --json and return its document, whose exit code is its own."""
    code = 0
    try:
        main([*words, "--json"])
    except SystemExit as end:
        code = end.code
    found = document(capfd.readouterr().out)
    assert found["exit_code"] == code
    return found


def test_the_schema_is_one_and_allows_no_other_field():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    study = {"study": "x", "dataset": "digits", "status": "finished"}
    document(json.dumps({**study, "exit_code": 0}))
    for wrong in ({**study, "exit_code": 0, "x": 1}, {**study, "exit_code": 7}, study, {"x": 1}):
        with pytest.raises(jsonschema.ValidationError):
            document(json.dumps(wrong))


def test_the_example_of_the_page_is_a_document():
    example = (DOCS / "json.md").read_text().split("```json\n")[1].split("```")[0]
    found = document(example)
    assert found["best"] not in found["not_distinguishable"]
    assert found["table"][found["best_row"]]["kl_weight"] == found["best"]


def main(args):
    cli.main(kl_weight.STUDY, args)


REFUSED = {
    # command -> its words, a part of the error
    "study": (main, ["--seeds", "0"], "seeds=0"),
    "option": (main, ["--sed", "0"], "--sed"),
    "search": (search.main, ["--trials", "0"], "trials=0"),
    "sweep": (sweep.main, ["nothing=1"], "nothing"),
    "all": (every.main, ["--values", "1"], "studies differ in it"),
    "ledger": (reproduce.main, ["--workers", "0"], "workers=0"),
    "translation": (translate.main, ["blok"], "blok"),
    "runs": (runs.main, ["best"], "name a STUDY"),
}


@pytest.mark.parametrize(("command", "words", "error"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refusal_is_a_document(command, words, error, capfd):
    found = printed(command, words, capfd)
    assert found["exit_code"] == 2
    assert error in found["error"]
    assert ("studies" in found) == (command is every.main)


def test_a_fault_of_the_code_is_a_document_and_a_traceback(capfd):
    with pytest.raises(ZeroDivisionError), cli.clear_errors(["--json"]):
        1 / 0  # noqa: B018
    found = document(capfd.readouterr().out)
    assert found["exit_code"] == 1
    assert "ZeroDivisionError" in found["error"]


def test_dry_runs_are_a_document(tmp_path, capfd):
    tracking_uri, storage = f"sqlite:///{tmp_path}/m.db", f"sqlite:///{tmp_path}/o.db"
    stores = ["--tracking-uri", tracking_uri, "--storage", storage]
    found = printed(every.main, ["--dry-run", "--epochs", "1", *stores], capfd)["studies"]
    names = ("kl_weight", "latent_size", "kl_normalization", "elbo_vs_mse", "search")
    assert [study["study"] for study in found] == [f"{name}-digits" for name in names]
    for name, study in zip(names, found, strict=True):
        assert study["status"] == "planned"
        assert (study["tracking_uri"], study["storage"]) == (tracking_uri, storage)
        assert study["command"].startswith(f"python -m studies.{name} --dataset digits")
        assert "duration: not known" in study["estimate"]
        assert study["disk"] == "not known (no finished run like these here)"
        assert study["finished_runs"] == 0 < study["missing_runs"]


def test_translations_and_their_list_are_documents(capfd):
    listed = printed(translate.main, [], capfd)["conventions"]
    assert len(listed) > 10
    for name in [each["name"] for each in listed]:
        found = printed(translate.main, [name], capfd)
        assert found["equal_weights"].keys() == {"pixels", "batch", "latent", "sum"}


def test_what_other_processes_print_is_no_part_of_the_document(capfd):
    with cli.clear_errors(["--json"]) as terminal:
        print("of a library")
        os.write(1, b"of C\n")
        subprocess.run([sys.executable, "-c", "print('of a process')"], check=True)
        terminal.plan(PLAN, 64)
    found, shown = capfd.readouterr()
    assert document(found)["study"] == "x"
    assert all(f"of {who}\n" in shown for who in ("a library", "C", "a process"))


def test_what_is_no_number_is_null(capfd):
    table = pd.DataFrame({"hidden": ["6,4"], "mse": [math.nan], "rate": [math.inf], "seeds": [3]})
    with cli.clear_errors(["--json"]) as terminal:
        terminal.plan(PLAN, 64)
        best = {"a": (math.nan, 1)}
        terminal.show({**ANSWERED, "report": None, "best": best, "table": records(table)})
    found = document(capfd.readouterr().out)
    assert found["table"] == [{"hidden": "6,4", "mse": None, "rate": None, "seeds": 3}]
    assert found["best"] == {"a": [None, 1]}
