"""spa-bench --profile: an original and its artifact node by node, nothing left out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from spa_compiler import compiler
from spa_compiler.bench.compare import entries
from spa_compiler.bench.lineage import Whole
from spa_compiler.bench.profile import NodeTime, Profiled, Row, Shape, Side, profile, rows
from spa_compiler.bench.trace import Op, Profile
from spa_compiler.cli.bench import main
from spa_compiler.errors import ModelError, UsageError
from tests.networks import network, weight

WIDTH = 256


def mixed() -> onnx.ModelProto:
    """Two sparse layers in a row, what no kernel takes, and a dense layer."""
    rng = np.random.default_rng(0)
    text = f"""g (float["b",{WIDTH}] x) => (float["b",{WIDTH}] y) {{
      m1 = MatMul(x, w1) a1 = Add(m1, b1) h1 = Relu(a1)
      m2 = MatMul(h1, w2) t = Tanh(m2) y = MatMul(t, w3) }}"""
    weights = {f"w{i}": weight(rng, WIDTH, WIDTH, density) for i, density in ((1, 0.1), (2, 0.1), (3, 1.0))}
    return network(text, **weights, b1=np.ones(WIDTH, np.float32))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("profiled")
    onnx.save(mixed(), folder / "mixed.onnx")
    compiler.compile(folder / "mixed.onnx", folder / "mixed-spa", threads=1, shapes=["x=64,256"], guard=False)
    return folder / "mixed.onnx", folder / "mixed-spa"


def profiled(paths: Sequence[Path], *shapes: str) -> Profiled:
    return profile(entries(paths), machine="m", threads=1, runs=6, shapes=shapes or ("x=64,256",))


def row_of(rows: Sequence[Row], original: str) -> Row:
    (found,) = [row for row in rows if any(original in node.originals for node in row.theirs)]
    return found


def assert_whole(result: Profiled) -> None:
    for shape in result.shapes:
        assert sum(row.theirs_ms for row in shape.rows) == pytest.approx(shape.theirs.nodes_ms)
        assert sum(row.ours_ms for row in shape.rows) == pytest.approx(shape.ours.nodes_ms)
        assert shape.theirs.nodes_ms > 0
        assert shape.ours.wall_ms > 0
        for row in shape.rows:
            assert sum(node.ms for node in row.theirs) == pytest.approx(row.theirs_ms)
            assert row.ratio is None or row.ratio == pytest.approx(row.theirs_ms / row.ours_ms)


def test_a_region_has_the_nodes_that_it_stands_for(compiled: tuple[Path, Path]) -> None:
    result = profiled(compiled)
    assert_whole(result)
    (shape,) = result.shapes
    assert (shape.shape, shape.theirs.model, shape.ours.model) == ("64x256", "mixed.onnx", "mixed-spa")
    region = row_of(shape.rows, "m1")
    assert [node.name for node in region.ours] == ["ai.spa/m1"]
    taken = [name for node in region.theirs for name in node.originals]
    assert taken in (["m1", "a1", "h1", "m2"], ["m1", "a1", "h1"])  # whichever plan won
    assert region.ours[0].originals == taken
    for name in ("t", "y"):
        row = row_of(shape.rows, name)
        assert [node.originals for node in row.ours] == [[name]]
        assert row.own == ""
    largest = [max(row.theirs_ms, row.ours_ms) for row in shape.rows]
    assert largest == sorted(largest, reverse=True)


def test_an_artifact_alone_is_compared_with_its_portable(compiled: tuple[Path, Path]) -> None:
    (shape,) = profiled(compiled[1:]).shapes
    assert shape.theirs.model == "mixed-spa/portable.onnx"
    assert row_of(shape.rows, "m2").ours[0].name == "ai.spa/m1"


def test_the_original_may_come_second(compiled: tuple[Path, Path]) -> None:
    (shape,) = profiled(compiled[::-1]).shapes
    assert (shape.theirs.model, shape.ours.model) == ("mixed.onnx", "mixed-spa")


def test_two_files_at_two_shapes(compiled: tuple[Path, Path], tmp_path: Path) -> None:
    proto = mixed()
    proto.graph.node[-2].op_type = "Sigmoid"
    onnx.save(proto, tmp_path / "other.onnx")
    result = profiled([compiled[0], tmp_path / "other.onnx"], "x=1,256", "x=8,256")
    assert_whole(result)
    assert [shape.shape for shape in result.shapes] == ["1x256", "8x256"]
    row = row_of(result.shapes[0].rows, "t")
    assert [node.op for node in (*row.theirs, *row.ours)] == ["Tanh", "Sigmoid"]


def test_what_cannot_be_compared(compiled: tuple[Path, Path], tmp_path: Path) -> None:
    for wrong in ([compiled[0]], [compiled[0], *compiled]):
        with pytest.raises(UsageError, match="two models"):
            profiled(wrong)
    onnx.save(network("g (float[n] z) => (float[n] y) { y = Tanh(z) }"), tmp_path / "other.onnx")
    with pytest.raises(UsageError, match="different inputs"):
        profiled([compiled[0], tmp_path / "other.onnx"])
    with pytest.raises(ModelError, match="no such file"):
        profiled([compiled[0], tmp_path / "none.onnx"])


def op(name: str, *inputs: str, kind: str = "Blob", to: str = "") -> Op:
    return Op(name, kind, "", inputs, (to or name,))


def told(original: Sequence[Op], file: Sequence[Op], theirs: Sequence[Op], ours: Sequence[Op]) -> list[Row]:
    sides = (Profile(list(side), [float(i + 1) for i in range(len(side))], 0.0) for side in (theirs, ours))
    return rows(Whole(original), Whole(file), *sides)


def test_what_either_side_put_in() -> None:
    """ONNX Runtime's own nodes have a row for each kind; what a pass put in goes with the node that reads it."""
    original = [op("a", "x"), op("b", "a")]
    file = [op("thin", "x"), op("a", "thin"), op("b", "a")]
    reorder = [op("r1", "x", kind="Reorder"), op("r2", "b", kind="Reorder")]
    found = told(original, file, [*original, reorder[0]], [*file, *reorder])
    names = [([n.name for n in r.theirs], [n.name for n in r.ours], r.own) for r in found]
    assert sorted(names) == [(["a"], ["thin", "a"], ""), (["b"], ["b"], ""), (["r1"], ["r1", "r2"], "Reorder")]
    assert found[0].own == "Reorder"
    assert found[0].ratio == pytest.approx(3 / (4 + 5))


def test_what_only_one_side_has() -> None:
    original, file = [op("a", "x"), op("b", "a")], [op("b", "x"), op("c", "x")]
    found = told(original, file, original, [op("c", "x")])
    told_of = sorted(([n.name for n in r.theirs], [n.name for n in r.ours]) for r in found)
    assert told_of == [([], ["c"]), (["a"], []), (["b"], [])]
    assert {r.ratio for r in found} == {None}


class TestCommand:
    def test_the_table(self, compiled: tuple[Path, Path]) -> None:
        arguments = ["--profile", *map(str, compiled), "--threads", "1", "--runs", "3", "--shape", "x=64,256"]
        answer = CliRunner().invoke(main, arguments)
        assert answer.exit_code == 0, answer.output
        for word in (
            "mixed.onnx, at 64x256",
            "ai.spa/m1",
            "MatMul y",
            "all nodes",
            "whole run",
            "1 thread, medians of 3",
        ):
            assert word in answer.stdout

    def test_json_reads_back(self, compiled: tuple[Path, Path]) -> None:
        answer = CliRunner().invoke(main, ["--profile", str(compiled[1]), "--runs", "2", "--json"])
        assert answer.exit_code == 0, answer.output
        result = msgspec.json.decode(answer.stdout, type=Profiled)
        assert set(json.loads(answer.stdout)) == {"machine", "threads", "runs", "shapes"}
        assert_whole(result)

    def test_the_documented_keys_are_there(self) -> None:
        page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
        section = page.split("## spa-bench --profile --json")[1].split("\n## ")[0]
        told = set(re.findall(r"`(\w+)`", section))
        fields = {f for struct in (Profiled, Shape, Side, Row, NodeTime) for f in struct.__struct_fields__}
        assert fields <= told
        assert told - fields <= {"ReorderInput"}  # a value

    def test_other_engines_have_no_profile(self, compiled: tuple[Path, Path]) -> None:
        answer = CliRunner().invoke(main, ["--profile", *map(str, compiled), "--against", "openvino"])
        assert answer.exit_code == 2
        assert "--against" in answer.stderr
