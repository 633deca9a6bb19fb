"""What regions of convolutions have a step for, and what only looks alike."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.graph import shapes as graph_shapes
from spa_compiler.placement.between import ImageOp, find_between
from spa_compiler.placement.depthwise import DepthwiseSite
from spa_compiler.runtime.images import ImageBuilder
from tests.networks import F32, model_of

X = np.zeros((2, 6, 8, 8), np.float32)
HEAD = 'g (float[2,6,8,8] x) => (float["a","b","c","d"] y)'


def found(body: str, **weights: F32) -> list[ImageOp | DepthwiseSite]:
    model = model_of(f"{HEAD} {{ {body} }}", **weights)
    return find_between(model, [graph_shapes.fixed(model, {"x": X})])


def lines(op: ImageOp | DepthwiseSite) -> list[str]:
    """The calls that it adds to a region."""
    assert isinstance(op, ImageOp)
    builder = ImageBuilder()
    builder.output(op.build(builder, [builder.input(c) for c in op.channels]))
    return [line for line in builder.finish().lines if "_in(" not in line and "_out(" not in line]


@pytest.mark.parametrize(
    "body, call",
    [
        ("y = MaxPool <kernel_shape = [3, 3]> (x)", "largest(r, 0, 0, 1)"),
        ("y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (x)", "largest(r, 0, 0, 1)"),
        ("y = GlobalAveragePool(x)", "mean(r, 0, 1)"),
        ("y = ReduceMean(x, axes)", "mean(r, 0, 1)"),
        ("y = Add(x, x)", "combine(r, 0, 0, 1, 2)"),
        ("y = DepthToSpace <blocksize = 1> (x)", "unfold(r, 0, 1)"),
        ('y = Resize <mode = "nearest"> (x, , scales)', "repeat(r, 0, 1)"),
    ],
)
def test_steps(body: str, call: str) -> None:
    weights = {"axes": np.array([-1, 2]), "scales": np.array([1, 1, 2, 3], np.float32)}
    (op,) = found(body, **{name: v for name, v in weights.items() if name in body})
    assert lines(op) == [f"TRY(spa_image_{call});"]
    assert op.output.name == "y"


def test_channels_are_taken_apart_and_put_together_without_a_step() -> None:
    bounds = {"low": np.array([-4]), "high": np.array([99]), "one": np.array([1])}
    (op,) = found("y = Slice(x, low, high, one, one)", **bounds)
    assert lines(op) == []
    first, second, third, last = found(
        "l, m, r = Split <axis = 1> (x, sizes) y = Concat <axis = 1> (r, l, m)", sizes=np.array([1, 2, 3])
    )
    assert [lines(op) for op in (first, second, third)] == [[], [], []]
    assert isinstance(last, ImageOp)
    assert last.channels == (3, 1, 2)
    assert last.images == 4


def test_a_concatenation_reads_an_earlier_one_that_begins_alike() -> None:
    body = """a = Relu(x) b = Neg(x) c = Concat <axis = 1> (x, a) d = Concat <axis = 1> (x, a, b, x) e = Concat <axis = 1> (x, b, a)
      f = Concat <axis = 1> (x, a, b, x, a) y = Concat <axis = 1> (c, d, e, f)"""
    ops = {op.output.name: op for op in found(body)}
    sources = {name: [s.name for s in op.sources] for name, op in ops.items() if isinstance(op, ImageOp)}
    assert sources == {
        "c": ["x", "a"],
        "d": ["c", "b", "x"],
        "e": ["x", "b", "a"],
        "f": ["d", "a"],
        "y": ["c", "d", "e", "f"],
    }


def test_activations_come_along() -> None:
    (op,) = found("a = Add(x, x) y = Relu(a)")
    assert [n.op for n in op.nodes] == ["Add", "Relu"]
    assert op.output.name == "y"


def test_averages_and_norms_are_depthwise() -> None:
    (pool,) = found("y = AveragePool <kernel_shape = [2, 2], pads = [1, 1, 0, 0], count_include_pad = 1> (x)")
    assert isinstance(pool, DepthwiseSite)
    assert pool.taps.tolist() == [[0.25] * 4] * 6
    vectors = {name: np.full(6, value, np.float32) for name, value in (("s", 3), ("b", 1), ("m", 2), ("v", 4))}
    (norm,) = found("a = BatchNormalization <epsilon = 0.0> (x, s, b, m, v) y = Relu(a)", **vectors)
    assert isinstance(norm, DepthwiseSite)
    assert (norm.act, norm.taps.tolist(), norm.bias_or_zeros.tolist()) == ("relu", [[1.5]] * 6, [-2.0] * 6)


def test_a_gate_scales_channels() -> None:
    _, op = found("m = GlobalAveragePool(x) y = Mul(m, x)")
    assert isinstance(op, ImageOp)
    assert [s.name for s in op.sources] == ["x", "m"]
    assert lines(op) == ["TRY(spa_image_combine(r, 0, 0, 1, 2));"]


@pytest.mark.parametrize(
    "body",
    [
        'y = MaxPool <kernel_shape = [3, 3], auto_pad = "SAME_UPPER"> (x)',
        "y = MaxPool <kernel_shape = [2, 2], strides = [2, 2], pads = [0, 0, 1, 1], ceil_mode = 1> (x)",
        "y, i = MaxPool <kernel_shape = [3, 3]> (x)",
        "y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x)",
        "y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (x)",
        "y = ReduceMean(x, channels)",
        "m = ReduceMean <keepdims = 0> (x, pixels) y = Unsqueeze(m, pixels)",
        "y = Add(x, row)",
        "y = Mul(x, channel)",
        "y = Concat <axis = 2> (x, x)",
        "y = Slice(x, zero, two, two)",
        "y = Slice(x, zero, two, channels, two)",
        'y = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric"> (x, , scales)',
        'y = Resize <mode = "linear"> (x, , scales)',
        'y = Resize <mode = "nearest"> (x, , halves)',
        'y = DepthToSpace <blocksize = 1, mode = "CRD"> (x)',
        "y = Sub(x, x)",
    ],
)
def test_what_has_no_step(body: str) -> None:
    weights = {
        "channels": np.array([1]),
        "pixels": np.array([2, 3]), "zero": np.array([0]), "two": np.array([2]),
        "row": np.zeros((1, 1, 1, 8), np.float32), "channel": np.zeros((6, 1, 1), np.float32),
        "scales": np.array([1, 1, 2, 2], np.float32), "halves": np.array([1, 1, 0.5, 0.5], np.float32),
    }  # fmt: skip
    assert found(body, **{name: v for name, v in weights.items() if name in body}) == []


def test_other_channels_at_other_shapes_are_none() -> None:
    model = model_of('g (float["n","c",4,4] x) => (float["n","c",4,4] y) { y = Add(x, x) }')
    known = [graph_shapes.fixed(model, {"x": np.zeros((1, c, 4, 4), np.float32)}) for c in (3, 5)]
    assert len(find_between(model, known[:1])) == 1
    assert find_between(model, known) == []
