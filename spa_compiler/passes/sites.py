"""Which weights a pass on weights takes: `targets`, `ignore`, and what is left alone unless it is named."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, TypeAlias

import onnx_graphsurgeon as gs
from msgspec import Meta

from spa_compiler.errors import UsageError
from spa_compiler.graph.operators import WeightedOp, reaches_output_bare, weighted_ops
from spa_compiler.passes.pass_ import SkippedSite

_log = logging.getLogger(__name__)

Targets: TypeAlias = Annotated[
    tuple[str, ...], Meta(description="what to take: names or globs of nodes or weights, or op types; empty takes all")
]
Ignore: TypeAlias = Annotated[
    tuple[str, ...], Meta(description="what to leave alone, written like `targets`, and stronger")
]

_SHOWN_NAMES = 5

DEPTHWISE = "depthwise convolution"
"""Why such a site is skipped."""


def select(
    graph: gs.Graph, targets: Sequence[str], ignore: Sequence[str]
) -> tuple[list[WeightedOp], list[SkippedSite]]:
    """The sites to work on in topological order, and the others with the reason.

    Args:
        graph: the outermost graph.
        targets: names or globs of nodes or weights, or op types; empty takes every site. A name or a glob also takes
            what is left alone by default; an op type does not.
        ignore: the same, to leave alone; stronger than `targets`.

    Raises:
        UsageError: an entry of `targets` matches no site.
    """
    ops = weighted_ops(graph)
    for entry in targets:
        if not any(_named(op, entry) or op.kind == entry for op in ops):
            names = ", ".join(op.name for op in ops[:_SHOWN_NAMES])
            raise UsageError(
                f"targets: {entry!r} matches no MatMul, Gemm or Conv with a constant weight",
                fix=f"The model's are: {names}{', ...' if len(ops) > _SHOWN_NAMES else ''}" if ops else "It has none",
            )
    for entry in ignore:
        if not any(_named(op, entry) or op.kind == entry for op in ops):
            _log.warning("ignore: %r matches no MatMul, Gemm or Conv with a constant weight", entry)
    taken: list[WeightedOp] = []
    skipped: list[SkippedSite] = []
    for op in ops:
        reason = _reason_to_skip(op, graph, targets, ignore)
        if reason is None:
            taken.append(op)
        else:
            skipped.append(SkippedSite(op.name, reason))
    return taken, skipped


def _named(op: WeightedOp, entry: str) -> bool:
    """Whether a name or glob means the node or its weight; equality first, as names may hold a glob's characters."""
    return any(name == entry or fnmatchcase(name, entry) for name in (op.name, op.weight.name))


def _reason_to_skip(op: WeightedOp, graph: gs.Graph, targets: Sequence[str], ignore: Sequence[str]) -> str | None:
    """Why the site is left alone, or None."""
    if any(_named(op, entry) or op.kind == entry for entry in ignore):
        return "named by `ignore`"
    if any(_named(op, entry) for entry in targets):
        return None
    if targets and op.kind not in targets:
        return "not among `targets`"
    if op.depthwise:
        return DEPTHWISE
    if op.is_first_conv:
        return "first convolution"
    if reaches_output_bare(op, graph):
        return "reaches an output with no residual or norm after it"
    return None
