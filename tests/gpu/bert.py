"""BERT-base, built node by node: what `make test-cuda` measures end to end, and the times of it and of its linear layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from spa_compiler.graph.session import Feeds
from spa_compiler.placement.gpu_timer import CudaTimer
from spa_compiler.placement.measure import interleave
from spa_compiler.placement.timer import Contender
from tests.analysis.builder import Net
from tests.gpu.amdahl import EndToEnd, linear_chain


def bert(
    layers: int = 12,
    size: int = 768,
    heads: int = 12,
    inner: int = 3072,
    vocabulary: int = 1024,
    positions: int = 512,
) -> onnx.ModelProto:
    """The encoder with random weights: input_ids, attention_mask [batch, tokens] -> the last hidden state.

    Layers are BERT-base's; few words, since looking them up costs the same in both.
    """
    net = Net("bert")
    ids, mask = net.ids("input_ids", "batch", "tokens"), net.ids("attention_mask", "batch", "tokens")
    places = net.op("Slice", net.weight(positions, size, std=0.1), net.ints(0), net.size_of(ids, 1), net.ints(0))
    x = net.fused_layer_norm(net.add(net.embed(ids, vocabulary, size), places), size)
    absent = net.op("Sub", net.const(1.0), net.op("Cast", net.unsqueeze(mask, 1, 2), to=TensorProto.FLOAT))
    extra = net.mul(absent, net.const(-10000.0))
    for _ in range(layers):
        x = net.fused_layer_norm(net.add(net.attention(x, size, heads, size // heads, extra), x), size)
        x = net.fused_layer_norm(net.add(net.mlp(x, size, inner), x), size)
    return net.model(x)


def feeds(batch: int, tokens: int, vocabulary: int = 1024) -> Feeds:
    """Of `bert`, every word there."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (batch, tokens))
    return {"input_ids": ids, "attention_mask": np.ones((batch, tokens), np.int64)}


def measure(
    folder: Path, given: Feeds, timer: CudaTimer, workspace: Path, seconds: float = 5.0, rounds: int = 50
) -> EndToEnd:
    """Times of an artifact, all taken in turns: portable.onnx and model.onnx, whole and their linear layers alone.

    Inputs and outputs are bound; with a `CudaTimer` all run from CUDA graphs.
    """
    library = folder / "kernels.so"
    calls = {}
    for name, own in (("portable", None), ("model", library)):
        calls[name] = timer.bound(timer.open(Contender(folder / f"{name}.onnx", own)), given)
        chain = linear_chain(onnx.load(folder / f"{name}.onnx"))
        path = workspace / f"{name}-linear.onnx"
        onnx.save(chain, path, save_as_external_data=True, location=f"{name}-linear.data")
        value = chain.graph.input[0].type.tensor_type
        shape = (*next(iter(given.values())).shape, value.shape.dim[-1].dim_value)
        kind = helper.tensor_dtype_to_np_dtype(value.elem_type)
        x = np.random.default_rng(1).standard_normal(shape, np.float32).astype(kind)
        calls[f"{name} linear"] = timer.bound(timer.open(Contender(path, own)), {"x": x})
    times = interleave(calls, seconds, rounds)
    order = ("portable", "model", "portable linear", "model linear")
    return EndToEnd(*(times[name].median_us for name in order))
