"""Operators for ONNX Runtime's CUDA provider -> the tables of the C side and the machine code that goes with them.

    ai.spa::Cuda_<hash>(x, [residual,] packed arrays, bias) -> y        attributes: site, n, k, [low, high]

An operator is a form, a type, a layout and an epilogue, with the kernels that it launches by the number of tokens.
Sizes and weights are the node's, so layers share operators. `runtime/c/gpu.h` has the tables. Code lies uncompressed in
the library: for each kernel a cubin for every architecture that was asked for, and PTX of the newest, which the driver
compiles where a GPU is newer than all of them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spa_compiler.kernels.cuda.arrays import Array, Below, Check, Extent, Offsets, Permutation, counts_of
from spa_compiler.kernels.cuda.form import Dtype, Epilogue, Form, Kernel, Layout
from spa_compiler.kernels.cuda.source import source
from spa_compiler.targets import host, nvrtc

SOURCES = ("gpu_driver.c", "gpu_module.c", "gpu_check.c", "gpu_node.c")
FLAGS = ("-ldl",)
"""dlopen has a library of its own in older releases of glibc."""

MAX_VARIANTS = 16  # of the C side: gpu.h
BOUNDED = frozenset({"clip", "hard_sigmoid", "leaky_relu"})
"""Activations whose nodes have the attributes `low` and `high`."""

_EXACT = re.compile(r"sm_(\d+)(\d)(a?)f?")  # 120 is 12.0; code for sm_90a runs on 9.0 alone
_ELEMENTS = {"fp32": 1, "fp16": 10, "bf16": 16, "float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5}
_ELEMENTS |= {"int32": 6, "int64": 7, "float16": 10, "uint32": 12}
"""ONNXTensorElementDataType."""
_CHECKS: dict[type[Check], str] = {Below: "GPU_BELOW", Offsets: "GPU_OFFSETS", Permutation: "GPU_PERMUTATION"}


NodeLayout = Literal["rows", "planes", "pixel"]
"""Of x, the residual and y: those of kernels (`kernels/cuda/form.py`), and [batch, k, 1, ..], images of one pixel,
which lie in memory as rows do, so that kernels of rows run."""


def kernel_layout(layout: NodeLayout) -> Layout:
    """Of the kernels that such a node launches."""
    return "planes" if layout == "planes" else "rows"


@dataclass(frozen=True)
class Variant:
    """A kernel, and the most tokens (pixels of an image) that it is launched for; None: any number."""

    most_tokens: int | None
    kernel: Kernel


@dataclass(frozen=True)
class GpuOp:
    """An operator. Equal ones are one in a library, whatever the weights.

    Variants are by increasing `most_tokens`, the last one takes any number.
    """

    form: str
    """Its name, for people."""
    dtype: Dtype
    layout: NodeLayout
    epilogue: Epilogue
    rules: tuple[Array, ...]
    variants: tuple[Variant, ...]

    def __post_init__(self) -> None:
        limits = [v.most_tokens for v in self.variants]
        known = [limit for limit in limits if limit is not None]
        if not limits or limits[-1] is not None or known != sorted(set(known)) or len(known) != len(limits) - 1:
            raise ValueError(
                f"variants must be for more and more tokens, the last one for any number, not for {limits}"
            )
        if len(limits) > MAX_VARIANTS:
            raise ValueError(f"an operator has at most {MAX_VARIANTS} variants, not {len(limits)}")
        counts_of(self.rules)

    @property
    def op_type(self) -> str:
        """Its name in a model: says everything but sizes and weights."""
        said = [self.form, self.dtype, self.layout, str(self.epilogue), repr(self.rules)]
        for v in self.variants:
            kernel = v.kernel
            said.append(f"{v.most_tokens} {kernel.name} {kernel.threads} {kernel.tile_rows} {kernel.tile_tokens}")
        return f"Cuda_{hashlib.sha256(chr(10).join(said).encode()).hexdigest()[:10]}"

    @property
    def bounded(self) -> bool:
        """Whether its nodes have the attributes `low` and `high`."""
        return self.epilogue.act in BOUNDED


def operator(
    form: Form, dtype: Dtype, layout: NodeLayout, epilogue: Epilogue, variants: Sequence[tuple[int | None, Kernel]]
) -> GpuOp:
    """The operator of a form that launches `variants`: (most tokens, kernel), more and more, None for any."""
    chosen = tuple(Variant(most, kernel) for most, kernel in variants)
    return GpuOp(form.name, dtype, layout, epilogue, tuple(form.rules(dtype)), chosen)


@dataclass(frozen=True)
class Code:
    """What a driver loads: a cubin for `arch` (`sm_90`), or PTX for it and all newer ones."""

    arch: str
    image: bytes
    ptx: bool = False


@dataclass(frozen=True)
class GpuLibrary:
    """What goes into a kernels.so for GPUs."""

    ops: tuple[GpuOp, ...]
    archs: tuple[str, ...]
    codes: Mapping[str, Sequence[Code]]
    """Of every kernel, by its name."""


def build(ops: Sequence[GpuOp], archs: Sequence[str]) -> GpuLibrary:
    """Compiles the kernels of `ops` for every architecture (`sm_80`, `sm_90`), or takes them from the cache.

    Raises:
        EnvironmentFault: there is no compiler, or it does not take an architecture.
        ValueError: a kernel needs a newer architecture.
    """
    kernels = kernels_of(ops)
    for kernel in kernels.values():
        for arch in archs:
            if 10 * _version(arch)[0] + _version(arch)[1] < kernel.oldest:
                raise ValueError(f"{kernel.name} needs sm_{kernel.oldest}, so it cannot be compiled for {arch}")
    sources = {name: source(kernel) for name, kernel in kernels.items()}  # TVM prints in one thread
    with ThreadPoolExecutor(host().cores_physical) as pool:
        wanted = [(name, arch) for name in sources for arch in archs]
        compiled = dict(zip(wanted, pool.map(lambda w: nvrtc.compile_source(sources[w[0]], w[1]), wanted), strict=True))
    lasting = [arch for arch in archs if not _version(arch)[2]]
    codes: dict[str, list[Code]] = {}
    for name in sources:
        codes[name] = [Code(arch, compiled[name, arch].cubin) for arch in archs]
        if lasting:
            newest = max(lasting, key=_version)
            codes[name].append(Code(newest, compiled[name, newest].ptx.encode(), ptx=True))
    return GpuLibrary(tuple(ops), tuple(archs), codes)


def kernels_of(ops: Sequence[GpuOp]) -> dict[str, Kernel]:
    """The kernels that `ops` launch, by name."""
    return dict(sorted({v.kernel.name: v.kernel for op in ops for v in op.variants}.items()))


def _version(arch: str) -> tuple[int, int, bool]:
    """`sm_90a` -> 9, 0, True: whether no other architecture runs it."""
    found = _EXACT.fullmatch(arch)
    if found is None:
        raise ValueError(f"{arch!r} is no architecture")
    return int(found[1]), int(found[2]), bool(found[3])


NO_GPU = '#include "gpu.h"\nconst GpuOp* const spa_gpu_ops = NULL;\nconst int spa_gpu_op_count = 0, spa_for_gpus = 0;\n'
"""The tables of a library for CPUs."""


def write_c(library: GpuLibrary) -> str:
    """The tables of a library for GPUs; `write_images` has the code that they point at."""
    ops = sorted(set(library.ops), key=lambda op: op.op_type)
    numbers = _numbers(library)
    out = ['#include "gpu.h"\n']
    out += [
        f'extern const unsigned char spa_image_{i}[] __attribute__((visibility("hidden")));' for i in numbers.values()
    ]
    for name, kernel in kernels_of(ops).items():
        codes = ", ".join(_code(code, numbers[name, i]) for i, code in enumerate(library.codes[name]))
        out.append(f"static const GpuCode codes_{name}[] = {{{codes}}};")
        out.append(
            f'static const GpuKernel kernel_{name} = {{.name = "{name}", .threads = {kernel.threads}, '
            f".tile_tokens = {kernel.tile_tokens}, .tile_rows = {kernel.tile_rows}, "
            f".shared_bytes = {kernel.shared_bytes}, "
            f".codes = codes_{name}, .code_count = {len(library.codes[name])}}};"
        )
    for op in ops:
        out += _op(op, _spelled(library))
    rows = "".join(
        f"  {{SPA_GPU_OP({provider}, {create}), &info_{op.op_type}}},\n"
        for op in ops
        for provider, create in (
            ("spa_gpu_provider", "spa_gpu_create"),
            ("spa_gpu_provider_cpu", "spa_gpu_create_cpu"),
        )
    )
    out.append(f"static const GpuOp gpu_ops[] = {{\n{rows or '  {.info = NULL}'}}};")
    out.append("const GpuOp* const spa_gpu_ops = gpu_ops;")
    out.append(f"const int spa_gpu_op_count = {2 * len(ops)}, spa_for_gpus = 1;\n")
    return "\n".join(out)


def write_images(library: GpuLibrary, folder: Path) -> Path:
    """Writes the code into `folder`; returns an assembler file that takes it into the library."""
    out = ["/* Written by spa-compiler. */", '\t.section .rodata.spa_images, "a"']
    for (name, i), number in _numbers(library).items():
        code = library.codes[name][i]
        image = code.image + (b"\0" if code.ptx else b"")
        path = folder / f"image_{number}"
        path.write_bytes(image)
        # The digest is for caches that know a source by its text alone: zig's does not look at what .incbin takes in.
        out.append(f"/* {name} {code.arch} {hashlib.sha256(image).hexdigest()} */")
        symbol = f"spa_image_{number}"
        out.append(f'\t.globl {symbol}\n\t.hidden {symbol}\n\t.balign 64\n{symbol}:\n\t.incbin "{path}"')
    out.append('\t.section .note.GNU-stack, "", @progbits\n')
    file = folder / "images.s"
    file.write_text("\n".join(out))
    return file


def _numbers(library: GpuLibrary) -> dict[tuple[str, int], int]:
    """A number for each code of each kernel that is launched."""
    keys = [(name, i) for name in kernels_of(library.ops) for i in range(len(library.codes[name]))]
    return {key: number for number, key in enumerate(keys)}


def _spelled(library: GpuLibrary) -> str:
    """What GPUs it is for, in words."""
    newer = any(code.ptx for codes in library.codes.values() for code in codes)
    return ", ".join(library.archs) + (" and newer" if newer else "")


def _code(code: Code, number: int) -> str:
    major, minor, exact = _version(code.arch)
    flags = f".exact = {int(exact)}, .ptx = {int(code.ptx)}"
    return f'{{.arch = "{code.arch}", .major = {major}, .minor = {minor}, {flags}, .image = spa_image_{number}}}'


def _op(op: GpuOp, archs: str) -> list[str]:
    name, counts = op.op_type, counts_of(op.rules)
    arrays = "".join(f"  {_array(rule, counts)},\n" for rule in op.rules)
    variants = ", ".join(
        f"{{{'INT64_MAX' if v.most_tokens is None else v.most_tokens}, &kernel_{v.kernel.name}}}" for v in op.variants
    )
    return [
        f"static const GpuArray arrays_{name}[] = {{\n{arrays}}};",
        f"static const GpuVariant variants_{name}[] = {{{variants}}};",
        f'static const GpuInfo info_{name} = {{.name = "{name}", .archs = "{archs}", .type = {_ELEMENTS[op.dtype]}, '
        f".layout = GPU_{op.layout.upper()}, .residual = {int(op.epilogue.residual)}, "
        f".bounded = {int(op.bounded)}, .arrays = arrays_{name}, .variants = variants_{name}, "
        f".array_count = {len(op.rules)}, .variant_count = {len(op.variants)}}};",
    ]


def _array(rule: Array, counts: Sequence[str]) -> str:
    fields = {
        "name": f'"{rule.name}"',
        "type": _ELEMENTS[rule.dtype],
        "rank": len(rule.shape),
        "dims": f"{{{', '.join(_extent(extent, counts) for extent in rule.shape)}}}",
    }
    if rule.check:
        fields |= {"check": _CHECKS[type(rule.check)], "bound": _extent(rule.check.bound, counts)}
    if isinstance(rule.check, Below):
        fields |= {"shift": rule.check.shift, "mask": rule.check.mask}
    return f"{{{', '.join(f'.{field} = {value}' for field, value in fields.items())}}}"


def _extent(extent: Extent, counts: Sequence[str]) -> str:
    count = counts.index(extent.count) if extent.count else -1
    return f"{{{extent.times}, {extent.rows}, {extent.columns}, {extent.plus}, {count}}}"
