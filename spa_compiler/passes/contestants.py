"""Which groups of coupled channels a pass takes: `targets`, `ignore` and `granularity`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase

import onnx_graphsurgeon as gs

from spa_compiler.analysis import Analysis, Group
from spa_compiler.errors import UsageError
from spa_compiler.passes.names import did_you_mean

_log = logging.getLogger(__name__)


def select(
    analysis: Analysis, graph: gs.Graph, targets: Sequence[str], ignore: Sequence[str], granularity: Sequence[str]
) -> list[Group]:
    """The groups to work on.

    Args:
        targets: names or globs. A tensor (parameters too) means every group on its axes, a node the groups on its
            outputs; what units are ("head") means the groups of such units. Empty takes all.
        ignore: the same, to leave alone; stronger than `targets`.
        granularity: what units must be; empty takes all.

    Raises:
        UsageError: an entry matches nothing.
    """
    names = _names(analysis, graph)
    kinds = {group.id: frozenset({group.granularity, *group.granularity.split(", ")}) for group in analysis.groups}
    known = sorted(frozenset().union(*kinds.values()))
    for kind in granularity:
        if kind not in known:
            raise UsageError(f"granularity: the model has no group of {kind!r}", fix=did_you_mean(kind, known))
    wanted = _matching(targets, names, kinds)
    for entry in targets:
        if not wanted[entry]:
            raise UsageError(
                f"targets: {entry!r} matches no tensor, node or granularity that any group touches",
                fix=did_you_mean(entry, [*known, *names]),
            )
    unwanted = _matching(ignore, names, kinds)
    for entry in ignore:
        if not unwanted[entry]:
            raise UsageError(
                f"ignore: {entry!r} matches no tensor, node or granularity that any group touches",
                fix=did_you_mean(entry, [*known, *names]),
            )
    inside = set().union(*wanted.values()) if targets else set(kinds)
    outside = set().union(*unwanted.values())
    return [
        group
        for group in analysis.groups
        if group.id in inside - outside and (not granularity or not kinds[group.id].isdisjoint(granularity))
    ]


def _names(analysis: Analysis, graph: gs.Graph) -> dict[str, set[int]]:
    """Groups by the names of the tensors that they touch, and of the nodes that write them."""
    out: dict[str, set[int]] = {}
    for group in analysis.groups:
        for member in group.members:
            out.setdefault(member.tensor, set()).add(group.id)
    for node in graph.nodes:
        groups = set().union(*(out.get(tensor.name, ()) for tensor in node.outputs))
        if node.name and groups:
            out.setdefault(node.name, set()).update(groups)
    return out


def _matching(
    entries: Sequence[str], names: dict[str, set[int]], kinds: dict[int, frozenset[str]]
) -> dict[str, set[int]]:
    """For each entry the groups that it means."""
    out: dict[str, set[int]] = {}
    for entry in entries:
        by_name = (groups for name, groups in names.items() if name == entry or fnmatchcase(name, entry))
        out[entry] = set().union(*by_name, (group for group, own in kinds.items() if entry in own))
    return out
