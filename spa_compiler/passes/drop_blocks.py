"""`drop-blocks`: whole residual blocks are left out, named by the user."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

import onnx_graphsurgeon as gs
from msgspec import Meta

from spa_compiler.errors import UsageError
from spa_compiler.graph import shapes
from spa_compiler.graph.model import Model
from spa_compiler.graph.settle import Settled, settle
from spa_compiler.graph.weights import array_of
from spa_compiler.passes.pass_ import Change, Context, check_options

_log = logging.getLogger(__name__)

_SHOWN = 12
"""Blocks that a message lists."""


@dataclass(frozen=True, kw_only=True)
class DropBlocksOptions:
    """Options of `drop-blocks`."""

    blocks: Annotated[
        tuple[str, ...],
        Meta(
            min_length=1,
            description="names or globs of nodes, each of which must lie on the branch of one residual block or more: "
            "`/layer3/layer3.1/*`; a block goes when all of the matching nodes that lie on branches do",
        ),
    ]


@dataclass(frozen=True, eq=False)
class Block:
    """x -> branch -> Add(x, branch): `branch` are the nodes that nothing but the Add needs."""

    add: gs.Node
    skip: gs.Tensor
    branch: tuple[gs.Node, ...]

    @property
    def name(self) -> str:
        """What tells it apart: the name of its Add, else of what the Add makes."""
        return str(self.add.name or self.add.outputs[0].name)


class DropBlocks:
    """y = Add(x, f(x))    becomes    y = x

    Leaves residual blocks out: the nodes between a tensor and the Add that brings it together with what was computed
    from it. A block is named by its nodes (names or globs); the Add becomes its other operand, whose shape must be the
    sum's. Measure the accuracy afterwards: nothing is trained. Blocks that change the width, and branches that are used
    elsewhere too, cannot be dropped; what could be is listed where a name matches none.
    """

    name: ClassVar[str] = "drop-blocks"
    Options: ClassVar[type[Any]] = DropBlocksOptions

    def __init__(self, options: DropBlocksOptions) -> None:
        check_options(options)
        self.options = options

    def run(self, model: Model, context: Context) -> Change:
        """Leaves blocks out of `model` in place.

        Raises:
            UsageError: an entry matches no residual block.
        """
        shapes.infer(model)
        blocks = find(model)
        dropped: dict[int, Block] = {}
        for entry in self.options.blocks:
            found = _matching(blocks, entry, model.graph)
            if not found:
                raise UsageError(
                    f"blocks: {entry!r} matches no node on a residual branch",
                    where=self.name,
                    fix=_what_there_is(blocks),
                )
            dropped.update((id(block.add), block) for block in found)
        count = sum(len(block.branch) + 1 for block in dropped.values())
        parameters = sum(_parameters(block) for block in dropped.values())
        _bypass(model.graph, list(dropped.values()))
        model.graph.cleanup(remove_unused_graph_inputs=False)
        shapes.infer(model)
        names = ", ".join(block.name for block in dropped.values())
        noun = "block" if len(dropped) == 1 else "blocks"
        return Change(
            pass_name=self.name,
            summary=f"{len(dropped)} residual {noun} left out ({count} nodes, {parameters:,} parameters): {names}",
        )


def find(model: Model) -> list[Block]:
    """Every residual block that can be dropped, in topological order."""
    graph, sizes = model.graph, settle(model)
    outputs = {id(tensor) for tensor in graph.outputs}
    order = {id(node): number for number, node in enumerate(graph.nodes)}
    found = []
    for add in graph.nodes:
        if add.op != "Add" or (add.domain or "") not in ("", "ai.onnx") or len(add.inputs) != 2:
            continue
        for skip, end in (add.inputs, add.inputs[::-1]):
            branch = _branch(skip, end, add, outputs, order)
            if branch and _same_shape(skip.name, add.outputs[0].name, sizes):
                found.append(Block(add, skip, branch))
                break
    return found


def _branch(
    skip: gs.Tensor, end: gs.Tensor, add: gs.Node, outputs: set[int], order: dict[int, int]
) -> tuple[gs.Node, ...]:
    """What makes `end` and is used for nothing else, if that computes something from `skip`; else nothing.

    Nodes are taken from the Add upwards, each once all that reads it is taken. Where a tensor other than `skip` leads
    in from the rest of the graph (a mask, positions), it is an operand of the branch like a constant.
    """
    if isinstance(skip, gs.Constant) or isinstance(end, gs.Constant) or not skip.name:
        return ()
    taken: dict[int, gs.Node] = {}
    reached = False
    queue = [end]
    while queue:
        tensor = queue.pop()
        if tensor is skip:
            reached = True
            continue
        if not tensor.inputs or id(tensor) in outputs:
            continue
        node = tensor.inputs[0]
        if id(node) in taken or any(id(out) in outputs for out in node.outputs):
            continue
        if all(reader is add or id(reader) in taken for out in node.outputs for reader in out.outputs):
            taken[id(node)] = node
            queue += [source for source in node.inputs if source.name]
    return tuple(sorted(taken.values(), key=lambda node: order[id(node)])) if reached and taken else ()


def _matching(blocks: Sequence[Block], entry: str, graph: gs.Graph) -> list[Block]:
    """The innermost blocks on whose branches nodes of that name lie, or whose Add has it."""
    hits = [node for node in graph.nodes if node.name and (node.name == entry or fnmatchcase(node.name, entry))]
    found: dict[int, Block] = {}
    for node in hits:
        around = [block for block in blocks if block.add is node] or [
            block for block in blocks if any(node is own for own in block.branch)
        ]
        if around:
            nearest = min(around, key=lambda block: len(block.branch))
            found[id(nearest.add)] = nearest
    return [block for block in blocks if id(block.add) in found]


def _same_shape(skip: str, total: str, sizes: Settled) -> bool:
    """Equal sizes, whatever the inputs' sizes are; open dimensions are bound to different numbers."""
    shape = sizes.shapes.get(skip)
    if shape is None or None in shape:
        return False
    return shape == sizes.shapes.get(total) and sizes.varies[skip] == sizes.varies[total]


def _bypass(graph: gs.Graph, blocks: Sequence[Block]) -> None:
    """Readers of a sum read its skip input; a graph output keeps its name through an Identity."""
    instead = {id(block.add.outputs[0]): block.skip for block in blocks}
    for block in blocks:
        total, skip = block.add.outputs[0], block.skip
        while id(skip) in instead:  # the block before goes too
            skip = instead[id(skip)]
        for reader in list(total.outputs):
            reader.inputs = [skip if tensor is total else tensor for tensor in reader.inputs]
        block.add.op, block.add.attrs, block.add.inputs = "Identity", {}, [skip]


def _parameters(block: Block) -> int:
    constants = {
        id(tensor): tensor
        for node in block.branch
        for tensor in node.inputs
        if isinstance(tensor, gs.Constant) and tensor.outputs
    }
    return sum(int(array_of(tensor).size) for tensor in constants.values() if array_of(tensor).dtype.kind == "f")


def _what_there_is(blocks: Sequence[Block]) -> str:
    if not blocks:
        return "The model has no residual block that could be left out"
    shown = ", ".join(f"{block.branch[0].name} .. {block.name}" for block in blocks[:_SHOWN])
    return f"Residual blocks (first node .. Add): {shown}{', ...' if len(blocks) > _SHOWN else ''}"
