"""Blocks on tensor cores: against numpy on the emulator, and as machine code for two architectures."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spa_compiler.kernels.cuda import arrays, blocks
from spa_compiler.kernels.cuda.blocks import SIZES, TILES, Blocks
from spa_compiler.kernels.cuda.form import DTYPES, LAYOUTS, Dtype, Epilogue, Kernel, Layout, rounded, tf32
from spa_compiler.targets import cuda
from tests.cuda_emulator import emulator
from tests.cuda_harness import disassembled, machine_code, product


def tile(group: int, tokens: int) -> blocks.Tile:
    return next(t for t in TILES if (t.group, t.tokens) == (group, tokens))


def _case(size: int, group: int, tokens: int, dtype: Dtype, layout: Layout, act: str, residual: bool) -> tuple:
    epilogue = Epilogue(act, residual)
    return (
        Blocks(size, group),
        blocks.kernel(size, tile(group, tokens), dtype, layout, epilogue),
        dtype,
        layout,
        epilogue,
    )


CASES = (
    _case(32, 256, 128, "fp16", "rows", "none", False),
    _case(32, 64, 32, "bf16", "planes", "relu", True),
    _case(32, 64, 64, "fp32", "rows", "gelu_erf", True),
    _case(32, 128, 64, "fp32", "planes", "none", False),
    _case(16, 64, 32, "fp16", "rows", "silu", True),
    _case(16, 256, 64, "fp16", "planes", "clip", False),
    _case(16, 32, 32, "fp32", "rows", "none", False),
    _case(16, 32, 64, "fp32", "planes", "hard_swish", True),
    _case(64, 64, 128, "fp16", "rows", "gelu_tanh", True),
    _case(64, 128, 128, "bf16", "rows", "leaky_relu", False),
    _case(64, 256, 128, "fp16", "planes", "none", True),
    _case(64, 64, 64, "fp32", "planes", "sigmoid", False),
)
KERNELS: tuple[Kernel, ...] = tuple(case[1] for case in CASES)
BY_NAME = {case[1].name: case for case in CASES}
each_case = pytest.mark.parametrize("name", BY_NAME)


def weight_in_blocks(rng: np.random.Generator, n: int, k: int, size: int, density: float) -> NDArray[np.float32]:
    kept = rng.random((-(-n // size), -(-k // size))) < density
    dense = rng.standard_normal((n, k)).astype(np.float32)
    return dense * np.kron(kept, np.ones((size, size), np.float32))[:n, :k]


@each_case
@pytest.mark.parametrize("n, k, tokens, batch", [(300, 200, 77, 2), (64, 48, 1, 1), (31, 33, 129, 1), (520, 96, 16, 1)])
def test_a_kernel_computes_what_the_reference_computes(name: str, n: int, k: int, tokens: int, batch: int) -> None:
    form, kernel, dtype, layout, epilogue = BY_NAME[name]
    weight = weight_in_blocks(np.random.default_rng(n), n, k, form.size, 0.4)
    emulator.check(form, kernel, weight, tokens, dtype, layout, epilogue, batch=batch, seed=n, among=KERNELS)


@settings(max_examples=25)
@given(
    st.sampled_from([c for c in CASES if c[1].tile_rows * c[1].tile_tokens <= 8192]),
    st.integers(1, 150),
    st.integers(1, 300),
    st.integers(1, 100),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0]),
    st.integers(0, 2**32),
)
def test_any_shape_and_density(case: tuple, n: int, k: int, tokens: int, batch: int, density: float, seed: int) -> None:
    form, kernel, dtype, layout, epilogue = case
    weight = weight_in_blocks(np.random.default_rng(seed), n, k, form.size, density)
    emulator.check(form, kernel, weight, tokens, dtype, layout, epilogue, batch=batch, seed=seed, among=KERNELS)


@settings(max_examples=60)
@given(
    st.sampled_from([Blocks(s, g) for s in SIZES for g in blocks.GROUPS if g >= s]),
    st.sampled_from(DTYPES),
    st.integers(1, 400),
    st.integers(1, 300),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.integers(0, 2**32),
)
def test_unpack_undoes_pack_and_the_rules_hold(
    form: Blocks, dtype: Dtype, n: int, k: int, density: float, seed: int
) -> None:
    weight = weight_in_blocks(np.random.default_rng(seed), n, k, form.size, density)
    packed = form.pack(weight, dtype)
    arrays.check(form.rules(dtype), packed, n, k)
    assert list(packed) == list(form.arrays)
    want = tf32(weight) if dtype == "fp32" else rounded(weight, dtype)
    np.testing.assert_array_equal(form.unpack(packed, n, k, dtype), want)
    stored = blocks._cut(weight, form.size).any(axis=(2, 3)).sum()
    assert packed["values"].shape == (stored, form.size**2)


def test_block_rows_with_the_same_columns_come_into_one_group() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.permutation(np.repeat(np.arange(4), 8))  # 32 block rows of four kinds
    kept = np.zeros((32, 16), bool)
    kept[np.arange(32)[:, None], 4 * kinds[:, None] + np.arange(4)] = True
    weight = np.kron(kept, np.ones((32, 32))).astype(np.float32)
    packed = Blocks(32, 256).pack(weight, "fp16")
    assert packed["indptr"].tolist() == [0, 4, 8, 12, 16]
    assert (packed["masks"] == 255).all()
    for places in packed["order"].reshape(4, 8):
        assert len({int(kinds[row]) for row in places}) == 1


def test_groups_with_most_to_do_come_first() -> None:
    kept = np.arange(8)[None] < np.array([1, 5, 3, 8])[:, None]
    packed = Blocks(64, 64).pack(np.kron(kept, np.ones((64, 64))).astype(np.float32), "bf16")
    assert np.diff(packed["indptr"]).tolist() == [8, 5, 3, 1]
    assert packed["order"].tolist() == [3, 1, 2, 0]


@each_case
def test_a_weight_of_zeros_gives_the_bias(name: str) -> None:
    form, kernel, dtype, layout, epilogue = BY_NAME[name]
    weight = np.zeros((40, 70), np.float32)
    assert len(form.pack(weight, dtype)["values"]) == 0
    emulator.check(form, kernel, weight, 20, dtype, layout, epilogue, seed=1, among=KERNELS)


@each_case
def test_columns_without_a_block_are_not_read(name: str) -> None:
    """Whatever lies in pruned columns, also where other rows of the group have a block, stays out of a row."""
    form, kernel, dtype, layout, _ = BY_NAME[name]
    size, rng = form.size, np.random.default_rng(0)
    weight = np.zeros((2 * size, 3 * size), np.float32)
    weight[:size, :size] = rng.standard_normal((size, size))
    weight[size:, 2 * size :] = rng.standard_normal((size, size))
    x = rng.standard_normal((20, 3 * size)).astype(np.float32)
    x[:, size : 2 * size] = np.nan  # no row has it
    dirty = x.copy()
    dirty[:, 2 * size :] = np.nan  # the second block row alone has it
    packed, bias = form.pack(weight, dtype), np.zeros(2 * size, np.float32)
    got = []
    for values in (x, dirty):
        values, residual = (
            (values, np.zeros((20, 2 * size))) if layout == "rows" else (values.T[None], np.zeros((1, 2 * size, 20)))
        )
        residual = residual.astype(np.float32) if kernel.name.endswith("_residual") else None
        y = emulator.run(form, kernel, packed, values, bias, residual, dtype, layout, low=-1.0, high=1.0, among=KERNELS)
        got.append(y if layout == "rows" else y[0].T)
    assert np.isfinite(got[0]).all()
    np.testing.assert_array_equal(got[1][:, :size], got[0][:, :size])


@each_case
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_machine_code_has_no_spills_and_uses_tensor_cores(name: str, arch: str) -> None:
    _assert_good_code(BY_NAME[name][1], arch, BY_NAME[name][2], BY_NAME[name][3])


ALL = [
    (size, t, dtype, layout)
    for size, t, dtype, layout in itertools.product(SIZES, TILES, DTYPES, LAYOUTS)
    if t.group >= size
]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("epilogue", [Epilogue(), Epilogue("gelu_erf", True)], ids=str)
def test_every_variant_compiles(size: int, epilogue: Epilogue) -> None:
    for own, t, dtype, layout in ALL:
        if own == size:
            kernel = blocks.kernel(size, t, dtype, layout, epilogue)
            for arch in ("sm_80", "sm_90"):
                if kernel.fits(cuda.architecture(arch)):
                    _assert_good_code(kernel, arch, dtype, layout)


def _assert_good_code(kernel: Kernel, arch: str, dtype: Dtype, layout: Layout) -> None:
    compiled = machine_code(kernel, arch)
    assert product(dtype) in compiled.ptx
    transposed = "ldmatrix.sync.aligned.m8n8.x4.trans" in compiled.ptx
    assert transposed == (layout == "planes" and dtype != "fp32")
    assert "cp.async.cg.shared.global" in compiled.ptx


def test_products_are_tensor_core_instructions(tmp_path: Path) -> None:
    """What the assembler made of the largest tile: each product once, copies that bypass registers."""
    sass = disassembled(KERNELS[0], "sm_90", tmp_path)
    # 2 steps x 4 block rows of a warp x 2 pieces of 16 rows x 4 pieces of 8 tokens
    assert len(re.findall(r"\bHMMA\.16816\.F32\b", sass)) == 64
    assert "LDGSTS.E.BYPASS.128" in sass
    assert "LDSM.16.M88.4" in sass
    assert not re.search(r"\b(LDL|STL)\b", sass)


@pytest.mark.parametrize("arch", list(cuda.ARCHITECTURES))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_variants_fit_and_shrink_with_the_work(arch: str, dtype: Dtype, layout: Layout) -> None:
    limits = cuda.architecture(arch)
    found = 0
    for size, group in itertools.product(SIZES, blocks.GROUPS):
        if group < size:
            continue
        for tokens in (1, 32, 128, 4096):
            variants = Blocks(size, group).kernels(limits, dtype, layout, Epilogue(), tokens)
            found += len(variants)
            assert len({v.name for v in variants}) == len(variants)
            assert all(v.fits(limits) and v.tile_rows == group for v in variants)
            assert all(v.tile_tokens <= max(2 * tokens, 128) for v in variants)
    assert found >= 12


def test_the_model_of_cost_knows_zeros_tokens_and_small_grids() -> None:
    rng, arch = np.random.default_rng(0), cuda.architecture("sm_90")
    form = Blocks(32, 256)
    kernel = form.kernels(arch, "fp16", "rows", Epilogue(), 4096)[0]
    dense, sparse = (form.pack(weight_in_blocks(rng, 2048, 2048, 32, p), "fp16") for p in (1.0, 0.1))
    cost = {
        (name, tokens): form.cost(arch, kernel, packed, 2048, 2048, tokens)
        for name, packed in (("dense", dense), ("sparse", sparse))
        for tokens in (128, 8192)
    }
    assert cost["sparse", 8192] < 0.3 * cost["dense", 8192]
    assert cost["sparse", 128] < cost["sparse", 8192]
    small = Blocks(32, 64)
    few = small.kernels(arch, "fp16", "rows", Epilogue(), 128)[-1]
    thin = small.pack(weight_in_blocks(rng, 2048, 2048, 32, 0.1), "fp16")
    assert small.cost(arch, few, thin, 2048, 2048, 128) < cost["sparse", 128]


@pytest.mark.parametrize("size, group", [(8, 64), (32, 48), (64, 32)])
def test_what_has_no_kernel_is_refused(size: int, group: int) -> None:
    with pytest.raises(ValueError, match="no kernels"):
        Blocks(size, group)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n, k, density", [(128, 96, 0.3), (65, 130, 0.5), (16, 16, 0.0), (200, 64, 1.0)])
def test_what_is_stored_is_known_before(size: int, n: int, k: int, density: float) -> None:
    weight = weight_in_blocks(np.random.default_rng(4), n, k, size, density)
    form = Blocks(size, 64)
    kept = (form.pack(weight, "fp16")["values"] != 0).any(axis=1).sum()
    assert form.stored(weight, "fp16") == kept / (-(-n // size) * -(-k // size))
