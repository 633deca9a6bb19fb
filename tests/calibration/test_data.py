"""The user's samples: kinds of DATA, padding, and what is refused."""

from __future__ import annotations

import contextlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

from spa_compiler.calibration.data import read
from spa_compiler.errors import UsageError
from spa_compiler.graph.model import Model
from tests.onnx_text import model_from

TEXT = """g (int64["batch", "sequence"] ids, int64["batch", "sequence"] attention_mask)
  => (int64["batch", "sequence"] y) {
  y = Mul(ids, attention_mask)
}"""


@pytest.fixture
def model() -> Model:
    return model_from(TEXT)


def padded() -> dict[str, np.ndarray]:
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    return {"ids": np.arange(15, dtype=np.int16).reshape(3, 5), "attention_mask": mask, "labels": np.zeros(3)}


def test_npz_without_a_model_is_one_feed_per_sample(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **padded())
    feeds = list(read(str(tmp_path / "d.npz"))())
    assert [feed["ids"].shape for feed in feeds] == [(1, 5)] * 3
    assert set(feeds[0]) == {"ids", "attention_mask", "labels"}


def test_npz_with_a_model_is_cut_and_cast(tmp_path: Path, model: Model) -> None:
    np.savez(tmp_path / "d.npz", **padded())
    stream = read(str(tmp_path / "d.npz"), model)
    for _ in range(2):  # each call is a fresh pass
        feeds = list(stream())
        assert [feed["ids"].tolist() for feed in feeds] == [[[0, 1, 2]], [[5, 6, 7, 8, 9]], [[10]]]
        assert [feed["attention_mask"].shape for feed in feeds] == [(1, 3), (1, 5), (1, 1)]
        assert set(feeds[0]) == {"ids", "attention_mask"}
        assert feeds[0]["ids"].dtype == np.int64


def test_fixed_axes_are_not_cut(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **padded())
    fixed = model_from(TEXT.replace('"sequence"', "5"))
    assert [feed["ids"].shape for feed in read(str(tmp_path / "d.npz"), fixed)()] == [(1, 5)] * 3


def test_folders(tmp_path: Path, model: Model) -> None:
    arrays = padded()
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", **arrays)
    assert len(list(read(str(tmp_path), model)())) == 6
    other = tmp_path / "npy"
    other.mkdir()
    for name, array in arrays.items():
        np.save(other / f"{name}.npy", array)
    assert len(list(read(str(other), model)())) == 3


def test_a_folder_of_arrays_for_the_only_input(tmp_path: Path) -> None:
    single = model_from("g (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }")
    np.save(tmp_path / "part0.npy", np.zeros((2, 2), np.float32))
    np.save(tmp_path / "part1.npy", np.ones((3, 2), np.float64))
    feeds = list(read(str(tmp_path), single)())
    assert [float(feed["x"][0, 0]) for feed in feeds] == [0, 0, 1, 1, 1]
    assert feeds[4]["x"].dtype == np.float32


def test_function(tmp_path: Path, model: Model) -> None:
    (tmp_path / "helper_of_mine.py").write_text("LENGTH = 4\n")
    (tmp_path / "data.py").write_text(
        "import numpy as np\nfrom helper_of_mine import LENGTH\n"
        "def batches():\n    for i in range(2):\n"
        "        yield {'ids': np.full((3, LENGTH), i), 'attention_mask': np.ones((3, LENGTH), int)}\n"
        "def broken():\n    yield 5\n"
        "def failing():\n    raise RuntimeError('lost')\n    yield\n"
    )
    stream = read(f"{tmp_path}/data.py:batches", model)
    assert [feed["ids"].shape for feed in stream()] == [(3, 4)] * 2
    assert len(list(stream())) == 2
    with pytest.raises(UsageError, match=r"gave a int\. Yield dicts"):
        list(read(f"{tmp_path}/data.py:broken")())
    with pytest.raises(UsageError, match="RuntimeError: lost"):
        list(read(f"{tmp_path}/data.py:failing")())
    with pytest.raises(UsageError, match=r"no function 'nope'. It has: .*batches"):
        read(f"{tmp_path}/data.py:nope")


def test_python_objects_are_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", ids=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UsageError, match="Python objects"):
        list(read(str(tmp_path / "d.npz"))())


@pytest.mark.parametrize("entry", [("ids", b"text"), ("ids.npy", b"\x93NUMPY\x01\x00\x04\x00{ (\n")])
def test_archives_of_something_else(tmp_path: Path, entry: tuple[str, bytes]) -> None:
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr(*entry)
    with pytest.raises(UsageError, match="cannot be read"):
        list(read(str(tmp_path / "d.npz"))())


def test_damaged_archives(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, ids=np.random.default_rng(0).integers(9, size=(1, 4)))
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
        with contextlib.suppress(UsageError):
            list(read(str(path))())


def test_what_is_refused(tmp_path: Path, model: Model) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        read(str(tmp_path / "none.npz"))
    with pytest.raises(UsageError, match=r"there is no file '.*none\.py'"):
        read(str(tmp_path / "none.py:f"))
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(UsageError, match=r"kind '\.csv' cannot be read"):
        read(str(tmp_path / "x.csv"))
    with pytest.raises(UsageError, match=r"neither \.npz nor \.npy"):
        read(str(tmp_path))
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    with pytest.raises(UsageError, match="cannot be read"):
        list(read(str(tmp_path / "bad.npz"))())
    cases = {
        "none of the arrays": {"other": np.zeros(3)},
        "no array for input 'attention_mask'": {"ids": np.zeros((3, 5), int)},
        "disagree on how many samples": {"ids": np.zeros((3, 5), int), "attention_mask": np.ones((2, 5), int)},
        r"has shape \[1, 5, 1\]": {"ids": np.zeros((3, 5, 1), int), "attention_mask": np.ones((3, 5), int)},
        "are uint64, with values that int64 cannot hold": {
            "ids": np.full((3, 5), 1 << 63, np.uint64),
            "attention_mask": np.ones((3, 5), int),
        },
        "are float64, the input is int64": {"ids": np.zeros((3, 5)), "attention_mask": np.ones((3, 5), int)},
    }
    for words, arrays in cases.items():
        np.savez(tmp_path / "d.npz", **arrays)
        with pytest.raises(UsageError, match=words):
            list(read(str(tmp_path / "d.npz"), model)())
