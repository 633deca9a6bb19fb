"""How much memory a compilation takes: at most four times the model, beside what Python, TVM and ONNX Runtime take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.process_tree import cost

ROOT = Path(__file__).resolve().parents[1]

WIDTH, LAYERS = 1152, 20  # 106 MB
BAR = 4
#: MB that a compilation of next to nothing takes: Python, numpy, onnx, TVM 0.27 and ONNX Runtime 1.31, with what they load.
BASE = 330

COMPILE = """
import sys
import spa_compiler
from spa_compiler.placement import race
race.TOGETHER = 0  # heats, as for larger models
result = spa_compiler.compile(sys.argv[1], sys.argv[2], threads=1, tune_trials=0, guard=False)
assert any("heats" in note for note in result.report.notes)
"""


def network(path: Path, width: int, layers: int) -> None:
    """x W0 W1 ..., each with half of its weights zero: the dense and the sparse form both are large."""
    rng = np.random.default_rng(0)
    weights = [
        rng.standard_normal((width, width), np.float32) * (rng.random((width, width)) < 0.5) for _ in "w" * layers
    ]
    tensors = [numpy_helper.from_array(w / np.float32(width**0.5), f"w{i}") for i, w in enumerate(weights)]
    names = ["x", *(f"h{i}" for i in range(1, layers)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], f"m{i}") for i in range(layers)]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 16, width]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def test_a_compilation_takes_four_times_the_model_at_most(tmp_path: Path) -> None:
    source = tmp_path / "large.onnx"
    network(source, WIDTH, LAYERS)
    most = cost(["-c", COMPILE, source, tmp_path / "out"], ROOT).bytes / 2**20
    size = source.stat().st_size / 2**20
    print(f"\n{size:.0f} MB model: {most:.0f} MB at most, {(most - BASE) / size:.2f} times the model besides the base")
    assert most <= BASE + BAR * size
