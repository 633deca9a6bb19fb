"""`factorize`: graphs before and after, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import weighted_ops
from tests.networks import model_of
from tests.onnx_text import model_from, text_of
from tests.passes.factorized import (
    GEOMETRY,
    ONES,
    attention,
    close,
    convnet,
    factorize,
    images,
    low,
    nodes,
    outputs,
    sentences,
)
from tests.passes.tiny import WIDTH, bits, calibration, context, correlated, feed_forward, samples


@pytest.mark.parametrize(
    "x, call, stored, names",
    [
        ("10, 12", "MatMul (x, W)", (12, 8), ["h_down: MatMul(x, W_down) -> h_down", "h: MatMul(h_down, W_up) -> h"]),
        ("10, 12", "Gemm (x, W, c)", (12, 8), ["h_down: MatMul(x, W_down) -> h_down", "h: Gemm(h_down, W_up, c) -> h"]),
        (
            "10, 12",
            "Gemm <transB = 1> (x, W, c)",
            (8, 12),
            ["h_down: MatMul(x, W_down) -> h_down", "h: Gemm(h_down, W_up, c) -> h"],
        ),
    ],
)
@pytest.mark.parametrize("data", [False, True])
def test_a_weight_of_low_rank_is_taken_apart_without_loss(
    x: str, call: str, stored: tuple[int, ...], names: list[str], data: bool
) -> None:
    given = {"W": low(stored[0], stored[1], 3), "c": np.arange(8, dtype=np.float32)}
    text = f"agraph (float[{x}] x) => (float[10, 8] y) {{ h = {call} y = LayerNormalization (h, one) }}"
    used = {name: value for name, value in (given | ONES).items() if name in ("W", "one") or f"{name})" in call}
    model = model_of(text, **used)
    feeds = [{"x": correlated(10, 12, seed)} for seed in range(8)]
    feed = feeds[0]
    before = outputs(model, feed)
    change = factorize(model, context(samples(*feeds) if data else None), params=0.7)
    assert nodes(model)[:-1] == names
    assert close(outputs(model, feed), before)
    (site,) = change.sites
    assert (site.node, site.weight, site.pattern, site.n, site.k) == ("h", "W", "rank 3", 8, 12)
    assert site.density_after == 3 * 20 / 96
    assert site.error < 1e-6
    assert change.got == {"params": 3 * 20 / 96}
    assert change.asked == {"params": 0.7}
    assert not change.zeros_alone


@pytest.mark.parametrize("attributes", ["alpha = 0.5", "beta = 2.0", "transA = 1"])
def test_a_gemm_that_is_no_plain_product_is_not_taken(attributes: str) -> None:
    x = "12, 10" if "transA" in attributes else "10, 12"
    text = f"""agraph (float[{x}] x) => (float[10, 8] y)
    {{ h = Gemm <{attributes}> (x, W, zero) y = LayerNormalization (h, one) }}"""
    model = model_of(text, W=low(12, 8, 3), **ONES)
    before = text_of(model)
    assert factorize(model, params=0.7).sites == ()
    assert text_of(model) == before


@pytest.mark.parametrize("method", ["whitened", "svd", "fwsvd"])
@pytest.mark.parametrize(
    "kernel, call", [((1, 1), "Conv <strides = [2, 2]> (g, W, b)"), ((3, 2), f"Conv <{GEOMETRY}> (g, W, b)")]
)
def test_a_convolution_of_low_rank(kernel: tuple[int, int], call: str, method: str) -> None:
    channels = 12 if kernel == (1, 1) else 6
    model = convnet(call, channels, kernel, low(8, channels * kernel[0] * kernel[1], 3).reshape(8, channels, *kernel))
    before = outputs(model, images()[0])
    change = factorize(model, context(samples(*images())), params=0.7, method=method)
    assert nodes(model)[2:-1] == ["h_down: Conv(g, W_down) -> h_down", "h: Conv(h_down, W_up, b) -> h"]
    assert [site.pattern for site in change.sites] == ["rank 3" if kernel == (1, 1) else "rank 4"]
    assert close(outputs(model, images()[0]), before, 2e-5)


@pytest.mark.parametrize("data", [False, True])
def test_tucker_of_a_kernel_that_has_few_directions(data: bool) -> None:
    rng = np.random.default_rng(3)
    core = rng.standard_normal((2, 3, 3, 3))
    weight = np.einsum("mo,oiyx,ic->mcyx", rng.standard_normal((8, 2)), core, rng.standard_normal((3, 6)))
    model = convnet("Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (g, W, b)", weight=weight)
    before = outputs(model, images()[0])
    given = context(samples(*images()) if data else None)
    change = factorize(model, given, params=0.3, method="tucker")
    assert nodes(model)[2:-1] == [
        "h_first: Conv(g, W_first) -> h_first",
        "h_core: Conv(h_first, W_core) -> h_core",
        "h: Conv(h_core, W_last, b) -> h",
    ]
    (site,) = change.sites
    assert site.pattern.startswith("tucker ")
    assert site.method == "tucker"
    assert close(outputs(model, images()[0]), before, 2e-5)


def test_tucker_is_for_kernels_and_whitened_for_the_rest() -> None:
    model = convnet("Conv (g, W)", 12, (1, 1))
    change = factorize(model, context(samples(*images())), params=0.7, method="tucker")
    assert [site.method for site in change.sites] == ["whitened"]
    change = factorize(convnet("Conv (g, W)", 12, (1, 1)), params=0.7, method="tucker")
    assert [site.method for site in change.sites] == ["svd"]


def test_sparse_and_low_rank_is_a_sum() -> None:
    model = feed_forward()
    change = factorize(model, context(calibration()), params=0.5, method="sparse-low-rank", rank=0.4, targets=("a0",))
    assert nodes(model)[:5] == [
        "a0_down: MatMul(x, A0_down) -> a0_down",
        "a0_up: MatMul(a0_down, A0_up) -> a0_up",
        "a0_sparse: MatMul(x, A0) -> a0_sparse",
        "a0: Add(a0_sparse, a0_up) -> a0",
        "p0: Add(a0, u0) -> p0",
    ]
    assert change.sites[0].pattern == "rank 1 + sparse"
    outputs(model, {"x": correlated(4, WIDTH, 0)})


LEFT_ALONE = """agraph (float["b", 8, 4, 4] x) => (float["b", 8] y)
{
    a = Conv (x, First)
    b = Conv <group = 8> (a, Depthwise)
    c = Conv <group = 2> (b, Grouped)
    d = Conv (c, Dense)
    n = InstanceNormalization (d, one, zero)
    p = GlobalAveragePool (n)
    f = Flatten (p)
    y = MatMul (f, Head)
}"""


def left_alone() -> Model:
    return model_of(
        LEFT_ALONE,
        First=low(8, 8, 1).reshape(8, 8, 1, 1),
        Depthwise=np.ones((8, 1, 1, 1), np.float32),
        Grouped=low(8, 4, 1).reshape(8, 4, 1, 1),
        Dense=np.asarray(np.random.default_rng(0).standard_normal((8, 8, 1, 1)), np.float32),
        Head=low(8, 8, 1),
        **ONES,
    )


def test_what_is_left_alone_and_why() -> None:
    model = left_alone()
    before = text_of(model)
    change = factorize(model, energy=0.999)
    assert {skip.node: skip.reason for skip in change.skipped} == {
        "a": "first convolution",
        "b": "depthwise convolution",
        "c": "convolution in groups",
        "d": "stays dense: no rank that saves 10 % is worth it",
        "y": "reaches an output with no residual or norm after it",
    }
    assert change.sites == ()
    assert change.summary == "no weight taken apart"
    assert change.zeros_alone
    assert text_of(model) == before


def test_targets_take_the_head_by_name() -> None:
    change = factorize(left_alone(), energy=0.999, targets=("y", "c"))
    assert [site.node for site in change.sites] == ["y"]


def test_a_rank_that_saves_too_little_is_not_worth_it() -> None:
    # 16 x 12: rank 6 has 168 of 192 parameters, rank 7 would have 196.
    model = feed_forward()
    before = bits(model)
    change = factorize(model, context(calibration()), params=0.95, multiple=7)
    assert change.sites == ()
    assert bits(model) == before
    assert change.got == {"params": 1.0}
    assert "asked to keep 95.0% of the parameters, kept 100.0%" in change.warnings[0]


def test_nothing_to_take() -> None:
    model = model_of("agraph (float[1, 8] x) => (float[1, 8] y) { y = LayerNormalization (x, one) }", one=ONES["one"])
    assert factorize(model, params=0.5).sites == ()
    assert factorize(model, context(samples({"x": np.ones((1, 8), np.float32)})), params=0.5).sites == ()


def test_a_sparse_weight_that_stays_dense_keeps_its_zeros_and_says_so() -> None:
    """It makes up for the one before it."""
    model = feed_forward()
    first, second = weighted_ops(model.graph)
    keep = np.random.default_rng(0).random((second.n, second.k)) < 0.25
    first.replace(low(first.n, first.k, 6) + 0.02 * first.rows())
    second.replace(second.rows() * keep)
    change = factorize(model, context(calibration(200)), error=0.01)
    told = {site.node: site for site in change.sites}
    assert told["a0"].pattern.startswith("rank ")
    after = weighted_ops(model.graph)[-1].rows()
    assert told["b0"].pattern == "dense"
    assert told["b0"].density_before == told["b0"].density_after == keep.mean()
    np.testing.assert_array_equal(after != 0, keep)


SHARED = """agraph (float[10, 8] x) => (float[10, 8] y)
{
    a = MatMul (x, W)
    i = LayerNormalization (a, one)
    b = {second}
    c = Add (b, i)
    y = LayerNormalization (c, one)
}"""


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("method, joint", [("svd", False), ("svd", True), ("sparse-low-rank", False)])
def test_a_tied_weight_is_taken_apart_once(data: bool, method: str, joint: bool) -> None:
    model = model_of(SHARED.replace("{second}", "MatMul (i, W)"), W=low(8, 8, 8), one=ONES["one"])
    feeds = [{"x": correlated(10, 8, seed)} for seed in range(4)]
    change = factorize(model, context(samples(*feeds) if data else None), params=0.6, method=method, joint=joint)
    ops = weighted_ops(model.graph)
    assert len({id(op.weight) for op in ops}) == len(ops) / 2
    assert len(change.sites) == 2
    held = sum(np.count_nonzero(op.rows()) for op in {id(op.weight): op for op in ops}.values())
    assert change.got["params"] == pytest.approx(held / 64)
    outputs(model, feeds[0])


@pytest.mark.parametrize("data", [False, True])
def test_a_weight_that_someone_else_needs_whole_stays(data: bool) -> None:
    given = context(samples(*({"x": correlated(10, 8, seed)} for seed in range(4))) if data else None)
    for second in ("Gemm <transB = 1> (i, W)", "Mul (W, W)"):
        text = SHARED.replace("{second}", second)
        if "Mul (W" in second:
            text = text.replace("10", "8")
            given = context()
        model = model_of(text, W=low(8, 8, 1), one=ONES["one"])
        change = factorize(model, given, params=0.5)
        assert change.sites == ()
        assert {skip.reason for skip in change.skipped} == {"its weight is read elsewhere, too, and would have to stay"}


@pytest.mark.parametrize("data", [False, True])
def test_with_macs_a_weight_read_in_two_layouts_is_taken_apart_in_both(data: bool) -> None:
    feeds = [{"x": correlated(10, 8, seed)} for seed in range(4)]
    model = model_of(SHARED.replace("{second}", "Gemm <transB = 1> (i, W)"), W=low(8, 8, 2), one=ONES["one"])
    before = outputs(model, feeds[0])
    change = factorize(model, context(samples(*feeds) if data else None), macs=0.5)
    assert [site.pattern for site in change.sites] == ["rank 2", "rank 2"]
    assert close(outputs(model, feeds[0]), before)


@pytest.mark.parametrize("data", [False, True])
def test_queries_keys_and_values_share_a_down(data: bool) -> None:
    model = attention()
    given = context(samples(*sentences()) if data else None)
    change = factorize(model, given, params=0.6, joint=True)
    # (36 + 12) * 5 of 432 parameters; apart, 24 * 3 of 144 each.
    assert [site.pattern for site in change.sites] == ["rank 5"] * 3
    assert change.got == {"params": 240 / 432}
    assert [site.density_after for site in change.sites] == [80 / 144] * 3
    assert [name for name in nodes(model) if "_down:" in name] == ["qm_down: MatMul(x, Q_down) -> qm_down"]
    assert all(site.error < 0.8 for site in change.sites)  # K is 30 times larger, and not all that counts
    outputs(model, sentences()[0])
    apart = factorize(attention(), given, params=0.6)
    assert [site.pattern for site in apart.sites] != ["rank 5"] * 3
    assert "joint" in change.summary
    assert "joint" not in apart.summary


def test_what_reads_the_same_but_waits_for_another_layer_is_not_joint() -> None:
    """The second Gemm's bias is computed from the first's result, so the two are not solved side by side."""
    rng = np.random.default_rng(0)
    text = """agraph (float[10, 8] x) => (float[10, 8] y)
    { a = Gemm (x, A) b = Gemm (x, B, a) y = LayerNormalization (b, one) }"""
    model = model_of(text, A=low(8, 8, 8), B=rng.standard_normal((8, 8)).astype(np.float32), one=ONES["one"])
    change = factorize(
        model, context(samples(*({"x": correlated(10, 8, s)} for s in range(3)))), params=0.6, joint=True
    )
    assert len(change.sites) == 2
    outputs(model, {"x": correlated(10, 8, 0)})


def test_graph_outputs_keep_their_names() -> None:
    text = """agraph (float[10, 8] x) => (float[10, 8] a, float[10, 8] b) { a = MatMul (x, A) b = MatMul (a, B) }"""
    for method in ("svd", "sparse-low-rank"):
        model = model_of(text, A=low(8, 8, 2), B=low(8, 8, 2, 1))
        before = outputs(model, {"x": correlated(10, 8, 0)})
        factorize(model, params=0.51, method=method, targets=("*",))
        assert [tensor.name for tensor in model.graph.outputs] == ["a", "b"]
        assert close(outputs(model, {"x": correlated(10, 8, 0)}), before)


def test_a_model_from_text_without_names_works_too() -> None:
    model = model_from("""agraph (float[2, 4] x) => (float[2, 4] y)
    <float[4, 4] W = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, float[4] scale = {1, 1, 1, 1}>
    { h = MatMul (x, W) y = LayerNormalization (h, scale) }""")
    change = factorize(model, params=0.5)
    assert [(site.node, site.pattern, round(site.error, 6)) for site in change.sites] == [("h", "rank 1", 0.0)]
    down, up = weighted_ops(model.graph)
    np.testing.assert_allclose(up.rows() @ down.rows(), np.ones((4, 4)), rtol=1e-6)


def test_what_the_outputs_hear_keeps_more() -> None:
    """Two weights that are alike, of which one counts a hundred times as much."""
    model = model_of(
        """agraph (float["b", 12] x) => (float["b", 12] y)
        { a = MatMul (x, A) l = Mul (a, gain) b = MatMul (x, B) s = Add (l, b) y = LayerNormalization (s, one) }""",
        A=low(12, 12, 12),
        B=low(12, 12, 12),
        gain=np.array(100, np.float32),
        one=np.ones(12, np.float32),
    )
    change = factorize(model, context(calibration()), params=0.5, allocate="error")
    loud, quiet = (site.density_after for site in change.sites)
    assert loud > quiet + 0.1


def test_a_weight_that_is_a_result_stays() -> None:
    text = """agraph (float[10, 8] x) => (float[10, 8] y, float[8, 8] W)
    { h = MatMul (x, W) y = LayerNormalization (h, one) }"""
    model = model_of(text, W=low(8, 8, 1), one=ONES["one"])
    change = factorize(model, params=0.5)
    assert change.sites == ()
    assert [skip.reason for skip in change.skipped] == ["its weight is read elsewhere, too, and would have to stay"]
