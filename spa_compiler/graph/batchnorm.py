"""What scales and shifts channels folded into the layer before it: BatchNormalization, and Mul and Add that spell one.

    BatchNormalization(W * x + b; gamma, beta, mean, var)  ->  (s W) * x + (s (b - mean) + beta)
    with s = gamma / sqrt(var + epsilon)
    Mul(Conv(x; W, b), s)  ->  Conv(x; s W, s b)
    Add(Conv(x; W, b), c)  ->  Conv(x; W, b + c)        s and c one number per channel

Exact up to rounding (Jacob et al., 2018, section 3.2); computed in float64. Folded only where the layer's result goes
into the normalization alone and all of its parameters are constant.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.graph.weights import array_of

_LAYERS = ("Conv", "ConvTranspose", "Gemm")
_FLOATS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))


def fold_batchnorm(graph: gs.Graph) -> int:
    """Folds every BatchNormalization that follows a layer, in place; returns how many."""
    outputs = {tensor.name for tensor in graph.outputs}
    folded: set[int] = set()
    for norm in graph.nodes:
        if norm.op != "BatchNormalization" or norm.domain:
            continue
        layer = _layer_before(norm, outputs)
        if layer is None:
            continue
        _fold(layer, norm)
        folded.add(id(norm))
    graph.nodes = [node for node in graph.nodes if id(node) not in folded]
    return len(folded)


def fold_scales(graph: gs.Graph) -> int:
    """Folds Mul and Add by a constant per channel into the Conv or ConvTranspose before them; returns how many.

    Exporters from Keras spell BatchNormalization so.
    """
    outputs = {tensor.name for tensor in graph.outputs}
    folded: set[int] = set()
    for node in graph.nodes:
        if node.op not in ("Mul", "Add") or node.domain or len(node.inputs) != 2:
            continue
        side = 0 if isinstance(node.inputs[1], gs.Constant) else 1
        between, constant = node.inputs[side], node.inputs[1 - side]
        if not isinstance(constant, gs.Constant) or constant.dtype not in _FLOATS:
            continue
        layer = _only_maker(between, outputs)
        if layer is None or layer.op == "Gemm" or len(layer.inputs[1].outputs) > 1:
            continue
        channels = int(layer.inputs[1].shape[0 if layer.op == "Conv" else 1])
        channels *= int(layer.attrs.get("group", 1)) if layer.op == "ConvTranspose" else 1
        factors = _per_channel(constant, len(layer.inputs[1].shape), channels)
        if factors is None or not _has_bias_of(layer, channels):
            continue
        if node.op == "Mul":
            _absorb(layer, node, factors, np.zeros(channels))
        else:
            _absorb(layer, node, None, factors)
        folded.add(id(node))
    graph.nodes = [node for node in graph.nodes if id(node) not in folded]
    return len(folded)


def _per_channel(constant: gs.Constant, rank: int, channels: int) -> np.ndarray[Any, Any] | None:
    """`[channels]` float64, if the constant broadcasts along channels alone against `[N, channels, ...]`."""
    shape = (1,) * (rank - len(constant.shape)) + tuple(int(size) for size in constant.shape)
    if len(shape) != rank or shape[1] not in (1, channels) or any(n != 1 for i, n in enumerate(shape) if i != 1):
        return None
    return np.broadcast_to(array_of(constant).astype(np.float64).reshape(-1), (channels,))


def _only_maker(between: gs.Tensor, outputs: set[str]) -> gs.Node | None:
    """The layer with constant float weights that makes a tensor which one node alone uses."""
    if len(between.inputs) != 1 or len(between.outputs) != 1 or between.name in outputs:
        return None
    layer = between.inputs[0]
    if layer.op not in _LAYERS or layer.domain:
        return None
    constant = [tensor for tensor in layer.inputs[1:] if tensor.name]
    if not constant or not all(isinstance(t, gs.Constant) and t.dtype in _FLOATS for t in constant):
        return None
    return layer


def _has_bias_of(layer: gs.Node, channels: int) -> bool:
    """Whether the layer's bias, if it has one, is one number per channel, or one for all."""
    bias = layer.inputs[2] if len(layer.inputs) > 2 else None
    return bias is None or not bias.name or tuple(bias.shape) in ((channels,), (1, channels), (1,), ())


def _layer_before(norm: gs.Node, outputs: set[str]) -> gs.Node | None:
    """The layer to fold into, if everything that the fold needs is so."""
    if norm.attrs.get("training_mode", 0) or not norm.attrs.get("spatial", 1):
        return None
    if len(norm.inputs) != 5 or any(tensor.name for tensor in norm.outputs[1:]):
        return None
    layer = _only_maker(norm.inputs[0], outputs)
    if layer is None or not all(isinstance(t, gs.Constant) and t.dtype in _FLOATS for t in norm.inputs[1:]):
        return None
    if layer.op == "Gemm" and (layer.attrs.get("alpha", 1.0) != 1.0 or layer.attrs.get("beta", 1.0) != 1.0):
        return None
    return layer if _has_bias_of(layer, int(norm.inputs[1].shape[0])) else None


def _fold(layer: gs.Node, norm: gs.Node) -> None:
    gamma, beta, mean, variance = (array_of(tensor).astype(np.float64) for tensor in norm.inputs[1:])
    scale = gamma / np.sqrt(variance + float(norm.attrs.get("epsilon", 1e-5)))
    _absorb(layer, norm, scale, beta - scale * mean)


def _absorb(layer: gs.Node, after: gs.Node, scale: np.ndarray[Any, Any] | None, shift: np.ndarray[Any, Any]) -> None:
    """Makes `layer` compute `scale * layer + shift` (one number per channel each) and give it out as `after` did."""
    weight = layer.inputs[1]
    bias = layer.inputs[2] if len(layer.inputs) > 2 and layer.inputs[2].name else None
    old = np.zeros(()) if bias is None else array_of(bias).astype(np.float64).reshape(-1)
    new = np.broadcast_to(old * (1.0 if scale is None else scale) + shift, shift.shape)
    result, between = after.outputs[0], layer.outputs[0]
    bias_name = f"{result.name}_bias" if bias is None or len(bias.outputs) > 1 else bias.name
    if scale is not None:
        weight_name = f"{weight.name}_{result.name}" if len(weight.outputs) > 1 else weight.name
        weight = gs.Constant(weight_name, _scaled(layer, array_of(weight), scale))
    layer.inputs = [layer.inputs[0], weight, gs.Constant(bias_name, new.astype(weight.dtype))]
    after.inputs.clear()
    after.outputs.clear()
    between.inputs.clear()
    layer.outputs = [result]


def _scaled(layer: gs.Node, values: np.ndarray[Any, Any], scale: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The weight with each output channel multiplied by its scale, in the layer's own layout."""
    wide = values.astype(np.float64)
    if layer.op == "Gemm":
        wide *= scale[:, None] if layer.attrs.get("transB", 0) else scale
    elif layer.op == "Conv":
        wide *= scale.reshape(-1, *[1] * (values.ndim - 1))
    else:  # ConvTranspose: [C, outputs / group, ...], the inputs of a group in consecutive rows
        group = int(layer.attrs.get("group", 1))
        split = wide.reshape(group, values.shape[0] // group, values.shape[1], -1)
        wide = (split * scale.reshape(group, 1, -1, 1)).reshape(values.shape)
    return wide.astype(values.dtype)
