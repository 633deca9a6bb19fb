"""A region of convolutions as data: what its steps compute, which images they make, and where those lie in scratch.

`images.py` builds it, `generate.py` writes it down in C.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from spa_compiler.kernels.window import Window
from spa_compiler.runtime.region import LinearSpec

MAX_IMAGES = 1024  # of the C side: region.h
_BLOCK, _BUFFER, _REGISTER, _STEP = 8, 16 << 10, 16, 8  # of depthwise.c


@dataclass(frozen=True)
class DepthwiseSpec:
    """y = act(w * x + b), each channel by itself; `window.channels` is how many there are."""

    window: Window
    act: str = "none"
    low: float = 0.0
    high: float = 0.0

    def __post_init__(self) -> None:
        if not fits_buffer(self.window):
            raise ValueError(f"{self.window} sees more than the buffer of a depthwise step holds")


def fits_buffer(window: Window) -> bool:
    """Whether a block of rows of one register of outputs sees no more than depthwise.c has room for."""
    rows = (_BLOCK - 1) * window.stride[0] + (window.size[0] - 1) * window.dilation[0] + 2
    pitch = _REGISTER + (window.size[1] - 1) * window.dilation[1] // window.stride[1]
    return rows * window.stride[1] * -(-pitch // _STEP) * _STEP <= _BUFFER


@dataclass(frozen=True)
class CombineSpec:
    """act(a), act(a + b), act(a b) or, with one pixel of b for each channel, act(a b[0]): `kernels/combine.py`."""

    op: str
    act: str = "none"
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class ImageSpec:
    """What a step makes: `kind` is that of region.h.

    Attributes:
        source: the input's number, or the image that it is made of and that gives its size.
        window: that the size is seen through; None keeps it.
        slot: of scratch; below 0 it is output -1 - slot of the node, written in place.
        home: the image whose channels from `first` on it is; itself, where it is no part of another.
        grow: rows and columns that each of the source becomes.
    """

    channels: int
    kind: str
    source: int
    window: Window | None
    slot: int
    home: int
    first: int
    grow: tuple[int, int]


@dataclass(frozen=True)
class ImageRegion:
    """Everything about a region of convolutions but its weights. `lines` are the C calls, in order.

    Attributes:
        axes: of the windows; 0 where there are none, and images may have any number of axes.
        output_images: which images are the outputs.
    """

    axes: int
    input_features: tuple[int, ...]
    output_features: tuple[int, ...]
    output_images: tuple[int, ...]
    linears: tuple[LinearSpec, ...]
    depthwise: tuple[DepthwiseSpec, ...]
    largest: tuple[Window, ...]
    combines: tuple[CombineSpec, ...]
    images: tuple[ImageSpec, ...]
    slots: int
    chains: tuple[tuple[int, int], ...]  # the first and the last image of each
    lines: tuple[str, ...]

    @property
    def statements(self) -> list[str]:
        """The body of its function in C."""
        return list(self.lines)

    @property
    def op_type(self) -> str:
        """`Region_<hash>`: the name of the op in the domain ai.spa."""
        return f"Region_{hashlib.sha256(repr(self).encode()).hexdigest()[:10]}"
