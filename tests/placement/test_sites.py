"""Sites carry the bias and the activation behind them; what is no site says why."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.errors import ModelError
from spa_compiler.kernels.window import Window
from spa_compiler.placement.sites import Refusal, Site, find_sites
from tests.networks import F32, model_of

RNG = np.random.default_rng(0)


def array(*shape: int) -> F32:
    return RNG.standard_normal(shape).astype(np.float32)


W, B = array(6, 8), array(8)


def only(text: str, **weights: F32) -> Site:
    sites, refusals = find_sites(model_of(text, **weights))
    assert refusals == []
    assert len(sites) == 1
    return sites[0]


def refusal(text: str, **weights: F32) -> Refusal:
    sites, refusals = find_sites(model_of(text, **weights))
    assert sites == []
    assert len(refusals) == 1
    return refusals[0]


def test_a_bare_product() -> None:
    site = only("g (float[N,6] x) => (float[N,8] y) { y = MatMul(x, w) }", w=W)
    assert (site.name, site.n, site.k, site.layout, site.act) == ("y", 8, 6, "rows", "none")
    assert (site.source.name, site.output.name, site.bias) == ("x", "y", None)
    np.testing.assert_array_equal(site.weight, W.T)
    assert site.weight.flags.c_contiguous
    assert site.density == 1


@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1, 8)])
@pytest.mark.parametrize("operands", ["m, b", "b, m"])
def test_an_added_vector_is_the_bias(shape: tuple[int, ...], operands: str) -> None:
    text = f"g (float[N,S,6] x) => (float[N,S,8] y) {{ m = MatMul(x, w) y = Add({operands}) }}"
    site = only(text, w=W, b=B.reshape(shape))
    assert site.output.name == "y"
    assert [n.op for n in site.nodes] == ["MatMul", "Add"]
    assert site.bias is not None
    np.testing.assert_array_equal(site.bias, B)


@pytest.mark.parametrize(
    "text,b",
    [
        ("g (float[N,6] x) => (float[1,N,8] y) { m = MatMul(x, w) y = Add(m, b) }", B.reshape(1, 1, 8)),  # widens
        ("g (float[8,6] x) => (float[8,8] y) { m = MatMul(x, w) y = Add(m, b) }", B.reshape(8, 1)),  # one per token
        ("g (float[N,6] x) => (float[N,8] y) { m = MatMul(x, w) y = Add(m, b) }", array(1)),  # one value for all
        ("g (float[2,6] x) => (float[2,8] y) { m = MatMul(x, w) y = Add(m, b) }", array(2, 8)),  # a whole matrix
    ],
)
def test_what_is_added_but_no_bias(text: str, b: F32) -> None:
    site = only(text, w=W, b=b)
    assert (site.bias, site.output.name) == (None, "m")


def test_a_product_that_others_read_keeps_its_add() -> None:
    site = only(
        "g (float[N,6] x) => (float[N,8] y, float[N,8] z) { m = MatMul(x, w) y = Add(m, b) z = Abs(m) }", w=W, b=B
    )
    assert (site.bias, site.output.name) == (None, "m")
    site = only("g (float[N,6] x) => (float[N,8] y, float[N,8] m) { m = MatMul(x, w) y = Add(m, b) }", w=W, b=B)
    assert (site.bias, site.output.name) == (None, "m")


def test_bias_and_activation() -> None:
    site = only("g (float[N,6] x) => (float[N,8] y) { m = MatMul(x, w) a = Add(b, m) y = Clip(a, {0}, {6}) }", w=W, b=B)
    assert (site.act, site.low, site.high, site.output.name) == ("clip", 0.0, 6.0, "y")
    assert [n.op for n in site.nodes] == ["MatMul", "Add", "Clip"]


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("c", [(8,), (1, 8), (1,), ()])
def test_gemm(trans: int, c: tuple[int, ...]) -> None:
    values = array(*c)
    text = f"g (float[N,6] x) => (float[N,8] y) {{ y = Gemm <transB = {trans}> (x, w, b) }}"
    site = only(text, w=W.T if trans else W, b=values)
    np.testing.assert_array_equal(site.weight, W.T)
    assert site.bias is not None
    np.testing.assert_array_equal(site.bias, np.broadcast_to(values.reshape(-1), 8))


def test_gemm_without_c_and_an_add_behind_it() -> None:
    site = only("g (float[N,6] x) => (float[N,8] y) { m = Gemm(x, w) y = Add(m, b) }", w=W, b=B)
    assert site.bias is not None
    assert site.output.name == "y"


@pytest.mark.parametrize("attribute", ["alpha = 0.5", "beta = 0.5"])
def test_a_scaled_gemm_is_left_alone(attribute: str) -> None:
    model = model_of(f"g (float[N,6] x) => (float[N,8] y) {{ y = Gemm <{attribute}> (x, w, b) }}", w=W, b=B)
    sites, (refusal,) = find_sites(model)
    assert sites == []
    assert (refusal.op.n, refusal.op.k, refusal.reason) == (8, 6, "alpha, beta and transA have no kernel")


def test_a_transposed_gemm_is_left_alone() -> None:
    model = model_of("g (float[6,N] x) => (float[N,8] y) { y = Gemm <transA = 1> (x, w, b) }", w=W, b=B)
    sites, (refusal,) = find_sites(model)
    assert sites == []
    assert (refusal.op.n, refusal.op.k, refusal.reason) == (8, 6, "alpha, beta and transA have no kernel")


def test_pointwise_conv() -> None:
    site = only(
        "g (float[N,6,H,V] x) => (float[N,8,H,V] y) { c = Conv(x, w, b) y = Relu(c) }", w=W.T.reshape(8, 6, 1, 1), b=B
    )
    assert (site.layout, site.n, site.k, site.act) == ("planes", 8, 6, "relu")
    np.testing.assert_array_equal(site.weight, W.T)
    assert site.bias is not None
    np.testing.assert_array_equal(site.bias, B)


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (8, 1, 1)])
def test_a_bias_behind_a_conv(shape: tuple[int, ...]) -> None:
    text = "g (float[N,6,H,V] x) => (float[N,8,H,V] y) { c = Conv(x, w) y = Add(c, b) }"
    site = only(text, w=W.T.reshape(8, 6, 1, 1), b=B.reshape(shape))
    assert site.bias is not None
    np.testing.assert_array_equal(site.bias, B)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1, 1, 8), (8, 1)])
def test_what_is_added_to_a_conv_but_no_bias(shape: tuple[int, ...]) -> None:
    """[8] aligns with the columns of an 8 x 8 image, not with its channels."""
    text = "g (float[1,6,8,8] x) => (float[1,8,8,8] y) { c = Conv(x, w) y = Add(c, b) }"
    site = only(text, w=W.T.reshape(8, 6, 1, 1), b=B.reshape(shape))
    assert (site.bias, site.output.name) == (None, "c")


@pytest.mark.parametrize(
    "call,shape,window",
    [
        ("Conv(x, w)", (8, 6, 3, 2), Window(6, (3, 2))),
        ("Conv <strides = [2, 1]> (x, w)", (8, 6, 1, 1), Window(6, (1, 1), (2, 1))),
        ("Conv <pads = [0, 1, 2, 3]> (x, w)", (8, 6, 1, 1), Window(6, (1, 1), pads=(0, 1, 2, 3))),
        ('Conv <auto_pad = "VALID", dilations = [1, 3]> (x, w)', (8, 6, 2, 2), Window(6, (2, 2), dilation=(1, 3))),
    ],
)
def test_a_convolution_with_a_window(call: str, shape: tuple[int, ...], window: Window) -> None:
    weight = array(*shape)
    site = only(f"g (float[1,6,8,8] x) => (float[1,8,H,V] y) {{ c = {call} y = Relu(c) }}", w=weight)
    assert (site.layout, site.n, site.k, site.act, site.window) == ("planes", 8, window.k, "relu", window)
    np.testing.assert_array_equal(site.weight, weight.reshape(8, -1))
    height, width = window.outputs(8, 8)
    assert site.pixels((3, 6, 8, 8)) == 3 * height * width


def test_a_window_over_one_axis() -> None:
    text = "g (float[1,6,9] x) => (float[1,8,5] y) { y = Conv <strides = [2], pads = [1, 1]> (x, w) }"
    site = only(text, w=array(8, 6, 3))
    assert site.window == Window(6, (1, 3), (1, 2), pads=(0, 1, 0, 1), axes=1)
    assert site.pixels((2, 6, 9)) == 10


def test_groups_are_blocks_along_the_diagonal() -> None:
    text = "g (float[1,4,8,8] x) => (float[1,6,8,8] y) { y = Conv <group = 2, pads = [1, 1, 1, 1]> (x, w) }"
    w = array(6, 2, 3, 3)
    w[:, 1] = 0
    site = only(text, w=w)
    assert (site.n, site.k, site.op.k, site.window) == (6, 36, 18, Window(4, (3, 3), pads=(1, 1, 1, 1)))
    assert (site.weight[:3, :18] == w[:3].reshape(3, 18)).all()
    assert (site.weight[3:, 18:] == w[3:].reshape(3, 18)).all()
    assert not site.weight[:3, 18:].any()
    assert not site.weight[3:, :18].any()
    assert site.density == np.count_nonzero(w) / w.size, "what no output sees counts for nothing"
    assert site.pixels((1, 4, 8, 8)) == 64


def test_groups_of_single_pixels_need_no_window() -> None:
    site = only("g (float[1,4,8] x) => (float[1,6,8] y) { y = Conv <group = 2> (x, w) }", w=array(6, 2, 1))
    assert (site.window, site.k, site.weight.shape, site.pixels((1, 4, 8))) == (None, 4, (6, 4), 8)


@pytest.mark.parametrize(
    "text,shape,words",
    [
        ("g (float[1,6,8,8] x) => (float[1,6,H,V] y) { y = Conv <group = 6> (x, w) }", (6, 1, 1, 1), "a depthwise"),
        (
            "g (float[1,8192,1,1] x) => (float[1,9216,1,1] y) { y = Conv <group = 1024> (x, w) }",
            (9216, 8, 1, 1),
            "more columns than kernels are tried with",
        ),
        ("g (float[1,6,8,8,8] x) => (float[1,8,H,V,D] y) { y = Conv (x, w) }", (8, 6, 2, 2, 2), "over 3 axes"),
        (
            'g (float[1,6,8,8] x) => (float[1,8,H,V] y) { y = Conv <auto_pad = "SAME_UPPER"> (x, w) }',
            (8, 6, 2, 2),
            "auto_pad",
        ),
        (
            "g (float[1,6,8,8] x) => (float[1,8,H,V] y) { y = Conv <strides = [288230376151711745, 1]> (x, w) }",
            (8, 6, 1, 1),
            "its stride of 288230376151711745",
        ),
        (
            "g (float[1,6,8,8] x) => (float[1,8,H,V] y) { y = Conv <strides = [1, 5]> (x, w) }",
            (8, 6, 4, 4),
            "its stride of 5 leaves out most",
        ),
        (
            "g (float[1,6,8,8] x) => (float[1,8,H,V] y) { y = Conv <pads = [0, 0, 0, 40000]> (x, w) }",
            (8, 6, 2, 2),
            "larger than 32768",
        ),
        (
            "g (float[1,6,8,H] x) => (float[1,8,8,V] y) { y = Conv <dilations = [1, 4294967296]> (x, w) }",
            (8, 6, 1, 2),
            "larger than 32768",
        ),
    ],
)
def test_other_convolutions_are_refused(text: str, shape: tuple[int, ...], words: str) -> None:
    found = refusal(text, w=array(*shape))
    assert words in found.reason
    assert found.op.name == "y"


def test_other_types_are_refused() -> None:
    found = refusal("g (double[N,6] x) => (double[N,8] y) { y = MatMul(x, w) }", w=W.astype(np.float64))
    assert found.reason == "its weight is float64, kernels are float32"


def test_a_computed_c_is_refused() -> None:
    found = refusal("g (float[N,6] x, float[8] b) => (float[N,8] y) { y = Gemm(x, w, b) }", w=W)
    assert "C is not a constant vector" in found.reason


def test_what_is_added_to_a_conv_of_unknown_rank_is_no_bias() -> None:
    text = """g (float[1,6,8,8] x, int64[R] s) => (float[1,8,8,8] y) {
      r = Reshape(x, s) c = Conv <pads = [1, 1, 1, 1]> (r, w) y = Add(c, b) }"""
    site = only(text, w=array(8, 6, 3, 3), b=B)
    assert (site.bias, site.output.name) == (None, "c")


def test_a_computed_conv_bias_is_refused() -> None:
    found = refusal("g (float[1,6,4,4] x, float[8] b) => (float[1,8,4,4] y) { y = Conv(x, w, b) }", w=array(8, 6, 1, 1))
    assert found.reason == "its bias is not constant"


def test_constant_activations_are_refused() -> None:
    found = refusal("g (float[4,8] x) => (float[4,8] y) { m = MatMul(a, w) y = Add(x, m) }", a=array(4, 6), w=W)
    assert found.reason == "its activations are constant"


@pytest.mark.parametrize("left", ["w, x", "x, v"])
def test_products_without_a_constant_right_operand_are_no_sites(left: str) -> None:
    model = model_of(f"g (float[6,6] x, float[6,6] v) => (float[6,6] y) {{ y = MatMul({left}) }}", w=array(6, 6))
    assert find_sites(model) == ([], [])


def test_order_is_that_of_the_graph() -> None:
    model = model_of(
        "g (float[N,8] x) => (float[N,8] c) { b = MatMul(x, w) a = MatMul(b, w) c = MatMul(a, v) }",
        w=array(8, 8),
        v=array(8, 8),
    )
    assert [s.name for s in find_sites(model)[0]] == ["b", "a", "c"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(bad: float) -> None:
    spoiled = W.copy()
    spoiled[3, 4] = bad
    with pytest.raises(ModelError, match="the weight 'w' holds NaN or Inf") as caught:
        find_sites(model_of("g (float[N,6] x) => (float[N,8] y) { y = MatMul(x, w) }", w=spoiled))
    assert caught.value.where == "y"
    assert caught.value.fix


def test_weights_that_are_no_numbers_in_what_has_no_kernel() -> None:
    spoiled = array(8, 6, 3, 3)
    spoiled[0, 0, 0, 0] = np.nan
    with pytest.raises(ModelError, match="holds NaN or Inf"):
        find_sites(model_of("g (float[1,6,8,8] x) => (float[1,8,6,6] y) { y = Conv(x, w) }", w=spoiled))


def test_infinities_in_masks_are_nobodys_business() -> None:
    mask = np.full((8,), -np.inf, np.float32)
    site = only("g (float[N,6] x) => (float[N,8] y) { m = MatMul(x, w) r = Relu(m) y = Add(r, b) }", w=W, b=mask)
    assert site.act == "relu"
