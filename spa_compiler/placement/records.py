"""What was measured before: one SQLite table, so that a second compilation of a like model measures nothing.

A record answers for one question (which forms at which shape, threads, ...) on one kind of machine: CPU model, ONNX
Runtime and compiler version are part of the key.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from spa_compiler.errors import EnvironmentFault
from spa_compiler.placement.measure import Timing

SCHEMA = 1
_BUSY_S = 30.0


class Records:
    """Timings by key; safe to use from several processes at once.

    Raises:
        EnvironmentFault: the file cannot be used, or is no database of this tool. The methods raise it, too.
    """

    def __init__(self, path: Path, machine: Mapping[str, Any]) -> None:
        self._machine = dict(machine)
        self._path = path
        with self._faults():
            self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            self._db.execute("begin immediate")  # two processes may meet at a file that is not there yet
            self._prepare()
            self._db.execute("commit")

    def get(self, question: Mapping[str, Any]) -> dict[str, Timing] | None:
        """The timings measured for this question on this kind of machine."""
        with self._faults():
            row = self._db.execute("select value from timing where key = ?", (self._key(question),)).fetchone()
            return None if row is None else msgspec.json.decode(row[0], type=dict[str, Timing])

    def put(self, question: Mapping[str, Any], timings: Mapping[str, Timing]) -> None:
        """Keeps timings; of two runs that measured the same, the last one stays."""
        value = msgspec.json.encode(dict(timings)).decode()
        with self._faults():
            self._db.execute("insert or replace into timing values (?, ?)", (self._key(question), value))

    def all(self) -> Iterator[tuple[dict[str, Any], dict[str, Timing]]]:
        """Every question with its timings, of all machines and versions."""
        with self._faults():
            for key, value in self._db.execute("select key, value from timing order by key").fetchall():
                yield msgspec.json.decode(key, type=dict[str, Any]), msgspec.json.decode(value, type=dict[str, Timing])

    def close(self) -> None:
        self._db.close()

    def _prepare(self) -> None:
        """Makes the table in a new file; refuses files of other versions and other programs."""
        version = int(self._db.execute("pragma user_version").fetchone()[0])
        tables = {name for (name,) in self._db.execute("select name from sqlite_master")}
        if version == 0 and not tables:
            self._db.execute("create table timing (key text primary key, value text not null)")
            self._db.execute(f"pragma user_version={SCHEMA}")
        elif "timing" not in tables:
            raise self._fault("it is a database of another program")
        elif version != SCHEMA:
            raise self._fault(f"they are of version {version}, this spa-compiler reads {SCHEMA}")

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Turns what SQLite says about the file, and records that are not ours, into EnvironmentFaults."""
        try:
            yield
        except (sqlite3.Error, msgspec.MsgspecError) as error:
            raise self._fault(str(error)) from error

    def _fault(self, what: str) -> EnvironmentFault:
        return EnvironmentFault(
            f"the records cannot be used: {what}",
            where=str(self._path),
            fix="Name another file with --records, or delete this one: everything in it can be measured again",
        )

    def _key(self, question: Mapping[str, Any]) -> str:
        return msgspec.json.encode({**self._machine, **question}, order="sorted").decode()
