"""`remove-dead-channels`: graphs before and after, what is absorbed, what must stay, and that nothing changes."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler import targets
from spa_compiler.graph.model import Model
from spa_compiler.graph.session import open_model, run
from spa_compiler.passes import Change, Context
from spa_compiler.passes.remove_dead_channels import RemoveDeadChannels, RemoveDeadChannelsOptions
from tests.onnx_text import assert_becomes, assert_unchanged, model_from, text_of


def clean(model: Model) -> Change:
    context = Context(targets.parse("cpu:x86-64-v4"), np.random.default_rng(0))
    return RemoveDeadChannels(RemoveDeadChannelsOptions()).run(model, context)


def outputs(model: Model) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    feeds = {
        value.name: rng.normal(size=[d if isinstance(d, int) else 2 for d in value.shape]).astype(value.dtype)
        for value in model.signature.inputs
    }
    return list(run(open_model(model), feeds).values())


def assert_same(before: str, after: str) -> None:
    """The rewrite, and that the outputs are what they were."""
    assert_becomes(clean, before, after)
    for want, got in zip(outputs(model_from(before)), outputs(model_from(after)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


# The middle unit of h: its column of A and its bias are zero.
ZERO_WRITER = """agraph (float[2, 2] x) => (float[2, 2] y)
<float[2, 3] A = {1, 0, 2, 3, 0, 4}, float[3] a = {5, 0, 6}, float[3, 2] B = {1, 2, 3, 4, 5, 6}, float[2] b = {1, 1}>
{
    [one] h = Gemm (x, A, a)
    [act] r = Relu (h)
    [two] y = Gemm (r, B, b)
}"""


def test_a_unit_that_is_always_zero_goes() -> None:
    assert_same(
        ZERO_WRITER,
        """agraph (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] A = {1, 2, 3, 4}, float[2] a = {5, 6}, float[2, 2] B = {1, 2, 5, 6}, float[2] b = {1, 1}>
        {
            [one] h = Gemm (x, A, a)
            [act] r = Relu (h)
            [two] y = Gemm (r, B, b)
        }""",
    )


def test_what_is_told() -> None:
    change = clean(model_from(ZERO_WRITER))
    assert change.exact
    assert change.summary == "1 unit of 1 group that made no difference removed"
    (removal,) = change.removed
    assert {(s.name, s.axis, tuple(s.indices)) for s in removal.parameters} == {
        ("A", 1, (1,)),
        ("a", 0, (1,)),
        ("B", 0, (1,)),
    }
    assert {(s.name, s.axis, tuple(s.indices)) for s in removal.activations} == {("h", 1, (1,)), ("r", 1, (1,))}


def test_a_constant_goes_into_the_bias() -> None:
    # Sigmoid(0) = 0.5 times the row (3, 4).
    assert_same(
        ZERO_WRITER.replace("Relu", "Sigmoid"),
        """agraph (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] A = {1, 2, 3, 4}, float[2] a = {5, 6}, float[2, 2] B = {1, 2, 5, 6}, float[2] y_bias = {2.5, 3}>
        {
            [one] h = Gemm (x, A, a)
            [act] r = Sigmoid (h)
            [two] y = Gemm (r, B, y_bias)
        }""",
    )


def test_what_nothing_reads_goes_and_what_wrote_to_it_alone_as_well() -> None:
    # The second row of C is zero, so unit 1 of g is not read; unit 0 of h is read by that one alone.
    assert_same(
        """agraph (float[2, 2] x) => (float[2, 1] y)
        <float[2, 2] A = {1, 2, 3, 4}, float[2, 2] B = {0, 1, 2, 3}, float[2, 1] C = {5, 0}>
        {
            [one] h = MatMul (x, A)
            [act] r = Relu (h)
            [two] g = MatMul (r, B)
            [act2] s = Relu (g)
            [three] y = MatMul (s, C)
        }""",
        """agraph (float[2, 2] x) => (float[2, 1] y)
        <float[2, 1] A = {2, 4}, float[1, 1] B = {2}, float[1, 1] C = {5}>
        {
            [one] h = MatMul (x, A)
            [act] r = Relu (h)
            [two] g = MatMul (r, B)
            [act2] s = Relu (g)
            [three] y = MatMul (s, C)
        }""",
    )


MATMUL = """agraph (float[2, 2] x) => (float[2, 2] y)
<float[2, 2] A = {{1, 0, 3, 0}}, float[2] a = {{5, 7}}, float[2, 2] B = {{1, 2, 3, 4}}{constant}>
{{
    [one] h = Gemm (x, A, a)
    [two] g = MatMul (h, B)
    {rest}
}}"""


def test_behind_a_matmul_the_constant_goes_into_its_add() -> None:
    before = MATMUL.format(constant=", float[2] b = {1, 1}", rest="[add] y = Add (g, b)")
    model = model_from(before)
    want = outputs(model)
    assert len(clean(model).removed) == 1
    assert [node.op for node in model.graph.nodes] == ["Gemm", "MatMul", "Add"]
    np.testing.assert_array_equal(model.graph.nodes[-1].inputs[1].values, [1 + 7 * 3, 1 + 7 * 4])
    np.testing.assert_allclose(outputs(model)[0], want[0], rtol=1e-6)


def test_behind_a_matmul_without_an_add_one_is_put() -> None:
    before = MATMUL.format(constant="", rest="[act] y = Relu (g)")
    model = model_from(before)
    want = outputs(model)
    assert len(clean(model).removed) == 1
    assert [node.op for node in model.graph.nodes] == ["Gemm", "MatMul", "Add", "Relu"]
    np.testing.assert_allclose(outputs(model)[0], want[0], rtol=1e-6)


CONV = """agraph (float[1, 1, 4, 4] x) => (float[1, 1, {size}, {size}] y)
<float[2, 1, 1, 1] A = {{1, 0}}, float[2] a = {{2, 3}}, float[1, 2, 3, 3] B = {{{ones}}}>
{{
    [one] h = Conv (x, A, a)
    [two] y = Conv <pads = [{pads}]> (h, B)
}}""".replace("{ones}", ", ".join(["1"] * 18))


def test_a_convolution_without_padding_takes_constants() -> None:
    model = model_from(CONV.format(size=2, pads="0, 0, 0, 0"))
    want = outputs(model)
    assert len(clean(model).removed) == 1
    np.testing.assert_array_equal(model.graph.nodes[1].inputs[2].values, [3 * 9])
    assert model.graph.nodes[1].inputs[1].shape == (1, 1, 3, 3)
    np.testing.assert_allclose(outputs(model)[0], want[0], rtol=1e-6)


def test_a_padded_convolution_does_not() -> None:
    assert_unchanged(clean, CONV.format(size=4, pads="1, 1, 1, 1"))


def test_nor_does_the_last_unit_of_an_axis_go() -> None:
    model = model_from(ZERO_WRITER.replace("1, 0, 2, 3, 0, 4", "0, 0, 0, 0, 0, 0").replace("5, 0, 6", "0, 0, 0"))
    want = outputs(model)
    change = clean(model)
    assert len(change.removed[0].units) == 2
    np.testing.assert_allclose(outputs(model)[0], want[0])


def test_nothing_dead_nothing_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spa_compiler.passes.remove_dead_channels.open_model", None)
    alive = ZERO_WRITER.replace("0,", "9,")
    assert_unchanged(clean, alive)
    assert clean(model_from(alive)).summary == "no dead channels"


# What a trainer with group sparsity leaves: rows, BatchNormalization and readers of units 1 are zero.
ZERO_GROUP = (
    """agraph (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y)
<float[2, 1, 3, 3] A = {ROWS}, float[2] gain = {2, 0}, float[2] shift = {1, 0}, float[2] mean = {1, 3},
 float[2] var = {1, 2}, float[2, 1, 3, 3] D = {ROWS}, float[1, 2, 3, 3] B = {ROWS}>
{
    [one] h = Conv <pads = [1, 1, 1, 1]> (x, A)
    [bn] n = BatchNormalization (h, gain, shift, mean, var)
    [act] r = Relu (n)
    [depthwise] d = Conv <group = 2, pads = [1, 1, 1, 1]> (r, D)
    [pool] p = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (d)
    [two] y = Conv <pads = [1, 1, 1, 1]> (p, B)
}""".replace("ROWS", "{" + ", ".join(["1"] * 9 + ["0"] * 9) + "}")
    .replace("{{", "{")
    .replace("}}", "}")
)


@pytest.mark.parametrize("domain", ["", None])
def test_zero_groups_go(domain: str | None) -> None:
    model = model_from(ZERO_GROUP)
    for node in model.graph.nodes:
        node.domain = domain
    want = outputs(model)
    change = clean(model)
    assert [one.units for one in change.removed] == [(1,)]
    assert model.graph.nodes[3].attrs["group"] == 1
    np.testing.assert_allclose(outputs(model)[0], want[0], rtol=1e-5)


def test_a_zero_writer_on_a_spine_with_a_living_one_stays() -> None:
    assert_unchanged(
        clean,
        """agraph (float[2, 2] x) => (float[2, 1] y)
        <float[2, 2] A = {1, 0, 2, 0}, float[2, 2] B = {1, 2, 3, 4}, float[2, 1] C = {5, 6}>
        {
            [one] h = MatMul (x, A)
            [two] g = MatMul (x, B)
            [add] s = Add (h, g)
            [three] y = MatMul (s, C)
        }""",
    )


def test_heads_of_decomposed_attention_whose_values_are_zero_go() -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(4, 4)).round(2) for name in ("Q", "K", "V", "O")}
    weights["V"][:, 2:] = 0
    texts = ", ".join(
        f"float[4, 4] {name} = {{{', '.join(str(v) for v in own.ravel())}}}" for name, own in weights.items()
    )
    projections = "\n".join(
        f"{low}p = MatMul (x, {low.upper()})\n{low}r = Reshape (\n{low}p, shape)\n"
        f"{low}t = Transpose <perm = [0, 2, {perm}]> ({low}r)"
        for low, perm in (("q", "1, 3"), ("k", "3, 1"), ("v", "1, 3"))
    )
    model = model_from(f"""agraph (float[1, 3, 4] x) => (float[1, 3, 4] y)
    <{texts}, int64[4] shape = {{0, 0, 2, 2}}, int64[3] flat = {{0, 0, -1}}>
    {{
        {projections}
        s = MatMul (qt, kt)
        p = Softmax <axis = -1> (s)
        c = MatMul (p, vt)
        b = Transpose <perm = [0, 2, 1, 3]> (c)
        m = Reshape (b, flat)
        y = MatMul (m, O)
    }}""")
    want = outputs(model)
    change = clean(model)
    assert [(one.granularity, one.units) for one in change.removed] == [("head", (1,))], text_of(model)
    np.testing.assert_allclose(outputs(model)[0], want[0], rtol=1e-5)
