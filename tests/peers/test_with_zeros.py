"""A file with zeros is the file without them but for its weights."""

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

from spa_compiler import patterns
from tests.peers.with_zeros import with_zeros


def test_only_weights_change(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 12]> g (float[n, 3, 8, 8] x) => (float[n, 10] y)'
        " { c = Conv(x, first) r = Relu(c) d = Conv(r, second, bias) p = GlobalAveragePool(d) f = Flatten(p)"
        " y = Gemm<transB=1>(f, last) }"
    )
    rng = np.random.default_rng(0)
    for name, shape in (("first", (8, 3, 3, 3)), ("second", (16, 8, 3, 3)), ("bias", (16,)), ("last", (10, 16))):
        model.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    onnx.save(model, tmp_path / "dense.onnx")
    with_zeros(tmp_path / "dense.onnx", tmp_path / "zeros.onnx", 0.75, "block:4x1")
    made = onnx.load(tmp_path / "zeros.onnx")
    assert made.opset_import[0].version == 12
    assert [node.op_type for node in made.graph.node] == [node.op_type for node in model.graph.node]
    before, after = ({t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (model, made))
    assert before.keys() == after.keys()
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert changed == ["second"]
    new = after["second"]
    assert np.mean(new == 0) == 0.75
    assert np.array_equal(new[new != 0], before["second"][new != 0])
    assert patterns.parse("block:4x1").fits(new.reshape(16, -1))
