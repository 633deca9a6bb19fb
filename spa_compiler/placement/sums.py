"""Two sites whose products are added become one: act(W x + V z + b), computed chunk by chunk in one pass.

    x - MatMul W ---------- Add - (Add b) - (activation)
     \\- (low rank) z - V -/

That is how sparse + low rank looks, and also a shortcut with weights of its own. Biases may stand at either product
and behind the sum, the operands of the Add in either order.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from spa_compiler.placement.heads import Shapes
from spa_compiler.placement.sites import Site, only_reader, take_epilogue


def other_operand(site: Site, outputs: Sequence[gs.Variable]) -> tuple[gs.Node, gs.Variable] | None:
    """The Add that is the only reader of a site without activation, and what it adds to it."""
    if site.act != "none":
        return None
    add = only_reader(site.output, outputs)
    if add is None or add.op != "Add" or add.domain:
        return None
    other = next((i for i in add.inputs if i is not site.output), None)
    return (add, other) if isinstance(other, gs.Variable) else None


def join_sums(sites: Sequence[Site], outputs: Sequence[gs.Variable], shapes: Shapes) -> list[Site]:
    """The sites, the second of two that are added as the term of the first (in place).

    The first is the one with more inputs per output. Neither may be read elsewhere, have an activation of its own or be
    a sum already, and both must have the same shape at every binding.
    """
    made = {id(s.output): s for s in sites}
    gone: set[int] = set()
    for site in sites:
        found = None if id(site) in gone else other_operand(site, outputs)
        other = None if found is None else made.get(id(found[1]))
        if found is None or other is None or id(other) in gone or not _fit(site, other, outputs, shapes):
            continue
        first, second = (site, other) if site.k >= other.k else (other, site)
        add = found[0]
        first.term, first.nodes = second, [*first.nodes, *second.nodes, add]
        if second.bias is not None:
            first.bias = second.bias if first.bias is None else first.bias + second.bias
        first.output = add.outputs[0]
        take_epilogue(first, outputs)
        gone.add(id(second))
        made[id(first.output)] = first
    return [s for s in sites if id(s) not in gone]


def _fit(site: Site, other: Site, outputs: Sequence[gs.Variable], shapes: Shapes) -> bool:
    if site is other or site.layout != other.layout:
        return False
    if any(s.term is not None or s.residual is not None or s.window is not None for s in (site, other)):
        return False
    if any(s.grow != (1, 1) for s in (site, other)):  # sums are those of pixels before they grow
        return False
    if other_operand(other, outputs) is None:  # something else reads it, too, or it has an activation
        return False
    pairs = [(known.get(site.output.name), known.get(other.output.name)) for known in shapes]
    return all(one is not None and one == another for one, another in pairs)
