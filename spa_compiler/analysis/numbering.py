"""Elements and units: every element of every Dim has a number, elements that Links tie have one label.

All elements are numbered once (`offset of the atom + index`); connected components over these numbers give the units in
one call, never channel by channel.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from spa_compiler.analysis.axes import Link
from spa_compiler.analysis.facts import Facts, Pin
from spa_compiler.analysis.terms import Axis, Dim, Indices

Mask: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]

_TIED = "part of an axis meets a merged axis"


class Numbering:
    """What each index of each axis hangs on, once all rules have spoken.

    `label` (by element) is the unit that an element belongs to, `free` (by label) whether nothing pins it, `held` the
    labels that each pin of the facts keeps, ascending. Pins that follow from Links are added to the facts.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts, self.algebra = facts, facts.algebra
        self._on: dict[int, Indices] = {}
        self._kept_alive: list[Axis] = []  # an id stands for an axis only as long as the axis lives
        self.atoms = self._collect()
        self.offset: dict[int, int] = {}
        total = 0
        for atom in self.atoms:
            self.offset[id(atom)] = total
            total += atom.size or 0
        self.label = np.arange(total, dtype=np.int64)
        edges, loose = self._edges()
        if edges.size:
            ones = np.ones(edges.shape[1], np.bool_)
            graph = coo_array((ones, (edges[0], edges[1])), shape=(total, total))
            self.label = np.asarray(connected_components(graph, directed=False)[1], np.int64)
        self._stated: dict[int, Indices] = {}  # labels of the pins that follow from Links, by id
        self.loose = frozenset(link.origin for link, _ in loose)
        """Origins of Links whose indices cannot go alone, as an axis is merged."""
        for link, found in loose:
            facts.pins.append(_pin_of(link, facts))
            self._stated[id(facts.pins[-1])] = distinct(self.label[found])
        self.held = self._held()
        self.free = np.ones(total, np.bool_)
        for labels in self.held:
            self.free[labels] = False

    def _collect(self) -> list[Dim]:
        """Every atom of known size, in order of appearance."""
        seen: dict[int, Dim] = {}
        done: set[int] = set()
        axes = [axis for axes in self.facts.axes.values() for axis in axes]
        axes += [axis for link in self.algebra.links for axis in (link.left, link.right)]
        axes += [axis for pin in self.facts.pins for axis in pin.on]
        axes += [axis for work in self.facts.works for axis in work.axes]
        for axis in axes:
            if id(axis) not in done:
                done.add(id(axis))
                seen.update((id(atom), atom) for atom in self.algebra.atoms(axis) if atom.size is not None)
        return list(seen.values())

    def _edges(self) -> tuple[Indices, list[tuple[Link, Indices]]]:
        """Pairs of elements that Links tie, and for Links that cannot be told so the elements that must stay."""
        pairs = [np.zeros((2, 0), np.int64)]
        loose = []
        for link in self.algebra.links:
            sides = self._elements(link.left)[:, link.left_indices], self._elements(link.right)[:, link.right_indices]
            counts = [(side >= 0).sum(0) for side in sides]
            single = (counts[0] == 1) & (counts[1] == 1)
            pairs.append(np.stack([side[:, single].max(0, initial=-1) for side in sides]))
            odd = (~single) & ((counts[0] > 0) | (counts[1] > 0))
            if odd.any():
                rest = np.concatenate([side[:, odd].ravel() for side in sides])
                loose.append((link, rest[rest >= 0]))
        return np.concatenate(pairs, axis=1), loose

    def _elements(self, axis: Axis) -> Indices:
        return self.algebra.elements(axis, self.offset)

    def on(self, axis: Axis) -> Indices:
        """`[depth, size]` labels that each index hangs on, -1 for none; of an axis of unknown size nothing is told."""
        if id(axis) not in self._on:
            if self.algebra.size(axis) is None:  # whatever is on it was pinned
                found = np.zeros((0, 0), np.int64)
            else:
                elements = self._elements(axis)
                found = np.where(elements >= 0, self.label[elements], -1) if self.label.size else elements
            self._on[id(axis)] = found
            self._kept_alive.append(axis)
        return self._on[id(axis)]

    def hold(self, pin: Pin, labels: Indices) -> None:
        """Adds a pin on these labels."""
        self.facts.pins.append(pin)
        self.held.append(labels)
        self.free[labels] = False

    def may_lose(self, axis: Axis) -> bool:
        """Whether some unit that nothing pins is on the axis; cheaper than `on`."""
        return any(self.free[self.range(atom)].any() for atom in self.algebra.atoms(axis) if id(atom) in self.offset)

    def range(self, atom: Dim) -> Indices:
        """The labels of an atom's elements, in order."""
        start = self.offset[id(atom)]
        return self.label[start : start + (atom.size or 0)]

    def gone(self, axis: Axis, dead: Mask) -> Mask:
        """Which indices of an axis go when the labels in `dead` (by label) do."""
        labels = self.on(axis)
        if not labels.size:
            return np.zeros(labels.shape[1], np.bool_)
        return np.asarray(((labels >= 0) & dead[labels]).any(0))

    def _held(self) -> list[Indices]:
        """For each pin the labels that it keeps; many pins are on the same axes and share one array."""
        known: dict[tuple[object, ...], Indices] = {}
        out = []
        for pin in self.facts.pins:
            if id(pin) in self._stated:
                out.append(self._stated[id(pin)])
                continue
            key = (pin.indices, *(id(axis) for axis in pin.on))
            if key not in known:
                known[key] = distinct(self._labels_of(pin))
            out.append(known[key])
        return out

    def _labels_of(self, pin: Pin) -> Indices:
        out = [np.zeros(0, np.int64)]
        for axis in pin.on:
            if pin.indices is None:
                out += [self.range(atom) for atom in self.algebra.atoms(axis) if id(atom) in self.offset]
            elif self.algebra.size(axis) is not None:
                labels = self.on(axis)[:, list(pin.indices)].ravel()
                out.append(labels[labels >= 0])
        return np.concatenate(out)


def _pin_of(link: Link, facts: Facts) -> Pin:
    """A pin on the first tensor that has one side of the Link."""
    for name, axes in facts.axes.items():
        for number, axis in enumerate(axes):
            if axis is link.left or axis is link.right:
                return Pin(name, number, "Gather", _TIED, ())
    return Pin("", 0, "Gather", _TIED, ())


def distinct(values: Indices) -> Indices:
    """The distinct values, ascending; numpy's own `unique` is far slower on large arrays that are nearly distinct."""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if ordered.size else ordered
