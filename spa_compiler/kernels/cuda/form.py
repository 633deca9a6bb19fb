"""What a CUDA form is: how a weight is stored, by which kernels it is multiplied, how long that takes.

A site computes y = act(W x + b [+ residual]) with W [n, k]. What its activations look like in memory is a *layout*:

    rows      x [tokens, k], y and residual [tokens, n]                    MatMul, Gemm; batch is 1
    planes    x [batch, k, pixels], y and residual [batch, n, pixels]      1 x 1 convolutions, NCHW; `tokens` are pixels

A *dtype* is that of x, y, residual and the stored weight: `fp16`, `bf16`, `fp32`. Sums are float32. Kernels of fp32
multiply in TF32 where they use tensor cores, as ONNX Runtime's CUDA provider does by default.

Every kernel is called alike; sizes are run-time arguments, so one binary serves all layers:

    the packed arrays in the form's order, x, bias, residual, y,        pointers
    n, k, tokens, batch,                                                int32
    low, high                                                           float32, bounds of the activation

`bias` is float32 [n] and always there; `residual` is null where the epilogue has none. Pointers are multiples of 16,
n, k and tokens may be anything. Each of x, residual, y and the packed arrays has at most 2^31 - 1 elements in all.
There is no workspace, and order of rows, where a form changes it, is undone inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from spa_compiler.kernels import activation
from spa_compiler.kernels.cuda.arrays import Array
from spa_compiler.targets.cuda import Architecture

Dtype = Literal["fp16", "bf16", "fp32"]
Layout = Literal["rows", "planes"]
DTYPES: tuple[Dtype, ...] = ("fp16", "bf16", "fp32")
LAYOUTS: tuple[Layout, ...] = ("rows", "planes")

F32 = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]

LAUNCH_US = 2.0
"""From one kernel's start to the next one's in a CUDA graph or a full stream: what no kernel goes below."""


@dataclass(frozen=True)
class Epilogue:
    """What happens to a sum besides its bias. `act` is one of `activation.NAMES`; the residual comes before it."""

    act: str = "none"
    residual: bool = False

    def __post_init__(self) -> None:
        if self.act not in activation.NAMES:
            raise ValueError(f"there is no activation {self.act!r}")

    def __str__(self) -> str:
        """As part of a kernel's name."""
        return f"{self.act}{'_residual' if self.residual else ''}"


@dataclass(frozen=True)
class Kernel:
    """One variant: what it is called, how it is launched, and the script that it is made of."""

    name: str
    """A C identifier; it says everything that the code depends on."""
    make: Callable[[], Any] = field(compare=False, repr=False)
    """Parses the script: a `tvm.tirx.PrimFunc`, without types. Its name is set by `source.py`."""
    threads: int
    tile_rows: int
    """Outputs of one thread block."""
    tile_tokens: int
    shared_bytes: int
    """Of dynamic shared memory, the only kind; above 48 KB a launch must have asked for it."""
    min_blocks: int = 1
    """Thread blocks that shall fit a multiprocessor: what the compiler limits registers by. Shared memory may let
    fewer."""
    oldest: int = 80
    """Compute capability that it needs at least."""

    def grid(self, n: int, tokens: int, batch: int = 1) -> tuple[int, int, int]:
        """Thread blocks of a launch: tiles of tokens, of outputs, batch."""
        return -(-tokens // self.tile_tokens), -(-n // self.tile_rows), batch

    def fits(self, arch: Architecture) -> bool:
        """Whether GPUs of `arch` can launch it."""
        return (
            arch.capability >= self.oldest
            and self.shared_bytes <= arch.shared_per_block
            and self.threads * self.min_blocks <= arch.threads_per_sm
        )


class Form(Protocol):
    """A hashable value: how a weight is stored."""

    @property
    def name(self) -> str:
        """In reports and records: `block:32x32`, `unstructured`, `2:4`, `block:8x1`."""

    @property
    def arrays(self) -> Sequence[str]:
        """Names of what `pack` gives, in the order of a kernel's arguments."""

    def rules(self, dtype: Dtype) -> Sequence[Array]:
        """What `pack` gives for `dtype`, in this order: types, sizes, and what integers that kernels index with may be.

        The C side refuses arrays that break a rule (`arrays.py`), so a kernel may rely on all that is stated here, and
        must not rely on anything else.
        """

    @property
    def rather(self) -> Form | None:
        """A form that is better wherever it holds a weight: this one is not tried then."""

    def stored(self, weight: F32, dtype: Dtype) -> float:
        """Bytes that `pack` would store, as a share of those of the dense `weight` [n, k], but for what is the same for
        many of its elements: known before any of that work is done."""

    def pack(self, weight: F32, dtype: Dtype) -> Arrays:
        """`weight` [n, k] -> arrays of types that ONNX has; 16-bit numbers as uint16.

        Exact but for rounding to `dtype`: nothing but zeros is left out, and what is stored `holds` the weight.

        Raises:
            ValueError: the form cannot hold this weight.
        """

    def unpack(self, arrays: Arrays, n: int, k: int, dtype: Dtype) -> F32:
        """The weight [n, k] again, as kernels multiply with it: in numbers of `dtype`, or finer ones."""

    def kernels(
        self, arch: Architecture, dtype: Dtype, layout: Layout, epilogue: Epilogue, tokens: int
    ) -> list[Kernel]:
        """The variants worth trying at this many tokens (of one image), the most promising first; all fit `arch`.

        Empty: the form has none for this dtype, layout or number of tokens. All compute the same for any number of
        tokens.
        """

    def cost(
        self, arch: Architecture, kernel: Kernel, arrays: Arrays, n: int, k: int, tokens: int, batch: int = 1
    ) -> float:
        """Microseconds that a launch should take: the stated model that places without a GPU."""


def rounded(values: F32, dtype: Dtype) -> F32:
    """`values` as a tensor of `dtype` holds them; fp32 stays (`tf32` says what its products see)."""
    if dtype == "fp32":
        return np.asarray(values, np.float32)
    return np.asarray(values, np.float32).astype(_numpy(dtype)).astype(np.float32)


def to_bits(values: F32, dtype: Dtype) -> NDArray[Any]:
    """`values` as they are stored: float32, or uint16 that hold the bits."""
    if dtype == "fp32":
        return np.ascontiguousarray(values, np.float32)
    return np.ascontiguousarray(values, np.float32).astype(_numpy(dtype)).view(np.uint16)


def from_bits(bits: NDArray[Any], dtype: Dtype) -> F32:
    """What `to_bits` made, as float32."""
    return bits.astype(np.float32) if dtype == "fp32" else bits.view(_numpy(dtype)).astype(np.float32)


def holds(stored: F32, weight: F32, dtype: Dtype) -> bool:
    """Whether `stored` is `weight` to the precision of `dtype`.

    A number of `dtype` has to be what the weight is rounded to, and one that is finer no farther from the weight than
    rounding may be.
    """
    near = rounded(weight, dtype)
    same = stored == near
    if same.all() or dtype == "fp32":
        return bool(same.all())
    other, want, near = stored[~same], weight[~same], near[~same]
    finer = rounded(other, dtype) != other
    bits = to_bits(np.abs(near), dtype)
    unit = from_bits(bits + bits.dtype.type(1), dtype).astype(np.float64) - np.abs(near)
    return bool((finer & (np.abs(other.astype(np.float64) - want) <= unit / 2)).all())


def tf32(values: F32) -> F32:
    """`values` with ten bits of mantissa, ties away from zero: what tensor cores see of float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def reference(
    weight: F32,
    x: F32,
    bias: F32,
    residual: F32 | None,
    act: str = "none",
    low: float = 0.0,
    high: float = 0.0,
    *,
    layout: Layout = "rows",
) -> NDArray[np.float64]:
    """What every kernel computes, in float64: `weight` [n, k] as unpacked, `x` and `residual` in `layout`."""
    if layout == "rows":
        y = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
    else:
        y = np.einsum("nk,bkp->bnp", weight.astype(np.float64), x.astype(np.float64)) + bias[:, None]
    return activation.reference(y if residual is None else y + residual, act, low, high)


def _numpy(dtype: Dtype) -> Any:
    return np.float16 if dtype == "fp16" else ml_dtypes.bfloat16
