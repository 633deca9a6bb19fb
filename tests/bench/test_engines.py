from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

from spa_compiler.bench.engines import ENGINES, parse, prepare
from spa_compiler.errors import UsageError
from spa_compiler.graph.session import open_session, run

FEEDS = [{"image": np.ones((1, 3, 8, 8), np.float32)}]


def kinds(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(str(path)).graph.node}


def test_engines_by_name() -> None:
    assert parse("openvino, onnxruntime,openvino") == [ENGINES["openvino"], ENGINES["onnxruntime"]]


@pytest.mark.parametrize("text", ["tensorrt", "onnxruntime,x", "", ","])
def test_unknown_names_list_what_exists(text: str) -> None:
    with pytest.raises(UsageError, match="onnxruntime-int8"):
        parse(text)


def test_most_engines_load_the_file_itself(conv: Path) -> None:
    for name in ("onnxruntime", "openvino", "openvino-bf16", "deepsparse", "onnxruntime-best"):
        assert prepare(ENGINES[name], conv, FEEDS) == conv


def test_int8_of_linear_layers_is_dynamic(linear: Callable[..., Path]) -> None:
    assert "MatMulInteger" in kinds(prepare(ENGINES["onnxruntime-int8"], linear(), []))


def test_int8_of_convolutions_is_static(conv: Path) -> None:
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= kinds(prepare(ENGINES["onnxruntime-int8"], conv, FEEDS))


def test_int8_of_openvino_is_static_whatever_the_model(linear: Callable[..., Path], conv: Path) -> None:
    feeds = [{"x": np.ones((1, 64), np.float32)}]
    operators = kinds(prepare(ENGINES["openvino-int8"], linear(), feeds))
    assert {"QuantizeLinear", "DequantizeLinear", "MatMul"} <= operators
    assert "MatMulInteger" not in operators
    assert prepare(ENGINES["openvino-int8"], conv, FEEDS) == prepare(ENGINES["onnxruntime-int8"], conv, FEEDS)


def test_int8_of_a_model_with_old_operators_runs(conv: Path) -> None:
    """Below opset 13 there is no DequantizeLinear with a scale for each channel."""
    old = onnx.load(str(conv))
    old.opset_import[0].version = 11
    old.ir_version = 7
    bias = onnx.numpy_helper.from_array(np.zeros(8, np.float32), "bias")
    old.graph.initializer.append(bias)
    old.graph.node[0].input.append(bias.name)
    onnx.save(old, str(conv))
    prepared = prepare(ENGINES["onnxruntime-int8"], conv, FEEDS)
    assert onnx.load(str(prepared)).opset_import[0].version == 13
    assert run(open_session(prepared), FEEDS[0])["y"].shape == (1, 8, 8, 8)


def test_a_prepared_file_is_kept_and_made_anew_when_the_model_changes(
    linear: Callable[..., Path], cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = ENGINES["onnxruntime-best"]
    first = prepare(engine, linear(), [])
    stamp = first.stat().st_mtime_ns
    assert first.parent == cache / "bench"
    assert prepare(engine, first.parents[1].parent / "linear.onnx", []) == first
    assert first.stat().st_mtime_ns == stamp
    assert prepare(engine, linear(layers=2), []) != first
    assert not list(cache.rglob("*.part*"))
    assert capfd.readouterr().out == ""


def test_a_model_that_cannot_be_prepared_leaves_nothing(tmp_path: Path, cache: Path, conv: Path) -> None:
    with pytest.raises(Exception, match=r".") as caught:
        prepare(ENGINES["onnxruntime-int8"], conv, [{"image": np.ones((1, 4, 8, 8), np.float32)}])
    assert caught.value
    assert list((cache / "bench").iterdir()) == []


def test_best_keeps_skip_layer_normalization_unfused_and_flushes_denormals() -> None:
    assert ENGINES["onnxruntime-best"].disabled == ("SkipLayerNormFusion",)
    assert ENGINES["onnxruntime-best"].config == {"session.set_denormal_as_zero": "1"}
