"""Nodes for GPUs without a GPU: what is loaded and launched, what is refused, what is given back."""

from __future__ import annotations

import functools
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spa_compiler.kernels.cuda.arrays import check
from spa_compiler.runtime import link
from spa_compiler.runtime.gpu import GpuOp
from tests.gpu_harness import (
    CPU,
    RULES,
    STREAM,
    K,
    N,
    Node,
    Operator,
    Refused,
    Tensor,
    aligned,
    build,
    call,
    driver,
    in_child,
    kernel,
    library_of,
    node,
    operator,
    register,
    weights,
)

ROWS, RESIDUAL = operator(), operator(residual=True, act="relu")
PLANES, CLIPPED = operator("planes", residual=True), operator(act="clip")
PIXEL = operator("pixel", residual=True)
SHARING = operator(kernels=[(None, kernel("few", 8))])  # the kernel of another operator
OPS = (ROWS, RESIDUAL, PLANES, PIXEL, CLIPPED, SHARING)
POINTERS = len(RULES) + 4


@functools.cache
def registered() -> dict[tuple[str, str], Operator]:
    driver().fake_pointers(POINTERS)
    return register(build(library_of(OPS), Path(tempfile.mkdtemp())))


def cuda(op: GpuOp) -> Operator:
    return registered()[op.op_type, "CUDAExecutionProvider"]


class Made:
    """A kernel for as long as it is needed; nothing may be left of it behind."""

    def __init__(self, op: GpuOp, made_of: Node | None = None) -> None:
        self.operator = cuda(op)
        self.kernel = self.operator.create(made_of or node(op))

    def __enter__(self) -> Made:
        return self

    def run(self, made_by: Node) -> np.ndarray:
        return self.operator.compute(self.kernel, made_by)

    def __exit__(self, *_: object) -> None:
        self.operator.destroy(self.kernel)


def on_device(op: GpuOp, device: int) -> Node:
    """A node whose weights are on a GPU."""
    made_of = node(op)
    for tensor in made_of.inputs:
        tensor.device = device
    return made_of


@pytest.fixture(autouse=True)
def _clean(request: pytest.FixtureRequest):
    _reset()
    yield
    _assert_clean()


@in_child
def _reset() -> None:
    driver().reset()
    driver().fail("nothing", 0)


@in_child
def _assert_clean() -> None:
    driver().assert_clean()
    for one in registered().values():
        assert (one.ort.live_statuses, one.ort.live_infos) == (0, 0)


# ---- registration ----


@in_child
def test_every_operator_is_there_for_the_gpu_and_for_those_who_have_none() -> None:
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert set(registered()) == {(op.op_type, provider) for op in OPS for provider in providers}
    assert cuda(ROWS).input_types == [10, 6, 4, 6, 12, 4, 1]
    assert cuda(RESIDUAL).input_types == [10, 10, 6, 4, 6, 12, 4, 1]
    assert not cuda(ROWS).ort.config, "the fusion that is slow is one of the CPU"
    assert not driver().log(), "the driver is left alone until a session wants it"


@in_child
def test_a_node_on_the_cpu_says_what_it_needs() -> None:
    with pytest.raises(Refused) as raised:
        registered()[ROWS.op_type, "CPUExecutionProvider"].create(node(ROWS))
    assert f"ai.spa::{ROWS.op_type} at site 'encoder/dense'" in str(raised.value)
    for words in ("sm_80, sm_90 and newer", "CUDAExecutionProvider", "onnxruntime-gpu", "portable.onnx"):
        assert words in str(raised.value)
    assert raised.value.code == 9


# ---- launches ----


@pytest.mark.parametrize(
    "dims, name, tile, shared",
    [
        ((1, K), "few", 8, 1024),
        ((2, 4, K), "few", 8, 1024),
        ((9, K), "some", 32, 99 << 10),
        ((4, 16, K), "some", 32, 99 << 10),
        ((65, K), "many", 64, 200 << 10),
        ((3, 1, 1000, K), "many", 64, 200 << 10),
        ((K,), "few", 8, 1024),
    ],
)
@in_child
def test_the_variant_goes_by_the_tokens(dims: tuple[int, ...], name: str, tile: int, shared: int) -> None:
    made_of, called = node(ROWS), call(dims)
    tokens = int(np.prod(dims[:-1]))
    with Made(ROWS, made_of) as made:
        y = made.run(called)
    launched = driver().launched()
    assert y.shape == (*dims[:-1], N)
    assert launched == {
        "name": name,
        "grid": (-(-tokens // tile), -(-N // 8), 1),
        "threads": 128,
        "shared": shared,
        "stream": STREAM,
        "pointers": [
            *(t.array.ctypes.data for t in made_of.inputs[1:-1]),
            called.inputs[0].array.ctypes.data,
            made_of.inputs[-1].array.ctypes.data,
            0,
            y.ctypes.data,
        ],
        "sizes": [N, K, tokens, 1],
        "bounds": [0, 0],
    }


@pytest.mark.parametrize("dims", [(1, K, 7), (3, K, 7, 9), (2, K, 2, 2, 2)])
@in_child
def test_planes_have_their_images_on_axis_z(dims: tuple[int, ...]) -> None:
    out = (dims[0], N, *dims[2:])
    called = call(dims, out)
    with Made(PLANES) as made:
        assert made.run(called).shape == out
    launched, pixels = driver().launched(), int(np.prod(dims[2:]))
    assert launched["sizes"] == [N, K, pixels, dims[0]]
    assert launched["grid"] == (-(-pixels // (8 if pixels <= 8 else 32)), 3, dims[0])
    assert launched["pointers"][-2] == called.inputs[1].array.ctypes.data


@pytest.mark.parametrize("dims", [(1, K, 1), (9, K, 1, 1), (100000, K, 1, 1, 1)])
@in_child
def test_images_of_one_pixel_are_the_tokens_of_rows(dims: tuple[int, ...]) -> None:
    out = (dims[0], N, *dims[2:])
    called = call(dims, out)
    with Made(PIXEL) as made:
        assert made.run(called).shape == out
    launched = driver().launched()
    assert launched["sizes"] == [N, K, dims[0], 1]
    name, tile = {1: ("few", 8), 9: ("some", 32), 100000: ("many", 64)}[dims[0]]
    assert (launched["name"], launched["grid"]) == (name, (-(-dims[0] // tile), 3, 1))
    assert launched["pointers"][-2] == called.inputs[1].array.ctypes.data


@in_child
def test_bounds_are_attributes() -> None:
    with Made(CLIPPED, node(CLIPPED, low=-0.5, high=6.0)) as made:
        made.run(call((3, K)))
    assert driver().launched()["bounds"] == [-0.5, 6.0]


@pytest.mark.parametrize("dims", [(0, K), (0, 5, K), (5, 0, K)])
@in_child
def test_no_tokens_no_launch(dims: tuple[int, ...]) -> None:
    with Made(ROWS) as made:
        assert made.run(call(dims)).shape == (*dims[:-1], N)
    assert not driver().fake_launches()


@pytest.mark.parametrize(
    "op, dims", [(PLANES, (0, K, 5)), (PLANES, (2, K, 0)), (PLANES, (2, K, 3, 0)), (PIXEL, (0, K, 1, 1))]
)
@in_child
def test_no_pixels_no_launch(op: GpuOp, dims: tuple[int, ...]) -> None:
    out = (dims[0], N, *dims[2:])
    with Made(op) as made:
        assert made.run(call(dims, out)).shape == out
    assert not driver().fake_launches()


@in_child
def test_any_stream_and_the_default_one() -> None:
    with Made(ROWS) as made:
        for stream in (0, 0x1234):
            made.run(call((3, K), stream=stream))
            assert driver().launched()["stream"] == stream


@in_child
def test_a_call_can_be_recorded_into_a_graph() -> None:
    with Made(ROWS) as made:
        driver().fake_capture(1)
        for tokens in (1, 20, 100):
            made.run(call((tokens, K)))
        driver().fake_capture(0)
    assert driver().fake_launches() == 3


@in_child
def test_the_stand_in_counts_every_function_that_the_c_side_has() -> None:
    """In a life, in a failure and on a GPU that is too old: else the next test would show nothing."""
    source = (Path(link.__file__).parent / "c" / "gpu_driver.c").read_text()
    known = set(re.findall(r'{"(cu\w+)", offsetof', source))
    assert len(known) == 19
    with Made(ROWS) as made:
        made.run(call((3, K)))
    driver().fail("cuModuleLoadDataEx", 209)
    with pytest.raises(Refused):
        Made(ROWS)
    seen = set(driver().calls())
    driver().reset(7, 5)
    with pytest.raises(Refused):
        Made(ROWS)
    assert seen | set(driver().calls()) | {"cuInit"} == known  # cuInit: once in a process


@in_child
def test_a_call_launches_and_does_nothing_else() -> None:
    """Nothing that waits, allocates, copies, loads or looks anything up; the context is pushed where another is current."""
    with Made(ROWS) as made, Made(PLANES) as planes:
        for current in (None, 0, 1):
            if current is not None:
                driver().push(current)
            made.run(call((1, K)))
            driver().fake_forget_calls()
            for tokens in (1, 7, 100, 7):  # all variants, and back
                made.run(call((tokens, K)))
                planes.run(call((2, K, tokens), (2, N, tokens)))
            pushed = {} if current == 0 else {"cuCtxPushCurrent_v2": 8, "cuCtxPopCurrent_v2": 8}
            assert driver().calls() == {"cuCtxGetCurrent": 8, "cuLaunchKernel": 8} | pushed
        driver().pop(), driver().pop()


@in_child
def test_a_thread_with_another_context_keeps_it() -> None:
    with Made(ROWS) as made:
        for device in (0, 1):
            driver().push(device)
            made.run(call((3, K)))
            assert driver().fake_depth() == device + 1
        assert [driver().pop(), driver().pop()] == [1, 0]
    assert driver().fake_launches() == 2


# ---- modules ----


@in_child
def test_a_kernel_is_loaded_once_for_all_nodes_and_operators() -> None:
    made = [Made(op) for op in OPS for _ in range(3)]
    assert len(driver().log("cuModuleLoadDataEx")) == driver().fake_modules() == 3
    assert driver().log("cuFuncSet") == [
        f"cuFuncSetAttribute some: {99 << 10} bytes",
        f"cuFuncSetAttribute many: {200 << 10} bytes",
    ]
    for one in made[:-1]:
        one.__exit__()
    assert driver().fake_modules() == 1, "the last node has one kernel"
    made[-1].__exit__()
    assert driver().fake_modules() == 0
    with Made(ROWS) as again:
        again.run(call((3, K)))
    assert len(driver().log("cuModuleLoadDataEx")) == 6


@in_child
def test_two_gpus_have_modules_of_their_own() -> None:
    made = []
    for device in (0, 1):
        made.append(Made(ROWS, on_device(ROWS, device)))
    assert [line.split(":")[0] for line in driver().log("cuModuleLoad")] == [
        f"cuModuleLoadDataEx device {device}" for device in (0, 0, 0, 1, 1, 1)
    ]
    for one in made:
        one.run(call((3, K)))
        one.__exit__()


@pytest.mark.parametrize(
    "major, minor, image",
    [
        (8, 0, "cubin sm_80"),
        (8, 6, "cubin sm_80"),
        (8, 9, "cubin sm_80"),
        (9, 0, "cubin sm_90"),
        (10, 0, "ptx sm_90"),
        (12, 0, "ptx sm_90"),
    ],
)
@in_child
def test_the_code_goes_by_the_gpu(major: int, minor: int, image: str) -> None:
    driver().reset(major, minor)
    with Made(SHARING):
        assert driver().log("cuModuleLoad") == [f"cuModuleLoadDataEx device 0: {image} few"]


def other_library(archs: tuple[str, ...], ptx: str | None, major: int, minor: int) -> str:
    """What is loaded, from a library of other architectures."""
    driver().reset(major, minor)
    path = build(library_of([SHARING], archs, ptx), Path(tempfile.mkdtemp()))
    operator = register(path)[SHARING.op_type, "CUDAExecutionProvider"]
    operator.destroy(operator.create(node(SHARING)))
    return driver().log("cuModuleLoad")[0].split(": ")[1]


@in_child
def test_the_nearest_code_is_taken() -> None:
    archs = ("sm_80", "sm_86", "sm_90", "sm_90a", "sm_120")
    for major, minor, arch in ((8, 0, "sm_80"), (8, 9, "sm_86"), (9, 0, "sm_90a"), (12, 1, "sm_120")):
        assert other_library(archs, "sm_80", major, minor) == f"cubin {arch} few"
    assert other_library(archs, "sm_80", 10, 3) == "ptx sm_80 few"


@pytest.mark.parametrize(
    "archs, ptx, major, minor, said",
    [
        (("sm_80", "sm_90"), "sm_90", 7, 5, "sm_80, sm_90 and newer"),
        (("sm_86",), "sm_86", 8, 0, "sm_86 and newer"),
        (("sm_80",), None, 9, 0, "sm_80"),
        (("sm_90a",), None, 10, 0, "sm_90a"),
    ],
)
@in_child
def test_a_gpu_that_nothing_was_compiled_for(
    archs: tuple[str, ...], ptx: str | None, major: int, minor: int, said: str
) -> None:
    with pytest.raises(Refused) as raised:
        other_library(archs, ptx, major, minor)
    assert f"is an sm_{major}{minor}, and kernels.so was compiled for {said}. " in str(raised.value)
    assert "Fake 100" in str(raised.value)
    assert f"--target cuda:sm_{major}{minor}" in str(raised.value)


@pytest.mark.parametrize("threads", [1, 2])
@in_child
def test_eight_threads_make_run_and_end_nodes(threads: int) -> None:
    operators = [cuda(op) for op in OPS]  # not from the threads
    work = [(op, one, node(op)) for op, one in zip(OPS, operators, strict=True)]

    def often(i: int) -> None:
        op, one, made_of = work[i % len(OPS)]
        for turn in range(6):
            made = one.create(made_of)
            before, behind = {"planes": ((1,), (7 + turn,)), "pixel": ((turn + 1,), (1,))}.get(
                op.layout, ((turn + 1,), ())
            )
            residual = (*before, N, *behind) if op.epilogue.residual else None
            one.compute(made, call((*before, K, *behind), residual))
            one.destroy(made)

    with ThreadPoolExecutor(8 * threads) as pool:
        list(pool.map(often, range(8 * threads)))
    assert driver().fake_launches() == 6 * 8 * threads


# ---- what fails ----


@pytest.mark.parametrize(
    "function, code, words",
    [
        ("cuDeviceGet", 999, "cuDeviceGet: 999 CUDA_ERROR_UNKNOWN (unknown error)"),
        ("cuDeviceGetAttribute", 999, "cuDeviceGetAttribute: 999"),
        ("cuDevicePrimaryCtxRetain", 2, "cuDevicePrimaryCtxRetain: 2 an unknown error"),
        ("cuCtxPushCurrent", 999, "cuCtxPushCurrent: 999"),
        ("cuModuleLoadDataEx", 209, "for the code of sm_90; the driver is one for CUDA 12.4. ptxas says no"),
        ("cuModuleGetFunction", 999, "cuModuleGetFunction: 999"),
        ("cuFuncGetAttribute", 999, "cuFuncGetAttribute: 999"),
        ("cuFuncSetAttribute", 999, "cuFuncSetAttribute: 999"),
        ("cuMemcpyDtoH", 999, "cuMemcpyDtoH: 999"),
    ],
)
@in_child
def test_a_driver_that_fails_is_quoted_and_nothing_is_left(function: str, code: int, words: str) -> None:
    driver().fail(function, code)
    with pytest.raises(Refused) as raised:
        Made(ROWS)
    assert words in str(raised.value)
    assert "at site 'encoder/dense'" in str(raised.value)
    driver().fail("nothing", 0)
    driver().assert_clean()
    with Made(ROWS) as made:
        made.run(call((3, K)))


@pytest.mark.parametrize("function", ["cuLaunchKernel", "cuCtxPushCurrent", "cuCtxGetCurrent"])
@in_child
def test_a_launch_that_fails(function: str) -> None:
    with Made(ROWS) as made:
        driver().fail(function)
        with pytest.raises(Refused, match=rf"{function}: 999 CUDA_ERROR_UNKNOWN \(unknown error\), to launch few"):
            made.run(call((3, K)))
        assert driver().fake_depth() == 0
        driver().fail("nothing", 0)
        made.run(call((3, K)))


@in_child
def test_limits_of_the_gpu() -> None:
    driver().reset(shared=101376)  # what an sm_86 has
    with pytest.raises(Refused, match=r"many needs 204800 bytes of shared memory, .* \(sm_90\) has 101376"):
        Made(ROWS)
    driver().reset(threads=64)
    with pytest.raises(Refused, match="a block of few can have 64 threads on this GPU, not 128"):
        Made(ROWS)


# ---- what is refused ----


def edited(name: str, index: Any, value: int) -> dict[str, np.ndarray]:
    arrays = weights()
    arrays[name][index] = value
    return arrays


def without(name: str, rows: int = 1) -> dict[str, np.ndarray]:
    arrays = weights()
    arrays[name] = arrays[name][:-rows]
    return arrays


def reshaped(name: str, *dims: int) -> dict[str, np.ndarray]:
    arrays = weights()
    arrays[name] = arrays[name].reshape(dims)
    return arrays


BAD: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "offsets not from 0": (edited("offsets", 0, 1), "offsets must run from 0 to 9"),
    "offsets end early": (edited("offsets", -1, 8), "offsets must run from 0 to 9"),
    "offsets end late": (edited("offsets", -1, 10), "offsets must run from 0 to 9"),
    "offsets decrease": (edited("offsets", 2, 100), "offsets must not decrease, element 3 does"),
    "offsets negative": (edited("offsets", 1, -1), "offsets must not decrease, element 1 does"),
    "offsets too short": (without("offsets"), "offsets must have 7 on axis 0, it has 6"),
    "offsets of rank 2": (reshaped("offsets", 7, 1), "offsets must have 1 dimensions, it has 2"),
    "column past k": (edited("columns", 3, 8), "columns: element 3 is 8, out of range: it must be below 8"),
    "column far past k": (edited("columns", 8, 65535), "columns: element 8 is 65535, out of range"),
    "columns too short": (without("columns"), "words must have 8 on axis 0, it has 9"),
    "order past n": (edited("order", 5, N), f"order: element 5 is {N}, out of range: it must be below {N}"),
    "order negative": (edited("order", 5, -1), "order: element 5 is -1, out of range"),
    "order twice": (edited("order", 5, weights()["order"][6]), f"order is not a permutation of {N}"),
    "order too short": (without("order"), f"order must have {N} on axis 0, it has {N - 1}"),
    "index in a word": (edited("words", (8, 1), K << 16), f"words: element 17 is {K}, out of range"),
    "words too wide": (reshaped("words", 18, 1), "words must have 9 on axis 0, it has 18"),
    "too few values": (without("values"), "values must have 9 on axis 0, it has 8"),
    "values of rank 3": (reshaped("values", 9, 4, 4), "values must have 2 dimensions, it has 3"),
    "bias too short": (without("bias"), f"bias must have {N} elements, it has {N - 1}"),
}


@pytest.mark.parametrize("label", BAD)
@in_child
def test_malformed_arrays_are_refused(label: str) -> None:
    arrays, words = BAD[label]
    with pytest.raises(Refused) as raised:
        Made(ROWS, node(ROWS, arrays))
    assert words in str(raised.value)
    assert f"ai.spa::{ROWS.op_type} at site 'encoder/dense'" in str(raised.value)


@in_child
def test_the_c_side_and_the_rules_agree_about_any_edit() -> None:
    """300 random edits of arrays and sizes: what `arrays.check` refuses is refused, and nothing else."""
    refused = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        arrays, n, k = weights(seed=seed, blocks=int(rng.integers(0, 12))), N, K
        name = str(rng.choice([rule.name for rule in RULES]))
        what = rng.integers(4)
        if what == 0 and arrays[name].size:
            flat = arrays[name].reshape(-1)
            info = np.iinfo(flat.dtype)
            near = [0, 1, 7, 8, 9, N - 1, N, K - 1, K, K << 16, (K - 1) << 16, info.max, info.min]
            flat[rng.integers(flat.size)] = int(rng.choice([v for v in near if info.min <= v <= info.max]))
        elif what == 1:
            arrays[name] = arrays[name][: rng.integers(len(arrays[name]) + 1)]
        elif what == 2:
            n, k = n + int(rng.integers(-4, 5)), k + int(rng.integers(-8, 9))
            arrays["bias"] = np.zeros(n, np.float32)
        try:
            check(RULES, {rule.name: arrays[rule.name] for rule in RULES}, n, k)
            words = ""
        except ValueError as error:
            words = str(error)
        try:
            Made(ROWS, node(ROWS, arrays, n=n, k=k)).__exit__()
            said = ""
        except Refused as error:
            said = str(error)
        assert bool(said) == bool(words), (seed, said, words)
        refused += bool(said)
    assert 100 < refused < 250, refused


@pytest.mark.parametrize(
    "attributes, words",
    [
        ({"n": None}, "the attribute 'n' must be a positive"),
        ({"n": 0}, "the attribute 'n' must be a positive"),
        ({"k": -1}, "the attribute 'k' must be a positive"),
        ({"k": 1 << 31}, "the attribute 'k' must be a positive 32-bit integer"),
        ({"n": "many"}, "the attribute 'n' must be a positive"),
        ({"low": None}, "the attribute 'low' is missing or not a float"),
        ({"high": "x"}, "the attribute 'high' is missing or not a float"),
        ({"site": None}, "the attribute 'site' is missing"),
        ({"n": N + 4}, "offsets must have 8 on axis 0, it has 7"),
        ({"k": 4}, "out of range: it must be below 1"),
        ({"n": (1 << 31) - 1}, "offsets must have 536870913 on axis 0, it has 7"),
    ],
)
@in_child
def test_attributes_are_checked(attributes: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused) as raised:
        Made(CLIPPED, node(CLIPPED, **attributes))
    assert words in str(raised.value)


@pytest.mark.parametrize("index", [1, 5, 6])
@in_child
def test_weights_must_be_constants_in_the_memory_of_one_gpu(index: int) -> None:
    name = [*(rule.name for rule in RULES), "bias"][index - 1]
    for change, words in (
        ({"constant": False}, f"({name}) must be an initializer"),
        ({"kind": CPU}, f"{name} is not in the memory of a GPU"),
        ({"device": 1}, "other weights are on GPU" if index > 1 else "is on GPU 0, other weights are on GPU 1"),
    ):
        made_of = node(ROWS)
        for key, value in change.items():
            setattr(made_of.inputs[index], key, value)
        with pytest.raises(Refused) as raised:
            Made(ROWS, made_of)
        assert words in str(raised.value)


@in_child
def test_addresses_must_be_aligned() -> None:
    made_of = node(ROWS)
    made_of.inputs[3].address = made_of.inputs[3].array.ctypes.data + 8
    with pytest.raises(Refused, match="the address of order must be a multiple of 16"):
        Made(ROWS, made_of)
    with Made(ROWS) as made:
        called = call((3, K))
        called.inputs[0] = Tensor.of(aligned(np.zeros((4, K), np.float16))[1:])  # 60 bytes on
        with pytest.raises(Refused, match="the address of input 0 must be a multiple of 16 bytes"):
            made.run(called)


@in_child
def test_more_outputs_than_blocks_can_be() -> None:
    op = operator(kernels=[(None, kernel("thin", tile_rows=1))])
    one = register(build(library_of([op]), Path(tempfile.mkdtemp())))[op.op_type, "CUDAExecutionProvider"]
    with pytest.raises(Refused, match="65536 outputs are too many for blocks of 1"):
        one.create(node(op, weights(n=65536), n=65536))
    one.destroy(one.create(node(op, weights(n=65535), n=65535)))


@pytest.mark.parametrize(
    "op, dims, residual, words",
    [
        (ROWS, (3, K + 1), None, f"input 0 must have {K} features on axis 1, its shape is [3,{K + 1}]"),
        (ROWS, (), None, "input 0 must have 1 to 8 dimensions, it has 0"),
        (ROWS, (1,) * 8 + (K,), None, "input 0 must have 1 to 8 dimensions, it has 9"),
        (PLANES, (3, K), (3, N), "input 0 must have 3 to 8 dimensions, it has 2"),
        (PLANES, (3, N, 5), (3, N, 5), f"input 0 must have {K} features on axis 1"),
        (PIXEL, (3, K), (3, N), "input 0 must have 3 to 8 dimensions, it has 2"),
        (PIXEL, (3, N, 1), (3, N, 1), f"input 0 must have {K} features on axis 1"),
        (PIXEL, (3, K, 1, 2), (3, N, 1, 2), f"input 0 must have images of one pixel, its shape is [3,{K},1,2]"),
        (PIXEL, (3, K, 0), (3, N, 0), f"input 0 must have images of one pixel, its shape is [3,{K},0]"),
        (PIXEL, (3, K, 1), (3, N), f"the residual must be [3,{N},1], it is [3,{N}]"),
        (RESIDUAL, (3, K), (3, N + 1), f"the residual must be [3,{N}], it is [3,{N + 1}]"),
        (RESIDUAL, (3, K), (1, N), f"the residual must be [3,{N}], it is [1,{N}]"),
        (RESIDUAL, (2, 3, K), (6, N), f"the residual must be [2,3,{N}], it is [6,{N}]"),
    ],
)
@in_child
def test_inputs_are_checked(op: GpuOp, dims: tuple[int, ...], residual: tuple[int, ...] | None, words: str) -> None:
    with Made(op) as made:
        with pytest.raises(Refused) as raised:
            made.run(call(dims, residual))
        assert words in str(raised.value)
        assert not driver().fake_launches()


@in_child
def test_sizes_that_32_bits_do_not_hold() -> None:
    def huge(*dims: int) -> Node:
        return Node(inputs=[Tensor(np.zeros(64, np.float16), dims)] * 2)

    with Made(ROWS) as made, Made(PLANES) as planes, Made(PIXEL) as pixel:
        for dims in ((1 << 27, K), (1 << 31, K), (1 << 40, 1 << 40, K)):
            with pytest.raises(Refused, match="is too large for 32-bit offsets"):
                made.run(huge(*dims))
        for dims in ((1 << 20, K, 1 << 20), (1 << 62, K, 4), (2, K, 1 << 33)):
            with pytest.raises(Refused, match="is too large for 32-bit offsets"):
                planes.run(huge(*dims))
        with pytest.raises(Refused, match="a batch of 65536 is too large, 65535 are possible"):
            planes.run(huge(65536, K, 1))
        with pytest.raises(Refused, match="is too large for 32-bit offsets"):
            pixel.run(huge(1 << 40, K, 1, 1))
    assert not driver().fake_launches()


# ---- shapes ----


@pytest.mark.parametrize(
    "op, dims, names, wanted, called",
    [
        (ROWS, (-1, -1, K), ("batch", "tokens", ""), (-1, -1, N), ("batch", "tokens", "")),
        (ROWS, (4, K), ("", ""), (4, N), ("", "")),
        (ROWS, (-1,), ("features",), (N,), ("",)),
        (PLANES, (-1, -1, 8, -1), ("batch", "c", "", "w"), (-1, N, 8, -1), ("batch", "", "", "w")),
        (PIXEL, (-1, K, 1, 1), ("batch", "", "", ""), (-1, N, 1, 1), ("batch", "", "", "")),
    ],
)
@in_child
def test_shapes_are_inferred(op: GpuOp, dims: Any, names: Any, wanted: Any, called: Any) -> None:
    (y,) = cuda(op).infer(Node({"n": N, "k": K}, [Tensor(None, dims, names=names)]))
    assert (y.dims, y.names, y.element) == (wanted, called, 10)


@in_child
def test_what_is_not_known_is_not_inferred() -> None:
    for attributes in ({}, {"n": "x"}, {"n": 0}):
        assert cuda(ROWS).infer(Node(attributes, [Tensor(None, (2, K), names=("", ""))])) == []
    assert cuda(ROWS).infer(Node({"n": N}, [Tensor(None)])) == []
    for op in (PLANES, PIXEL):
        assert cuda(op).infer(Node({"n": N}, [Tensor(None, (2, K), names=("", ""))])) == []
