"""Sizes for the open dimensions of a model's inputs, chosen so that its operators are likely to fit together.

Other choices follow for models that refuse the first: some want sizes that divide by powers of two, or one image size.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from spa_compiler.graph.model import Dim, Model, ValueInfo
from spa_compiler.graph.sizes.known import Dims

Shapes: TypeAlias = Mapping[str, Dims]
"""By input."""


@dataclass(frozen=True)
class _Style:
    """How to choose sizes: `(first binding, second binding)` for each kind of dimension.

    `spread` 2: every open dimension has its own size, so that nothing coincides by chance; 1: unnamed ones of one kind
    are equal; 0: all of one kind are.
    """

    batch: tuple[int, int]
    sequence: tuple[int, int]
    image: tuple[int, int]
    spread: int


_STYLES = (
    _Style((2, 3), (13, 26), (224, 256), 2),
    _Style((2, 3), (13, 26), (224, 256), 1),
    _Style((2, 3), (8, 16), (224, 448), 0),
    _Style((2, 3), (128, 64), (64, 32), 0),
    _Style((2, 3), (5, 4), (384, 299), 0),
    _Style((1, 1), (8, 16), (256, 224), 0),
    _Style((1, 1), (128, 64), (384, 512), 0),
    _Style((1, 1), (1, 1), (299, 299), 0),
)
_SEQUENCE_WORDS = re.compile(r"seq|len|time|token|frame|step|past|cache|total", re.IGNORECASE)
_NEW_WORDS = re.compile(r"seq|len", re.IGNORECASE)
_PAST_WORDS = re.compile(r"past", re.IGNORECASE)
_TOTAL_WORDS = re.compile(r"total", re.IGNORECASE)
_BATCH_WORDS = re.compile(r"batch", re.IGNORECASE)
_BATCHES = ((2, 5, 9), (3, 7, 10))
# Each second choice is larger than the first, so that sums and products of them differ as well; and twice a prime where
# the first is the prime, so that remainders by any smaller number than that prime differ.
_PRIMES = tuple(n for n in range(13, 1500) if all(n % d for d in range(2, math.isqrt(n) + 1)))
_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
}
_BEFORE_CONVOLUTION = frozenset({"Cast", "Sub", "Div", "Mul", "Add", "Pad", "Identity", "BatchNormalization"})


def bindings(model: Model, which: int, given: Mapping[str, tuple[int, ...]], avoid: Shapes) -> Iterator[Shapes]:
    """Shapes of all inputs whose rank is known, the likeliest first; equal symbols have equal sizes.

    Args:
        which: 0 for the first binding, 1 for the second.
        given: stays as it is.
        avoid: sizes of the other binding, to be different from.
    """
    seen: list[Shapes] = []
    for style in _STYLES:
        chosen = _Binding(model, style, which, avoid).shapes(given)
        if chosen not in seen:
            seen.append(chosen)
            yield chosen


class _Binding:
    """Sizes of one binding."""

    def __init__(self, model: Model, style: _Style, which: int, avoid: Shapes) -> None:
        self._model, self._style, self._which, self._avoid = model, style, which, avoid
        self._sizes: dict[str, int] = {}
        self._taken: dict[str, list[int]] = {"batch": [], "sequence": [], "image": []}

    def shapes(self, given: Mapping[str, tuple[int, ...]]) -> dict[str, Dims]:
        """A shape for every input whose rank is known."""
        inputs = self._model.signature.inputs
        for value in inputs:
            for dim, size in zip(value.shape, given.get(value.name, ()), strict=False):
                if isinstance(dim, str):
                    self._sizes.setdefault(dim, size)
        late: list[tuple[str, ValueInfo, int]] = []  # what follows from other sizes
        for value in inputs:
            convolved = _convolution(self._model, value)
            for axis, dim in enumerate(value.shape):
                if isinstance(dim, int) or value.name in given or dim in self._sizes:
                    continue
                if isinstance(dim, str) and (_TOTAL_WORDS.search(dim) or _formula(dim) is not None):
                    late.append((dim, value, axis))
                else:
                    self._sizes[_key(dim, value, axis)] = self._size(dim, value, axis, convolved)
        for dim, value, axis in late:
            if dim not in self._sizes:
                self._sizes[dim] = self._derived(dim) or self._size(dim, value, axis, None)
        return {
            value.name: given[value.name]
            if value.name in given
            else tuple(d if isinstance(d, int) else self._sizes[_key(d, value, i)] for i, d in enumerate(value.shape))
            for value in inputs
            if value.ranked or value.name in given
        }

    def _size(self, dim: Dim, value: ValueInfo, axis: int, convolved: tuple[int, int] | None) -> int:
        if convolved is not None and axis == convolved[0]:
            return convolved[1]
        kind = _kind(dim, value, axis, convolved is not None)
        if kind == "channel":
            return 3
        if self._style.spread == 0 or (self._style.spread == 1 and dim is None):
            return self._base(kind)
        taken, was = self._taken[kind], self._avoid.get(value.name, ())
        unwanted = {size for sizes in self._taken.values() for size in sizes} | {was[axis] if axis < len(was) else None}
        size = next(size for size in self._choices(kind, len(taken)) if size not in unwanted)
        taken.append(size)
        return size

    def _base(self, kind: str) -> int:
        pair: tuple[int, int] = getattr(self._style, kind)
        return pair[self._which]

    def _choices(self, kind: str, count: int) -> Iterator[int]:
        base = self._base(kind)
        if kind == "image":
            yield from range(base + 64 * count, 1 << 20, 64)
        if not count:
            yield base
        if kind == "batch":
            yield from _BATCHES[self._which]
        yield from (prime * (1 + self._which) for prime in _PRIMES)
        yield from range(1501 + self._which, 1 << 20, 2)

    def _derived(self, dim: str) -> int | None:
        """A symbol that is a sum or product of others, or the total of what was and what comes."""
        formula = _formula(dim)
        if formula is not None:
            return _evaluate(formula, self._sizes)
        past = [size for name, size in self._sizes.items() if _PAST_WORDS.search(name)]
        old = (_PAST_WORDS, _TOTAL_WORDS)
        now = [
            size
            for name, size in self._sizes.items()
            if _NEW_WORDS.search(name) and not any(words.search(name) for words in old)
        ]
        return past[0] + (now[0] if now else 1) if past else None


def _key(dim: Dim, value: ValueInfo, axis: int) -> str:
    return dim if isinstance(dim, str) else f"{value.name}\0{axis}"


def _kind(dim: Dim, value: ValueInfo, axis: int, convolved: bool) -> str:
    name = dim if isinstance(dim, str) else ""
    if _BATCH_WORDS.search(name) and not _SEQUENCE_WORDS.search(name):
        return "batch"
    if _SEQUENCE_WORDS.search(name) and not convolved:
        return "sequence"
    if axis == 0:
        return "batch"
    if convolved:
        return "image"
    if len(value.shape) >= 4 and value.dtype.kind == "f":
        return "image" if axis >= 2 else "channel"
    return "sequence"


def _convolution(model: Model, value: ValueInfo) -> tuple[int, int] | None:
    """Channel axis and channel count of an input that goes into a convolution, perhaps through one Transpose."""
    tensor = next((t for t in model.graph.inputs if t.name == value.name), None)
    queue = [] if tensor is None else [(node, 1) for node in tensor.outputs]
    seen: set[int] = set()
    for node, axis in queue:
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.op in ("Conv", "FusedConv") and len(node.inputs) > 1 and node.inputs[1].shape:
            count = node.inputs[1].shape[1]
            return (axis, int(count) * int(node.attrs.get("group", 1))) if isinstance(count, int) else None
        perm = node.attrs.get("perm", ())
        if node.op == "Transpose" and len(perm) > 1:
            queue += [(user, int(perm[1])) for user in node.outputs[0].outputs]
        elif node.op in _BEFORE_CONVOLUTION:
            queue += [(user, axis) for user in node.outputs[0].outputs]
    return None


def _formula(symbol: str) -> ast.BinOp | None:
    """A symbol that is written as a sum or a product of others: `past_length + 1`."""
    try:
        tree = ast.parse(symbol, mode="eval").body
    except (SyntaxError, ValueError):
        return None
    return tree if isinstance(tree, ast.BinOp) else None


def _evaluate(formula: ast.expr, sizes: Mapping[str, int]) -> int | None:
    """Its value, if all symbols' are known and it is positive."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            return _ARITHMETIC[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Name):
            return sizes[node.id]
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        raise ValueError

    try:
        size = value(formula)
    except (KeyError, ValueError, ZeroDivisionError):
        return None
    return size if size > 0 else None
