from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Prepared models and the timing lock of a test are its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPA_CACHE_DIR", str(folder))
    return folder


def _save(path: Path, text: str, weights: dict[str, tuple[int, ...]]) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 17]> g {text}')
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        values = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, str(path))
    return path


@pytest.fixture
def linear(tmp_path: Path) -> Callable[..., Path]:
    """Makes a file with `layers` matrix products of `[n, 64]` by `[64, 64]`: as slow as one asks for."""

    def make(name: str = "linear.onnx", layers: int = 1) -> Path:
        steps = [f"h{i + 1} = MatMul(h{i}, w)" for i in range(layers)]
        body = " ".join(["h0 = Softmax(x)", *steps, f"y = Relu(h{layers})"])
        return _save(tmp_path / name, f"(float[n, 64] x) => (float[n, 64] y) {{ {body} }}", {"w": (64, 64)})

    return make


@pytest.fixture
def conv(tmp_path: Path) -> Path:
    text = "(float[n, 3, 8, 8] image) => (float[n, 8, 8, 8] y) { c = Conv<pads=[1, 1, 1, 1]>(image, w)  y = Relu(c) }"
    return _save(tmp_path / "conv.onnx", text, {"w": (8, 3, 3, 3)})
