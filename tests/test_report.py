"""Reports hold all of a summary folder, safely, and nothing from anywhere else."""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from analysis import report
from analysis.report.page import table
from harness.tracking.addresses import without_password

ATTACK = "<script>alert('x')</script>&amp;"
RUNS = [
    {"run_id": "a" * 32, "name": "kl_weight=0 seed=0", "seed": "0", "neg_elbo": "-3.14159"},
    {"run_id": "b" * 32, "name": "kl_weight=1 seed=0", "seed": "0", "neg_elbo": ""},
]
TABLE = [
    ["kl_weight", "val/neg_elbo", "verdict"],
    ["0", "123.59 ± 57.30", "worst"],
    ["0.0215", "-27.61 ± 5.02", "best, 1 of 2"],
    ["1", "", ""],
]
SUMMARY = {
    "study": "kl_weight",
    "name": "kl_weight-digits",
    "dataset": "digits",
    "question": "Which weight?\n\nAnd at what cost?",
    "answer": "This one.\nIndeed.\n\nThat much.",
    "command": "python -m studies.kl_weight --dataset digits",
    "settings": {"values": [0.0, 0.0215], "hidden": [256, 64], "latent": "stochastic"},
    "versions": {"python": "3.11"},
    "dataset_digest": "8f26",
    "experiment_id": "7",
    "tracking_uri": "sqlite:////somewhere/mlflow.db",
    "figures": [{"file": "figures/line.png", "caption": "A line."}],
    "pictures": [{"file": "pictures/rows.png", "caption": "Two.", "rows": ["top", "bottom"]}],
    "tables": [{"file": "table.csv", "caption": "All numbers."}],
}
FOUND = {
    "verdict": ["kl_weight 0.0215 is best.", "It is distinguishable from 1 of 2.", "Train longer."],
    "warnings": ["It was still improving.", "One seed."],
    "best_row": 1,
}
"""Fields that summaries of earlier versions lack."""


def write_folder(folder: Path, **changes) -> Path:
    """Write a small summary folder, `changes` being other values in its `summary.json`."""
    for image, dots in (("figures/line.png", 150), ("pictures/rows.png", None)):
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        more = {"dpi": (dots, dots)} if dots else {}
        Image.new("L", (300, 200)).save(folder / image, **more)
    write_csv(folder / "table.csv", TABLE)
    write_csv(folder / "runs.csv", [list(RUNS[0]), *(list(run.values()) for run in RUNS)])
    (folder / "summary.json").write_text(json.dumps(SUMMARY | changes))
    return folder


def write_csv(path: Path, rows: list[list[str]]) -> None:
    lines = [",".join(f'"{cell}"' for cell in row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")


class Page(HTMLParser):
    """A parsed page: its tags with attributes, and the text inside each kind of tag."""

    VOID = frozenset({"meta", "img", "wbr"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[tuple[str, int]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        """Note a tag and begin to gather its text."""
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.texts.setdefault(tag, []).append("")
            self._open.append((tag, len(self.texts[tag]) - 1))

    def handle_endtag(self, tag):
        """End the innermost tag, which must be this one."""
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        """Add text to every open tag."""
        for tag, number in self._open:
            self.texts[tag][number] += data

    def attributes(self, tag: str, name: str) -> list[str]:
        """Return an attribute of all tags of a kind that have it."""
        return [values[name] for found, values in self.tags if found == tag and name in values]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "summary")


@pytest.fixture
def page(folder):
    return Page(report.build(folder))


def test_question_answer_and_origin_are_in_the_report(page):
    assert page.texts["title"] == ["kl_weight-digits: Which weight?"]
    assert page.texts["h1"] == ["Which weight?"]
    assert {"And at what cost?", "This one.\nIndeed.", "That much."} <= set(page.texts["p"])
    assert SUMMARY["command"] in page.texts["pre"]
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert facts["values"] == "0, 0.0215"
    assert facts["hidden"] == "256, 64"
    assert facts["python"] == "3.11"
    assert facts["dataset digest"] == "8f26"


def test_the_report_is_one_file_that_fetches_and_runs_nothing(folder, page):
    kinds = {tag for tag, _ in page.tags}
    assert not kinds & {"script", "link", "iframe", "object", "base", "form"}
    files = [folder / "figures/line.png", folder / "pictures/rows.png"]
    for source, file in zip(page.attributes("img", "src"), files, strict=True):
        kind, _, content = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content) == file.read_bytes()
    style = page.texts["style"][0]
    assert "url(" not in style
    assert "@import" not in style


def test_every_table_cell_is_shown_as_it_is(page):
    header, *body = TABLE
    width = len(header)
    assert page.texts["th"][:width] == header
    assert page.texts["td"][: width * len(body)] == [cell for row in body for cell in row]


def test_columns_of_numbers_and_no_others_stand_right(page):
    kinds = [attributes.get("class") for tag, attributes in page.tags if tag == "th"]
    assert kinds[: len(TABLE[0])] == ["number", "number", None]


@pytest.mark.parametrize(
    ("cell", "is_number"),
    [
        ("-27.61 ± 5.02", True),
        ("9.3 (6.5 to 10.0)", True),
        ("2 (of 3)", False),
        ("1e-05", True),
        ("–", True),
        ("-", True),
        ("9 %", True),
        ("nan", True),
    ]
    + [("7f403d31", False), ("pixels", False), ("2 of 3", False), ("(256, 64)", False)],
)
def test_what_a_number_is(cell, is_number):
    assert (table(["name"], [[cell]])["columns"][0]["kind"] == "number") == is_number


def test_images_have_captions_their_own_size_and_names_of_rows(page):
    assert page.texts["figcaption"] == [
        "Table 1. All numbers.",
        "Figure 1. A line.",
        "Figure 2. Two.",
    ]
    assert page.attributes("img", "alt") == ["A line.", "Two."]
    assert [style.split(";")[0] for style in page.attributes("img", "style")] == [
        "--width:192px",  # 300 dots at 150 an inch
        "--width:300px",
    ]
    assert page.texts["li"] == ["top", "bottom"]


def test_runs_lead_to_their_pages_in_mlflow(page):
    address = "http://127.0.0.1:5000/#/experiments/7/runs/"
    assert page.attributes("a", "href") == [address + run["run_id"] for run in RUNS]
    assert page.texts["a"] == [run["run_id"] for run in RUNS]
    cells = page.texts["td"][-12:]
    assert cells[:6] == [RUNS[0]["name"], "0", "-3.14", "–", "–", RUNS[0]["run_id"]]
    assert cells[8] == "–"
    assert page.texts["summary"] == ["All 2 runs"]
    assert any("sqlite:////somewhere/mlflow.db" in text for text in page.texts["pre"])


def test_the_best_epoch_stands_beside_the_last(tmp_path):
    folder = write_folder(tmp_path)
    best = {"epochs": "50", "val/mse": "0.2", "best/epoch": "7.0", "best/val/mse": "0.12345"}
    run = RUNS[0] | best
    write_csv(folder / "runs.csv", [list(run), list(run.values())])
    page = Page(report.build(folder))
    assert page.texts["td"][-10:-1] == [
        *(RUNS[0]["name"], "0", "-3.14", "–", "–"),
        *("50", "7", "0.2000", "0.1235"),
    ]


def test_runs_on_a_server_lead_there_and_passwords_stay_out(tmp_path):
    uri = "https://me:secret@tracking.example:5000/"
    path = report.build(write_folder(tmp_path, tracking_uri=uri))
    address = "https://tracking.example:5000/#/experiments/7/runs/"
    assert Page(path).attributes("a", "href")[0] == address + RUNS[0]["run_id"]
    assert "secret" not in path.read_text()


def test_a_path_with_an_at_sign_is_not_a_password():
    uri = "sqlite:////home/me@work/mlflow.db"
    assert without_password(uri) == uri


def test_every_text_is_escaped(tmp_path):
    texts = ("study", "name", "dataset", "question", "answer", "command", "dataset_digest")
    changes = {name: ATTACK for name in (*texts, "experiment_id", "tracking_uri")}
    changes["settings"] = changes["versions"] = {ATTACK: ATTACK}
    changes |= {"verdict": [ATTACK], "warnings": [f"{ATTACK}!"]}
    for kind in ("figures", "pictures", "tables"):
        changes[kind] = [SUMMARY[kind][0] | {"caption": ATTACK}]
    changes["pictures"][0]["rows"] = [ATTACK]
    folder = write_folder(tmp_path, **changes)
    write_csv(folder / "table.csv", [[ATTACK], [f"{ATTACK} ± {ATTACK}"]])
    runs = [list(RUNS[0]), [ATTACK, ATTACK, ATTACK, "1.5"]]
    write_csv(folder / "runs.csv", runs)
    path = report.build(folder)
    page = Page(path)
    assert "script" not in page.texts
    everywhere = ("title", "h1", "p", "pre", "dt", "dd", "figcaption", "li", "th", "td", "a")
    for tag in everywhere:
        assert any(ATTACK in text for text in page.texts[tag]), tag
    assert f"{ATTACK}!" in page.texts["li"]
    assert "script" not in Page(report.index([path], tmp_path / "index.html")).texts


def test_a_study_without_pictures_has_no_heading_for_them(tmp_path):
    page = Page(report.build(write_folder(tmp_path, pictures=[])))
    assert page.texts["h2"] == ["Numbers", "Figures", "How it was made", "Runs"]


def test_verdict_warnings_answer_and_best_row_come_before_the_figures(tmp_path):
    more = {"file": "differences.csv", "caption": "Differences."}
    folder = write_folder(tmp_path, **FOUND, tables=[*SUMMARY["tables"], more])
    write_csv(folder / "differences.csv", TABLE)
    page = Page(report.build(folder))
    order = [values["class"] for tag, values in page.tags if tag == "div" and "class" in values]
    assert order[:4] == ["verdict", "warnings", "reasons", "scroll"]
    shown = page.texts["p"].index(FOUND["verdict"][0])
    assert page.texts["p"][shown : shown + 3] == FOUND["verdict"]
    assert page.texts["li"][:2] == FOUND["warnings"]
    assert page.texts["h2"][:2] == ["Numbers", "Figures"]
    rows = [values.get("class") for tag, values in page.tags if tag == "tr"]
    assert rows[:8] == [None, None, "best", None, None, None, None, None]  # with two headers
    captions = [text for text in page.texts["figcaption"] if text.startswith("Table")]
    assert captions == ["Table 1. All numbers. Shaded: the best row.", "Table 2. Differences."]


def test_the_index_shows_the_verdict_and_the_warnings_in_place_of_the_answer(tmp_path):
    one = report.build(write_folder(tmp_path / "one", **FOUND))
    page = Page(report.index([one], tmp_path / "index.html"))
    assert {*FOUND["verdict"]} <= {*page.texts["p"]}
    assert page.texts["li"] == FOUND["warnings"]
    assert "That much." not in page.texts["p"]


def test_the_index_leads_to_every_report_with_its_answer(tmp_path):
    one = report.build(write_folder(tmp_path / "reports/one"))
    two = report.build(write_folder(tmp_path / "reports/two #2", question="Why?", answer="So."))
    out = report.index([one, two], tmp_path / "reports" / "index.html")
    page = Page(out)
    assert page.attributes("a", "href") == ["one/report.html", "two%20%232/report.html"]
    assert page.texts["h2"] == ["Which weight?", "Why?"]
    assert {"That much.", "So."} <= set(page.texts["p"])
