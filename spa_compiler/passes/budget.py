"""Which units go so that what remains meets a budget: one order over all units, cut where the budget is met.

A *block* is the part of a group whose units lie on the same Dims; the widths of axes are sums of blocks. All
units of all groups are put in one order, least valuable first (ties by group, then by unit). The first m of them go,
except that every block keeps a count that it is allowed to keep: enough that no axis falls below its least, and numbers
that kernels like. The cost falls with m, so the least m that meets the budget is found by bisection; then blocks get
back one step each, the most valuable first, as long as the budget holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from spa_compiler.analysis import Group

Indices: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Removed: TypeAlias = dict[int, Indices]
"""Group -> the units that go, ascending."""
Cost: TypeAlias = Callable[[Removed], float]
"""What remains, as a share of the whole."""

_TRIES = 64
"""How many blocks are offered a step back; each costs one count of the whole model."""
_SLACK = 1e-9
"""Shares are quotients of integers: a budget of 0.7 is met by 0.7."""

_WHOLE = frozenset({"head", "conv group"})
"""Units that are many channels each: their numbers are small, and any will do."""


@dataclass(frozen=True, eq=False)
class Field:
    """A group in the contest.

    Args:
        group: its id.
        values: `[size]`, what keeping each unit is worth, comparable among groups.
        block: `[size]`, the block of each unit.
        allowed: for each block, the counts that may stay, ascending; the last one is all of them.
    """

    group: int
    values: NDArray[np.float64]
    block: Indices
    allowed: tuple[Indices, ...]


def field(group: Group, values: NDArray[np.float64], *, least: float, lanes: int, round_to: int) -> Field:
    """A group with the counts that its blocks may keep.

    Args:
        values: `[size]`.
        least: what every Dim of the group keeps: below 1 a share of its units, else a count; never less than one unit.
        lanes: floats in a vector of the target.
        round_to: kept counts are multiples of it; 0: what the kernels like.
    """
    counts = np.stack(list(_counts(group).values()))
    block = np.unique(counts[:, 1:], axis=1, return_inverse=True)[1].reshape(-1).astype(np.int64)
    best_first = np.lexsort((np.arange(group.size), -values))
    held = np.zeros(group.size, np.bool_)
    for pinned, *own in sorted(counts.tolist(), key=lambda row: (sum(row), row)):
        on_dim = np.asarray(own)
        size = pinned + int(on_dim.sum())
        floor = max(1, math.ceil(least * size - _SLACK) if least < 1 else int(least))
        missing = floor - pinned - int(on_dim[held].sum())
        candidates = best_first[(on_dim[best_first] > 0) & ~held[best_first]]
        taken = np.searchsorted(np.cumsum(on_dim[candidates]), max(0, missing)) + 1 if missing > 0 else 0
        held[candidates[:taken]] = True
    whole = not _WHOLE.isdisjoint(group.granularity.split(", "))
    sizes = np.bincount(block)
    floors = np.bincount(block, held)
    step = 1 if whole else round_to
    allowed = tuple(_allowed(int(n), int(floor), lanes, step) for n, floor in zip(sizes, floors, strict=True))
    return Field(group.id, values, block, allowed)


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values by place alone, `(place + 1/2) / size`: a threshold on them removes the same share of every group."""
    out = np.empty(values.size, np.float64)
    out[np.lexsort((np.arange(values.size), values))] = (np.arange(values.size) + 0.5) / values.size
    return out


def choose(fields: Sequence[Field], budget: float, cost: Cost, before: Mapping[int, Iterable[int]]) -> Removed:
    """The units that go, by group.

    Args:
        budget: the share that may remain, 0 to 1. Where it cannot be met, as little as possible remains.
        before: units that earlier steps took; they go first, and come back only where rounding would take too much.
    """
    contest = _Contest(fields, before)
    everything = contest.size
    low, high = 0, everything  # the answer lies in low..high if there is one
    while low < high:
        middle = (low + high) // 2
        if cost(contest.removed(contest.counts(middle))) <= budget + _SLACK:
            high = middle
        else:
            low = middle + 1
    counts = contest.counts(low)
    if cost(contest.removed(counts)) <= budget + _SLACK:
        for number in contest.by_worth(counts)[:_TRIES]:
            trial = contest.step_back(counts, number)
            if cost(contest.removed(trial)) <= budget + _SLACK:
                counts = trial
    return contest.removed(counts)


def last_of_their_kind(group: Group, removed: Iterable[int]) -> list[int]:
    """Units that must come back because some Dim of the group would have none left: the first of each such Dim."""
    stays = np.ones(group.size, np.bool_)
    stays[list(removed)] = False
    back: list[int] = []
    for pinned, *own in (row.tolist() for row in _counts(group).values()):
        on_dim = np.asarray(own)
        if not pinned and not on_dim[stays].any():
            unit = int(np.flatnonzero(on_dim)[0])
            stays[unit] = True
            back.append(unit)
    return back


def _counts(group: Group) -> dict[bytes, Indices]:
    """For each Dim of the group `[1 + size]`: how many of its elements are pinned, and how many each unit has."""
    found: dict[bytes, Indices] = {}
    for dim in group.dims:
        row = np.bincount(dim + 1, minlength=group.size + 1).astype(np.int64)
        if row[1:].any():
            found.setdefault(row.tobytes(), row)
    return found


def _allowed(size: int, floor: int, lanes: int, round_to: int) -> Indices:
    """Counts of a block that may stay, ascending."""
    counts = np.arange(max(floor, 1), size + 1)
    if round_to > 1:
        liked = counts % round_to == 0
    elif round_to == 1 or size <= lanes // 4:
        liked = np.ones(counts.size, np.bool_)
    else:
        # Whole vectors; of layers that are not even two wide also quarters of one. ONNX Runtime's blocked convolutions,
        # depthwise ones above all, are far slower on other widths, and those with half the MACs as slow as the whole.
        narrow = (size < 2 * lanes) & (counts < lanes)
        liked = counts % np.where(narrow, max(lanes // 4, 1), lanes) == 0
    liked |= counts == size
    none = np.zeros(0 if floor else 1, np.int64)
    return np.concatenate([none, counts[liked]]).astype(np.int64)


class _Contest:
    """All units in one order, and all blocks."""

    def __init__(self, fields: Sequence[Field], before: Mapping[int, Iterable[int]]) -> None:
        self.fields = fields
        self.allowed = [allowed for one in fields for allowed in one.allowed]
        starts = np.cumsum([0, *(len(one.allowed) for one in fields)])
        values = [one.values.copy() for one in fields]
        for one, own in zip(fields, values, strict=True):
            own[list(before.get(one.group, ()))] = -np.inf
        blocks = [one.block + start for one, start in zip(fields, starts, strict=False)]
        self.values = np.concatenate([np.zeros(0), *values])
        self.block = np.concatenate([np.zeros(0, np.int64), *blocks])
        self.group = np.concatenate([np.zeros(0, np.int64), *(np.full(len(v), i) for i, v in enumerate(values))])
        self.unit = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(v)) for v in values)])
        self.order = np.argsort(self.values, kind="stable")
        self.size = int(self.values.size)
        self.sizes = np.bincount(self.block, minlength=len(self.allowed))
        by_block = self.order[np.argsort(self.block[self.order], kind="stable")]
        self.ranked = np.split(by_block, np.cumsum(self.sizes)[:-1]) if self.allowed else []

    def counts(self, first: int) -> Indices:
        """What each block keeps when the first units of the order go: the allowed count that is nearest."""
        wanted = self.sizes - np.bincount(self.block[self.order[:first]], minlength=len(self.allowed))
        nearest = [_nearest(allowed, int(count)) for allowed, count in zip(self.allowed, wanted, strict=True)]
        return np.asarray(nearest, np.int64)

    def removed(self, counts: Indices) -> Removed:
        """The least valuable units of each block, by group."""
        gone = [ranked[: len(ranked) - count] for ranked, count in zip(self.ranked, counts, strict=True)]
        flat = np.sort(np.concatenate([np.zeros(0, np.int64), *gone]))
        out = {one.group: self.unit[flat[self.group[flat] == place]] for place, one in enumerate(self.fields)}
        return {group: units for group, units in out.items() if units.size}

    def by_worth(self, counts: Indices) -> list[int]:
        """Blocks that could get something back, the one first whose next unit is worth most."""
        open_ = [number for number, count in enumerate(counts) if count < self.allowed[number][-1]]
        return sorted(open_, key=lambda n: (-self.values[self.ranked[n][self.sizes[n] - counts[n] - 1]], n))

    def step_back(self, counts: Indices, number: int) -> Indices:
        """The counts with one step more for one block."""
        out = counts.copy()
        allowed = self.allowed[number]
        out[number] = allowed[np.searchsorted(allowed, counts[number], side="right")]
        return out


def _nearest(allowed: Indices, count: int) -> int:
    place = int(np.searchsorted(allowed, count))
    if place == 0:
        return int(allowed[0])
    if place == allowed.size:
        return int(allowed[-1])
    below, above = int(allowed[place - 1]), int(allowed[place])
    return above if above - count <= count - below else below
