"""`quantize`: graphs before and after, what it leaves alone, what samples are good for, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from spa_compiler import targets
from spa_compiler.calibration.samples import Samples
from spa_compiler.errors import ModelError, UsageError
from spa_compiler.graph.model import Model
from spa_compiler.passes import Change, Context, from_flags
from spa_compiler.passes.quantize import Quantize, QuantizeOptions
from spa_compiler.solvers.four_bits import Grid, nearest
from tests.networks import model_of
from tests.onnx_text import assert_becomes, assert_unchanged, model_from
from tests.passes.tiny import bits, calibration, context, feed_forward, rows, sparsify


def quantize(given: Context | None = None, **options: object) -> Callable[[Model], Change]:
    return lambda model: Quantize(QuantizeOptions(**options)).run(model, given or context())  # type: ignore[arg-type]


# x [2, 4] -> MatMul with W [4 inputs, 4 outputs] -> norm: nothing is left alone by default.
NORMED = """agraph (float[2, 4] x) => (float[2, 4] y)
<float[4, 4] W = {{{values}}}, float[4] scale = {{1, 1, 1, 1}}>
{{
    [mm] h = MatMul (x, W)
    [norm] y = LayerNormalization (h, scale)
}}"""


def normed(*values: float) -> str:
    return NORMED.format(values=", ".join(map(str, values)))


def test_each_output_has_a_grid_of_sixteen_values_with_nought_among_them() -> None:
    # Columns of W are outputs: 0 .. 15, -7.5 .. 7.5 in steps of 1 (0 is a value, so they move by a half), a single
    # value, and zeros.
    assert_becomes(
        quantize(),
        normed(0, -7.25, 0, 0, 1.125, 0, 3, 0, 2.375, 4.125, 0, 0, 15, 7.75, 0, 0),
        normed(0, -7, 0, 0, 1, 0, 3, 0, 2, 4, 0, 0, 15, 8, 0, 0),
    )


def test_symmetric_grids_reach_from_minus_eight_to_seven() -> None:
    assert_becomes(
        quantize(symmetric=True),
        normed(-8, 7, 0, 1, 3.25, 0, 0, 0, 0, -4.75, 0, 0, 6.75, 3.125, 0, 0),
        normed(-8, 7, 0, 1, 3, 0, 0, 0, 0, -5, 0, 0, 7, 3, 0, 0),
    )


GEMM = """agraph (float[2, 4] x) => (float[2, 1] y)
<float[1, 4] W = {{{w}}}, float[1] b = {{5}}, float[1] one = {{1}}>
{{
    [g] h = Gemm <transB = 1> (x, W, b)
    [norm] y = LayerNormalization (h, one)
}}"""


def test_a_gemm_and_its_bias_that_nothing_is_known_about() -> None:
    assert_becomes(quantize(), GEMM.format(w="0, 1.125, 2.375, 15"), GEMM.format(w="0, 1, 2, 15"))


@pytest.mark.parametrize(
    "text",
    [
        """agraph (float[1, 2, 3, 3] x) => (float[1, 2, 3, 3] y)
        <float[2, 2, 1, 1] W = {1, 2.3, 3.1, 4}, float[2, 2, 1, 1] V = {1.1, 2.3, 3.1, 4}, float[2] one = {1, 1}>
        {
            [c] h = Conv (x, W)
            [d] g = Conv (h, V)
            [norm] y = InstanceNormalization (g, one, one)
        }""",  # convolutions, the second one not the first
        """agraph (float[2, 4] x) => (float[2, 2] y) <float[4, 2] W = {1, 2, 3.1, 4, 5, 6.3, 7, 8}>
        { [mm] y = MatMul (x, W) }""",  # what gives the output
        """agraph (float[2, 4] x, float[4, 4] w) => (float[2, 4] y) <float[4] one = {1, 1, 1, 1}>
        { [mm] h = MatMul (x, w) [norm] y = LayerNormalization (h, one) }""",  # no constant weight
        normed(0, -7, 0, 0, 1, 0, 3, 0, 2, 4, 0, 0, 15, 8, 0, 0),  # on grids already
        normed(0, -1, 0, 0, 1, 0, 3, 0, 2, 4, 0, 0, 3, 1, 0, 0),  # of which they use a few values
    ],
)
def test_what_stays_as_it_is(text: str) -> None:
    assert_unchanged(quantize(), text)


def test_it_says_what_it_did_and_why_not() -> None:
    change = quantize(group=32, method="rtn")(feed_forward())
    assert change.summary == "2 weights of 384 elements on grids of 4 bits (groups of 32, rtn)"
    first, second = change.sites
    assert (first.node, first.pattern, first.method, first.n, first.k) == (
        "a0",
        "4 bits in groups of 32",
        "rtn",
        16,
        12,
    )
    assert all(0.01 < site.error < 0.12 for site in (first, second))
    assert change.zeros_alone
    convolution = """agraph (float[1, 2, 3, 3] x) => (float[1, 2, 3, 3] y)
        <float[2, 2, 1, 1] W = {1, 2.3, 3.1, 4}, float[2] one = {1, 1}>
        { [c] h = Conv (x, W) [norm] y = InstanceNormalization (h, one, one) }"""
    change = quantize(targets=("c",))(model_from(convolution))
    assert [(s.node, s.reason) for s in change.skipped] == [
        ("c", "a convolution: weights of 4 bits are for MatMul and Gemm")
    ]
    assert change.summary == "no weight taken"
    assert change.warnings == ()


@pytest.mark.parametrize("target, precision, warns", [
    ("cpu:x86-64-v4", "f32", "on cpu:x86-64-v4: kernels that read them are for --target cuda"),
    ("cuda:sm_90", "f32", "on float32: kernels"),
    ("cuda:sm_90", "fp16", None),
])  # fmt: skip
def test_where_no_kernel_reads_four_bits_it_says_so_once(target: str, precision: str, warns: str | None) -> None:
    given = Context(targets.parse(target), np.random.default_rng(0), precision=precision)
    warnings = quantize(given)(feed_forward(blocks=2)).warnings
    assert len(warnings) == (warns is not None)
    assert warns is None or warns in warnings[0]


# ---- with samples ----


def test_a_second_run_changes_nothing_more() -> None:
    for given in (None, calibration()):
        model = feed_forward(blocks=2)
        quantize(context(given), group=32)(model)
        before = bits(model)
        again = quantize(context(given), group=32)(model)
        assert bits(model) == before
        assert {site.error for site in again.sites} == {0.0}


def outputs_off(model: Model, whole: Model, given: Samples) -> float:
    from spa_compiler.calibration.estimate import output_change

    return output_change(whole, model, given, threads=1)


def test_with_samples_inputs_make_up_for_each_other() -> None:
    found: dict[str, tuple[float, float]] = {}
    for method in ("rtn", "gptq", "auto"):
        model = feed_forward(seed=1)
        change = quantize(context(calibration()), group=32, method=method)(model)
        found[method] = (change.sites[0].error, outputs_off(model, feed_forward(seed=1), calibration()))
    assert found["auto"] == found["gptq"]
    assert found["gptq"][0] < 0.8 * found["rtn"][0]
    assert found["gptq"][1] < found["rtn"][1]


def test_biases_take_up_the_shift_of_the_means() -> None:
    from spa_compiler.graph.model import constants

    before = {c.name: c.values.copy() for c in constants(feed_forward().graph)}
    for method in ("rtn", "gptq"):
        model = feed_forward()
        quantize(context(calibration()), group=32, method=method)(model)
        assert all(
            not np.array_equal(before[c.name], c.values) for c in constants(model.graph) if c.name in ("u0", "v0")
        )


@pytest.mark.parametrize("given", [None, calibration()], ids=["weights", "samples"])
def test_it_follows_sparsify(given: Samples | None) -> None:
    model = feed_forward(blocks=2)
    sparsify(model, context(given), sparsity=0.5)
    masks = [row != 0 for row in rows(model)]
    change = quantize(context(given), group=32)(model)
    for mask, row in zip(masks, rows(model), strict=True):
        assert not row[~mask].any()
        np.testing.assert_array_equal(nearest(row, Grid(32)), row)
    assert all(site.density_after <= site.density_before < 0.8 for site in change.sites)


def test_results_do_not_depend_on_workers() -> None:
    models = [feed_forward(blocks=2), feed_forward(blocks=2)]
    for workers, model in zip((1, 2), models, strict=True):
        quantize(context(calibration(), workers=workers), group=32)(model)
    assert bits(models[0]) == bits(models[1])


def test_a_weight_that_two_layers_share_stays_one() -> None:
    rng = np.random.default_rng(0)
    model = model_of(
        """g (float[2, 4] x) => (float[2, 4] y) {
          a = MatMul (x, w) b = LayerNormalization (a, one) c = MatMul (b, w) y = LayerNormalization (c, one) }""",
        w=rng.standard_normal((4, 4)).astype(np.float32),
        one=np.ones(4, np.float32),
    )
    quantize()(model)
    first, second = (node.inputs[1] for node in model.graph.nodes if node.op == "MatMul")
    assert first is second


# ---- what is refused ----


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(UsageError, match="groups of 48"):
        Quantize(QuantizeOptions(group=48))
    with pytest.raises(UsageError, match="calibration samples"):
        quantize(method="gptq")(feed_forward())
    with pytest.raises(UsageError, match="4"):
        from_flags("quantize{bits=8}")
    with pytest.raises(UsageError, match="matches no"):
        quantize(targets=("nothing",))(feed_forward())
    with pytest.raises(ModelError, match="inf"):
        quantize()(model_from(normed(*[1] * 15).replace("}, float[4] scale", ", inf}, float[4] scale")))


def test_options_are_read_from_the_command_line() -> None:
    (step,) = from_flags("quantize{bits=4,group=64,symmetric=true,method=rtn,ignore=head}").passes
    assert step.options == QuantizeOptions(bits=4, group=64, symmetric=True, method="rtn", ignore=("head",))
