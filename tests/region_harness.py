"""Regions with their weights and a numpy evaluation, ONNX models around them, sessions on a library linked once."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from spa_compiler.kernels import activation, grouped, permuted, rx1, rxc, sliced
from spa_compiler.kernels.form import Packed
from spa_compiler.runtime import link
from spa_compiler.runtime.generate import Region
from spa_compiler.runtime.region import LinearSpec, NormSpec, Panel, RegionBuilder, RegionSpec, Term
from tests.kernel_harness import LEVELS, n_of_m, sparse

F64 = NDArray[np.float64]
Evaluate = Callable[[Sequence[F64]], F64]  # inputs [tokens, features] -> [tokens, features]

MCPU = LEVELS[0]  # the best that this machine runs
EPSILON = 1e-5
INTERLEAVED, PERMUTED = 0, -1


@dataclass
class Value:
    """A panel, and how numpy computes it."""

    panel: Panel
    evaluate: Evaluate


@dataclass
class Recorder:
    """`RegionBuilder` that draws the weights too and remembers what numpy has to do.

    `rows` of a step: R of its blocks; INTERLEAVED, PERMUTED: slices. `cols`: C, if it is not 1. `kind`: (N, M) instead.
    """

    rng: np.random.Generator
    builder: RegionBuilder = field(init=False)
    linears: list[tuple[str, np.ndarray]] = field(default_factory=list)
    weights: int = 0
    norms: list[tuple[str, np.ndarray]] = field(default_factory=list)
    outputs: list[Evaluate] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.builder = RegionBuilder()

    def pack(self, features: int) -> Value:
        index = len(self.builder.inputs)
        return Value(self.builder.pack(features), lambda inputs: inputs[index])

    def _product(self, source: Value, n: int, rows: int, options: dict[str, Any]) -> tuple[Any, Evaluate]:
        k = source.panel.features
        cols, kind = options.pop("cols", 1), options.pop("kind", None)
        if kind:
            weight = n_of_m(self.rng, n, k, *kind) / np.float32(k**0.5)
        else:
            weight = sparse(self.rng, n, k, max(rows, 1), options.pop("density", 0.3), cols) / np.float32(k**0.5)
        bias = self.rng.standard_normal(n).astype(np.float32)
        if kind:
            packed: Packed = grouped.pack(weight, bias, *kind, **options)
        elif cols > 1:
            packed = rxc.pack(weight, bias, rows, cols, **options)
        elif rows == PERMUTED:
            packed = permuted.pack(weight, bias, 3)
        else:
            packed = rx1.pack(weight, bias, rows, **options) if rows else sliced.pack(weight, bias, **options)
        number, self.weights = self.weights, self.weights + 1
        self.linears += [(f"{a}{number}", v) for a, v in packed.arrays.items()]
        return packed, lambda inputs: source.evaluate(inputs) @ weight.T.astype(np.float64)

    def _weight(
        self, source: Value, n: int, rows: int, act: str, residual: Value | None, options: dict[str, Any]
    ) -> tuple[LinearSpec, Term | None, Evaluate]:
        bounds = options.pop("low", 0.0), options.pop("high", 0.0)
        factor: Value | None = options.pop("factor", None)
        second: tuple[Value, int, float] | None = options.pop("term", None)  # what it reads, R, density
        packed, product = self._product(source, n, rows, options)
        parts, term = [product], None
        spec = LinearSpec(n, packed.k, packed.form, "none" if second else act, *bounds)
        if second:
            other, also = self._product(second[0], n, second[1], {"density": second[2], "chunk": packed.chunk})
            term = Term(second[0].panel, LinearSpec(n, other.k, other.form, act, *bounds))
            parts.append(also)

        def evaluate(inputs: Sequence[F64]) -> F64:
            y = sum(part(inputs) for part in parts) + packed.bias[:n].astype(np.float64)
            y = activation.reference(y + residual.evaluate(inputs) if residual else y, act, *bounds)
            return y * factor.evaluate(inputs) if factor else y

        return spec, term, evaluate

    def linear(
        self, source: Value, n: int, rows: int, act: str = "none", residual: Value | None = None, **options: Any
    ) -> Value:
        factor: Value | None = options.get("factor")
        spec, term, evaluate = self._weight(source, n, rows, act, residual, options)
        panels = [None if v is None else v.panel for v in (residual, factor)]
        return Value(self.builder.linear(source.panel, spec, panels[0], term, panels[1]), evaluate)

    def linear_out(
        self, source: Value, n: int, rows: int, act: str = "none", residual: Value | None = None, **options: Any
    ) -> None:
        spec, term, evaluate = self._weight(source, n, rows, act, residual, options)
        self.builder.linear_out(source.panel, spec, residual.panel if residual else None, term)
        self.outputs.append(evaluate)

    def norm(self, source: Value, centred: bool = True) -> Value:
        features, number = source.panel.features, len(self.builder.norms)
        gamma, beta = self.rng.standard_normal((2, features)).astype(np.float32)
        self.norms.append((f"gamma{number}", gamma))
        if centred:
            self.norms.append((f"beta{number}", beta))

        def evaluate(inputs: Sequence[F64]) -> F64:
            x = source.evaluate(inputs)
            x = x - x.mean(axis=1, keepdims=True) if centred else x
            return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPSILON) * gamma + (beta if centred else 0)

        return Value(self.builder.norm(source.panel, NormSpec(features, EPSILON, centred)), evaluate)

    def unpack(self, source: Value) -> None:
        self.builder.unpack(source.panel)
        self.outputs.append(source.evaluate)

    def finish(self) -> Case:
        return Case(self.builder.finish(), dict(self.linears + self.norms), tuple(self.outputs))


@dataclass(frozen=True, eq=False)
class Case:
    """A region, its initializers in the order of the node's inputs, and what each output is."""

    spec: RegionSpec
    arrays: dict[str, np.ndarray]
    outputs: tuple[Evaluate, ...]

    def feeds(self, dims: Sequence[int], seed: int = 0) -> dict[str, np.ndarray]:
        """Random inputs; `dims` without the features: [batch, tokens]."""
        rng = np.random.default_rng(seed)
        shapes = [(*dims, f) for f in self.spec.input_features]
        return {f"x{i}": rng.standard_normal(s).astype(np.float32) for i, s in enumerate(shapes)}

    def expected(self, feeds: dict[str, np.ndarray]) -> list[F64]:
        flat = [x.reshape(-1, x.shape[-1]).astype(np.float64) for x in feeds.values()]
        leading = feeds["x0"].shape[:-1]
        return [y.reshape(*leading, y.shape[-1]) for y in (output(flat) for output in self.outputs)]

    def model(
        self,
        dims: Sequence[int | str | None] | None = ("batch", "tokens"),
        replace: dict[str, np.ndarray | None] | None = None,
        attributes: dict[str, Any] | None = None,
        extra_nodes: Sequence[Any] = (),
        outputs: Sequence[str] | None = None,
    ) -> bytes:
        """An ONNX model of one node.

        Args:
            dims: of the inputs, without the features; None leaves the shape out, and hence unknown.
            replace: other arrays for some initializers; None makes one an input of the graph.
            attributes: of the node; the default is its site.
            extra_nodes: nodes after the region.
            outputs: names of the node's outputs instead of y0, y1, ...
        """
        arrays: dict[str, np.ndarray | None] = {**self.arrays, **(replace or {})}
        xs = [f"x{i}" for i in range(len(self.spec.input_features))]
        ys = list(outputs or [f"y{i}" for i in range(len(self.spec.output_features))])
        node = helper.make_node(
            self.spec.op_type,
            [*xs, *arrays],
            ys,
            domain="ai.spa",
            **({"site": "encoder/dense"} if attributes is None else attributes),
        )

        def info(name: str, features: int, dims: Sequence[int | str | None] | None) -> Any:
            if dims is None:
                return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, [*dims, features])

        given = [info(x, f, dims) for x, f in zip(xs, self.spec.input_features, strict=True)]
        for name, array in arrays.items():
            if array is None:
                kind = helper.np_dtype_to_tensor_dtype(self.arrays[name].dtype)
                given.append(helper.make_tensor_value_info(name, kind, self.arrays[name].shape))
        results = [y for n in extra_nodes for y in n.output] or [y for y in ys if y]
        graph = helper.make_graph(
            [node, *extra_nodes],
            "region",
            given,
            [helper.make_tensor_value_info(y, TensorProto.FLOAT, None) for y in results],
            [numpy_helper.from_array(a, name) for name, a in arrays.items() if a is not None],
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.spa", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def _mlp() -> Case:
    """A transformer's feed-forward part, with a projection of its result straight to an output."""
    r = Recorder(np.random.default_rng(1))
    x = r.pack(100)
    hidden = r.linear(x, 388, 4, "gelu_erf")
    y = r.norm(r.linear(hidden, 100, 4, residual=x))
    r.unpack(y)
    r.linear_out(y, 50, 1, k_block=48)
    return r.finish()


def _single() -> Case:
    """One unstructured layer."""
    r = Recorder(np.random.default_rng(2))
    r.linear_out(r.pack(64), 37, 1, "relu", k_block=24, chunk=16)
    return r.finish()


def _wide() -> Case:
    """More than one chunk, odd sizes, both ways out; the residual is another input."""
    r = Recorder(np.random.default_rng(3))
    x, other = r.pack(301), r.pack(600)
    y = r.linear(x, 600, 8, "silu", residual=other, chunk=256)
    r.unpack(y)
    r.linear_out(y, 530, 1, "gelu_tanh", density=0.05)
    r.linear_out(x, 600, 4, residual=y)
    return r.finish()


def _sum() -> Case:
    """Sparse + low rank in one pass: blocks of other heights, several blocks of columns, odd sizes, both ways out."""
    r = Recorder(np.random.default_rng(5))
    x, other = r.pack(301), r.pack(600)
    thin = r.linear(x, 13, 4, density=1.0)
    y = r.linear(x, 600, 1, "silu", residual=other, term=(thin, 4, 1.0))
    r.unpack(y)
    r.linear_out(y, 530, 8, "clip", low=-0.5, high=0.5, term=(x, 1, 0.1))
    r.linear_out(x, 24, 1, term=(thin, 8, 1.0))
    return r.finish()


def _thin() -> Case:
    """Sparse + low rank with weights that are small beside the panels of many tokens."""
    r = Recorder(np.random.default_rng(6))
    x = r.pack(64)
    y = r.linear(x, 96, 1, "relu", term=(r.linear(x, 8, 4, density=1.0), 4, 1.0))
    r.unpack(y)
    r.linear_out(y, 64, 8, residual=x, term=(x, 1, 0.1))
    return r.finish()


def _few() -> Case:
    """The forms for few tokens: slices and blocks of 16 rows, in blocks of columns, added up, both ways out."""
    r = Recorder(np.random.default_rng(7))
    x = r.pack(100)
    hidden = r.linear(x, 388, INTERLEAVED, "gelu_erf", k_block=48)
    y = r.norm(r.linear(hidden, 100, 16, "silu", residual=x))
    r.unpack(r.linear(y, 40, INTERLEAVED, residual=r.linear(x, 40, 16), term=(x, 1, 0.1)))
    r.linear_out(y, 50, 16, "relu", term=(x, INTERLEAVED, 0.2))
    return r.finish()


def _windows() -> Case:
    """Slices for one token, by themselves, added up and both ways out; the last window of the inputs is short."""
    r = Recorder(np.random.default_rng(8))
    x = r.pack(140)
    hidden = r.linear(x, 300, PERMUTED, "silu", density=0.1)
    y = r.linear(hidden, 140, PERMUTED, "relu", residual=x)
    r.unpack(r.linear(y, 40, PERMUTED, term=(x, PERMUTED, 0.2)))
    r.linear_out(y, 50, PERMUTED)
    return r.finish()


def _gated() -> Case:
    """A Llama's feed-forward part: RMS norms and gates, of odd sizes, in several chunks, with a residual and a sum."""
    r = Recorder(np.random.default_rng(8))
    x = r.pack(101)
    normed = r.norm(x, centred=False)
    gate = r.linear(normed, 301, 4, "silu", chunk=128)
    y = r.linear(r.linear(normed, 301, 1, factor=gate), 101, 1, residual=x)
    r.unpack(y)
    z = r.linear(
        r.norm(y, centred=False), 40, 4, "relu", residual=r.linear(r.norm(y), 40, 8), factor=r.linear(x, 40, 4)
    )
    r.linear_out(r.linear(z, 40, 1, "silu", term=(x, 4, 0.5), factor=z), 35, INTERLEAVED)
    return r.finish()


def _blocks() -> Case:
    """R x C blocks: several blocks of columns, a short last group, added up with others, both ways out."""
    r = Recorder(np.random.default_rng(8))
    x = r.pack(100)
    hidden = r.linear(x, 389, 4, "gelu_erf", cols=4, k_block=48, chunk=64)
    r.unpack(hidden)
    y = r.norm(r.linear(r.linear(x, 200, 1, cols=4), 100, 8, "silu", residual=x, cols=2))
    r.unpack(r.linear(y, 40, 2, cols=2, residual=r.linear(x, 40, 2, cols=4), term=(x, 1, 0.1)))
    r.linear_out(y, 50, 4, "clip", cols=4, low=-0.5, high=0.5, k_block=64)
    return r.finish()


def _grouped() -> Case:
    """N:M: several blocks of columns, the last one short, short last groups, added up with others, both ways out."""
    r = Recorder(np.random.default_rng(9))
    x = r.pack(160)
    hidden = r.linear(x, 390, 4, "gelu_erf", kind=(2, 4), k_block=64, chunk=64)
    r.unpack(hidden)
    y = r.linear(r.linear(x, 192, 4, kind=(4, 8)), 160, 4, "silu", residual=x, kind=(1, 4))
    r.unpack(r.linear(y, 40, 4, kind=(8, 16), residual=r.linear(x, 40, 2), term=(x, 1, 0.1)))
    r.linear_out(y, 51, 4, "clip", kind=(2, 4), low=-0.5, high=0.5)
    return r.finish()


CASES: dict[str, Callable[[], Case]] = {
    "mlp": _mlp,
    "single": _single,
    "wide": _wide,
    "sum": _sum,
    "thin": _thin,
    "few": _few,
    "windows": _windows,
    "gated": _gated,
    "blocks": _blocks,
    "grouped": _grouped,
}


@functools.cache
def case(name: str) -> Case:
    return CASES[name]()


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="spa-tests-")


@functools.cache
def linked(*specs: Region) -> Path:
    """A library of these regions, linked once per test run; the loader knows libraries by their paths."""
    folder = Path(_folder().name)
    path = folder / f"kernels{len(list(folder.iterdir()))}.so"
    link.link(specs, (MCPU,), path)
    return path


def library() -> Path:
    """That of all CASES."""
    return linked(*(case(name).spec for name in CASES))


def session(model: bytes, threads: int = 1, path: Path | None = None) -> ort.InferenceSession:
    """A quiet session with the library registered."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(path or library()))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Every run is quiet: errors come as exceptions, not on stderr too."""
    options = ort.RunOptions()
    options.log_severity_level = 4
    return list(session.run(None, feeds, options))


def assert_parity(got: Sequence[np.ndarray], want: Sequence[F64], tolerance: float = 1e-5) -> None:
    """Same shapes, and within `tolerance` of each output's largest magnitude."""
    assert [g.shape for g in got] == [w.shape for w in want]
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        error = np.abs(g - w).max(initial=0.0)
        assert error <= tolerance * np.abs(w).max(initial=1e-30), f"output {i} is off by {error:.3g}"
