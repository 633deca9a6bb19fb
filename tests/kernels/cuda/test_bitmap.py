"""Bitmaps and nonzeros for few tokens: against numpy on the emulator, and through NVRTC."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.kernels.cuda import arrays as rules
from spa_compiler.kernels.cuda.bitmap import WARPS, Bitmap, kernel
from spa_compiler.kernels.cuda.few import Few
from spa_compiler.kernels.cuda.form import Dtype, Epilogue, rounded
from spa_compiler.kernels.cuda.strips import BINS
from spa_compiler.targets.cuda import ARCHITECTURES
from tests.cuda_emulator.emulator import check, run
from tests.cuda_harness import machine_code, products, sparse

FORM = Bitmap()
CASES: dict[str, tuple[Dtype, int, Epilogue]] = {
    "fp16": ("fp16", 8, Epilogue("silu", residual=True)),
    "bf16": ("bf16", 16, Epilogue()),
}
KERNELS = {name: kernel(dtype, epilogue, tokens) for name, (dtype, tokens, epilogue) in CASES.items()}
AMONG = tuple(KERNELS.values())


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 40) | st.integers(1, 30).map(lambda i: 8 * i),
    st.sampled_from([0.0, 0.02, 0.3, 0.6, 1.0]),
    st.sampled_from(sorted(CASES)),
    st.integers(1, 20),
    st.integers(0, 1 << 30),
)
def test_a_kernel_computes_what_the_reference_computes(
    n: int, k: int, density: float, case: str, tokens: int, seed: int
) -> None:
    dtype, _, epilogue = CASES[case]
    check(FORM, KERNELS[case], sparse(seed, n, k, density), tokens, dtype, epilogue=epilogue, seed=seed, among=AMONG)


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_a_warp_goes_through_several_windows(density: float) -> None:
    check(FORM, KERNELS["bf16"], sparse(0, 33, 3 * WARPS * 64 + 24, density), 9, "bf16", among=AMONG)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_unpack_undoes_pack_and_rules_hold(dtype: Dtype, density: float) -> None:
    weight = sparse(1, 75, 131, density)
    packed = FORM.pack(weight, dtype)
    rules.check(FORM.rules(dtype), packed, 75, 131)
    np.testing.assert_array_equal(FORM.unpack(packed, 75, 131, dtype), rounded(weight, dtype))
    with pytest.raises(ValueError, match="16 bits"):
        FORM.pack(weight, "fp32")


def test_wrong_arrays_are_refused_and_wrong_bits_stay_in_shared_memory() -> None:
    packed = FORM.pack(sparse(0, 40, 100, 0.1), "bf16")
    for starts in (packed["starts"][:-1], packed["starts"] + 1, packed["starts"][::-1].copy()):
        with pytest.raises(ValueError, match=r"starts|values"):
            rules.check(FORM.rules("bf16"), packed | {"starts": starts}, 40, 100)
    wrong = packed | {"bits": np.full_like(packed["bits"], 0xFFFFFFFF)}
    starts = np.zeros_like(packed["starts"])
    starts[1:] = packed["starts"][-1]  # all values in one window
    for arrays in (wrong, packed | {"starts": starts}):
        x = np.ones((2, 100), np.float32)
        run(FORM, KERNELS["bf16"], arrays, x, np.zeros(40, np.float32), None, "bf16", "rows", among=AMONG)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype, tokens", [("fp16", 8), ("bf16", 16), ("fp16", 64)])
def test_it_compiles_without_spills_for_tensor_cores(arch: str, dtype: Dtype, tokens: int) -> None:
    made = kernel(dtype, Epilogue("gelu_tanh", residual=True), tokens)
    compiled = machine_code(made, arch)
    assert products(compiled, dtype) == 8 * tokens // 8
    assert "cp.async.cg.shared.global" in compiled.ptx


def test_it_is_the_smaller_form_and_the_faster_one_where_memory_is_slow() -> None:
    weight = np.where(np.random.default_rng(0).random((1024, 2048)) < 0.5, 1, 0).astype(np.float32)
    packed, other = FORM.pack(weight, "fp16"), Few().pack(weight, "fp16")
    assert sum(a.nbytes for a in packed.values()) < 1.14 * weight.size
    n = k = 4096
    windows = n * k // 2048
    starts = np.empty(windows + 1, np.int32)
    packed = {"bits": np.empty((windows, 32, 2), np.uint32), "starts": starts}
    packed["values"] = np.empty((windows * 129, 8), np.uint16)
    other = {"starts": starts, "entries": np.empty((windows * 17, 32, 2), np.uint32)}
    arch = ARCHITECTURES["sm_89"]
    for tokens in BINS:
        (made,) = FORM.kernels(arch, "fp16", "rows", Epilogue(), tokens)
        (scattered,) = Few().kernels(arch, "fp16", "rows", Epilogue(), tokens)
        ours, theirs = (
            form.cost(arch, one, arrays, n, k, tokens)
            for form, one, arrays in ((FORM, made, packed), (Few(), scattered, other))
        )
        assert ours < theirs
    assert not FORM.kernels(arch, "fp32", "rows", Epilogue(), 1)
    assert not FORM.kernels(arch, "fp16", "planes", Epilogue(), 1)
    assert not FORM.kernels(arch, "fp16", "rows", Epilogue(), BINS[-1] + 1)
