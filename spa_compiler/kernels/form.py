"""What a form is: how a weight is stored, and with that by which kernels it is multiplied.

A form is a value: equal forms store alike. Every format file of this room has a class for its own; `forms.py` lists
them, and nobody outside asks a form more than what is written here.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


class Form(Protocol):
    """A hashable value; its `repr` names regions, so it says everything that generated code depends on.

    Attributes:
        rows: outputs whose sums are kept in registers together.
        chunk: outputs of one work item, a multiple of `rows`; None, and so below, until `pack` has decided.
        k_block: inputs of one call of a kernel.
    """

    @property
    def rows(self) -> int: ...

    @property
    def windowed(self) -> bool:
        """Whether its kernels read through the table of offsets of a window, too (`window.py`)."""

    @property
    def info(self) -> dict[str, int]:
        """What the C side must know beside the sizes: fields of `LinearInfo` in region.h."""

    def kernel(self, lanes: int, act: str, window: bool) -> str:
        """The name of its kernel for tiles of `lanes` tokens."""

    @property
    def chunk(self) -> int | None: ...

    @property
    def k_block(self) -> int | None: ...

    @property
    def name(self) -> str:
        """In reports and records: `block:4x1`, `unstructured`; with sizes that are not the usual ones."""

    @property
    def pattern(self) -> str:
        """The zeros that it takes, as `spa_compiler.patterns` spells them."""

    def stored(self, weight: F32) -> int:
        """Floats that `pack` would store of `weight` [n, k], without packing: what the time depends on."""

    def cut(self, chunk: int | None, k_block: int | None) -> Form:
        """The same form in other tiles; None: the usual size."""

    def pack(self, weight: F32) -> Packed:
        """`weight` [n, k], without a bias. Exact: nothing but zeros is left out."""


class Packed(Protocol):
    """A weight [n, k] in a form."""

    @property
    def n(self) -> int: ...

    @property
    def k(self) -> int: ...

    @property
    def form(self) -> Form:
        """With every size that the asked-for form left open."""

    @property
    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """By name, in the order in which a node takes them."""

    def with_bias(self, bias: F32 | None) -> Packed:
        """The same weight with `bias` [n]; None: zeros."""


def tiled(name: str, chunk: int | None, k_block: int | None) -> str:
    """The name of a form in a tile: `block:4x1 in 128x768`, `block:4x1 in x768`; by itself in the usual one."""
    return name if chunk is None and k_block is None else f"{name} in {chunk or ''}x{k_block or ''}"
