"""TVMScript -> object code with a plain C ABI, cached by content.

MakePackedAPI is left out, so that functions keep the signature they were written with: no argument checks, no
TVM symbols in the object. LowerTVMBuiltin is left out too: it would turn local buffers above 1 KiB into calls of
TVMBackendAllocWorkspace.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import tvm
from tvm import tirx
from tvm.target import Target

from spa_compiler.targets import AARCH64


def lower(functions: Sequence[tirx.PrimFunc], target: Target) -> tvm.IRModule:
    """The passes of TVM's default pipeline that a hand-written kernel needs."""
    module = tvm.IRModule({f.attrs["global_symbol"]: f for f in functions})
    passes = tirx.transform
    return tvm.ir.transform.Sequential(
        [
            passes.BindTarget(target),
            passes.StmtSimplify(),
            passes.FlattenBuffer(),
            passes.NarrowDataType(32),
            passes.VectorizeLoop(True),
            passes.UnrollLoop(),
            passes.StmtSimplify(),
            passes.CommonSubexprElim(),
            passes.LowerIntrin(),
        ]
    )(module)


def llvm_target(level: str) -> Target:
    """An LLVM target; `level` is one of `vector.ISAS`, which LLVM calls by the same names."""
    if level == AARCH64:
        arm = {"mtriple": "aarch64-linux-gnu", "mcpu": "generic", "mattr": ["+neon"]}
        return Target({"kind": "llvm", "opt-level": 3, **arm})
    return Target({"kind": "llvm", "mcpu": level, "opt-level": 3})


def compile_module(functions: Sequence[tirx.PrimFunc], mcpu: str) -> tvm.runtime.Module:
    """An in-memory LLVM module, for `inspect_source("asm")` and for `build_object`."""
    target = llvm_target(mcpu)
    return tvm.get_global_func("target.build.llvm")(lower(functions, target), target)


@functools.cache
def _sources() -> bytes:
    """Digest of everything in this room: an edited kernel never meets a stale object."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).digest()


def object_path(name: str, mcpu: str, cache: Path) -> Path:
    """Where `build_object` keeps the object of a kernel."""
    text = f"{tvm.__version__}\n{mcpu}\n{name}\n".encode() + _sources()
    return cache / f"{hashlib.sha256(text).hexdigest()[:32]}.o"


def build_object(name: str, make: Callable[[str, str], tirx.PrimFunc], mcpu: str, cache: Path) -> Path:
    """The object file of one kernel in `cache`; `make(name, mcpu)` is called, and compiled, where it is not there yet.

    Parsing a script alone takes some 40 ms, so the key is the name and the sources that the script comes from.
    """
    path = object_path(name, mcpu, cache)
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        module = compile_module([make(name, mcpu)], mcpu)
        handle, partial = tempfile.mkstemp(suffix=".o", dir=cache)
        os.close(handle)
        module.write_to_file(partial, "o")
        Path(partial).replace(path)
    return path
