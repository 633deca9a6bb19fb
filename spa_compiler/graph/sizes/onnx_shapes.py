"""Shapes of ONNX's own operators, written by hand where onnx's inference is weak or has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from onnx import TensorProto

from spa_compiler.graph.sizes.dims import broadcast, product, reshaped
from spa_compiler.graph.sizes.inference import infer
from spa_compiler.graph.sizes.known import Dims, Known, Misfit, Op
from spa_compiler.graph.sizes.operands import ints, slices

Rule: TypeAlias = Callable[[Op, list[Known]], list[Known]]
"""A node and what is known of its inputs -> what is known of its outputs, the last ones left out if nothing is."""


def _reshape_shape(op: Op, given: list[Known]) -> Dims | None:
    data, target = given[0].shape, given[1]
    if target.value is None:
        length = target.shape[0] if target.shape else None
        return None if length is None else (None,) * length
    sizes = ints(target.value)
    if data is None:
        return tuple(size if size > 0 else None for size in sizes)
    return reshaped(data, sizes, bool(op.attr("allowzero", 0)))


def _expand_shape(_: Op, given: list[Known]) -> Dims | None:
    data, target = given[0].shape, given[1]
    if data is None or not target.shape or target.shape[0] is None:
        return None
    sizes: Dims = (None,) * target.shape[0] if target.value is None else ints(target.value)
    return broadcast(data, sizes)


def _slice_shape(op: Op, given: list[Known]) -> Dims | None:
    """Where a start or an end is not known, the other axes still are."""
    data = given[0].shape
    if data is None or len(given) < 3:
        return None
    axes = given[3].value if len(given) > 3 else None
    if len(given) > 3 and op.inputs[3] and axes is None:
        return (None,) * len(data)
    steps_known = len(given) < 5 or not op.inputs[4] or given[4].value is not None
    if given[1].value is not None and given[2].value is not None and steps_known:
        cuts = slices(op, [known.value for known in given], len(data))
        return tuple(
            size if cut == slice(None) else None if size is None else len(range(*cut.indices(size)))
            for size, cut in zip(data, cuts, strict=True)
        )
    count = given[1].shape[0] if given[1].shape else None
    touched = ints(axes) if axes is not None else tuple(range(count if count is not None else len(data)))
    wrapped = {axis % len(data) for axis in touched}
    return tuple(None if axis in wrapped else size for axis, size in enumerate(data))


def _einsum_shape(op: Op, given: list[Known]) -> Dims | None:
    """Sizes by letter; an ellipsis stands for axes that broadcast."""
    equation = str(op.attr("equation", "")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    sizes: dict[str, int | None] = {}
    dots: Dims = ()
    for term, known in zip(left.split(","), given, strict=True):
        if known.shape is None:
            return None
        letters = term.replace("...", ".")
        hidden = len(known.shape) - len(letters.replace(".", ""))
        if hidden < 0 or (hidden and "." not in letters):
            raise Misfit(f"{known.shape} for {term}")
        place = 0
        for letter in letters:
            if letter == ".":
                dots = broadcast(dots, known.shape[place : place + hidden])
                place += hidden
                continue
            size = known.shape[place]
            place += 1
            if None not in (size, sizes.get(letter)) and size != sizes[letter] and 1 not in (size, sizes[letter]):
                raise Misfit(f"{letter} is {sizes[letter]} and {size}")
            if sizes.get(letter) in (None, 1):
                sizes[letter] = size
    if not arrow:
        once = sorted(letter for letter in sizes if left.count(letter) == 1)
        right = ("..." if "..." in left else "") + "".join(once)
    result: list[int | None] = []
    for letter in right.replace("...", "."):
        result += dots if letter == "." else [sizes[letter]]
    return tuple(result)


def like(*places: int) -> Rule:
    """Outputs shaped like the first input; `places` are the outputs that are, the others are statistics of rows."""

    def rule(op: Op, given: list[Known]) -> list[Known]:
        data = given[0]
        if data.shape is None:
            return []
        full, reduced = Known(data.elem, data.shape), Known(TensorProto.FLOAT, (*data.shape[:-1], 1))
        return [full if index in places else reduced for index in range(len(op.outputs))]

    return rule


def _first(shape: Callable[[Op, list[Known]], Dims | None]) -> Rule:
    """One output, of the first input's type; onnx's inference where `shape` knows nothing."""

    def rule(op: Op, given: list[Known]) -> list[Known]:
        found = shape(op, given)
        return infer(op, given) if found is None else [Known(given[0].elem, found)]

    return rule


def _floats(_: Op, given: list[Known]) -> list[Known]:
    return [Known(TensorProto.FLOAT, given[0].shape)]


def _extract(_: Op, given: list[Known]) -> list[Known]:
    data, indices = given[0].shape, given[1].shape
    if data is None or indices is None:
        return []
    return [Known(given[0].elem, (*(data[:-1] or (1,)), product(indices)))]


RULES: dict[str, Rule] = {
    "Einsum": _first(_einsum_shape),
    "Expand": _first(_expand_shape),
    "Reshape": _first(_reshape_shape),
    "SimplifiedLayerNormalization": like(0),  # ONNX Runtime's
    "Slice": _first(_slice_shape),
}
"""Of the default domain."""

ML: dict[str, Rule] = {
    "ArrayFeatureExtractor": _extract,
    "Binarizer": like(0),
    "Imputer": like(0),
    "Normalizer": _floats,
    "Scaler": _floats,
}
"""Of ai.onnx.ml: classical machine learning."""
