"""What the rules state about a graph: axes of tensors, Pins, Patches and Works.

Rules only ever add facts; `groups` draws the conclusions. Tensors are named as in the source file, nodes by their first
output, which, unlike a node's name, is always there and unique.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.analysis.axes import Axes, Link
from spa_compiler.analysis.terms import Axis, Dim
from spa_compiler.analysis.unify import Incompatible
from spa_compiler.graph.settle import Settled

if TYPE_CHECKING:
    from spa_compiler.analysis.cut import Cut

__all__ = ["Axis", "Dim", "Facts", "Incompatible", "Link", "Patch", "Pin", "Rule", "Work"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Pin:
    """`axis` of `tensor` must stay, because `op` says so for `reason`.

    Args:
        op: operator type, or "graph input", "graph output".
        on: the axes that stay: the tensor's own, and what it was to be joined with where that failed.
        indices: the positions on the axis that stay; None: all of them.
        window: the axis is one of positions (pixels, kernel taps) or of sizes, not of channels; it holds no parameters
            by itself.
    """

    tensor: str
    axis: int
    op: str
    reason: str
    on: tuple[Axis, ...]
    indices: tuple[int, ...] | None = None
    window: bool = False


@dataclass(frozen=True, eq=False)
class Patch:
    """What else changes in the node that makes `node` when axes shrink: `apply(node of the model being cut, cut)`.

    Constants with stated axes are sliced by then; see `cut.Cut` for what a patch may ask and do.
    """

    node: str
    apply: Callable[[gs.Node, Cut], None]


@dataclass(frozen=True, eq=False)
class Work:
    """The multiply-accumulates of the node that makes `node`: `times` x the product of the sizes of `axes`.

    `times` is None where it hangs on sizes that follow from values.
    """

    node: str
    axes: tuple[Axis, ...]
    times: int | None


@dataclass
class Facts:
    """All facts about one graph, by tensor name.

    Sizes are those that `settled` chose: an axis that the file leaves open has the size of the first binding, and
    `varies` says so.
    """

    settled: Settled = field(default_factory=Settled)
    opset: int = 0
    """Of the default domain."""
    algebra: Axes = field(default_factory=Axes)
    axes: dict[str, tuple[Axis, ...]] = field(default_factory=dict)
    pins: list[Pin] = field(default_factory=list)
    patches: list[Patch] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    silent: set[str] = field(default_factory=set)
    """Tensors that need no mask, as they are what a mask before them makes of them: the code of zero, say, is its zero
    point, which a mask of zeros would overwrite.
    """
    split: frozenset[str] = frozenset()
    """First outputs of Reshapes that split an axis although they start a permutation, see `rules.reshape`."""

    def of(self, tensor: Any) -> tuple[Axis, ...] | None:
        """The axes of a graphsurgeon tensor: as stated, else fresh ones of its shape; None if its rank is unknown."""
        if tensor.name not in self.axes:
            if tensor.shape is None:
                return None
            sizes = (size if isinstance(size, int) and size >= 0 else None for size in tensor.shape)
            self.put(tensor, [self.algebra.fresh(size) for size in sizes])
        return self.axes[tensor.name]

    def put(self, tensor: Any, axes: Sequence[Axis]) -> None:
        """States the axes of a node's output."""
        self.axes[tensor.name] = tuple(axes)
        for axis, size in zip(axes, self.settled.second.get(tensor.name, ()), strict=False):
            if size is not None:
                self.algebra.note_second(axis, size)

    def couple(self, node: gs.Node, tensor: Any, axis: int, other: Axis, reason: str = "") -> None:
        """Joins an axis of a tensor with another axis; where that is impossible, both are pinned.

        Args:
            reason: what the two are, for the pin.
        """
        own = self.axes[tensor.name][axis]
        if why := self.algebra.join(own, other):
            self.pins.append(Pin(tensor.name, axis, node.op, f"{reason}: {why}" if reason else why, (own, other)))

    def pin(
        self,
        op: str,
        tensor: Any,
        axis: int,
        reason: str,
        *,
        indices: Sequence[int] | None = None,
        window: bool = False,
    ) -> None:
        """Pins one axis, or some of its indices."""
        which = None if indices is None else tuple(int(index) for index in indices)
        own = self.axes[tensor.name][axis]
        self.pins.append(Pin(tensor.name, axis, op, reason, (own,), which, window))

    def pin_axis(
        self, op: str, tensor: Any, on: Axis, reason: str, axis: int = 0, indices: Sequence[int] | None = None
    ) -> None:
        """Pins an axis of the algebra, or some of its indices, that is a part of axis `axis` of the tensor."""
        which = None if indices is None else tuple(int(index) for index in indices)
        self.pins.append(Pin(tensor.name, axis, op, reason, (on,), which))

    def pin_tensor(self, op: str, tensor: Any, reason: str, *, window: bool = False) -> None:
        """Pins every axis of a tensor whose rank is known (of another one, nothing can be removed anyway)."""
        for axis in range(len(self.of(tensor) or ())):
            self.pin(op, tensor, axis, reason, window=window)

    def patch(self, node: gs.Node, apply: Callable[[gs.Node, Cut], None]) -> None:
        """Has `apply` called on the node of the model that is cut, after constants were sliced."""
        self.patches.append(Patch(node.outputs[0].name, apply))

    def work(self, node: gs.Node, axes: Sequence[Axis], times: int | None) -> None:
        """Counts multiply-accumulates."""
        self.works.append(Work(node.outputs[0].name, tuple(axes), times))

    def value(self, tensor: Any) -> Array | None:
        """The value of a small tensor that is the same for every input: a constant, or computed from such."""
        entries = self.settled.values.get(tensor.name)
        return None if entries is None or not entries.fixed.all() else entries.array

    def entries(self, tensor: Any) -> tuple[Array, Array] | None:
        """`(value in the first binding, entries that are the same in all)` of a small tensor that inputs' sizes fix."""
        found = self.settled.values.get(tensor.name)
        return None if found is None else (found.array, found.fixed)

    def varies(self, tensor: Any, axis: int) -> bool:
        """Whether the size of the axis depends on the inputs' sizes."""
        moving = self.settled.varies.get(tensor.name)
        return moving is not None and moving[axis]

    def is_mixed(self, tensor: Any, axis: int) -> bool:
        """Whether the size of the axis depends on the inputs' sizes, but not all of it does: heads merged with the
        batch. What its indices mean differs from run to run.
        """
        return self.varies(tensor, axis) and any(
            atom.second is None or atom.second == atom.size for atom in self.algebra.atoms(self.axes[tensor.name][axis])
        )

    def pin_uneven(self, op: str, tensor: Any, axes: Iterable[int]) -> None:
        """Pins those of the axes that keep another share of their size from run to run when they shrink: sums of
        channels and of what is merged with positions, say. What needs to know that share cannot do with them.
        """
        for axis in axes:
            if self.is_mixed(tensor, axis) and len(self.algebra.resolve(self.axes[tensor.name][axis])) > 1:
                self.pin(op, tensor, axis, "a sum whose size varies")


Rule: TypeAlias = Callable[[gs.Node, Facts], str | None]
"""States the facts of a node; or says why it cannot, and then every axis of the node is pinned for that reason."""
