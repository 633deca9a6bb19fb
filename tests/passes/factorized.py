"""Models for tests of `factorize`, and what one asks of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.checker
from numpy.typing import NDArray

from spa_compiler.graph.model import Model
from spa_compiler.graph.save import to_proto
from spa_compiler.graph.session import Feeds, open_session, run
from spa_compiler.passes import Change, Context
from spa_compiler.passes.factorize import Factorize, FactorizeOptions
from tests.networks import model_of
from tests.passes.tiny import context, correlated


def factorize(model: Model, given: Context | None = None, **options: Any) -> Change:
    return Factorize(FactorizeOptions(**{"multiple": 1} | options)).run(model, given or context())


def outputs(model: Model, feed: Feeds) -> list[NDArray[np.float64]]:
    """What the model computes, as a checked file."""
    proto = to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    made = run(open_session(proto.SerializeToString()), feed)
    return [made[value.name].astype(np.float64) for value in proto.graph.output]


def nodes(model: Model) -> list[str]:
    """`name: op(inputs) -> outputs` of every node."""
    return [
        f"{node.name}: {node.op}({', '.join(t.name for t in node.inputs)}) -> {', '.join(t.name for t in node.outputs)}"
        for node in model.graph.nodes
    ]


def low(n: int, k: int, rank: int, seed: int = 0) -> NDArray[np.float32]:
    """A weight of a rank, `[n, k]`."""
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal((n, rank)) @ rng.standard_normal((rank, k)), np.float32)


def close(one: list[NDArray[np.float64]], other: list[NDArray[np.float64]], tolerance: float = 1e-5) -> bool:
    return all(np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) for a, b in zip(one, other, strict=True))


ONES = {"one": np.ones(8, np.float32), "zero": np.zeros(8, np.float32)}
GEOMETRY = "strides = [2, 1], pads = [1, 0, 1, 2], dilations = [1, 2]"


def convnet(
    call: str, channels: int = 6, kernel: tuple[int, ...] = (3, 3), weight: Any = None, dtype: Any = np.float32
) -> Model:
    """A first convolution, the one in question (8 outputs), a norm."""
    rng = np.random.default_rng(2)
    kind = "float16" if dtype is np.float16 else "float"
    text = f"""agraph ({kind}["b", 3, 9, 9] x) => ({kind}["b", 8, "p", "q"] y)
    {{ f = Conv (x, First) g = Relu (f) h = {call} y = InstanceNormalization (h, one, zero) }}"""
    given = {"First": rng.standard_normal((channels, 3, 1, 1)), "b": rng.standard_normal(8)} | ONES
    given["W"] = rng.standard_normal((8, channels, *kernel)) if weight is None else weight
    used = {name: np.asarray(value, dtype) for name, value in given.items() if name != "b" or "b)" in call}
    return model_of(text, **used)


def images(dtype: Any = np.float32) -> list[Feeds]:
    return [
        {"x": correlated(2 * 81, 3, seed).reshape(2, 9, 9, 3).transpose(0, 3, 1, 2).astype(dtype)} for seed in range(4)
    ]


def attention(width: int = 12, seed: int = 0) -> Model:
    rng = np.random.default_rng(seed)
    lines, given = [], {"one": np.ones(width, np.float32)}
    for name in "qkv":
        lines.append(f"{name}m = MatMul (x, {name.upper()}) {name} = Add ({name}m, b{name})")
        given[name.upper()] = np.asarray(rng.standard_normal((width, width)) * (1 + 30 * (name == "k")), np.float32)
        given[f"b{name}"] = np.asarray(rng.standard_normal(width), np.float32)
    text = f"""agraph (float["b", 5, {width}] x) => (float["b", 5, {width}] y)
    {{ {" ".join(lines)} t = Transpose <perm = [0, 2, 1]> (k) s = MatMul (q, t) e = Softmax (s) o = MatMul (e, v)
       r = Add (o, x) y = LayerNormalization (r, one) }}"""
    return model_of(text, **given)


def sentences(width: int = 12) -> list[Feeds]:
    return [{"x": correlated(20 * 5, width, seed).reshape(20, 5, width)} for seed in range(3)]
