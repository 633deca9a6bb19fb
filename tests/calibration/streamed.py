"""Models, feeds and moments written out by hand, for tests of the stream."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np

from spa_compiler.calibration.moments import Moments
from spa_compiler.calibration.samples import Samples
from spa_compiler.calibration.stream import Stream
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import WeightedOp, weighted_ops
from spa_compiler.graph.session import Feeds, open_model, run
from tests.networks import model_of

F64 = np.ndarray


def arrays(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) / np.sqrt(prod(shape[1:]))).astype(np.float32)
        for name, shape in shapes.items()
    }


def tokens() -> Model:
    """Sites side by side, a site behind a residual stream that differs, and a Gemm on merged axes."""
    return model_of(
        """g (float[batch, seq, 6] x, int64[batch, seq] attention_mask) => (float[rows, 3] y) {
          q = MatMul (x, wq) k = MatMul (x, wk) t = Tanh (q) m = Mul (t, k) o = MatMul (m, wo) r = Add (o, x)
          f = MatMul (r, w1) c = Add (f, b1) h = Relu (c) d = MatMul (h, w2) s = Add (r, d)
          flat = Reshape (s, merged) y = Gemm <transB = 1> (flat, wg, bg) unused = Cast <to = 1> (attention_mask)
        }""",
        merged=np.array([-1, 6]),
        **arrays({"wq": (6, 5), "wk": (6, 5), "wo": (5, 6), "w1": (6, 8), "b1": (8,), "w2": (8, 6)}),
        **arrays({"wg": (3, 6), "bg": (3,)}, seed=1),
    )


def images() -> Model:
    """Convolutions with padding, strides, dilations and groups, a residual between them, and a Gemm."""
    return model_of(
        """g (float[batch, 3, 9, 8] x) => (float[batch, 5] y) {
          a = Conv <pads = [1, 1, 1, 1], strides = [2, 1]> (x, wa, ba) r = Relu (a)
          b = Conv <group = 2, pads = [1, 0, 1, 2], dilations = [1, 2]> (r, wb)
          c = Conv (r, wc) s = Add (b, c) e = Conv <group = 4, pads = [1, 1, 1, 1]> (s, we) t = Add (e, s) u = Relu (t)
          p = GlobalAveragePool (u) f = Flatten (p) y = Gemm (f, wy)
        }""",
        **arrays({"wa": (4, 3, 3, 3), "ba": (4,), "wb": (8, 2, 3, 2), "wc": (8, 4, 1, 1), "we": (8, 2, 3, 3)}),
        **arrays({"wy": (8, 5)}, seed=1),
    )


def token_feeds(count: int, padded: bool = False, seed: int = 0) -> list[Feeds]:
    """Feeds of unequal size; the first is by far the largest, so that it is done last when several run at a time."""
    rng = np.random.default_rng(seed)
    feeds = []
    for number in range(count):
        shape = (40, 30) if number == 0 else (2, 3 + number % 4)
        mask = np.ones(shape, np.int64)
        if padded:
            mask[:, : number % 3] = 0
            mask[0, -1] = 0
        feeds.append({"x": rng.standard_normal((*shape, 6)).astype(np.float32), "attention_mask": mask})
    return feeds


def image_feeds(count: int, seed: int = 0) -> list[Feeds]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((2 + n, 3, 9, 8)).astype(np.float32)} for n in range(count)]


def samples(feeds: list[Feeds]) -> Samples:
    return Samples(lambda: iter(feeds), len(feeds))


CASES: dict[str, tuple[Callable[[], Model], Callable[[int], list[Feeds]]]] = {
    "tokens": (tokens, token_feeds),
    "images": (images, image_feeds),
}
RESIDUALS = {"tokens": {"d": "r"}, "images": {"e": "s"}}
"""Sites, by their results, and what these are added to."""


def im2col(op: WeightedOp, x: F64) -> F64:
    """[groups, positions, k], one output position after the other."""
    if op.kind != "Conv":
        return x.reshape(1, -1, x.shape[-1])
    attrs = op.node.attrs
    top, left, bottom, right = attrs.get("pads", [0, 0, 0, 0])
    (down, along), (dy, dx) = attrs.get("strides", [1, 1]), attrs.get("dilations", [1, 1])
    height, width = op.kernel
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    per = x.shape[1] // op.group
    rows: list[list[F64]] = [[] for _ in range(op.group)]
    for image in x:
        for i in range(0, x.shape[2] - (height - 1) * dy, down):
            for j in range(0, x.shape[3] - (width - 1) * dx, along):
                patch = image[:, i : i + (height - 1) * dy + 1 : dy, j : j + (width - 1) * dx + 1 : dx]
                for group in range(op.group):
                    rows[group].append(patch[group * per : (group + 1) * per].reshape(-1))
    return np.array(rows)


def results(op: WeightedOp, y: F64) -> F64:
    """What is shaped like the result of an operator, as [groups, positions, n / groups]."""
    flat = y.reshape(-1, op.n) if op.kind != "Conv" else y.transpose(0, 2, 3, 1).reshape(-1, op.n)
    return flat.reshape(len(flat), op.group, -1).transpose(1, 0, 2)


def tensors(model: Model, names: list[str], feeds: list[Feeds]) -> list[Feeds]:
    """The values of tensors for each feed."""
    inputs = {tensor.name for tensor in model.graph.inputs}
    session = open_model(model, outputs=[name for name in dict.fromkeys(names) if name not in inputs], optimize="none")
    return [{name: array.astype(np.float64) for name, array in (run(session, feed) | feed).items()} for feed in feeds]


def read_by(op: WeightedOp) -> str:
    return str(op.node.inputs[0].name)


def rewritten(model: Model) -> tuple[Model, list[F64], list[tuple[str, F64] | None]]:
    """A copy with every weight, and every bias that a Gemm, Conv or Add holds, shaken; and what it was shaken to."""
    copy, rng = model.copy(), np.random.default_rng(9)
    weights: list[F64] = []
    biases: list[tuple[str, F64] | None] = []
    for op in weighted_ops(copy.graph):
        rows = op.rows() + 0.3 * rng.standard_normal((op.n, op.k)).astype(np.float32)
        op.replace(rows)
        weights.append(rows)
        name = next((n for n in ("b1", "bg", "ba") if n in _near(op)), None)
        if name is None:
            biases.append(None)
            continue
        held = copy.graph.tensors()[name]
        held.values = held.values + rng.standard_normal(held.values.shape).astype(np.float32)
        biases.append((name, held.values))
    return copy, weights, biases


def _near(op: WeightedOp) -> set[str]:
    """What it reads, and what those that read its result do."""
    return {str(t.name) for node in (op.node, *op.node.outputs[0].outputs) for t in node.inputs}


def place_of(model: Model, name: str) -> tuple[int, int]:
    """Number of the node that reads a constant, and as which input."""
    return next(
        (number, place)
        for number, node in enumerate(model.graph.nodes)
        for place, tensor in enumerate(node.inputs)
        if tensor.name == name
    )


def expected(
    op: WeightedOp,
    now: list[Feeds],
    before: list[Feeds],
    target: str | None = None,
    keep: list[F64 | None] | None = None,
) -> dict[str, F64]:
    """All moments of one site. `keep` marks the positions that count."""
    keep = keep or [None] * len(now)

    def of(make: str, feeds: list[Feeds]) -> F64:
        parts = [im2col(op, f[read_by(op)]) if make == "x" else results(op, f[str(target)]) for f in feeds]
        return np.concatenate([p if k is None else p[:, k] for p, k in zip(parts, keep, strict=True)], axis=1)

    x, z = of("x", now), of("x", before)
    turned, count = x.transpose(0, 2, 1), x.shape[1]
    found = {
        "count": np.array(count),
        "mean": x.mean(axis=1),
        "gram": turned @ x / count,
        "dense_mean": z.mean(axis=1),
        "cross": turned @ z / count,
    }
    if target is not None:
        lost = of("t", before) - of("t", now)
        found |= {"target_mean": lost.mean(axis=1), "extra": turned @ lost / count}
    return found


def assert_moments(got: Moments, wanted: dict[str, F64]) -> None:
    assert got.count == wanted.pop("count")
    for name, value in wanted.items():
        assert got.get(name).shape == value.shape
        np.testing.assert_allclose(got.get(name), value, rtol=2e-4, atol=2e-5, err_msg=name)


def all_moments(stream: Stream) -> dict[int, Moments]:
    return {collected.site: collected.fit for wave in stream for collected in wave}
