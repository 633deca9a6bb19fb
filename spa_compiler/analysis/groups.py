"""From facts to groups of units: elements that Links tie are one unit, Dims that Links tie are one group.

All elements of all atoms are numbered once (`offset of the atom + index`); connected components over these numbers give
the units in one call, never channel by channel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import networkx as nx
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from spa_compiler.analysis import schema
from spa_compiler.analysis.axes import Axis, Dim, Indices
from spa_compiler.analysis.facts import Facts, Pin, Work

Mask: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
Occurrences: TypeAlias = list[tuple[Dim, Indices]]
"""The atoms of an axis, in order, each with the label of its element at every index, or -1."""


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one tensor that a group touches.

    `occurrences`: for each factor of the axis that belongs to the group, the unit of each index, or -1.
    """

    tensor: str
    axis: int
    is_parameter: bool
    occurrences: tuple[Indices, ...]

    def slabs(self, size: int) -> list[list[int]]:
        """For each of `size` units, the indices that go with it, ascending."""
        units = np.concatenate(self.occurrences)
        indices = np.tile(np.arange(self.occurrences[0].size), len(self.occurrences))
        pairs = np.unique(np.stack([units, indices])[:, units >= 0], axis=1)
        starts = np.searchsorted(pairs[0], np.arange(size + 1))
        return [pairs[1, low:high].tolist() for low, high in itertools.pairwise(starts)]


@dataclass(frozen=True, eq=False)
class Group:
    """Units that compete. See `schema.Group` for the numbers."""

    id: int
    size: int
    granularity: str
    params: int
    macs: int | None
    members: tuple[Member, ...]

    @property
    def parameters(self) -> tuple[Member, ...]:
        """The members that are constants of the file."""
        return tuple(member for member in self.members if member.is_parameter)

    @cached_property
    def units(self) -> list[schema.Unit]:
        """Every unit with its slabs; made on first use, as they are many."""
        parameters: list[list[schema.Slab]] = [[] for _ in range(self.size)]
        activations: list[list[schema.Slab]] = [[] for _ in range(self.size)]
        for member in self.members:
            target = parameters if member.is_parameter else activations
            for unit, indices in enumerate(member.slabs(self.size)):
                if indices:
                    target[unit].append(schema.Slab(member.tensor, member.axis, indices))
        return [schema.Unit(unit, parameters[unit], activations[unit]) for unit in range(self.size)]


@dataclass(frozen=True, eq=False)
class Parts:
    """What `partition` finds. `params` counts all parameters, `prunable` those that some unit can remove."""

    groups: tuple[Group, ...]
    pins: tuple[schema.Pin, ...]
    params: int
    prunable: int


def partition(facts: Facts, constants: Mapping[str, bool]) -> Parts:
    """Draws the conclusions.

    Args:
        facts: all rules have spoken.
        constants: names of constant tensors, and whether each counts as parameters (shapes and indices do not).
    """
    return _Partition(facts, constants).parts()


class _Partition:
    def __init__(self, facts: Facts, constants: Mapping[str, bool]) -> None:
        self.facts, self.algebra, self.constants = facts, facts.algebra, constants
        self.atoms = self._atoms()
        self.offset: dict[int, int] = {}
        total = 0
        for atom in self.atoms:
            self.offset[id(atom)] = total
            total += atom.size or 0
        self.label = self._labels(total)
        self.held = self._held()
        self.free = np.ones(total, np.bool_)  # by label
        for labels in self.held:
            self.free[labels] = False
        self.sizes: dict[str, list[int]] = {}
        self.made: dict[int, Occurrences] = {}
        self.on_axis = self._on_axes()
        self.live = {place: self._live(elements) for place, elements in self.on_axis.items()}
        self.works: dict[int, list[Work]] = {}
        for work in facts.works:
            for key in dict.fromkeys(id(atom) for axis in work.axes for atom, _ in self._occurrences(axis)):
                self.works.setdefault(key, []).append(work)

    def _atoms(self) -> list[Dim]:
        """Every atom of known size, in order of appearance."""
        seen: dict[int, Dim] = {}
        for axes in self.facts.axes.values():
            for axis in axes:
                for term in self.algebra.resolve(axis):
                    seen.update((id(atom), atom) for atom in term if atom.size is not None)
        for link in self.algebra.links:
            seen.update((id(atom), atom) for atom in (link.left, link.right))
        return list(seen.values())

    def _labels(self, total: int) -> Indices:
        """The unit of each element, as the number of its connected component."""
        links = self.algebra.links
        if not links:
            return np.arange(total, dtype=np.int64)
        left = np.concatenate([self.offset[id(link.left)] + link.left_indices for link in links])
        right = np.concatenate([self.offset[id(link.right)] + link.right_indices for link in links])
        edges = coo_array((np.ones(left.size, np.bool_), (left, right)), shape=(total, total))
        return np.asarray(connected_components(edges, directed=False)[1], np.int64)

    def _held(self) -> list[Indices]:
        """For each pin the labels that it keeps, ascending; many pins are on the same atoms and share one array."""
        known: dict[tuple[object, ...], Indices] = {}
        out = []
        for pin in self.facts.pins:
            axes = [self.algebra.resolve(axis) for axis in pin.on]
            key = (pin.indices, *(tuple(tuple(id(atom) for atom in term) for term in terms) for terms in axes))
            if key not in known:
                known[key] = _distinct(self.label[self._elements(pin)])
            out.append(known[key])
        return out

    def _elements(self, pin: Pin) -> Indices:
        out = [np.zeros(0, np.int64)]
        for axis in pin.on:
            if pin.indices is not None:
                for atom, digit in self.algebra.digits(axis):
                    chosen = digit[list(pin.indices)]
                    out.append(self.offset[id(atom)] + chosen[chosen >= 0])
                continue
            for term in self.algebra.resolve(axis):
                out += [self._range(atom) for atom in term if id(atom) in self.offset]
        return np.concatenate(out)

    def _range(self, atom: Dim) -> Indices:
        return np.arange(self.offset[id(atom)], self.offset[id(atom)] + (atom.size or 0))

    def _on_axes(self) -> dict[tuple[str, int], Occurrences]:
        """What is on each axis that holds an atom."""
        return {
            (name, number): found
            for name, axes in self.facts.axes.items()
            for number, axis in enumerate(axes)
            if (found := self._occurrences(axis))
        }

    def _occurrences(self, axis: Axis) -> Occurrences:
        if id(axis) not in self.made:
            if self.algebra.size(axis) is None:  # whatever is on it was pinned
                self.made[id(axis)] = []
                return []
            self.made[id(axis)] = [
                (atom, np.where(digit >= 0, self.label[self.offset[id(atom)] + digit], -1))
                for atom, digit in self.algebra.digits(axis)
            ]
        return self.made[id(axis)]

    def _live(self, occurrences: Occurrences) -> Mask:
        """Which indices of an axis some unit can remove."""
        return _any((labels >= 0) & self.free[labels] for _, labels in occurrences)

    def _sizes(self, name: str) -> list[int]:
        """Sizes of a constant's axes; the algebra no longer changes, so they are worked out once."""
        if name not in self.sizes:
            self.sizes[name] = [self.algebra.size(axis) or 0 for axis in self.facts.axes[name]]
        return self.sizes[name]

    def _components(self) -> list[list[Dim]]:
        graph: nx.Graph[int] = nx.Graph()
        by_id = {id(atom): atom for atom in self.atoms}
        graph.add_nodes_from(by_id)
        graph.add_edges_from((id(link.left), id(link.right)) for link in self.algebra.links)
        place = {key: number for number, key in enumerate(by_id)}
        parts = [sorted(part, key=place.__getitem__) for part in nx.connected_components(graph)]
        return [[by_id[key] for key in part] for part in sorted(parts, key=lambda part: place[part[0]])]

    def parts(self) -> Parts:
        """All groups, pins and counts."""
        weights = [name for name, counts in self.constants.items() if counts and name in self.facts.axes]
        total = sum(math.prod(self._sizes(name)) for name in weights)
        stuck = sum(self._stuck(name) for name in weights)
        members: dict[int, list[tuple[str, int]]] = {}
        for place, occurrences in self.on_axis.items():
            for key in dict.fromkeys(id(atom) for atom, _ in occurrences):
                members.setdefault(key, []).append(place)
        groups: list[Group] = []
        for component in self._components():
            places = dict.fromkeys(place for atom in component for place in members.get(id(atom), ()))
            group = self._group(len(groups), component, list(places))
            if group is not None:
                groups.append(group)
        return Parts(tuple(groups), self._pins(weights), total, total - stuck)

    def _stuck(self, name: str) -> int:
        """Elements of a constant that nothing can remove."""
        sizes = self._sizes(name)
        return math.prod(size - self._count(self.live.get((name, axis))) for axis, size in enumerate(sizes))

    @staticmethod
    def _count(mask: Mask | None) -> int:
        return 0 if mask is None else int(mask.sum())

    def _group(self, number: int, component: list[Dim], places: list[tuple[str, int]]) -> Group | None:
        elements = np.concatenate([self.label[self._range(atom)] for atom in component])
        labels, first = np.unique(elements, return_index=True)
        labels = labels[np.argsort(first)]
        labels = labels[self.free[labels]]
        if not labels.size:
            return None
        unit = np.full(self.label.size + 1, -1, np.int64)  # the last one answers for label -1
        unit[labels] = np.arange(labels.size)
        inside = {id(atom) for atom in component}
        members = []
        for name, axis in places:
            found = [unit[own] for atom, own in self.on_axis[name, axis] if id(atom) in inside]
            if any((own >= 0).any() for own in found):
                members.append(Member(name, axis, name in self.constants, tuple(found)))
        if not any(member.is_parameter for member in members):
            return None
        gone = {(m.tensor, m.axis): _any(own >= 0 for own in m.occurrences) for m in members}
        params = 0
        for name in dict.fromkeys(member.tensor for member in members if self.constants.get(member.tensor)):
            sizes = self._sizes(name)
            kept = math.prod(size - self._count(gone.get((name, axis))) for axis, size in enumerate(sizes))
            params += math.prod(sizes) - kept
        names = dict.fromkeys(atom.label for atom in component if atom.label)
        size, granularity = int(labels.size), ", ".join(names) or "channel"
        return Group(number, size, granularity, params, self._macs(inside, unit), tuple(members))

    def _macs(self, inside: set[int], unit: Indices) -> int | None:
        """Multiply-accumulates that go when every unit of the group goes."""
        total = 0
        for work in {id(work): work for key in inside for work in self.works.get(key, ())}.values():
            gone = [self._gone(axis, inside, unit) for axis in work.axes]
            if not any(gone):
                continue
            sizes = [self.algebra.size(axis) for axis in work.axes]
            if work.times is None or None in sizes:
                return None
            known = [size for size in sizes if size is not None]
            kept = math.prod(size - lost for size, lost in zip(known, gone, strict=True))
            total += work.times * (math.prod(known) - kept)
        return total

    def _gone(self, axis: Axis, inside: set[int], unit: Indices) -> int:
        hits = [unit[labels] >= 0 for atom, labels in self._occurrences(axis) if id(atom) in inside]
        return self._count(_any(hits)) if hits else 0

    def _pins(self, weights: Iterable[str]) -> tuple[schema.Pin, ...]:
        """One line per axis, operator and reason. Pins on the same elements hold the same parameters."""
        stuck = [name for name in weights if self._stuck(name)]
        where = self._where(stuck)
        known: dict[bytes, int] = {}
        out: dict[tuple[str, int, str, str], schema.Pin] = {}
        for pin, labels in zip(self.facts.pins, self.held, strict=True):
            key = (pin.tensor, pin.axis, pin.op, pin.reason)
            if not labels.size or key in out:
                continue
            if pin.window:
                params = 0
            elif (params := known.get(labels.tobytes(), -1)) < 0:
                params = known[labels.tobytes()] = self._holds(labels, stuck, where)
            out[key] = schema.Pin(*key, params)
        return tuple(out.values())

    def _where(self, names: list[str]) -> Indices:
        """`[2, n]`: labels, ascending, and the place in `names` of a constant on which each lies."""
        pairs = [np.zeros((2, 0), np.int64)]
        for place, name in enumerate(names):
            for axis in range(len(self._sizes(name))):
                for _, own in self.on_axis.get((name, axis), ()):
                    found = _distinct(own[own >= 0])
                    pairs.append(np.stack([found, np.full_like(found, place)]))
        joined = np.concatenate(pairs, axis=1)
        return joined[:, np.argsort(joined[0], kind="stable")]

    def _holds(self, labels: Indices, names: list[str], where: Indices) -> int:
        """Elements of constants that nothing can remove and that lie on these labels."""
        ours = np.zeros(self.label.size + 1, np.bool_)
        ours[labels] = True
        total = 0
        low, high = (np.searchsorted(where[0], labels, side) for side in ("left", "right"))
        lengths = high - low
        runs = np.repeat(high - np.cumsum(lengths), lengths) + np.arange(lengths.sum())  # low..high of each label
        for place in _distinct(where[1, runs]).tolist():
            all_stuck, others = 1, 1
            for axis, size in enumerate(self._sizes(names[place])):
                live = self.live.get((names[place], axis))
                dead = size - self._count(live)
                all_stuck *= dead
                if live is not None:
                    hit = _any(ours[own] for _, own in self.on_axis[names[place], axis])
                    dead -= int((hit & ~live).sum())
                others *= dead
            total += all_stuck - others
        return total


def _distinct(values: Indices) -> Indices:
    """The distinct values, ascending; numpy's own `unique` is far slower on large arrays that are nearly distinct."""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if ordered.size else ordered


def _any(masks: Iterable[Mask]) -> Mask:
    out: Mask = np.logical_or.reduce(list(masks))
    return out
