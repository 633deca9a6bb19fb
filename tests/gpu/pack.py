"""Writes the archive that `kernels.py` runs on a machine with a GPU: machine code, packed weights, and what to do with them.

    python tests/gpu/pack.py build/cuda-kernels.zip

Weights are packed here, where TVM is, and stored packed. What a recipe gives back there is not stored: the dense weight,
and the values of blocks, of which the archive has the places alone.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from spa_compiler.kernels.cuda import blocks
from spa_compiler.kernels.cuda.bitmap import Bitmap
from spa_compiler.kernels.cuda.blocks import Blocks
from spa_compiler.kernels.cuda.few import Few
from spa_compiler.kernels.cuda.form import DTYPES, LAYOUTS, Arrays, Dtype, Epilogue, Form, Kernel, Layout
from spa_compiler.kernels.cuda.forms import FORMS
from spa_compiler.kernels.cuda.lowrank import RANKS, LowRank
from spa_compiler.kernels.cuda.matvec import FourBit
from spa_compiler.kernels.cuda.source import source
from spa_compiler.kernels.cuda.two_four import TwoFour
from spa_compiler.kernels.cuda.vectors import Vectors
from spa_compiler.solvers.four_bits import Grid, nearest
from spa_compiler.targets import host, nvrtc
from spa_compiler.targets.cuda import architecture
from tests.gpu.kernels import VERSION, to_bits, weight_of

ARCHS = ("sm_80", "sm_90")
LARGEST = 40_000_000
"""Bytes of an archive."""

Images = Callable[[Kernel], list[tuple[int, bool, bytes]]]
"""A kernel's code: compute capability, whether it is PTX, bytes."""

EPILOGUES = (Epilogue(), Epilogue("relu"), Epilogue("gelu_erf", True), Epilogue("silu"), Epilogue("clip", True))
SHAPES = ((304, 208, 1), (95, 203, 9), (304, 208, 33), (520, 137, 150))
"""n, k, tokens of cases: tails of everything."""
VECTOR_SHAPES = {8: (523, 137, 150), 16: (512, 208, 152)}
"""Of columns of outputs, whose kernels are many: one each, with tails and without."""


def compiled(kernel: Kernel) -> list[tuple[int, bool, bytes]]:
    """Cubin of every architecture that can launch it, and PTX of the last one, for GPUs that are newer than all."""
    codes = {
        architecture(arch).capability: nvrtc.compile_source(source(kernel), arch)
        for arch in ARCHS
        if kernel.fits(architecture(arch))
    }
    out = [(capability, False, code.cubin) for capability, code in codes.items()]
    last = max(codes)
    return [*out, (last, True, codes[last].ptx.encode())]


def recipe(n: int, k: int, density: float, block: int, seed: int, levels: int) -> dict[str, Any]:
    """Of a weight: see `kernels.weight_of`."""
    return {"n": n, "k": k, "density": density, "block": block, "seed": seed, "levels": levels}


def on_grid(weight: np.ndarray, form: FourBit) -> np.ndarray:
    """A weight rounded to what the form holds; its zeros stay."""
    return nearest(weight.astype(np.float64), Grid(form.group)).astype(np.float32)


@dataclass
class Packer:
    """What goes into an archive; equal arrays are stored once."""

    kernels: dict[str, Kernel] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    cases: list[dict[str, Any]] = field(default_factory=list)
    bars: list[dict[str, Any]] = field(default_factory=list)

    def store(self, array: np.ndarray, **more: Any) -> dict[str, Any]:
        """How a manifest refers to it."""
        array = np.ascontiguousarray(array)
        said = f"{array.dtype} {array.shape}".encode()
        name = hashlib.sha256(said + array.tobytes()).hexdigest()[:16]
        self.arrays[name] = array
        return {"stored": name, **more}

    def case(
        self,
        form: Form,
        kernel: Kernel,
        dtype: Dtype,
        layout: Layout,
        epilogue: Epilogue,
        shape: tuple[int, int, int],
        packed: dict[Any, Any],
    ) -> None:
        """One launch whose result is compared; `packed` has the weights that were packed before."""
        n, k, _ = shape
        block = form.size if isinstance(form, Blocks | Vectors) else 1
        how = recipe(n, k, 0.3, block, 77, 64) | ({"two_of_four": True} if isinstance(form, TwoFour) else {})
        how |= {"across": 1} if isinstance(form, Vectors) else {}
        key = (form, dtype, n, k)
        if key not in packed:
            dense = weight_of(how)
            if isinstance(form, FourBit):
                dense = on_grid(dense, form)
            arrays = form.pack(dense, dtype)
            kept = [self.store(arrays[name]) for name in form.arrays]
            weight = self.store(form.unpack(arrays, n, k, dtype)) if isinstance(form, FourBit) else how
            packed[key] = kept, weight
        self._case(form, kernel, dtype, layout, epilogue, shape, *packed[key])

    def _case(
        self,
        form: Form,
        kernel: Kernel,
        dtype: Dtype,
        layout: Layout,
        epilogue: Epilogue,
        shape: tuple[int, int, int],
        kept: list[dict[str, Any]],
        weight: Any,
    ) -> None:
        """`kept` are the packed arrays, `weight` what they hold, or a list of two factors, that which x meets first."""
        n, k, tokens = shape
        self.kernels[kernel.name] = kernel
        said = {"form": form.name, "kernel": kernel.name, "dtype": dtype, "layout": layout, "act": epilogue.act}
        said |= {
            "residual": epilogue.residual,
            "n": n,
            "k": k,
            "tokens": tokens,
            "batch": 2 if layout == "planes" else 1,
        }
        low, high = (-0.75, 0.5) if epilogue.act == "clip" else (0.0, 0.0)
        self.cases.append(said | {"low": low, "high": high, "weight": weight, "arrays": kept})

    def matrix(
        self,
        forms: Sequence[Form],
        dtypes: Sequence[Dtype],
        layouts: Sequence[Layout],
        shapes: Sequence[tuple[int, int, int]],
    ) -> None:
        """Every form, dtype and layout; shapes and epilogues take turns, so that each variant of a form has some."""
        packed: dict[Any, Any] = {}
        turn = itertools.count()
        for form, dtype, layout in itertools.product(forms, dtypes, layouts):
            seen: set[tuple[int, ...]] = set()
            for shape in shapes:
                epilogue = EPILOGUES[next(turn) % len(EPILOGUES)]
                for kernel in form.kernels(architecture("sm_90"), dtype, layout, epilogue, shape[2]):
                    variant = (kernel.tile_tokens, kernel.tile_rows, kernel.threads, shape[0] % 2)
                    if variant not in seen:
                        seen.add(variant)
                        self.case(form, kernel, dtype, layout, epilogue, shape, packed)

    def low_rank(self, ranks: Sequence[int], dtypes: Sequence[Dtype], shapes: Sequence[tuple[int, int, int]]) -> None:
        """Two factors in one kernel: every rank and type, with each number of tokens that there is a kernel for."""
        turn = itertools.count()
        for rank, dtype, (n, k, tokens) in itertools.product(ranks, dtypes, shapes):
            form, epilogue = LowRank(rank), EPILOGUES[next(turn) % len(EPILOGUES)]
            v, u = recipe(rank, k, 1.0, 1, 78, 64), recipe(n, rank, 1.0, 1, 79, 64)
            for kernel in form.kernels(architecture("sm_90"), dtype, "rows", epilogue, tokens):
                arrays = form.pack_factors(weight_of(u), weight_of(v), dtype)
                kept = [self.store(arrays[name]) for name in form.arrays]
                self._case(form, kernel, dtype, "rows", epilogue, (n, k, tokens), kept, [v, u])

    # ---- bars ----

    def bar(self, name: str, wants: float, tokens: int, layers: Sequence[dict[str, Any]]) -> None:
        self.bars.append({"name": name, "wants": wants, "tokens": tokens, "layers": list(layers)})

    def block_layer(
        self, n: int, k: int, density: float, *, seed: int, count: int = 1, rotate: bool = False
    ) -> dict[str, Any]:
        """A layer of 32 x 32 blocks with all tiles that there are; values are taken from the weight there."""
        how = recipe(n, k, density, 32, seed, 2048)
        weight = weight_of(how)
        numbered = Blocks(32, 32).pack(np.arange(1, 1025, dtype=np.float32).reshape(32, 32), "fp16")["values"][0]
        fragment = numbered.view(np.float16).astype(np.int32) - 1
        candidates = []
        for group in blocks.GROUPS:
            form = Blocks(32, group)
            arrays = form.pack(weight, "fp16")
            where = _coordinates(form, arrays)
            cut = weight.reshape(n // 32, 32, k // 32, 32).transpose(0, 2, 1, 3)[where[:, 0], where[:, 1]]
            if not np.array_equal(to_bits(cut.reshape(len(where), -1)[:, fragment], "fp16"), arrays["values"]):
                raise AssertionError("values of blocks cannot be taken from the weight")
            values = {"coordinates": self.store(where), "fragment": self.store(fragment), "block": 32, "dtype": "fp16"}
            specs = [values if name == "values" else self.store(arrays[name]) for name in form.arrays]
            for tile in blocks.TILES:
                if tile.group == group:
                    kernel = blocks.kernel(32, tile, "fp16", "rows", Epilogue())
                    candidates.append(self._candidate(form, kernel, specs))
        return self._layer(n, k, count, rotate, np.count_nonzero(weight), candidates) | {"weight": how, "check": {}}

    def vector_layer(self, n: int, k: int, density: float, size: int, tokens: int, *, seed: int) -> dict[str, Any]:
        """A layer that keeps columns of `size` outputs."""
        how = recipe(n, k, density, size, seed, 64) | {"across": 1}
        weight, form = weight_of(how), Vectors(size)
        arrays = form.pack(weight, "fp16")
        specs = [self.store(arrays[name]) for name in form.arrays]
        made = form.kernels(architecture("sm_90"), "fp16", "rows", Epilogue(), tokens)
        candidates = [self._candidate(form, kernel, specs) for kernel in made]
        return self._layer(n, k, 1, False, np.count_nonzero(weight), candidates) | {"weight": how, "check": {}}

    def few_layer(self, n: int, k: int, density: float, tokens: int, *, seed: int) -> dict[str, Any]:
        """A layer with zeros anywhere."""
        how = recipe(n, k, density, 1, seed, 64)
        weight = weight_of(how)
        candidates = []
        for form in (Few(), Bitmap()):
            arrays = form.pack(weight, "fp16")
            specs = [self.store(arrays[name]) for name in form.arrays]
            made = form.kernels(architecture("sm_90"), "fp16", "rows", Epilogue(), tokens)
            candidates += [self._candidate(form, kernel, specs) for kernel in made]
        return self._layer(n, k, 1, True, np.count_nonzero(weight), candidates) | {"weight": how, "check": {}}

    def four_bit_layer(self, n: int, k: int, density: float, tokens: int, *, seed: int, repeat: int) -> dict[str, Any]:
        """A layer of 4 bits, of which `n` / `repeat` rows are stored: those that follow are the same again."""
        form, slab = FourBit(128), n // repeat
        if slab % 16:
            raise ValueError("whole strips can be repeated")
        arrays = form.pack(on_grid(weight_of(recipe(slab, k, density, 1, seed, 2048)), form), "fp16")
        specs = [self.store(arrays[name], repeat=repeat) for name in form.arrays]
        made = form.kernels(architecture("sm_90"), "fp16", "rows", Epilogue(), tokens)
        candidates = [self._candidate(form, kernel, specs) for kernel in made]
        known = form.unpack(arrays, slab, k, "fp16")[:64]
        return self._layer(n, k, 1, True, round(n * k * density), candidates) | {"check": self.store(known)}

    def _candidate(self, form: Form, kernel: Kernel, specs: list[dict[str, Any]]) -> dict[str, Any]:
        self.kernels[kernel.name] = kernel
        return {"form": form.name, "kernel": kernel.name, "arrays": specs}

    @staticmethod
    def _layer(
        n: int, k: int, count: int, rotate: bool, nonzeros: int, candidates: list[dict[str, Any]]
    ) -> dict[str, Any]:
        return {"n": n, "k": k, "count": count, "rotate": rotate, "nonzeros": int(nonzeros), "candidates": candidates}

    def write(self, path: Path, images: Images = compiled, compiler: str | None = None) -> None:
        """Compiles all kernels and writes the archive."""
        for kernel in self.kernels.values() if images is compiled else ():
            source(kernel)  # TVM prints in one thread
        with ThreadPoolExecutor(host().cores_physical) as pool:
            codes = dict(zip(self.kernels, pool.map(images, self.kernels.values()), strict=True))
        manifest: dict[str, Any] = {"version": VERSION, "compiler": compiler or str(nvrtc.find()), "kernels": {}}
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
            for name, kernel in self.kernels.items():
                about = {"threads": kernel.threads, "tile_rows": kernel.tile_rows, "tile_tokens": kernel.tile_tokens}
                about |= {"shared_bytes": kernel.shared_bytes, "images": []}
                for capability, ptx, image in codes[name]:
                    at = f"{name}.sm_{capability}.{'ptx' if ptx else 'cubin'}"
                    file.writestr(f"images/{at}", image)
                    about["images"].append({"capability": capability, "ptx": ptx, "image": at})
                manifest["kernels"][name] = about
            for name, array in self.arrays.items():
                file.writestr(
                    f"arrays/{name}", array.reshape(-1).view(np.uint8).reshape(-1, array.itemsize).T.tobytes()
                )
            stored = {name: {"dtype": str(a.dtype), "shape": a.shape} for name, a in self.arrays.items()}
            manifest |= {"arrays": stored, "cases": self.cases, "bars": self.bars}
            file.writestr("manifest.json", json.dumps(manifest))


def _coordinates(form: Blocks, arrays: Arrays) -> np.ndarray:
    """Block row and block column of every stored block, in their order: int16 [blocks, 2]."""
    order = arrays["order"].reshape(-1, form.per_group)
    group = np.repeat(np.arange(len(order)), np.diff(arrays["indptr"]) * form.per_stage)
    entry, place = np.nonzero(arrays["masks"][:, None] >> np.arange(form.per_group, dtype=np.uint32) & 1)
    return np.stack([order[group[entry], place], arrays["columns"][entry]], axis=1).astype(np.int16)


def everything() -> Packer:
    """What `make cuda-kernels` packs."""
    packer = Packer()
    packer.matrix([form for form in FORMS if not isinstance(form, Vectors)], DTYPES, LAYOUTS, SHAPES)
    for size, shape in VECTOR_SHAPES.items():
        packer.matrix([Vectors(size)], DTYPES, LAYOUTS, [shape])
    packer.low_rank(RANKS, DTYPES, SHAPES)
    for density, wants in ((0.1, 3.0), (0.2, 1.7)):
        layer = packer.block_layer(4096, 4096, density, seed=1)
        packer.bar(f"fp16 4096^3, 32x32 blocks, {100 * (1 - density):.0f} % zeros", wants, 4096, [layer])
    packer.bar(
        "fp16 4096 x 4096, 16 tokens, unstructured 80 %", 1.5, 16, [packer.few_layer(4096, 4096, 0.2, 16, seed=2)]
    )
    for size, density in ((16, 0.1), (8, 0.05)):
        layer = packer.vector_layer(4096, 1024, density, size, 4096, seed=7)
        named = f"fp16 4096 x 1024, 4096 tokens, {size}x1, {100 * (1 - density):.0f} % zeros"
        packer.bar(named, 1.2, 4096, [layer])
    layer = packer.four_bit_layer(8192, 8192, 0.5, 1, seed=3, repeat=4)
    packer.bar("fp16 8192 x 8192, one token, 4 bits and 50 %", 3.0, 1, [layer])
    shapes = ((768, 768, 48), (3072, 768, 12), (768, 3072, 12))
    for batch, wants in ((1, 1.5), (32, 2.5)):
        layers = [
            packer.block_layer(n, k, 0.1, seed=4 + i, count=c, rotate=batch == 1) for i, (n, k, c) in enumerate(shapes)
        ]
        packer.bar(f"BERT-base's linear layers, fp16 {batch}x128, 90 %", wants, batch * 128, layers)
    return packer


def main(arguments: Sequence[str] | None = None) -> int:
    """See the file's docstring."""
    parser = argparse.ArgumentParser(description="Packs CUDA kernels and weights for tests/gpu/kernels.py.")
    parser.add_argument("archive", type=Path)
    path = parser.parse_args(arguments).archive
    packer = everything()
    packer.write(path)
    size = path.stat().st_size
    print(
        f"{path}: {size / 1e6:.1f} MB, {len(packer.kernels)} kernels, {len(packer.cases)} cases, {len(packer.bars)} bars"
    )
    print(
        f"On a machine with a GPU: python kernels.py {path.name}, with tests/gpu/kernels.py and this file beside each other"
    )
    if size > LARGEST:
        print(f"It should be below {LARGEST / 1e6:.0f} MB: leave something out", file=sys.stderr)
    return int(size > LARGEST)


if __name__ == "__main__":
    sys.exit(main())
