"""docs/roofline.md: how near kernels come to what the machine can do.

    python tests/peers/roofline.py             some minutes; writes docs/roofline.md
    python tests/peers/roofline.py --stdout    prints the table instead

The peak of multiply-adds and the bandwidth of memory change from second to second on a machine that others use, too. So
they are measured right before and right after every burst of a kernel, over as long a time or as many bytes, and the burst
is compared with the mean of the two. Bursts count while multiply-adds are as fast as they have been at any time: where they
are slower, others are at work on the same core and its caches. The median of the ratios is shown. The bandwidth is that of
adding up the values of weights that the kernel does not read. Both rotate through more than twice the L3 cache; all lies in
large pages, where sessions move weights. A burst is of several weights, as a model has one after the other. Every form is
measured in the tile that is the fastest here, as a compilation finds it.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import itertools
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file alone
    sys.path.insert(0, str(ROOT))

from spa_compiler.kernels.form import Form, Packed  # noqa: E402
from spa_compiler.kernels.lower import build_object  # noqa: E402
from spa_compiler.kernels.permuted import Permuted  # noqa: E402
from spa_compiler.kernels.rx1 import Blocks  # noqa: E402
from spa_compiler.kernels.sliced import Slices  # noqa: E402
from spa_compiler.kernels.vector import ISAS  # noqa: E402
from spa_compiler.placement import variants  # noqa: E402
from spa_compiler.placement.candidates import Stored  # noqa: E402
from spa_compiler.runtime.link import C_FOLDER, kernel, run_linker  # noqa: E402
from spa_compiler.targets import host  # noqa: E402
from spa_compiler.targets.machine import cache_dir  # noqa: E402
from tests.kernel_harness import sparse  # noqa: E402

PAGE = ROOT / "docs" / "roofline.md"
N, K = 3072, 768
ALIGNED = 64  # bytes
LEAST_BYTES = 256 << 20  # that weights rotate through; more where twice the L3 cache is more
MOST_BYTES = 1 << 30
ROUNDS, SECONDS, FIRST_LOOK = 9, 2.0, 0.3
PATIENCE = 4  # times as long, until there are so many undisturbed bursts
CALM = 0.97  # of the best rate of multiply-adds
LOOKED_AT_AGAIN = 3  # tiles of a case, the leading ones
CHAINS = 20  # of roofline.c
PEAK_STEPS = 100_000
STUB = """/* What steps.c needs of other files, for errors that cannot be here. */
#include "region.h"
Api spa_api;
Status* spa_refuse(const Node* node, int code, const char* format, ...) { return (void)node, (void)code, (void)format, NULL; }
const char* spa_show(char text[160], const int64_t* dims, size_t rank) { return (void)dims, (void)rank, text; }
"""
CPU = {"x86-64-v4": "x86_64_v4", "x86-64-v3": "x86_64_v3", "x86-64": "x86_64"}


@dataclass(frozen=True)
class Case:
    """A weight of N x K at a sparsity, in a form, with zeros in blocks of `rows` x 1, for so many tokens."""

    form: Form
    rows: int
    sparsity: float
    tokens: int

    @property
    def lanes(self) -> int:
        return min(self.tokens, 64)

    @property
    def weight(self) -> np.ndarray:
        return sparse(np.random.default_rng(0), N, K, self.rows, 1 - self.sparsity)

    def tiles(self) -> list[Case]:
        """This one in every tile, with all sizes decided."""
        weight = self.weight
        stored = Stored(self.form, 1 - self.sparsity)
        forms = dict.fromkeys(each.form.pack(weight).form for each in (stored, *variants.tiles(stored, N, K)))
        return [dataclasses.replace(self, form=form) for form in forms]


COMPUTE = [Case(Blocks(4), 4, s, 128) for s in (0.5, 0.8, 0.9)] + [Case(Blocks(1), 1, s, 128) for s in (0.5, 0.8, 0.9)]
MEMORY = [
    Case(Blocks(16), 16, 0.9, 1),
    Case(Blocks(4), 4, 0.9, 1),
    Case(Permuted(), 1, 0.9, 1),
    Case(Permuted(), 1, 0.5, 1),
    Case(Slices(), 1, 0.9, 1),
]


def build(folder: Path, cases: list[Case]) -> ctypes.CDLL:
    """The driver, steps.c and the kernels that the cases need, for the best level of this machine."""
    names = sorted({case.form.kernel(case.lanes, "none", False) for case in cases})
    objects = [str(build_object(name, kernel, host().level, cache_dir() / "objects")) for name in names]
    stub = folder / "api.c"
    stub.write_text(STUB)
    run_linker(
        [
            *("-shared", "-fPIC", "-O3", "-std=gnu11", "-ffp-contract=fast", f"-mcpu={CPU[host().level]}"),
            *(f"-DLANES={ISAS[host().level].width}", f"-I{C_FOLDER}"),
            *(
                str(Path(__file__).with_suffix(".c")),
                *(str(C_FOLDER / name) for name in ("steps.c", "pages.c")),
                str(stub),
            ),
            *objects,
            *("-o", str(folder / "roofline.so")),
        ]
    )
    library = ctypes.CDLL(str(folder / "roofline.so"))
    library.peak.restype = library.stream.restype = ctypes.c_float
    return library


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def aligned(size: int) -> np.ndarray:
    """So many bytes of zeros at the beginning of a cache line, as the memory of a session is."""
    memory = np.zeros(size + ALIGNED, np.uint8)
    return memory[-memory.ctypes.data % ALIGNED :][:size]


def rotated(library: ctypes.CDLL, case: Case, limit: int) -> tuple[Packed, list[dict[str, np.ndarray]]]:
    """A weight, and the arrays of copies of it, twice `limit` bytes, which lie side by side in large pages."""
    packed = case.form.pack(case.weight)
    sizes = {name: -(-array.nbytes // ALIGNED) * ALIGNED for name, array in packed.arrays.items()}
    copies = max(2, 2 * limit // sum(sizes.values()))
    memory, at = aligned(copies * sum(sizes.values())), 0
    weights: list[dict[str, np.ndarray]] = [{} for _ in range(copies)]
    for weight in weights:
        for name, array in packed.arrays.items():
            weight[name] = memory[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
            weight[name][...] = array
            at += sizes[name]
    library.spa_use_large_pages(pointer(memory), ctypes.c_int64(memory.nbytes))  # there is nothing to move before
    return packed, weights


@dataclass(frozen=True)
class Burst:
    """What a kernel reached, and the machine beside it."""

    of_peak: float  # by what is stored
    of_memory: float
    flops: float  # a second, at the peak
    rate: float  # bytes a second


def undisturbed(bursts: list[Burst], best: float) -> list[Burst]:
    """Those during which the machine's multiply-adds were about as fast as they have been; all, if none were."""
    return [b for b in bursts if b.flops >= CALM * best] or bursts


def ratios(library: ctypes.CDLL, case: Case, limit: int, seconds: float = SECONDS) -> tuple[float, float, float]:
    """(share of the multiply-add peak by what is stored, share of the bandwidth, bytes a second of that); medians."""
    packed, weights = rotated(library, case, limit)
    form: Any = packed.form
    tiles = case.tokens // case.lanes
    panel, out = (aligned(tiles * -(-rows // 16) * 16 * case.lanes * 4).view(np.float32) for rows in (K, N))
    panel[...] = np.random.default_rng(0).standard_normal(panel.shape)
    function = getattr(library, form.kernel(case.lanes, "none", False))
    sizes = [
        ctypes.c_int64(v)
        for v in (N, K, form.rows, form.chunk, form.k_block, form.info.get("interleaved", 0), case.lanes, tiles)
    ]
    arguments = [(ctypes.c_void_p * len(w))(*(a.ctypes.data for a in w.values())) for w in weights]
    stored = int(packed.arrays["values"].size)
    size = sum(a.nbytes for a in packed.arrays.values())
    width = ISAS[host().level].width
    batch = min(len(weights) // 2, 4 if case.tokens > 1 else 16)  # bursts of milliseconds
    bursts: list[Burst] = []
    read = stored // (4 * 16) * 4 * 16  # floats of a weight that `stream` adds up
    half = len(weights) // 2  # the first ones are the kernel's
    mine, others = itertools.cycle(range(half)), itertools.cycle(range(half, len(weights)))
    steps = PEAK_STEPS

    def limits() -> tuple[float, float]:
        """Seconds of the multiply-adds, and of reading, now."""
        begin = time.perf_counter()
        library.peak(ctypes.c_int64(steps), ctypes.c_float(0.5))
        between = time.perf_counter()
        for _ in range(batch):
            library.stream(pointer(weights[next(others)]["values"]), ctypes.c_int64(read))
        return between - begin, time.perf_counter() - between

    begun, best = time.perf_counter(), 0.0
    while (spent := time.perf_counter() - begun) < seconds or (
        spent < PATIENCE * seconds and len(undisturbed(bursts, best)) < ROUNDS
    ):
        before = limits()
        burst = (ctypes.c_void_p * batch)(*(ctypes.addressof(arguments[next(mine)]) for _ in range(batch)))
        begin = time.perf_counter()
        library.products(function, burst, ctypes.c_int64(batch), *sizes, pointer(panel), pointer(out))
        taken = time.perf_counter() - begin
        multiplying, reading = (sum(pair) / 2 for pair in zip(before, limits(), strict=True))
        flops, rate = 2 * CHAINS * width * steps / multiplying, 4 * read * batch / reading
        best = _best[0] = max(_best[0], flops)
        done = 2 * stored * case.tokens * batch / taken
        bursts.append(Burst(done / flops, size * batch / taken / rate, flops, rate))
        steps = max(1, round(steps * taken / multiplying))  # as long as the burst
    calm = undisturbed(bursts, best)
    peak, memory, rate = (
        float(np.median([getattr(b, what) for b in calm])) for what in ("of_peak", "of_memory", "rate")
    )
    return peak, memory, rate


_best = [0.0]  # rate of multiply-adds that was seen in any case


def fastest(library: ctypes.CDLL, tiles: list[Case], limit: int) -> Case:
    """By the share that does not depend on how much padding a tile stores: the time."""

    def taken(case: Case, seconds: float) -> float:
        return case.form.stored(case.weight) / ratios(library, case, limit, seconds)[0]

    leading = sorted(tiles, key=lambda case: taken(case, FIRST_LOOK))[:LOOKED_AT_AGAIN]
    return min(leading, key=lambda case: taken(case, SECONDS / 2)) if len(leading) > 1 else leading[0]


def rotation() -> int:
    """Bytes that weights rotate through: more than twice the L3 cache."""
    cache = os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 0
    return max(LEAST_BYTES, min(2 * cache + 1, MOST_BYTES))


def table(limit: int) -> str:
    """The page."""
    cases = [*COMPUTE, *MEMORY]
    lines = [
        "# Against the machine",
        "",
        "Written by `tests/peers/roofline.py`, which says how it measures; `make bench` measures it anew.",
        "",
        f"{host().model} ({host().level}), one thread. One linear layer {K} -> {N}, kernels alone: without packing, ONNX",
        "Runtime, bias or activation, each form in its fastest tile. Multiply-adds count what is stored. Weights rotate "
        f"through {limit / 2**20:.0f} MiB.",
        "",
        "| form | zeros | tokens | tile | of the multiply-add peak | of the memory bandwidth |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        cut = [case.tiles() for case in cases]
        library = build(Path(folder), [tile for each in cut for tile in each])
        for each in cut:
            case = fastest(library, each, limit)
            peak, memory, rate = ratios(library, case, limit)
            name = dataclasses.replace(case.form, chunk=None, k_block=None).name  # type: ignore[type-var]
            lines.append(
                f"| {name} | {case.sparsity:.0%} | {case.tokens} | {case.form.chunk} x {case.form.k_block} "
                f"| {peak:.0%} | {memory:.0%} of {rate / 1e9:.1f} GB/s |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stdout", action="store_true", help="print the page instead of writing it")
    parser.add_argument("--bytes", type=int, default=rotation(), help="that a kernel's weights rotate through")
    options = parser.parse_args()
    page = table(options.bytes)
    if options.stdout:
        sys.stdout.write(page)
    else:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
