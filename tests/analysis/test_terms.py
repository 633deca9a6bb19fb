"""Sums of products read in full: sizes, the order of factors, and what each index hangs on."""

from __future__ import annotations

from spa_compiler.analysis.axes import Axes
from spa_compiler.analysis.terms import Axis, Dim
from tests.analysis.forms import agree, factor_form, form, product


def test_size_one_has_no_dims() -> None:
    axes = Axes()
    assert axes.resolve(axes.fresh(1)) == ((),)
    assert axes.size(axes.fresh(1)) == 1
    assert form(axes, product(1, 3, 1)) == 3


def test_nested_sums() -> None:
    """What all terms end with stands behind the sum, so that it can meet the Dims of a plain product."""
    axes = Axes()
    p, a, b, q = axes.fresh(2), axes.fresh(3), axes.fresh(5), axes.fresh(4)
    inner = axes.concat([axes.merge([a, q]), axes.merge([b, q])])
    whole = axes.merge([p, inner])
    assert form(axes, whole) == (2, [3, 5], 4)
    plain = product(2, 8, 4)
    assert axes.join(plain, whole) is None
    assert form(axes, plain) == (2, [3, 5], 4)
    assert agree(axes, plain, whole)


def test_a_sum_in_front_is_spread_out() -> None:
    axes = Axes()
    a, b, q = axes.fresh(3), axes.fresh(5), axes.fresh(4)
    assert form(axes, axes.merge([axes.concat([a, b]), q])) == [(3, 4), (5, 4)]
    assert agree(axes, axes.merge([axes.concat([a, b]), q]), axes.concat([axes.merge([a, q]), axes.merge([b, q])]))


def test_a_repeated_sum_is_a_product() -> None:
    axes = Axes()
    p, a, b = axes.fresh(2), axes.fresh(3), axes.fresh(5)
    inner = axes.concat([a, b, a, b])
    whole = axes.merge([p, inner])
    (term,) = axes.resolve(whole)
    assert [factor_form(factor) for factor in term] == [2, [(), ()], [3, 5]]
    assert agree(axes, whole, axes.concat([inner, inner])) is False  # rows of p are elements of their own
    assert axes.size(whole) == 32


def test_elements_of_products_and_sums() -> None:
    axes = Axes()
    a, b = Dim(2), Dim(3)
    offset = {id(a): 0, id(b): 10}
    assert axes.elements(Axis(((a, b), (a,))), offset).tolist() == [
        [0, 0, 0, 1, 1, 1, 0, 1],
        [10, 11, 12, 10, 11, 12, -1, -1],
    ]
    assert axes.elements(Axis.of(b, Axis(((), (a,)))), offset).tolist() == [
        [10, 10, 10, 11, 11, 11, 12, 12, 12],
        [-1, 0, 1] * 3,
    ]
    assert axes.elements(axes.fresh(1), {}).shape == (0, 1)
