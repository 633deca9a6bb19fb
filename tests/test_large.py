"""A model above protobuf's 2 GB, all the way through: weights stay outside of the protobuf message from load to write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import spa_compiler

N, K, LAYERS = 8192, 8192, 9  # 256 MiB each


def large_model(folder: Path) -> Path:
    """MatMul, Relu, MatMul, ... with 95 % zeros in 4 x 1 blocks and external data of 2.25 GiB."""
    rng = np.random.default_rng(0)
    tensors, nodes, x, offset = [], [], "x", 0
    with (folder / "large.data").open("wb") as file:
        for i in range(LAYERS):
            keep = np.repeat(rng.random((K, N // 4)) < 0.05, 4, axis=1)
            weight = (rng.standard_normal((K, N), np.float32) * keep) / np.float32(20)
            file.write(weight.tobytes())
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[K, N])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "large.data"), ("offset", offset), ("length", weight.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            offset += weight.nbytes
            tensors.append(tensor)
            nodes += [helper.make_node("MatMul", [x, f"w{i}"], [f"m{i}"], name=f"m{i}")]
            nodes += [helper.make_node("Relu", [f"m{i}"], [f"r{i}"], name=f"r{i}")]
            x = f"r{i}"
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", K])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["tokens", N])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "large.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.slow
def test_a_model_above_2_gb(tmp_path: Path) -> None:
    source = large_model(tmp_path)
    result = spa_compiler.compile(source, tmp_path / "out", shapes=["x=4,8192"], threads=1)
    assert result.ratio is not None
    assert result.ratio > 1.5
    assert (tmp_path / "out" / "portable.onnx.data").stat().st_size >= LAYERS * N * K * 4
    onnx.checker.check_model(str(tmp_path / "out" / "portable.onnx"))
    session = spa_compiler.load(tmp_path / "out", threads=1)
    x = np.random.default_rng(1).standard_normal((3, K), np.float32)
    assert session.run(None, {"x": x})[0].shape == (3, N)


def hollow_model(folder: Path, gigabytes: int) -> Path:
    """MatMul, Relu, MatMul, ... with external data that takes no room on the disk: a file of nothing but a hole."""
    width, layers = 16384, gigabytes  # 1 GiB each
    tensors, nodes, x = [], [], "x"
    for i in range(layers):
        tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[width, width])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "hollow.data"), ("offset", i * width**2 * 4), ("length", width**2 * 4)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
        nodes += [helper.make_node("MatMul", [x, f"w{i}"], [f"m{i}"]), helper.make_node("Relu", [f"m{i}"], [f"r{i}"])]
        x = f"r{i}"
    with (folder / "hollow.data").open("wb") as file:
        file.truncate(layers * width**2 * 4)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", width]) for name in ("x", x)]
    graph = helper.make_graph(nodes, "hollow", values[:1], values[1:], tensors)
    path = folder / "hollow.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())
    return path


ANALYZE = """
import re, sys
from spa_compiler.analysis import analyze
from spa_compiler.graph.load import load
analysis = analyze(load(sys.argv[1]))
print(len(analysis.groups), analysis.params, int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024)
"""


@pytest.mark.slow
def test_6_gb_are_analyzed_in_less_than_1(tmp_path: Path) -> None:
    path = hollow_model(tmp_path, 6)
    out = subprocess.run([sys.executable, "-c", ANALYZE, str(path)], check=True, capture_output=True, text=True).stdout
    groups, params, memory = (int(word) for word in out.split())
    assert (groups, params) == (5, 6 * 16384**2)
    assert memory < 1e9
