"""Sizes and small values of every tensor, with the inputs' open dimensions bound to numbers.

The model never runs and no large weight is read. One pass over the nodes per binding computes what is made from small
known values (`Shape -> Gather -> Mul -> Concat -> Reshape` chains, above all) and asks onnx's inference, node by node
and with those values at hand, for all other shapes. Two bindings tell what depends on the inputs' sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from spa_compiler.graph.model import Model
from spa_compiler.graph.sizes.bindings import bindings
from spa_compiler.graph.sizes.known import NUMERIC, Array, Dims, Known
from spa_compiler.graph.sizes.propagate import Pass, Walk


@dataclass(frozen=True, eq=False)
class Entries:
    """A small tensor's value in the first binding; `fixed` (bool, same shape) marks entries that agree in both."""

    array: Array
    fixed: Array


@dataclass(frozen=True)
class Settled:
    """By tensor name. `shapes` are those of the first binding; an entry is None where inference does not know it.

    `second` has the shapes in the second binding, of models with open dimensions, where the rank is the same in both.

    `counting` names tensors of several integers that are 0, 1, 2, .. in row-major order in both bindings.
    """

    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    second: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    varies: dict[str, tuple[bool, ...]] = field(default_factory=dict)
    values: dict[str, Entries] = field(default_factory=dict)
    counting: set[str] = field(default_factory=set)


def settle(model: Model, shapes: Mapping[str, Sequence[int]] | None = None) -> Settled:
    """Sizes and small values of the outermost graph's tensors.

    Open dimensions are bound twice, to sizes chosen so that the graph's operators fit together: what differs varies.
    Tensors of unknown rank are left out. Sizes that hang on values (`NonZero`) are None, and vary.

    Args:
        shapes: the first binding of some inputs.
    """
    given = {name: tuple(int(size) for size in shape) for name, shape in (shapes or {}).items()}
    walk = Walk(model.graph, model.signature)
    first = second = _best(walk, bindings(model, 0, given, {}))
    if any(not isinstance(dim, int) for value in model.signature.inputs for dim in value.shape):
        second = _best(walk, bindings(model, 1, {}, first.inputs))
    settled = Settled()
    for name, known in first.known.items():
        _compare(settled, name, known, second.known[name])
        shape = second.known[name].shape
        if second is not first and shape is not None and len(shape) == len(known.shape or ()):
            settled.second[name] = shape
    return settled


def apply(model: Model, settled: Settled) -> None:
    """Writes the settled shapes into the graph's variables, and types where they have none; in place.

    Symbols of declared inputs and outputs go as well: this is for a copy that is only looked at.
    """
    tensors = model.graph.tensors()
    for tensor in [*tensors.values(), *model.graph.inputs, *model.graph.outputs]:
        if isinstance(tensor, gs.Variable) and tensor.name in settled.shapes:
            tensor.shape = list(settled.shapes[tensor.name])
    types = Walk(model.graph, model.signature).types(settled.shapes)
    for name, tensor in tensors.items():
        if isinstance(tensor, gs.Variable) and tensor.dtype is None and types.get(name) in NUMERIC:
            tensor.dtype = helper.tensor_dtype_to_np_dtype(types[name])


def _best(walk: Walk, candidates: Iterable[Mapping[str, Dims]]) -> Pass:
    """The first pass without conflicts; other sizes are tried only where nodes refuse the first ones."""
    done: list[Pass] = []
    for inputs in candidates:
        done.append(walk.run(inputs))
        if not done[-1].conflicts:
            break
    return min(done, key=lambda tried: (tried.conflicts, tried.unknown))


def _compare(settled: Settled, name: str, first: Known, second: Known) -> None:
    """Notes what both bindings say of a tensor."""
    if first.shape is None:
        return
    settled.shapes[name] = first.shape
    settled.varies[name] = _moving(first.shape, second.shape)
    if first.value is None or second.value is None:
        return
    if _counts(first.value) and _counts(second.value):
        settled.counting.add(name)
    if first.value.shape != second.value.shape:
        return
    if first.value is second.value:
        fixed = np.broadcast_to(np.True_, first.value.shape)
    else:
        nan = (first.value != first.value) & (second.value != second.value)
        fixed = np.asarray((first.value == second.value) | nan)
    settled.values[name] = Entries(first.value, fixed)


def _counts(value: Array) -> bool:
    several = value.dtype.kind == "i" and value.size > 1
    return several and bool((value.reshape(-1) == np.arange(value.size, dtype=np.int64)).all())


def _moving(left: Dims, right: Dims | None) -> tuple[bool, ...]:
    if right is None or len(right) != len(left):
        return (True,) * len(left)
    return tuple(a is None or a != b for a, b in zip(left, right, strict=True))
