"""Columns of 8 or 16 outputs on tensor cores: against numpy on the emulator, and as machine code for two architectures."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spa_compiler.kernels.cuda import arrays, vector_products, vectors
from spa_compiler.kernels.cuda.form import DTYPES, LAYOUTS, Dtype, Epilogue, Kernel, Layout, rounded, tf32
from spa_compiler.kernels.cuda.vectors import SIZES, TILES, Vectors
from spa_compiler.targets import cuda
from tests.cuda_emulator import emulator
from tests.cuda_harness import disassembled, machine_code, products

SM90 = cuda.architecture("sm_90")


def _case(size: int, index: int, dtype: Dtype, layout: Layout, act: str = "none", residual: bool = False) -> tuple:
    epilogue = Epilogue(act, residual)
    return Vectors(size), vectors.kernel(size, TILES[index], dtype, layout, epilogue), dtype, layout, epilogue


LARGE = _case(8, 0, "fp16", "rows")
CASES = (
    _case(8, 4, "fp16", "rows", "silu", True),
    _case(8, 4, "bf16", "planes", "relu", True),
    _case(8, 4, "fp32", "rows"),
    _case(8, 4, "fp32", "planes", "clip", True),
    _case(16, 4, "bf16", "rows"),
    _case(16, 3, "fp16", "planes", "gelu_erf", True),
    _case(16, 4, "fp32", "rows", "hard_swish", True),
    _case(16, 4, "fp32", "planes"),
)
BY_NAME = {case[1].name: case for case in (*CASES, LARGE)}
KERNELS: tuple[Kernel, ...] = tuple(case[1] for case in BY_NAME.values())
each_case = pytest.mark.parametrize("name", [case[1].name for case in CASES])


def weight_of(rng: np.random.Generator, n: int, k: int, size: int, density: float) -> NDArray[np.float32]:
    """Columns of `size` outputs, of which `density` are kept."""
    kept = (rng.random((-(-n // size), k)) < density).repeat(size, axis=0)[:n]
    return rng.standard_normal((n, k)).astype(np.float32) * kept


def uneven(rng: np.random.Generator, n: int, k: int, size: int) -> NDArray[np.float32]:
    """The first groups keep nearly all, the last ones nothing."""
    kept = rng.random((-(-n // size), k)) < np.linspace(0.9, 0, -(-n // size))[:, None]
    return rng.standard_normal((n, k)).astype(np.float32) * kept.repeat(size, axis=0)[:n]


@each_case
@pytest.mark.parametrize("n, k, tokens, batch", [(150, 600, 45, 2), (64, 48, 1, 1), (31, 33, 33, 1), (16, 130, 16, 1)])
def test_a_kernel_computes_what_the_reference_computes(name: str, n: int, k: int, tokens: int, batch: int) -> None:
    form, kernel, dtype, layout, epilogue = BY_NAME[name]
    weight = weight_of(np.random.default_rng(n), n, k, form.size, 0.2)
    emulator.check(form, kernel, weight, tokens, dtype, layout, epilogue, batch=batch, seed=n, among=KERNELS)


def test_the_largest_tile_and_outputs_that_were_moved() -> None:
    form, kernel, dtype, layout, epilogue = LARGE
    weight = uneven(np.random.default_rng(2), 610, 200, 8)
    assert (form.pack(weight, dtype)["order"] != np.arange(40)).any()
    emulator.check(form, kernel, weight, 70, dtype, layout, epilogue, among=KERNELS)


@settings(max_examples=25)
@given(
    st.sampled_from(CASES),
    st.integers(1, 150),
    st.integers(1, 300),
    st.integers(1, 70),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.03, 0.2, 0.6, 1.0]),
    st.integers(0, 2**32),
)
def test_any_shape_and_density(case: tuple, n: int, k: int, tokens: int, batch: int, density: float, seed: int) -> None:
    form, kernel, dtype, layout, epilogue = case
    weight = weight_of(np.random.default_rng(seed), n, k, form.size, density)
    emulator.check(form, kernel, weight, tokens, dtype, layout, epilogue, batch=batch, seed=seed, among=KERNELS)


@settings(max_examples=80)
@given(
    st.sampled_from(SIZES),
    st.sampled_from(DTYPES),
    st.integers(1, 200),
    st.integers(1, 1400),
    st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0, -1.0]),
    st.integers(0, 2**32),
)
def test_unpack_undoes_pack_and_the_rules_hold(
    size: int, dtype: Dtype, n: int, k: int, density: float, seed: int
) -> None:
    form, rng = Vectors(size), np.random.default_rng(seed)
    weight = uneven(rng, n, k, size) if density < 0 else weight_of(rng, n, k, size, density)
    packed = form.pack(weight, dtype)
    arrays.check(form.rules(dtype), packed, n, k)
    assert list(packed) == list(form.arrays)
    want = tf32(weight) if dtype == "fp32" else rounded(weight, dtype)
    np.testing.assert_array_equal(form.unpack(packed, n, k, dtype), want)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density, filled, passes", [(0.05, 0.85, 2.0), (0.1, 0.93, 1.7), (0.3, 0.97, 1.4)])
def test_steps_are_full_and_their_columns_in_different_banks(
    size: int, density: float, filled: float, passes: float
) -> None:
    weight = weight_of(np.random.default_rng(5), 32 * size, 2048, size, density)
    packed = Vectors(size).pack(weight, "fp16")
    columns = np.count_nonzero(weight.reshape(32, size, -1).any(axis=1))
    assert columns / packed["columns"].size > filled
    halves = [np.unique(half) % 8 for half in packed["columns"].reshape(-1, 8)]
    assert np.mean([np.bincount(half).max() for half in halves]) < passes


@pytest.mark.parametrize("size", SIZES)
def test_a_column_waits_no_longer_than_its_slab_is_there(size: int) -> None:
    """One column in the first slab, the next one beyond what a step reaches: each has a step of its own."""
    slab, reach = vector_products.slab_of("fp16"), vector_products.BACK + 1
    weight = np.zeros((size, slab * (reach + 2)), np.float32)
    weight[:, [3, slab * reach + 5]] = 1
    packed = Vectors(size).pack(weight, "fp16")
    per = 32 // size
    assert np.flatnonzero(np.diff(packed["ends"])[::per]).tolist() == [reach - 1, reach + 1]
    assert packed["columns"].tolist() == [[3] * 16, [slab * (reach - 2) + 5] * 16]


def test_every_piece_gets_its_share_where_outputs_differ() -> None:
    rng = np.random.default_rng(0)
    for weight, moved in ((weight_of(rng, 512, 1024, 8, 0.1), False), (uneven(rng, 512, 1024, 8), True)):
        packed = Vectors(8).pack(weight, "fp16")
        assert (packed["order"] != np.arange(32)).any() == moved
        assert sorted(packed["order"]) == list(range(32))
        work = np.diff(packed["ends"][:: 4 * 16])
        assert work.max() < 1.2 * work.mean()


@each_case
def test_a_weight_of_zeros_gives_the_bias(name: str) -> None:
    form, kernel, dtype, layout, epilogue = BY_NAME[name]
    weight = np.zeros((40, 70), np.float32)
    assert len(form.pack(weight, dtype)["values"]) == 1
    emulator.check(form, kernel, weight, 20, dtype, layout, epilogue, seed=1, among=KERNELS)


@each_case
def test_columns_that_a_group_does_not_have_stay_out_of_it(name: str) -> None:
    form, kernel, dtype, layout, _ = BY_NAME[name]
    size, k, rng = form.size, 140, np.random.default_rng(0)
    weight = np.zeros((2 * size, k), np.float32)
    weight[:size, [1, 5, 77]] = rng.standard_normal((size, 3))
    weight[size:, [2, 139]] = rng.standard_normal((size, 2))
    x = rng.standard_normal((20, k)).astype(np.float32)
    x[:, [0, 64, 128]] = np.nan  # nobody has them
    dirty = x.copy()
    dirty[:, [2, 139]] = np.nan  # the second group alone has them
    packed, bias, got = form.pack(weight, dtype), np.zeros(2 * size, np.float32), []
    for values in (x, dirty):
        zeros = np.zeros((20, 2 * size), np.float32)
        given_, before = (values, zeros) if layout == "rows" else (values.T[None], zeros.T[None])
        residual = before if kernel.name.endswith("_residual") else None
        y = emulator.run(form, kernel, packed, given_, bias, residual, dtype, layout, low=-1.0, high=1.0, among=KERNELS)
        got.append(y if layout == "rows" else y[0].T)
    assert np.isfinite(got[0]).all()
    np.testing.assert_array_equal(got[1][:, :size], got[0][:, :size])


@settings(max_examples=15)
@given(st.sampled_from(CASES), st.integers(1, 70), st.integers(1, 700), st.integers(0, 2**32))
def test_whatever_keeps_the_rules_stays_within_its_arrays(case: tuple, n: int, k: int, seed: int) -> None:
    """Arrays of a model that nobody packed: results mean nothing, and the emulator finds every access outside."""
    form, kernel, dtype, layout, _ = case
    rng, steps = np.random.default_rng(seed), 40
    order, ends, columns, values = form.rules(dtype)
    count = {"steps": steps}
    strange = {
        "order": rng.permutation(order.shape[0].size(n, k, {})).astype(np.int32),
        "ends": np.sort(rng.integers(0, steps + 1, ends.shape[0].size(n, k, count))).astype(np.int32),
        "columns": rng.integers(0, columns.check.bound.size(n, k, {}), [e.size(n, k, count) for e in columns.shape]),
        "values": np.zeros([e.size(n, k, count) for e in values.shape], values.dtype),
    }
    strange["ends"][[0, -1]] = 0, steps
    strange["columns"] = strange["columns"].astype(np.uint16)
    arrays.check(form.rules(dtype), strange, n, k)
    x, y = np.ones((5, k), np.float32), np.zeros((5, n), np.float32)
    if layout == "planes":
        x, y = x.T[None], y.T[None]
    residual = y if kernel.name.endswith("_residual") else None
    emulator.run(form, kernel, strange, x, np.zeros(n, np.float32), residual, dtype, layout, seed=seed, among=KERNELS)


@pytest.mark.parametrize("name", [CASES[0][1].name, CASES[2][1].name, CASES[5][1].name, LARGE[1].name])
def test_machine_code_has_no_spills_and_uses_tensor_cores(name: str) -> None:
    arch = "sm_90" if name == CASES[0][1].name else "sm_80"
    _assert_good_code(BY_NAME[name][1], arch, BY_NAME[name][2])


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("epilogue", [Epilogue(), Epilogue("gelu_erf", True)], ids=str)
def test_every_variant_compiles(size: int, epilogue: Epilogue) -> None:
    for tile in TILES:
        for dtype in DTYPES:
            for layout in LAYOUTS:
                kernel = vectors.kernel(size, tile, dtype, layout, epilogue)
                for arch in ("sm_80", "sm_90"):
                    if kernel.fits(cuda.architecture(arch)):
                        _assert_good_code(kernel, arch, dtype)


def _assert_good_code(kernel: Kernel, arch: str, dtype: Dtype) -> None:
    compiled = machine_code(kernel, arch)
    assert products(compiled, dtype) >= kernel.tile_tokens // 16
    assert ("ldmatrix.sync.aligned.m8n8.x4.trans" in compiled.ptx) == (dtype != "fp32")
    assert "cp.async.cg.shared.global" in compiled.ptx


def test_products_are_tensor_core_instructions(tmp_path: Path) -> None:
    """What the assembler made of the largest tile: four groups of a warp, each with 64 tokens in one step."""
    sass = disassembled(LARGE[1], "sm_90", tmp_path)
    assert len(re.findall(r"\bHMMA\.16816\.F32\b", sass)) == 4 * 4
    assert len(re.findall(r"\bLDSM\.16\.MT88\.4\b", sass)) == 4 * 4 + 1  # and the transposition
    assert "LDGSTS.E.BYPASS.128" in sass
    assert not re.search(r"\b(LDL|STL)\b", sass)


@pytest.mark.parametrize("arch", list(cuda.ARCHITECTURES))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_variants_fit_and_shrink_with_the_work(arch: str, layout: Layout) -> None:
    limits = cuda.architecture(arch)
    for size in SIZES:
        for dtype in DTYPES:
            for tokens in (1, 64, 4096):
                variants = Vectors(size).kernels(limits, dtype, layout, Epilogue(), tokens)
                assert variants
                assert all(v.fits(limits) and v.tile_tokens <= max(2 * tokens, 32) for v in variants)


def test_the_model_of_cost_knows_zeros_tokens_and_small_grids() -> None:
    rng, form = np.random.default_rng(0), Vectors(16)
    dense, sparse = (form.pack(weight_of(rng, 2048, 2048, 16, p), "fp16") for p in (0.6, 0.1))
    many, few = (form.kernels(SM90, "fp16", "rows", Epilogue(), t) for t in (8192, 64))

    def cost(kernel: Kernel, packed: dict, tokens: int) -> float:
        return form.cost(SM90, kernel, packed, 2048, 2048, tokens)

    assert cost(many[0], sparse, 8192) < 0.4 * cost(many[0], dense, 8192)
    assert cost(many[0], sparse, 64) < 0.5 * cost(many[0], sparse, 8192)
    assert min(few, key=lambda k: cost(k, dense, 64)).tile_rows < TILES[0].group
    thin, wide = (Vectors(s).pack(weight_of(rng, 2048, 2048, 16, 0.1), "fp16") for s in SIZES[::-1])
    assert form.cost(SM90, many[0], wide, 2048, 2048, 8192) < Vectors(8).cost(
        SM90, vectors.kernel(8, TILES[0], "fp16", "rows", Epilogue()), thin, 2048, 2048, 8192
    )


def test_what_has_no_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernels"):
        Vectors(4)
    with pytest.raises(ValueError, match="nothing to multiply"):
        Vectors(8).pack(np.zeros((0, 4), np.float32), "fp16")


@pytest.mark.parametrize("size", SIZES)
def test_what_is_stored_is_known_before(size: int) -> None:
    rng = np.random.default_rng(4)
    for n, k, density in ((128, 96, 0.3), (65, 130, 0.5), (16, 16, 0.0), (200, 64, 1.0)):
        weight = weight_of(rng, n, k, size, density)
        kept = [weight[i : i + size].any(axis=0).sum() for i in range(0, n, size)]
        assert Vectors(size).stored(weight, "fp16") == sum(kept) / (len(kept) * k)
    fours = weight_of(rng, 1024, 512, 4, 0.1)
    assert Vectors(8).stored(fours, "bf16") == pytest.approx(1 - 0.9 ** (8 // 4), abs=0.02)
