"""The peers' race without any peer: what is kept, what is published, what the page says, and what happens when some fail."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import onnx.parser
import pytest

from spa_compiler.bench import compare
from spa_compiler.bench.engines import ENGINES
from spa_compiler.errors import ModelError
from tests.peers import peers_plot, peers_race, peers_tables, sources, tables
from tests.peers.peers_rows import WITHHELD, Peers, Race, Row, publishable, read, read_for, write

FACTS = ("a machine", {"onnxruntime": "1.99"})
FIRST, SECOND, THIRD = peers_race.STARTS[:3]


def row(engine: str, ms: float, error: float | None = 1e-7) -> Row:
    return Row(engine=engine, median_ms=ms, p10_ms=ms * 0.9, p90_ms=ms * 1.1, version="7", error=error)


def race(*rows: Row, key: str = FIRST.key, zeros: str = "90 % 4x1") -> Race:
    return Race(key=key, model="BERT", shape="1x128", zeros=zeros, runs=9, seconds=60, rows=list(rows))


DEFAULT, OURS = row("onnxruntime", 100.0, 0.0), row("spa", 20.0)


def page(*races: Race) -> str:
    return peers_tables.render(Peers(machine=FACTS[0], versions=FACTS[1], races=list(races)), "docs/peers.json")


# ---------------------------------------------------------------- what is published


def test_withheld_numbers_leave_with_no_file_that_is_committed() -> None:
    public = publishable(race(DEFAULT, row("deepsparse", 42.0)))
    assert public.rows[0] == DEFAULT
    assert public.rows[1] == Row(engine="deepsparse", version="7", absent=WITHHELD["deepsparse"])
    missing = race(Row(engine="deepsparse", absent="no interpreter"))
    assert publishable(missing) == missing, "why it did not run is no number"


def test_the_committed_files_hold_none_of_them() -> None:
    peers = read(peers_race.JSON)
    assert peers is not None
    rows = [row for race in peers.races for row in race.rows if row.engine in WITHHELD]
    assert rows
    assert all(row.absent and row.median_ms is row.p10_ms is row.p90_ms is row.error is None for row in rows)
    assert ENGINES.keys() >= WITHHELD.keys()


def test_the_page_is_what_was_measured() -> None:
    picture = peers_race.PLOT.name if peers_race.PLOT.exists() else None
    expected = peers_tables.render(read(peers_race.JSON), "docs/peers.json", picture)
    assert peers_race.PAGE.read_text(encoding="utf-8") == expected, "run: python tests/peers/peers_race.py --render"


# ---------------------------------------------------------------- the page


def test_every_contender_has_its_line() -> None:
    text = page(race(DEFAULT, row("openvino", 80.0), Row(engine="deepsparse", absent="ImportError: no"), OURS))
    assert "| 90 % 4x1 | onnxruntime | 100 | 90 - 110 | 1.00 | 0e+00 |" in text
    assert "| 90 % 4x1 | deepsparse | - | - | - | ImportError: no |" in text
    assert "| 90 % 4x1 | **spa-compiler** | 20 | 18 - 22 | 5.00 | 1e-07 |" in text
    assert "one thread; onnxruntime 1.99, openvino 7.\n" in text


@pytest.mark.parametrize(
    "error, shown", [(1e-4, "1e-04 |"), (2e-3, "2e-03 (~) |"), (0.2, "2e-01 (!) |"), (None, "| (!) |")]
)
def test_who_computes_something_else_is_marked(error: float | None, shown: str) -> None:
    assert shown in page(race(DEFAULT, row("openvino-bf16", 50.0, error), OURS))
    assert shown.removesuffix(" |")[5:] in page(race(DEFAULT, row("spa", 20.0, error)))


def test_the_summary_says_where_a_peer_wins() -> None:
    rows = [DEFAULT, row("onnxruntime-int8", 10.0, 0.2), row("openvino", 40.0), OURS]
    lines = list(peers_tables.summary([race(*rows), race(DEFAULT, OURS)]))
    assert lines[2] == (
        "| BERT | 1x128 | 90 % 4x1 | 20 | 5.00 | openvino, 40 ms: 2.00x | onnxruntime-int8 (!), 10 ms: 0.50x |"
    )
    assert "in 2 of 2 races" in lines[-1]
    assert "int8 included, in 1." in lines[-1]


def test_the_summary_says_whom_it_does_not_count() -> None:
    hidden = publishable(race(DEFAULT, row("deepsparse", 10.0), OURS))
    assert list(peers_tables.summary([hidden]))[-1].endswith("Not counted, as said above: deepsparse.")
    missing = race(DEFAULT, Row(engine="deepsparse", absent="no interpreter"), OURS)
    assert "Not counted" not in list(peers_tables.summary([missing]))[-1]


def test_a_model_that_stayed_dense_wins_nothing() -> None:
    stayed = race(DEFAULT, Row(engine="spa", median_ms=80.0, p10_ms=70.0, p90_ms=90.0, error=0.0, dense=True))
    lines = list(peers_tables.summary([stayed]))
    assert "| 80 (dense) | 1.25 |" in lines[2]
    assert "in 0 of 1 races" in lines[-1]
    assert "| **spa-compiler**, dense | 80 |" in page(stayed)


def test_nearly_equal_is_no_win() -> None:
    lines = list(peers_tables.summary([race(row("onnxruntime", 20.2, 0.0), OURS)]))
    assert "in 0 of 1 races" in lines[-1]


def test_a_race_without_ours_is_in_no_summary() -> None:
    lines = list(peers_tables.summary([race(DEFAULT, Row(engine="spa", absent="crashed"))]))
    assert "in 0 of 0 races" in lines[-1]


def test_nothing_measured() -> None:
    assert peers_tables.NOTHING in peers_tables.render(None, "docs/peers.json")


def test_every_engine_has_a_mark_and_the_picture_repeats(tmp_path: Path) -> None:
    assert peers_plot.STYLES.keys() == {*ENGINES, "spa"}
    pytest.importorskip("matplotlib")
    pictures = []
    for name in ("a.svg", "b.svg"):
        peers_plot.draw([race(DEFAULT, row("openvino", 50.0), OURS)], tmp_path / name)
        pictures.append((tmp_path / name).read_text())
    assert pictures[0] == pictures[1]
    for word in ("openvino", "spa-compiler", "BERT 1x128, 90 % 4x1"):
        assert word in pictures[0]
    assert "deepsparse" not in pictures[0], "it has no times here"


# ---------------------------------------------------------------- what is kept


def test_races_are_kept_in_order_and_for_one_machine(tmp_path: Path) -> None:
    path = tmp_path / "build" / "peers.json"
    peers = read_for(path, *FACTS)
    for start in (SECOND, FIRST, SECOND):
        peers.put(race(DEFAULT, OURS, key=start.key), peers_race.ORDER)
    write(peers, path)
    assert [one.key for one in read_for(path, *FACTS).races] == [FIRST.key, SECOND.key]
    assert read_for(path, *FACTS).has(FIRST.key)
    assert not read_for(path, "another machine", FACTS[1]).races
    assert not read_for(path, FACTS[0], {"onnxruntime": "2"}).races


def test_rows_are_of_the_file_and_of_ours() -> None:
    def made(model: str, runtime: str) -> compare.Row:
        return compare.Row(model, runtime, "1x3", 2.0, 1.9, 2.1, "7", 1e-7)

    result = compare.Result(
        machine="",
        threads=1,
        runs=1,
        rows=[made("m.onnx", "onnxruntime"), made("a", "spa"), made("a/portable.onnx", "onnxruntime")],
        ratios=[],
        skipped=[
            compare.Skip("m.onnx", name, "1x3", f"does not run: {name} | /a/long/path.onnx {'word ' * 99}")
            for name in ENGINES
            if name not in ("onnxruntime", "deepsparse")
        ],
    )
    rows = peers_race.rows(result, "m.onnx", "a", {"deepsparse": "no interpreter at .venv"}, dense=True)
    assert [one.engine for one in rows if one.dense] == ["spa"]
    assert [one.engine for one in rows] == [*ENGINES, "spa"]
    assert [one.engine for one in rows if one.median_ms] == ["onnxruntime", "spa"]
    reasons = {one.engine: one.absent for one in rows}
    assert reasons["deepsparse"] == "no interpreter at .venv"
    assert reasons["openvino"].startswith("does not run: openvino / path.onnx word")
    assert len(reasons["openvino"]) < 210
    assert reasons["openvino"].endswith(" ...")


@pytest.mark.parametrize("domain, dense", [("ai.spa", False), ("com.microsoft", True)])
def test_an_artifact_without_a_node_of_ours_is_dense(tmp_path: Path, domain: str, dense: bool) -> None:
    text = f'<ir_version: 9, opset_import: ["": 17, "{domain}": 1]> g (float[n] x) => (float[n] y) {{ r = Relu(x) y = {domain}.Op(r) }}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    assert peers_race.stayed_dense(tmp_path) is dense


def test_an_interpreter_that_is_not_there_has_a_reason() -> None:
    pythons = {"deepsparse": "no/such/python", "openvino": sys.executable}
    assert peers_race.present(pythons) == (
        {"openvino": sys.executable},
        {"deepsparse": "no interpreter at no/such/python"},
    )


# ---------------------------------------------------------------- the run


def test_each_race_is_written_down_and_a_failure_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "machine", lambda: FACTS[0])
    monkeypatch.setattr(tables, "versions", lambda: FACTS[1])
    outs = [(tmp_path / "public.json", True), (tmp_path / "local.json", False)]

    def measure(start: peers_race.Start, *_: object, quick: bool) -> Race:
        if start is FIRST:
            raise ModelError("it fails")
        if start is THIRD:
            raise ZeroDivisionError("a bug")
        assert quick
        return race(DEFAULT, row("deepsparse", 42.0), Row(engine="openvino", absent="none"), OURS, key=start.key)

    monkeypatch.setattr(peers_race, "measure", measure)
    assert peers_race.run([FIRST, THIRD, SECOND], {}, outs, quick=True) == 2
    words = capsys.readouterr().err
    for said in ("[1/3]", "FAILED: it fails", "FAILED: Traceback", "a bug", "[3/3]", "SKIPPED: none", "20.000 ms"):
        assert said in words
    public, local = (read(path) for path, _ in outs)
    assert public is not None
    assert local is not None
    assert [one.key for one in public.races] == [one.key for one in local.races] == [SECOND.key]
    assert public.races[0].row("deepsparse") is None
    assert local.races[0].row("deepsparse") == row("deepsparse", 42.0)


def test_what_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Peers(machine=tables.machine(), versions=tables.versions())
    known.put(race(DEFAULT, OURS), peers_race.ORDER)
    monkeypatch.setattr(peers_race, "QUICK", tmp_path / "quick.json")
    monkeypatch.setattr(sources, "have_shared", lambda: True)
    write(known, peers_race.QUICK)
    asked: list[list[str]] = []
    monkeypatch.setattr(peers_race, "run", lambda queue, *_, **__: asked.append([one.key for one in queue]) or 0)
    for options in ([], ["--fresh"]):
        monkeypatch.setattr(sys, "argv", ["peers_race.py", "--quick", "--only", FIRST.entry.name, *options])
        assert peers_race.main() == 0
    assert asked[1] == [FIRST.key, *asked[0]]


def test_progress_is_estimated_from_alike_races() -> None:
    done = [race(DEFAULT, key=FIRST.key), race(DEFAULT, key="yolo 90 % 4x1")]
    done[1] = Race(key="yolo 90 % 4x1", model="", shape="", zeros="", runs=1, seconds=600, rows=[])
    assert peers_race.left([SECOND], done) == "; about 1 minutes left"
    assert peers_race.left(peers_race.wanted(["yolo"]), done) == "; about 20 minutes left"
    assert peers_race.left([SECOND], []) == ""
