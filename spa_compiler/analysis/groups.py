"""From facts to groups of units: elements that Links tie are one unit, Dims that Links tie are one group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np

from spa_compiler.analysis import schema
from spa_compiler.analysis.facts import Facts, Pin, Work
from spa_compiler.analysis.numbering import Mask, Numbering, distinct
from spa_compiler.analysis.terms import Axis, Dim, Indices


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one tensor that a group touches.

    `occurrences`: one or more rows of `[size of the axis]`: the units that each index hangs on, or -1.
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
    """Units that compete. See `schema.Group` for the numbers.

    `dims`: for each Dim of the group the unit of each of its elements, or -1 where the element is pinned. A Dim cannot
    lose all of its elements. `labels`: the label of each unit.
    """

    id: int
    size: int
    granularity: str
    params: int
    macs: int | None
    members: tuple[Member, ...]
    dims: tuple[Indices, ...]
    labels: Indices

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
    numbering: Numbering


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
        self.numbering = Numbering(facts)
        self._pin_stored()
        self._pin_all_of_one()
        self.free = self.numbering.free
        self.on_axis = self._on_axes()
        self.live: dict[tuple[str, int], Mask] = {}
        known: dict[int, Mask] = {}
        for place, labels in self.on_axis.items():
            if id(labels) not in known:
                known[id(labels)] = np.asarray(((labels >= 0) & self.free[labels]).any(0))
            self.live[place] = known[id(labels)]
        self.sizes: dict[str, list[int]] = {}
        self.works: dict[int, list[Work]] = {}
        for work in facts.works:
            for key in dict.fromkeys(id(atom) for axis in work.axes for atom in self.algebra.atoms(axis)):
                self.works.setdefault(key, []).append(work)

    def _pin_stored(self) -> None:
        """What lies on constants alone stays: no mask could show what removing it does. (Folding makes it go away.)"""
        numbering = self.numbering
        seen = np.zeros(numbering.free.size + 1, np.bool_)
        for name, axes in self.facts.axes.items():
            if name not in self.constants:
                for axis in axes:
                    for atom in self.algebra.atoms(axis):
                        seen[numbering.range(atom) if id(atom) in numbering.offset else []] = True
        for name in self.constants:
            for number, axis in enumerate(self.facts.axes.get(name, ())):
                labels = distinct(numbering.on(axis).ravel())
                lone = labels[(labels >= 0) & ~seen[labels]]
                if lone.size and numbering.free[lone].any():
                    numbering.hold(Pin(name, number, "constant", "nothing but constants has it", (axis,)), lone)

    def _pin_all_of_one(self) -> None:
        """A unit that has every element of a Dim stays: an axis cannot become empty."""
        numbering = self.numbering
        homes: dict[int, tuple[str, int, Axis]] = {}
        for name, axes in self.facts.axes.items():
            for number, axis in enumerate(axes):
                for atom in self.algebra.atoms(axis):
                    homes.setdefault(id(atom), (name, number, axis))
        for atom in numbering.atoms:
            labels = numbering.range(atom)
            if labels.size and numbering.free[labels[0]] and (labels == labels[0]).all() and id(atom) in homes:
                name, number, axis = homes[id(atom)]
                pin = Pin(name, number, "coupling", "all that is on the axis hangs together", (axis,))
                numbering.hold(pin, labels[:1].copy())

    def _on_axes(self) -> dict[tuple[str, int], Indices]:
        """The labels on each axis of a constant, and on each other axis that some unit can shrink.

        Axes whose size depends on the inputs (heads merged with the batch) are left out: their indices mean nothing
        for other inputs. What is zero before they are merged is zero on them.
        """
        out = {}
        for name, axes in self.facts.axes.items():
            if name in self.facts.silent:
                continue
            moving = () if name in self.constants else self.facts.settled.varies.get(name, ())
            for number, axis in enumerate(axes):
                if (number < len(moving) and moving[number]) or not (
                    name in self.constants or self.numbering.may_lose(axis)
                ):
                    continue
                labels = self.numbering.on(axis)
                if labels.size:
                    out[name, number] = labels
        return out

    def _sizes(self, name: str) -> list[int]:
        """Sizes of a constant's axes; the algebra no longer changes, so they are worked out once."""
        if name not in self.sizes:
            self.sizes[name] = [self.algebra.size(axis) or 0 for axis in self.facts.axes[name]]
        return self.sizes[name]

    def _components(self) -> list[list[Dim]]:
        """Atoms whose elements share a label hang together."""
        graph: nx.Graph[int] = nx.Graph()
        atoms = self.numbering.atoms
        graph.add_nodes_from(range(len(atoms)))
        if self.algebra.links:
            owner = np.repeat(np.arange(len(atoms)), [atom.size or 0 for atom in atoms])
            order = np.argsort(self.numbering.label, kind="stable")
            same = self.numbering.label[order][1:] == self.numbering.label[order][:-1]
            pairs = np.stack([owner[order][:-1][same], owner[order][1:][same]])
            graph.add_edges_from(np.unique(pairs, axis=1).T.tolist())
        parts = sorted(sorted(part) for part in nx.connected_components(graph))
        return [[atoms[number] for number in part] for part in parts]

    def parts(self) -> Parts:
        """All groups, pins and counts."""
        weights = [name for name, counts in self.constants.items() if counts and name in self.facts.axes]
        total = sum(math.prod(self._sizes(name)) for name in weights)
        stuck = sum(self._stuck(name) for name in weights)
        members: dict[int, list[tuple[str, int]]] = {}
        for place in self.on_axis:
            for key in dict.fromkeys(id(atom) for atom in self.algebra.atoms(self.facts.axes[place[0]][place[1]])):
                members.setdefault(key, []).append(place)
        groups: list[Group] = []
        for component in self._components():
            if not any(self.free[self.numbering.range(atom)].any() for atom in component):
                continue
            places = dict.fromkeys(place for atom in component for place in members.get(id(atom), ()))
            group = self._group(len(groups), component, list(places))
            if group is not None:
                groups.append(group)
        return Parts(tuple(groups), self._pins(weights), total, total - stuck, self.numbering)

    def _stuck(self, name: str) -> int:
        """Elements of a constant that nothing can remove."""
        sizes = self._sizes(name)
        return math.prod(size - self._count(self.live.get((name, axis))) for axis, size in enumerate(sizes))

    @staticmethod
    def _count(mask: Mask | None) -> int:
        return 0 if mask is None else int(mask.sum())

    def _group(self, number: int, component: list[Dim], places: list[tuple[str, int]]) -> Group | None:
        elements = np.concatenate([self.numbering.range(atom) for atom in component])
        labels, first = np.unique(elements, return_index=True)
        labels = labels[np.argsort(first)]
        labels = labels[self.free[labels]]
        unit = np.full(self.free.size + 1, -1, np.int64)  # the last one answers for label -1
        unit[labels] = np.arange(labels.size)
        members = []
        known: dict[int, tuple[Indices, ...]] = {}
        for name, axis in places:
            on = self.on_axis[name, axis]
            if id(on) not in known:
                known[id(on)] = tuple(row for row in unit[on] if (row >= 0).any())
            if known[id(on)]:
                members.append(Member(name, axis, name in self.constants, known[id(on)]))
        if not any(member.is_parameter for member in members):
            return None
        gone = {(m.tensor, m.axis): np.logical_or.reduce([own >= 0 for own in m.occurrences]) for m in members}
        params = 0
        for name in dict.fromkeys(member.tensor for member in members if self.constants.get(member.tensor)):
            sizes = self._sizes(name)
            kept = math.prod(size - self._count(gone.get((name, axis))) for axis, size in enumerate(sizes))
            params += math.prod(sizes) - kept
        names = dict.fromkeys(atom.label for atom in component if atom.label and self._removable(atom))
        size, granularity = int(labels.size), ", ".join(names) or "channel"
        dims = tuple(unit[self.numbering.range(atom)] for atom in component)
        return Group(number, size, granularity, params, self._macs(component, unit), tuple(members), dims, labels)

    def _removable(self, atom: Dim) -> bool:
        return bool(self.free[self.numbering.range(atom)].any())

    def _macs(self, component: list[Dim], unit: Indices) -> int | None:
        """Multiply-accumulates that go when every unit of the group goes."""
        total = 0
        for work in {id(work): work for atom in component for work in self.works.get(id(atom), ())}.values():
            gone = [self._gone(axis, unit) for axis in work.axes]
            if not any(gone):
                continue
            sizes = [self.algebra.size(axis) for axis in work.axes]
            if work.times is None or None in sizes:
                return None
            known = [size for size in sizes if size is not None]
            kept = math.prod(size - lost for size, lost in zip(known, gone, strict=True))
            total += work.times * (math.prod(known) - kept)
        return total

    def _gone(self, axis: Axis, unit: Indices) -> int:
        labels = self.numbering.on(axis)
        return int((unit[labels] >= 0).any(0).sum()) if labels.size else 0

    def _pins(self, weights: Iterable[str]) -> tuple[schema.Pin, ...]:
        """One line per axis, operator and reason. Pins on the same elements hold the same parameters."""
        stuck = [name for name in weights if self._stuck(name)]
        where = self._where(stuck)
        known: dict[bytes, int] = {}
        out: dict[tuple[str, int, str, str], schema.Pin] = {}
        for pin, labels in zip(self.facts.pins, self.numbering.held, strict=True):
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
                own = self.on_axis.get((name, axis))
                if own is not None:
                    found = distinct(own[own >= 0])
                    pairs.append(np.stack([found, np.full_like(found, place)]))
        joined = np.concatenate(pairs, axis=1)
        return joined[:, np.argsort(joined[0], kind="stable")]

    def _holds(self, labels: Indices, names: list[str], where: Indices) -> int:
        """Elements of constants that nothing can remove and that lie on these labels."""
        ours = np.zeros(self.free.size + 1, np.bool_)
        ours[labels] = True
        total = 0
        low, high = (np.searchsorted(where[0], labels, side) for side in ("left", "right"))
        lengths = high - low
        runs = np.repeat(high - np.cumsum(lengths), lengths) + np.arange(lengths.sum())  # low..high of each label
        for place in distinct(where[1, runs]).tolist():
            all_stuck, others = 1, 1
            for axis, size in enumerate(self._sizes(names[place])):
                live = self.live.get((names[place], axis))
                dead = size - self._count(live)
                all_stuck *= dead
                if live is not None:
                    hit = ours[self.on_axis[names[place], axis]].any(0)
                    dead -= int((hit & ~live).sum())
                others *= dead
            total += all_stuck - others
        return total
