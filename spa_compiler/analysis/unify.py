"""Two axes brought together: Dims that meet become one, and the coarser ones are defined by finer ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from spa_compiler.analysis.terms import (
    Axis,
    Dim,
    Factor,
    Term,
    factor_size,
    leaves,
    product_form,
    same,
    spans,
    summed,
    term_size,
)

_MERGED = "part of an axis meets a merged axis"


class Incompatible(Exception):
    """Two axes cannot be brought together; the message is the reason that users see."""


def unify(left: Axis, right: Axis) -> None:
    """Makes two axes of one size the same sum of products.

    Raises:
        Incompatible: no definition can say that; Dims may be split finer than before then.
    """
    terms = summed(left).terms, summed(right).terms
    if same(*terms):
        return
    for own, meaning in (terms, terms[::-1]):
        alone = own[0][0] if len(own) == 1 and len(own[0]) == 1 else None
        if isinstance(alone, Dim):
            _define(alone, Axis(meaning))
            return
    if len(terms[0]) == len(terms[1]) == 1:
        _unify_products(terms[0][0], terms[1][0])
        return
    while len(stops := {tuple(stop for _, stop in spans(side)) for side in terms}) > 1:
        inner = sorted(set(itertools.chain.from_iterable(stops)))[:-1]
        terms = cut_at(left, inner), cut_at(right, inner)  # cutting one may cut the other too, so look again
        terms = summed(left).terms, summed(right).terms
    for one, other in zip(*terms, strict=True):
        unify(Axis((one,)), Axis((other,)))


def _define(dim: Dim, meaning: Axis) -> None:
    """A Dim without a definition gets one, or becomes one with another such Dim."""
    if len(meaning.terms) == 1 and len(meaning.terms[0]) == 1 and isinstance(meaning.terms[0][0], Dim):
        other = meaning.terms[0][0]
        dim.parent = other
        other.label = other.label or dim.label
        other.second = dim.second if other.second is None else other.second
        return
    dim.meaning = meaning
    if dim.label:
        for term in meaning.terms:
            for atom in leaves(term):
                atom.label = atom.label or dim.label


def _unify_products(left: Term, right: Term) -> None:
    bounds = _bounds(left) | _bounds(right)
    one, other = Axis((left,)), Axis((right,))
    while True:  # splitting one may split the other too, so look again
        for inner, outer in itertools.pairwise(sorted(bounds)):
            if outer % inner:
                raise Incompatible(f"incompatible factorisations {inner} and {outer}")
        split_at(one, bounds)
        split_at(other, bounds)
        ours, theirs = product_form(one), product_form(other)
        both = _bounds(ours) | _bounds(theirs)
        if _bounds(ours) == _bounds(theirs):
            break
        bounds = both
    for left_factor, right_factor in zip(ours, theirs, strict=True):
        unify(Axis.of(left_factor), Axis.of(right_factor))


def _bounds(term: Term) -> set[int]:
    """The running products from the innermost factor on: 2 x 3 x 4 -> 1, 4, 12, 24."""
    out = [1]
    for factor in reversed(term):
        out.append(out[-1] * factor_size(factor))
    return set(out)


def split_at(axis: Axis, bounds: Iterable[int]) -> Term:
    """Splits the factors of an axis, seen as a product, until every bound is one of its running products.

    Returns:
        The factors.
    """
    wanted = sorted(bounds)
    while True:
        term = product_form(axis)
        inner = 1
        for factor in reversed(term):
            outer = inner * factor_size(factor)
            cut = next((bound for bound in wanted if inner < bound < outer), None)
            if cut is not None:
                if cut % inner or outer % cut:
                    raise Incompatible(f"incompatible factorisations {inner if cut % inner else outer} and {cut}")
                _split_factor(factor, cut // inner)
                if _bounds(product_form(axis)) == _bounds(term):
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
        if term_size(term) % inner:
            raise Incompatible(f"blocks of {inner} do not fit a concatenated axis")
    tails = []
    for term in factor.terms:
        whole = split_at(Axis((term,)), {inner})
        tail: list[Factor] = []
        while term_size(tuple(tail)) < inner:
            tail.insert(0, whole[len(whole) - len(tail) - 1])
        tails.append(Axis.of(*tail))
    for tail_axis in tails[1:]:
        unify(tails[0], tail_axis)


def cut_at(axis: Axis, offsets: Sequence[int]) -> tuple[Term, ...]:
    """Cuts terms until every offset is a boundary between two; returns the terms."""
    for offset in offsets:
        terms = summed(axis).terms
        for term, (low, high) in zip(terms, spans(terms), strict=True):
            if low < offset < high:
                _cut_term(term, offset - low)
                break
    terms = summed(axis).terms
    if not set(offsets) <= {stop for _, stop in spans(terms)} | {0}:
        raise Incompatible(_MERGED)
    return terms


def _cut_term(term: Term, offset: int) -> None:
    inner = term_size(term[1:])
    head = term[0]
    if offset % inner or not isinstance(head, Dim):
        raise Incompatible(_MERGED)
    at = offset // inner
    _define(head, Axis(((_part(head, at),), (_part(head, (head.size or 0) - at),))))


def _part(dim: Dim, size: int) -> Dim:
    """A new Dim for a part of a Dim; of one that has the same size in both bindings, every part has."""
    return Dim(size, dim.label, size if dim.second == dim.size else None)
