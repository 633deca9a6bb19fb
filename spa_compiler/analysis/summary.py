"""Pins added up: what keeps parameters where they are, by operator type and reason."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from spa_compiler.analysis import schema
from spa_compiler.analysis.analyze import Analysis
from spa_compiler.analysis.numbering import Mask
from spa_compiler.analysis.terms import Indices


@dataclass(frozen=True)
class Reason:
    """One reason of one operator type.

    `axes`: how many axes it names. `params`: parameters that nothing can remove and that lie on these axes or on axes
    tied to them, each counted once; other reasons may hold the same ones. `example`: the axis that holds most.
    """

    op: str
    reason: str
    axes: int
    params: int
    example: str


def reasons(analysis: Analysis) -> list[Reason]:
    """All reasons, those that hold most first."""
    found: dict[tuple[str, str], list[schema.Pin]] = {}
    for pin in analysis.pins:
        found.setdefault((pin.op, pin.reason), []).append(pin)
    held = _Held(analysis)
    out = []
    for (op, reason), pins in found.items():
        largest = max(pins, key=lambda pin: pin.params)
        params = held.by(op, reason) if largest.params else 0
        out.append(Reason(op, reason, len(pins), params, f"{largest.tensor}[{largest.axis}]"))
    return sorted(out, key=lambda reason: -reason.params)


class _Held:
    """Parameters that nothing can remove: for each constant that has some, its axes as `(labels, which stay)`."""

    def __init__(self, analysis: Analysis) -> None:
        numbering = analysis.numbering
        self.labels = numbering.free.size
        self.stuck: list[list[tuple[Indices, Mask]]] = []
        for name in analysis.parameters:
            on = [numbering.on(axis) for axis in analysis.facts.axes[name]]
            stays = [_stays(labels, numbering.free) for labels in on]
            if all(own.any() for own in stays):
                self.stuck.append(list(zip(on, stays, strict=True)))
        self.pinned: dict[tuple[str, str], list[Indices]] = {}
        for pin, labels in zip(analysis.facts.pins, numbering.held, strict=True):
            if not pin.window:
                self.pinned.setdefault((pin.op, pin.reason), []).append(labels)

    def by(self, op: str, reason: str) -> int:
        """How many of them one reason holds."""
        ours = np.zeros(self.labels + 1, np.bool_)  # the last one answers for label -1
        for labels in self.pinned.get((op, reason), ()):
            ours[labels] = True
        total = 0
        for axes in self.stuck:
            others = [int((stays & ~ours[labels].any(0)).sum()) for labels, stays in axes]
            total += math.prod(int(stays.sum()) for _, stays in axes) - math.prod(others)
        return total


def _stays(labels: Indices, free: Mask) -> Mask:
    """Which indices no unit removes."""
    if not free.size:
        return np.ones(labels.shape[1], np.bool_)
    return np.asarray(~((labels >= 0) & free[labels]).any(0))
