"""What the accuracy benchmark keeps: rows in docs/accuracy.json, one for each model, setting and method."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable
from pathlib import Path

import msgspec

from tests.peers.accuracy_settings import MODELS

DENSE = "dense"
"""Setting and method of the row of a model as it is."""

Key = tuple[str, str, str]


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One compressed model."""

    model: str
    setting: str
    method: str
    versions: dict[str, str]
    """Of what the numbers depend on."""
    score: float | None = None
    also: float | None = None
    """The second metric, where the model has one."""
    drop: float | None = None
    """Against the dense model: points, or percent of a perplexity; above 0 is worse."""
    also_drop: float | None = None
    kept: float | None = None
    """Share of the weights that remain, of those that were to be compressed: what the budget came to."""
    site_error: float | None = None
    """Relative error of the outputs of the layers, the mean over all layers."""
    holdout: float | None = None
    """The run's own estimate of how much the output changes, on calibration samples that it held out."""
    seconds: float | None = None
    """Of the compression alone, with calibration."""
    scoring_seconds: float = 0.0
    memory: int | None = None
    """The most bytes that the compressing process and its children held."""
    machine: str = ""
    code: str = ""
    """A digest of the package's sources; rows of other code stay until `--fresh` measures them anew."""
    recipe: str = ""
    refused: str = ""
    """Why there is no result."""
    note: str = ""

    @property
    def key(self) -> Key:
        """What a row is found by."""
        return self.model, self.setting, self.method


class Rows(dict[Key, Row]):
    """All rows by key."""

    @classmethod
    def read(cls, path: Path) -> Rows:
        """The rows of a file; none if it is not there."""
        if not path.exists():
            return cls()
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            return cls(_rows(file.read()))

    def record(self, row: Row, path: Path) -> None:
        """Adds a row to these and to the file, together with what other runs have written there meanwhile.

        The file has the order of the settings; rows of settings that are gone come last.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            self.update(_rows(file.read()))
            self[row.key] = row
            ordered = sorted(self.values(), key=lambda each: _position(each.key))
            text = msgspec.json.format(msgspec.json.encode(ordered), indent=2) + b"\n"
            file.truncate(0)
            file.write(text)

    def drop(self, model: str, setting: str, method: str) -> float | None:
        """How much is lost; None where that was not measured, or refused."""
        row = self.get((model, setting, method))
        return row.drop if row else None

    def least(self, model: str, setting: str, methods: Iterable[str]) -> tuple[float, str] | None:
        """The smallest drop of several methods, and whose it is; None unless one was measured."""
        found = [(drop, name) for name in methods if (drop := self.drop(model, setting, name)) is not None]
        return min(found) if found else None


def _rows(text: bytes) -> dict[Key, Row]:
    return {row.key: row for row in msgspec.json.decode(text, type=list[Row])} if text else {}


def _position(key: Key) -> tuple[int, int, int, str]:
    """Where a row stands."""
    model, setting, method = key
    models = list(MODELS)
    if model not in models:
        return len(models), 0, 0, "/".join(key)
    settings = [DENSE, *(each.name for each in MODELS[model].settings)]
    if setting not in settings[1:]:
        return models.index(model), 0 if setting == DENSE else len(settings), 0, "/".join(key)
    methods = MODELS[model].setting(setting).methods
    place = methods.index(method) if method in methods else len(methods)
    return models.index(model), settings.index(setting), place, method
