"""`--restore-unused`: dense weights back, with their biases, for every layer but those that run sparse."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.passes.restore import restore
from tests.networks import model_of
from tests.passes.tiny import bits, calibration, context, feed_forward, rows, sparsify

NAMES = ["a0", "b0", "a1", "b1"]


def sparse(method: str = "sparsegpt") -> tuple[Model, Model]:
    """A model with zeros and shifted biases, and what it was."""
    before = feed_forward(blocks=2)
    model = before.copy()
    sparsify(model, context(calibration()), sparsity=0.5, method=method)
    return model, before


def biases(model: Model) -> list[np.ndarray]:
    return [model.graph.tensors()[name].values for name in ("u0", "v0", "u1", "v1")]


@pytest.mark.parametrize("used", [[], ["b0"], ["a0", "b1"], NAMES], ids=str)
def test_all_but_those_that_run_sparse(used: list[str]) -> None:
    model, before = sparse()
    zeros, shifted = rows(model), [bias.copy() for bias in biases(model)]
    names = restore(model, before, used)
    assert names == [name for name in NAMES if name not in used]
    for place, name in enumerate(NAMES):
        wanted = zeros if name in used else rows(before)
        np.testing.assert_array_equal(rows(model)[place], wanted[place])
        bias = shifted if name in used else biases(before)
        np.testing.assert_array_equal(biases(model)[place], bias[place])
        assert not np.array_equal(shifted[place], biases(before)[place])
    if not used:
        assert bits(model) == bits(before)


def test_what_it_was_is_not_written_to() -> None:
    model, before = sparse()
    held = bits(before)
    restore(model, before, [])
    weighted_ops(model.graph)[0].weight.values[:] = 7
    assert bits(before) == held


def test_layers_that_did_not_change_are_not_named() -> None:
    before = feed_forward(blocks=2)
    model = before.copy()
    assert restore(model, before, []) == []
    sparsify(model, context(), sparsity=0.5, targets=("b1",))
    assert restore(model, before, []) == ["b1"]
    assert restore(model, before, []) == []


def test_layers_of_another_shape_are_left_alone() -> None:
    """Cut, factorized or renamed: there is nothing to put back."""
    before = feed_forward(blocks=2)
    model, other = sparse()[0], feed_forward(blocks=2)
    for op in weighted_ops(other.graph):
        if op.name == "a0":
            op.weight.values = op.weight.values[:, :8]
        if op.name == "b1":
            op.node.name = "b1_again"
    held = rows(model)
    assert restore(model, other, []) == ["b0", "a1"]
    np.testing.assert_array_equal(rows(model)[0], held[0])
    np.testing.assert_array_equal(rows(model)[3], held[3])
    assert np.array_equal(rows(model)[1], rows(before)[1])


def test_convolutions_and_gemms() -> None:
    rng = np.random.default_rng(0)
    shapes = {"c": (4, 2, 3, 3), "d": (4,), "w": (4, 5), "e": (5,)}
    before = model_of(
        """g (float[N, 4, 5, 5] x) => (float[N, 5] y) {
          a = Conv <group = 2> (x, c, d) p = GlobalAveragePool (a) f = Flatten (p) y = Gemm (f, w, e)
        }""",
        **{name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()},
    )
    model = before.copy()
    for op in weighted_ops(model.graph):
        op.replace(op.rows() * 0)
    for name in ("d", "e"):
        model.graph.tensors()[name].values = model.graph.tensors()[name].values + 1
    assert restore(model, before, []) == ["a", "y"]
    assert bits(model) == bits(before)


def shared() -> Model:
    return model_of(
        "g (float[N, 4] x) => (float[N, 4] y) { a = MatMul (x, w) r = Relu (a) b = MatMul (r, w) y = Relu (b) }",
        w=np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32),
    )


def test_a_shared_weight_is_restored_as_one() -> None:
    before = shared()
    model = before.copy()
    sparsify(model, context(), sparsity=0.5, targets=("*",))
    assert len(set(map(id, (op.weight for op in weighted_ops(model.graph))))) == 1
    assert restore(model, before, []) == ["a", "b"]
    first, second = (op.weight for op in weighted_ops(model.graph))
    assert first is second
    np.testing.assert_array_equal(first.values, before.graph.tensors()["w"].values)


def test_a_shared_weight_that_is_used_once_keeps_its_zeros_there() -> None:
    before = shared()
    model = before.copy()
    sparsify(model, context(), sparsity=0.5, targets=("*",))
    assert restore(model, before, ["b"]) == ["a"]
    dense, zeros = rows(model)
    np.testing.assert_array_equal(dense, rows(before)[0])
    assert np.count_nonzero(zeros) == 8


def test_a_weight_shared_with_a_layer_that_was_left_alone_is_one_again() -> None:
    before = shared()
    for place in ("a", "b"):
        model = before.copy()
        sparsify(model, context(), sparsity=0.5, targets=(place,))
        assert restore(model, before, []) == [place]
        first, second = (op.weight for op in weighted_ops(model.graph))
        assert first is second
        assert bits(model) == bits(before)


def test_layers_that_make_up_for_others_without_new_zeros_stay() -> None:
    before = feed_forward(blocks=2)
    model = before.copy()
    sparsify(model, context(), sparsity=0.5, targets=("a0",))
    moved = weighted_ops(model.graph)[1]
    moved.replace(moved.rows() * np.float32(1.5))
    held = rows(model)[1]
    assert restore(model, before, []) == ["a0"]
    np.testing.assert_array_equal(rows(model)[1], held)
