"""Low rank in one kernel: against numpy on the emulator, and through NVRTC."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.kernels import activation
from spa_compiler.kernels.cuda import arrays as rules
from spa_compiler.kernels.cuda.form import DTYPES, Dtype, Epilogue, rounded
from spa_compiler.kernels.cuda.lowrank import BINS, RANKS, LowRank, fragments, kernel, matrix
from spa_compiler.targets.cuda import ARCHITECTURES
from tests.cuda_emulator.emulator import run
from tests.cuda_harness import machine_code, products

CASES: dict[str, tuple[Dtype, int, int, Epilogue]] = {
    "fp16": ("fp16", 32, 8, Epilogue()),
    "fp16 wide": ("fp16", 48, 16, Epilogue("gelu_erf", residual=True)),
    "bf16": ("bf16", 16, 16, Epilogue("relu", residual=True)),
    "fp32": ("fp32", 48, 8, Epilogue("silu", residual=True)),
}
KERNELS = {name: kernel(dtype, epilogue, rank, tokens) for name, (dtype, rank, tokens, epilogue) in CASES.items()}
AMONG = tuple(KERNELS.values())
ROUNDING = {"fp16": 2**-10.9, "bf16": 2**-7.9, "fp32": 2**-9.5}  # of results and of V x; products of fp32 are TF32


def compare(case: str, u: np.ndarray, v: np.ndarray, tokens: int, seed: int) -> None:
    dtype, rank, _, epilogue = CASES[case]
    form, rng = LowRank(rank), np.random.default_rng(seed)
    n, k = len(u), v.shape[1]
    x, residual = (rounded(rng.standard_normal((tokens, size)).astype(np.float32), dtype) for size in (k, n))
    bias = rng.standard_normal(n).astype(np.float32)
    arrays = form.pack_factors(u, v, dtype)
    u, v = (f.astype(np.float64) for f in form.factors(arrays, n, k, dtype))
    there = residual if epilogue.residual else None
    got = run(form, KERNELS[case], arrays, x, bias, there, dtype, "rows", seed=seed, among=AMONG)
    want = x @ v.T @ u.T + bias + (residual if epilogue.residual else 0)
    sizes = np.abs(x) @ np.abs(v.T) @ np.abs(u.T)
    limit = ROUNDING[dtype] * (np.abs(x @ v.T) @ np.abs(u.T) + np.abs(want)) + 1e-6 * sizes
    if dtype == "fp32":
        limit += ROUNDING[dtype] * sizes
    # no activation here is steeper than 1.2
    assert (np.abs(got - activation.reference(want, epilogue.act)) <= 1.2 * limit + 1e-6).all()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 50) | st.integers(1, 90).map(lambda i: 8 * i),
    st.integers(1, 48),
    st.sampled_from(sorted(CASES)),
    st.integers(1, 20),
    st.integers(0, 1 << 30),
)
def test_a_kernel_computes_what_the_reference_computes(
    n: int, k: int, rank: int, case: str, tokens: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rank = min(rank, CASES[case][1])
    u, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((n, rank), (rank, k)))
    compare(case, u, v, tokens, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_factors_come_back_and_rules_hold(dtype: Dtype, rank: int) -> None:
    rng = np.random.default_rng(rank)
    u, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((37, rank - 3), (rank - 3, 75)))
    form = LowRank(rank)
    arrays = form.pack_factors(u, v, dtype)
    rules.check(form.rules(dtype), arrays, 37, 75)
    for got, want in zip(form.factors(arrays, 37, 75, dtype), (u, v), strict=True):
        whole = np.zeros(got.shape, np.float32)
        whole[: want.shape[0], : want.shape[1]] = want
        np.testing.assert_array_equal(got, rounded(whole, dtype))
    np.testing.assert_allclose(form.unpack(arrays, 37, 75, "fp32") if dtype == "fp32" else u @ v, u @ v, atol=1e-4)
    with pytest.raises(ValueError, match="must have"):
        rules.check(form.rules(dtype), arrays, 37, 75 + 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lanes_have_the_rows_and_columns_that_the_ptx_manual_gives_them(dtype: Dtype) -> None:
    values = np.arange(16 * 64, dtype=np.float32).reshape(16, 64) % 251
    words = fragments(values, dtype)
    np.testing.assert_array_equal(matrix(words, dtype), values)
    lane = 4 * 5 + 2  # g = 5, q = 2, of the second chunk's step 1
    got = words[0, 1, 1, lane]
    first = 32 + 8 * 2 + 4 if dtype != "fp32" else 16 + 4 * 2 + 2
    each = 1 if dtype == "fp32" else 2
    for word, row, column in ((0, 5, first), (1, 13, first), (2, 5, first + each), (3, 13, first + each)):
        number = rounded(values[row : row + 1, column : column + 1], dtype)[0, 0]
        low = got[word : word + 1].view(np.float32)[0] if dtype == "fp32" else got[word] & 0xFFFF
        assert low == (number if dtype == "fp32" else fragments(number.reshape(1, 1), dtype)[0, 0, 0, 0, 0])


def test_a_weight_of_low_rank_is_found_and_others_are_refused() -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((50, 20)) @ rng.standard_normal((20, 70))).astype(np.float32)
    arrays = LowRank(32).pack(weight, "fp32")
    np.testing.assert_allclose(LowRank(32).unpack(arrays, 50, 70, "fp32"), weight, atol=1e-4)
    with pytest.raises(ValueError, match="rank 20"):
        LowRank(16).pack(weight, "fp16")
    with pytest.raises(ValueError, match="none of rank 16"):
        LowRank(16).pack_factors(np.zeros((4, 20), np.float32), np.zeros((20, 4), np.float32), "fp16")
    assert LowRank(16).stored(weight, "fp16") == 16 * 120 / (50 * 70)
    with pytest.raises(ValueError, match="ranks up to"):
        LowRank(20)
    zeros = LowRank(16).pack(np.zeros((4, 5), np.float32), "fp16")
    assert not LowRank(16).unpack(zeros, 4, 5, "fp16").any()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype, rank, tokens", [("fp16", 16, 8), ("bf16", 64, 16), ("fp32", 32, 16), ("fp32", 64, 16)])
def test_it_compiles_without_spills_for_tensor_cores(arch: str, dtype: Dtype, rank: int, tokens: int) -> None:
    made = kernel(dtype, Epilogue("gelu_tanh", residual=True), rank, tokens)
    chunks = -(-rank // (16 if dtype == "fp32" else 32))
    assert products(machine_code(made, arch), dtype) == tokens // 8 * 2 * (rank // 16 + chunks)


def test_there_are_kernels_for_few_tokens_in_rows() -> None:
    arch = ARCHITECTURES["sm_90"]
    for tokens in range(1, BINS[-1] + 1):
        assert all(one.tile_tokens >= tokens for one in LowRank(64).kernels(arch, "fp32", "rows", Epilogue(), tokens))
    assert not LowRank(16).kernels(arch, "fp16", "rows", Epilogue(), 17)
    assert not LowRank(16).kernels(arch, "fp16", "planes", Epilogue(), 1)
