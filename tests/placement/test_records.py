"""Records are kept per kind of machine, shared by processes, and refused in words when the file is no good."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from spa_compiler.errors import EnvironmentFault
from spa_compiler.placement.measure import Timing
from spa_compiler.placement.records import SCHEMA, Records

MACHINE = {"cpu": "Xeon", "onnxruntime": "1.31.1"}
QUESTION = {"n": 8, "k": 16, "shape": [1, 128, 16], "threads": 1}
TIMINGS = {"dense": Timing(10.0, 9.0, 11.5, 7), "block:4x1": Timing(2.5, 2.25, 3.0, 7)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.sqlite"


def test_what_is_put_is_there(path: Path) -> None:
    book = Records(path, MACHINE)
    assert book.get(QUESTION) is None
    book.put(QUESTION, TIMINGS)
    assert book.get(QUESTION) == TIMINGS
    book.close()
    again = Records(path, MACHINE)
    assert again.get(QUESTION) == TIMINGS
    again.close()
    assert [p.name for p in path.parent.iterdir()] == [path.name], "one file, to be copied and committed"


def test_the_order_of_keys_does_not_matter(path: Path) -> None:
    Records(path, MACHINE).put(QUESTION, TIMINGS)
    assert Records(path, dict(reversed(MACHINE.items()))).get(dict(reversed(QUESTION.items()))) == TIMINGS


@pytest.mark.parametrize("change", [{"n": 9}, {"shape": [1, 127, 16]}, {"threads": 2}])
def test_other_questions_have_other_answers(path: Path, change: dict[str, object]) -> None:
    book = Records(path, MACHINE)
    book.put(QUESTION, TIMINGS)
    assert book.get(QUESTION | change) is None


@pytest.mark.parametrize("change", [{"cpu": "EPYC"}, {"onnxruntime": "1.31.2"}])
def test_other_machines_have_other_answers(path: Path, change: dict[str, str]) -> None:
    Records(path, MACHINE).put(QUESTION, TIMINGS)
    assert Records(path, MACHINE | change).get(QUESTION) is None


def test_the_last_answer_stays(path: Path) -> None:
    book = Records(path, MACHINE)
    book.put(QUESTION, TIMINGS)
    book.put(QUESTION, {"dense": Timing(1, 1, 1, 1)})
    assert book.get(QUESTION) == {"dense": Timing(1, 1, 1, 1)}


PROCESS = f"""
import sys
from pathlib import Path
from spa_compiler.placement.measure import Timing
from spa_compiler.placement.records import Records
me = int(sys.argv[2])
sys.stdin.readline()
for i in range(20):
    book = Records(Path(sys.argv[1]), {MACHINE!r})
    book.put({{"who": me, "i": i}}, {{"dense": Timing(me, i, 0, 1)}})
    assert book.get({{"who": me, "i": i}}) is not None
    book.close()
"""


def test_several_processes_at_once(path: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(path)]
    processes = [
        subprocess.Popen([*command, str(i)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(4)
    ]
    errors = [process.communicate("go\n", timeout=60)[1] for process in processes]
    assert errors == [""] * 4
    book = Records(path, MACHINE)
    for who in range(4):
        for i in range(20):
            assert book.get({"who": who, "i": i}) == {"dense": Timing(who, i, 0, 1)}


@pytest.mark.parametrize(
    "content", [b"not a database, and long enough that SQLite looks at it" * 40, b"SQLite format 3\0"]
)
def test_a_damaged_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(EnvironmentFault, match="the records cannot be used") as caught:
        Records(path, MACHINE)
    assert caught.value.where == str(path)
    assert "delete this one" in str(caught.value)
    assert path.read_bytes() == content


def test_an_empty_file_is_a_new_one(path: Path) -> None:
    path.touch()
    Records(path, MACHINE).put(QUESTION, TIMINGS)
    assert Records(path, MACHINE).get(QUESTION) == TIMINGS


def test_a_file_that_is_damaged_further_in(path: Path) -> None:
    book = Records(path, MACHINE)
    for i in range(300):
        book.put(QUESTION | {"i": i}, TIMINGS)
    book.close()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    book = Records(path, MACHINE)
    with pytest.raises(EnvironmentFault, match="the records cannot be used"):
        book.get(QUESTION | {"i": 200})
    with pytest.raises(EnvironmentFault, match="the records cannot be used"):
        book.put(QUESTION | {"i": 301}, TIMINGS)


def test_records_of_another_version(path: Path) -> None:
    Records(path, MACHINE).close()
    with sqlite3.connect(path) as db:
        db.execute(f"pragma user_version={SCHEMA + 1}")
    with pytest.raises(EnvironmentFault, match=f"of version {SCHEMA + 1}, this spa-compiler reads {SCHEMA}"):
        Records(path, MACHINE)


def test_a_database_of_another_program(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("create table bookmarks (url text)")
    with pytest.raises(EnvironmentFault, match="another program"):
        Records(path, MACHINE)
    with sqlite3.connect(path) as db:
        assert [name for (name,) in db.execute("select name from sqlite_master")] == ["bookmarks"]


def test_records_that_hold_something_else(path: Path) -> None:
    book = Records(path, MACHINE)
    book.put(QUESTION, TIMINGS)
    with sqlite3.connect(path) as db:
        db.execute("update timing set value = '[1, 2]'")
    with pytest.raises(EnvironmentFault, match="the records cannot be used"):
        book.get(QUESTION)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="unable to open"):
        Records(tmp_path / "no" / "records.sqlite", MACHINE)


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="the records cannot be used"):
        Records(tmp_path, MACHINE)


def test_everything_can_be_read(path: Path) -> None:
    for cpu in ("Xeon", "EPYC"):
        book = Records(path, MACHINE | {"cpu": cpu})
        book.put(QUESTION, TIMINGS)
        book.close()
    found = list(Records(path, MACHINE).all())
    assert [(q["cpu"], q["n"], t) for q, t in found] == [("EPYC", 8, TIMINGS), ("Xeon", 8, TIMINGS)]
    with sqlite3.connect(path) as db:
        db.execute("update timing set key = '[1]' where key like '%EPYC%'")
    with pytest.raises(EnvironmentFault, match="the records cannot be used"):
        list(Records(path, MACHINE).all())
