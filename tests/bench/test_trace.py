"""ONNX Runtime's profile: which node took how long, branches of control flow not counted twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from spa_compiler.bench.engines import ENGINES
from spa_compiler.bench.race import Contender, Times, race
from spa_compiler.bench.trace import Profile, ops_of, read
from spa_compiler.errors import ModelError
from tests.onnx_text import HEADER

BRANCHES = """g (float[n] x, bool c, bool d) => (float[n] y) {
  a = Tanh(x)
  b = If(c) <
    then_branch = t () => (float[n] t2) {
      t1 = Sin(a)
      t2 = If(d) <then_branch = tt () => (float[n] u) { u = Cos(t1) }, else_branch = te () => (float[n] v) { v = Abs(t1) }>
    },
    else_branch = e () => (float[n] w) { w = Neg(a) }
  >
  y = Exp(b)
}"""


def model(text: str, named: bool = True) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(HEADER + text)

    def name(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            node.name = node.output[0]
            for attribute in node.attribute:
                name(attribute.g)

    if named:
        name(proto.graph)
    return proto


def event(name: str, op: str, ts: int, dur: int) -> dict[str, Any]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": op, "x": [1]}}


def run(ts: int, dur: int) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur, "args": {}}


def written(folder: Path, events: Sequence[dict[str, Any]], counted: Sequence[bool], named: bool = True) -> Profile:
    (folder / "trace.json").write_text(json.dumps(events))
    onnx.save(model(BRANCHES, named), folder / "optimized.onnx")
    return read(folder / "trace.json", folder / "optimized.onnx", counted)


def one_run(at: int, scale: int = 1) -> list[dict[str, Any]]:
    """As ONNX Runtime writes it: a node when it has ended."""
    steps = [("a", "Tanh", 0, 10), ("t1", "Sin", 12, 5), ("u", "Cos", 20, 7), ("t2", "If", 18, 11), ("b", "If", 11, 20)]
    nodes = [event(name, op, at + scale * ts, scale * dur) for name, op, ts, dur in (*steps, ("y", "Exp", 40, 3))]
    return [*nodes, run(at, scale * 50)]


def test_a_node_counts_without_those_in_its_branches(tmp_path: Path) -> None:
    found = written(tmp_path, one_run(100), [True])
    times = {op.name: ms for op, ms in zip(found.ops, found.ms, strict=True)}
    expected = {"a": 10, "t1": 5, "u": 7, "t2": 4, "b": 4, "y": 3, "v": 0, "w": 0}
    assert times == pytest.approx({name: us / 1e3 for name, us in expected.items()})
    assert found.wall_ms == pytest.approx(0.05)
    assert sum(found.ms) == pytest.approx((10 + 20 + 3) / 1e3)


def test_branches_without_names_count_for_the_node_that_has_them(tmp_path: Path) -> None:
    events = one_run(0)
    for i, each in enumerate(events[:-1]):
        each["name"] = f"{each['args']['op_name']}_{i}_kernel_time"
    found = written(tmp_path, events, [True], named=False)
    times = {op.outputs[0]: ms for op, ms in zip(found.ops, found.ms, strict=True)}
    assert {name: round(1e3 * ms) for name, ms in times.items() if ms} == {"a": 10, "b": 20, "y": 3}


def test_medians_are_of_the_runs_that_count(tmp_path: Path) -> None:
    events = [e for i, scale in enumerate((9, 1, 3, 2)) for e in one_run(1000 * i, scale)]
    found = written(tmp_path, events, [False, True, True, True])
    assert found.ms[found.ops.index(next(op for op in found.ops if op.name == "a"))] == pytest.approx(0.02)
    assert found.wall_ms == pytest.approx(0.1)


def test_a_trace_that_was_cut_off(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"ends after 1 of 2 runs.*--runs"):
        written(tmp_path, one_run(0), [True, True])


@pytest.mark.parametrize("change", ["gone", "unknown", "text"])
def test_a_trace_of_another_form(tmp_path: Path, change: str) -> None:
    events = one_run(0)
    if change == "gone":
        del events[0]
    elif change == "unknown":
        events.insert(0, event("q", "Sqrt", 0, 1))
    else:
        events[0]["ts"] = "soon"
    with pytest.raises(ModelError, match=r"another form|cannot be read") as caught:
        written(tmp_path, events, [True])
    assert "--python" in str(caught.value.fix)


def test_what_a_node_with_branches_reads() -> None:
    ops = {op.name: op for op in ops_of(model(BRANCHES))}
    assert ops["b"].inputs == ("c", "a", "d")
    assert ops["t2"].inputs == ("d", "t1")
    assert [ops[name].depth for name in ("a", "t1", "u", "b")] == [0, 1, 2, 0]


def test_a_session_that_is_profiled(tmp_path: Path) -> None:
    """What onnxruntime writes today: every node that ran, and no time twice."""
    onnx.save(model(BRANCHES), tmp_path / "m.onnx")
    feeds = {"x": np.ones(1 << 16, np.float32), "c": np.array(True), "d": np.array(False)}
    folder = tmp_path / "profile"
    folder.mkdir()
    contender = Contender("m", ENGINES["onnxruntime"], tmp_path / "m.onnx", feeds, profile=folder)
    (times,) = race([contender], threads=1, runs=12)
    assert isinstance(times, Times)
    assert times.trace is not None
    assert sum(times.counted) == 12
    found = read(times.trace, folder / "optimized.onnx", times.counted)
    taken = {op.name: ms for op, ms in zip(found.ops, found.ms, strict=True)}
    assert {name for name, ms in taken.items() if ms > 0} >= {"a", "t1", "y"}
    assert taken["u"] == taken["w"] == 0
    assert 0 < sum(found.ms) <= found.wall_ms * 1.2
