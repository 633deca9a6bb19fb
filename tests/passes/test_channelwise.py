"""Which weights lie behind a tensor, channel by channel."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.graph.operators import weighted_ops
from spa_compiler.passes.channelwise import sites_behind
from tests.networks import WITH_MICROSOFT, model_of

RNG = np.random.default_rng(0)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def behind(text: str, reader: str, **weights: np.ndarray) -> set[str]:
    ops = weighted_ops(model_of(text, **weights).graph)
    place = {op.name: number for number, op in enumerate(ops)}
    found = sites_behind(ops[place[reader]].node.inputs[0], {id(op.node): n for n, op in enumerate(ops)})
    return {ops[site].name for site in found}


@pytest.mark.parametrize(
    "steps",
    [
        "r = Relu (h)",
        "p = Add (h, b) r = Sigmoid (p)",
        "g = Sigmoid (h) r = Mul (h, g)",
        "e = Erf (h) o = Add (e, b) t = Mul (h, o) r = Mul (t, b)",
    ],
)
def test_activations_hand_channels_on(steps: str) -> None:
    text = f"agraph (float[n, 4] x) => (float[n, 3] y) {{ h = MatMul (x, W) {steps} y = MatMul (r, V) }}"
    assert behind(text, "y", W=f32(4, 6), V=f32(6, 3), b=f32(6)) == {"h"}


@pytest.mark.parametrize("step", ["r = com.microsoft.QuickGelu (h)", "r = com.microsoft.FastGelu (h, b)"])
def test_so_do_those_of_onnx_runtime(step: str) -> None:
    text = f"agraph (float[n, 4] x) => (float[n, 3] y) {{ h = MatMul (x, W) {step} y = MatMul (r, V) }}"
    model = model_of(text, WITH_MICROSOFT, W=f32(4, 6), V=f32(6, 3), b=f32(6))
    ops = weighted_ops(model.graph)
    reader = next(op for op in ops if op.n == 3)
    assert sites_behind(reader.node.inputs[0], {id(op.node): n for n, op in enumerate(ops)}) == {0}


def test_a_stranger_of_a_known_name_ends_the_way() -> None:
    text = "agraph (float[n, 4] x) => (float[n, 3] y) { h = MatMul (x, W) r = Relu (h) y = MatMul (r, V) }"
    model = model_of(text, W=f32(4, 6), V=f32(6, 3))
    ops = weighted_ops(model.graph)
    places = {id(op.node): number for number, op in enumerate(ops)}
    assert sites_behind(ops[1].node.inputs[0], places) == {0}
    ops[1].node.inputs[0].inputs[0].domain = "someone.else"
    assert sites_behind(ops[1].node.inputs[0], places) == set()


@pytest.mark.parametrize("step", ["r = Softmax (h)", "r = Transpose <perm = [1, 0]> (h)", "r = CumSum (h, one)"])
def test_what_mixes_or_moves_channels_ends_the_way(step: str) -> None:
    text = f"agraph (float[6, 4] x) => (float[6, 3] y) {{ h = MatMul (x, W) {step} y = MatMul (r, V) }}"
    assert behind(text, "y", W=f32(4, 6), V=f32(6, 3), one=np.array(1)) == set()


def test_an_input_of_the_model_among_the_sources_ends_the_way() -> None:
    text = "agraph (float[n, 6] x) => (float[n, 3] y) { h = MatMul (x, W) r = Add (h, x) y = MatMul (r, V) }"
    assert behind(text, "y", W=f32(6, 6), V=f32(6, 3)) == set()


def test_a_sum_has_both_behind_it() -> None:
    text = """agraph (float[n, 4] x) => (float[n, 3] y) {
      h = MatMul (x, W) g = MatMul (x, U) r = Add (h, g) y = MatMul (r, V)
    }"""
    assert behind(text, "y", W=f32(4, 6), U=f32(4, 6), V=f32(6, 3)) == {"h", "g"}


CONVS = """agraph (float[1, 3, 8, 8] x) => (float[1, 5, h, w] y) {
  a = Conv (x, W) n = BatchNormalization (a, s, b, m, v) r = Clip (n, low, high)
  d = Conv <group = GROUPS> (r, D) e = Relu (d) p = MaxPool <kernel_shape = [2, 2]> (e) y = Conv (p, V)
}"""


@pytest.mark.parametrize("groups, width, found", [(6, 1, {"a"}), (3, 2, {"d"}), (1, 6, {"d"})])
def test_depthwise_convolutions_are_walked_through_unless_they_are_sites(
    groups: int, width: int, found: set[str]
) -> None:
    weights = {"W": f32(6, 3, 1, 1), "D": f32(6, width, 3, 3), "V": f32(5, 6, 1, 1)}
    weights |= {name: np.abs(f32(6)) for name in "sbmv"} | {"low": np.float32(0), "high": np.float32(6)}
    model = model_of(CONVS.replace("GROUPS", str(groups)), **weights)
    ops = weighted_ops(model.graph)
    taken = [op for op in ops if not (groups == 6 and op.name == "d")]
    places = {id(op.node): number for number, op in enumerate(taken)}
    assert {taken[site].name for site in sites_behind(taken[-1].node.inputs[0], places)} == found
