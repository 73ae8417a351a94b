"""Arrays, labels, rows and numbers as people have them: accepted, or refused in one line."""

import gzip
import logging
import os
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision

from harness import Dataset, RunConfig, UserError, load_dataset, train
from harness.data import array as arrays
from harness.data import mnist
from harness.objective import Batch, Posterior
from harness.parts.terms import mmd
from harness.tracking.record import divergence
from studies import kl_weight, search
from studies.runner.options import Options
from studies.runner.study import make_plan

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (60, 4, 6), dtype=np.uint8)
FLOATS = GREY / np.float32(255)
TABLE = RNG.normal(size=(60, 3))
CLASSES = np.arange(60) % 3
NAMES = np.array(["bee", "ant", "cat"])[CLASSES]  # not in the order of their first rows
READ_ONLY = GREY.copy()
READ_ONLY.flags.writeable = False
SHUFFLED = RNG.permutation(60)


def frame(values: np.ndarray, **columns: object) -> pd.DataFrame:
    """Return columns whose index is no order of the rows."""
    return pd.DataFrame(values, index=SHUFFLED).assign(**columns)


def same(found: Dataset, expected: Dataset) -> bool:
    return (found.digest, found.class_names) == (expected.digest, expected.class_names)


# --- values ---------------------------------------------------------------------------------------

IMAGES = {
    "read-only": (READ_ONLY, GREY),
    "negative strides": (GREY[::-1, ::-1], np.ascontiguousarray(GREY[::-1, ::-1])),
    "every second": (np.repeat(GREY, 2, 2)[:, :, ::2], GREY),
    "columns first": (np.asfortranarray(GREY), GREY),
    "broadcast": (np.broadcast_to(GREY[:, None], (60, 3, 4, 6)), GREY[:, None].repeat(3, 1)),
    "big-endian": (FLOATS.astype(">f4"), FLOATS),
    "longdouble": (FLOATS.astype(np.longdouble), FLOATS.astype(np.float64)),
    "numbers as objects": (GREY.astype(float).astype(object) / 255, GREY / 255),
    "images as objects": (pd.Series([*GREY], index=SHUFFLED), GREY),
    "a list of arrays": ([*GREY], GREY),
    "lists": ((GREY / 255).tolist(), GREY / 255),
    "a list of tensors": ([*torch.from_numpy(GREY)], GREY),
    "a mapped file": (np.memmap, GREY),
    "a matrix's view": (GREY.view(np.recarray), GREY),
    "a tensor with gradient": (torch.from_numpy(FLOATS).requires_grad_(), FLOATS),
    "a turned tensor": (torch.from_numpy(GREY.transpose(2, 1, 0).copy()).permute(2, 1, 0), GREY),
    "a sparse tensor": (torch.from_numpy(FLOATS).to_sparse(), FLOATS),
}


@pytest.mark.parametrize(("given", "equal"), IMAGES.values(), ids=IMAGES)
def test_images_in_any_form_are_those_of_a_plain_array(given, equal, tmp_path):
    if given is np.memmap:
        np.save(tmp_path / "a.npy", GREY)
        given = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert same(Dataset.from_tensors("x", given), Dataset.from_tensors("x", torch.tensor(equal)))


TABLES = {
    "a frame": frame(TABLE),
    "nullable columns": frame(TABLE).astype("Float64"),
    "big-endian, backwards": np.ascontiguousarray(TABLE[:, ::-1]).astype(">f8")[:, ::-1],
    "decimals": np.vectorize(Decimal, otypes=[object])(TABLE),
    "rows of a list": [tuple(row) for row in TABLE.tolist()],
}


@pytest.mark.parametrize("given", TABLES.values(), ids=TABLES)
def test_tables_in_any_form_are_those_of_a_plain_array(given):
    assert same(Dataset.from_tensors("x", given), Dataset.from_tensors("x", TABLE))


def test_a_frame_has_names_and_truth_values():
    given = frame(TABLE, good=CLASSES == 0).rename(columns={0: "height", 1: "width"})
    data = Dataset.from_tensors("x", given)
    assert data.columns.names == ("height", "width", "2", "good")
    assert same(data, Dataset.from_tensors("x", np.c_[TABLE, CLASSES == 0], columns=given.columns))
    grey = pd.DataFrame(GREY.reshape(60, 24))
    assert same(Dataset.from_tensors("x", grey), Dataset.from_tensors("x", GREY.reshape(60, 24)))


# --- labels ---------------------------------------------------------------------------------------

LABELS = {
    "a column with an index": pd.Series(CLASSES, index=SHUFFLED),
    "a nullable column": pd.Series(CLASSES, dtype="Int64"),
    "big-endian": CLASSES.astype(">i2"),
    "unsigned": CLASSES.astype(np.uint64),
    "objects": CLASSES.astype(object),
    "a list": CLASSES.tolist(),
    "a list of NumPy's numbers": [*CLASSES.astype(np.int16)],
    "every second": np.repeat(CLASSES, 2)[::2],
}
TEXTS = {
    "an array": NAMES,
    "a list": NAMES.tolist(),
    "objects": NAMES.astype(object),
    "texts of any length": NAMES.astype(np.dtypes.StringDType()),
    "bytes": NAMES.astype("S"),
    "a column": pd.Series(NAMES, index=SHUFFLED),
    "categories": pd.Series(NAMES, index=SHUFFLED, dtype="category"),
}


@pytest.mark.parametrize("given", LABELS.values(), ids=LABELS)
def test_numbers_of_classes_in_any_form(given):
    assert same(Dataset.from_tensors("x", GREY, given), Dataset.from_tensors("x", GREY, CLASSES))


@pytest.mark.parametrize("given", TEXTS.values(), ids=TEXTS)
def test_names_of_classes_are_sorted(given):
    expected = np.unique(NAMES, return_inverse=True)[1]
    known = Dataset.from_tensors("x", GREY, expected, class_names=np.array(["ant", "bee", "cat"]))
    assert same(Dataset.from_tensors("x", GREY, given), known)


# --- rows -----------------------------------------------------------------------------------------

ROWS = {
    "an array": np.arange(40),
    "big-endian": np.arange(40, dtype=">i4"),
    "a tensor": torch.arange(40),
    "a mask": np.arange(60) < 40,
    "a mask of a tensor": torch.arange(60) < 40,
    "a list of truth values": [i < 40 for i in range(60)],
    "a column": pd.Series(range(40), index=SHUFFLED[:40]),
    "a column of truth values": pd.Series(np.arange(60) < 40, index=SHUFFLED),
    "an index": pd.RangeIndex(40),
    "a list": [*range(40)],
    "a list of NumPy's numbers": [*np.arange(40)],
    "numbers as objects": np.arange(40).astype(object),
    "a generator": (i for i in range(40)),
    "keys": dict.fromkeys(range(40)).keys(),
}


@pytest.mark.parametrize("given", ROWS.values(), ids=ROWS)
def test_rows_in_any_form_are_those_of_a_range(given):
    parts = {"train": given, "test": np.arange(60) >= 40}
    known = {"train": range(40), "test": range(40, 60)}
    assert same(
        Dataset.from_tensors("x", GREY, rows=parts), Dataset.from_tensors("x", GREY, rows=known)
    )


# --- what is refused ------------------------------------------------------------------------------

MASKED = np.ma.masked_greater(FLOATS, 0.5)
LAST = RNG.integers(0, 256, (60, 4, 6, 3), dtype=np.uint8)
SPOILT = {
    "masked": ({"images": MASKED}, "^images: a masked array, whose mask is not used; fill it"),
    "a list of masked": ({"images": [*MASKED]}, "^images: a masked array"),
    "masked labels": ({"labels": np.ma.masked_equal(CLASSES, 1)}, "^labels: a masked array"),
    "ragged": ({"images": [*GREY[:59], GREY[0, :2]]}, "^images: no array .* rows of one length"),
    "ragged objects": (
        {"images": pd.Series([*GREY[:59], GREY[0, :2]])},
        "^images: no array .* rows of one length",
    ),
    "a ragged tensor": (
        {"images": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)},
        "^images: no array",
    ),
    "small floats": ({"images": torch.tensor(FLOATS).to(torch.float8_e5m2)}, "^images: no array"),
    "no memory": ({"images": torch.ones(60, 4, 6, device="meta")}, "^images: no array"),
    "None": ({"images": None}, r"^images: 'None' \(NoneType\) at \[\]; give numbers"),
    "None in a list": ({"images": [[0.1, None]] * 60}, r"'None' \(NoneType\) at \[0, 1\]"),
    "text": ({"images": NAMES}, r"^images: it holds text \(<U3\); give real numbers"),
    "a column of text": ({"images": frame(TABLE, kind=NAMES)}, r"'bee' \(str\) at \[0, 3\]"),
    "records": ({"images": np.zeros(60, [("x", "f4")])}, "^images: it holds records"),
    "dates": ({"images": np.zeros((60, 4), "M8[s]")}, "^images: it holds dates"),
    "complex": ({"images": TABLE * 1j}, "^images: it holds complex numbers"),
    "a gap": ({"images": frame(np.where(TABLE[7, 1] == TABLE, np.nan, TABLE))}, "column '1' has"),
    "channels last": ({"images": LAST}, r"as images\.transpose\(0, 3, 1, 2\) of \(N, H, W, C\)"),
    "a tensor's": ({"images": torch.tensor(LAST)}, r"as images\.permute\(0, 3, 1, 2\)"),
    "far above 1": ({"images": FLOATS * np.float32(1.00001)}, r"to 1\.00001: .* from 0 to 1"),
    "None as a class": ({"labels": [*NAMES[:59], None]}, r"^labels: 'None' \(NoneType\) at \[59\]"),
    "NaN as a name": ({"labels": [*NAMES[:59], np.nan]}, r"^labels: 'nan' \(float\) at \[59\]"),
    "a gap in a column": ({"labels": pd.Series([None, *NAMES[1:]])}, "^labels: '(nan|None)' "),
    "a gap in numbers": ({"labels": pd.Series([pd.NA, *CLASSES[1:]])}, r"^labels: '<NA>' .*\[0\]"),
    "numbers and names": ({"labels": [*NAMES[:59], 3]}, r"^labels: '3' \(int\) at \[59\]"),
    "objects": ({"labels": [{}] * 60}, r"^labels: '{}' \(dict\) at \[0\]"),
    "a column too many": ({"labels": CLASSES[:, None]}, r"labels of shape \(60, 1\)"),
    "named twice": ({"labels": NAMES, "class_names": ["a", "b", "c"]}, "class_names beside labels"),
    "bytes of a name": ({"labels": ["\udce9", *NAMES[1:]]}, r"^'\\udce9' is no UTF-8 and cannot"),
    "bytes of a column": ({"columns": ["a", "\udce9"]}, r"^'\\udce9' is no UTF-8"),
    "no parts": ({"rows": [1, 2, 3]}, "parts .* name 'train'"),
    "a part of a number": ({"rows": {0: range(60)}}, "parts .* name 'train'"),
    "a number of rows": ({"rows": {"train": 40}}, "give at least 2 whole numbers"),
    "a short mask": ({"rows": {"train": np.ones(59, bool)}}, "or a mask of all 60 images"),
    "rows of rows": ({"rows": {"train": [[1, 2], [3, 4]]}}, "give at least 2 whole numbers"),
    "ragged rows": ({"rows": {"train": [[1], [3, 4]]}}, "^rows of 'train': no array"),
    "names as rows": ({"rows": {"train": NAMES}}, "^rows of 'train': it holds text"),
    "text as rows": ({"rows": {"train": "all"}}, "^rows of 'train': it holds text"),
    "a text as the largest": ({"largest": "255"}, "largest=255: give a whole number"),
}


@pytest.mark.parametrize(("given", "sentence"), SPOILT.values(), ids=SPOILT)
def test_what_is_none_of_them_is_refused_in_one_line(given, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        Dataset.from_tensors("x", **{"images": GREY} | given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("share", [1, 0], ids=["in memory", "mapped"])
def test_a_rounding_beyond_1_is_clipped_and_shown_once(share, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(arrays, "SHARE", share)
    monkeypatch.setattr(arrays, "CHUNK", 100)  # values that are checked at once
    images = FLOATS.astype(np.float64)
    images[7, 0, 0], images[9, 0, 0], images[11, 0, 0] = 1, 1, 0
    expected = Dataset.from_tensors("array-a", images)
    images[7, 0, 0], images[9, 0, 0], images[11, 0, 0] = 1 + 2**-20, 1 + 2**-23, -(2**-23)
    np.save(tmp_path / "a.npy", images)
    with caplog.at_level(logging.WARNING):
        assert same(load_dataset(f"array:{tmp_path / 'a.npy'}"), expected)
    assert [r.getMessage() for r in caplog.records] == [
        "images leave [0, 1] by 9.5e-07, as by rounding, and are clipped"
    ]


@pytest.mark.parametrize("share", [1, 0], ids=["in memory", "mapped"])
def test_errors_of_labels_name_their_file(share, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "SHARE", share)
    np.save(tmp_path / "a.npy", GREY)
    for labels, sentence in (
        (CLASSES - 1, "--label kinds.npy: labels from -1 to 1"),
        (CLASSES[1:], r"--label kinds.npy: labels of shape \(59,\)"),
        (np.zeros(60, "M8[s]"), "--label kinds.npy: labels: it holds dates"),
    ):
        np.save(tmp_path / "kinds.npy", labels)
        with pytest.raises(UserError, match=sentence):
            load_dataset(f"array:{tmp_path / 'a.npy'}", label="kinds.npy")


# --- settings -------------------------------------------------------------------------------------


def test_numbers_of_numpy_are_numbers_of_a_configuration():
    given = RunConfig(
        hidden=np.array([8, 4]),
        latent_size=np.int32(2),
        kl_weight=np.float32(0.25),
        epochs=torch.tensor(2),
        seed=np.uint8(3),
        adam_betas=(np.float64(0.9), np.float16(0.5)),
        activation=np.str_("elu"),
        terms={"mmd": np.float32(0.5)},
        term_options={"mmd": {"bandwidth": np.int64(2)}},
    )
    plain = RunConfig(
        hidden=(8, 4),
        latent_size=2,
        kl_weight=0.25,
        epochs=2,
        seed=3,
        adam_betas=(0.9, 0.5),
        activation="elu",
        terms={"mmd": 0.5},
        term_options={"mmd": {"bandwidth": 2}},
    )
    assert (given, hash(given), given.to_json()) == (plain, hash(plain), plain.to_json())
    for wrong in (
        {"epochs": np.ones(1, bool)[0]},
        {"epochs": np.float64(2)},
        {"seed": np.array([1])},
    ):
        with pytest.raises(UserError, match="give a whole number"):
            RunConfig(**wrong)


def test_settings_without_effect_are_refused():
    with pytest.raises(UserError, match="patience=30 with epochs=20 never ends a training"):
        RunConfig(patience=30)
    z = torch.zeros(2, 1)
    batch = Batch(z, Posterior(z, z), z=z, output=z, reconstruction=z, prior=z)
    for bandwidth in (0, -1.0):
        with pytest.raises(UserError, match=f"bandwidth={bandwidth}: mmd .* give a number > 0"):
            mmd(batch, bandwidth=bandwidth)


def test_a_table_is_no_binary_data_and_the_line_has_this_reason():
    data = Dataset.from_tensors("mine", TABLE)
    sentence = "likelihood='bernoulli': the columns of mine are no pixels in"
    options = {"settings": {"likelihood": "bernoulli"}}
    with pytest.raises(UserError, match=sentence):
        make_plan(kl_weight.STUDY, Options(**options), data)
    with pytest.raises(UserError, match=sentence):
        search.make_plan(search.SearchOptions(**options), data)


@pytest.mark.parametrize(
    ("settings", "lost"),
    [
        ({"kl_weight": 1e18}, False),
        ({"kl_weight": 1e25}, True),  # the encoder's gradient, about 1e22, is finite
        ({"kl_weight": 1e25, "optimizer": "adamw"}, True),
        ({"kl_weight": 1e20, "kl_normalization": "sum"}, True),
        ({"kl_weight": 0.0, "terms": {"mmd": 1e25}}, True),
    ],
)
def test_a_run_whose_weights_stand_still_has_diverged(settings, lost, tiny, parts):
    config = RunConfig(hidden=(8,), latent_size=2, batch_size=16, epochs=1, **settings)
    record = next(iter(train([config.replace(kl_weight=1.0, terms={}), config], tiny, "cpu")))
    assert all(np.isfinite(record.train["loss"]))
    still = "a gradient's square is too large for Adam, whose weight stands still"
    assert [divergence(record, row) for row in range(2)] == [None, still if lost else None]


# --- MNIST ----------------------------------------------------------------------------------------


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + bytes(values)


WHOLE = np.arange(10_000) % 10
IMAGES_FILE = idx(np.zeros((10_000, 28, 28), np.uint8))
LABELS_FILE = idx(WHOLE.astype(np.uint8))
FILES = {
    "compressed": ("-images-idx3-ubyte.gz", "-labels-idx1-ubyte.gz", gzip.compress),
    "with a dot": ("-images.idx3-ubyte", "-labels.idx1-ubyte", bytes),
    "with a dot, compressed": ("-images.idx3-ubyte.gz", "-labels.idx1-ubyte.gz", gzip.compress),
    "downloaded twice": ("-images-idx3-ubyte (1).gz", "-labels-idx1-ubyte(2).gz", gzip.compress),
    "unpacked without a new name": ("-images-idx3-ubyte.gz", "-labels-idx1-ubyte.gz", bytes),
    "packed without a new name": ("-images-idx3-ubyte", "-labels-idx1-ubyte", gzip.compress),
}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])


@pytest.mark.parametrize("kind", FILES)
def test_files_of_mnist_are_read_by_their_content(kind, tmp_path, offline):
    images, labels, packed = FILES[kind]
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / f"t10k{images}").write_bytes(packed(IMAGES_FILE))
    (raw / f"t10k{labels}").write_bytes(packed(LABELS_FILE))
    found = mnist.read_official("mnist", tmp_path, train=False)
    assert found[0].shape == (10_000, 28, 28)
    assert found[1].tolist() == WHOLE.tolist()


def test_a_download_that_was_cut_is_repeated_and_other_content_refused(tmp_path, offline):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "t10k-labels-idx1-ubyte").write_bytes(LABELS_FILE)
    for content, reason in (
        (gzip.compress(IMAGES_FILE)[:-9], "Error downloading "),
        (gzip.compress(b"<html>"), "t10k-images-idx3-ubyte.gz is not an IDX file"),
    ):
        (raw / "t10k-images-idx3-ubyte.gz").write_bytes(content)
        with pytest.raises(UserError, match=f"no usable data in .*{reason}"):
            mnist.read_official("mnist", tmp_path, train=False)


def test_names_that_are_no_utf8_end_before_the_training(tmp_path):
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    np.save(folder / os.fsdecode(b"\xe9.npy"), GREY)
    np.save(folder / "a.npy", GREY)
    np.save(folder / os.fsdecode(b"\xe8.npy"), CLASSES)
    for options in (
        {"dataset": f"array:{folder}/" + os.fsdecode(b"\xe9.npy")},
        {"dataset": f"array:{folder}/a.npy", "label": os.fsdecode(b"\xe8.npy")},
    ):
        given = Options(**options)
        with pytest.raises(UserError, match=r"\\udce[89].* is no UTF-8 .*; rename it"):
            make_plan(kl_weight.STUDY, given, load_dataset(given.dataset, label=given.label))
    given = Options(dataset=f"array:{folder}/a.npy")  # only the file's name is recorded
    assert (
        make_plan(kl_weight.STUDY, given, load_dataset(given.dataset)).name == "kl_weight-array-a"
    )
