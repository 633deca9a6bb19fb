"""The algebra of axes: which parts of two axes live and die together.

An axis is a *sum of products* of Dims, in row-major order: `A` is plain, `(A, B)` merged (index `i * |B| + j`), `A + B`
a concatenation; a factor may be a sum again: `(H, A + B)`. Deleting element `i` of a Dim deletes slab `i` of that
factor wherever the Dim occurs, so an index of a merged axis goes as soon as any of its digits goes.

Joining two axes makes index `i` of both live and die together, for every `i`. Dims that meet are made one (union-find).
Where the axes are cut differently, the coarser Dims are *defined* by finer ones, as a product or as a sum, and the
definition holds at once wherever the Dim occurs: joining `C` with `(G, A)` turns every `C` of the model into `(G, A)`,
joining it with `A + B` turns it into `A + B`. Definitions only ever refine Dims that have none, so this ends.
What no definition can say (a permutation, a repeated index) is said by Links between single indices.

`terms` reads such sums, `unify` brings two together; here is what rules do with them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from spa_compiler.analysis.terms import (
    Axis,
    Dim,
    Factor,
    Indices,
    Term,
    elements_of,
    factor_size,
    leaves,
    second_of,
    size_of,
    spans,
    summed,
)
from spa_compiler.analysis.unify import Incompatible, cut_at, split_at, unify

_UNKNOWN = "meets an axis of unknown size"


@dataclass(frozen=True, eq=False)
class Link:
    """Index `left_indices[k]` of `left` and index `right_indices[k]` of `right` live and die together."""

    left: Axis
    left_indices: Indices
    right: Axis
    right_indices: Indices
    origin: str = ""


class Axes:
    """All Dims of a graph, how they are defined, and the Links between them."""

    def __init__(self) -> None:
        self.links: list[Link] = []

    def fresh(self, size: int | None, label: str = "") -> Axis:
        """An axis of its own; size 1 makes the empty product, as a single index is never removed."""
        return Axis(((),)) if size == 1 else Axis.of(Dim(size, label))

    def resolve(self, axis: Axis) -> tuple[Term, ...]:
        """The axis as terms of atoms and, behind the first factor, of nested sums, with every definition put in."""
        return summed(axis).terms

    def atoms(self, axis: Axis) -> Iterator[Dim]:
        """Every atom on the axis, at any depth, possibly more than once."""
        for term in self.resolve(axis):
            yield from leaves(term)

    def size(self, axis: Axis) -> int | None:
        """Number of indices, None if unknown."""
        return size_of(axis)

    def second(self, axis: Axis) -> int | None:
        """The size in the second binding, None if that of some Dim on it is unknown."""
        return second_of(self.resolve(axis))

    def note_second(self, axis: Axis, size: int) -> None:
        """States the size in the second binding. An axis that keeps its size is made of Dims that do; on another one a
        single Dim of which nothing is known yet follows from the rest.
        """
        unknown = {id(atom): atom for atom in self.atoms(axis) if atom.second is None}
        if not unknown:
            return
        if size == self.size(axis):
            for atom in unknown.values():
                atom.second = atom.size
            return
        terms = self.resolve(axis)
        lone = [factor for factor in terms[0] if isinstance(factor, Dim) and factor.second is None]
        if len(terms) == 1 and len(lone) == len(unknown) == 1:
            rest = second_of((tuple(factor for factor in terms[0] if factor is not lone[0]),))
            if rest and size % rest == 0:
                lone[0].second = size // rest

    def merge(self, axes: Sequence[Axis]) -> Axis:
        """The row-major merge of neighbouring axes, as Flatten makes it."""
        return axes[0] if len(axes) == 1 else Axis((tuple(axes),))

    def concat(self, axes: Sequence[Axis]) -> Axis:
        """The axes one after another; empty ones are left out."""
        filled = [axis for axis in axes if size_of(axis) != 0] or axes[:1]
        return Axis(tuple(term for axis in filled for term in axis.terms))

    def factor(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """The axis as neighbouring axes of these sizes, outermost first; Dims are split where a boundary needs it.

        Raises:
            Incompatible: a boundary cuts through a sum, or does not fit an earlier split.
        """
        if 0 in sizes:
            return [self.fresh(size) for size in sizes]
        bounds = {math.prod(sizes[place:]) for place in range(len(sizes))}
        factors = split_at(axis, bounds)
        out, rest = [], list(factors)
        for size in sizes:
            own: list[Factor] = []
            while math.prod(factor_size(factor) for factor in own) < size:
                own.append(rest.pop(0))
            out.append(Axis.of(*own))
        return out

    def split(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """The axis as consecutive pieces of these sizes; Dims are split where a boundary needs it.

        Raises:
            Incompatible: a boundary cuts through a merged axis.
        """
        stops = list(itertools.accumulate(sizes))
        terms = cut_at(axis, stops[:-1])
        out = []
        for start, stop in zip([0, *stops], stops, strict=False):
            own = [t for t, (low, high) in zip(terms, spans(terms), strict=True) if start <= low and high <= stop]
            out.append(Axis(tuple(own)) if own else self.fresh(0))
        return out

    def join(self, left: Axis, right: Axis) -> str | None:
        """Makes index i of both axes live and die together, for every i.

        Returns:
            None, or the reason why that cannot be stated; Dims may be split finer than before then, which is harmless,
            and the caller has to pin both axes.
        """
        if left is right:
            return None
        sizes = size_of(left), size_of(right)
        if sizes == (None, None):
            return None if self.resolve(left) == self.resolve(right) or not self._known(left, right) else _UNKNOWN
        if None in sizes:
            return _UNKNOWN
        if sizes[0] != sizes[1]:
            return f"sizes {sizes[0]} and {sizes[1]} differ"
        if sizes[0] == 0:
            return None
        try:
            unify(left, right)
        except Incompatible as error:
            return str(error)
        return None

    def tie(self, left: Axis, left_indices: Indices, right: Axis, right_indices: Indices, origin: str = "") -> None:
        """Ties single indices of two axes, see `Link`; `origin` is the first output of the node that asks for it."""
        self.links.append(Link(left, left_indices, right, right_indices, origin))

    def name(self, axis: Axis, label: str) -> None:
        """Gives the atoms on an axis a label, where they have none."""
        for atom in self.atoms(axis):
            atom.label = atom.label or label

    def elements(self, axis: Axis, offset: Mapping[int, int]) -> Indices:
        """Which elements each index of an axis of known size hangs on.

        Args:
            offset: of an atom, by `id`: its element i has the number `offset + i`.

        Returns:
            `[depth, size]` numbers, -1 where an index has fewer than `depth` digits.
        """
        return elements_of(self.resolve(axis), offset)

    def _known(self, *axes: Axis) -> bool:
        return any(atom.size is not None for axis in axes for atom in self.atoms(axis))
