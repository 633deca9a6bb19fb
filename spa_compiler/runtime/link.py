"""Kernels, the C side and the generated regions -> one kernels.so that needs libc alone.

The linker is `python -m ziglang cc` against glibc 2.28 (ONNX Runtime's own floor), so that no compiler has to be
installed and the result runs on older machines than this one; `SPA_CC` names another one.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import joblib
from joblib.externals.loky import get_reusable_executor

from spa_compiler.errors import EnvironmentFault
from spa_compiler.kernels import (
    attention,
    cached,
    combine,
    depthwise,
    gate,
    grouped_products,
    layernorm,
    panel,
    permuted,
    rmsnorm,
    rotate,
    rx1_products,
    rxc,
    sliced,
    window,
)
from spa_compiler.kernels.lower import build_object, object_path
from spa_compiler.kernels.vector import Isa, isa_of
from spa_compiler.runtime import gpu as gpu_tables
from spa_compiler.runtime.generate import Region, kernels_of, symbol, write_c
from spa_compiler.runtime.gpu import GpuLibrary
from spa_compiler.targets import AARCH64, host
from spa_compiler.targets.machine import cache_dir

GLIBC = "2.28"
WORTH_PROCESSES = 24  # kernels to build: a process takes a second to load TVM, a kernel a tenth to build
C_FOLDER = Path(__file__).parent / "c"
SOURCES = (
    "register.c",
    "node.c",
    "pages.c",
    "panels.c",
    "steps.c",
    "images.c",
    "pixels.c",
    "window.c",
    "depthwise.c",
    "between.c",
    "isa.c",
)
FLAGS = ("-O2", "-std=c11", "-Wall", "-Wextra", "-fPIC", "-shared", "-s")


def link(regions: Sequence[Region], levels: Sequence[str], output: Path, gpu: GpuLibrary | None = None) -> None:
    """Writes kernels.so.

    Args:
        regions: what the model's nodes need; may be empty, the library then loads and registers nothing.
        levels: to have kernels for, of one architecture; the machine takes the highest that it runs.
        output: the file to write.
        gpu: operators for GPUs and their code; also without operators, the library is then one for GPUs.

    Raises:
        EnvironmentFault: the linker cannot be run or fails.
    """
    wanted = list(dict.fromkeys(regions))
    # Two forms may have kernels in common.
    functions = list(dict.fromkeys(name for names in kernels_of(wanted).values() for name in names))
    objects = build([(name, level) for level in levels for name in functions])
    # Beside the output, which a run that is killed leaves in a place that the next one tidies up.
    with tempfile.TemporaryDirectory(prefix="spa-link-", dir=output.parent) as folder:
        generated = Path(folder) / "regions.c"
        tables = gpu_tables.NO_GPU if gpu is None else gpu_tables.write_c(gpu)
        generated.write_text(write_c(wanted, levels) + tables)
        for_gpus: list[str] = []
        if gpu is not None:
            for_gpus = [str(C_FOLDER / s) for s in gpu_tables.SOURCES]
            for_gpus += [str(gpu_tables.write_images(gpu, Path(folder))), *gpu_tables.FLAGS]
        run_linker(
            [
                *FLAGS,
                f"-I{C_FOLDER}",
                f"-Wl,--version-script={C_FOLDER / 'exports.map'}",
                "-Wl,-z,noexecstack",
                "-Wl,-z,relro",
                "-Wl,--no-undefined",
                *(str(C_FOLDER / s) for s in SOURCES),
                str(generated),
                *map(str, objects),
                *for_gpus,
                "-o",
                str(output),
            ],
            levels[0],
        )


def build(wanted: Sequence[tuple[str, str]]) -> list[Path]:
    """The objects of kernels by name and level; many new ones are built in processes of their own, which start without
    forking."""
    cache = cache_dir() / "objects"
    kernels = [(symbol(name, level), level) for name, level in wanted]
    missing = [(name, level) for name, level in kernels if not object_path(name, level, cache).exists()]
    if len(missing) >= WORTH_PROCESSES and host().cores_physical > 1:
        with joblib.Parallel(n_jobs=host().cores_physical, backend="loky") as parallel:
            parallel(joblib.delayed(build_object)(name, kernel, level, cache) for name, level in missing)
        get_reusable_executor().shutdown()  # nothing of it may be around when times are taken
    return [build_object(name, kernel, level, cache) for name, level in kernels]


def kernel(called: str, level: str):  # type: ignore[no-untyped-def]  # a tvm.tirx.PrimFunc, which has no types
    """The kernel that `kernels_of` names, made for a level; with the level's `symbol` for a name, it is called so."""
    name = called.removesuffix(symbol("", level))
    return _script(name, isa_of(level)).with_attr("global_symbol", called)


def _script(name: str, isa: Isa):  # type: ignore[no-untyped-def]
    if name in (window.SHIFT, window.CROP):
        return window.shift_kernel() if name == window.SHIFT else window.crop_kernel()
    if name == gate.NAME:
        return gate.kernel(isa)
    if name == rotate.NAME:
        return rotate.kernel(isa)
    if name == depthwise.PAD:
        return depthwise.pad_kernel()
    if name.startswith(("spa_depthwise_", "spa_largest_")):
        return depthwise.kernel(*depthwise.parse(name), isa)
    if name.startswith("spa_permuted_"):
        return permuted.kernel(*permuted.parse(name), isa)
    parts = name.removeprefix("spa_").split("_", 3)
    if parts[0] == "pack":
        return panel.pack_kernel(int(parts[2]), isa)
    if parts[0] == "unpack":
        return panel.unpack_kernel(int(parts[2]), isa)
    if parts[0] == "combine":
        return combine.kernel(parts[1], "_".join(parts[2:]), isa)
    if parts[0] == "attention":
        return attention.kernel(int(parts[1]), isa)
    if parts[0] == "cached":
        return cached.kernel(int(parts[1]), int(parts[2]), isa)
    if parts[0] == "layernorm":
        return layernorm.kernel(int(parts[1]), isa)
    if parts[0] == "rmsnorm":
        return rmsnorm.kernel(int(parts[1]), isa)
    if parts[0] in ("rxc", "rxcw"):
        rows, cols = map(int, parts[1].split("x"))
        return rxc.kernel(rows, cols, int(parts[2]), parts[3], parts[0] == "rxcw", isa)
    if parts[0] == "grouped":
        kept, of = map(int, parts[1].split("of"))
        return grouped_products.kernel(kept, of, int(parts[2]), "_".join(parts[3:]), isa)
    if parts[0] == "sliced":
        return sliced.kernel(int(parts[1]), "_".join(parts[2:]), isa)
    return rx1_products.kernel(int(parts[1]), int(parts[2]), parts[3], parts[0] == "rx1w", isa, parts[0] == "rx1p")


def linker(level: str = "") -> list[str]:
    """The command that compiles and links C for machines of a level: SPA_CC, else zig."""
    chosen = os.environ.get("SPA_CC", "").strip()
    try:
        return shlex.split(chosen) if chosen else [sys.executable, "-m", "ziglang", "cc", "-target", _zig_target(level)]
    except ValueError as error:
        raise EnvironmentFault(
            f"the linker cannot be run: {error}", where=f"SPA_CC={chosen}", fix="Close the quotes, as a shell wants it"
        ) from error


def run_linker(arguments: Sequence[str], level: str = "") -> None:
    """Runs the linker for x86-64, or for machines of a `level`; EnvironmentFault with its own words when it fails."""
    command = linker(level)
    zig_cache = str(cache_dir() / "zig")  # zig has no cache without HOME, and fails then
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": zig_cache, "ZIG_LOCAL_CACHE_DIR": zig_cache}
    fix = (
        "SPA_CC must name a C compiler, for instance SPA_CC=gcc; without SPA_CC, zig is used"
        if os.environ.get("SPA_CC")
        else "Install it again with `pip install --force-reinstall ziglang`, or set SPA_CC to a C compiler"
    )
    try:
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise EnvironmentFault(f"the linker cannot be run: {error}", where=command[0], fix=fix) from error
    if done.returncode != 0:
        words = "\n".join(done.stderr.strip().splitlines()[-12:])
        raise EnvironmentFault(f"linking kernels.so failed: {words}", where=shlex.join(command), fix=fix)


def _zig_target(level: str) -> str:
    return f"{'aarch64' if level == AARCH64 else 'x86_64'}-linux-gnu.{GLIBC}"
