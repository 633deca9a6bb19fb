"""What is put comes back, and what is dropped leaves the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spa_compiler.calibration.spool import Spool
from spa_compiler.errors import ModelError


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i8", "u1", "?"])
def test_arrays_come_back(tmp_path: Path, dtype: str) -> None:
    spool = Spool(tmp_path)
    arrays = [np.ones((2, 3), dtype), np.zeros((), dtype), np.zeros((0, 4), dtype), np.eye(3, dtype=dtype)[:, ::2]]
    for number, array in enumerate(arrays):
        spool.put("a/b:0", number, array)
    for number, array in enumerate(arrays):
        got = spool.get("a/b:0", number)
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array)


def test_dropping_removes_the_files_of_one_tensor(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for name in ("a", "b"):
        for number in range(3):
            spool.put(name, number, np.full(2, number))
    spool.drop("a")
    spool.drop("never put")
    assert len(list(tmp_path.iterdir())) == 3
    assert spool.get("b", 2).tolist() == [2, 2]
    with pytest.raises(KeyError):
        spool.get("a", 0)


@pytest.mark.parametrize("value, kind", [([np.zeros(2)], "list"), (None, "NoneType"), ("objects", "tensor of strings")])
def test_what_is_no_tensor(tmp_path: Path, value: object, kind: str) -> None:
    value = np.array(["x"], dtype=object) if value == "objects" else value
    with pytest.raises(ModelError, match=f"'seq' is a {kind} that has to wait"):
        Spool(tmp_path).put("seq", 0, value)
    assert not list(tmp_path.iterdir())
