"""The C side for GPUs without a GPU: a stand-in for ONNX Runtime's C API in Python, and one for NVIDIA's driver in C.

Tensors "on the GPU" are numpy arrays. The driver's stand-in takes the place of libcuda.so.1 in a process of its own
(`in_child`), so that nothing else of the test suite meets it: a library that is loaded under that name is what dlopen finds.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib
import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spa_compiler.kernels.cuda.arrays import Array, Below, Extent, Offsets, Permutation
from spa_compiler.kernels.cuda.form import Epilogue, Kernel
from spa_compiler.runtime import link
from spa_compiler.runtime.gpu import Code, GpuLibrary, GpuOp, Variant, kernels_of

FAKE_CUDA = Path(__file__).parent / "runtime" / "fake_cuda.c"
API_VERSION = 18
GPU, CPU = 1, 0  # OrtMemoryInfoDeviceType
ELEMENTS = {"float32": 1, "uint8": 2, "uint16": 4, "int32": 6, "float16": 10, "uint32": 12}
STREAM = 0xABC0


# ---- processes of their own ----


@functools.cache
def _child() -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    atexit.register(pool.shutdown, cancel_futures=True)
    return pool


def _run(module: str, name: str, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    return getattr(importlib.import_module(module), name).__wrapped__(*arguments, **keywords)


def in_child(test: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a test in the process that has the driver's stand-in; its arguments must be picklable."""

    @functools.wraps(test)
    def run(*arguments: Any, **keywords: Any) -> Any:
        if multiprocessing.parent_process() is not None or os.environ.get("SPA_TEST_IN_CHILD"):
            return test(*arguments, **keywords)
        return _child().submit(_run, test.__module__, test.__name__, arguments, keywords).result()

    return run


# ---- the driver ----


def build_driver(folder: Path, *flags: str, name: str = "libcuda.so.1") -> Path:
    """A driver from fake_cuda.c. A process that has loaded one finds it by its `name` from then on."""
    path = folder / name
    options = ["-O1", "-g", "-std=c11", "-D_GNU_SOURCE", "-fPIC", "-shared", f"-Wl,-soname,{name}"]
    link.run_linker([*options, *sanitizers(), *flags, str(FAKE_CUDA), "-ldl", "-o", str(path)])
    return path


def sanitizers() -> list[str]:
    """Flags that the slow tests add to everything that is compiled here."""
    return os.environ.get("SPA_TEST_SANITIZERS", "").split()


class Driver:
    """The stand-in of this process."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self._library.fake_log.restype = ctypes.c_char_p
        self._library.fake_calls.restype = ctypes.c_char_p
        self._library.fake_message.restype = ctypes.c_char_p
        self._library.fake_context.restype = ctypes.c_void_p
        self._buffers: tuple[Any, ...] = ()
        self.reset()

    def reset(self, major: int = 9, minor: int = 0, shared: int = 232448, threads: int = 1024) -> None:
        self._library.fake_reset(major, minor, shared, threads)

    def fail(self, function: str, code: int = 999) -> None:
        self._library.fake_fail(function.encode(), code)

    def emulate_on(self, buffers: Sequence[np.ndarray], seed: int) -> None:
        """All that kernels may touch from now on, and what decides what a GPU leaves open (tests/cuda_emulator)."""
        addresses = (ctypes.c_void_p * len(buffers))(*(b.ctypes.data for b in buffers))
        sizes = (ctypes.c_long * len(buffers))(*(b.nbytes for b in buffers))
        self._buffers = addresses, sizes  # the stand-in reads them in every launch
        self._library.fake_buffers(addresses, sizes, len(buffers), ctypes.c_uint64(seed))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def push(self, device: int) -> None:
        """Makes the context of a GPU this thread's."""
        assert self._library.cuCtxPushCurrent_v2(self._context(device)) == 0

    def pop(self) -> int:
        """Whose context it was."""
        popped = ctypes.c_void_p()
        assert self._library.cuCtxPopCurrent_v2(ctypes.byref(popped)) == 0
        return [self._context(d).value for d in (0, 1)].index(popped.value)

    def _context(self, device: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._library.fake_context(device))

    def log(self, word: str = "") -> list[str]:
        """Its lines with `word`."""
        return [line for line in self._library.fake_log().decode().splitlines() if word in line]

    def calls(self) -> dict[str, int]:
        """How often each function was called since the last reset or `fake_forget_calls`."""
        lines = self._library.fake_calls().decode().splitlines()
        return {name: int(count) for name, count in (line.split() for line in lines)}

    def launched(self) -> dict[str, Any]:
        """The last launch, taken apart."""
        words, numbers = self.log("cuLaunchKernel")[-1].split(":")
        _, name, _, gx, gy, gz, _, bx, _, _, _, shared, _, stream = words.split()
        values = numbers.split()
        return {
            "name": name,
            "grid": (int(gx), int(gy), int(gz)),
            "threads": int(bx),
            "shared": int(shared),
            "stream": int(stream, 16),
            "pointers": [int(v, 16) for v in values[:-6]],
            "sizes": [int(v) for v in values[-6:-2]],
            "bounds": [float(v) for v in values[-2:]],
        }

    def assert_clean(self) -> None:
        """Nothing is loaded, nothing was done that a driver refuses, every context is given back."""
        assert self.fake_modules() == 0, self.log()[-20:]
        assert self.fake_wrong() == 0, self.log()[-20:]
        assert self.fake_depth() == 0
        assert [self.fake_retained(d) for d in (0, 1)] == [0, 0]


@functools.cache
def driver() -> Driver:
    """This process's; loaded before any kernels.so asks for one."""
    folder = tempfile.mkdtemp(prefix="spa-fake-cuda-")
    return Driver(build_driver(Path(folder)))


# ---- ONNX Runtime ----


class Refused(Exception):
    """An OrtStatus; `code` is an OrtErrorCode."""

    @property
    def code(self) -> int:
        return int(self.args[0])

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass
class Tensor:
    """A value: an array, where it is said to be, and what kind of memory that is."""

    array: np.ndarray | None
    dims: tuple[int, ...] = ()
    device: int = 0
    kind: int = GPU
    constant: bool = False
    names: tuple[str, ...] = ()
    element: int = 0
    address: int | None = None

    @classmethod
    def of(cls, array: np.ndarray, constant: bool = False, **more: Any) -> Tensor:
        return cls(array, array.shape, constant=constant, **more)


@dataclass
class Node:
    """What a kernel is made of, or called with."""

    attributes: dict[str, Any] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    stream: int = STREAM
    allocate: Callable[[tuple[int, ...]], np.ndarray] = lambda dims: np.zeros(dims, np.float16)


_P, _S, _I, _L = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
_OUT = ctypes.POINTER


class Ort:
    """As much of OrtApi as the C side calls for a GPU. Handles are numbers of objects that this class keeps."""

    def __init__(self) -> None:
        self._objects: dict[int, Any] = {}
        self._next = itertools.count(0x1000)
        self._texts: dict[int, Any] = {}
        self._keep: list[Any] = []
        self.errors: list[Exception] = []
        self.live_statuses = 0
        self.live_infos = 0
        self.ops: list[int] = []
        self.config: dict[bytes, bytes] = {}
        self.table = (ctypes.c_void_p * 300)()
        for index, arguments, function in self._entries():
            kind = ctypes.CFUNCTYPE(_P, *arguments)
            callback = kind(self._guarded(function))
            self._keep.append(callback)
            self.table[index] = ctypes.cast(callback, ctypes.c_void_p).value
        get_api = ctypes.CFUNCTYPE(_P, ctypes.c_uint32)(
            lambda version: ctypes.addressof(self.table) if version <= API_VERSION else None
        )
        version = ctypes.CFUNCTYPE(ctypes.c_char_p)(lambda: b"1.31.1")
        self._keep += [get_api, version]
        self.base = (ctypes.c_void_p * 2)(
            ctypes.cast(get_api, ctypes.c_void_p).value, ctypes.cast(version, ctypes.c_void_p).value
        )

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A callback cannot raise through C: what it raises is kept for `raise_for`."""

        def guarded(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except Exception as error:
                self.errors.append(error)
                return None

        return guarded

    def handle(self, thing: Any) -> int:
        number = next(self._next)
        self._objects[number] = thing
        return number

    def _entries(self) -> list[tuple[int, tuple[Any, ...], Callable[..., Any]]]:
        p, out = _P, _OUT(_P)
        return [
            (0, (_I, ctypes.c_char_p), self._create_status),
            (26, (ctypes.c_char_p, out), lambda name, to: self._give(to, 0xD0)),
            (27, (p, p), lambda domain, op: self.ops.append(op)),
            (28, (p, p), lambda options, domain: None),
            (51, (p, out), lambda value, to: self._give(to, self._address(value))),
            (57, (out,), lambda to: self._give(to, self._info(Tensor(None)))),
            (58, (p, _I), lambda info, element: setattr(self._objects[info], "element", element)),
            (59, (p, _OUT(_L), _S), lambda info, dims, n: setattr(self._objects[info], "dims", tuple(dims[:n]))),
            (61, (p, _OUT(_S)), lambda info, to: self._give(to, len(self._objects[info].dims))),
            (62, (p, _OUT(_L), _S), self._get_dims),
            (63, (p, _OUT(ctypes.c_char_p), _S), self._get_names),
            (65, (p, out), lambda value, to: self._give(to, self._info(self._objects[value]))),
            (72, (p, _OUT(_I)), lambda value, to: self._give(to, self._objects[value].device)),
            (85, (p, ctypes.c_char_p, _OUT(ctypes.c_float)), self._attribute),
            (86, (p, ctypes.c_char_p, _OUT(_L)), self._attribute),
            (87, (p, ctypes.c_char_p, p, _OUT(_S)), self._text),
            (90, (p, _S, out), lambda context, i, to: self._give(to, self.handle(self._objects[context].inputs[i]))),
            (91, (p, _S, _OUT(_L), _S, out), self._get_output),
            (93, (p,), self._release_status),
            (99, (p,), self._release_info),
            (130, (p, ctypes.c_char_p, ctypes.c_char_p), lambda options, key, value: self.config.update({key: value})),
            (193, (p, out), lambda context, to: self._give(to, self._objects[context].stream)),
            (194, (p, out), lambda value, to: self._give(to, value)),
            (225, (p, _OUT(_I)), lambda value, to: self._give(to, self._objects[value].kind)),
            (249, (p, _S, _OUT(_I), out), self._constant),
            (268, (p, _S, out), lambda context, i, to: self._give(to, self.handle(self._objects[context].inputs[i]))),
            (269, (p, ctypes.c_char_p, out), self._infer_attribute),
            (270, (p, _S, p), lambda context, i, info: self._objects[context].outputs.append(self._objects[info])),
            (271, (p, _OUT(ctypes.c_char_p), _S), self._set_names),
            (272, (p, _I, _OUT(_L), _S, _OUT(_S)), self._read_attribute),
        ]

    @staticmethod
    def _give(to: Any, value: Any) -> None:
        to[0] = value

    def _address(self, value: int) -> int:
        tensor = self._objects[value]
        return tensor.array.ctypes.data if tensor.address is None else tensor.address

    def _info(self, tensor: Tensor) -> int:
        self.live_infos += 1
        return self.handle(tensor)

    def _create_status(self, code: int, message: bytes) -> int:
        self.live_statuses += 1
        return self.handle(Refused(code, message.decode()))

    def _release_status(self, status: int) -> None:
        self.live_statuses -= 1
        del self._objects[status]

    def _release_info(self, info: int) -> None:
        self.live_infos -= 1
        del self._objects[info]

    def _get_dims(self, info: int, to: Any, count: int) -> None:
        for i, size in enumerate(self._objects[info].dims[:count]):
            to[i] = size

    def _get_names(self, info: int, to: Any, count: int) -> None:
        tensor = self._objects[info]
        for i, name in enumerate(tensor.names[:count]):
            text = ctypes.create_string_buffer(name.encode())
            self._keep.append(text)
            to[i] = ctypes.cast(text, ctypes.c_char_p)

    def _set_names(self, info: int, names: Any, count: int) -> None:
        self._objects[info].names = tuple((names[i] or b"").decode() for i in range(count))

    def _attribute(self, info: int, name: bytes, to: Any) -> int | None:
        value = self._objects[info].attributes.get(name.decode())
        wanted = float if isinstance(to[0], float) else int
        if type(value) is not wanted:
            return self._create_status(1, b"no such attribute")
        to[0] = value
        return None

    def _text(self, info: int, name: bytes, to: int | None, size: Any) -> int | None:
        value = self._objects[info].attributes.get(name.decode())
        if not isinstance(value, str):
            return self._create_status(1, b"no such attribute")
        size[0] = len(value.encode()) + 1
        if to:
            ctypes.memmove(to, value.encode() + b"\0", size[0])
        return None

    def _get_output(self, context: int, index: int, dims: Any, rank: int, to: Any) -> None:
        node = self._objects[context]
        node.outputs = [Tensor.of(node.allocate(tuple(dims[:rank])))]
        to[0] = self.handle(node.outputs[0])

    def _constant(self, info: int, index: int, is_constant: Any, to: Any) -> None:
        tensor = self._objects[info].inputs[index]
        is_constant[0] = tensor.constant
        if tensor.constant:
            to[0] = self.handle(tensor)

    def _infer_attribute(self, context: int, name: bytes, to: Any) -> int | None:
        if name.decode() not in self._objects[context].attributes:
            return self._create_status(1, b"no such attribute")
        to[0] = self.handle(self._objects[context].attributes[name.decode()])
        return None

    def _read_attribute(self, attribute: int, kind: int, to: Any, size: int, got: Any) -> int | None:
        value = self._objects[attribute]
        if type(value) is not int or kind != 1 or size < 8:
            return self._create_status(1, b"another type")
        to[0], got[0] = value, 8
        return None

    def raise_for(self, status: int | None) -> None:
        if self.errors:
            raise AssertionError("the stand-in failed") from self.errors.pop()
        if status:
            error = self._objects[status]
            self._release_status(status)
            raise error


class _CustomOp(ctypes.Structure):
    """OrtCustomOp of version 18."""

    _fields_ = [
        ("version", ctypes.c_uint32),
        ("CreateKernel", _P),
        ("GetName", ctypes.CFUNCTYPE(ctypes.c_char_p, _P)),
        ("GetExecutionProviderType", ctypes.CFUNCTYPE(ctypes.c_char_p, _P)),
        ("GetInputType", ctypes.CFUNCTYPE(_I, _P, _S)),
        ("GetInputTypeCount", ctypes.CFUNCTYPE(_S, _P)),
        ("GetOutputType", ctypes.CFUNCTYPE(_I, _P, _S)),
        ("GetOutputTypeCount", ctypes.CFUNCTYPE(_S, _P)),
        ("KernelCompute", _P),
        ("KernelDestroy", ctypes.CFUNCTYPE(None, _P)),
        ("GetInputCharacteristic", ctypes.CFUNCTYPE(_I, _P, _S)),
        ("GetOutputCharacteristic", ctypes.CFUNCTYPE(_I, _P, _S)),
        ("GetInputMemoryType", ctypes.CFUNCTYPE(_I, _P, _S)),
        *[(f"variadic{i}", ctypes.CFUNCTYPE(_I, _P)) for i in range(4)],
        ("CreateKernelV2", ctypes.CFUNCTYPE(_P, _P, _P, _P, _OUT(_P))),
        ("KernelComputeV2", ctypes.CFUNCTYPE(_P, _P, _P)),
        ("InferOutputShape", ctypes.CFUNCTYPE(_P, _P, _P)),
        ("GetStartVersion", ctypes.CFUNCTYPE(_I, _P)),
        ("GetEndVersion", ctypes.CFUNCTYPE(_I, _P)),
        *[(f"alias{i}", _P) for i in range(4)],
    ]


class Operator:
    """One operator that a library has registered."""

    def __init__(self, ort: Ort, address: int) -> None:
        self.ort, self.address = ort, address
        self.table = _CustomOp.from_address(address)
        self.name = self.table.GetName(address).decode()
        self.provider = self.table.GetExecutionProviderType(address).decode()

    @property
    def input_types(self) -> list[int]:
        count = self.table.GetInputTypeCount(self.address)
        return [self.table.GetInputType(self.address, i) for i in range(count)]

    def create(self, node: Node) -> int:
        """A kernel.

        Raises:
            Refused: with what the library says.
        """
        kernel = ctypes.c_void_p(0x5A)
        status = self.table.CreateKernelV2(self.address, self.ort.table, self.ort.handle(node), ctypes.byref(kernel))
        assert bool(status) == (kernel.value is None)
        self.ort.raise_for(status)
        assert kernel.value is not None
        return kernel.value

    def compute(self, kernel: int, call: Node) -> np.ndarray:
        self.ort.raise_for(self.table.KernelComputeV2(kernel, self.ort.handle(call)))
        (y,) = call.outputs
        assert y.array is not None
        return y.array

    def destroy(self, kernel: int) -> None:
        self.table.KernelDestroy(kernel)

    def infer(self, node: Node) -> list[Tensor]:
        self.ort.raise_for(self.table.InferOutputShape(self.address, self.ort.handle(node)))
        return node.outputs


def register(path: Path) -> dict[tuple[str, str], Operator]:
    """Loads a library and lets it register its operators: (name, provider) -> operator."""
    ort = Ort()
    library = ctypes.CDLL(str(path))
    library.RegisterCustomOps.restype = ctypes.c_void_p
    library.RegisterCustomOps.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    ort.raise_for(library.RegisterCustomOps(0x77, ort.base))
    operators = [Operator(ort, address) for address in ort.ops]
    return {(operator.name, operator.provider): operator for operator in operators}


# ---- a form to test with ----

BLOCK = 4
RULES = (
    Array("offsets", "int32", (Extent(rows=BLOCK, plus=1),), Offsets(Extent(count="blocks"))),
    Array("columns", "uint16", (Extent(count="blocks"),), Below(Extent(columns=BLOCK))),
    Array("order", "int32", (Extent(rows=1),), Permutation(Extent(rows=1))),
    Array("words", "uint32", (Extent(count="blocks"), Extent(2)), Below(Extent(columns=1), shift=16, mask=0xFFFF)),
    Array("values", "uint16", (Extent(count="blocks"), Extent(BLOCK * BLOCK))),
)
N, K = 22, 30


def _no_script() -> Any:
    raise AssertionError("nothing compiles it")


def kernel(name: str, tile_tokens: int = 16, shared: int = 1024, threads: int = 128, tile_rows: int = 8) -> Kernel:
    return Kernel(name, _no_script, threads, tile_rows, tile_tokens, shared)


def operator(layout: Any = "rows", act: str = "none", residual: bool = False, kernels: Sequence[Any] = ()) -> GpuOp:
    """`kernels`: (most tokens, kernel)."""
    chosen = kernels or (
        (8, kernel("few", 8)),
        (64, kernel("some", 32, 99 << 10)),
        (None, kernel("many", 64, 200 << 10)),
    )
    variants = tuple(Variant(most, one) for most, one in chosen)
    return GpuOp("block:4x4", "fp16", layout, Epilogue(act, residual), RULES, variants)


def library_of(
    ops: Sequence[GpuOp], archs: Sequence[str] = ("sm_80", "sm_90"), ptx: str | None = "sm_90"
) -> GpuLibrary:
    """With images that are words: the architecture and the kernel's name."""
    codes = {
        name: [
            *(Code(arch, f"cubin {arch} {name}\0".encode()) for arch in archs),
            *([Code(ptx, f"ptx {ptx} {name}".encode(), ptx=True)] if ptx else []),
        ]
        for name in kernels_of(ops)
    }
    return GpuLibrary(tuple(ops), tuple(archs), codes)


def build(library: GpuLibrary, folder: Path) -> Path:
    path = folder / "kernels.so"
    flags, extra = link.FLAGS, sanitizers()
    link.FLAGS = (*(f for f in flags if f != "-s"), "-g", *extra) if extra else flags
    try:
        link.link([], ("x86-64",), path, library)
    finally:
        link.FLAGS = flags
    assert not extra or b"__ubsan" in path.read_bytes(), "nothing would be found"
    return path


def weights(n: int = N, k: int = K, blocks: int = 9, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays that fit RULES, with bias."""
    rng = np.random.default_rng(seed)
    offsets = np.sort(rng.integers(0, blocks + 1, -(-n // BLOCK) + 1)).astype(np.int32)
    offsets[0], offsets[-1] = 0, blocks
    columns = -(-k // BLOCK)
    return {
        "offsets": offsets,
        "columns": rng.integers(0, columns, blocks).astype(np.uint16),
        "order": rng.permutation(n).astype(np.int32),
        "words": ((rng.integers(0, k, (blocks, 2)) << 16) | rng.integers(0, 65536, (blocks, 2))).astype(np.uint32),
        "values": rng.integers(0, 65536, (blocks, BLOCK * BLOCK)).astype(np.uint16),
        "bias": rng.standard_normal(n).astype(np.float32),
    }


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy at an address that is a multiple of 64."""
    room = np.zeros(array.nbytes + 128, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def node(op: GpuOp, arrays: Mapping[str, np.ndarray] | None = None, **more: Any) -> Node:
    """The node of an operator; `more` replaces attributes, None takes one away."""
    attributes = {"site": "encoder/dense", "n": N, "k": K} | ({"low": -1.0, "high": 2.0} if op.bounded else {}) | more
    inputs = [Tensor(None)] * (2 if op.epilogue.residual else 1)
    inputs += [Tensor.of(aligned(a), constant=True) for a in (arrays or weights()).values()]
    return Node({name: value for name, value in attributes.items() if value is not None}, inputs)


def call(dims: Sequence[int], residual: Sequence[int] | None = None, **more: Any) -> Node:
    shapes = [dims] if residual is None else [dims, residual]
    return Node(inputs=[Tensor.of(aligned(np.ones(s, np.float16))) for s in shapes], **more)
