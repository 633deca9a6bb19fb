"""The emulator itself: fragments as the PTX ISA draws them, and every kind of mistake that it is there to find."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from spa_compiler.kernels.cuda.form import from_bits, tf32, to_bits
from spa_compiler.kernels.cuda.source import DEVICE
from spa_compiler.targets import nvrtc
from tests.cuda_emulator.emulator import FOLDER, LaunchError, call, compiled, guarded

SOURCE = """
extern "C" __global__ void mma_fp16(const uint* a, const uint* b, float* d) {
  spa_mma_fp16(d + 4 * threadIdx.x, a + 4 * threadIdx.x, b + 2 * threadIdx.x);
}
extern "C" __global__ void mma_tf32(const uint* a, const uint* b, float* d) {
  spa_mma_tf32(d + 4 * threadIdx.x, a + 4 * threadIdx.x, b + 2 * threadIdx.x);
}
extern "C" __global__ void mma_sparse(const uint* a, const uint* b, float* d, const uint* places) {
  uint t = threadIdx.x;
  spa_mma_sparse_fp16_first(d + 4 * t, a + 4 * t, b + 4 * t, places[2 * t]);
  spa_mma_sparse_fp16_second(d + 4 * t, a + 4 * t, b + 4 * t, places[2 * t + 1]);
}
extern "C" __global__ void matrices(const uint* x, uint* y) {
  SPA_DYNAMIC_SHARED(uint, shared);
  for (int i = 0; i < 4; ++i) shared[4 * threadIdx.x + i] = x[4 * threadIdx.x + i];
  __syncthreads();
  uint r[4];
  spa_ldmatrix_x4(r, shared + 4 * threadIdx.x);
  for (int i = 0; i < 4; ++i) y[4 * threadIdx.x + i] = r[i];
  spa_ldmatrix_x4_trans(r, shared + 4 * threadIdx.x);
  for (int i = 0; i < 4; ++i) y[128 + 4 * threadIdx.x + i] = r[i];
}
extern "C" __global__ void round_trip(const float* x, ushort* y, float* z, int n) {
  for (int i = threadIdx.x; i < n; i += 32) {
    y[i] = spa_to_fp16(x[i]), y[n + i] = spa_to_bf16(x[i]);
    z[i] = spa_from_fp16(y[i]), z[n + i] = spa_from_bf16(y[n + i]), z[2 * n + i] = spa_as_float(spa_to_tf32(x[i]));
  }
}
// Every thread copies 16 bytes and passes on what another one copied; `mistake` leaves out one thing.
extern "C" __global__ void pass_on(const uint* x, uint* y, int mistake) {
  SPA_DYNAMIC_SHARED(uint, shared);
  int t = threadIdx.x, other = blockDim.x - 1 - t;
  for (int turn = 0; turn < 4; ++turn) {
    if (mistake == 4 && t == 7) spa_cp_async16(shared + 4 * t + 1, x);
    if (mistake == 6 && t == 7) spa_cp_async16(shared + 4 * blockDim.x, x);
    spa_cp_async16(shared + 4 * t, x + 4 * ((mistake == 5 && t == 7 ? 4 : turn) * blockDim.x + t));
    if (mistake != 7) spa_cp_async_commit();
    if (mistake != 1) spa_cp_async_wait0();
    if (mistake != 2) __syncthreads();
    for (int i = 0; i < 4; ++i) y[4 * (turn * blockDim.x + t) + i] = shared[4 * other + i];
    if (mistake != 3) __syncthreads();
    if (mistake == 8 && t == 40 && turn == 3) __syncthreads();
    if (mistake == 9 && t < 40) spa_syncwarp();
    if (mistake == 11 && t == 3) y[4 * 4 * blockDim.x] = 1;
    if (mistake == 10) { if (t < 40) spa_shuffle_u32(t, 0); else spa_syncwarp(); }
  }
}
// Lanes pass a word on through shared memory; `between` is what stands between the store and the load.
extern "C" __global__ void through_shared(const uint* x, uint* y, int between, int other) {
  SPA_DYNAMIC_SHARED(uint, shared);
  int t = threadIdx.x;
  uint r[4] = {0, 0, 0, 0}, b[2] = {0, 0};
  float d[4] = {0.f, 0.f, 0.f, 0.f};
  for (int turn = 0; turn < 2; ++turn) {
    if (between == 6) spa_store4(&shared[0], turn);  // all of them the same
    if (between == 7) spa_store4(&shared[0], t);
    __syncthreads();
    shared[4 * t] = x[t];
    if (between == 0) __syncthreads();
    if (between == 1 || between > 5) spa_syncwarp();
    if (between == 2) spa_shuffle_u32(t, 0);
    if (between == 3) spa_mma_fp16(d, r, b);
    if (between == 4) spa_ldmatrix_x4(r, &shared[4 * t]);
    y[t] = shared[4 * (t ^ other)];
    if (between == 5) continue;
    __syncthreads();
  }
}
extern "C" __global__ void sums(const float* x, float* y) {
  float v = x[threadIdx.x];
  y[threadIdx.x] = spa_warp_sum(v);
  y[64 + threadIdx.x] = spa_shuffle(v, threadIdx.x + 1);
  y[128 + threadIdx.x] = spa_as_float(spa_byte_perm(spa_as_uint(v), 0x44332211u, 0x5410));
}
"""
NAMES = ("mma_fp16", "mma_tf32", "mma_sparse", "matrices", "round_trip", "pass_on", "through_shared", "sums")


@functools.cache
def kernels() -> Any:
    return compiled(SOURCE + "".join(f"SPA_LAUNCHER({name})\n" for name in NAMES))


def words(halves: NDArray[np.uint16]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(halves).view(np.uint32)


LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


def test_a_product_of_halves() -> None:
    rng = np.random.default_rng(0)
    a, b, d = (rng.standard_normal(s).astype(np.float32) for s in ((16, 16), (16, 8), (16, 8)))
    halves_a, halves_b = to_bits(a, "fp16"), to_bits(b, "fp16")
    regs_a, regs_b = np.zeros((32, 4, 2), np.uint16), np.zeros((32, 2, 2), np.uint16)
    for r in range(4):
        for i in range(2):
            regs_a[:, r, i] = halves_a[G + 8 * (r % 2), 2 * T + i + 8 * (r // 2)]
    for r in range(2):
        for i in range(2):
            regs_b[:, r, i] = halves_b[2 * T + i + 8 * r, G]
    regs_d = np.stack([d[G + 8 * (i // 2), 2 * T + i % 2] for i in range(4)], axis=1)
    buffers = [guarded(words(regs_a)), guarded(words(regs_b)), guarded(regs_d)]
    call(kernels(), "mma_fp16", 32, 0, buffers, [])
    want = d + from_bits(halves_a, "fp16") @ from_bits(halves_b, "fp16")
    got = np.stack([want[G + 8 * (i // 2), 2 * T + i % 2] for i in range(4)], axis=1)
    np.testing.assert_allclose(buffers[2], got, rtol=1e-5, atol=1e-5)


def test_a_product_of_tf32() -> None:
    rng = np.random.default_rng(1)
    a, b = tf32(rng.standard_normal((16, 8)).astype("f4")), tf32(rng.standard_normal((8, 8)).astype("f4"))
    regs_a = np.stack([a[G + 8 * (r % 2), T + 4 * (r // 2)] for r in range(4)], axis=1)
    regs_b = np.stack([b[T + 4 * r, G] for r in range(2)], axis=1)
    buffers = [guarded(regs_a), guarded(regs_b), guarded(np.zeros((32, 4), np.float32))]
    call(kernels(), "mma_tf32", 32, 0, buffers, [])
    want = a @ b
    got = np.stack([want[G + 8 * (i // 2), 2 * T + i % 2] for i in range(4)], axis=1)
    np.testing.assert_allclose(buffers[2], got, rtol=1e-5, atol=1e-5)


def test_a_sparse_product_with_places_of_either_pair_of_lanes() -> None:
    rng = np.random.default_rng(2)
    dense, b = np.zeros((16, 32), np.float32), rng.integers(-4, 5, (32, 8)).astype(np.float32)
    kept = np.sort(np.stack([np.stack([rng.permutation(4)[:2] for _ in range(8)]) for _ in range(16)]), axis=2)
    stored = rng.integers(1, 9, (16, 8, 2)).astype(np.float32)
    for row in range(16):
        for group in range(8):
            dense[row, 4 * group + kept[row, group]] = stored[row, group]
    halves = to_bits(stored.reshape(16, 16), "fp16")
    regs_a = np.stack(
        [np.stack([halves[G + 8 * (r % 2), 2 * T + i + 8 * (r // 2)] for i in range(2)], -1) for r in range(4)], axis=1
    )
    halves_b = to_bits(b, "fp16")
    regs_b = np.stack([np.stack([halves_b[2 * T + i + 8 * r, G] for i in range(2)], -1) for r in range(4)], axis=1)
    nibbles = (kept[..., 0] | kept[..., 1] << 2).astype(np.uint32)  # [row, group]
    places = np.full((32, 2), 0xFFFFFFFF, np.uint32)  # lanes that are not asked hold nonsense
    for lane in range(32):
        groups = 4 * (lane % 2) + np.arange(4)
        both = [
            int((nibbles[lane // 4 + 8 * half, groups] << 4 * np.arange(4, dtype=np.uint32)).sum()) for half in (0, 1)
        ]
        places[lane, 0 if lane % 4 < 2 else 1] = both[0] | both[1] << 16
    buffers = [guarded(words(regs_a)), guarded(words(regs_b)), guarded(np.zeros((32, 4), np.float32)), guarded(places)]
    call(kernels(), "mma_sparse", 32, 0, buffers, [])
    want = 2 * dense @ b
    got = np.stack([want[G + 8 * (i // 2), 2 * T + i % 2] for i in range(4)], axis=1)
    np.testing.assert_array_equal(buffers[2], got)


def test_matrices_come_as_they_lie_or_transposed() -> None:
    halves = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    x, y = guarded(words(halves).reshape(-1)), guarded(np.zeros(256, np.uint32))
    call(kernels(), "matrices", 32, 512, [x, y], [])
    straight, turned = y.view(np.uint16).reshape(2, 32, 4, 2)
    for m in range(4):
        for i in range(2):
            np.testing.assert_array_equal(straight[:, m, i], halves[m, G, 2 * T + i])
            np.testing.assert_array_equal(turned[:, m, i], halves[m, 2 * T + i, G])


def test_numbers_are_rounded_as_numpy_rounds_them() -> None:
    rng = np.random.default_rng(3)
    edges = [
        0.0,
        -0.0,
        65504,
        65519.99,
        65520,
        1e30,
        -np.inf,
        6e-8,
        2.9802322e-8,
        2.98024e-8,
        6.1e-5,
        1 + 2**-11,
        1 + 3 * 2**-11,
    ]
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.concatenate(
            [np.float32(edges), rng.standard_normal(500).astype("f4") * np.float32(2.0) ** rng.integers(-30, 18, 500)]
        )
        x = np.concatenate([x, rng.integers(0, 2**16, 500).astype(np.uint16).view(np.float16).astype("f4")]).astype(
            "f4"
        )
        x = x[~np.isnan(x)]
        y, z = guarded(np.zeros(2 * len(x), np.uint16)), guarded(np.zeros(3 * len(x), np.float32))
        call(kernels(), "round_trip", 32, 0, [guarded(x), y, z], [len(x)])
        np.testing.assert_array_equal(y[: len(x)], to_bits(x, "fp16"))
        np.testing.assert_array_equal(y[len(x) :], to_bits(x, "bf16"))
    np.testing.assert_array_equal(z[: len(x)], from_bits(y[: len(x)], "fp16"))
    np.testing.assert_array_equal(z[len(x) : 2 * len(x)], from_bits(y[len(x) :], "bf16"))
    finite = np.isfinite(x)
    np.testing.assert_array_equal(z[2 * len(x) :][finite], tf32(x)[finite])


def pass_on(mistake: int, seed: int, threads: int = 64) -> bool:
    x = guarded(np.arange(1, 16 * threads + 1, dtype=np.uint32))
    y = guarded(np.zeros_like(x))
    call(kernels(), "pass_on", threads, 16 * threads, [x, y], [mistake], seed=seed)
    return bool((y == x.reshape(4, threads, 4)[:, ::-1].reshape(-1)).all())


@pytest.mark.parametrize("threads", [32, 64, 256])
def test_correct_code_is_right_with_every_seed(threads: int) -> None:
    assert all(pass_on(0, seed, threads) for seed in range(20))


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(1, id="wait"),
        pytest.param(2, id="barrier"),
        pytest.param(3, id="barrier before reuse"),
        pytest.param(7, id="commit"),
    ],
)
def test_what_is_left_out_shows(mistake: int) -> None:
    for seed in range(20):
        with pytest.raises(LaunchError, match="race: shared byte"):
            pass_on(mistake, seed)


def through_shared(between: int, other: int, seed: int) -> bool:
    x = guarded(np.arange(1, 65, dtype=np.uint32))
    y = guarded(np.zeros_like(x))
    call(kernels(), "through_shared", 64, 1024, [x, y], [between, other], seed=seed)
    return bool((y == x[np.arange(64) ^ other]).all())


@pytest.mark.parametrize("between, other", [(0, 32), (0, 1), (1, 1), (6, 1), (2, 0), (3, 0)])
def test_barriers_order_memory(between: int, other: int) -> None:
    """Of the block, of lanes of a warp; where several write the same, and where a thread reads its own."""
    assert all(through_shared(between, other, seed) for seed in range(10))


@pytest.mark.parametrize("between, other", [(1, 32), (2, 1), (3, 1), (4, 1), (5, 1), (7, 1)])
def test_nothing_else_orders_memory(between: int, other: int) -> None:
    """A warp's barrier between warps; a shuffle, an mma, an ldmatrix between lanes; nothing; different values."""
    for seed in range(10):
        with pytest.raises(LaunchError, match="race: shared byte"):
            through_shared(between, other, seed)


@pytest.mark.parametrize(
    "mistake, words_",
    [
        (4, "no multiple of 16"),
        (5, "outside of all buffers"),
        (6, "outside of the 1024 bytes of shared memory"),
        (8, "deadlock"),
        (9, "deadlock"),
        (10, "lanes of a warp do different things"),
        (11, "0 bytes past the end of buffer 1"),
    ],
)
def test_what_is_wrong_is_said(mistake: int, words_: str) -> None:
    with pytest.raises(LaunchError, match=words_):
        pass_on(mistake, seed=0)


def test_lanes_exchange_values() -> None:
    x = np.arange(64, dtype=np.float32)
    y = guarded(np.zeros(192, np.float32))
    call(kernels(), "sums", 64, 0, [guarded(x), y], [])
    np.testing.assert_array_equal(y[:64], np.repeat([x[:32].sum(), x[32:].sum()], 32))
    np.testing.assert_array_equal(y[64:128], np.concatenate([np.roll(x[:32], -1), np.roll(x[32:], -1)]))
    np.testing.assert_array_equal(y[128:].view(np.uint32), (x.view(np.uint32) & 0xFFFF) | 0x22110000)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvrtc_takes_the_same_source(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPA_NVCC", "none")
    ptx = nvrtc.compile_source(DEVICE.read_text() + SOURCE, arch).ptx
    for instruction in (
        "mma.sync.aligned.m16n8k16",
        "mma.sync.aligned.m16n8k8",
        "mma.sp::ordered_metadata",
        "ldmatrix",
    ):
        assert instruction in ptx


def test_a_compiler_before_cuda_12_5_gets_the_sparse_product_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPA_NVCC", "none")
    older = "".join(
        f"#undef __CUDACC_VER_{part}__\n#define __CUDACC_VER_{part}__ {number}\n"
        for part, number in (("MAJOR", 12), ("MINOR", 4))
    )
    for before, wanted in ((older, "mma.sp.sync"), ("", "mma.sp::ordered_metadata.sync")):
        ptx = nvrtc.compile_source(before + DEVICE.read_text() + SOURCE, "sm_80").ptx
        assert f"{wanted}.aligned.m16n8k32.row.col.f32.f16.f16.f32" in ptx
        assert len(set(re.findall(r"mma\.sp[\w:]*\.sync", ptx))) == 1


def test_it_has_every_function_that_kernels_have() -> None:
    def declared(text: str) -> set[str]:
        text = re.sub(r"//.*", "", text)
        plain = re.findall(r"^SPA_DEVICE [\w ]+?[ *](spa_\w+)\(", text, re.M)
        waits = [f"spa_cp_async_wait{n}" for n in re.findall(r"^SPA_WAIT\((\d)\)", text, re.M)]
        products = re.findall(r"^SPA_MMA(?:_SPARSE)?\((spa_\w+),", text, re.M)
        return {*plain, *waits, *products} - {"spa_cp_async_wait"}

    ours, theirs = declared((FOLDER / "device.h").read_text()), declared(DEVICE.read_text())
    assert len(theirs) > 60
    assert theirs - ours == {"spa_shared_address"}
    assert ours - theirs == set()
