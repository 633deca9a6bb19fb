"""Sites as `ai.spa` nodes for ONNX Runtime's CUDA provider, one node a site (`runtime/gpu.py` has their inputs)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.graph.model import Model
from spa_compiler.placement.gpu_choose import GpuChoice, GpuForm
from spa_compiler.placement.nodes import DOMAIN, import_domain
from spa_compiler.placement.sites import Site
from spa_compiler.runtime.gpu import GpuOp, operator


def operator_of(form: GpuForm) -> GpuOp:
    """The operator that runs a form."""
    return operator(form.form, form.dtype, form.layout, form.epilogue, form.variants)


def node_name(choice: GpuChoice) -> str:
    """Of the node that a site becomes, or is a part of."""
    return f"{DOMAIN}/{choice.home.name}"


def insert(model: Model, choices: Sequence[GpuChoice]) -> list[GpuOp]:
    """Replaces the nodes of every site that has a form, in place.

    Args:
        model: the twin, in the type of the kernels, of the model that the sites were found in.

    Returns:
        The operators, each once.
    """
    ops: dict[str, GpuOp] = {}
    # all are looked up before any is replaced: one site's residual may be the other one's result
    nodes = {node.name: node for node in model.graph.nodes}
    for choice in choices:
        if choice.form is not None and choice.arrays is not None:
            op = operator_of(choice.form)
            ops[op.op_type] = op
            _replace(model, nodes, choice, op, choice.arrays, choice.form)
    if ops:
        import_domain(model)
        model.graph.cleanup().toposort()
    return list(ops.values())


def _replace(
    model: Model,
    nodes: Mapping[str, gs.Node],
    choice: GpuChoice,
    op: GpuOp,
    arrays: Mapping[str, np.ndarray],
    form: GpuForm,
) -> None:
    site = choice.site
    parts = [site] if choice.pair is None else [choice.pair.down, site]
    first = parts[0]
    inside = [nodes[node.name] for part in parts for node in part.nodes]
    maker = site.output.inputs[0]
    place = next(i for i, t in enumerate(maker.outputs) if t is site.output)
    result = nodes[maker.name].outputs[place]
    inputs = [nodes[first.op.node.name].inputs[0]]
    if site.residual is not None:
        inputs.append(_residual(site, nodes))
    inputs += [gs.Constant(f"{site.output.name}.{name}", values) for name, values in arrays.items()]
    bias = np.zeros(site.n, np.float32) if site.bias is None else np.ascontiguousarray(site.bias, np.float32)
    inputs.append(gs.Constant(f"{site.output.name}.bias", bias))
    for node in inside:
        node.inputs.clear()
        node.outputs.clear()
    dead = {id(node) for node in inside}
    model.graph.nodes = [node for node in model.graph.nodes if id(node) not in dead]
    called = "+".join(part.name for part in parts)
    attributes: dict[str, object] = {
        "site": called.encode()[:200].decode(errors="ignore"),
        "n": site.n,
        "k": first.k,
    }
    if op.bounded:
        attributes |= {"low": float(site.low), "high": float(site.high)}
    node = gs.Node(op.op_type, node_name(choice), attributes, inputs, [result], domain=DOMAIN)
    model.graph.nodes.append(node)
    model.metadata.annotate(
        node,
        {
            "spa.source": called,
            "spa.form": form.name,
            "spa.density": ", ".join(f"{part.density:.4f}" for part in parts),
        },
    )


def _residual(site: Site, nodes: Mapping[str, gs.Node]) -> gs.Variable:
    """The twin of what is added, as the twin of the Add reads it."""
    add = next(node for node in site.nodes if any(t is site.residual for t in node.inputs))
    place = next(i for i, t in enumerate(add.inputs) if t is site.residual)
    return nodes[add.name].inputs[place]
