"""What the rules state about a graph: axes of tensors, Pins, Patches, Constraints and Works.

Rules only ever add facts; `groups` draws the conclusions. Tensors are named as in the source file, nodes by their first
output, which, unlike a node's name, is always there and unique.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import onnx_graphsurgeon as gs

from spa_compiler.analysis.axes import Axes, Axis, Dim, Link

__all__ = ["Axis", "Constraint", "Dim", "Facts", "Link", "Patch", "Pin", "Rule", "Work"]


@dataclass(frozen=True, eq=False)
class Pin:
    """`axis` of `tensor` must stay, because `op` says so for `reason`.

    Args:
        op: operator type, or "graph input", "graph output".
        on: the axes that stay: the tensor's own, and what it was to be joined with where that failed.
        indices: the positions on the axis that stay; None: all of them.
        window: the axis is one of positions (pixels, kernel taps), not of channels; it holds no parameters by itself.
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
    """Attribute `attribute` of the node that makes `node` is the number of indices that `axis` keeps."""

    node: str
    attribute: str
    axis: Axis


@dataclass(frozen=True, eq=False)
class Constraint:
    """What a choice of units has to respect besides their being whole.

    `equal_count`: each axis of `axes` keeps the same number; `same_set`: the same indices; `multiple_of` and
    `min_keep`: each axis keeps a multiple of, or at least, `value`.
    """

    kind: Literal["equal_count", "same_set", "multiple_of", "min_keep"]
    axes: tuple[Axis, ...]
    value: int = 1


@dataclass(frozen=True, eq=False)
class Work:
    """The multiply-accumulates of the node that makes `node`: `times` x the product of the sizes of `axes`.

    `times` is None where it hangs on sizes that the file does not state.
    """

    node: str
    axes: tuple[Axis, ...]
    times: int | None


@dataclass
class Facts:
    """All facts about one graph, by tensor name."""

    algebra: Axes = field(default_factory=Axes)
    axes: dict[str, tuple[Axis, ...]] = field(default_factory=dict)
    pins: list[Pin] = field(default_factory=list)
    patches: list[Patch] = field(default_factory=list)
    constraints: list[Constraint] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)

    def of(self, tensor: Any) -> tuple[Axis, ...] | None:
        """The axes of a graphsurgeon tensor: as stated, else fresh ones of its shape; None if its rank is unknown."""
        if tensor.name not in self.axes:
            if tensor.shape is None:
                return None
            sizes = (size if isinstance(size, int) and size > 0 else None for size in tensor.shape)
            self.axes[tensor.name] = tuple(self.algebra.fresh(size) for size in sizes)
        return self.axes[tensor.name]

    def put(self, tensor: Any, axes: Sequence[Axis]) -> None:
        """States the axes of a node's output."""
        self.axes[tensor.name] = tuple(axes)

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
        which = None if indices is None else tuple(indices)
        own = self.axes[tensor.name][axis]
        self.pins.append(Pin(tensor.name, axis, op, reason, (own,), which, window))

    def pin_tensor(self, op: str, tensor: Any, reason: str) -> None:
        """Pins every axis of a tensor whose rank is known (of another one, nothing can be removed anyway)."""
        for axis in range(len(self.of(tensor) or ())):
            self.pin(op, tensor, axis, reason)


Rule: TypeAlias = Callable[[gs.Node, Facts], str | None]
"""States the facts of a node; or says why it cannot, and then every axis of the node is pinned for that reason."""
