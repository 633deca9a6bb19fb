"""The algebra of axes: what an axis is made of, and which parts of two axes live and die together.

An axis is a *sum of products* of Dims, in row-major order: `[A]` is plain, `[(A, B)]` merged (index `i * |B| + j`),
`[(A,), (B,)]` a concatenation. Deleting element `i` of a Dim deletes slab `i` of that factor wherever the Dim occurs,
so an index of a merged axis goes as soon as any of its digits goes.

Equal Dims are joined (union-find). Where two axes of one size are cut differently, the coarser Dims are split, and a
split holds at once in every axis, as all of them refer to the same class: joining `[C]` with `[(G, A)]` turns every
`C` of the model into `(G, A)`. Ranges of two Dims that correspond without the Dims being equal are tied by Links.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Indices: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
"""`[n]` positions in a Dim or an axis."""


@dataclass(eq=False, slots=True)
class Dim:
    """One factor of an axis. `size` is None where the file does not state it; such a Dim is never removable.

    `label` says what one of it is where that is no plain channel ("conv group", ...). Two Dims that were joined are one
    class; always go through `Axes.atoms` to see what a Dim stands for now.
    """

    size: int | None
    label: str = ""
    _parent: Dim | None = None
    _parts: tuple[Dim, Dim] | None = None


Term: TypeAlias = tuple[Dim, ...]
"""A product of Dims, outermost first; the empty product is an axis of size 1."""


@dataclass(frozen=True, eq=False)
class Axis:
    """A sum of products of Dims: an ordered concatenation of terms."""

    terms: tuple[Term, ...]

    @classmethod
    def of(cls, *dims: Dim) -> Axis:
        """The product of `dims`, outermost first."""
        return cls((tuple(dims),))


@dataclass(frozen=True, eq=False)
class Link:
    """Element `left_indices[k]` of `left` and element `right_indices[k]` of `right` live and die together."""

    left: Dim
    left_indices: Indices
    right: Dim
    right_indices: Indices


class Axes:
    """The union-find of Dims and the Links between them."""

    def __init__(self) -> None:
        self._links: list[Link] = []

    @property
    def links(self) -> tuple[Link, ...]:
        """All links, between atoms."""
        return tuple(
            Link(_find(link.left), link.left_indices, _find(link.right), link.right_indices) for link in self._links
        )

    def fresh(self, size: int | None, label: str = "") -> Axis:
        """An axis of its own; size 1 makes the empty product, as a single index is never removed."""
        return Axis(((),)) if size == 1 else Axis.of(Dim(size, label))

    def atoms(self, dims: Iterable[Dim]) -> Term:
        """What a product stands for now: representatives that are not split any further, without those of size 1."""
        out: list[Dim] = []
        for dim in dims:
            root = _find(dim)
            if root._parts is not None:
                out.extend(self.atoms(root._parts))
            elif root.size != 1:
                out.append(root)
        return tuple(out)

    def resolve(self, axis: Axis) -> tuple[Term, ...]:
        """The axis as terms of atoms."""
        return tuple(self.atoms(term) for term in axis.terms)

    def size(self, axis: Axis) -> int | None:
        """Number of indices, None if unknown."""
        sizes = [_product(term) for term in self.resolve(axis)]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def merge(self, axes: Sequence[Axis]) -> Axis | None:
        """The row-major merge of neighbouring axes, as Flatten makes it; None if a concatenation is among several."""
        axes = [axis for axis in axes if self.resolve(axis) != ((),)]
        if len(axes) == 1:
            return axes[0]
        if any(len(axis.terms) != 1 for axis in axes):
            return None
        return Axis.of(*(dim for axis in axes for dim in axis.terms[0]))

    def digits(self, axis: Axis) -> list[tuple[Dim, Indices]]:
        """For each occurrence of an atom in an axis of known size, the element that each index has there, or -1.

        Returns:
            `(atom, elements [size])` pairs; indices outside of the atom's term have -1.
        """
        total = self.size(axis)
        if total is None:
            raise ValueError("an axis of unknown size has no indices to list")
        out: list[tuple[Dim, Indices]] = []
        start = 0
        for term in self.resolve(axis):
            sizes = tuple(dim.size or 1 for dim in term)
            count = math.prod(sizes)
            for dim, digit in zip(term, np.unravel_index(np.arange(count), sizes) if sizes else (), strict=True):
                elements = np.full(total, -1, np.int64)
                elements[start : start + count] = digit
                out.append((dim, elements))
            start += count
        return out

    def join(self, left: Axis, right: Axis) -> str | None:
        """Makes index i of both axes live and die together, for every i.

        Returns:
            None, or the reason why that cannot be stated; Dims may be split finer than before then, which is harmless,
            and the caller has to pin both axes.
        """
        terms = self.resolve(left), self.resolve(right)
        if terms[0] == terms[1]:
            return None
        if not _known(terms[0]) and not _known(terms[1]):
            return None  # nothing removable on either side
        sizes = self.size(left), self.size(right)
        if None in sizes:
            return "meets an axis of unknown size"
        if sizes[0] != sizes[1]:
            return f"sizes {sizes[0]} and {sizes[1]} differ"
        for block in _blocks(*terms):
            if reason := self._join_block(*block):
                return reason
        return None

    def link(self, left: Dim, left_indices: Indices, right: Dim, right_indices: Indices) -> str | None:
        """Ties elements of two atoms; returns the reason where one of the Dims is split into factors."""
        pair = self.atoms((left,)), self.atoms((right,))
        if len(pair[0]) != 1 or len(pair[1]) != 1:
            return "part of an axis meets a merged axis"
        self._links.append(Link(pair[0][0], left_indices, pair[1][0], right_indices))
        return None

    def _join_block(self, left: tuple[Term, ...], right: tuple[Term, ...]) -> str | None:
        if len(left) == 1 and len(right) == 1:
            return self._join_products(left[0], right[0])
        for term, (start, stop) in zip(left, _spans(left), strict=True):
            for other, (other_start, other_stop) in zip(right, _spans(right), strict=True):
                common = np.arange(max(start, other_start), min(stop, other_stop), dtype=np.int64)
                if not common.size:
                    continue
                if len(term) != 1 or len(other) != 1:
                    return "part of an axis meets a merged axis"
                if reason := self.link(term[0], common - start, other[0], common - other_start):
                    return reason
        return None

    def _join_products(self, left: Term, right: Term) -> str | None:
        bounds = sorted({*_bounds(left), *_bounds(right)})
        for inner, outer in itertools.pairwise(bounds):
            if outer % inner:
                return f"incompatible factorisations {inner} and {outer}"
        while True:  # a split may reach the other factors too, so look again after each
            left, right = self.atoms(left), self.atoms(right)
            split = next((s for term in (left, right) if (s := _next_split(term, bounds))), None)
            if split is None:
                break
            if reason := self._split(*split):
                return reason
        for one, other in zip(left, right, strict=True):
            _union(one, other)
        return None

    def _split(self, atom: Dim, inner: int) -> str | None:
        """Splits an atom into `(size / inner, inner)`, and with it every atom that is linked to it slab by slab."""
        closure, queue = {id(atom): atom}, [atom]
        touched: list[Link] = []
        while queue:
            current = queue.pop()
            if current.size is None or current.size % inner:
                return f"incompatible factorisations {inner} and {current.size}"
            if current.size == inner:  # a slab tied to all of a Dim: what is left of it would be no Dim at all
                return f"a range of the axis is tied to all {inner} of another one"
            for link in self.links:
                if current is not link.left and current is not link.right:
                    continue
                if not _slab_by_slab(link, inner):
                    return f"a range of the axis is tied to another one across blocks of {inner}"
                touched.append(link)
                for other in (link.left, link.right):
                    if id(other) not in closure:
                        closure[id(other)] = other
                        queue.append(other)
        for dim in closure.values():
            dim._parts = Dim((dim.size or 0) // inner, dim.label), Dim(inner, dim.label)
        kept = [link for link in self.links if id(link.left) not in closure and id(link.right) not in closure]
        self._links = kept + [_outer_link(link, inner) for link in _distinct(touched)]
        for link in touched:
            _union(_parts_of(link.left)[1], _parts_of(link.right)[1])
        return None


def _find(dim: Dim) -> Dim:
    root = dim
    while root._parent is not None:
        root = root._parent
    while dim is not root:
        dim._parent, dim = root, dim._parent or root
    return root


def _union(one: Dim, other: Dim) -> None:
    one, other = _find(one), _find(other)
    if one is not other:
        other._parent = one
        one.label = one.label or other.label


def _parts_of(dim: Dim) -> tuple[Dim, Dim]:
    if dim._parts is None:
        raise ValueError("this Dim is not split")
    return dim._parts


def _product(term: Term) -> int | None:
    sizes = [dim.size for dim in term]
    return None if None in sizes else math.prod(size for size in sizes if size is not None)


def _known(terms: tuple[Term, ...]) -> bool:
    return any(dim.size is not None for term in terms for dim in term)


def _bounds(term: Term) -> list[int]:
    """The running products from the innermost factor on: 2 x 3 x 4 -> 1, 4, 12, 24."""
    out = [1]
    for dim in reversed(term):
        out.append(out[-1] * (dim.size or 1))
    return out


def _next_split(term: Term, bounds: Sequence[int]) -> tuple[Dim, int] | None:
    """The first factor with a bound strictly inside, and the inner size to split it at."""
    inner = 1
    for dim in reversed(term):
        outer = inner * (dim.size or 1)
        cut = next((bound for bound in bounds if inner < bound < outer), None)
        if cut is not None:
            return dim, cut // inner
        inner = outer
    return None


def _spans(terms: tuple[Term, ...]) -> list[tuple[int, int]]:
    out, start = [], 0
    for term in terms:
        stop = start + (_product(term) or 0)
        out.append((start, stop))
        start = stop
    return out


def _blocks(left: tuple[Term, ...], right: tuple[Term, ...]) -> list[tuple[tuple[Term, ...], tuple[Term, ...]]]:
    """Both sums cut at the offsets at which both have a boundary."""
    ends = [stop for _, stop in _spans(left)], [stop for _, stop in _spans(right)]
    out, done = [], (0, 0)
    for stop in sorted({*ends[0]} & {*ends[1]}):
        upto = ends[0].index(stop) + 1, ends[1].index(stop) + 1
        out.append((left[done[0] : upto[0]], right[done[1] : upto[1]]))
        done = upto
    return out


def _slab_by_slab(link: Link, inner: int) -> bool:
    """Whether the link ties whole slabs of `inner` elements to whole slabs, in order."""
    for indices in (link.left_indices, link.right_indices):
        if indices.size % inner:
            return False
        slabs = indices.reshape(-1, inner)
        if (slabs[:, 0] % inner).any() or (slabs != slabs[:, :1] + np.arange(inner)).any():
            return False
    return True


def _outer_link(link: Link, inner: int) -> Link:
    left, right = _parts_of(link.left)[0], _parts_of(link.right)[0]
    return Link(left, link.left_indices[::inner] // inner, right, link.right_indices[::inner] // inner)


def _distinct(links: list[Link]) -> list[Link]:
    seen: set[tuple[int, int, bytes, bytes]] = set()
    out = []
    for link in links:
        key = id(link.left), id(link.right), link.left_indices.tobytes(), link.right_indices.tobytes()
        if key not in seen:
            seen.add(key)
            out.append(link)
    return out
