"""masks.npz: what a trainer decided to remove.

    NAME        an array of the parameter's shape: 0 or False where an element goes
    NAME:axis   a vector over that axis: 0 or False where the whole slab goes

A unit goes when every given array masks all of its slabs there. Names are those of the source file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spa_compiler.errors import UsageError
from spa_compiler.graph.model import Model
from spa_compiler.passes.arrays import boolean, named
from spa_compiler.passes.importance import holders
from spa_compiler.passes.names import did_you_mean

_FIX = "Write them with numpy.savez: one array of 0 and 1 for each parameter"


def read(path: Path, model: Model) -> dict[tuple[str, int], NDArray[np.bool_]]:
    """(parameter, axis) -> for each index whether all of its slab goes.

    Args:
        model: whose parameters the names mean.

    Raises:
        UsageError: the file cannot be read, is no .npz of 0/1 arrays, names what does not exist, or a shape differs.
    """
    shapes = {name: tuple(int(size) for size in tensor.shape or ()) for name, tensor in holders(model.graph).items()}
    gone: dict[tuple[str, int], NDArray[np.bool_]] = {}
    for key, values in named(path, "masks", _FIX):
        keep = boolean(values, key, path)
        name, axis = _place(key, shapes, path)
        shape = shapes[name]
        want = shape if axis is None else (shape[axis],)
        if keep.shape != want:
            raise UsageError(f"{key!r} has shape {list(keep.shape)}, {list(want)} is expected", where=str(path))
        for number in range(len(shape)) if axis is None else (axis,):
            others = tuple(other for other in range(keep.ndim) if other != number) if axis is None else ()
            goes = np.asarray(~keep.any(axis=others) if others else ~keep)
            known = gone.get((name, number))
            gone[name, number] = goes if known is None else goes & known
    return gone


def _place(key: str, shapes: dict[str, tuple[int, ...]], path: Path) -> tuple[str, int | None]:
    """`NAME` or `NAME:axis`; names may hold colons themselves."""
    if key in shapes:
        return key, None
    name, colon, axis = key.rpartition(":")
    if colon and name in shapes and axis.removeprefix("-").isdecimal():
        rank = len(shapes[name])
        if -rank <= int(axis) < rank:
            return name, int(axis) % rank
        raise UsageError(f"{key!r}: {name!r} has {rank} axes, counted from 0", where=str(path))
    raise UsageError(
        f"the model has no parameter {name if colon and axis.isdecimal() else key!r}",
        where=str(path),
        fix=did_you_mean(name if colon and axis.isdecimal() else key, list(shapes)),
    )
