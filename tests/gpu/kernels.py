"""CUDA kernels on a GPU: what they compute, and how fast. Needs Python, numpy, an archive of `pack.py` and NVIDIA's driver.

    make cuda-kernels                                    build/cuda-kernels.zip, on any machine
    python tests/gpu/kernels.py build/cuda-kernels.zip   these two files are all that a machine with a GPU needs

Every case of the archive is launched and compared with numpy in float64. Then the bars are timed, in CUDA graphs, between
turns of cuBLAS: torch's where torch can be imported, else libcublas where the loader finds it, else there is no ratio.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import math
import statistics
import sys
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

VERSION = 1
"""Of the archive's manifest."""

SIZES = {"fp16": 2, "bf16": 2, "fp32": 4}
OWN = {"fp16": 2**-10.9, "bf16": 2**-7.9, "fp32": 2**-19}
"""What a result may be off by its own rounding, relative to itself."""
PRODUCTS = {"fp16": 2**-16, "bf16": 2**-16, "fp32": 2**-9.9}
"""And by that of its products and sums, relative to the sum of the products' sizes; fp32 is multiplied in TF32."""
STEEPEST = 1.2  # of the activations: gelu 1.13, silu 1.1
ABSOLUTE = 2**-19  # of approximations in an activation


# ---- numbers that are the same everywhere ----


def noise(seed: int, count: int) -> np.ndarray:
    """`count` uint64, by SplitMix64: the same on every machine and for every release of numpy."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed) * np.uint64(0x100000001)
        z *= np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def numbers(seed: int, shape: Sequence[int], levels: int = 2048) -> np.ndarray:
    """float32 between -1 and 1, none of them 0; 2048 levels are all that fp16 can tell apart, 128 are bf16's."""
    h = (noise(seed, math.prod(shape)) >> np.uint64(40)).astype(np.int64) % levels
    return ((2 * h + 1 - levels) / levels).astype(np.float32).reshape(shape)


def weight_of(recipe: dict[str, Any]) -> np.ndarray:
    """A weight [n, k] of which `density` of the blocks (block x block, or single numbers at 1) are not zero.

    `across`: the blocks' columns, where they are no squares. `two_of_four`: of every four numbers of a row, two at most are left."""
    n, k, block, seed = (recipe[name] for name in ("n", "k", "block", "seed"))
    across = recipe.get("across", block)
    rows, columns = -(-n // block), -(-k // across)
    order = np.argsort(noise(seed + 1, rows * columns), kind="stable")
    kept = np.zeros(rows * columns, bool)
    kept[order[: round(recipe["density"] * rows * columns)]] = True
    kept = kept.reshape(rows, columns).repeat(block, axis=0).repeat(across, axis=1)[:n, :k]
    if recipe.get("two_of_four"):
        fours = np.zeros((n, -(-k // 4) * 4), np.int8)
        fours[:, :k] = kept
        kept = kept & (fours.reshape(n, -1, 4).cumsum(axis=2).reshape(n, -1)[:, :k] <= 2)
    return numbers(seed, (n, k), recipe["levels"]) * kept


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """As a tensor of `dtype` is stored: float32, or uint16 that hold the bits."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "fp32":
        return values
    if dtype == "fp16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def from_bits(bits: np.ndarray, dtype: str) -> np.ndarray:
    """What `to_bits` made, as float32."""
    if dtype == "fp16":
        return bits.view(np.float16).astype(np.float32)
    return bits if dtype == "fp32" else (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def activate(y: np.ndarray, act: str, low: float, high: float) -> np.ndarray:
    """The activations by their textbook formulas."""
    with np.errstate(over="ignore"):
        sigmoid = 1.0 / (1.0 + np.exp(-y))
    formulas: dict[str, Callable[[], np.ndarray]] = {
        "none": lambda: y,
        "relu": lambda: np.maximum(y, 0.0),
        "clip": lambda: np.clip(y, low, high),
        "gelu_erf": lambda: 0.5 * y * (1.0 + _erf(y / math.sqrt(2.0))),
        "gelu_tanh": lambda: 0.5 * y * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * y**3))),
        "silu": lambda: y * sigmoid,
        "sigmoid": lambda: sigmoid,
        "hard_swish": lambda: y * np.clip(y / 6.0 + 0.5, 0.0, 1.0),
        "hard_sigmoid": lambda: np.clip(low * y + high, 0.0, 1.0),
        "leaky_relu": lambda: np.maximum(y, low * y),
    }
    return formulas[act]()


def worst(
    got: np.ndarray,
    factors: Sequence[np.ndarray],
    x: np.ndarray,
    bias: np.ndarray,
    residual: np.ndarray | None,
    case: dict[str, Any],
) -> float:
    """The largest error, as a part of what is allowed: above 1, or NaN, is wrong.

    `factors` are the weight, or two of low rank, the first one that x meets first; what is between them is rounded."""
    planes, dtype = case["layout"] == "planes", case["dtype"]
    bias64 = bias.astype(np.float64)[:, None] if planes else bias.astype(np.float64)
    product = (lambda a, b: np.matmul(a, b)) if planes else (lambda a, b: np.matmul(b, a.T))
    y, sizes, off = x.astype(np.float64), abs(x.astype(np.float64)), 0.0
    for i, w in enumerate(factor.astype(np.float64) for factor in factors):
        if i:
            off = product(abs(w), (OWN[dtype] + PRODUCTS[dtype]) * abs(y))
        y, sizes = product(w, y), product(abs(w), sizes)
    y, sizes = y + bias64, sizes + abs(bias64)
    if residual is not None:
        y, sizes = y + residual, sizes + abs(residual)
    want = activate(y, case["act"], case["low"], case["high"])
    allowed = OWN[dtype] * abs(want) + STEEPEST * (PRODUCTS[dtype] * sizes + off) + ABSOLUTE
    part = abs(got - want) / allowed
    return float("nan") if np.isnan(part).any() else float(part.max())


# ---- the archive ----


class Archive:
    """A zip: manifest.json, images/*, and arrays/*, whose bytes of equal significance lie together to be packed better."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)
        self.manifest: dict[str, Any] = json.loads(self._zip.read("manifest.json"))
        if self.manifest["version"] != VERSION:
            raise SystemExit(f"{path} was packed for another version of kernels.py: make cuda-kernels writes it anew")

    def image(self, name: str) -> bytes:
        return self._zip.read(f"images/{name}")

    def array(self, spec: dict[str, Any], weight: np.ndarray | None = None) -> np.ndarray:
        """`stored`; or `values` of blocks, which are taken from the weight: `fragment` is the order of a block's numbers."""
        if "stored" in spec:
            about = self.manifest["arrays"][spec["stored"]]
            dtype = np.dtype(about["dtype"])
            planes = np.frombuffer(self._zip.read(f"arrays/{spec['stored']}"), np.uint8).reshape(dtype.itemsize, -1)
            array = np.ascontiguousarray(planes.T).view(dtype).reshape(about["shape"])
            return np.concatenate([array] * spec.get("repeat", 1)) if "repeat" in spec else array
        size = spec["block"]
        where = self.array(spec["coordinates"]).astype(np.int64)
        n, k = weight.shape
        cut = weight.reshape(n // size, size, k // size, size).transpose(0, 2, 1, 3)[where[:, 0], where[:, 1]]
        return to_bits(cut.reshape(len(where), -1)[:, self.array(spec["fragment"])], spec["dtype"])


# ---- the driver ----


class DriverError(RuntimeError):
    """A call of the driver that failed."""


class NoGpu(Exception):
    """There is nothing to run on; the text says what is missing and what to do."""


_P, _SIZE, _U = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
_POINTER = ctypes.c_uint64  # CUdeviceptr
_OUT = ctypes.POINTER
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (_U,),
    "cuDriverGetVersion": (_OUT(ctypes.c_int),),
    "cuDeviceGet": (_OUT(ctypes.c_int), ctypes.c_int),
    "cuDeviceGetName": (ctypes.c_char_p, ctypes.c_int, ctypes.c_int),
    "cuDeviceGetAttribute": (_OUT(ctypes.c_int), ctypes.c_int, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (_OUT(_P), ctypes.c_int),
    "cuCtxPushCurrent_v2": (_P,),
    "cuModuleLoadDataEx": (_OUT(_P), _P, _U, _P, _P),
    "cuModuleUnload": (_P,),
    "cuModuleGetFunction": (_OUT(_P), _P, ctypes.c_char_p),
    "cuFuncSetAttribute": (_P, ctypes.c_int, ctypes.c_int),
    "cuMemAlloc_v2": (_OUT(_POINTER), _SIZE),
    "cuMemFree_v2": (_POINTER,),
    "cuMemcpyHtoD_v2": (_POINTER, _P, _SIZE),
    "cuMemcpyDtoH_v2": (_P, _POINTER, _SIZE),
    "cuStreamCreate": (_OUT(_P), _U),
    "cuStreamSynchronize": (_P,),
    "cuStreamBeginCapture_v2": (_P, ctypes.c_int),
    "cuStreamEndCapture": (_P, _OUT(_P)),
    "cuGraphInstantiateWithFlags": (_OUT(_P), _P, ctypes.c_ulonglong),
    "cuGraphLaunch": (_P, _P),
    "cuGraphExecDestroy": (_P,),
    "cuGraphDestroy": (_P,),
    "cuEventCreate": (_OUT(_P), _U),
    "cuEventRecord": (_P, _P),
    "cuEventSynchronize": (_P,),
    "cuEventElapsedTime": (_OUT(ctypes.c_float), _P, _P),
    "cuLaunchKernel": (_P, *[_U] * 7, _P, _P, _P),
}
"""Arguments as cuda.h has them; every one returns a CUresult."""

_MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute
_L2_BYTES, _MAJOR, _MINOR = 38, 75, 76  # CUdevice_attribute
_NON_BLOCKING, _RELAXED = 1, 2  # CUstream_flags, CUstreamCaptureMode


class Gpu:
    """One GPU through libcuda, in the primary context, which torch uses, too; one stream."""

    def __init__(self, library: str = "libcuda.so.1", index: int = 0) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise NoGpu(f"NVIDIA's driver is not here ({error}); run this where nvidia-smi shows a GPU") from None
        for name, arguments in SIGNATURES.items():
            try:
                function = getattr(self._library, name)
            except AttributeError:
                raise NoGpu(f"the driver has no {name}: it is older than CUDA 11.4; install a newer one") from None
            function.argtypes, function.restype = list(arguments), ctypes.c_int
        status = self._library.cuInit(0)
        if status:
            raise NoGpu(f"cuInit returned {status}: there is no GPU, or it is not passed in; nvidia-smi says more")
        device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        self._call("cuDeviceGet", ctypes.byref(device), index)
        self._call("cuDeviceGetName", name, len(name), device)
        self.name = name.value.decode()
        self.capability = 10 * self._attribute(device, _MAJOR) + self._attribute(device, _MINOR)
        self.l2_bytes = self._attribute(device, _L2_BYTES)
        context = self._out("cuDevicePrimaryCtxRetain", device)
        self._call("cuCtxPushCurrent_v2", context)
        self.stream = self._out("cuStreamCreate", _NON_BLOCKING)
        self._events = self._out("cuEventCreate", 0), self._out("cuEventCreate", 0)
        self._functions: dict[str, Any] = {}

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise DriverError(f"{name} returned {status}")

    def _out(self, name: str, *arguments: Any) -> Any:
        """The handle that a call gives in its first argument."""
        handle = ctypes.c_void_p()
        self._call(name, ctypes.byref(handle), *arguments)
        return handle

    def _attribute(self, device: Any, number: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), number, device)
        return value.value

    def upload(self, array: np.ndarray) -> int:
        """A copy in the GPU's memory, which is there for any stream.

        From memory that is not pinned cuMemcpyHtoD returns once it has staged the data: the way to the GPU may not have
        ended (driver API, "API synchronization behavior"). It goes on in the default stream, for which one that does not
        block, as `self.stream`, never waits.
        """
        array = np.ascontiguousarray(array)
        pointer = _POINTER()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), max(16, -(-array.nbytes // 16) * 16))
        if array.nbytes:
            self._call("cuMemcpyHtoD_v2", pointer, array.ctypes.data, array.nbytes)
            self._call("cuStreamSynchronize", None)
        return pointer.value

    def free(self, pointer: int) -> None:
        self._call("cuMemFree_v2", pointer)

    def download(self, pointer: int, like: np.ndarray) -> np.ndarray:
        self.synchronize()
        array = np.empty_like(like)
        self._call("cuMemcpyDtoH_v2", array.ctypes.data, pointer, array.nbytes)
        return array

    def synchronize(self) -> None:
        self._call("cuStreamSynchronize", self.stream)

    def load(self, name: str, image: bytes, shared_bytes: int) -> Any:
        """The kernel `name`; it stays loaded."""
        if name not in self._functions:
            module = self._out("cuModuleLoadDataEx", image + b"\0", 0, None, None)
            function = self._out("cuModuleGetFunction", module, name.encode())
            if shared_bytes > 48 << 10:
                self._call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared_bytes)
            self._functions[name] = function
        return self._functions[name]

    def launch(
        self,
        function: Any,
        grid: Sequence[int],
        threads: int,
        shared_bytes: int,
        pointers: Sequence[int],
        numbers: Sequence[int],
        bounds: Sequence[float],
    ) -> None:
        """On the stream; nothing waits for it."""
        values: list[Any] = [_POINTER(p) for p in pointers]
        values += [ctypes.c_int32(v) for v in numbers] + [ctypes.c_float(v) for v in bounds]
        arguments = (_P * len(values))(*(ctypes.addressof(v) for v in values))
        self._call("cuLaunchKernel", function, *grid, threads, 1, 1, shared_bytes, self.stream, arguments, None)

    def record(self, launches: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph of what `launches` puts on the stream; calling it launches the graph."""
        self._call("cuStreamBeginCapture_v2", self.stream, _RELAXED)
        graph = ctypes.c_void_p()
        try:
            launches()
        finally:
            self._call("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        executable = self._out("cuGraphInstantiateWithFlags", graph, 0)
        self._call("cuGraphDestroy", graph)
        return lambda: self._call("cuGraphLaunch", executable, self.stream)

    def microseconds(self, run: Callable[[], None]) -> float:
        """From the first to the last of what `run` puts on the stream."""
        first, last = self._events
        self._call("cuEventRecord", first, self.stream)
        run()
        self._call("cuEventRecord", last, self.stream)
        self._call("cuEventSynchronize", last)
        elapsed = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(elapsed), first, last)
        return elapsed.value * 1e3


# ---- parity ----


class Runner:
    """The kernels of an archive on a GPU."""

    def __init__(self, archive: Archive, gpu: Gpu) -> None:
        self.archive, self.gpu, self.manifest = archive, gpu, archive.manifest
        self._vetted: dict[str, str] = {}

    def image_of(self, name: str) -> str | None:
        """The cubin of the GPU's own major version that is nearest below its own, else the PTX of the newest; None: no one runs here."""
        images = self.manifest["kernels"][name]["images"]
        mine = self.gpu.capability
        cubins = [i for i in images if not i["ptx"] and i["capability"] // 10 == mine // 10 and i["capability"] <= mine]
        ptx = [i for i in images if i["ptx"] and i["capability"] <= mine]
        chosen = max(cubins or ptx, key=lambda i: i["capability"], default=None)
        return chosen and chosen["image"]

    def launch(
        self, name: str, pointers: Sequence[int], n: int, k: int, tokens: int, batch: int, low: float, high: float
    ) -> None:
        about = self.manifest["kernels"][name]
        function = self.gpu.load(name, self.archive.image(self.image_of(name)), about["shared_bytes"])
        grid = -(-tokens // about["tile_tokens"]), -(-n // about["tile_rows"]), batch
        self.gpu.launch(
            function, grid, about["threads"], about["shared_bytes"], pointers, (n, k, tokens, batch), (low, high)
        )

    def check(self, case: dict[str, Any], seed: int) -> float:
        """Launches a case; its largest error, as a part of what is allowed."""
        n, k, tokens, batch, dtype = (case[name] for name in ("n", "k", "tokens", "batch", "dtype"))
        rows = case["layout"] == "rows"
        shapes = [(tokens, k), (tokens, n)] if rows else [(batch, k, tokens), (batch, n, tokens)]
        hows = case["weight"] if isinstance(case["weight"], list) else [case["weight"]]
        factors = [self.archive.array(how) if "stored" in how else weight_of(how) for how in hows]
        x, bias = numbers(seed, shapes[0], 128), numbers(seed + 2, (n,))
        residual = numbers(seed + 3, shapes[1], 128) if case["residual"] else None
        y = to_bits(np.full(shapes[1], np.nan, np.float32), dtype)
        inputs = [self.archive.array(spec, factors[-1]) for spec in case["arrays"]] + [to_bits(x, dtype), bias]
        pointers = [self.gpu.upload(array) for array in inputs]
        owned = list(pointers)
        pointers.append(0 if residual is None else self.gpu.upload(to_bits(residual, dtype)))
        pointers.append(self.gpu.upload(y))
        owned += [p for p in pointers[len(owned) :] if p]
        self.launch(case["kernel"], pointers, n, k, tokens, batch, case["low"], case["high"])
        got = from_bits(self.gpu.download(pointers[-1], y), dtype)
        for pointer in owned:
            self.gpu.free(pointer)
        return worst(got, factors, x, bias, residual, case)

    def parity(self, show: Callable[[str], None]) -> list[dict[str, Any]]:
        """Every case; a line for each that is wrong, and one for each form and dtype."""
        results = []
        for index, case in enumerate(self.manifest["cases"]):
            said = {key: case[key] for key in ("form", "kernel", "dtype", "layout", "n", "k", "tokens", "batch")}
            if self.image_of(case["kernel"]) is None:
                results.append(said | {"status": "not for this GPU"})
                continue
            part = self.check(case, 10 * index)
            results.append(said | {"status": "ok" if part <= 1 else "WRONG", "error": part})
            if not part <= 1:
                show(
                    f"WRONG: {case['kernel']} at {case['n']} x {case['k']}, {case['tokens']} tokens: {part:.3g} of what is allowed"
                )
        for form, dtype in sorted({(r["form"], r["dtype"]) for r in results}):
            own = [r for r in results if (r["form"], r["dtype"]) == (form, dtype)]
            right = sum(r["status"] == "ok" for r in own)
            largest = max((r["error"] for r in own if "error" in r), default=0.0)
            left = sum("error" not in r for r in own)
            show(
                f"{form:34} {dtype:5} {right:3} of {len(own) - left:3} right, error up to {largest:.2f} of what is allowed"
                + (f"; {left} not for this GPU" if left else "")
            )
        return results

    # ---- bars ----

    def bar(self, bar: dict[str, Any], dense: Dense | None, rounds: int) -> dict[str, Any]:
        """Times of all layers: every candidate first, then the best of each between turns of cuBLAS."""
        layers = [self._layer(layer, bar["tokens"], dense, rounds) for layer in bar["layers"]]
        total = sum(layer["us"] * layer["count"] for layer in layers)
        result = {"bar": bar["name"], "wants": bar["wants"], "us": total, "layers": layers}
        if dense:
            result["dense_us"] = sum(layer["dense_us"] * layer["count"] for layer in layers)
            result["ratio"] = result["dense_us"] / total
            result["met"] = result["ratio"] >= bar["wants"]
        return result

    def _layer(self, layer: dict[str, Any], tokens: int, dense: Dense | None, rounds: int) -> dict[str, Any]:
        n, k = layer["n"], layer["k"]
        weight = weight_of(layer["weight"]) if "weight" in layer else None
        x = self.gpu.upload(to_bits(numbers(7, (tokens, k)), "fp16"))
        bias = self.gpu.upload(np.zeros(n, np.float32))
        y = self.gpu.upload(np.zeros((tokens, n), np.uint16))
        timed, owned = [], [x, bias, y]
        for candidate in layer["candidates"]:
            if self.image_of(candidate["kernel"]) is None:
                continue
            arrays = [self.archive.array(spec, weight) for spec in candidate["arrays"]]
            size = sum(array.nbytes for array in arrays)
            copies = [[self.gpu.upload(array) for array in arrays] for _ in range(self._copies(size, layer))]
            owned += [pointer for copy in copies for pointer in copy]

            def run(copies: list[list[int]] = copies, name: str = candidate["kernel"]) -> None:
                for copy in copies * -(-_LAUNCHES // len(copies)):
                    self.launch(name, [*copy, x, bias, 0, y], n, k, tokens, 1, 0.0, 0.0)

            run()  # loads the kernel, which no graph may record
            got = self.gpu.download(y, np.zeros((tokens, n), np.uint16)) if "check" in layer else None
            if got is not None:
                self._vet(layer, candidate, weight, from_bits(got, "fp16"), tokens)
            graph, launches = self.gpu.record(run), len(copies) * -(-_LAUNCHES // len(copies))
            graph()
            quick = min(self.gpu.microseconds(graph) / launches for _ in range(3))
            timed.append((quick, candidate["kernel"], candidate["form"], graph, launches, size))
        if not timed:
            raise DriverError(f"the archive has no kernel for a GPU of capability {self.gpu.capability}")
        _, name, form, graph, launches, size = min(timed, key=lambda t: t[0])
        turns = [(graph, launches)]
        if dense:
            turns.append(dense.graph(n, k, tokens, self._copies(2 * n * k, layer)))
        times: list[list[float]] = [[] for _ in turns]
        for _ in range(rounds):
            for own, (turn, count) in zip(times, turns, strict=True):
                turn()  # what is in the cache is its own
                own.append(self.gpu.microseconds(turn) / count)
        for pointer in owned:
            self.gpu.free(pointer)
        median = [statistics.median(own) for own in times]
        useful = 2.0 * layer["nonzeros"] * tokens
        moved = size + 2.0 * tokens * (n + k)
        result = {"n": n, "k": k, "count": layer["count"], "us": median[0], "kernel": name, "form": form}
        result |= {"tflops": useful / median[0] / 1e6, "gb_s": moved / median[0] / 1e3}
        result["tried"] = {one[1]: round(one[0], 3) for one in sorted(timed, key=lambda t: t[0])}
        return result | ({"dense_us": median[1]} if dense else {})

    def _copies(self, size: int, layer: dict[str, Any]) -> int:
        """Of a weight, so that a turn reads twice what L2 holds."""
        return max(2, min(256, -(-2 * self.gpu.l2_bytes // size))) if layer["rotate"] else 1

    def _vet(
        self, layer: dict[str, Any], candidate: dict[str, Any], weight: np.ndarray | None, got: np.ndarray, tokens: int
    ) -> None:
        """A bar that is met by wrong numbers is none: some tokens and outputs are compared."""
        check = layer["check"]
        known = self.archive.array(check) if check else weight[:: max(1, layer["n"] // 256)]
        rows = np.arange(len(known)) if check else np.arange(0, layer["n"], max(1, layer["n"] // 256))
        some = np.unique(np.linspace(0, tokens - 1, min(tokens, 64)).astype(int))
        case = {"layout": "rows", "dtype": "fp16", "act": "none", "low": 0.0, "high": 0.0}
        x = numbers(7, (tokens, layer["k"]))
        part = worst(got[np.ix_(some, rows)], [known], x[some], np.zeros(len(rows)), None, case)
        if not part <= 1:
            raise DriverError(
                f"{candidate['kernel']} computes what is wrong at {layer['n']} x {layer['k']}: {part:.3g} of what is allowed"
            )


_LAUNCHES = 20  # at least, in a graph


class Dense(Protocol):
    """cuBLAS, in CUDA graphs, fp16 with float32 sums."""

    name: str

    def graph(self, n: int, k: int, tokens: int, copies: int) -> tuple[Callable[[], None], int]:
        """What launches a graph of y = x W^T, W [n, k] rotated through `copies`; how many products that are."""


class Torch:
    """torch's cuBLAS."""

    def __init__(self, torch: Any, gpu: Gpu) -> None:
        self._torch = torch
        self._stream = torch.cuda.ExternalStream(gpu.stream.value)
        self.name = f"cuBLAS of torch {torch.__version__}"

    def graph(self, n: int, k: int, tokens: int, copies: int) -> tuple[Callable[[], None], int]:
        torch = self._torch
        with torch.cuda.stream(self._stream), torch.no_grad():
            weights = [torch.randn(n, k, dtype=torch.float16, device="cuda") for _ in range(copies)]
            x = torch.randn(tokens, k, dtype=torch.float16, device="cuda")
            y = torch.empty(tokens, n, dtype=torch.float16, device="cuda")
            turn = weights * -(-_LAUNCHES // copies)
            for weight in turn:
                torch.mm(x, weight.t(), out=y)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                for weight in turn:
                    torch.mm(x, weight.t(), out=y)

        def replay(_kept: Any = (weights, x, y)) -> None:
            with torch.cuda.stream(self._stream):
                graph.replay()

        return replay, len(turn)


class Cublas:
    """libcublas by ctypes."""

    def __init__(self, library: ctypes.CDLL, gpu: Gpu) -> None:
        self._library, self._gpu = library, gpu
        self._handle = ctypes.c_void_p()
        self._call("cublasCreate_v2", ctypes.byref(self._handle))
        self._call("cublasSetStream_v2", self._handle, gpu.stream)
        version = ctypes.c_int()
        self._call("cublasGetVersion_v2", self._handle, ctypes.byref(version))
        self.name = f"cuBLAS {version.value}"

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise DriverError(f"{name} returned {status}")

    def graph(self, n: int, k: int, tokens: int, copies: int) -> tuple[Callable[[], None], int]:
        weights = [self._gpu.upload(to_bits(numbers(i, (n, k)), "fp16")) for i in range(min(copies, 2))]
        weights += [self._gpu.upload(to_bits(numbers(0, (n, k)), "fp16")) for _ in range(copies - len(weights))]
        x = self._gpu.upload(to_bits(numbers(9, (tokens, k)), "fp16"))
        y = self._gpu.upload(np.zeros((tokens, n), np.uint16))
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        i32, turn = ctypes.c_int, weights * -(-_LAUNCHES // copies)
        half, sums, transposed, plain, default = i32(2), i32(68), i32(1), i32(0), i32(-1)

        def run() -> None:
            for weight in turn:  # column by column: y^T [n, tokens] = W x^T
                self._call(
                    "cublasGemmEx", self._handle, transposed, plain, i32(n), i32(tokens), i32(k), ctypes.byref(one),
                    _P(weight), half, i32(k), _P(x), half, i32(k), ctypes.byref(zero), _P(y), half, i32(n), sums, default,
                )  # fmt: skip

        run()
        self._gpu.synchronize()
        return self._gpu.record(run), len(turn)


def find_dense(gpu: Gpu, show: Callable[[str], None]) -> Dense | None:
    """torch's cuBLAS, else the loader's, else None."""
    with suppress(ImportError):
        torch = importlib.import_module("torch")
        if torch.cuda.is_available():
            torch.cuda.init()
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
            return Torch(torch, gpu)
    for name in ("libcublas.so.13", "libcublas.so.12", "libcublas.so.11"):
        with suppress(OSError):
            return Cublas(ctypes.CDLL(name), gpu)
    show("There is neither torch with CUDA nor libcublas here: times are printed without a ratio. pip install torch")
    return None


def show_bar(result: dict[str, Any], show: Callable[[str], None]) -> None:
    """A line for the bar, one for each of its layers."""
    said = f"{result['us']:9.1f} us"
    if "ratio" in result:
        met = "met" if result["met"] else "MISSED"
        said += f"   dense {result['dense_us']:9.1f} us   {result['ratio']:.2f}x of {result['wants']}x wanted: {met}"
    show(f"{result['bar']:52} {said}")
    for layer in result["layers"]:
        dense = f", dense {layer['dense_us']:.1f} us" if "dense_us" in layer else ""
        show(
            f"    {layer['count']:2} x {layer['n']} x {layer['k']}: {layer['us']:.1f} us{dense}; {layer['tflops']:.1f} useful TFLOP/s, "
            f"{layer['gb_s']:.0f} GB/s; {layer['kernel']}, best of {len(layer['tried'])}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """See the file's docstring; the exit status is in --help."""
    parser = argparse.ArgumentParser(
        description="Checks and times the CUDA kernels of an archive of `make cuda-kernels`.",
        epilog="Exit status: 0 where all is right, also where there is no GPU (a line that begins with SKIPPED says so) and where "
        "a bar is missed (the table says so); 1 where a result is wrong or a call of the driver fails; 3 with --strict, where "
        "there is no GPU or a bar is missed.",
    )
    parser.add_argument("archive", nargs="?", type=Path, default=Path("build/cuda-kernels.zip"))
    parser.add_argument("--driver", default="libcuda.so.1", help="the driver's library (default: %(default)s)")
    parser.add_argument("--device", type=int, default=0, help="number of the GPU (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="turns of every timed graph (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="writes all numbers there")
    parser.add_argument("--only", choices=("parity", "bars"), help="half of it")
    parser.add_argument("--strict", action="store_true", help="no GPU and missed bars are failures")
    options = parser.parse_args(arguments)
    try:
        gpu = Gpu(options.driver, options.device)
    except NoGpu as error:
        print(f"SKIPPED: no CUDA kernel was run. {error}", file=sys.stderr, flush=True)
        return 3 if options.strict else 0
    archive = Archive(options.archive)
    runner = Runner(archive, gpu)
    report: dict[str, Any] = {"gpu": gpu.name, "capability": gpu.capability, "compiler": archive.manifest["compiler"]}
    print(
        f"{gpu.name}, compute capability {gpu.capability / 10}; compiled by {archive.manifest['compiler']}\n",
        flush=True,
    )
    show = lambda line: print(line, flush=True)  # noqa: E731
    failed = missed = False
    if options.only != "bars":
        report["parity"] = runner.parity(show)
        failed = any(result["status"] == "WRONG" for result in report["parity"])
    if options.only != "parity" and archive.manifest["bars"]:
        dense = find_dense(gpu, show)
        report |= {"dense": dense and dense.name, "bars": []}
        show(
            f"\nIn CUDA graphs, medians of {options.rounds} turns{f', between turns of {dense.name}' if dense else ''}:"
        )
        for bar in archive.manifest["bars"]:
            try:
                report["bars"].append(runner.bar(bar, dense, options.rounds))
            except DriverError as error:
                failed = True
                show(f"FAILED: {bar['name']}: {error}")
                continue
            show_bar(report["bars"][-1], show)
        missed = any(not bar.get("met", True) for bar in report["bars"])
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    return 1 if failed else 3 if missed and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
