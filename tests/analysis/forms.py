"""Axes told as plain sizes, and by the elements that their indices hang on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from spa_compiler.analysis.axes import Axes
from spa_compiler.analysis.terms import Axis, Dim, Factor

Form: TypeAlias = "int | tuple[Form, ...] | list[Form]"
"""Sizes of an axis as it stands: a Dim is a number, a product a tuple, a sum a list."""


def form(axes: Axes, axis: Axis) -> Form:
    """An axis with its definitions put in."""
    return _sum([[factor_form(factor) for factor in term] for term in axes.resolve(axis)])


def _sum(terms: Sequence[Sequence[Form]]) -> Form:
    products: list[Form] = [term[0] if len(term) == 1 else tuple(term) for term in terms]
    return products[0] if len(products) == 1 else products


def factor_form(factor: Factor) -> Form:
    """The same of one factor."""
    if isinstance(factor, Dim):
        return factor.size or 0
    return _sum([[factor_form(inner) for inner in term] for term in factor.terms])


def hangs_on(axes: Axes, *several: Axis) -> list[list[set[int]]]:
    """For each axis and each of its indices, the elements that it hangs on."""
    offset: dict[int, int] = {}
    total = 0
    for axis in several:
        for atom in axes.atoms(axis):
            if id(atom) not in offset:
                offset[id(atom)] = total
                total += atom.size or 0
    out = []
    for axis in several:
        elements = axes.elements(axis, offset)
        assert elements.shape[1] == axes.size(axis)
        out.append([set(column[column >= 0].tolist()) for column in elements.T])
    return out


def agree(axes: Axes, *several: Axis) -> bool:
    """Whether every index of all these axes lives and dies together."""
    first, *others = hangs_on(axes, *several)
    return all(first == other for other in others)


def product(*sizes: int) -> Axis:
    """New Dims, merged."""
    return Axis.of(*(Dim(size) for size in sizes))
