"""Unstructured zeros for few tokens: against numpy on the emulator, and through NVRTC."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.kernels.cuda import arrays as rules
from spa_compiler.kernels.cuda import few
from spa_compiler.kernels.cuda.few import Few, kernel
from spa_compiler.kernels.cuda.form import DTYPES, Dtype, Epilogue, rounded
from spa_compiler.kernels.cuda.strips import BINS, TILE
from spa_compiler.targets.cuda import ARCHITECTURES
from tests.cuda_emulator.emulator import check
from tests.cuda_harness import machine_code, products, sparse

FORM = Few()
CASES: dict[str, tuple[Dtype, int, Epilogue]] = {
    "fp16": ("fp16", 16, Epilogue()),
    "fp16 wide": ("fp16", 32, Epilogue("silu", residual=True)),
    "bf16": ("bf16", 8, Epilogue("relu")),
    "fp32": ("fp32", 16, Epilogue("gelu_erf", residual=True)),
}
KERNELS = {name: kernel(dtype, epilogue, tokens) for name, (dtype, tokens, epilogue) in CASES.items()}
AMONG = tuple(KERNELS.values())


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    n, k = draw(st.integers(1, 70)), draw(st.integers(1, 40) | st.integers(1, 30).map(lambda i: 8 * i))
    return sparse(
        np.random.default_rng(draw(st.integers(0, 99))), n, k, draw(st.sampled_from([0, 0.02, 0.2, 0.5, 1.0]))
    )


@settings(max_examples=25, deadline=None)
@given(weights(), st.sampled_from(sorted(CASES)), st.integers(1, 40), st.integers(0, 1 << 30))
def test_a_kernel_computes_what_the_reference_computes(weight: np.ndarray, case: str, tokens: int, seed: int) -> None:
    dtype, _, epilogue = CASES[case]
    check(FORM, KERNELS[case], weight, tokens, dtype, epilogue=epilogue, seed=seed, among=AMONG)


@pytest.mark.parametrize("density", [0.2, 0.6])
def test_a_warp_goes_through_several_windows_and_loads_what_it_does_not_hold(density: float) -> None:
    weight = sparse(np.random.default_rng(1), 33, 3 * 16 * 64 + 24, density)
    units = np.diff(FORM.pack(weight, "fp16")["starts"])
    assert (units.max() > few.HELD) == (density > 0.5)
    check(FORM, KERNELS["fp16"], weight, 17, "fp16", among=AMONG)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_unpack_undoes_pack_and_rules_hold(dtype: Dtype, density: float) -> None:
    weight = sparse(np.random.default_rng(0), 75, 131, density)
    packed = FORM.pack(weight, dtype)
    rules.check(FORM.rules(dtype), packed, 75, 131)
    np.testing.assert_array_equal(FORM.unpack(packed, 75, 131, dtype), rounded(weight, dtype))


def test_entries_take_few_bytes_and_few_turns_of_a_bank() -> None:
    rng = np.random.default_rng(0)
    weight = np.where(rng.random((256, 2048)) < 0.2, 1, 0).astype(np.float32)
    packed = FORM.pack(weight, "fp16")
    assert packed["entries"].nbytes < 4.5 * np.count_nonzero(weight)
    words = (packed["entries"] >> 18).transpose(0, 2, 1).reshape(-1, 32)
    turns = [np.bincount(np.unique(row) % 32).max() for row in words]
    assert np.mean(turns) < 1.8  # in a random order 3.4


def test_a_wrong_array_is_refused_and_a_wrong_place_stays_in_its_tile() -> None:
    packed = FORM.pack(sparse(np.random.default_rng(0), 40, 100, 0.3), "fp16")
    for starts in (packed["starts"][:-1], packed["starts"] + 1, packed["starts"][::-1].copy()):
        with pytest.raises(ValueError, match=r"starts|entries"):
            rules.check(FORM.rules("fp16"), packed | {"starts": starts}, 40, 100)
    places = (np.arange(1 << 16, dtype=np.uint32) << 16 & few.PLACE << 16) >> 16
    assert places.max() < TILE
    assert (places % 2 == 0).all()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype, tokens", [("fp16", 8), ("fp16", 16), ("bf16", 32), ("fp16", 64), ("fp32", 64)])
def test_it_compiles_without_spills_for_tensor_cores(arch: str, dtype: Dtype, tokens: int) -> None:
    made = kernel(dtype, Epilogue("gelu_tanh", residual=True), tokens)
    assert products(machine_code(made, arch), dtype) == 8 * tokens // 8


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=str)
def test_what_there_is_fits_the_architecture_and_all_tokens_have_one(arch: object) -> None:
    for tokens in range(1, BINS[-1] + 1):
        (made,) = FORM.kernels(arch, "fp16", "rows", Epilogue(), tokens)
        assert tokens <= made.tile_tokens
        assert made.fits(arch)
    assert FORM.kernels(arch, "fp16", "rows", Epilogue(), BINS[-1] + 1) == []
    assert FORM.kernels(arch, "fp16", "planes", Epilogue(), 4) == []


def test_the_model_of_cost_follows_bytes_and_tokens() -> None:
    arch, rng = ARCHITECTURES["sm_90"], np.random.default_rng(0)
    packed = {d: FORM.pack(sparse(rng, 2048, 2048, d), "fp16") for d in (0.1, 0.4)}
    costs = {
        (d, t): FORM.cost(arch, kernel("fp16", Epilogue(), t), packed[d], 2048, 2048, t) for d in packed for t in BINS
    }
    assert costs[0.1, 8] < costs[0.4, 8]
    assert [costs[0.1, t] for t in BINS] == sorted(costs[0.1, t] for t in BINS)
