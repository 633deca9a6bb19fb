"""Arrays that wait on disk: what one segment of a model hands to the next, for every sample.

Memory holds one feed at a time, however many there are; the operating system's page cache makes small sets as fast as
memory.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from spa_compiler.errors import ModelError


class Spool:
    """Arrays by (tensor, feed) in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[tuple[str, int], Path] = {}
        self._count = itertools.count()

    def put(self, name: str, feed: int, array: Any) -> None:
        """Keeps one array.

        Raises:
            ModelError: it is no numeric tensor, so it cannot be kept.
            OSError: the disk is full.
        """
        if not isinstance(array, np.ndarray) or array.dtype.kind in "OUS":
            kind = "tensor of strings" if isinstance(array, np.ndarray) else type(array).__name__
            raise ModelError(
                f"{name!r} is a {kind} that has to wait between two layers, which only numeric tensors can",
                fix="Leave the layers behind it alone, with `ignore`, or use a method that needs no calibration",
            )
        path = self._folder / f"{next(self._count)}.npy"
        np.save(path, array, allow_pickle=False)
        self._files[name, feed] = path

    def get(self, name: str, feed: int) -> np.ndarray[Any, Any]:
        """The array that `put` kept."""
        array: np.ndarray[Any, Any] = np.load(self._files[name, feed], allow_pickle=False)
        return array

    def drop(self, name: str) -> None:
        """Forgets a tensor, for all feeds."""
        for key in [key for key in self._files if key[0] == name]:
            self._files.pop(key).unlink()
