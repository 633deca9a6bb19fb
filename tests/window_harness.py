"""Convolutions with a window as regions, and the same as ONNX Runtime's own Conv."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from spa_compiler.kernels import activation, rx1, rxc
from spa_compiler.kernels.window import Window
from spa_compiler.runtime.image_spec import ImageRegion
from spa_compiler.runtime.images import ImageBuilder
from spa_compiler.runtime.region import LinearSpec
from tests.kernel_harness import sparse
from tests.region_harness import run

LOW, HIGH = -0.5, 0.75


@dataclass(frozen=True)
class Convolution:
    """A weight behind a window, as R x C blocks."""

    window: Window
    n: int
    rows: int
    act: str = "none"
    density: float = 0.3
    cols: int = 1

    @functools.cached_property
    def weight(self) -> np.ndarray:
        rng = np.random.default_rng(self.n)
        return sparse(rng, self.n, self.window.k, self.rows, self.density, self.cols) / np.float32(self.window.k**0.5)

    @functools.cached_property
    def bias(self) -> np.ndarray:
        return np.random.default_rng(1).standard_normal(self.n).astype(np.float32)

    @functools.cached_property
    def packed(self) -> rx1.Packed | rxc.Packed:
        if self.cols > 1:
            return rxc.pack(self.weight, self.bias, self.rows, self.cols)
        return rx1.pack(self.weight, self.bias, self.rows)

    @property
    def region(self) -> ImageRegion:
        builder, p = ImageBuilder(), self.packed
        spec = LinearSpec(p.n, p.k, p.form, self.act, LOW, HIGH)
        builder.output(builder.window(builder.input(self.window.channels), self.window, spec))
        return builder.finish()

    def model(self, shape: list[int | str] | None = None) -> bytes:
        """The node alone; `shape` of the input, unknown sizes by default."""
        shape = shape or ["n", self.window.channels, *("h", "w")[2 - self.window.axes :]]
        node = helper.make_node(
            self.region.op_type, ["x", *self.packed.arrays], ["y"], domain="ai.spa", site="features/conv"
        )
        arrays = [numpy_helper.from_array(a, n) for n, a in self.packed.arrays.items()]
        return _model(node, shape, arrays)

    def dense(self) -> bytes:
        """ONNX Runtime's own."""
        w, axes = self.window, self.window.axes
        node = helper.make_node(
            "Conv",
            ["x", "w", "b"],
            ["y"],
            strides=w.stride[-axes:],
            dilations=w.dilation[-axes:],
            pads=[w.pads[i + 2 - axes] for i in (*range(axes), *range(2, 2 + axes))],
        )
        weight = self.weight.reshape(self.n, w.channels, *w.size[-axes:])
        arrays = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(self.bias, "b")]
        return _model(node, ["n", w.channels, *("h", "w")[2 - axes :]], arrays)

    def image(self, images: int, *size: int, seed: int = 0) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {"x": rng.standard_normal((images, self.window.channels, *size)).astype(np.float32)}

    def expected(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        (y,) = run(ort.InferenceSession(self.dense(), providers=["CPUExecutionProvider"]), feeds)
        return [activation.reference(y.astype(np.float64), self.act, LOW, HIGH)]


def _model(node: object, shape: list[int | str], arrays: list[TensorProto]) -> bytes:
    graph = helper.make_graph(
        [node],
        "convolution",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        arrays,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.spa", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


CONVOLUTIONS = {
    "same": Convolution(Window(5, (3, 3), pads=(1, 1, 1, 1)), 37, 4, "relu"),
    "valid": Convolution(Window(6, (3, 3)), 20, 1),
    "halved": Convolution(Window(8, (3, 3), (2, 2), pads=(1, 1, 1, 1)), 70, 1, "clip"),
    "stem": Convolution(Window(3, (7, 7), (2, 2), pads=(3, 3, 3, 3)), 64, 8, "silu"),
    "skip": Convolution(Window(24, (1, 1), (2, 2)), 48, 4),
    "odd": Convolution(Window(4, (2, 5), (1, 3), (3, 2), (0, 4, 2, 1)), 9, 1),
    "line": Convolution(Window(10, (1, 3), (1, 2), (1, 1), (0, 1, 0, 1), axes=1), 33, 4, "gelu_erf"),
    "large": Convolution(Window(64, (3, 3), pads=(1, 1, 1, 1)), 300, 4, density=0.1),
    "blocks": Convolution(Window(8, (3, 3), pads=(1, 1, 1, 1)), 37, 4, "relu", cols=4),
    "wide blocks": Convolution(Window(12, (2, 3), (2, 1)), 22, 1, "silu", 0.2, cols=2),
    "empty": Convolution(Window(2, (3, 3), pads=(1, 1, 1, 1)), 5, 1, density=0.0),
}
