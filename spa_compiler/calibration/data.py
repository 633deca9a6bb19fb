"""The user's samples: an .npz, a folder of .npy or .npz, or a function in a file, as a stream of feeds.

Each call of what `read` returns is a fresh pass over the data. Arrays are never unpickled.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spa_compiler.errors import UsageError
from spa_compiler.graph.model import Model, ValueInfo
from spa_compiler.graph.session import Feeds

DAMAGED = (
    *(OSError, ValueError, EOFError, TypeError, SyntaxError),
    *(zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, tokenize.TokenError),
)
"""What zipfile and numpy raise on files that are none of theirs, or that are damaged."""

_FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")
_KINDS = "DATA is an .npz, a folder of .npy or .npz files, or file.py:function"


def is_function(data: str) -> bool:
    """Whether DATA is `file.py:function`, whose feeds are batches of the user's own making."""
    return _FUNCTION.fullmatch(data) is not None and not Path(data).exists()


def read(data: str, model: Model | None = None) -> Callable[[], Iterator[Feeds]]:
    """Opens DATA; each call of the result yields its feeds from the start.

    Args:
        data: `samples.npz` (arrays named after the inputs, the first axis counts samples; one feed per sample), a
            folder of such files or of `<input>.npy`, or `file.py:function` (a function without arguments whose
            iterator gives dicts; each dict is one feed, whatever its first axis).
        model: if given, arrays that are no inputs are left out, missing inputs and wrong shapes are refused, numbers
            are cast to the input's type (whole ones only where it can hold them), and of single samples trailing
            padding of dynamic axes is cut off where a mask says so.

    Raises:
        UsageError: no such file, an unknown kind, or (when iterated) contents that do not fit.
    """
    match = _FUNCTION.fullmatch(data)
    if match is not None and is_function(data):
        function = _load_function(Path(match["file"]), match["name"], data)
        return lambda: (_fit(feed, model, data) for feed in _called(function, data))
    path = Path(data)
    if not path.exists():
        raise UsageError("there is no such file or folder", where=data, fix=_KINDS)
    if path.is_dir():
        archives, arrays = sorted(path.glob("*.npz")), sorted(path.glob("*.npy"))
        if archives:
            return lambda: (feed for file in archives for feed in _samples(_read_npz(file), model, str(file)))
        if arrays:
            return lambda: _samples(_read_npys(arrays, model), model, data)
        raise UsageError("the folder holds neither .npz nor .npy files", where=data, fix=_KINDS)
    if path.suffix == ".npz":
        return lambda: _samples(_read_npz(path), model, data)
    raise UsageError(f"files of the kind {path.suffix or path.name!r} cannot be read", where=data, fix=_KINDS)


def _samples(arrays: Mapping[str, np.ndarray[Any, Any]], model: Model | None, where: str) -> Iterator[Feeds]:
    """Splits arrays along the first axis into one feed per sample."""
    if model is not None:
        inputs = {value.name for value in model.signature.inputs}
        known = {name: array for name, array in arrays.items() if name in inputs}
        if not known:
            raise UsageError(
                f"none of the arrays {sorted(arrays)} is named after an input",
                where=where,
                fix=f"The model's inputs are: {', '.join(sorted(inputs))}",
            )
        arrays = known
    counts = {name: array.shape[0] for name, array in arrays.items() if array.ndim}
    if len(counts) < len(arrays) or len(set(counts.values())) != 1:
        raise UsageError(
            f"the arrays disagree on how many samples there are: {counts}",
            where=where,
            fix="The first axis of every array counts the samples",
        )
    for index in range(next(iter(counts.values()))):
        feed = {name: array[index : index + 1] for name, array in arrays.items()}
        yield _fit(_without_padding(feed, model) if model is not None else feed, model, where)


def _without_padding(feed: Feeds, model: Model) -> Feeds:
    """Cuts the trailing positions where the mask is zero, from every input whose axis of that symbol is as long."""
    values = {value.name: value for value in model.signature.inputs}
    for name, mask in feed.items():
        if "mask" not in name.lower() or mask.ndim != 2 or len(values[name].shape) != 2:
            continue
        symbol, length = values[name].shape[1], mask.shape[1]
        used = np.flatnonzero(mask.any(axis=0))
        kept = int(used[-1]) + 1 if used.size else 1
        if isinstance(symbol, int) or kept == length:
            continue
        return {key: _cut(array, values[key], symbol, length, kept) for key, array in feed.items()}
    return feed


def _cut(
    array: np.ndarray[Any, Any], value: ValueInfo, symbol: str | None, length: int, kept: int
) -> np.ndarray[Any, Any]:
    index = [slice(None)] * array.ndim
    for axis, dim in enumerate(value.shape[: array.ndim]):
        if axis and not isinstance(dim, int) and dim == symbol and array.shape[axis] == length:
            index[axis] = slice(0, kept)
    return array[tuple(index)]


def _fit(feed: Feeds, model: Model | None, where: str) -> Feeds:
    """Checks a feed against the signature and casts numbers to the input's type."""
    if model is None:
        return feed
    fitted: Feeds = {}
    for value in model.signature.inputs:
        if value.name not in feed:
            raise UsageError(
                f"no array for input {value.name!r}, only {sorted(feed)}",
                where=where,
                fix="Name the arrays after the model's inputs",
            )
        array = np.asarray(feed[value.name])
        wanted = tuple(dim if isinstance(dim, int) else None for dim in value.shape)
        fits = len(wanted) == array.ndim and all(
            dim is None or dim == size for dim, size in zip(wanted, array.shape, strict=True)
        )
        if value.ranked and not fits:
            expected = ", ".join("?" if dim is None else str(dim) for dim in value.shape)
            raise UsageError(
                f"a sample of {value.name!r} has shape {list(array.shape)}, the input is [{expected}]",
                where=where,
                fix="The first axis counts samples; the others must be the input's",
            )
        if array.dtype != value.dtype:
            same_kind = array.dtype.kind in "iub" and value.dtype.kind in "iub"
            floats = array.dtype.kind == "f" and value.dtype.kind == "f"
            if not (same_kind or floats):
                raise UsageError(
                    f"samples of {value.name!r} are {array.dtype}, the input is {value.dtype}",
                    where=where,
                    fix="Store them in the input's type",
                )
            cast = array.astype(value.dtype)
            if same_kind and not np.array_equal(cast, array):
                raise UsageError(
                    f"samples of {value.name!r} are {array.dtype}, with values that {value.dtype} cannot hold",
                    where=where,
                    fix="Store them in the input's type",
                )
            array = cast
        fitted[value.name] = array
    return fitted


def _read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):  # an entry that is no .npy
                raise ValueError(f"{name!r} is no array")
        return arrays
    except DAMAGED as error:
        raise _unreadable(path, error) from error


def _read_npys(paths: list[Path], model: Model | None) -> dict[str, np.ndarray[Any, Any]]:
    """`<input>.npy` files; or, for a model with one input, any files, one after the other."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for path in paths:
        try:
            arrays[path.stem] = np.load(path, allow_pickle=False)
        except DAMAGED as error:
            raise _unreadable(path, error) from error
    if model is not None and len(model.signature.inputs) == 1 and model.signature.inputs[0].name not in arrays:
        try:
            return {model.signature.inputs[0].name: np.concatenate(list(arrays.values()))}
        except ValueError as error:
            raise _unreadable(paths[0].parent, error) from error
    return arrays


def _unreadable(path: Path, error: Exception) -> UsageError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "allow_pickle" in reason or "pickle" in reason:
        reason = "it holds Python objects, which are not read because loading them can run code"
    return UsageError(f"cannot be read: {reason}", where=str(path), fix="Store plain arrays with numpy.savez")


def _load_function(path: Path, name: str, where: str) -> Callable[[], Any]:
    if not path.is_file():
        raise UsageError(f"there is no file {str(path)!r}", where=where, fix=_KINDS)
    spec = importlib.util.spec_from_file_location(f"_spa_data_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError("this is no Python file", where=where, fix=_KINDS)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # so that the file can import its neighbours, as a script could
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"running it failed: {type(error).__name__}: {error}", where=where) from error
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        names = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise UsageError(f"it has no function {name!r}", where=where, fix=f"It has: {', '.join(names) or 'none'}")
    return lambda: function()


def _called(function: Callable[[], Any], where: str) -> Iterator[Feeds]:
    """One pass: calls the function afresh and checks that it gives dicts of arrays."""
    try:
        for feed in function():
            if not isinstance(feed, Mapping):
                raise UsageError(
                    f"the function gave a {type(feed).__name__}", where=where, fix="Yield dicts: input name -> array"
                )
            yield {str(name): np.asarray(array) for name, array in feed.items()}
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"the function failed: {type(error).__name__}: {error}", where=where) from error
