"""placement/gpu_*.py: sites, forms and nodes for GPUs, without one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from spa_compiler.artifact import verify_gpu
from spa_compiler.errors import SpaError, VerificationError
from spa_compiler.graph import shapes
from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from spa_compiler.graph.precision import convert
from spa_compiler.graph.rounding import outputs
from spa_compiler.graph.session import Feeds
from spa_compiler.kernels.cuda.form import DTYPES, Dtype
from spa_compiler.kernels.cuda.forms import FORMS
from spa_compiler.placement import gpu_choose, gpu_trial
from spa_compiler.placement.candidates import DENSE
from spa_compiler.placement.gpu_check import expanded
from spa_compiler.placement.gpu_choose import candidates, dense_us, timed
from spa_compiler.placement.gpu_sites import find_gpu_sites, tokens_of
from spa_compiler.placement.measure import Timing
from spa_compiler.placement.place import PORTABLE, SINGLE, SOURCE, Placed
from spa_compiler.targets.cuda import architecture
from tests.networks import mlp, model_of, network, weight
from tests.placement.gpu_forms import Rows
from tests.placement.gpu_placing import WIDTH, Clock, chosen, placed

SM90 = architecture("sm_90")
RNG = np.random.default_rng(0)

BLOCK = """block (float["b",5,64] x) => (float["b",5,64] y) {
    m = MatMul(x, w)  a = Add(m, b)  d = Div(a, {1.4142135623730951})  e = Erf(d)  o = Add(e, {1})
    p = Mul(a, o)  g = Mul(p, {0.5})  u = MatMul(g, v)  r = Add(x, u)  y = Relu(r) }"""
IMAGE = """image (float["b",16,6,7] x) => (float["b",16,6,7] y) {
    c = Conv(x, w, b)  h = Clip(c, {0}, {6})  f = Conv <pads=[1,1,1,1]> (h, k)  q = Conv(f, v)  y = Add(q, x) }"""

SQUEEZE = """squeeze (float["b",32,"h","w"] x) => (float["b",32,1,1] y) {
    p = GlobalAveragePool(x)  c = Conv(p, w, b)  h = Relu(c)  e = Conv(h, v)  a = Add(e, p)  y = Sigmoid(a) }"""


def block() -> Model:
    return model_of(
        BLOCK, w=weight(RNG, 64, 96, 0.3), v=weight(RNG, 96, 64, 0.3), b=RNG.standard_normal(96).astype(np.float32)
    )


def image() -> Model:
    def kernel(n: int, k: int, size: int = 1) -> np.ndarray:
        dense = weight(RNG, n, k * size * size, 0.3)
        return dense.reshape(n, k, size, size)

    return model_of(IMAGE, w=kernel(24, 16), k=kernel(24, 24, 3), v=kernel(16, 24), b=np.ones(24, np.float32))


def _squeezed() -> dict[str, np.ndarray]:
    w, v = (weight(RNG, n, k, 0.3)[:, :, None, None] for n, k in ((8, 32), (32, 8)))
    return {"w": w, "v": v, "b": np.ones(8, np.float32)}


def squeeze() -> Model:
    return model_of(SQUEEZE, **_squeezed())


FEEDS: dict[Any, Feeds] = {
    block: {"x": RNG.standard_normal((3, 5, 64), np.float32)},
    image: {"x": RNG.standard_normal((2, 16, 6, 7), np.float32)},
    squeeze: {"x": RNG.standard_normal((3, 32, 5, 4), np.float32)},
}


@pytest.fixture(autouse=True)
def _one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_choose, "FORMS", (Rows(),))


# ---- sites and nodes ----


def test_a_site_takes_bias_residual_and_activation() -> None:
    model = block()
    known = shapes.fixed_at(model, [FEEDS[block]])
    (first, second), refusals = find_gpu_sites(model, {}, known)
    assert (first.act, first.output.name, first.residual) == ("gelu_erf", "g", None)
    assert (second.act, second.output.name) == ("relu", "y")
    assert second.residual is not None
    assert second.residual.name == "x"
    assert not refusals
    assert tokens_of(first, known[0]) == (15, 1)


def test_convolutions_of_one_pixel_are_sites_and_windows_are_none() -> None:
    model = image()
    known = shapes.fixed_at(model, [FEEDS[image]])
    sites, refusals = find_gpu_sites(model, {}, known)
    assert [(s.name, s.layout, s.act) for s in sites] == [("c", "planes", "clip"), ("q", "planes", "none")]
    assert tokens_of(sites[0], known[0]) == (42, 2)
    assert [(r.op.name, "a window has none" in r.reason) for r in refusals] == [("f", True)]


def test_images_of_one_pixel_are_rows_to_kernels() -> None:
    model = squeeze()
    known = shapes.fixed_at(model, [FEEDS[squeeze]])
    first, second = find_gpu_sites(model, {}, known)[0]
    assert [(s.name, s.layout, s.act, s.output.name) for s in (first, second)] == [
        ("c", "pixel", "relu", "h"),
        ("e", "pixel", "sigmoid", "y"),
    ]
    assert second.residual is not None
    assert tokens_of(first, known[0]) == (3, 1)
    (found,) = candidates(first, [SM90], "fp16", [(3, 1)])
    assert found.form.layout == "pixel"
    assert all("_rows_fp16_rows_" in kernel.name for _, kernel in found.form.variants)


def test_one_pixel_at_the_measured_shapes_alone_is_an_image() -> None:
    model = model_of(SQUEEZE.replace("GlobalAveragePool", "Identity").replace("1,1] y", '"h","w"] y'), **_squeezed())
    known = shapes.fixed_at(model, [{"x": np.ones((3, 32, 1, 1), np.float32)}])
    sites, _ = find_gpu_sites(model, {}, known)
    assert [(s.layout, tokens_of(s, known[0])) for s in sites] == [("planes", (1, 3))] * 2


@pytest.mark.parametrize("make, dtype", list(itertools.product((block, image, squeeze), DTYPES)))
def test_nodes_compute_what_they_replace(make: Any, dtype: Dtype) -> None:
    model, feed = make(), FEEDS[make]
    own, choices = chosen(model, feed, dtype)
    # bfloat16 has no kernel for this opset's convolutions
    expected = 0 if dtype == "bf16" and make in (image, squeeze) else 2
    assert sum(n.domain == "ai.spa" for n in own.graph.nodes) == expected
    (want,) = outputs(convert(model, None if dtype == "fp32" else dtype).model, [feed])
    (got,) = outputs(expanded(own, choices), [feed])
    error = np.abs(got["y"] - want["y"]).max() / np.abs(want["y"]).max()
    assert error <= {"fp32": 1e-6, "fp16": 2e-3, "bf16": 2e-2}[dtype]


def test_a_node_says_what_it_is_and_what_it_holds() -> None:
    own, choices = chosen(image(), FEEDS[image], "fp16")
    first, last = (n for n in own.graph.nodes if n.domain == "ai.spa")
    assert first.name == "ai.spa/c"
    assert (first.attrs["n"], first.attrs["k"], first.attrs["low"], first.attrs["high"]) == (24, 16, 0.0, 6.0)
    assert "low" not in last.attrs
    names = [t.name for t in first.inputs]
    assert names == ["x_fp16", "h.offsets", "h.columns", "h.values", "h.bias"]
    assert [t.name for t in last.inputs][:2] == ["f", "x_fp16"]  # the residual comes second
    assert own.metadata.props_of(first)["spa.form"] == "unstructured rows"
    assert choices[0].form is not None
    assert [most for most, _ in choices[0].form.variants] == [16, None]


def test_what_stays_float32_is_no_site_and_lends_no_residual() -> None:
    model = model_of(
        """kept (float[2,64] x) => (float[2,64] y) {
            h = MatMul(x, w)  e = Exp(h)  m = MatMul(x, w)  r = Add(m, e)  y = Sqrt(r) }""",
        w=weight(RNG, 64, 64, 0.3),
    )
    twin = convert(model, "fp16")
    assert "r" in twin.kept
    sites, _ = find_gpu_sites(model, twin.kept, shapes.fixed_at(model, [{"x": np.ones((2, 64), np.float32)}]))
    assert [(s.name, s.residual) for s in sites] == [("h", None), ("m", None)]
    big = model_of("big (float[1,2] x) => (float[1,2] y) { y = MatMul(x, w) }", w=np.diag([1e6, 0]).astype(np.float32))
    sites, refusals = find_gpu_sites(
        big, convert(big, "fp16").kept, shapes.fixed_at(big, [{"x": np.ones((1, 2), np.float32)}])
    )
    assert not sites
    assert [r.reason for r in refusals] == ["it stays float32: a weight beyond the range of float16"]


# ---- choosing ----


def test_a_form_must_beat_the_model_of_dense_by_the_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    for us, form in ((0.1, "unstructured rows"), (100.0, DENSE)):
        monkeypatch.setattr(gpu_choose, "FORMS", (Rows(us=us),))
        _, choices = chosen(block(), FEEDS[block], "fp16")
        assert {c.candidate for c in choices} == {form}
        assert all(c.reason.startswith("not measured: by the model unstructured rows takes") for c in choices)


def test_the_cheapest_form_is_taken_and_none_for_weights_without_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_choose, "FORMS", (Rows(us=0.5, name="slow"), Rows(us=0.1, name="fast")))
    _, choices = chosen(block(), FEEDS[block], "fp16")
    assert {c.candidate for c in choices} == {"fast"}
    dense = load(mlp(1.0, 64))
    shapes.infer(dense)
    _, choices = chosen(dense, {"x": np.ones((1, 2, 64), np.float32)}, "fp16")
    assert {c.reason for c in choices} == {"not measured: it has no zeros"}


@pytest.mark.parametrize(
    "rows, density, form",
    [
        (8, 0.1, "block:8x1"),
        (16, 0.1, "block:16x1"),
        (4, 0.05, "block:8x1"),  # which stores a tenth
        (4, 0.5, DENSE),  # three quarters
        (1, 0.1, DENSE),  # 57 %
    ],
)
def test_columns_of_outputs_have_a_form_for_many_tokens(
    monkeypatch: pytest.MonkeyPatch, rows: int, density: float, form: str
) -> None:
    monkeypatch.setattr(gpu_choose, "FORMS", FORMS)
    model = model_of(
        "one (float[1,512] x) => (float[1,512] y) { y = MatMul(x, w) }",
        w=weight(np.random.default_rng(1), 512, 512, density, rows),
    )
    (site,), _ = find_gpu_sites(model, {}, shapes.fixed_at(model, [{"x": np.ones((1, 512), np.float32)}]))
    archs, sizes = [architecture("sm_80")], [(8192, 1)]
    choice = gpu_choose.calculated(site, candidates(site, archs, "fp16", sizes), archs, "fp16", sizes)
    assert choice.candidate == form
    if choice.form is not None:
        assert choice.form.pattern == form
        gpu_choose.check_packed(choice)


def test_variants_follow_the_number_of_tokens_and_fit_every_architecture() -> None:
    model = block()
    known = shapes.fixed_at(model, [FEEDS[block]])
    (site, _), _ = find_gpu_sites(model, {}, known)
    (found,) = candidates(site, [architecture("sm_80"), SM90], "fp16", [(15, 1), (17, 1)])
    few, many = (kernel for _, kernel in found.form.variants)
    assert (few.tile_tokens, many.tile_tokens) == (1, 4)
    assert [found.form.kernel(t).name for t in (1, 16, 17, 1 << 20)] == [few.name, few.name, many.name, many.name]
    assert not any(k.name.endswith("_large") for k in (few, many))


def test_the_model_of_dense_is_near_what_is_known_of_cublas() -> None:
    # 2 * 4096^3 at three quarters of the H200's 989 TFLOP/s; one token is the weight at 4.8 TB/s
    assert dense_us(SM90, "fp16", 4096, 4096, 4096) == pytest.approx(195, rel=0.1)
    assert dense_us(SM90, "fp16", 8192, 8192, 1) == pytest.approx(36, rel=0.05)
    times = [dense_us(SM90, "fp16", 768, 768, t) for t in (1, 16, 128, 1024, 8192)]
    assert times == sorted(times)
    assert dense_us(SM90, "fp32", 4096, 4096, 4096) > 1.9 * dense_us(SM90, "fp16", 4096, 4096, 4096)


def test_times_decide_where_there_are_any() -> None:
    model = block()
    known = shapes.fixed_at(model, [FEEDS[block]])
    (site, _), _ = find_gpu_sites(model, {}, known)
    found = candidates(site, [SM90], "fp16", [(15, 1)])
    name = found[0].form.name
    won = timed(site, found, [{DENSE: Timing(9, 9, 9, 7), name: Timing(3, 3, 3, 7)}], [(15, 1)])
    assert (won.candidate, won.gain, won.reason) == (name, pytest.approx(3.0), f"3.00x over dense as {name}")
    lost = timed(site, found, [{DENSE: Timing(9, 9, 9, 7), name: Timing(8.9, 8, 9, 7)}], [(15, 1)])
    assert (lost.form, lost.gain) == (None, 1.0)
    assert "dense is faster or as fast" in lost.reason


def test_a_form_that_loses_a_weight_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_choose, "FORMS", (Rows(wrong=True),))
    with pytest.raises(SpaError, match="does not hold the weight of m0"):
        placed(tmp_path, mlp(0.3, WIDTH))


# ---- whole models ----


def test_without_a_gpu_the_model_decides_and_says_so(tmp_path: Path) -> None:
    result = placed(tmp_path, mlp(0.3, WIDTH), archs="sm_80,sm_90")
    assert result.plan.name == SINGLE
    assert "not measured" in result.reason
    assert result.race == []
    assert result.gaining == ["m0", "m1"]
    assert len(result.plan.operators) == 2  # one with an activation, one without
    code = (result.plan.folder / "kernels.so").read_bytes()
    for kernel in {v.kernel.name for op in result.plan.operators for v in op.variants}:
        assert code.count(b".nv.info." + kernel.encode()) >= 2  # a cubin for each architecture


def test_with_a_gpu_sites_are_timed_and_whole_models_race(tmp_path: Path) -> None:
    clock = Clock(9.0, 3.0)
    result = placed(tmp_path, mlp(0.3, WIDTH), clock)
    site = [DENSE, "unstructured rows"]
    assert clock.asked == [site, site, [SOURCE, PORTABLE, SINGLE]]
    assert result.plan.name == SINGLE
    assert result.reason == "single sites: 3.00x over the faster of the source and the model in standard ops"
    assert all(c.timings[0][DENSE].median_us == 9.0 / gpu_trial.MOST_COPIES for c in result.choices)
    again = placed(tmp_path, mlp(0.3, WIDTH), clock)
    assert clock.asked[3:] == [[SOURCE, PORTABLE, SINGLE]]  # sites are in the records
    assert again.gaining == result.gaining


def test_images_of_one_pixel_are_timed_as_such(tmp_path: Path) -> None:
    clock = Clock(9.0, 3.0)
    result = placed(tmp_path, network(SQUEEZE, **_squeezed()), clock, shape=(3, 32, 5, 4))
    assert clock.asked == [*[[DENSE, "unstructured rows"]] * 2, [SOURCE, PORTABLE, SINGLE]]
    assert [op.layout for op in result.plan.operators] == ["pixel", "pixel"]


@pytest.mark.parametrize("dense, ours", [(3.0, 9.0), (9.0, 9.0)])
def test_with_a_gpu_dense_stays_where_it_is_as_fast(tmp_path: Path, dense: float, ours: float) -> None:
    result = placed(tmp_path, mlp(0.3, WIDTH), Clock(dense, ours))
    assert result.plan.name == PORTABLE
    assert not result.plan.has_kernels
    assert result.gaining == []
    assert all("dense is faster or as fast" in c.reason for c in result.choices)


def test_trials_hold_enough_copies_to_leave_the_cache() -> None:
    sizes = [gpu_trial.copies(n, 1024, 50 << 20) for n in (1024, 16384, 1 << 18)]
    assert sizes == [gpu_trial.MOST_COPIES, 4, 1]


# ---- what is checked of an artifact ----


def artifact(tmp_path: Path) -> tuple[Path, Placed]:
    result = placed(tmp_path, network(BLOCK.replace('"b",5,64', '"b",3,64'), **_block_weights()))
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(result.plan.file.read_bytes())
    (folder / "portable.onnx").write_bytes((result.plan.folder.parent / "portable" / "model.onnx").read_bytes())
    return folder, result


def _block_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        "w": weight(rng, 64, 96, 0.3),
        "v": weight(rng, 96, 64, 0.3),
        "b": rng.standard_normal(96).astype(np.float32),
    }


def _gpu(choices: Sequence[Any]) -> list[gpu_choose.GpuChoice]:
    return [c for c in choices if isinstance(c, gpu_choose.GpuChoice)]


def test_an_artifact_is_checked_in_standard_operators(tmp_path: Path) -> None:
    folder, result = artifact(tmp_path)
    feeds = [{"x": np.random.default_rng(6).standard_normal((b, 3, 64), np.float32)} for b in (1, 2)]
    checks = verify_gpu.compare(folder, _gpu(result.choices), "fp16", feeds)
    assert [(c.output, c.shape, c.passed) for c in checks] == [("y", "1x3x64", True), ("y", "2x3x64", True)]
    assert all(0 < c.error < 2e-3 and c.tolerance < 1e-2 for c in checks)


def _values(model: onnx.ModelProto) -> None:
    values = next(i for i in model.graph.initializer if i.name == "g.values")
    values.raw_data = (np.frombuffer(values.raw_data, np.uint16) ^ 0x8000).tobytes()


def _residual(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.name == "ai.spa/u")
    assert node.input[1] == "x_fp16"
    extra = onnx.helper.make_node("Neg", ["x_fp16"], ["negative"])
    node.input[1] = "negative"
    model.graph.node.insert(1, extra)


def _bias(model: onnx.ModelProto) -> None:
    bias = next(i for i in model.graph.initializer if i.name == "g.bias")
    bias.raw_data = np.zeros(96, np.float32).tobytes()


@pytest.mark.parametrize("damage", [_values, _residual, _bias])
def test_an_artifact_that_computes_something_else_is_seen(tmp_path: Path, damage: Any) -> None:
    folder, result = artifact(tmp_path)
    model = onnx.load(folder / "model.onnx")
    damage(model)
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(VerificationError, match="is wrong at"):
        verify_gpu.compare(folder, _gpu(result.choices), "fp16", [{"x": np.ones((1, 3, 64), np.float32)}])


def test_a_node_that_nobody_chose_is_seen(tmp_path: Path) -> None:
    folder, result = artifact(tmp_path)
    with pytest.raises(VerificationError, match="not one that was chosen"):
        verify_gpu.compare(folder, _gpu(result.choices)[:1], "fp16", [{"x": np.ones((1, 3, 64), np.float32)}])


def test_with_a_gpu_the_kernels_themselves_are_compared(tmp_path: Path) -> None:
    folder, result = artifact(tmp_path)
    feeds = [{"x": np.ones((1, 3, 64), np.float32)}]
    seen = []

    def on_gpu(model: Path, library: Path | None, feed: Feeds) -> Feeds:
        seen.append((model.name, library is not None))
        return {"y": np.full((1, 3, 64), 2.0 if library else 1.0, np.float32)}

    with pytest.raises(VerificationError, match=r"its error is 1\.0e"):
        verify_gpu.compare(folder, _gpu(result.choices), "fp16", feeds, on_gpu)
    assert seen == [("portable.onnx", False), ("model.onnx", True)]
