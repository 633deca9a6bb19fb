"""Levels that this machine may not have, under qemu's user mode: what regions compute, in a program of its own.

Numbers alone: an emulator says nothing of time, and there is no ONNX Runtime in the program (`fake_ort.c` is what the C
side calls instead). A CPU without AVX runs what is made for plain x86-64, so that one wrong instruction ends the program.
AVX2 is left to CPUs that have it (test_levels.py): this very program is right there at level 3, and wrong under qemu 7.2.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from spa_compiler.kernels import attention, panel
from spa_compiler.kernels.vector import ISAS
from spa_compiler.runtime import link
from spa_compiler.runtime.region import AttentionSpec, RegionBuilder, RegionSpec
from tests import decoder_harness
from tests.image_harness import NETWORKS, network
from tests.kernel_harness import X86
from tests.region_harness import CASES, case
from tests.window_harness import CONVOLUTIONS

pytestmark = pytest.mark.slow

DRIVER = Path(__file__).parent / "fake_ort.c"
TYPES = {np.dtype(np.float32): 1, np.dtype(np.uint16): 4, np.dtype(np.int32): 6}
TOLERANCE = 1e-5
HEADS, DEPTH = 3, 20
# tokens that take each number of lanes; several sequences, several tiles
TOKENS = ((1, 1), (1, 3), (1, 7), (1, 16), (1, 30), (1, 45), (1, 64), (3, 33), (1, 129))

Record = tuple[RegionSpec, Sequence[np.ndarray], Sequence[np.ndarray]]


def qemu(name: str) -> str:
    found = shutil.which(f"qemu-{name}") or shutil.which(f"qemu-{name}-static")
    if not found:
        pytest.fail(f"qemu-{name} is not installed, and nothing else runs these kernels: apt install qemu-user")
    return found


def core() -> RegionSpec:
    builder = RegionBuilder()
    q, k, v = (builder.pack(HEADS * DEPTH) for _ in range(3))
    builder.unpack(builder.attention(q, k, v, AttentionSpec(HEADS, DEPTH, 0.3), builder.mask()))
    return builder.finish()


def records() -> Iterator[Record]:
    """Every region and what it gives, in float64 or by ONNX Runtime's own operator."""
    for name in CASES:
        c = case(name)
        for dims in TOKENS:
            feeds = c.feeds(dims)
            yield c.spec, (*feeds.values(), *c.arrays.values()), c.expected(feeds)
    for name in NETWORKS:
        n = network(name)
        feeds = n.feeds(2, (37, 20)[2 - n.made_by.axes :])
        yield n.spec, (*feeds.values(), *n.arrays.values()), n.expected(feeds)
    for convolution in CONVOLUTIONS.values():
        feeds = convolution.image(2, *(37, 20)[2 - convolution.window.axes :])
        yield convolution.region, (*feeds.values(), *convolution.packed.arrays.values()), convolution.expected(feeds)
    for batch, tokens in TOKENS:
        rng = np.random.default_rng(tokens)
        q, k, v = rng.standard_normal((3, batch, tokens, HEADS * DEPTH)).astype(np.float32)
        mask = rng.standard_normal((batch, 1, 1, tokens)).astype(np.float32)
        mask[rng.random(mask.shape) < 0.2] = -3e38
        yield core(), (q, k, v, mask), [_attention(q, k, v, mask)]
        for cached in (False, True):
            given = decoder_harness.inputs(cached, batch, tokens, 130 * cached, seed=tokens)
            yield decoder_harness.core(cached), given, decoder_harness.expected(given)


def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    out = np.empty_like(q)
    for b in range(len(q)):
        for h in range(HEADS):
            head = slice(h * DEPTH, (h + 1) * DEPTH)
            wide = np.broadcast_to(mask[b, 0].T, (q.shape[1], q.shape[1]))
            out[b, :, head] = attention.reference(q[b, :, head].T, k[b, :, head].T, v[b, :, head].T, wide, 0.3).T
    return out


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[RegionSpec, ...], int]:
    """The file of records, their regions, the number of outputs in it."""
    found = list(records())
    path = tmp_path_factory.mktemp("records") / "records"
    with path.open("wb") as file:
        file.write(struct.pack("<id", len(found), TOLERANCE))
        for spec, inputs, outputs in found:
            name = f"{spec.op_type} {inputs[0].shape}".encode()
            file.write(struct.pack("<i", len(name)) + name + struct.pack("<ii", len(inputs), len(outputs)))
            for array in (*inputs, *(y.astype(np.float32) for y in outputs)):
                file.write(struct.pack(f"<ii{array.ndim}q", TYPES[array.dtype], array.ndim, *array.shape))
                file.write(np.ascontiguousarray(array).tobytes())
    return path, tuple(spec for spec, _, _ in found), sum(len(outputs) for _, _, outputs in found)


@pytest.fixture(scope="module")
def programs(recorded: tuple[Path, tuple[RegionSpec, ...], int], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One static program for each architecture, linked as kernels.so is."""
    built: dict[str, Path] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SPA_CC", raising=False)
        patch.setattr(link, "FLAGS", ("-O2", "-std=c11", "-static", str(DRIVER)))
        for architecture, levels in (("x86_64", X86), ("aarch64", ("aarch64",))):
            patch.setattr(link, "_zig_target", lambda level, a=architecture: f"{a}-linux-musl")
            built[architecture] = tmp_path_factory.mktemp("emulated") / architecture
            link.link(recorded[1], levels, built[architecture])
    return built


def run(command: Sequence[str], path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)


def test_every_level_is_emulated() -> None:
    assert {*X86, "aarch64"} == set(ISAS)
    assert {panel.lanes_for(tokens) for _, tokens in TOKENS} == set(panel.LANE_COUNTS)


def test_aarch64(recorded: tuple[Path, object, int], programs: dict[str, Path]) -> None:
    done = run([qemu("aarch64"), str(programs["aarch64"])], recorded[0])
    assert (done.returncode, done.stdout) == (0, f"level 1, {recorded[2]} checks\n"), done.stdout + done.stderr


@pytest.mark.parametrize("cpu, level", [("qemu64", 1), ("core2duo", 1), ("Nehalem", 2)])
def test_x86_64(recorded: tuple[Path, object, int], programs: dict[str, Path], cpu: str, level: int) -> None:
    done = run([qemu("x86_64"), "-cpu", cpu, str(programs["x86_64"])], recorded[0])
    assert (done.returncode, done.stdout) == (0, f"level {level}, {recorded[2]} checks\n"), done.stdout + done.stderr


def test_a_wrong_number_is_seen(recorded: tuple[Path, object, int], programs: dict[str, Path], tmp_path: Path) -> None:
    content = bytearray(recorded[0].read_bytes())
    content[-4:] = struct.pack("<f", 1e3)  # the last value that the last record wants
    (tmp_path / "wrong").write_bytes(content)
    done = run([qemu("aarch64"), str(programs["aarch64"])], tmp_path / "wrong")
    assert done.returncode == 1
    assert "is off by" in done.stdout


def test_an_instruction_that_the_cpu_lacks_ends_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setup itself: AVX on a CPU without it."""
    monkeypatch.delenv("SPA_CC", raising=False)
    monkeypatch.setattr(link, "_zig_target", lambda level: "x86_64-linux-musl")
    source = tmp_path / "avx.c"
    source.write_text(
        'int main(void) { __asm__ volatile(".byte 0xc5, 0xf4, 0x58, 0xd0" ::: "xmm2"); return 0; } /* vaddps ymm2, ymm1, ymm0 */\n'
    )
    link.run_linker(["-static", str(source), "-o", str(tmp_path / "avx")])
    for cpu, ends in (("qemu64", True), ("core2duo", True), ("Haswell", False)):
        done = subprocess.run([qemu("x86_64"), "-cpu", cpu, str(tmp_path / "avx")], check=False, capture_output=True)
        assert (done.returncode != 0) == ends, cpu
