"""Neighbouring sites, residual Adds and norms joined into regions, so that activations stay in panels in between.

A region must be *convex*: no path may leave it and come back, or the one node that it becomes would wait for itself.
On panels everything in it must see the same tokens, so tensors agree in all axes but their features at every measured
shape. On images a window makes another size of what it sees; there the number of images and of axes must agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import networkx as nx
import onnx_graphsurgeon as gs

from spa_compiler.graph.model import Model
from spa_compiler.placement.attention import AttentionSite
from spa_compiler.placement.between import Between, ImageOp, trim
from spa_compiler.placement.heads import Cache, Shapes
from spa_compiler.placement.norms import NormSite
from spa_compiler.placement.sites import Site, held, only_reader, take_epilogue
from spa_compiler.placement.sums import join_sums
from spa_compiler.runtime.image_spec import MAX_IMAGES
from spa_compiler.runtime.region import MAX_CACHES, MAX_INPUTS, MAX_MASKS, MAX_OUTPUTS, MAX_TABLES

Element = Site | NormSite | AttentionSite | Between


@dataclass(eq=False)
class Group:
    """Elements that become one node."""

    elements: list[Element]
    layout: str

    @property
    def nodes(self) -> list[gs.Node]:
        return [n for e in self.elements for n in e.nodes]

    @property
    def products(self) -> list[Site]:
        """Every site with a weight of its own."""
        return [p for e in self.elements if isinstance(e, Site) for p in e.products]

    def external(self) -> list[gs.Variable]:
        """Activations that come from outside, in order of use."""
        made = {id(e.output) for e in self.elements}
        seen: dict[int, gs.Variable] = {}
        for e in self.elements:
            for t in inputs_of(e):
                if id(t) not in made:
                    seen.setdefault(id(t), t)
        return list(seen.values())

    def masks(self) -> list[gs.Variable]:
        """Attention masks, each once, in order of use."""
        found = {id(e.mask): e.mask for e in self.elements if isinstance(e, AttentionSite) and e.mask is not None}
        return list(found.values())

    def tables(self) -> list[gs.Variable]:
        """Cosines and sines of rotary positions, each once, in order of use."""
        found = {id(t): t for e in self.elements if isinstance(e, AttentionSite) for t in e.tables}
        return list(found.values())

    def caches(self) -> list[Cache]:
        """Of its attention cores, keys and values in turns; what they become are results, too."""
        return [c for e in self.elements if isinstance(e, AttentionSite) for c in e.caches]

    def given(self) -> list[gs.Variable]:
        """What comes from outside and is no panel: masks, tables, caches."""
        return [*self.masks(), *self.tables(), *(c.past for c in self.caches())]

    def results(self, outputs: Sequence[gs.Variable]) -> list[gs.Variable]:
        """Tensors that are read outside or are graph outputs, but for caches."""
        inside = {id(n) for n in self.nodes}
        return [
            e.output
            for e in self.elements
            if any(e.output is o for o in outputs) or any(id(n) not in inside for n in e.output.outputs)
        ]


def inputs_of(element: Element) -> Iterator[gs.Variable]:
    """The activations that an element reads."""
    if isinstance(element, AttentionSite):
        yield from (element.query, element.key, element.value)
        return
    if isinstance(element, ImageOp):
        yield from element.sources
        return
    yield element.source
    if isinstance(element, Site):
        if element.term is not None:
            yield element.term.source
        if element.residual is not None:
            yield element.residual
        if element.factor is not None:
            yield element.factor


def single(sites: Sequence[Site]) -> list[Group]:
    """Every site by itself."""
    return [Group([site], site.layout) for site in sites]


def join(
    model: Model,
    sites: Sequence[Site],
    norms: Sequence[NormSite],
    attentions: Sequence[AttentionSite],
    between: Sequence[Between],
    shapes: Shapes,
) -> list[Group]:
    """Sites joined with their neighbours as far as that is legal; takes sums and residuals into the sites (in place).

    Args:
        sites: the sites that become kernels; others stay outside.
        between: what images pass through on the way from one to the other.
    """
    outputs = held(model.graph)
    taken: set[int] = set()
    sites = join_sums(sites, outputs, shapes)
    for site in sites:
        take_residual(site, outputs, shapes, taken)
    made = {id(site.output) for site in sites}
    for site in sites:
        _take_factor(site, made, outputs, shapes, taken)
    made = {id(site.output) for site in sites}
    # Of what others made, a norm comes along where a residual needs the same panel anyway, as in front of a block.
    packed, read = {id(site.residual) for site in sites}, {id(site.source) for site in sites}
    behind = (n for n in norms if id(n.source) in made or (id(n.source) in packed and id(n.output) in read))
    elements: list[Element] = [*sites, *behind]
    elements += [a for a in attentions if all(id(t) in made for t in inputs_of(a))]
    inside = {id(n) for e in elements for n in e.nodes}
    for each in between:  # an activation belongs to what is found first
        if inside.isdisjoint(nodes := {id(n) for n in each.nodes}):
            elements.append(each)
            inside |= nodes
    groups = [Group([e], "rows" if isinstance(e, NormSite | AttentionSite) else e.layout) for e in elements]
    graph = _Contracted(model, groups)

    while _merge_one(graph, _neighbours(graph.groups), outputs, shapes):
        pass
    while _merge_one(graph, _siblings(graph.groups), outputs, shapes):
        pass
    # without a product it is ONNX Runtime's
    kept = [g for g in graph.groups if any(isinstance(e, Site) for e in g.elements)]
    for group in kept:
        _trim(group, outputs)
    position = {id(n): i for i, n in enumerate(model.graph.nodes)}
    for group in kept:
        group.elements.sort(key=lambda e: max(position[id(n)] for n in e.nodes))
    return sorted(kept, key=lambda g: position[id(g.nodes[0])])


def _trim(group: Group, outputs: Sequence[gs.Variable]) -> None:
    """Takes out what is at its rim to no use, one by one, as long as the C side's limits hold."""
    kept: set[int] = set()
    while True:
        read = {id(t) for e in group.elements for t in inputs_of(e)}
        found = (op for op in trim(group.elements, lambda t: id(t) in read) if id(op) not in kept)  # noqa: B023
        op = next(found, None)
        if op is None:
            return
        without = Group([e for e in group.elements if e is not op], group.layout)
        if _within_limits(without, outputs):
            group.elements = without.elements
        else:
            kept.add(id(op))


def _within_limits(group: Group, outputs: Sequence[gs.Variable]) -> bool:
    """Those of the C side, of one node."""
    images = len(group.external()) + sum(map(_images, group.elements))
    within = len(group.external()) <= MAX_INPUTS and len(group.results(outputs)) <= MAX_OUTPUTS
    given = len(group.masks()) <= MAX_MASKS and len(group.tables()) <= MAX_TABLES and len(group.caches()) <= MAX_CACHES
    return within and given and images <= MAX_IMAGES


def _images(element: Element) -> int:
    if isinstance(element, Site):
        return 1 if element.grow == (1, 1) else 2
    return element.images if isinstance(element, ImageOp) else 1


def _neighbours(groups: Sequence[Group]) -> Iterator[tuple[Group, Group]]:
    """Pairs of which one reads what the other makes."""
    owner = {id(e.output): g for g in groups for e in g.elements}
    for group in groups:
        for tensor in group.external():
            other = owner.get(id(tensor))
            if other is not None and other is not group:
                yield other, group


def _siblings(groups: Sequence[Group]) -> Iterator[tuple[Group, Group]]:
    """Pairs that read one tensor, which a region packs once."""
    readers: dict[int, list[Group]] = {}
    for group in groups:
        for tensor in group.external():
            for other in readers.setdefault(id(tensor), []):
                yield other, group
            readers[id(tensor)].append(group)


def _merge_one(
    graph: _Contracted, pairs: Iterator[tuple[Group, Group]], outputs: Sequence[gs.Variable], shapes: Shapes
) -> bool:
    """Merges the first pair that may be merged."""
    return any(_fit_together(pair, shapes) and graph.merge(*pair, outputs) for pair in pairs)


def take_residual(site: Site, outputs: Sequence[gs.Variable], shapes: Shapes, taken: set[int]) -> None:
    """act(W x + b + other): the Add right behind a site without activation, if both operands have one shape, and the
    activation behind it.

    `taken` has the Adds that other sites took: of a sum of two sites, one takes it.
    """
    if site.act != "none" or site.residual is not None or site.grow != (1, 1):
        return
    add = only_reader(site.output, outputs)
    if add is None or add.op != "Add" or add.domain or id(add) in taken:
        return
    other = next((i for i in add.inputs if i is not site.output), None)
    if not isinstance(other, gs.Variable) or not _alike(site.output, other, shapes):
        return
    taken.add(id(add))
    site.residual, site.output = other, add.outputs[0]
    site.nodes = [*site.nodes, add]
    take_epilogue(site, outputs)


def _take_factor(site: Site, made: set[int], outputs: Sequence[gs.Variable], shapes: Shapes, taken: set[int]) -> None:
    """act(W x + b) * other: the Mul right behind a site, if another site of `made` gives the other operand.

    As in SwiGLU, where one of the two sites takes the Mul. What others made would have to be packed, which costs what
    the Mul costs.
    """
    mul = only_reader(site.output, outputs)
    if site.layout != "rows" or mul is None or mul.op != "Mul" or mul.domain or id(mul) in taken:
        return
    other = next((i for i in mul.inputs if i is not site.output), None)
    if not isinstance(other, gs.Variable) or id(other) not in made or not _alike(site.output, other, shapes):
        return
    taken.add(id(mul))
    site.factor, site.output = other, mul.outputs[0]
    site.nodes = [*site.nodes, mul]


def _alike(one: gs.Variable, other: gs.Variable, shapes: Shapes) -> bool:
    """Whether two tensors have one shape at every binding."""
    return all(known.get(one.name) is not None and known.get(one.name) == known.get(other.name) for known in shapes)


def _fit_together(groups: Sequence[Group], shapes: Shapes) -> bool:
    """Whether one region can hold all of it."""
    if len({g.layout for g in groups}) != 1:
        return False
    images = groups[0].layout == "planes"
    tensors = [t for g in groups for e in g.elements for t in (*inputs_of(e), e.output)]
    for known in shapes:
        agreeing = set()
        for t in tensors:
            shape = known.get(t.name)
            if shape is None:
                return False
            agreeing.add((shape[0], len(shape)) if images else shape[:-1])
        if len(agreeing) != 1:
            return False
    return True


class _Contracted:
    """The graph's nodes with every group drawn together to one, for the question whether a merge stays acyclic."""

    def __init__(self, model: Model, groups: list[Group]) -> None:
        self.groups = groups
        self._refused: set[tuple[int, int]] = set()  # a path that forbids a merge outlives every other merge
        self._alive: list[Group] = list(groups)  # ids are keys, so no group may be freed
        self._home: dict[int, int] = {}
        for group in groups:
            for node in group.nodes:
                self._home[id(node)] = id(group)
        self._graph: nx.DiGraph[int] = nx.DiGraph()
        for node in model.graph.nodes:
            if id(node) not in self._home:
                self._connect(id(node), [*node.inputs, *_captured(node)])
        for group in groups:
            # What an element really reads: the shape computations of the nodes it replaces go with them.
            self._connect(id(group), [*group.external(), *group.given()])

    def _connect(self, to: int, tensors: Sequence[gs.Tensor]) -> None:
        self._graph.add_node(to)
        for tensor in tensors:
            self._graph.add_edges_from((self._at(p), to) for p in tensor.inputs if self._at(p) != to)

    def _at(self, node: gs.Node) -> int:
        return self._home.get(id(node), id(node))

    def merge(self, first: Group, second: Group, outputs: Sequence[gs.Variable]) -> bool:
        """Joins two groups unless a path through other nodes leads from one to the other."""
        if (id(first), id(second)) in self._refused:
            return False
        self._refused.add((id(first), id(second)))
        union = Group([*first.elements, *second.elements], first.layout)
        self._alive.append(union)
        if not _within_limits(union, outputs):
            return False
        if len({e.heads for e in union.elements if isinstance(e, AttentionSite)}) > 1:  # masks are checked against one
            return False
        a, b = id(first), id(second)
        if self._detour(a, b) or self._detour(b, a):
            return False
        new = id(union)
        before = {p for p in (*self._graph.predecessors(a), *self._graph.predecessors(b)) if p not in (a, b)}
        after = {s for s in (*self._graph.successors(a), *self._graph.successors(b)) if s not in (a, b)}
        self._graph.remove_nodes_from((a, b))
        self._graph.add_node(new)
        self._graph.add_edges_from((p, new) for p in before)
        self._graph.add_edges_from((new, s) for s in after)
        self.groups = [g for g in self.groups if g is not first and g is not second]
        self.groups.append(union)
        return True

    def _detour(self, a: int, b: int) -> bool:
        """Whether a path of two or more edges leads from a to b."""
        if a not in self._graph or b not in self._graph:
            return False
        ancestors = nx.ancestors(self._graph, b)
        return any(s != b and s in ancestors for s in self._graph.successors(a))


def _captured(node: gs.Node) -> Iterator[gs.Tensor]:
    """Outer tensors that a node's subgraphs read."""
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in value.nodes:
                yield from inner.inputs
                yield from _captured(inner)
