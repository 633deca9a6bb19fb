"""Groups of sites -> `ai.spa` nodes in the graph, and the regions that kernels.so must hold for them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from spa_compiler.graph.model import Model
from spa_compiler.kernels.form import Form, Packed
from spa_compiler.placement.attention import AttentionSite
from spa_compiler.placement.between import ImageOp
from spa_compiler.placement.depthwise import DepthwiseSite
from spa_compiler.placement.heads import Rotation
from spa_compiler.placement.norms import NormSite
from spa_compiler.placement.regions import Group, inputs_of
from spa_compiler.placement.sites import Site, held
from spa_compiler.runtime.generate import Region
from spa_compiler.runtime.image_plan import Image
from spa_compiler.runtime.images import ImageBuilder
from spa_compiler.runtime.region import AttentionSpec, LinearSpec, NormSpec, Panel, RegionBuilder, Term

DOMAIN = "ai.spa"
DOMAIN_VERSION = 1


class Packer:
    """Packs weights, each once for every form; plans and trials share the arrays."""

    def __init__(self) -> None:
        self._packed: dict[tuple[str, Form], Packed] = {}

    def __call__(self, site: Site, form: Form) -> Packed:
        """The site's weight with its bias, which may differ from plan to plan: a sum takes over that of its term."""
        key = (site.name, form)
        if key not in self._packed:
            self._packed[key] = form.pack(site.weight)
        return self._packed[key].with_bias(site.bias)


def _spec(packed: Packed, act: str, low: float, high: float) -> LinearSpec:
    """What the C side must know of a packed weight."""
    return LinearSpec(packed.n, packed.k, packed.form, act, low, high)


@dataclass(frozen=True)
class Assembled:
    """A group as a region, with what its node takes and gives, in order."""

    spec: Region
    inputs: list[gs.Variable]
    arrays: list[gs.Constant]
    outputs: list[gs.Variable]


def insert(model: Model, groups: Sequence[Group], forms: Mapping[str, Form], packer: Packer) -> list[Region]:
    """Replaces every group's nodes by one node, in place.

    Args:
        groups: found in this very model; disjoint.
        forms: of every site, by name.

    Returns:
        The region of each group.
    """
    specs = [_insert(model, group, forms, packer) for group in groups]
    if specs:
        import_domain(model)
        model.graph.cleanup().toposort()
    return specs


def import_domain(model: Model) -> None:
    """Says that a model has nodes of our domain."""
    domains = [d for d in model.graph.import_domains or [] if d.domain != DOMAIN]
    model.graph.import_domains = [*domains, onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]


def assemble(group: Group, results: Sequence[gs.Variable], forms: Mapping[str, Form], packer: Packer) -> Assembled:
    """The region that computes a group.

    Args:
        results: what of it is read outside.
        forms: of every site, by name.
    """
    make = _assemble_images if group.layout == "planes" else _assemble_panels
    return make(group, results, forms, packer)


def _products(
    element: Site, forms: Mapping[str, Form], packer: Packer, arrays: list[gs.Constant]
) -> tuple[LinearSpec, LinearSpec | None]:
    """The element's product and that of its term, which comes last and so has the activation."""
    act, prefix = (element.act, element.low, element.high), element.output.name
    own = {site.name: forms[site.name] for site in element.products}
    if element.term is not None:
        own = _cut_alike(element, element.term, forms, packer)

    def packed(site: Site, prefix: str) -> Packed:
        found = packer(site, own[site.name])
        arrays.extend(gs.Constant(f"{prefix}.{what}", a) for what, a in found.arrays.items())
        return found

    spec = _spec(packed(element, prefix), *act)
    if element.term is None:
        return spec, None
    other = _spec(packed(element.term, f"{prefix}.term"), *act)
    return dataclasses.replace(spec, act="none", low=0.0, high=0.0), other


def _assemble_images(
    group: Group, results: Sequence[gs.Variable], forms: Mapping[str, Form], packer: Packer
) -> Assembled:
    builder = ImageBuilder()
    images: dict[int, Image] = {}
    inputs: list[gs.Variable] = []
    arrays: list[gs.Constant] = []
    taps: list[gs.Constant] = []
    order: list[gs.Variable] = []

    def image(tensor: gs.Variable, channels: int) -> Image:
        if id(tensor) not in images:
            images[id(tensor)] = builder.input(channels)
            inputs.append(tensor)
        return images[id(tensor)]

    for element in group.elements:
        output = element.output
        if isinstance(element, DepthwiseSite):
            made = builder.depthwise(image(element.source, element.n), element.spec)
            taps += [
                gs.Constant(f"{output.name}.taps", element.taps),
                gs.Constant(f"{output.name}.tap_bias", element.bias_or_zeros),
            ]
        elif isinstance(element, ImageOp):
            sources = zip(element.sources, element.channels, strict=True)
            made = element.build(builder, [image(tensor, channels) for tensor, channels in sources])
        elif isinstance(element, Site):
            spec, term = _products(element, forms, packer, arrays)
            residual = None if element.residual is None else image(element.residual, element.n)
            if element.window is not None:
                made = builder.window(image(element.source, element.window.channels), element.window, spec, residual)
            else:
                source = image(element.source, element.k)
                second = None
                if element.term is not None and term is not None:
                    second = (image(element.term.source, element.term.k), term)
                made = builder.linear(source, spec, residual, second)
            if element.grow != (1, 1):
                made = builder.unfold(made, element.grow, len(element.op.kernel))
        else:
            raise TypeError(f"{type(element).__name__} does not run on images")
        images[id(output)] = made
        if any(output is r for r in results):
            builder.output(made)
            order.append(output)
    return Assembled(builder.finish(), inputs, [*arrays, *taps], order)


def _assemble_panels(
    group: Group, results: Sequence[gs.Variable], forms: Mapping[str, Form], packer: Packer
) -> Assembled:
    inside = {id(t) for e in group.elements for t in inputs_of(e)}
    builder = RegionBuilder()
    panels: dict[int, Panel] = {}
    inputs: list[gs.Variable] = []
    arrays: list[gs.Constant] = []
    norm_arrays: list[gs.Constant] = []
    order: list[gs.Variable] = []
    masks = group.masks()
    mask_numbers = {id(m): builder.mask() for m in masks}
    table_panels: dict[int, Panel] = {}

    def panel(tensor: gs.Variable, features: int) -> Panel:
        if id(tensor) not in panels:
            panels[id(tensor)] = builder.pack(features)
            inputs.append(tensor)
        return panels[id(tensor)]

    def rotated(source: Panel, rotation: Rotation | None, depth: int) -> Panel:
        if rotation is None:
            return source
        for table in (rotation.cos, rotation.sin):
            if id(table) not in table_panels:
                table_panels[id(table)] = builder.table(depth)
        return builder.rotate(source, table_panels[id(rotation.cos)], table_panels[id(rotation.sin)])

    for element in group.elements:
        output, wanted = element.output, any(element.output is r for r in results)
        if isinstance(element, NormSite):
            spec_of_norm = NormSpec(element.features, element.epsilon, element.beta is not None)
            made = builder.norm(panel(element.source, element.features), spec_of_norm)
            norm_arrays += [
                gs.Constant(f"{output.name}.{what}", np.ascontiguousarray(values))
                for what, values in (("gamma", element.gamma), ("beta", element.beta))
                if values is not None
            ]
        elif isinstance(element, AttentionSite):
            query, key = (
                rotated(panel(t, heads * element.depth), rotation, element.depth)
                for t, heads, rotation in zip(
                    (element.query, element.key), (element.heads, element.key_heads), element.rotations, strict=True
                )
            )
            made = builder.attention(
                query,
                key,
                panel(element.value, element.key_heads * element.depth),
                AttentionSpec(element.heads, element.depth, element.scale, element.shared, bool(element.caches)),
                None if element.mask is None else mask_numbers[id(element.mask)],
            )
        elif isinstance(element, Site):
            spec, other = _products(element, forms, packer, arrays)
            source, term = panel(element.source, element.k), None
            if element.term is not None and other is not None:
                term = Term(panel(element.term.source, element.term.k), other)
            residual = None if element.residual is None else panel(element.residual, element.n)
            factor = None if element.factor is None else panel(element.factor, element.n)
            if wanted and id(output) not in inside and factor is None:
                builder.linear_out(source, spec, residual, term)
                order.append(output)
                continue
            made = builder.linear(source, spec, residual, term, factor)
        else:
            raise TypeError(f"{type(element).__name__} does not run on panels")
        panels[id(output)] = made
        if wanted:
            builder.unpack(made)
            order.append(output)
    presents = [c.present for c in group.caches()]
    given = group.given()
    if [id(t) for t in group.tables()] != list(table_panels):
        raise ValueError("tables are read in another order than they are given")
    return Assembled(builder.finish(), [*inputs, *given], [*arrays, *norm_arrays], [*order, *presents])


def node_name(group: Group) -> str:
    """Of the node that a group becomes."""
    return f"{DOMAIN}/{_members(group)[0]}"


def _members(group: Group) -> list[str]:
    """Names of nodes of the source; the parts of a Split are one."""
    return list(dict.fromkeys(p.name for e in group.elements for p in (e.products if isinstance(e, Site) else (e,))))


def _cut_alike(site: Site, term: Site, forms: Mapping[str, Form], packer: Packer) -> dict[str, Form]:
    """The forms of two products that are added chunk by chunk: those that each is fastest in by itself, if these are
    cut alike; else in the usual tiles, with a chunk that is good for both."""
    own = {s.name: forms[s.name] for s in (site, term)}
    usual = {name: form.cut(None, None) for name, form in own.items()}
    for found in (own, usual):
        first, second = (_spec(packer(s, found[s.name]), "none", 0.0, 0.0) for s in (site, term))
        if first.same_chunks(second):
            return found
    rows = math.lcm(first.form.rows, second.form.rows)
    chunk = next(c for c in (first.chunk, second.chunk) if c % rows == 0)
    return {name: form.cut(chunk, None) for name, form in own.items()}


def _insert(model: Model, group: Group, forms: Mapping[str, Form], packer: Packer) -> Region:
    graph = model.graph
    made = assemble(group, group.results(held(graph)), forms, packer)
    for node in group.nodes:
        node.outputs.clear()
        node.inputs.clear()
    dead = {id(n) for n in group.nodes}
    graph.nodes = [n for n in graph.nodes if id(n) not in dead]
    names = _members(group)
    node = gs.Node(
        made.spec.op_type,
        name=node_name(group),
        attrs={"site": "+".join(names).encode()[:200].decode(errors="ignore")},
        inputs=[*made.inputs, *made.arrays],
        outputs=made.outputs,
        domain=DOMAIN,
    )
    graph.nodes.append(node)
    model.metadata.annotate(
        node,
        {
            "spa.source": ",".join(names),
            "spa.form": ",".join(forms[s.name].name for s in group.products),
            "spa.density": ",".join(f"{s.density:.4f}" for s in group.products),
        },
    )
    return made.spec
