"""TVMScript -> CUDA source that includes nothing: `device.h` and what TVM prints of the kernel.

`tvm.compile` is not used: its pipeline shrinks shared buffers to what it sees used, and it does not see asynchronous
copies. A script is written for exactly one thread block shape (`T.launch_thread`), has at most one buffer of shared
memory, in scope `shared.dyn`, and calls device.h's functions by `T.call_extern`. Loops marked `T.unroll` stay loops,
with a pragma.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

import tvm
from tvm.target import Target

from spa_compiler.kernels.cuda.form import Kernel
from spa_compiler.kernels.lower import lower

DEVICE = Path(__file__).parent / "device.h"

_SHARED = re.compile(r"extern __shared__ (?:__align__|alignas)\(\d+\) (\w+) (\w+)\[\];")
_BOUNDS = re.compile(r"__launch_bounds__\(\d+\)")
_BODY = re.compile(r'extern "C" __global__ void[^{;]*\{.*', re.DOTALL)


def source(kernel: Kernel) -> str:
    """The whole translation unit of one kernel: an `extern "C"` function called `kernel.name`."""
    return DEVICE.read_text() + body(kernel)


@functools.cache
def body(kernel: Kernel) -> str:
    """The kernel alone, as it follows on `device.h`, or on the emulator's.

    Raises:
        ValueError: the script has static shared memory, or several buffers.
    """
    target = Target({"kind": "cuda", "arch": "sm_80"})  # the printed text is the same for all
    function = kernel.make().with_attrs({"calling_conv": 2, "target": target, "global_symbol": kernel.name})
    with tvm.transform.PassContext(config={"tirx.UnrollLoop": {"explicit_unroll": False, "auto_max_step": 0}}):
        module = lower([function], target)
    printed = tvm.get_global_func("target.build.cuda")(module, target).inspect_source()
    found = _BODY.search(printed)
    if found is None:
        raise ValueError(f"TVM printed no kernel {kernel.name}")
    text, buffers = _SHARED.subn(r"SPA_DYNAMIC_SHARED(\1, \2);", found[0])
    if buffers > 1 or "__shared__" in text:
        raise ValueError(f"{kernel.name}: one buffer of dynamic shared memory is all that a kernel may have")
    return _BOUNDS.sub(f"__launch_bounds__({kernel.threads}, {kernel.min_blocks})", text)


@functools.cache
def digest() -> bytes:
    """Of everything that sources come from: an edited kernel never meets a stale binary."""
    folder = Path(__file__).parent
    files = sorted([*folder.glob("*.py"), *folder.glob("*.h"), *folder.parent.glob("*.py")])
    return hashlib.sha256(tvm.__version__.encode() + b"".join(f.read_bytes() for f in files)).digest()
