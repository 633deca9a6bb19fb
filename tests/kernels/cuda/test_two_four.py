"""2:4 on sparse tensor cores: against numpy on the emulator, and as machine code for two architectures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spa_compiler.kernels.cuda import arrays, two_four
from spa_compiler.kernels.cuda.form import LAYOUTS, Dtype, Epilogue, Kernel, Layout, rounded
from spa_compiler.kernels.cuda.two_four import TILES, TwoFour
from spa_compiler.targets import cuda
from tests.cuda_emulator import emulator
from tests.cuda_harness import NUMBERS, machine_code

FORM = TwoFour()
CASES: dict[str, tuple[Kernel, Dtype, Layout, Epilogue]] = {
    made.name: (made, dtype, layout, epilogue)
    for index, dtype, layout, epilogue in (
        (0, "fp16", "rows", Epilogue()),
        (0, "bf16", "planes", Epilogue("relu")),
        (2, "fp16", "planes", Epilogue("gelu_erf", residual=True)),
        (4, "bf16", "rows", Epilogue("silu", residual=True)),
        (4, "fp16", "planes", Epilogue()),
        (3, "fp16", "rows", Epilogue("clip", residual=True)),
    )
    for made in (two_four.kernel(TILES[index], dtype, layout, epilogue),)
}
KERNELS = tuple(case[0] for case in CASES.values())
each_case = pytest.mark.parametrize("name", CASES)


def weight_of(rng: np.random.Generator, n: int, k: int, density: float = 1.0) -> NDArray[np.float32]:
    """Two of four at most, any two, fewer where `density` is below 1."""
    fours = rng.standard_normal((n, -(-k // 4), 4)).astype(np.float32)
    fours[rng.permuted(np.tile(np.arange(4), (n, fours.shape[1], 1)), axis=2) >= 2] = 0
    fours[rng.random(fours.shape) >= density] = 0
    return fours.reshape(n, -1)[:, :k]


@each_case
@pytest.mark.parametrize(
    "n, k, tokens, batch", [(150, 200, 77, 2), (16, 64, 1, 1), (31, 33, 129, 1), (264, 128, 16, 1)]
)
def test_a_kernel_computes_what_the_reference_computes(name: str, n: int, k: int, tokens: int, batch: int) -> None:
    kernel, dtype, layout, epilogue = CASES[name]
    weight = weight_of(np.random.default_rng(n), n, k)
    emulator.check(FORM, kernel, weight, tokens, dtype, layout, epilogue, batch=batch, seed=n, among=KERNELS)


@settings(max_examples=20)
@given(
    st.sampled_from([c for c in CASES.values() if c[0].tile_rows <= 64]),
    st.integers(1, 100),
    st.integers(1, 300),
    st.integers(1, 80),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 2**32),
)
def test_any_shape_and_density(
    case: tuple[Kernel, Dtype, Layout, Epilogue], n: int, k: int, tokens: int, batch: int, density: float, seed: int
) -> None:
    kernel, dtype, layout, epilogue = case
    weight = weight_of(np.random.default_rng(seed), n, k, density)
    emulator.check(FORM, kernel, weight, tokens, dtype, layout, epilogue, batch=batch, seed=seed, among=KERNELS)


@settings(max_examples=60)
@given(
    st.sampled_from(("fp16", "bf16")),
    st.integers(1, 100),
    st.integers(1, 300),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 2**32),
)
def test_unpack_undoes_pack_and_the_rules_hold(dtype: Dtype, n: int, k: int, density: float, seed: int) -> None:
    weight = weight_of(np.random.default_rng(seed), n, k, density)
    packed = FORM.pack(weight, dtype)
    arrays.check(FORM.rules(dtype), packed, n, k)
    np.testing.assert_array_equal(FORM.unpack(packed, n, k, dtype), rounded(weight, dtype))


def test_places_are_those_of_the_instruction() -> None:
    """Row 3 keeps inputs 1 and 2 of the first four, row 11 keeps 0 and 3 of the second four of inputs 16..31."""
    weight = np.zeros((16, 64), np.float32)
    weight[3, [1, 2]] = 5, 6
    weight[11, [20, 23]] = 7, 8
    packed = FORM.pack(weight, "fp16")
    lanes = packed["places"][0, 0]
    assert lanes[4 * 3] & 15 == 1 | 2 << 2
    assert lanes[4 * 3 + 1] >> 16 >> 4 & 15 == 0 | 3 << 2
    values = packed["values"].view(np.float16).reshape(2, 32, 4, 2)
    assert values[0, 4 * 3, 0].tolist() == [5, 6]
    assert values[0, 4 * 3 + 1, 3].tolist() == [7, 8]


def test_what_is_no_two_of_four_is_refused() -> None:
    weight = np.zeros((4, 8), np.float32)
    weight[1, 4:7] = 1
    with pytest.raises(ValueError, match="more than two of four"):
        FORM.pack(weight, "fp16")
    with pytest.raises(ValueError, match="float32"):
        FORM.pack(np.zeros((4, 8), np.float32), "fp32")
    assert FORM.kernels(cuda.architecture("sm_90"), "fp32", "rows", Epilogue(), 512) == []


@each_case
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_machine_code_has_no_spills_and_uses_sparse_tensor_cores(name: str, arch: str) -> None:
    kernel, dtype, layout, _ = CASES[name]
    compiled = machine_code(kernel, arch)
    assert f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{NUMBERS[dtype]}" in compiled.ptx
    assert (".x4.trans" in compiled.ptx) == (layout == "planes")


@pytest.mark.parametrize("arch", list(cuda.ARCHITECTURES))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_variants_fit_and_shrink_with_the_work(arch: str, layout: Layout) -> None:
    limits = cuda.architecture(arch)
    for tokens in (1, 64, 4096):
        variants = FORM.kernels(limits, "bf16", layout, Epilogue(), tokens)
        assert variants
        assert all(v.fits(limits) and v.tile_tokens <= max(2 * tokens, 32) for v in variants)


def test_the_model_of_cost_grows_with_the_work() -> None:
    rng, arch = np.random.default_rng(0), cuda.architecture("sm_80")
    kernel = FORM.kernels(arch, "fp16", "rows", Epilogue(), 4096)[0]
    small, large = (FORM.pack(weight_of(rng, n, 512), "fp16") for n in (512, 1024))
    costs = [FORM.cost(arch, kernel, small, 512, 512, t) for t in (128, 65536)]
    assert costs[0] < costs[1] < FORM.cost(arch, kernel, large, 1024, 512, 65536)
