"""Example inputs where the user gives none: drawn within the bounds that the graph itself states."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.errors import UsageError
from spa_compiler.graph.model import Model, ValueInfo
from spa_compiler.graph.session import Feeds

_MASK = re.compile(r"mask", re.IGNORECASE)
_TYPE = re.compile(r"token_type|segment|type_id", re.IGNORECASE)
_POSITION = re.compile(r"position|pos_id", re.IGNORECASE)
_SAME_VALUES = frozenset(
    {"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Transpose", "Expand", "Tile", "Concat"}
    | {"Split", "Dropout", "Where", "Clip", "Gather", "Max", "Min", "Pad"}
)
"""Operators that move integers about without changing them (or only towards the bounds)."""

_SEVERAL = frozenset({"Concat", "Where", "Max", "Min"})
"""Those of them whose values come from other inputs than the first one, too: the others' say where and how far."""

_TOWARDS_BOUNDS = frozenset({"Where", "Clip", "Max", "Min"})
"""Those that may put integers right before they index."""


@dataclass(frozen=True)
class _Use:
    """What the graph says about an integer input: the table it indexes, if any."""

    bound: int | None
    indexes_unknown: bool


def example_feeds(model: Model, shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator) -> Feeds:
    """One feed of the given shapes.

    Integers that index a constant table are drawn within it, positions count up, masks are ones, type ids and indices
    into computed tensors are zeros, other integers ones; floats are normal.

    Raises:
        UsageError: `shapes` lacks an input.
    """
    feeds: Feeds = {}
    tensors = {tensor.name: tensor for tensor in model.graph.inputs}
    for value in model.signature.inputs:
        if value.name not in shapes:
            raise UsageError(f"no shape for input {value.name!r}", where=model.source.name)
        feeds[value.name] = _draw(value, tuple(shapes[value.name]), tensors.get(value.name), rng)
    return feeds


def bounds(model: Model) -> dict[str, int]:
    """For each whole-number input that indexes tables as it is, the entries of the smallest one."""
    found = ((tensor.name, _use_of(tensor, _SAME_VALUES - _TOWARDS_BOUNDS).bound) for tensor in model.graph.inputs)
    return {name: bound for name, bound in found if bound is not None}


def _draw(
    value: ValueInfo, shape: tuple[int, ...], tensor: gs.Tensor | None, rng: np.random.Generator
) -> np.ndarray[Any, Any]:
    dtype = value.dtype
    if dtype.kind == "O":
        return np.full(shape, "a", dtype=object)
    if dtype.kind == "b" or _MASK.search(value.name):
        return np.ones(shape, dtype=dtype)
    if dtype.kind not in "iu":
        return np.asarray(rng.standard_normal(shape)).astype(dtype)
    use = _use_of(tensor)
    if _TYPE.search(value.name) or (use.bound is None and use.indexes_unknown):
        return np.zeros(shape, dtype=dtype)
    if _POSITION.search(value.name) and shape:
        counted = np.arange(shape[-1]) if use.bound is None else np.arange(shape[-1]) % use.bound
        return np.broadcast_to(counted, shape).astype(dtype)
    if use.bound is None:
        return np.ones(shape, dtype=dtype)
    return np.asarray(rng.integers(0, max(use.bound, 1), shape)).astype(dtype)


def _use_of(tensor: gs.Tensor | None, passing: frozenset[str] = _SAME_VALUES) -> _Use:
    """Follows an integer input to the tables it indexes; the smallest one bounds it."""
    bounds: list[int] = []
    unknown = False
    seen: set[str] = set()
    queue = [] if tensor is None else [tensor]
    while queue:
        current = queue.pop()
        if current.name in seen:
            continue
        seen.add(current.name)
        for node in current.outputs:
            size, indexes = _index_bound(node, current)
            if indexes:
                if size is None:
                    unknown = True
                else:
                    bounds.append(size)
            elif node.op in passing and not node.domain and (node.op in _SEVERAL or node.inputs[0] is current):
                queue.extend(node.outputs)
    return _Use(min(bounds) if bounds else None, unknown)


def _index_bound(node: gs.Node, tensor: gs.Tensor) -> tuple[int | None, bool]:
    """How many entries the node lets `tensor` index (None: not known here), and whether it indexes at all."""
    inputs = node.inputs
    if node.op == "OneHot" and inputs[0] is tensor:
        depth = inputs[1]
        return (int(np.asarray(depth.values).reshape(-1)[0]) if isinstance(depth, gs.Constant) else None), True
    indexing = {"Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND", "Scatter"}
    if node.op not in indexing or len(inputs) < 2 or inputs[1] is not tensor:
        return None, False
    shape = inputs[0].shape
    if node.op in ("ScatterND", "GatherND") or shape is None:
        return None, True
    axis = int(node.attrs.get("axis", 0))
    size = shape[axis] if -len(shape) <= axis < len(shape) else None
    return (int(size) if isinstance(size, int | np.integer) and size > 0 else None), True
