"""Arrays of NumPy files: what is read and refused, and files that are too large for memory."""

import os
import pickle
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import RunConfig, UserError, evaluate, load_dataset, measure_quality, train
from harness.data import array as arrays
from harness.data import mapped
from harness.data.dataset import Dataset
from harness.data.mapped import Mapped
from harness.linear.pca import _decompose, pca
from harness.streams import generator, normal
from harness.training import step
from harness.training.checkpoint import Checkpoints

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (60, 5, 7), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (60, 5, 7, 3), dtype=np.uint8)
TABLE = RNG.normal(size=(60, 4)).astype(np.float32) * [1, 10, 0.1, 3] + [0, 5, -1, 1e3]
LABELS = np.arange(60) % 3

ARRAYS = {
    "grey": GREY,
    "grey with an axis": GREY[:, None],
    "grey, axis last": GREY[..., None],
    "colour": np.ascontiguousarray(COLOUR.transpose(0, 3, 1, 2)),
    "colour, last": COLOUR,
    "half": (GREY / 255).astype(np.float16),
    "double": GREY / 255,
    "big-endian": (GREY / 255).astype(">f4"),
    "grey vectors": GREY.reshape(60, 35),
    "table": TABLE,
    "table, float32": TABLE.astype(np.float32),
    "table, whole": (TABLE * 100).astype(np.int64),
    "table, unsigned": (100 + TABLE * 10).clip(0).astype(np.uint16),
    "table, big-endian": TABLE.astype(">f8"),
    "table, longdouble": TABLE.astype(np.longdouble),
}


def saved(folder: Path, array: np.ndarray, name: str = "mine.npy") -> str:
    np.save(folder / name, array)
    return f"array:{folder / name}"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Map every file, and read the images of one or two steps at once."""
    monkeypatch.setattr(arrays, "SHARE", 0)
    monkeypatch.setattr(step, "PART", 500)


def both(folder: Path, array: np.ndarray, label: str | None = None) -> tuple[Dataset, Dataset]:
    """Return the dataset of an array in memory, and mapped."""
    name = saved(folder, array)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "SHARE", 1)
        in_memory = load_dataset(name, label=label)
        patch.setattr(arrays, "SHARE", 0)
        from_file = load_dataset(name, label=label)
    assert isinstance(in_memory.train.images, torch.Tensor)
    assert isinstance(from_file.train.images, Mapped)
    return in_memory, from_file


# --- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_is_the_dataset_of_its_numbers_in_memory_and_mapped(kind: str, tmp_path: Path):
    np.save(tmp_path / "labels.npy", LABELS)
    given = ARRAYS[kind]
    if given.ndim == 4 and given.shape[3] in (1, 3):
        given = given.transpose(0, 3, 1, 2)
    native = given.astype(
        np.float64 if given.dtype == np.longdouble else given.dtype.newbyteorder("=")
    )
    expected = Dataset.from_tensors("array-mine", native, LABELS)
    for data in both(tmp_path, ARRAYS[kind], str(tmp_path / "labels.npy")):
        assert (data.name, data.digest, data.columns) == (
            expected.name,
            expected.digest,
            expected.columns,
        )
        assert data.image_shape == expected.image_shape
        assert data.options == {"label": "labels.npy"}
        assert data.pixel_variance == expected.pixel_variance
        for part in ("train", "val", "test"):
            mine, theirs = getattr(data, part), getattr(expected, part)
            assert (mine.largest, mine.digest) == (theirs.largest, theirs.digest)
            assert mine.images.dtype == theirs.images.dtype
            assert mine.images.shape == theirs.images.shape
            assert torch.equal(mine.images[:], theirs.images)
            assert torch.equal(mine.labels, theirs.labels)
            some = torch.tensor([[3, 1], [0, 3]])
            assert torch.equal(mine.pixels(some, torch.float64), theirs.pixels(some, torch.float64))
            assert torch.equal(mine.head(4).images[1:], theirs.images[1:4])


def test_fortran_order_is_read_in_memory_and_refused_mapped(tmp_path: Path, monkeypatch):
    name = saved(tmp_path, np.asfortranarray(GREY))
    assert load_dataset(name).digest == Dataset.from_tensors("array-mine", GREY).digest
    monkeypatch.setattr(arrays, "SHARE", 0)
    with pytest.raises(UserError, match="stored by columns .* save it by rows"):
        load_dataset(name)


def test_labels_may_be_names_beside_the_array(tmp_path: Path):
    np.save(tmp_path / "kinds.npy", np.array(["ant", "bee", "cat"])[LABELS])
    data = load_dataset(saved(tmp_path, GREY, "my images.npy"), label="kinds.npy")
    assert (data.name, data.classes) == ("array-my-images", 3)
    assert data.class_names == ("ant", "bee", "cat")
    whole = Dataset.from_tensors("x", GREY, LABELS)
    assert torch.equal(data.train.labels, whole.train.labels)


def test_shapes_are_read_in_one_way_or_refused():
    assert mapped.image_shape((9, 5, 7)) == (1, 5, 7)
    assert mapped.image_shape((9, 3, 5, 7)) == (3, 5, 7)
    assert mapped.image_shape((9, 5, 7, 3)) == (3, 5, 7)
    assert mapped.image_shape((9, 35)) == (35,)
    for shape in ((9,), (), (0, 5, 7), (9, 0), (9, 1, 1, 5, 7)):
        with pytest.raises(UserError, match=r"its shape is .* give \(N, H, W\)"):
            mapped.image_shape(shape)
    with pytest.raises(UserError, match=r"\(9, 3, 5, 1\): both the second and the last axis"):
        mapped.image_shape((9, 3, 5, 1))
    with pytest.raises(UserError, match=r"\(9, 5, 7, 4\): neither the second nor the last"):
        mapped.image_shape((9, 5, 7, 4))


# --- what is refused ----------------------------------------------------------------------------

SPOILT = np.where(np.arange(240).reshape(60, 4) == 94, np.nan, TABLE)
REFUSED = {
    "complex": (TABLE * 1j, "it holds complex numbers"),
    "records": (np.zeros(60, [("x", "f4")]), "it holds records"),
    "text": (np.array(["a"] * 60), "it holds text"),
    "dates": (np.zeros((60, 4), "M8[s]"), "it holds dates"),
    "truth": (GREY > 9, "images of type torch.bool: give torch.uint8"),
    "true vectors": (TABLE > 0, "give at least one row and column of real numbers"),
    "sixteen bits": (GREY.astype(np.uint16), "images of type torch.uint16: give torch.uint8"),
    "unscaled": (GREY.astype(np.float32), "images from 0 to 25[0-9]: .* must be from 0 to 1"),
    "nan": (SPOILT, r"row 23 has nan at \[2\], counted from 0; give finite numbers"),
    "infinite": (np.where(GREY[7, 1, 2] == GREY, np.inf, 0.5), r"has inf at \[\d, \d\]"),
    "constant": (np.ones((60, 4)), "column '0' is constant in the training rows"),
    "the same": (np.zeros((60, 5, 7), np.uint8), "all training images are the same"),
    "few": (GREY[:9], "9 images or rows: give 20"),
    "scalar": (np.float64(3), "its shape is ()"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_arrays_are_refused_alike_in_memory_and_mapped(kind, tmp_path, monkeypatch):
    array, sentence = REFUSED[kind]
    name = saved(tmp_path, array)
    for share in (arrays.SHARE, 0):
        monkeypatch.setattr(arrays, "SHARE", share)
        with pytest.raises(UserError, match=sentence) as error:
            load_dataset(name)
        assert str(error.value).startswith(name)
        assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path: Path):
    saved(tmp_path, GREY)
    whole = (tmp_path / "mine.npy").read_bytes()
    np.savez(tmp_path / "more.npz", GREY)
    np.save(tmp_path / "objects.npy", np.array([{}, []] * 30, dtype=object), allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(GREY))
    (tmp_path / "short.npy").write_bytes(whole[:-1])
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "text.npy").write_text("1, 2, 3\n")
    for name, sentence in (
        ("more.npz", "npz: it is an archive of arrays .* give one of its arrays, saved"),
        ("objects.npy", "cannot be read .*Python objects"),
        ("pickle.npy", "cannot be read .* give an array of np.save"),
        ("short.npy", "cannot be read .* give an array of np.save"),
        ("empty.npy", "cannot be read .* give an array of np.save"),
        ("text.npy", "cannot be read .* give an array of np.save"),
        ("none.npy", "there is no such file; name a .npy file"),
        (".", "it is a folder; name a .npy file"),
    ):
        with pytest.raises(UserError, match=sentence) as error:
            load_dataset(f"array:{tmp_path / name}")
        assert "\n" not in str(error.value)


def test_a_damaged_header_is_refused_or_read(tmp_path: Path):
    saved(tmp_path, GREY)
    whole = bytearray((tmp_path / "mine.npy").read_bytes())
    for place in range(128):
        for value in (0, 39, 40, 57, 255):
            damaged = bytearray(whole)
            damaged[place] = value
            (tmp_path / "mine.npy").write_bytes(damaged)
            with suppress(UserError):
                load_dataset(f"array:{tmp_path / 'mine.npy'}")


def test_labels_that_do_not_fit_are_refused(tmp_path: Path):
    name = saved(tmp_path, GREY)
    for labels, sentence in (
        (LABELS[1:], r"labels of shape \(59,\)"),
        (LABELS / 2, "give one whole number for each of 60 images"),
        (LABELS - 1, "labels from -1 to 1"),
        (np.array(["a", "b"]), r"labels of shape \(2,\)"),
    ):
        np.save(tmp_path / "labels.npy", labels)
        with pytest.raises(UserError, match=sentence):
            load_dataset(name, label=str(tmp_path / "labels.npy"))
    with pytest.raises(UserError, match="--label none.npy: there is no such file"):
        load_dataset(name, label="none.npy")
    with pytest.raises(UserError, match="only table:PATH and array:PATH"):
        load_dataset("digits", label="labels.npy")


def test_memory_is_that_of_the_machine_or_of_the_smallest_control_group(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "GROUPS", tmp_path)
    machine = mapped.memory()
    assert machine == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (tmp_path / "memory.max").write_text("max\n")
    assert mapped.memory() == machine
    (tmp_path / "memory").mkdir()
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # of one of the two versions
        (tmp_path / file).write_text("123456\n")
    assert mapped.memory() == 123456


# --- training from a file -----------------------------------------------------------------------

PLAIN = RunConfig(hidden=(8,), latent_size=2, epochs=3, batch_size=5)
BERNOULLI = PLAIN.replace(likelihood="bernoulli")
RUNS = [PLAIN, PLAIN.replace(seed=1), PLAIN.replace(seed=1, kl_weight=0.5)]


def outcome(configs, data, checkpoints=None) -> list:
    """Return every metric and weight of training runs, as bits."""
    found = []
    for record in train(configs, data, "cpu", checkpoints=checkpoints):
        found += [record.train, record.val]
        models = [record.model(s) for s in range(len(configs))]
    found += [dict(model.state_dict()) for model in models]
    found += evaluate(list(zip(configs, models, strict=True)), data)
    return [{k: np.asarray(v).tobytes() for k, v in one.items()} for one in found]


@pytest.mark.parametrize("kind", ["grey", "colour, last", "grey vectors", "table, big-endian"])
def test_runs_have_the_same_bits_from_a_file(kind: str, parts: str, large: None, tmp_path: Path):
    np.save(tmp_path / "labels.npy", LABELS)
    in_memory, from_file = both(tmp_path, ARRAYS[kind], str(tmp_path / "labels.npy"))
    assert outcome(RUNS, from_file) == outcome(RUNS, in_memory)
    kept = Checkpoints(tmp_path / "kept", every=1)
    next(running := train(RUNS, from_file, "cpu", checkpoints=kept))
    running.close()
    assert outcome(RUNS, from_file, kept) == outcome(RUNS, in_memory)


@pytest.mark.parametrize("model", ["linear", "conv", "mlp"])
def test_every_model_and_its_quality_have_the_same_bits_from_a_file(model, large, tmp_path):
    images = np.repeat(np.repeat(GREY, 2, 1), 2, 2)
    np.save(tmp_path / "labels.npy", LABELS)
    sets = both(tmp_path, images, str(tmp_path / "labels.npy"))
    config = RunConfig(model=model, latent_size=2, epochs=2, batch_size=7, sigma="learned")
    found = []
    for data in sets:
        (*_, record) = train([config], data, "cpu")
        found.append(measure_quality([(config, record.model(0))], data))
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["grey", "table"])
def test_a_stack_on_a_gpu_reads_the_file(kind, large, tmp_path):
    sets = both(tmp_path, ARRAYS[kind])
    for ours, theirs in zip(*(train(RUNS, data, "cuda") for data in sets), strict=True):
        for name, values in ours.val.items():
            np.testing.assert_allclose(values, theirs.val[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_worker_processes_read_the_file(large, tmp_path):
    torch.set_num_threads(2)
    in_memory, from_file = both(tmp_path, GREY)
    assert outcome(RUNS, from_file) == outcome(RUNS, in_memory)


def test_binarization_is_refused_in_a_line(large, tmp_path):
    data = load_dataset(saved(tmp_path, GREY))
    for kind in ("threshold", "stochastic"):
        with pytest.raises(UserError, match=f"binarization='{kind}': array-mine is too large"):
            next(train([BERNOULLI.replace(binarization=kind)], data))


def test_a_file_that_changed_is_not_read_by_other_processes(large, tmp_path):
    split = load_dataset(saved(tmp_path, GREY)).train
    again = pickle.loads(pickle.dumps(split))
    assert torch.equal(again.images[:], split.images[:])
    saved(tmp_path, GREY)
    mapped._opened.cache_clear()  # as in another process
    with pytest.raises(UserError, match="has changed since training began"):
        again.images[:]


def test_sums_in_chunks_are_those_of_the_whole(tmp_path, monkeypatch):
    for array in (GREY, TABLE):
        whole = load_dataset(saved(tmp_path, array))
        with monkeypatch.context() as patch:
            for module in (arrays, "harness.data.dataset"):
                patch.setattr(f"{getattr(module, '__name__', module)}.CHUNK", 70)
            for data in both(tmp_path, array):
                if data.columns is None:
                    assert data.digest == whole.digest
                else:
                    assert np.allclose(data.columns.mean, whole.columns.mean, rtol=1e-14)
                    assert np.allclose(data.columns.std, whole.columns.std, rtol=1e-14)
                first, second = _decompose(data.train), pca(whole)
                np.testing.assert_allclose(first.variances, second.variances, atol=1e-12)
                for one, other in zip(
                    first._measured(data.val), second.moments(whole.val), strict=True
                ):
                    np.testing.assert_allclose(np.abs(one), np.abs(other), atol=1e-9)


def test_a_stream_drawn_in_parts_is_the_stream():
    whole = normal(generator(3, "noise", 2, 5), 64, 5)
    stream = generator(3, "noise", 2, 5)
    assert torch.equal(torch.cat([normal(stream, n, 5) for n in (1, 31, 0, 7, 25)]), whole)


CHILD = """
import sys
from benchmarks.arrays import stage
from harness import RunConfig, load_dataset, train
from harness.data import array

array.SHARE, rows = float(sys.argv[2]), []
config = RunConfig(model="linear", latent_size=2, batch_size=4096, epochs=1)
with stage("all", rows):
    list(train([config], load_dataset(sys.argv[1]), "cpu"))
print(rows[0][2])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_mapped_file_takes_no_anonymous_memory(tmp_path):
    made = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (1_200_000, 16, 16))
    made[:1000] = RNG.integers(0, 256, (1000, 16, 16))  # the rest takes no space on the disk
    peaks = []
    for share in ("1", "0"):
        command = [sys.executable, "-c", CHILD, f"array:{tmp_path / 'a.npy'}", share]
        root = Path(arrays.__file__).parents[2]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
        peaks.append(float(done.stdout))
    in_memory, from_file = peaks
    # Not all of it: measuring needs memory in both.
    assert from_file < in_memory - 0.8 * made.nbytes / 1e9
