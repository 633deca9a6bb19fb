"""How fast a model can become when only its linear layers do, and how fast it is.

    limit = 1 / (1 - share + share / speed of the linear layers)         share: of the dense model's time that is theirs

The linear layers are timed by themselves, as a model that has nothing else (`linear_chain`): ONNX Runtime's profiler sees when
kernels are launched, and not how long they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

DOMAIN = "ai.spa"


@dataclass(frozen=True)
class EndToEnd:
    """Microseconds of one run: of the dense model and of ours, whole, and the linear layers of each alone."""

    dense_us: float
    ours_us: float
    dense_linear_us: float
    our_linear_us: float

    def __post_init__(self) -> None:
        if min(self.dense_us, self.ours_us, self.dense_linear_us, self.our_linear_us) <= 0:
            raise ValueError(f"times must be positive: {self}")
        if self.share > 1:
            raise ValueError(f"a part takes longer than the whole: {self}")

    @property
    def share(self) -> float:
        """Of the dense model's time, what its linear layers take."""
        return self.dense_linear_us / self.dense_us

    @property
    def linear_speed(self) -> float:
        return self.dense_linear_us / self.our_linear_us

    @property
    def limit(self) -> float:
        """Amdahl's, of the whole model's speed."""
        return 1 / (1 - self.share + self.share / self.linear_speed)

    @property
    def speed(self) -> float:
        return self.dense_us / self.ours_us

    @property
    def reached(self) -> float:
        """Of the limit. Above 1 where our nodes do more than the products: a GELU, a residual."""
        return self.speed / self.limit


def table(rows: Sequence[tuple[str, EndToEnd]]) -> str:
    """What was measured, as Markdown; a name for each row."""
    lines = [
        "| | dense us | ours us | linear layers dense us | ours us | faster | share | limit | end to end | of the limit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, e in rows:
        cells = [
            name,
            *(f"{us:.0f}" for us in (e.dense_us, e.ours_us, e.dense_linear_us, e.our_linear_us)),
            f"{e.linear_speed:.2f}x",
            f"{e.share:.0%}",
            f"{e.limit:.2f}x",
            f"{e.speed:.2f}x",
            f"{e.reached:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Layer:
    """One linear layer: the nodes that compute it, the last one's output being its own, and what it reads."""

    nodes: tuple[onnx.NodeProto, ...]
    source: str
    residual: str | None
    n: int
    k: int


def linear_chain(model: onnx.ModelProto) -> onnx.ModelProto:
    """Its linear layers and nothing else: x [batch, tokens, k of the first one] -> y.

    Each reads what the last layer before it gave that has as many features, so that none can be left out: products with
    a constant and their bias, and nodes of ours as they are, with what is fused into them.

    Raises:
        ValueError: there are none, or they do not form a chain.
    """
    layers = _layers(model)
    if not layers:
        raise ValueError("there is no linear layer")
    kind = _type_of_weights(model)
    held = {t.name: t for t in model.graph.initializer}
    latest, read = {layers[0].k: "x"}, set[str]()
    nodes: list[onnx.NodeProto] = []
    for number, layer in enumerate(layers):
        if layer.k not in latest or (layer.residual and layer.n not in latest):
            raise ValueError(f"nothing before {layer.nodes[0].name} has {layer.k} features")
        given, out = latest[layer.k], "y" if layer is layers[-1] else f"out{number}"
        renamed = {layer.source: given, layer.nodes[-1].output[0]: out}
        if layer.residual:
            renamed[layer.residual] = latest[layer.n]
            read.add(latest[layer.n])
        read.add(given)
        latest[layer.n] = out
        for node in layer.nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = [renamed.get(name, name) for name in node.input]
            copy.output[:] = [renamed.get(name, name) for name in node.output]
            nodes.append(copy)
    if dead := {f"out{i}" for i in range(len(layers) - 1)} - read:
        raise ValueError(f"not a chain: nobody reads {sorted(dead)}")
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "linear layers",
        [helper.make_tensor_value_info("x", kind, ["batch", "tokens", layers[0].k])],
        [helper.make_tensor_value_info("y", kind, ["batch", "tokens", layers[-1].n])],
        [held[name] for name in held if name in used],
    )
    return helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)


def _layers(model: onnx.ModelProto) -> list[_Layer]:
    held = {t.name: t for t in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for node in model.graph.node:
        if node.domain == DOMAIN:
            sizes = {a.name: a.i for a in node.attribute}
            residual = node.input[1] if node.input[1] not in held else None
            found.append(_Layer((node,), node.input[0], residual, sizes["n"], sizes["k"]))
        elif node.op_type == "MatMul" and node.input[1] in held and len(held[node.input[1]].dims) == 2:
            k, n = held[node.input[1]].dims
            users = readers.get(node.output[0], [])
            bias = [u for u in users if u.op_type == "Add" and any(held[i].dims == [n] for i in u.input if i in held)]
            own = (node, bias[0]) if len(users) == 1 and bias else (node,)
            found.append(_Layer(own, node.input[0], None, n, k))
    return found


def _type_of_weights(model: onnx.ModelProto) -> int:
    """float16 or bfloat16 where there are such weights, else float32: what activations have."""
    kinds = {t.data_type for t in model.graph.initializer if len(t.dims) == 2}
    kinds |= {v.type.tensor_type.elem_type for v in model.graph.value_info}
    for kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
        if kind in kinds:
            return int(kind)
    return int(TensorProto.FLOAT)
