"""What an axis is made of: a sum of products of Dims, read in full, whatever its Dims were defined as.

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


@dataclass(eq=False, slots=True)
class Dim:
    """One factor of an axis. `size` is None where the file does not state it; such a Dim is never removable.

    `label` says what one of it is where that is no plain channel ("conv group", ...), `second` its size in the second
    binding of the inputs' open dimensions where that is known. Two Dims that were joined are one class: `parent`
    leads to the Dim that stands for it, and `meaning` is that one's definition, None as long as it is an atom.
    """

    size: int | None
    label: str = ""
    second: int | None = None
    parent: Dim | None = None
    meaning: Axis | None = None


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


def find(dim: Dim) -> Dim:
    """The Dim that stands for the class."""
    root = dim
    while root.parent is not None:
        root = root.parent
    while dim is not root:
        dim.parent, dim = root, dim.parent or root
    return root


def spread(term: Term) -> tuple[Term, ...]:
    """A term as a sum of terms in which only factors behind the first are sums."""
    factors = _flat(term)
    if factors and isinstance(factors[0], Axis):
        rest = factors[1:]
        return tuple(
            itertools.chain.from_iterable([(*first, *rest)] if first else spread(rest) for first in factors[0].terms)
        )
    return (factors,)


def _flat(term: Term) -> Term:
    """The factors with definitions put in, products of products undone, factors of size 1 left out."""
    out: list[Factor] = []
    for factor in term:
        if isinstance(factor, Dim):
            root = find(factor)
            if root.meaning is None:
                if root.size != 1:
                    out.append(root)
                continue
            root.meaning = factor = summed(root.meaning)  # written back, so that chains of definitions stay short
        else:
            factor = summed(factor)
        if len(factor.terms) == 1:
            out.extend(factor.terms[0])
        else:
            out.extend(_nested(factor) if out else [factor])
    return tuple(out)


def summed(axis: Axis) -> Axis:
    """A sum with each of its terms in full."""
    return Axis(tuple(itertools.chain.from_iterable(spread(term) for term in axis.terms)))


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


def product_form(axis: Axis) -> Term:
    """The factors of an axis, the first of them possibly a sum."""
    factors = _flat((axis,))
    if factors and isinstance(factors[0], Axis):
        return (*_nested(factors[0]), *factors[1:])
    return factors


def _same_factor(one: Factor, other: Factor) -> bool:
    if isinstance(one, Axis) and isinstance(other, Axis):
        return same(one.terms, other.terms)
    return one is other


def same(left: Sequence[Term], right: Sequence[Term]) -> bool:
    """Whether two sums, each in full, have the same atoms at the same places."""
    return len(left) == len(right) and all(
        len(one) == len(other) and all(map(_same_factor, one, other)) for one, other in zip(left, right, strict=True)
    )


def leaves(term: Term) -> Iterator[Dim]:
    """The Dims of a term, at any depth, as they stand there."""
    for factor in term:
        if isinstance(factor, Dim):
            yield factor
        else:
            for inner in factor.terms:
                yield from leaves(inner)


def factor_size(factor: Factor) -> int:
    """The size of a factor of an axis whose size is known."""
    return (find(factor).size if isinstance(factor, Dim) else size_of(factor)) or 1


def term_size(term: Term) -> int:
    """The size of a term of an axis whose size is known."""
    return math.prod(factor_size(factor) for factor in term)


def size_of(axis: Axis) -> int | None:
    """Number of indices, None if unknown."""
    total = 0
    for term in axis.terms:
        count = 1
        for factor in term:
            size = find(factor).size if isinstance(factor, Dim) else size_of(factor)
            if size is None:
                return None
            count *= size
        total += count
    return total


def second_of(terms: Iterable[Term]) -> int | None:
    """The size of a sum of terms, in full, in the second binding; None if unknown."""
    total = 0
    for term in terms:
        count = 1
        for factor in term:
            size = factor.second if isinstance(factor, Dim) else second_of(factor.terms)
            if size is None:
                return None
            count *= size
        total += count
    return total


def spans(terms: Sequence[Term]) -> list[tuple[int, int]]:
    """Where each term of a sum starts and stops."""
    stops = list(itertools.accumulate(term_size(term) for term in terms))
    return list(zip([0, *stops], stops, strict=False))


def elements_of(terms: Sequence[Term], offset: Mapping[int, int]) -> Indices:
    """See `Axes.elements`; the terms are in full."""
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
    count = term_size(term)
    if len(term) == 1 and isinstance(term[0], Dim):
        return np.arange(offset[id(term[0])], offset[id(term[0])] + count, dtype=np.int64)[None]
    positions = np.arange(count, dtype=np.int64)
    rows, inner = [], count
    for factor in term:
        size = factor_size(factor)
        inner //= size
        digit = (positions // inner) % size
        if isinstance(factor, Dim):
            rows.append(offset[id(factor)] + digit[None])
        else:
            rows.append(elements_of(summed(factor).terms, offset)[:, digit])
    return np.concatenate(rows) if rows else np.full((0, count), -1, np.int64)
