"""The algebra of axes: what an axis is made of, and which parts of two axes live and die together.

An axis is a *sum of products* of Dims, in row-major order: `A` is plain, `(A, B)` merged (index `i * |B| + j`), `A + B`
a concatenation; a factor may be a sum again: `(H, A + B)`. Deleting element `i` of a Dim deletes slab `i` of that
factor wherever the Dim occurs, so an index of a merged axis goes as soon as any of its digits goes.

Joining two axes makes index `i` of both live and die together, for every `i`. Dims that meet are made one (union-find).
Where the axes are cut differently, the coarser Dims are *defined* by finer ones, as a product or as a sum, and the
definition holds at once wherever the Dim occurs: joining `C` with `(G, A)` turns every `C` of the model into `(G, A)`,
joining it with `A + B` turns it into `A + B`. Definitions only ever refine Dims that have none, so this ends.
What no definition can say (a permutation, a repeated index) is said by Links between single indices.

    (A + B, Q) = (A, Q) + (B, Q)      a sum in front is spread out: both are the same indices in the same order
    (P, A Q + B Q) = (P, A + B, Q)    further in, what all terms end with is taken out, so that it can meet other Dims
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Indices: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
"""`[n]` positions in a Dim or an axis."""

_MERGED = "part of an axis meets a merged axis"


class Incompatible(Exception):
    """Two axes cannot be brought together; the message is the reason that users see."""


@dataclass(eq=False, slots=True)
class Dim:
    """One factor of an axis. `size` is None where the file does not state it; such a Dim is never removable.

    `label` says what one of it is where that is no plain channel ("conv group", ...), `second` its size in the second
    binding of the inputs' open dimensions where that is known. Two Dims that were joined are one class; always go
    through `Axes` to see what a Dim stands for now.
    """

    size: int | None
    label: str = ""
    second: int | None = None
    _parent: Dim | None = None
    _meaning: Axis | None = None


@dataclass(frozen=True, eq=False)
class Axis:
    """A sum of products: an ordered concatenation of terms. The empty product is an axis of size 1."""

    terms: tuple[Term, ...]

    @classmethod
    def of(cls, *factors: Factor) -> Axis:
        """The product of `factors`, outermost first."""
        return cls((tuple(factors),))


Factor: TypeAlias = Dim | Axis
Term: TypeAlias = tuple[Factor, ...]
"""A product, outermost factor first."""


@dataclass(frozen=True, eq=False)
class Link:
    """Index `left_indices[k]` of `left` and index `right_indices[k]` of `right` live and die together."""

    left: Axis
    left_indices: Indices
    right: Axis
    right_indices: Indices
    origin: str = ""


class Axes:
    """All Dims of a graph, what they stand for, and the Links between them."""

    def __init__(self) -> None:
        self.links: list[Link] = []

    def fresh(self, size: int | None, label: str = "") -> Axis:
        """An axis of its own; size 1 makes the empty product, as a single index is never removed."""
        return Axis(((),)) if size == 1 else Axis.of(Dim(size, label))

    def resolve(self, axis: Axis) -> tuple[Term, ...]:
        """The axis as terms of atoms and, behind the first factor, of nested sums: what it stands for now."""
        return tuple(itertools.chain.from_iterable(_spread(term) for term in axis.terms))

    def atoms(self, axis: Axis) -> Iterator[Dim]:
        """Every atom on the axis, at any depth, possibly more than once."""
        for term in self.resolve(axis):
            yield from _leaves(term)

    def size(self, axis: Axis) -> int | None:
        """Number of indices, None if unknown."""
        return _size(axis)

    def second(self, axis: Axis) -> int | None:
        """The size in the second binding, None if that of some Dim on it is unknown."""
        return _second(self.resolve(axis))

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
            rest = _second((tuple(factor for factor in terms[0] if factor is not lone[0]),))
            if rest and size % rest == 0:
                lone[0].second = size // rest

    def merge(self, axes: Sequence[Axis]) -> Axis:
        """The row-major merge of neighbouring axes, as Flatten makes it."""
        return axes[0] if len(axes) == 1 else Axis((tuple(axes),))

    def concat(self, axes: Sequence[Axis]) -> Axis:
        """The axes one after another; empty ones are left out."""
        filled = [axis for axis in axes if _size(axis) != 0] or axes[:1]
        return Axis(tuple(term for axis in filled for term in axis.terms))

    def factor(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """The axis as neighbouring axes of these sizes, outermost first; Dims are split where a boundary needs it.

        Raises:
            Incompatible: a boundary cuts through a sum, or does not fit an earlier split.
        """
        if 0 in sizes:
            return [self.fresh(size) for size in sizes]
        bounds = {math.prod(sizes[place:]) for place in range(len(sizes))}
        factors = _split_at(axis, bounds)
        out, rest = [], list(factors)
        for size in sizes:
            own: list[Factor] = []
            while math.prod(_factor_size(factor) for factor in own) < size:
                own.append(rest.pop(0))
            out.append(Axis.of(*own))
        return out

    def split(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """The axis as consecutive pieces of these sizes; Dims are split where a boundary needs it.

        Raises:
            Incompatible: a boundary cuts through a merged axis.
        """
        stops = list(itertools.accumulate(sizes))
        terms = _cut_at(axis, stops[:-1])
        out = []
        for start, stop in zip([0, *stops], stops, strict=False):
            own = [t for t, (low, high) in zip(terms, _spans(terms), strict=True) if start <= low and high <= stop]
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
        sizes = _size(left), _size(right)
        if sizes == (None, None):
            return None if self.resolve(left) == self.resolve(right) or not self._known(left, right) else _UNKNOWN
        if None in sizes:
            return _UNKNOWN
        if sizes[0] != sizes[1]:
            return f"sizes {sizes[0]} and {sizes[1]} differ"
        if sizes[0] == 0:
            return None
        try:
            _unify(left, right)
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
        return _elements(self.resolve(axis), offset)

    def _known(self, *axes: Axis) -> bool:
        return any(atom.size is not None for axis in axes for atom in self.atoms(axis))


_UNKNOWN = "meets an axis of unknown size"


def _find(dim: Dim) -> Dim:
    root = dim
    while root._parent is not None:
        root = root._parent
    while dim is not root:
        dim._parent, dim = root, dim._parent or root
    return root


def _spread(term: Term) -> tuple[Term, ...]:
    """A term as a sum of terms in which only factors behind the first are sums."""
    factors = _flat(term)
    if factors and isinstance(factors[0], Axis):
        rest = factors[1:]
        return tuple(
            itertools.chain.from_iterable([(*first, *rest)] if first else _spread(rest) for first in factors[0].terms)
        )
    return (factors,)


def _flat(term: Term) -> Term:
    """The factors with definitions put in, products of products undone, factors of size 1 left out."""
    out: list[Factor] = []
    for factor in term:
        if isinstance(factor, Dim):
            root = _find(factor)
            if root._meaning is None:
                if root.size != 1:
                    out.append(root)
                continue
            root._meaning = factor = _sum(root._meaning)  # written back, so that chains of definitions stay short
        else:
            factor = _sum(factor)
        if len(factor.terms) == 1:
            out.extend(factor.terms[0])
        else:
            out.extend(_nested(factor) if out else [factor])
    return tuple(out)


def _sum(axis: Axis) -> Axis:
    """A sum with each of its terms in full."""
    return Axis(tuple(itertools.chain.from_iterable(_spread(term) for term in axis.terms)))


def _nested(axis: Axis) -> Term:
    """A sum with its terms in full as a factor: what all of them end with stands behind it."""
    terms = [list(term) for term in axis.terms]
    common: list[Factor] = []
    while all(terms) and all(_same_factor(term[-1], terms[0][-1]) for term in terms):
        common.insert(0, terms[0][-1])
        for term in terms:
            term.pop()
    left = tuple(tuple(term) for term in terms)
    period = next(p for p in range(1, len(left) + 1) if len(left) % p == 0 and left == left[:p] * (len(left) // p))
    if 1 < period < len(left):
        return (Axis(((),) * (len(left) // period)), Axis(left[:period]), *common)
    return (Axis(left), *common)


def _product_form(axis: Axis) -> Term:
    """The factors of an axis, the first of them possibly a sum."""
    factors = _flat((axis,))
    if factors and isinstance(factors[0], Axis):
        return (*_nested(factors[0]), *factors[1:])
    return factors


def _same_factor(one: Factor, other: Factor) -> bool:
    if isinstance(one, Axis) and isinstance(other, Axis):
        return _same(one.terms, other.terms)
    return one is other


def _same(left: Sequence[Term], right: Sequence[Term]) -> bool:
    return len(left) == len(right) and all(
        len(one) == len(other) and all(map(_same_factor, one, other)) for one, other in zip(left, right, strict=True)
    )


def _leaves(term: Term) -> Iterator[Dim]:
    for factor in term:
        if isinstance(factor, Dim):
            yield factor
        else:
            for inner in factor.terms:
                yield from _leaves(inner)


def _factor_size(factor: Factor) -> int:
    """The size of a factor of an axis whose size is known."""
    return (_find(factor).size if isinstance(factor, Dim) else _size(factor)) or 1


def _term_size(term: Term) -> int:
    return math.prod(_factor_size(factor) for factor in term)


def _size(axis: Axis) -> int | None:
    total = 0
    for term in axis.terms:
        count = 1
        for factor in term:
            size = _find(factor).size if isinstance(factor, Dim) else _size(factor)
            if size is None:
                return None
            count *= size
        total += count
    return total


def _second(terms: Iterable[Term]) -> int | None:
    """As `_size`, in the second binding."""
    total = 0
    for term in terms:
        count = 1
        for factor in term:
            size = factor.second if isinstance(factor, Dim) else _second(factor.terms)
            if size is None:
                return None
            count *= size
        total += count
    return total


def _spans(terms: Sequence[Term]) -> list[tuple[int, int]]:
    stops = list(itertools.accumulate(_term_size(term) for term in terms))
    return list(zip([0, *stops], stops, strict=False))


def _unify(left: Axis, right: Axis) -> None:
    terms = _sum(left).terms, _sum(right).terms
    if _same(*terms):
        return
    for own, meaning in (terms, terms[::-1]):
        alone = own[0][0] if len(own) == 1 and len(own[0]) == 1 else None
        if isinstance(alone, Dim):
            _define(alone, Axis(meaning))
            return
    if len(terms[0]) == len(terms[1]) == 1:
        _unify_products(terms[0][0], terms[1][0])
        return
    while len(stops := {tuple(stop for _, stop in _spans(side)) for side in terms}) > 1:
        inner = sorted(set(itertools.chain.from_iterable(stops)))[:-1]
        terms = _cut_at(left, inner), _cut_at(right, inner)  # cutting one may cut the other too, so look again
        terms = _sum(left).terms, _sum(right).terms
    for one, other in zip(*terms, strict=True):
        _unify(Axis((one,)), Axis((other,)))


def _define(dim: Dim, meaning: Axis) -> None:
    """A Dim without a definition gets one, or becomes one with another such Dim."""
    if len(meaning.terms) == 1 and len(meaning.terms[0]) == 1 and isinstance(meaning.terms[0][0], Dim):
        other = meaning.terms[0][0]
        dim._parent = other
        other.label = other.label or dim.label
        other.second = dim.second if other.second is None else other.second
        return
    dim._meaning = meaning
    if dim.label:
        for term in meaning.terms:
            for atom in _leaves(term):
                atom.label = atom.label or dim.label


def _unify_products(left: Term, right: Term) -> None:
    bounds = _bounds(left) | _bounds(right)
    one, other = Axis((left,)), Axis((right,))
    while True:  # splitting one may split the other too, so look again
        for inner, outer in itertools.pairwise(sorted(bounds)):
            if outer % inner:
                raise Incompatible(f"incompatible factorisations {inner} and {outer}")
        _split_at(one, bounds)
        _split_at(other, bounds)
        ours, theirs = _product_form(one), _product_form(other)
        both = _bounds(ours) | _bounds(theirs)
        if _bounds(ours) == _bounds(theirs):
            break
        bounds = both
    for left_factor, right_factor in zip(ours, theirs, strict=True):
        _unify(Axis.of(left_factor), Axis.of(right_factor))


def _bounds(term: Term) -> set[int]:
    """The running products from the innermost factor on: 2 x 3 x 4 -> 1, 4, 12, 24."""
    out = [1]
    for factor in reversed(term):
        out.append(out[-1] * _factor_size(factor))
    return set(out)


def _split_at(axis: Axis, bounds: Iterable[int]) -> Term:
    """Splits the factors of an axis, seen as a product, until every bound is one of its running products."""
    wanted = sorted(bounds)
    while True:
        term = _product_form(axis)
        inner = 1
        for factor in reversed(term):
            outer = inner * _factor_size(factor)
            cut = next((bound for bound in wanted if inner < bound < outer), None)
            if cut is not None:
                if cut % inner or outer % cut:
                    raise Incompatible(f"incompatible factorisations {inner if cut % inner else outer} and {cut}")
                _split_factor(factor, cut // inner)
                if _bounds(_product_form(axis)) == _bounds(term):
                    raise Incompatible(f"blocks of {cut} do not fit a concatenated axis")
                break
            inner = outer
        else:
            return term


def _split_factor(factor: Factor, inner: int) -> None:
    """Makes `inner` a bound of the factor: a Dim becomes a product, in a sum every term is split and their inner parts
    become one.
    """
    if isinstance(factor, Dim):
        size = factor.size or 0
        _define(factor, Axis.of(_part(factor, size // inner), _part(factor, inner)))
        return
    for term in factor.terms:
        if _term_size(term) % inner:
            raise Incompatible(f"blocks of {inner} do not fit a concatenated axis")
    tails = []
    for term in factor.terms:
        whole = _split_at(Axis((term,)), {inner})
        tail: list[Factor] = []
        while _term_size(tuple(tail)) < inner:
            tail.insert(0, whole[len(whole) - len(tail) - 1])
        tails.append(Axis.of(*tail))
    for tail_axis in tails[1:]:
        _unify(tails[0], tail_axis)


def _cut_at(axis: Axis, offsets: Sequence[int]) -> tuple[Term, ...]:
    """Cuts terms until every offset is a boundary between two; returns the terms."""
    for offset in offsets:
        terms = _sum(axis).terms
        for term, (low, high) in zip(terms, _spans(terms), strict=True):
            if low < offset < high:
                _cut_term(term, offset - low)
                break
    terms = _sum(axis).terms
    if not set(offsets) <= {stop for _, stop in _spans(terms)} | {0}:
        raise Incompatible(_MERGED)
    return terms


def _cut_term(term: Term, offset: int) -> None:
    inner = _term_size(term[1:])
    head = term[0]
    if offset % inner or not isinstance(head, Dim):
        raise Incompatible(_MERGED)
    at = offset // inner
    _define(head, Axis(((_part(head, at),), (_part(head, (head.size or 0) - at),))))


def _part(dim: Dim, size: int) -> Dim:
    """A new Dim for a part of a Dim; of one that has the same size in both bindings, every part has."""
    return Dim(size, dim.label, size if dim.second == dim.size else None)


def _elements(terms: Sequence[Term], offset: Mapping[int, int]) -> Indices:
    blocks = [_term_elements(term, offset) for term in terms]
    if len(blocks) == 1:
        return blocks[0]
    out = np.full((max(map(len, blocks)), sum(block.shape[1] for block in blocks)), -1, np.int64)
    start = 0
    for block in blocks:
        out[: len(block), start : start + block.shape[1]] = block
        start += block.shape[1]
    return out


def _term_elements(term: Term, offset: Mapping[int, int]) -> Indices:
    count = _term_size(term)
    if len(term) == 1 and isinstance(term[0], Dim):
        return np.arange(offset[id(term[0])], offset[id(term[0])] + count, dtype=np.int64)[None]
    positions = np.arange(count, dtype=np.int64)
    rows, inner = [], count
    for factor in term:
        size = _factor_size(factor)
        inner //= size
        digit = (positions // inner) % size
        if isinstance(factor, Dim):
            rows.append(offset[id(factor)] + digit[None])
        else:
            rows.append(_elements(_sum(factor).terms, offset)[:, digit])
    return np.concatenate(rows) if rows else np.full((0, count), -1, np.int64)
