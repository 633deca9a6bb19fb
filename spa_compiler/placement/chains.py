"""Low-rank layers in a graph: a thin product between two wide ones, alone or beside a sparse weight.

    x - down [r, k] - up [n, r] - (+ b, activation)            low rank
     |             \\- up [n', r] - ...                         one shared `down`, several `up`
     \\- S [n, k] --- Add with what `up` gives                  sparse + low rank

Found by structure alone: everything that reads the thin tensor is a site, nothing happens to it in between, and the two
steps do less work than their product would. Such weights have no zeros, so by themselves they have no form but dense;
as one node the thin tensor stays in its panel, and a sparse weight beside it is added in the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from spa_compiler.placement.heads import Shapes
from spa_compiler.placement.regions import Group
from spa_compiler.placement.sites import Site
from spa_compiler.placement.sums import join_sums, other_operand
from spa_compiler.runtime.region import MAX_OUTPUTS


@dataclass(eq=False)
class Chain:
    """`down`, and what reads its result: sites, of which some are sums with a sparse weight."""

    down: Site
    heads: list[Site]

    @property
    def products(self) -> tuple[Site, ...]:
        """Every site with a weight of its own."""
        return (self.down, *(p for head in self.heads for p in head.products))

    @property
    def sparse(self) -> tuple[Site, ...]:
        """The weights beside the low-rank part."""
        return tuple(head for head in self.heads if head.source is self.down.source)

    @property
    def group(self) -> Group:
        return Group([self.down, *self.heads], self.down.layout)


def find_chains(sites: Sequence[Site], sparse: set[str], outputs: Sequence[gs.Variable], shapes: Shapes) -> list[Chain]:
    """Every low-rank layer, disjoint, in topological order; takes sums into the sites (in place).

    Args:
        sites: of one graph, fresh from `find_sites`.
        sparse: names of those whose weights leave something out; they alone may stand beside a low-rank part.
        outputs: tensors that must stay (`sites.held`).
        shapes: of the graph's tensors at every binding.
    """
    readers: dict[int, list[Site]] = {}
    for site in sites:
        readers.setdefault(id(site.source), []).append(site)
    position = {id(site): i for i, site in enumerate(sites)}
    taken: set[int] = set()
    found = []
    for down in sites:
        ups = [s for s in readers.get(id(down.output), []) if id(s) not in taken and _joins(s, down)]
        if id(down) in taken or not _thin(down, ups, outputs):
            continue
        made = {id(s.output): s for s in readers[id(down.source)] if s.name in sparse and id(s) not in taken}
        added = [other_operand(up, outputs) for up in ups]
        beside = {id(made[id(t)]): made[id(t)] for _, t in filter(None, added) if id(t) in made}
        members = sorted([*ups, *beside.values()], key=lambda s: position[id(s)])
        heads = [h for h in join_sums(members, outputs, shapes) if h.term is not None or id(h) not in beside]
        taken |= {id(down), *(id(p) for h in heads for p in h.products)}
        found.append(Chain(down, heads))
    return found


def _joins(up: Site, down: Site) -> bool:
    plain = all(site.window is None and site.grow == (1, 1) for site in (up, down))
    return up.layout == down.layout and plain


def _thin(down: Site, ups: Sequence[Site], outputs: Sequence[gs.Variable]) -> bool:
    if not ups or len(ups) > MAX_OUTPUTS or down.act != "none" or any(down.output is o for o in outputs):
        return False
    if len(down.output.outputs) != len(ups):  # somebody else reads it
        return False
    wide = sum(up.n for up in ups)
    return down.n * (down.k + wide) < down.k * wide
