"""What the peers' race keeps: docs/peers.json, and all of it in build/peers.json, which stays on the machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

WITHHELD = {
    "deepsparse": "ran; its licence grants evaluation in development and testing and says nothing of publishing results"
}
"""Engines whose numbers leave the machine in no file that is committed, and what the tables say instead."""


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One contender of a race: its times, or why there are none."""

    engine: str
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    version: str = ""
    error: float | None = None
    """Against ONNX Runtime's outputs on the same file; None: they cannot be compared."""
    absent: str = ""
    dense: bool = False
    """Ours: no kernel was faster, so what ran is the dense model."""


class Race(msgspec.Struct, frozen=True, kw_only=True):
    """One file, with zeros in it, at one shape, with one thread; all rows took turns."""

    key: str
    model: str
    shape: str
    zeros: str
    runs: int
    seconds: float
    """That all of it took, files and compilation included: what the next run's progress is estimated by."""
    rows: list[Row]

    def row(self, engine: str) -> Row | None:
        """The engine's row, if it has times."""
        return next((row for row in self.rows if row.engine == engine and row.median_ms is not None), None)


class Peers(msgspec.Struct, kw_only=True):
    """A file of races."""

    machine: str
    versions: dict[str, str]
    races: list[Race] = msgspec.field(default_factory=list)

    def has(self, key: str) -> bool:
        """Whether a race is there."""
        return any(race.key == key for race in self.races)

    def put(self, race: Race, order: Sequence[str]) -> None:
        """Adds a race in its place, or exchanges it."""
        self.races = [*(other for other in self.races if other.key != race.key), race]
        self.races.sort(key=lambda one: order.index(one.key) if one.key in order else len(order))


def publishable(race: Race) -> Race:
    """The race without what must stay on the machine."""
    rows = [
        Row(engine=row.engine, version=row.version, absent=WITHHELD[row.engine])
        if row.engine in WITHHELD and not row.absent
        else row
        for row in race.rows
    ]
    return msgspec.structs.replace(race, rows=rows)


def read(path: Path) -> Peers | None:
    """What is there; None if nothing is."""
    return msgspec.json.decode(path.read_bytes(), type=Peers) if path.exists() else None


def read_for(path: Path, machine: str, versions: dict[str, str]) -> Peers:
    """What is there of this machine and these versions: times of others share no table with them."""
    known = read(path)
    return (
        known
        if known and (known.machine, known.versions) == (machine, versions)
        else Peers(machine=machine, versions=versions)
    )


def write(peers: Peers, path: Path) -> None:
    """Writes the JSON."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(peers), indent=2) + b"\n")
