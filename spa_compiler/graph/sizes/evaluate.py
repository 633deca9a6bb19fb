"""Values of small tensors, computed with numpy in the dtypes of the model.

What numpy has no one-liner for goes through onnx's reference evaluator. Nothing large is ever built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import helper

from spa_compiler.graph import weights
from spa_compiler.graph.sizes.dims import reshaped
from spa_compiler.graph.sizes.known import (
    NOTHING,
    NUMERIC,
    SMALL,
    Array,
    Dims,
    Known,
    Misfit,
    Op,
    computed,
    constant_node,
    elem_of,
)
from spa_compiler.graph.sizes.operands import axes_of, ints, slices

_Evaluator: TypeAlias = Callable[[Op, list[Any]], "Array | list[Array]"]

_SMALL_FLOATS = 4096  # computed floats beyond this are weights being rearranged, no sizes
_NEVER_EVALUATED = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"}
    | {"LSTM", "GRU", "RNN", "Conv", "ConvTranspose", "If", "Loop", "Scan", "SequenceMap", "StringNormalizer"}
)


class _TooLarge(Exception):
    """The value would have more elements than are worth keeping, or is no number."""


def evaluate(op: Op, given: list[Known]) -> list[Known] | None:
    """The values of the node's outputs, if its inputs' are known (or their shapes, where only those matter).

    Raises:
        Misfit: the operator cannot take these values.
    """
    if op.domain or op.has_branches:
        return None
    if op.name == "Constant":
        return [constant_node(op)]
    if op.name in ("Shape", "Size"):
        return _shape_of(op, given[0].shape)
    if op.name in _NEVER_EVALUATED or not given:
        return None
    if op.name == "CastLike":
        given = [given[0], Known(value=np.asarray(given[1].elem))]
    arrays = [known.value for known in given]
    if any(name and array is None for name, array in zip(op.inputs, arrays, strict=True)):
        return None
    if any(array.size > _SMALL_FLOATS and array.dtype.kind not in "biu" for array in arrays if array is not None):
        return None
    evaluator = _EVALUATORS.get(op.name, _reference)
    try:
        with np.errstate(all="ignore"):
            results = evaluator(op, arrays)
    except _TooLarge:
        return None
    except (ValueError, IndexError, TypeError, KeyError, ZeroDivisionError, OverflowError, AttributeError) as error:
        raise Misfit(str(error)) from error
    results = results if isinstance(results, list) else [results]
    return [computed(np.asarray(result)) for result in results] + [NOTHING] * (len(op.outputs) - len(results))


def _shape_of(op: Op, shape: Dims | None) -> list[Known] | None:
    if shape is None:
        return None
    if op.name == "Shape":
        shape = shape[op.attr("start", 0) : op.attr("end")]
    if None in shape:
        return None
    sizes = np.asarray(shape, np.int64)
    return [computed(sizes if op.name == "Shape" else np.asarray(sizes.prod(), np.int64))]


def _reference(op: Op, arrays: list[Any]) -> list[Array]:
    """onnx's own evaluation of one node: slow, so for small values only."""
    if sum(array.size for array in arrays if array is not None) > _SMALL_FLOATS:
        raise _TooLarge
    from onnx.reference import ReferenceEvaluator

    feeds = {name: array for name, array in zip(op.inputs, arrays, strict=True) if array is not None}
    graph = helper.make_graph(
        [op.proto],
        "node",
        [helper.make_tensor_value_info(name, elem_of(array.dtype), array.shape) for name, array in feeds.items()],
        [onnx.ValueInfoProto(name=name) for name in op.outputs if name],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", op.opset)])
    try:
        results = iter(ReferenceEvaluator(model).run(None, feeds))
    except Exception as error:  # what it cannot evaluate is only not known
        raise _TooLarge from error
    found = [next(results) if name else np.zeros(0) for name in op.outputs]
    if not all(isinstance(result, np.ndarray) and result.dtype.kind in "biuf" for result in found):
        raise _TooLarge
    return found


def _limit(shape: Sequence[int]) -> None:
    if math.prod(shape) > SMALL:
        raise _TooLarge


def _elementwise(function: Callable[..., Any]) -> _Evaluator:
    def compute(_: Op, arrays: list[Any]) -> Array:
        if math.prod(array.size for array in arrays) > SMALL:
            _limit(np.broadcast_shapes(*(array.shape for array in arrays)))
        return np.asarray(function(*arrays))

    return compute


def _folded(function: Callable[..., Any]) -> _Evaluator:
    pairwise = _elementwise(function)

    def compute(op: Op, arrays: list[Any]) -> Array:
        result = arrays[0]
        for array in arrays[1:]:
            result = pairwise(op, [result, array])
        return np.asarray(result)

    return compute


def _divide(left: Array, right: Array) -> Array:
    if left.dtype.kind == "f" or left.dtype.kind == "V":
        return np.asarray(left / right)
    if not np.all(right):
        raise Misfit("division by zero")
    quotient = np.abs(left) // np.abs(right)
    return np.asarray(quotient * np.sign(left) * np.sign(right)).astype(left.dtype)


def _modulo(op: Op, arrays: list[Any]) -> Array:
    if arrays[1].dtype.kind in "iu" and not np.all(arrays[1]):
        raise Misfit("division by zero")
    function = np.fmod if op.attr("fmod", 0) else np.mod
    return np.asarray(_elementwise(function)(op, arrays))


def _cast_to(array: Any, elem: int) -> Array:
    if elem not in NUMERIC:
        raise _TooLarge
    return np.asarray(np.asarray(array).astype(helper.tensor_dtype_to_np_dtype(elem)))


def _squeeze(op: Op, arrays: list[Any]) -> Array:
    return np.asarray(np.squeeze(arrays[0], axes_of(op, arrays)))


def _unsqueeze(op: Op, arrays: list[Any]) -> Array:
    return np.asarray(np.expand_dims(arrays[0], axes_of(op, arrays) or ()))


def _gather(op: Op, arrays: list[Any]) -> Array:
    data, indices = arrays
    axis = op.attr("axis", 0)
    _limit((indices.size, data.size // max(data.shape[axis], 1)))
    return np.asarray(np.take(data, indices, axis))


def _slice(op: Op, arrays: list[Any]) -> Array:
    return np.asarray(arrays[0][tuple(slices(op, arrays, arrays[0].ndim))])


def _split(op: Op, arrays: list[Any]) -> list[Array]:
    data, axis, count = arrays[0], op.attr("axis", 0), len(op.outputs)
    sizes = ints(arrays[1]) if len(arrays) > 1 and arrays[1] is not None else op.attr("split")
    if sizes is None:
        chunk = -(-data.shape[axis] // count)
        sizes = [chunk] * (count - 1) + [data.shape[axis] - chunk * (count - 1)]
    if sum(sizes) != data.shape[axis]:
        raise Misfit("the pieces do not add up")
    return [np.asarray(piece) for piece in np.split(data, np.cumsum(sizes)[:-1], axis)]


def _range(_: Op, arrays: list[Any]) -> Array:
    start, limit, delta = (array.reshape(()) for array in arrays)
    count = max(math.ceil((limit.item() - start.item()) / delta.item()), 0)
    _limit((count,))
    return np.asarray(start + np.arange(count, dtype=start.dtype) * delta).astype(start.dtype)


def _constant_of_shape(op: Op, arrays: list[Any]) -> Array:
    shape = ints(arrays[0])
    _limit(shape)
    value = op.attr("value")
    fill = np.zeros(1, np.float32) if value is None else np.asarray(weights.array_of(value))
    if fill.dtype.kind == "O":
        raise _TooLarge
    return np.full(shape, fill.reshape(()), fill.dtype)


def _reshape(op: Op, arrays: list[Any]) -> Array:
    data = arrays[0]
    shape = reshaped(data.shape, ints(arrays[1]), bool(op.attr("allowzero", 0)))
    return np.asarray(data.reshape([size if size is not None else -1 for size in shape]))


def _expand(_: Op, arrays: list[Any]) -> Array:
    shape = np.broadcast_shapes(arrays[0].shape, ints(arrays[1]))
    _limit(shape)
    return np.array(np.broadcast_to(arrays[0], shape))


def _tile(_: Op, arrays: list[Any]) -> Array:
    _limit((arrays[0].size, *ints(arrays[1])))
    return np.asarray(np.tile(arrays[0], ints(arrays[1])))


def _reduce(function: Callable[..., Any]) -> _Evaluator:
    def compute(op: Op, arrays: list[Any]) -> Array:
        data, axes = arrays[0], axes_of(op, arrays)
        if not axes and op.attr("noop_with_empty_axes", 0):
            return np.asarray(data)
        return np.asarray(function(data, axis=axes or None, keepdims=bool(op.attr("keepdims", 1)))).astype(data.dtype)

    return compute


def _scatter_nd(op: Op, arrays: list[Any]) -> Array:
    if op.attr("reduction", "none") != "none":
        return _reference(op, arrays)[0]
    result = np.array(arrays[0])
    result[tuple(np.moveaxis(arrays[1], -1, 0))] = arrays[2]
    return result


def _gather_nd(op: Op, arrays: list[Any]) -> Array:
    if op.attr("batch_dims", 0):
        return _reference(op, arrays)[0]
    data, indices = arrays
    depth = indices.shape[-1]
    _limit((indices.size // max(depth, 1), *data.shape[depth:]))
    return np.asarray(data[tuple(np.moveaxis(indices, -1, 0))])


def _cumulate(op: Op, arrays: list[Any]) -> Array:
    data, axis = arrays[0], int(arrays[1].item())
    flipped = np.flip(data, axis) if op.attr("reverse", 0) else data
    total = np.cumsum(flipped, axis, dtype=data.dtype)
    if op.attr("exclusive", 0):
        total = total - flipped
    return np.asarray(np.flip(total, axis) if op.attr("reverse", 0) else total)


def _triangle(op: Op, arrays: list[Any]) -> Array:
    offset = int(arrays[1].item()) if len(arrays) > 1 and arrays[1] is not None else 0
    return np.asarray(np.triu(arrays[0], offset) if op.attr("upper", 1) else np.tril(arrays[0], offset))


def _clip(op: Op, arrays: list[Any]) -> Array:
    low = arrays[1] if len(arrays) > 1 else op.attr("min")
    high = arrays[2] if len(arrays) > 2 else op.attr("max")
    return np.asarray(np.clip(arrays[0], low, high)).astype(arrays[0].dtype)


def _matmul(op: Op, arrays: list[Any]) -> Array:
    left, right = arrays
    _limit((left.size, right.shape[-1] if right.ndim > 1 else 1))
    return np.asarray(left @ right)


def _flatten(op: Op, arrays: list[Any]) -> Array:
    axis = op.attr("axis", 1)
    return np.asarray(arrays[0].reshape(math.prod(arrays[0].shape[:axis]), -1))


_EVALUATORS: dict[str, _Evaluator] = {
    "Identity": lambda op, a: a[0],
    "Cast": lambda op, a: _cast_to(a[0], int(op.attr("to"))),
    "CastLike": lambda op, a: _cast_to(a[0], int(a[1])),
    "Gather": _gather,
    "GatherND": _gather_nd,
    "GatherElements": lambda op, a: np.take_along_axis(a[0], a[1], op.attr("axis", 0)),
    "Concat": lambda op, a: np.concatenate(a, op.attr("axis", 1)),
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Expand": _expand,
    "Tile": _tile,
    "Transpose": lambda op, a: np.transpose(a[0], op.attr("perm")),
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "NonZero": lambda op, a: np.asarray(np.nonzero(np.atleast_1d(a[0])), np.int64),
    "ScatterND": _scatter_nd,
    "CumSum": _cumulate,
    "Trilu": _triangle,
    "Clip": _clip,
    "MatMul": _matmul,
    "Where": _elementwise(np.where),
    "Add": _elementwise(np.add),
    "Sub": _elementwise(np.subtract),
    "Mul": _elementwise(np.multiply),
    "Div": _elementwise(_divide),
    "Mod": _modulo,
    "Pow": _elementwise(lambda a, b: np.power(a, b).astype(a.dtype)),
    "Equal": _elementwise(np.equal),
    "Less": _elementwise(np.less),
    "LessOrEqual": _elementwise(np.less_equal),
    "Greater": _elementwise(np.greater),
    "GreaterOrEqual": _elementwise(np.greater_equal),
    "And": _elementwise(np.logical_and),
    "Or": _elementwise(np.logical_or),
    "Xor": _elementwise(np.logical_xor),
    "Not": _elementwise(np.logical_not),
    "Neg": _elementwise(np.negative),
    "Abs": _elementwise(np.abs),
    "Floor": _elementwise(np.floor),
    "Ceil": _elementwise(np.ceil),
    "Round": _elementwise(np.rint),
    "Sqrt": _elementwise(np.sqrt),
    "Exp": _elementwise(np.exp),
    "Log": _elementwise(np.log),
    "Sin": _elementwise(np.sin),
    "Cos": _elementwise(np.cos),
    "Tanh": _elementwise(np.tanh),
    "Sign": _elementwise(np.sign),
    "IsNaN": _elementwise(np.isnan),
    "Reciprocal": _elementwise(lambda a: (1 / a).astype(a.dtype)),
    "Relu": _elementwise(lambda a: np.maximum(a, a.dtype.type(0))),
    "Sigmoid": _elementwise(lambda a: (1 / (1 + np.exp(-a))).astype(a.dtype)),
    "Max": _folded(np.maximum),
    "Min": _folded(np.minimum),
    "Sum": _folded(np.add),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "ReduceMean": _reduce(np.mean),
}
