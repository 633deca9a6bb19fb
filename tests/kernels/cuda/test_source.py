"""A script becomes source that NVRTC takes; what breaks the contract is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tvm.script import tirx as T  # noqa: N812

from spa_compiler.kernels.cuda.form import Kernel
from spa_compiler.kernels.cuda.source import body, source
from spa_compiler.targets import nvrtc


def twice(scope: str = "shared.dyn") -> Any:
    """y = 2 x, by way of shared memory."""

    @T.prim_func(s_tir=True)
    def script(x: T.handle("float32"), y: T.handle("float32"), n: T.int32):
        T.func_attr({"global_symbol": "script", "tirx.noalias": True})
        X = T.decl_buffer((n,), "float32", data=x)
        Y = T.decl_buffer((n,), "float32", data=y)
        block = T.launch_thread("blockIdx.x", T.ceildiv(n, 64))
        thread = T.launch_thread("threadIdx.x", 64)
        shared = T.alloc_buffer((64,), "float32", scope=scope)
        sums = T.alloc_buffer((2,), "float32", scope="local")
        if block * 64 + thread < n:
            T.evaluate(
                T.call_extern(
                    "void", "spa_cp_async4_part", T.address_of(shared[thread]), T.address_of(X[block * 64 + thread]), 4
                )
            )
        T.evaluate(T.call_extern("void", "spa_cp_async_commit"))
        T.evaluate(T.call_extern("void", "spa_cp_async_wait0"))
        T.tvm_storage_sync("shared")
        for i in T.unroll(2):
            sums[i] = shared[thread]
        if block * 64 + thread < n:
            Y[block * 64 + thread] = sums[0] + sums[1]

    return script


TWICE = Kernel("spa_cuda_twice", twice, threads=64, tile_rows=1, tile_tokens=64, shared_bytes=256, min_blocks=4)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvrtc_takes_what_a_script_becomes(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPA_NVCC", "none")
    compiled = nvrtc.compile_source(source(TWICE), arch)
    assert compiled.cubin[:4] == b"\x7fELF"
    assert TWICE.name.encode() in compiled.cubin
    assert "cp.async.ca.shared.global" in compiled.ptx
    assert 0 < compiled.registers <= 64
    assert compiled.spilled == compiled.stack == 0
    assert compiled.compiler.startswith("NVRTC")


def test_a_body_says_how_it_is_launched_and_keeps_its_loops() -> None:
    text = body(TWICE)
    assert text.startswith('extern "C" __global__ void __launch_bounds__(64, 4) spa_cuda_twice(')
    assert "SPA_DYNAMIC_SHARED(float, shared_ptr);" in text
    assert text.count("#pragma unroll") == 1
    assert "#include" not in text


def test_static_shared_memory_is_refused() -> None:
    kernel = dataclasses.replace(TWICE, name="spa_cuda_static", make=lambda: twice("shared"))
    with pytest.raises(ValueError, match="dynamic shared memory"):
        body(kernel)


def test_a_launch_covers_all_outputs_and_tokens() -> None:
    kernel = dataclasses.replace(TWICE, tile_rows=32, tile_tokens=128)
    assert kernel.grid(n=33, tokens=129, batch=3) == (2, 2, 3)
    assert kernel.grid(n=32, tokens=1) == (1, 1, 1)
