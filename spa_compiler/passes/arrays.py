"""Arrays that users hand over for weights, by name: masks and scores in an .npz."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa_compiler.calibration.data import DAMAGED
from spa_compiler.errors import UsageError
from spa_compiler.graph.operators import WeightedOp
from spa_compiler.passes.names import did_you_mean

_LARGEST = 1 << 33
"""Bytes of one array that we unpack: more than any weight of a model that fits a machine."""


def named(path: Path, what: str, fix: str) -> Iterator[tuple[str, NDArray[Any]]]:
    """Every array of an .npz, one at a time.

    Args:
        what: of the file, in messages: "masks".

    Raises:
        UsageError: the file cannot be read, or holds other things than arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.file_size > _LARGEST:
                    raise UsageError(f"{entry.filename!r} would take {entry.file_size:,} bytes", where=str(path))
        with np.load(path, allow_pickle=False) as file:
            for key in file.files:
                values = file[key]
                if not isinstance(values, np.ndarray):  # an entry that is no .npy
                    raise ValueError(f"{key!r} is no array")
                yield key, values
    except DAMAGED as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"the {what} cannot be read ({reason})", where=str(path), fix=fix) from error


def for_weights(path: Path, what: str, ops: Sequence[WeightedOp]) -> dict[int, NDArray[Any]]:
    """Arrays named after weights, as rows: the place of a site in `ops` -> `[n, k]`.

    An array has its weight's shape in the file. Arrays that are named after nothing here are refused, weights without
    an array are not.

    Raises:
        UsageError: as `named`; a name is no weight's; a shape differs; a value is NaN or infinite.
    """
    fix = f"Write them with numpy.savez: one array for each weight, named after it, such as {_example(ops)}"
    found: dict[int, NDArray[Any]] = {}
    names = {op.weight.name for op in ops}
    for key, values in named(path, what, fix):
        if key not in names:
            raise UsageError(
                f"no weight that this pass takes is named {key!r}",
                where=str(path),
                fix=did_you_mean(key, sorted(names)),
            )
        for place, op in enumerate(ops):
            if op.weight.name != key:
                continue
            want = [int(size) for size in op.weight.shape]
            if list(values.shape) != want:
                raise UsageError(f"{key!r} has shape {list(values.shape)}, {want} is expected", where=str(path))
            if values.dtype.kind not in "biuf":
                raise UsageError(f"{key!r} holds {values.dtype}, numbers are expected", where=str(path))
            if not np.isfinite(values).all():
                raise UsageError(f"{key!r} has a NaN or an infinity", where=str(path))
            found[place] = op.rows_of(values)
    return found


def boolean(values: NDArray[Any], key: str, path: Path) -> NDArray[np.bool_]:
    """0 and 1 as False and True.

    Raises:
        UsageError: there are other values.
    """
    if values.dtype.kind == "b":
        return values
    if values.dtype.kind not in "iuf" or not np.isin(values, (0, 1)).all():
        raise UsageError(f"{key!r} has other values than 0 and 1", where=str(path), fix="0 removes, 1 keeps")
    return np.asarray(values != 0)


def _example(ops: Sequence[WeightedOp]) -> str:
    return repr(ops[0].weight.name) if ops else "those of the model"
