"""Units by the slabs that something names: masks of a trainer, or what was removed from another form of the model.

A unit goes when every slab of it that is spoken of goes whole, and at least one is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from spa_compiler.analysis import Analysis, Group

Gone: TypeAlias = Mapping[tuple[str, int], NDArray[np.bool_]]
"""(tensor, axis) -> for each index whether it goes; what is not there is not spoken of."""


@dataclass(frozen=True)
class Matched:
    """`removed` units by group; `partly` counts units of which something goes that no removed unit explains."""

    removed: dict[int, np.ndarray[Any, np.dtype[np.int64]]]
    partly: int


def match(analysis: Analysis, gone: Gone) -> Matched:
    """The units that go."""
    removed: dict[int, np.ndarray[Any, np.dtype[np.int64]]] = {}
    for group in analysis.groups:
        hit, missed = _hits(group, gone)
        units = np.flatnonzero(hit & ~missed)
        if units.size:
            removed[group.id] = units
    explained = slabs(analysis, removed)
    rest = {key: mask & ~explained[key] for key, mask in gone.items() if _fits(explained.get(key), mask)}
    partly = sum(int(_hits(group, rest)[0].sum()) for group in analysis.groups)
    return Matched(removed, partly)


def slabs(analysis: Analysis, removed: Mapping[int, Sequence[int] | np.ndarray[Any, Any]]) -> Gone:
    """What the removal of units does to every axis that any group touches: the other direction of `match`."""
    out: dict[tuple[str, int], NDArray[np.bool_]] = {}
    for group in analysis.groups:
        goes = np.zeros(group.size + 1, np.bool_)  # the last one answers for -1
        goes[list(removed.get(group.id, ()))] = True
        for member in group.members:
            for units in member.occurrences:
                key = (member.tensor, member.axis)
                out[key] = out[key] | goes[units] if key in out else goes[units]
    return out


def held_back(analysis: Analysis, gone: Gone) -> list[str]:
    """For each axis of which something should go that a pin holds: how much, and the pin, in words."""
    facts, numbering = analysis.facts, analysis.numbering
    out = []
    for (name, axis), mask in gone.items():
        if name not in facts.axes or axis >= len(facts.axes[name]):
            continue
        labels = numbering.on(facts.axes[name][axis])
        if not labels.size or labels.shape[1] != mask.size:
            continue
        asked = labels[:, mask]
        stuck = np.unique(asked[(asked >= 0) & ~numbering.free[asked]])
        if stuck.size:
            pins = zip(facts.pins, numbering.held, strict=True)
            pin = next(own for own, held in pins if np.isin(stuck, held, assume_unique=True).any())
            out.append(f"{stuck.size} indices of {name!r} axis {axis} ({pin.op}: {pin.reason})")
    return out


def _fits(known: NDArray[np.bool_] | None, mask: NDArray[np.bool_]) -> bool:
    return known is not None and known.size == mask.size


def _hits(group: Group, gone: Gone) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """For each unit, whether some index of it goes, and whether some index of it stays."""
    hit, missed = np.zeros(group.size, np.bool_), np.zeros(group.size, np.bool_)
    for member in group.members:
        mask = gone.get((member.tensor, member.axis))
        for units in member.occurrences if mask is not None else ():
            if mask is None or mask.size != units.size:
                continue
            inside = units >= 0
            hit[units[inside & mask]] = True
            missed[units[inside & ~mask]] = True
    return hit, missed
