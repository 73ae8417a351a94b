"""Tables: files that are read and refused, own units, the exact linear VAE, and a whole study."""

import gzip
import json
import math
import shlex
import shutil
from datetime import date
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from exact import linear_vae
from real_stores import small_study
from scipy.stats import multivariate_normal
from torch import nn

from harness import Dataset, RunConfig, UserError, evaluate, load_dataset, load_run, network, train
from harness.data.dataset import split_rows
from harness.data.table import read_table
from harness.linear.pca import pca, pixels
from harness.linear.vae import LinearOptimum, linear_losses
from harness.metrics.evaluate import coefficients, measure
from harness.metrics.likelihood import importance_bounds
from harness.metrics.quality import measure_quality
from harness.models.files import load_model, save_model
from harness.models.vae import build
from harness.objective import with_decoder_variance
from harness.provenance import dataset
from harness.training.engine import check_runs
from studies import replay

NAMES = ["height", "width (cm)", "year", "share"]
KINDS = ["setosa", "versicolor", "virginica"]


def drawn(rows: int = 60, columns: int = 4) -> np.ndarray:
    """Return correlated columns in units that differ by powers of ten."""
    stream = np.random.default_rng(0)
    mixed = stream.standard_normal((rows, columns)) @ stream.standard_normal((columns, columns))
    return mixed * 10.0 ** np.arange(columns) + 5.0 * np.arange(columns) ** 4


VALUES = drawn()
ROWS = [[*map(repr, row), KINDS[i % 3]] for i, row in enumerate(VALUES.tolist())]
HEADER = [*NAMES, "kind"]


def text(rows: list[list[str]] = ROWS, header: list[str] = HEADER, between: str = ",") -> str:
    return "".join(between.join(row) + "\n" for row in [header, *rows])


def put(folder: Path, content: str | bytes, name: str = "my flowers.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(folder: Path, columns: dict[str, object]) -> Path:
    pa.parquet.write_table(pa.table(columns), folder / "my flowers.parquet")
    return folder / "my flowers.parquet"


def cells(values: dict[str, object] | None = None) -> dict[str, object]:
    columns = {name: VALUES[:, i] for i, name in enumerate(NAMES)}
    return columns | {"kind": [row[-1] for row in ROWS]} | (values or {})


# --- files that are read --------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path) -> Dataset:
    return read_table(put(tmp_path, text()), "kind")


def test_a_table_is_the_data_of_its_tensors(table):
    labels = [KINDS.index(row[-1]) for row in ROWS]
    given = {"columns": NAMES, "class_names": KINDS}
    tensors = Dataset.from_tensors("table-my-flowers", VALUES, labels, **given)
    assert (table.digest, table.name, table.columns) == (
        tensors.digest,
        tensors.name,
        tensors.columns,
    )
    assert (table.image_shape, table.is_image, table.options) == ((4,), False, {"label": "kind"})
    assert (table.class_names, table.classes) == (tuple(KINDS), 3)
    x = table.train.pixels(slice(None), torch.float64)
    assert x.mean(0).abs().max() < 1e-7
    assert (x.std(0, correction=0) - 1).abs().max() < 1e-7
    assert table.pixel_variance == pytest.approx(1, abs=1e-6)
    every = torch.cat([table.train.images, table.val.images, table.test.images])
    known = table.columns.standardized(torch.from_numpy(VALUES)).float()
    torch.testing.assert_close(every.sort(0).values, known.sort(0).values)


SAME = {
    "semicolons": text(between=";"),
    "tabs": text(between="\t"),
    "spaces": text(between=" , "),
    "a byte order mark": "\ufeff" + text(),
    "Windows' lines": text().replace("\n", "\r\n"),
    "empty lines": "\n" + text().replace("\n", "\n\n"),
    "quotes": text([[f'"{cell}"' for cell in row] for row in ROWS]),
    "no last newline": text().rstrip("\n"),
}


@pytest.mark.parametrize("content", SAME.values(), ids=SAME.keys())
def test_forms_of_a_csv_file_are_one_table(table, tmp_path, content):
    found = read_table(put(tmp_path, content), "kind")
    assert (found.digest, found.columns) == (table.digest, table.columns)


def test_compressed_and_parquet_files_are_the_same_table(table, tmp_path):
    path = put(tmp_path, gzip.compress(text().encode()), "my flowers.csv.gz")
    for found in (read_table(path, "kind"), read_table(parquet(tmp_path, cells()), "kind")):
        assert (found.name, found.digest) == (table.name, table.digest)


def test_the_digest_holds_columns_and_labels(table, tmp_path):
    others = [
        text(header=["a", *HEADER[1:]]),
        text([[*row[:-1], "setosa" if row[-1] == "virginica" else row[-1]] for row in ROWS]),
        text([["7.5", *ROWS[0][1:]], *ROWS[1:]]),
    ]
    found = {read_table(put(tmp_path, other), "kind").digest for other in others}
    found.add(read_table(put(tmp_path, text([row[:4] for row in ROWS], NAMES))).digest)
    assert len(found | {table.digest}) == 5


def test_numbers_of_any_type_are_columns(tmp_path):
    whole = np.arange(60)
    columns = {
        "int": whole,
        "byte": pa.array(whole, pa.uint8()),
        "long": pa.array([2**60 + int(n) * 2**40 for n in whole]),
        "half": whole.astype(np.float16),
        "decimal": [Decimal(int(n)) / 4 for n in whole],
        "dictionary": pa.array(whole % 7).dictionary_encode(),
        "bool": whole % 2 == 0,
        "text": [str(n) for n in whole],
    }
    data = read_table(parquet(tmp_path, columns))
    own = data.columns.in_own_units(data.train.images.double())
    assert data.columns.names == tuple(columns)
    assert sorted((own[:, 4] * 4).round().int().tolist()) == sorted(own[:, 0].round().int())
    assert set(own[:, 6].round().tolist()) == {0.0, 1.0}
    rows = [[str(n), str(n % 2 == 0), str(n % 3 == 0).lower()] for n in whole]
    table = read_table(put(tmp_path, text(rows, ["n", "even", "third"])))
    means = [float(np.mean(table.columns.in_own_units(table.train.images).numpy()[:, 1]))]
    assert table.columns.mean[1] == pytest.approx(means[0])


@pytest.mark.parametrize("kind", ["text", "whole", "bool"])
def test_labels_are_sorted_classes(tmp_path, kind):
    numbers = {"text": ["b", "a", "B"], "whole": ["10", "9", "-1"], "bool": ["True", "False"]}[kind]
    expected = {"text": ("B", "a", "b"), "whole": ("-1", "9", "10"), "bool": ("0", "1")}[kind]
    rows = [[*row[:-1], numbers[i % len(numbers)]] for i, row in enumerate(ROWS)]
    assert read_table(put(tmp_path, text(rows)), "kind").class_names == expected


# --- files that are refused -----------------------------------------------------------------------


VALIDATION = int(split_rows(60, None)[1][0])


def with_cell(value: str, line: int = 17, column: int = 1) -> str:
    rows = [list(row) for row in ROWS]
    rows[line - 2][column] = value
    return text(rows)


def put_column(values: list[str]) -> str:
    return text([[*row[:3], value, row[-1]] for row, value in zip(ROWS, values, strict=True)])


REFUSED = {
    "text": (with_cell("tall"), r"'width \(cm\)', line 17, has 'tall': give a finite number"),
    "a decimal comma": (with_cell('"1,5"'), "line 17, has '1,5'"),
    "no value": (with_cell(""), "line 17, has no value"),
    "NA": (with_cell("NA", 2), "line 2, has 'NA'"),
    "NaN": (with_cell("NaN", 61), "line 61, has 'NaN'"),
    "infinite": (with_cell("-inf"), "line 17, has '-inf'"),
    "too large for a float": (with_cell("1e400"), "line 17, has '1e400'"),
    "after empty lines": ("\n\n" + with_cell("x").replace("\n", "\n\n"), "line 35, has 'x'"),
    "after a cell of two lines": (with_cell("x").replace("setosa", '"se\ntosa"', 1), "line 18"),
    "True among numbers": (with_cell("True"), "line 17, has 'True'"),
    "dates": (put_column(["2020-01-01"] * 60), "'share', line 2, has '2020-01-01'.*--label"),
    "constant": (put_column(["0.5"] * 60), "column 'share' is constant in the training rows"),
    "huge": (put_column([f"{n}e300" for n in range(60)]), "'share' has values that are no finite"),
    "huge in a part": (
        with_cell("1e280", VALIDATION + 2),
        "standard deviations from the mean of the training",
    ),
    "a label without value": (with_cell("", column=4), "'kind', line 17, has no value: a label"),
    "the same name twice": (text(header=["year", *HEADER[1:]]), "'year' is there 2 times"),
    "an index of pandas": (text(header=["", *HEADER[1:]]), "column 1 is the index .* no name"),
    "a delimiter at the end": (text([[*r, ""] for r in ROWS], [*HEADER, ""]), "column 6 is"),
    "no header": (text(header=["1.5", "2", "-3", "4e5", "5"]), "first line is '1.5,2,-3,4e5,5'"),
    "a short row": (text([*ROWS[:9], ROWS[9][:3], *ROWS[10:]]), "Row #11: Expected 5 columns, got"),
    "a header alone": (text([]), "it has 0 rows: give at least 20"),
    "few rows": (text(ROWS[:19]), "it has 19 rows"),
    "nothing": ("", "it is empty"),
    "empty lines alone": ("\n\n", "it is empty"),
    "another encoding": (text().replace("setosa", "sétosa").encode("latin1"), "UTF-?8"),
    "UTF-16": (text().encode("utf-16"), "cannot be read .* give a CSV file in UTF-8"),
    "zeros": (b"\0" * 5000, "cannot be read|is"),
    "a field without end": (b'"' + b"a" * 200_000, "cannot be read|limit"),
    "no such label": (text(header=[*NAMES, "kinds"]), "no column 'kind' .* did you mean 'kinds'"),
    "no label like it": (text(header=[*NAMES, "x"]), "it has height, width"),
    "the label alone": (text([r[4:] for r in ROWS], ["kind"]), "is the label, and there is no"),
    "fractions as labels": (text([[*r[:4], "1.5"] for r in ROWS]), "has '1.5': a label is text"),
    "a class a row": (text([[*r[:4], str(i)] for i, r in enumerate(ROWS)]), "60 classes in 60"),
}


@pytest.mark.parametrize(("content", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_a_csv_file_that_cannot_be_used_is_refused(tmp_path, content, expected):
    path = put(tmp_path, content)
    with pytest.raises(UserError, match=expected) as refused:
        read_table(path, "kind")
    assert str(refused.value).startswith(f"table:{path}: ")
    assert "\n" not in str(refused.value)


BROKEN = {
    "None": ({"year": [None, *VALUES[1:, 2]]}, r"'year', row 0 \(the first is 0\), has no value"),
    "NaN": ({"year": [*VALUES[:-1, 2], math.nan]}, "row 59 .* has 'nan'"),
    "categories": ({"year": pa.array(["a", "b"] * 30).dictionary_encode()}, "row 0 .* has 'a'"),
    "text": ({"year": ["1"] * 40 + ["b"] * 20}, "row 40 .* has 'b'"),
    "dates": ({"year": [date(2020, 1, 1)] * 60}, "row 0 .* has '2020-01-01'"),
    "lists": ({"year": [[1.0]] * 60}, r"row 0 .* has '\[1.0\]'"),
    "nothing": ({"year": pa.nulls(60)}, "row 0 .* has no value"),
    "an index": ({"__index_level_0__": range(60)}, "column 6 is the index .* no name"),
    "a label of None": ({"kind": ["a"] * 59 + [None]}, "'kind', row 59 .* has no value: a label"),
    "labels of NaN": ({"kind": [1.0] * 59 + [math.nan]}, "'kind', row 59 .* has 'nan': a label"),
}


@pytest.mark.parametrize(("columns", "expected"), BROKEN.values(), ids=BROKEN.keys())
def test_a_parquet_file_that_cannot_be_used_is_refused(tmp_path, columns, expected):
    path = parquet(tmp_path, cells(columns))
    with pytest.raises(UserError, match=f"my flowers.parquet: .*{expected}") as refused:
        read_table(path, "kind")
    assert "\n" not in str(refused.value)


def test_a_file_that_is_none_is_refused(tmp_path):
    whole = parquet(tmp_path, cells()).read_bytes()
    (tmp_path / "folder.csv").mkdir()
    put(tmp_path, whole[:-10], "short.parquet")
    put(tmp_path, gzip.compress(text().encode())[:200], "short.csv.gz")
    for name, expected in {
        "none.csv": "there is no such file",
        "folder.csv": "it is a folder",
        "short.parquet": "cannot be read",
        "short.csv.gz": "cannot be read",
        "book.xlsx": "another ending than",
        f"{'a' * 300}.csv": "cannot be read|no such file",
    }.items():
        if "xlsx" in name:
            put(tmp_path, whole, name)
        with pytest.raises(UserError, match=expected) as refused:
            load_dataset(f"table:{tmp_path}/{name}")
        assert "\n" not in str(refused.value)


def test_options_of_other_data_are_refused(tmp_path):
    path = put(tmp_path, text())
    with pytest.raises(UserError, match="only folder:PATH and torchvision:PATH"):
        load_dataset(f"table:{path}", image_size=4)
    with pytest.raises(UserError, match="label='kind': only table:PATH and array:PATH"):
        load_dataset("digits", label="kind")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": "conv"}, "model='conv': table-my-flowers holds no images"),
        ({"likelihood": "bernoulli"}, "the columns of table-my-flowers are no pixels"),
        ({"batch_size": 64}, "table-my-flowers has 48 training rows"),
    ],
)
def test_settings_of_images_are_refused(table, change, expected):
    with pytest.raises(UserError, match=expected):
        check_runs([RunConfig(**change)], table)


# --- own units ------------------------------------------------------------------------------------


def test_a_model_takes_and_gives_the_columns_own_units(table, tmp_path):
    config = RunConfig(hidden=(8,), latent_size=2)
    model = build(config, table.image_shape, table.train.largest, table.columns).double()
    save_model(config, model, tmp_path)
    _, loaded = load_model(tmp_path)
    rows = torch.from_numpy(VALUES)
    mean, std = (torch.tensor(part, dtype=torch.float64) for part in table.columns[1:])
    x = (rows - mean) / std
    for same in (model, loaded):
        torch.testing.assert_close(same.encode(rows), same.posterior(x), rtol=1e-12, atol=1e-12)
        z = same.encode(rows).mean
        own = same.decoder(z) * std + mean
        torch.testing.assert_close(same.decode(z), own)
        torch.testing.assert_close(same.reconstruct(rows), own)
        assert same.sample(3).shape == (3, 4)
        ends = same.interpolate(rows[:2], rows[2:4], 3)[:, 0]
        torch.testing.assert_close(ends, own[:2])
    assert model.encode(rows.round().int()).mean.shape == (60, 2)
    with pytest.raises(UserError, match=r"rows of shape \(3, 5\): give \(B, 4\)$"):
        model.encode(torch.zeros(3, 5))
    with pytest.raises(UserError, match="no finite numbers"):
        model.encode(torch.full((1, 4), torch.nan))


# --- the exact linear VAE -------------------------------------------------------------------------

LINEAR = RunConfig(model="linear", latent_size=2)


def wide(rows: int = 60, columns: int = 40) -> Dataset:
    parts = {"train": range(18), "val": range(18, 30), "test": range(30, rows)}
    return Dataset.from_tensors("wide", drawn(rows, columns) / 1e9, rows=parts)


@pytest.fixture(params=["more rows than columns", "more columns than rows"])
def either(request, table) -> Dataset:
    return wide() if "more columns" in request.param else table


def test_components_are_those_of_the_standardised_columns(either):
    x = pixels(either.train)
    values = np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]
    assert pca(either).variances == pytest.approx(values, rel=1e-9, abs=1e-12)
    assert pca(either).variances.sum() == pytest.approx(either.pixels, rel=1e-6)
    assert pca(either).mean == pytest.approx(x.mean(0), abs=1e-12)


@pytest.mark.parametrize("variance", [0.01, 0.3, 100.0])
@pytest.mark.parametrize("part", ["train", "test"])
def test_the_exact_optimum_holds_on_a_table(either, variance, part):
    config = with_decoder_variance(LINEAR, variance, either.pixels)
    model, split = linear_vae(config, either), getattr(either, part)
    best = LinearOptimum(pca(either), 2, variance, split)

    # The marginal of the model is a Gaussian whose density the closed form has.
    columns = model.decoder[0].weight.detach().numpy()
    covariance = columns @ columns.T + variance * np.eye(either.pixels)
    marginal = multivariate_normal(model.decoder[0].bias.detach().numpy(), covariance)
    exact = marginal.logpdf(pixels(split))
    assert best.log_likelihood == pytest.approx(exact.mean(), rel=1e-9)

    # At the optimum the posterior is exact, and so is importance sampling with a single sample.
    given = torch.tensor(variance, dtype=torch.float64)
    bounds = importance_bounds(config, model, split, given, (1, 4)).bounds
    for bound in bounds.values():
        assert bound.numpy() == pytest.approx(exact, rel=1e-9)

    # The gap to itself is zero but for the noise of the posterior samples.
    noise = torch.zeros(len(split), 2, dtype=torch.float64)
    linear = torch.from_numpy(linear_losses([config], either, split))[0]
    known = coefficients(config, either.pixels, model.device)
    found = measure(config, model, split, 0, noise, known, linear)
    spread = np.square(columns).sum(0) * np.minimum(1, variance / best.known.variances[:2])
    without = best.loss - spread.sum() / len(covariance)
    assert found["loss"].item() == pytest.approx(without, rel=1e-9)
    assert found["gap_to_linear"].item() == pytest.approx(100 * (1 - without / best.loss), abs=1e-6)


def test_another_variance_than_the_models_converges_to_the_closed_form(table):
    config = with_decoder_variance(LINEAR, 0.2, table.pixels)
    model, variance = linear_vae(config, table), 0.3
    columns = model.decoder[0].weight.detach().numpy()
    covariance = columns @ columns.T + variance * np.eye(4)
    marginal = multivariate_normal(model.decoder[0].bias.detach().numpy(), covariance)
    given = torch.tensor(variance, dtype=torch.float64)
    found = importance_bounds(config, model, table.train, given, (1, 512)).bounds
    exact = marginal.logpdf(pixels(table.train))
    assert found[512].numpy() == pytest.approx(exact, abs=0.15)
    assert found[512].mean().item() == pytest.approx(exact.mean(), abs=0.01)
    assert found[1].mean() < found[512].mean()


def test_training_reaches_the_optimum_of_a_table():
    data = Dataset.from_tensors("normal", drawn(500))
    base = LINEAR.replace(learning_rate=0.02, batch_size=100, epochs=120)
    config = with_decoder_variance(base, 0.2, data.pixels)
    *_, record = train([config], data, device="cpu", dtype=torch.float64)
    model, exact = record.model(0), linear_vae(config, data)
    x = data.train.pixels(slice(None), torch.float64)
    covariances = [
        run.decoder[0].weight.detach() @ run.decoder[0].weight.detach().T for run in (model, exact)
    ]
    torch.testing.assert_close(*covariances, atol=0.06, rtol=0)
    torch.testing.assert_close(model(x), exact(x), atol=0.1, rtol=0)
    (metrics,) = evaluate([(config, model)], data)
    assert abs(metrics["gap_to_linear"]) < 10


# --- networks, and stacks -----------------------------------------------------------------


@pytest.mark.parametrize("config", [RunConfig(hidden=(8,)), RunConfig(sigma="learned"), LINEAR])
def test_the_written_gradient_is_that_of_autograd(table, monkeypatch, config):
    config = config.replace(epochs=2, batch_size=16, latent_size=2)
    found = []
    for covered in (True, False):
        if not covered:
            monkeypatch.setattr("harness.training.step.covers", lambda *_: False)
        *_, record = train([config], table, device="cpu", dtype=torch.float64)
        found.append({name: value.item() for name, value in record.val.items()})
    assert found[0] == pytest.approx(found[1], rel=1e-9, nan_ok=True)


def test_a_users_network_is_given_the_number_of_columns(registered, table, together):
    given = []

    @network("of_rows", output="sigmoid")
    def of_rows(data_shape, latent_size):
        given.append(data_shape)
        (columns,) = data_shape
        return nn.Linear(columns, 2 * latent_size), nn.Linear(latent_size, columns)

    configs = [RunConfig(model="of_rows", latent_size=2, epochs=2, seed=seed) for seed in range(2)]
    *_, record = train(configs, table, device="cpu")
    assert set(given) == {(4,)}
    runs = [(config, record.model(s)) for s, config in enumerate(configs)]
    assert not runs[0][1].has_sigmoid  # columns have no range
    found = measure_quality(runs, table)
    assert found[0].keys() >= {"neg_log_likelihood", "mutual_information", "probe_accuracy"}
    assert not [name for name in found[0] if "frechet" in name]


# --- a study --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_of_a_table_and_its_replay(empty_database, tmp_path, monkeypatch, capsys):
    path = put(tmp_path, text())
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    words = "--values 0.05 2 --seeds 1 --epochs 2 --hidden 6 --latent-size 3 --label kind"
    command = ["--dataset", f"table:{path}", *words.split()]
    small_study("kl_weight", command, tmp_path)
    printed = capsys.readouterr().out
    assert "on table-my-flowers (4 columns)" in printed
    assert "nats / row" in printed
    assert not {"image", "pixel²"} & set(printed.split())

    folder = tmp_path / "reports" / "kl_weight-table-my-flowers"
    assert {file.name for file in (folder / "pictures").iterdir()} == {"latents.png"}
    summary = json.loads((folder / "summary.json").read_text())
    assert str(tmp_path) not in summary["command"]
    captions = [exhibit["caption"] for exhibit in summary["figures"] + summary["pictures"]]
    assert "Posterior means of 6 test rows" in captions[-1]
    assert not [text for text in [*captions, summary["answer"]] if "image" in text]

    # The printed command, typed beside the file, continues the study: nothing is left to train.
    _, _, page, *words = shlex.split(summary["command"])
    assert page == "studies.kl_weight"
    small_study("kl_weight", words, tmp_path)
    assert "epoch 1/" not in capsys.readouterr().out

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = next(r for r in runs_of(uri) if r.tags["role"] == "run")
    model = load_run(run.run_id, uri).model
    rows = torch.from_numpy(VALUES[:5]).float()
    assert model.reconstruct(rows).shape == (5, 4)
    assert abs(model.sample(100)[:, 2].mean() - VALUES[:, 2].mean()) < VALUES[:, 2].std()
    replay.main([run.run_id, "--tracking-uri", uri, "--data-dir", "my flowers.csv"])
    assert "Reproduced: all" in capsys.readouterr().out
    put(tmp_path, with_cell("7.5"))
    with pytest.raises(SystemExit):
        replay.main([run.run_id, "--tracking-uri", uri, "--data-dir", "my flowers.csv"])
    assert "is not the dataset of run" in capsys.readouterr().err


def test_a_record_without_a_label_is_read_without(tmp_path):
    path = put(tmp_path, text([row[:4] for row in ROWS], NAMES))
    stored = {"dataset": dataset(read_table(path))}
    record = SimpleNamespace(made_with=json.loads(json.dumps(stored)), run_id="1")
    assert replay.load(record, path).digest == stored["dataset"]["digest"]
    with pytest.raises(UserError, match="--data-dir none.csv: table:.* no such file"):
        replay.load(record, Path("none.csv"))


def runs_of(uri: str) -> list:
    from harness import tracking

    return tracking.connect(uri).runs("kl_weight-table-my-flowers")
