"""Regions of convolutions with their weights, and the same in ONNX Runtime's own operators."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from spa_compiler.kernels import rx1
from spa_compiler.kernels.window import Window
from spa_compiler.runtime.image_plan import Image
from spa_compiler.runtime.image_spec import CombineSpec, DepthwiseSpec, ImageRegion
from spa_compiler.runtime.images import ImageBuilder
from spa_compiler.runtime.region import LinearSpec
from tests.kernel_harness import sparse
from tests.region_harness import linked, run, session

SAME = (1, 1, 1, 1)


@dataclass(frozen=True)
class Value:
    """An image of the region, and the tensor of the reference that it is."""

    image: Image
    name: str


@dataclass
class Recorder:
    """`ImageBuilder` that draws the weights too and writes down the reference, node by node."""

    axes: int = 2
    builder: ImageBuilder = field(default_factory=ImageBuilder)
    linears: list[np.ndarray] = field(default_factory=list)
    taps: list[np.ndarray] = field(default_factory=list)
    nodes: list[object] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def input(self, channels: int) -> Value:
        return Value(self.builder.input(channels), f"x{len(self.builder.inputs) - 1}")

    def linear(
        self,
        source: Value,
        n: int,
        rows: int,
        act: str = "none",
        *,
        residual: Value | None = None,
        term: Value | None = None,
        window: Window | None = None,
        density: float = 0.3,
        chunk: int | None = None,
    ) -> Value:
        """act(W x + b), through a window if there is one, with a second product of 4 x 1 blocks on `term`."""
        bias = self.rng.standard_normal(n).astype(np.float32)
        spec, y = self._product(source, n, rows, "none" if term else act, window, density, bias, chunk)
        second = None
        if term is not None:
            other, also = self._product(term, n, 4, act, None, 1.0, None, None)
            second, y = (term.image, other), self._node("Add", [y, also])
        if residual is not None:
            y = self._node("Add", [y, residual.name])
        into = residual.image if residual else None
        if window is None:
            made = self.builder.linear(source.image, spec, into, second)
        else:
            made = self.builder.window(source.image, window, spec, into)
        return Value(made, self._activated(y, act))

    def depthwise(self, source: Value, window: Window, act: str = "none") -> Value:
        channels = source.image.channels
        taps = self.rng.standard_normal((channels, window.size[0] * window.size[1])).astype(np.float32)
        bias = self.rng.standard_normal(channels).astype(np.float32)
        self.taps += [taps, bias]
        y = self._conv(source, taps.reshape(channels, 1, *window.size[2 - self.axes :]), bias, window, channels)
        made = self.builder.depthwise(source.image, DepthwiseSpec(window, act, 0.0, 2.0))
        return Value(made, self._activated(y, act))

    def largest(self, source: Value, window: Window) -> Value:
        made = self.builder.largest(source.image, window)
        w, axes = window, self.axes
        pads = [w.pads[i + 2 - axes] for i in (*range(axes), *range(2, 2 + axes))]
        sizes = {
            "kernel_shape": w.size[2 - axes :],
            "strides": w.stride[2 - axes :],
            "dilations": w.dilation[2 - axes :],
        }
        return Value(made, self._node("MaxPool", [source.name], pads=pads, **sizes))

    def mean(self, source: Value) -> Value:
        return Value(self.builder.mean(source.image, self.axes), self._node("GlobalAveragePool", [source.name]))

    def combine(self, op: str, source: Value, other: Value | None = None, act: str = "none") -> Value:
        made = self.builder.combine(source.image, CombineSpec(op, act, 0.25, 0.75), other and other.image)
        y = source.name
        if other is not None:
            y = self._node("Add" if op == "add" else "Mul", [y, other.name])
        return Value(made, self._activated(y, act, 0.25, 0.75))

    def repeat(self, source: Value, grow: tuple[int, int]) -> Value:
        own = (1, 1, *grow[2 - self.axes :])
        scales = self._constant(np.array(own, np.float32))
        modes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        y = self._node("Resize", [source.name, "", scales], **modes)
        return Value(self.builder.repeat(source.image, grow, self.axes), y)

    def unfold(self, source: Value, blocks: int) -> Value:
        made = self.builder.unfold(source.image, (blocks, blocks))
        return Value(made, self._node("DepthToSpace", [source.name], blocksize=blocks, mode="DCR"))

    def part(self, source: Value, first: int, channels: int) -> Value:
        bounds = [self._constant(np.array([v], np.int64)) for v in (first, first + channels, 1)]
        y = self._node("Slice", [source.name, *bounds])
        return Value(self.builder.part(source.image, first, channels), y)

    def concat(self, *sources: Value) -> Value:
        y = self._node("Concat", [s.name for s in sources], axis=1)
        return Value(self.builder.concat([s.image for s in sources]), y)

    def output(self, value: Value) -> None:
        self.builder.output(value.image)
        self.outputs.append(value.name)

    def finish(self) -> Network:
        return Network(self.builder.finish(), self)

    def _product(
        self,
        source: Value,
        n: int,
        rows: int,
        act: str,
        window: Window | None,
        density: float,
        bias: np.ndarray | None,
        chunk: int | None,
    ) -> tuple[LinearSpec, str]:
        k = source.image.channels if window is None else window.k
        weight = sparse(self.rng, n, k, rows, density) / np.float32(k**0.5)
        packed = rx1.pack(weight, bias, rows, chunk)
        self.linears += packed.arrays.values()
        size = (1,) * self.axes if window is None else window.size[2 - self.axes :]
        y = self._conv(source, weight.reshape(n, source.image.channels, *size), bias, window, 1)
        return LinearSpec(n, k, packed.form, act, 0.0, 2.0), y

    def _conv(
        self, source: Value, weight: np.ndarray, bias: np.ndarray | None, window: Window | None, group: int
    ) -> str:
        w, axes = window or Window(1, (1, 1)), self.axes
        inputs = [source.name, *(self._constant(a) for a in (weight, bias) if a is not None)]
        pads = [w.pads[i + 2 - axes] for i in (*range(axes), *range(2, 2 + axes))]
        return self._node(
            "Conv", inputs, group=group, strides=w.stride[2 - axes :], dilations=w.dilation[2 - axes :], pads=pads
        )

    def _activated(self, name: str, act: str, low: float = 0.0, high: float = 2.0) -> str:
        if act == "clip":
            return self._node("Clip", [name, *(self._constant(np.array(v, np.float32)) for v in (low, high))])
        if act == "silu":
            return self._node("Mul", [name, self._node("Sigmoid", [name])])
        if act == "hard_sigmoid":
            return self._node("HardSigmoid", [name], alpha=low, beta=high)
        known = {"relu": "Relu", "sigmoid": "Sigmoid", "hard_swish": "HardSwish"}
        return name if act == "none" else self._node(known[act], [name])

    def _node(self, op: str, inputs: Sequence[str], **attributes: object) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def _constant(self, values: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(values, f"c{len(self.constants)}"))
        return self.constants[-1].name


@dataclass(frozen=True, eq=False)
class Network:
    """A region and its reference."""

    spec: ImageRegion
    made_by: Recorder

    def feeds(self, images: int, *sizes: Sequence[int], seed: int = 0) -> dict[str, np.ndarray]:
        """Random inputs; `sizes` of each, or one for all."""
        rng, features = np.random.default_rng(seed), self.spec.input_features
        own = sizes if len(sizes) > 1 else sizes * len(features)
        shapes = [(images, f, *size) for f, size in zip(features, own, strict=True)]
        return {f"x{i}": rng.standard_normal(s).astype(np.float32) for i, s in enumerate(shapes)}

    def model(
        self, dims: Sequence[int | str | None] | None = None, replace: dict[str, np.ndarray] | None = None
    ) -> bytes:
        """The node alone; `dims` of the inputs without their features, sizes of its own for each by default."""
        arrays = {**self.arrays, **(replace or {})}
        outputs = [f"y{i}" for i in range(len(self.spec.output_features))]
        inputs = [f"x{i}" for i in range(len(self.spec.input_features))]
        node = helper.make_node(self.spec.op_type, [*inputs, *arrays], outputs, domain="ai.spa", site="features/block")
        constants = [numpy_helper.from_array(a, name) for name, a in arrays.items()]
        return self._model([node], constants, outputs, dims)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The node's initializers, in order."""
        made = [*self.made_by.linears, *self.made_by.taps]
        return {f"a{i}": np.asarray(a) for i, a in enumerate(made)}

    def expected(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        r = self.made_by
        model = self._model(r.nodes, r.constants, r.outputs, None)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        found = run(ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]), feeds)
        by_name = dict(zip(dict.fromkeys(r.outputs), found, strict=True))
        return [by_name[name] for name in r.outputs]

    def _model(
        self,
        nodes: Sequence[object],
        constants: Sequence[TensorProto],
        outputs: Sequence[str],
        dims: Sequence[object] | None,
    ) -> bytes:
        inputs = []
        for i, features in enumerate(self.spec.input_features):
            own = dims or ("n", *(f"{'hw'[2 - self.made_by.axes :][a]}{i}" for a in range(self.made_by.axes)))
            inputs.append(helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [own[0], features, *own[1:]]))
        results = [helper.make_tensor_value_info(y, TensorProto.FLOAT, None) for y in dict.fromkeys(outputs)]
        graph = helper.make_graph(nodes, "images", inputs, results, list(constants))
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.spa", 1)]
        return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


def _pointwise() -> Network:
    """1 x 1 convolutions: expand, project, add; an output that is read inside, too."""
    r = Recorder()
    x = r.input(24)
    wide = r.linear(x, 144, 4, "clip")
    r.output(r.linear(wide, 24, 1, residual=x))
    r.output(r.linear(x, 10, 8))
    r.output(wide)
    return r.finish()


def _inverted() -> Network:
    """A chain of three with a residual, and one that halves; both see a depthwise window."""
    r = Recorder()
    x = r.input(24)
    y = r.depthwise(r.linear(x, 144, 1, "clip"), Window(144, (3, 3), pads=SAME), "clip")
    y = r.linear(y, 24, 4, residual=x)
    z = r.depthwise(r.linear(y, 96, 4, "relu"), Window(96, (5, 5), (2, 2), pads=(2, 2, 2, 2)), "relu")
    r.output(r.linear(z, 40, 1))
    return r.finish()


def _bottleneck() -> Network:
    """Of a residual network, with a shortcut that halves."""
    r = Recorder()
    x = r.input(32)
    y = r.linear(x, 16, 4, "relu")
    y = r.linear(y, 16, 1, "relu", window=Window(16, (3, 3), (2, 2), pads=SAME))
    short = r.linear(x, 64, 4, window=Window(32, (1, 1), (2, 2)))
    r.output(r.linear(y, 64, 4, "relu", residual=short))
    return r.finish()


def _basic() -> Network:
    """Two windows in a row, the second one with a residual; more than one chunk."""
    r = Recorder()
    x = r.input(20)
    y = r.linear(x, 40, 4, "relu", window=Window(20, (3, 3), pads=SAME), chunk=16)
    r.output(r.linear(y, 20, 1, "relu", window=Window(40, (3, 3), pads=SAME), residual=x, chunk=8))
    return r.finish()


def _windowed() -> Network:
    """A chain with a residual in the middle."""
    r = Recorder()
    x = r.input(24)
    y = r.linear(x, 96, 4, "relu")
    y = r.linear(y, 24, 4, "clip", window=Window(96, (3, 3), pads=SAME), residual=x)
    r.output(r.linear(y, 16, 1))
    return r.finish()


def _sum() -> Network:
    """Sparse + low rank, and a residual that is another input."""
    r = Recorder()
    x, other = r.input(48), r.input(61)
    thin = r.linear(x, 6, 4, density=1.0)
    r.output(r.linear(x, 61, 1, "relu", residual=other, term=thin))
    r.output(r.linear(r.linear(x, 61, 8, residual=other), 40, 4))
    return r.finish()


def _two() -> Network:
    """Inputs of sizes of their own."""
    r = Recorder()
    a, b = r.input(8), r.input(6)
    r.output(r.linear(a, 12, 1, "clip"))
    r.output(r.depthwise(b, Window(6, (3, 1), (3, 2), (1, 1), (0, 0, 2, 0))))
    r.output(r.linear(r.depthwise(b, Window(6, (2, 3), (1, 3), (2, 1), (1, 0, 1, 4)), "relu"), 9, 4))
    return r.finish()


def _line() -> Network:
    """One axis."""
    r = Recorder(axes=1)
    x = r.input(10)
    y = r.linear(x, 33, 4, "relu", window=Window(10, (1, 3), (1, 2), pads=(0, 1, 0, 1), axes=1))
    y = r.depthwise(y, Window(33, (1, 7), (1, 1), (1, 2), (0, 6, 0, 6), axes=1), "clip")
    r.output(r.linear(y, 16, 1))
    return r.finish()


def _direct() -> Network:
    """A depthwise window on the input, every step an output."""
    r = Recorder()
    x = r.input(16)
    y = r.depthwise(x, Window(16, (3, 3), pads=SAME), "relu")
    z = r.linear(y, 8, 1)
    for value in (y, z, z):
        r.output(value)
    return r.finish()


def _split() -> Network:
    """Half of the channels go on, everything is put together; then pools of pools, as detectors have them."""
    r = Recorder()
    x = r.input(10)
    y = r.linear(x, 24, 4, "silu")
    left, right = r.part(y, 0, 12), r.part(y, 12, 12)
    z = r.linear(right, 12, 1, "silu", window=Window(12, (3, 3), pads=SAME))
    z = r.combine("add", right, r.linear(z, 12, 4, "silu", window=Window(12, (3, 3), pads=SAME)))
    y = r.linear(r.concat(left, right, z), 8, 4, "hard_swish")
    pools = [y]
    for _ in range(3):
        pools.append(r.largest(pools[-1], Window(8, (5, 5), pads=(2, 2, 2, 2))))
    r.output(r.linear(r.concat(*pools), 16, 1))
    r.output(r.part(z, 5, 3))
    return r.finish()


def _gated() -> Network:
    """Squeeze and excitation: channels are scaled by what their means say."""
    r = Recorder()
    x = r.input(18)
    y = r.depthwise(r.linear(x, 33, 4, "hard_swish"), Window(33, (3, 3), (2, 2), pads=SAME), "silu")
    gate = r.linear(r.linear(r.mean(y), 9, 1, "relu", density=0.7), 33, 4, "sigmoid")
    y = r.combine("scale", y, gate, "hard_sigmoid")
    r.output(r.linear(y, 20, 4))
    r.output(r.mean(y))
    return r.finish()


def _up_and_down() -> Network:
    """A skip connection across a pool; pixels come back by repetition and out of channels."""
    r = Recorder()
    x = r.input(6)
    skip = r.linear(x, 16, 4, "relu", window=Window(6, (3, 3), pads=SAME))
    y = r.linear(r.largest(skip, Window(16, (2, 2), (2, 2), pads=(0, 0, 1, 1))), 32, 1, "relu")
    y = r.concat(r.unfold(y, 2), r.repeat(r.linear(y, 5, 4), (2, 2)))
    r.output(r.linear(y, 7, 4, "relu", window=Window(13, (3, 3), pads=SAME)))
    r.output(r.repeat(y, (1, 3)))
    r.output(skip)
    return r.finish()


def _together() -> Network:
    """Put together of inputs, of parts, of the same image twice, of what is put together already; and as an output."""
    r = Recorder()
    x, other = r.input(7), r.input(9)
    y = r.linear(x, 12, 4, "relu")
    z = r.linear(other, 6, 1, residual=r.part(y, 3, 6))
    first = r.concat(x, z, r.part(y, 0, 5), z)
    second = r.concat(first, r.linear(first, 8, 4, "silu"))
    r.output(r.linear(r.combine("mul", second, second), 10, 1))
    r.output(second)
    r.output(r.concat(r.linear(y, 6, 4), r.linear(r.part(x, 2, 4), 3, 1, window=Window(4, (3, 3), pads=SAME))))
    r.output(r.combine("copy", r.part(other, 4, 5), act="sigmoid"))
    return r.finish()


def _dense() -> Network:
    """Every step reads all that came before it, put together anew."""
    r = Recorder()
    x = r.linear(r.input(5), 9, 4)
    seen = [x]
    for _ in range(3):
        y = r.depthwise(r.concat(*seen) if len(seen) > 1 else x, Window(9 + 4 * len(seen) - 4, (1, 1)), "relu")
        seen.append(r.linear(y, 4, 4, window=Window(y.image.channels, (3, 3), pads=SAME)))
    r.output(r.linear(r.concat(*seen), 6, 4))
    return r.finish()


NETWORKS: dict[str, Callable[[], Network]] = {
    "pointwise": _pointwise,
    "inverted": _inverted,
    "bottleneck": _bottleneck,
    "basic": _basic,
    "windowed": _windowed,
    "sum": _sum,
    "two": _two,
    "line": _line,
    "direct": _direct,
    "split": _split,
    "gated": _gated,
    "up and down": _up_and_down,
    "together": _together,
    "dense": _dense,
}


@functools.cache
def network(name: str) -> Network:
    return NETWORKS[name]()


def library() -> Path:
    """That of all NETWORKS."""
    return linked(*(network(name).spec for name in NETWORKS))


@functools.cache
def opened(name: str, threads: int = 1) -> ort.InferenceSession:
    return session(network(name).model(), threads, library())
