"""Sites that kernels for GPUs are made for: products with the bias, the residual and the activation behind them.

They are found in the float32 model, where activations can be told apart, and replaced in its 16-bit twin, whose nodes
have the same names.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from spa_compiler.graph.model import Model
from spa_compiler.placement.heads import Shapes
from spa_compiler.placement.regions import take_residual
from spa_compiler.placement.sites import Refusal, Site, find_sites, held, only_reader
from spa_compiler.placement.sums import other_operand

PIXEL = "pixel"
"""Layout of a site for GPUs: images of one pixel, whatever the inputs' sizes are. [batch, k, 1, 1] lies in memory as
rows [batch, k] do, and kernels for few tokens look at rows alone."""


def find_gpu_sites(model: Model, kept: Mapping[str, str], known: Shapes) -> tuple[list[Site], list[Refusal]]:
    """The sites of a float32 model, residuals taken in; the other weighted operators with reasons.

    Args:
        kept: nodes that stay float32 between nodes of 16 bits, by name, and why.
        known: shapes of all tensors, for each measured shape.
    """
    found, refusals = find_sites(model)
    outputs, taken = held(model.graph), set[int]()
    reasons = [_unfit(site, known) or _stays(site, kept) for site in found]
    refusals += [Refusal(site.op, reason) for site, reason in zip(found, reasons, strict=True) if reason]
    fit = [site for site, reason in zip(found, reasons, strict=True) if not reason]
    made = {id(site.output): site for site in fit}
    sites: list[Site] = []
    for site in fit:
        whole, added = copy.copy(site), set(taken)
        if not _leaves_the_sum(site, made, outputs):
            take_residual(whole, outputs, known, added)
        adds = [node for node in whole.nodes if any(t is whole.residual for t in node.inputs)]
        if _stays(whole, kept) or any(node.name in kept for node in adds):
            whole = site
        else:
            taken |= added
        if _one_pixel(whole):
            whole = dataclasses.replace(whole, layout=PIXEL)
        sites.append(whole)
    return sites, refusals


@dataclass(frozen=True, eq=False)
class Pair:
    """A low-rank layer: y = up(down(x)), of which nothing but the last result is read elsewhere."""

    down: Site
    up: Site

    @property
    def n(self) -> int:
        return self.up.n

    @property
    def k(self) -> int:
        return self.down.k

    @property
    def rank(self) -> int:
        return self.down.n


def find_pairs(sites: Sequence[Site], outputs: Sequence[gs.Variable]) -> list[Pair]:
    """Low-rank layers, disjoint, in topological order.

    Between the products there is no bias, no activation and no other reader, and they do less work than their product
    would.

    Args:
        sites: those of `find_gpu_sites`.
        outputs: tensors that must stay (`sites.held`).
    """
    made = {id(site.output): site for site in sites}
    found: list[Pair] = []
    taken: set[int] = set()
    for up in sites:
        down = made.get(id(up.source))
        if down is None or id(down) in taken or down.layout != up.layout:
            continue
        plain = len(down.nodes) == 1 and down.bias is None
        less = down.n * (down.k + up.n) < down.k * up.n
        if plain and less and only_reader(down.output, outputs) is up.op.node:
            taken |= {id(down), id(up)}
            found.append(Pair(down, up))
    return found


def tokens_of(site: Site, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """(tokens or pixels of an image, images) at one measured shape."""
    shape = shapes[site.source.name]
    if site.layout == "rows":
        return _count(shape[:-1]), 1
    if site.layout == PIXEL:
        return shape[0], 1
    return _count(shape[2:]), shape[0]


def _count(sizes: Sequence[int]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count


def _unfit(site: Site, known: Shapes) -> str:
    if site.window is not None or site.op.kind == "ConvTranspose":
        return "kernels for GPUs look at one pixel: a window has none"
    ranks = {len(shapes[site.source.name]) for shapes in known if site.source.name in shapes}
    if len(ranks) != 1 or any(site.source.name not in shapes for shapes in known):
        return "the shape of its input is not known"
    if min(ranks) < 2:
        return "its input has one axis"
    return ""


def _leaves_the_sum(site: Site, made: Mapping[int, Site], outputs: Sequence[gs.Variable]) -> bool:
    """Whether another site takes the Add: of two that are added, the one with zeros is likelier to become a node."""
    found = other_operand(site, outputs)
    other = None if found is None else made.get(id(found[1]))
    if other is None or other is site or other_operand(other, outputs) is None:
        return False
    return other.density < 1 and site.density == 1


def _one_pixel(site: Site) -> bool:
    shape = site.source.shape or []
    return site.layout == "planes" and len(shape) > 2 and all(isinstance(size, int) and size == 1 for size in shape[2:])


def _stays(site: Site, kept: Mapping[str, str]) -> str:
    """Why a site cannot be a node of 16 bits; empty if it can. What lies inside of it may be anything."""
    first, last = site.op.node.name, site.output.inputs[0].name
    why = kept.get(first) or kept.get(last)
    return f"it stays float32: {why}" if why else ""
