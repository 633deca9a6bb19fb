"""The tables of `spa-bench --profile`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spa_compiler.cli.screen import screen

if TYPE_CHECKING:
    from rich.console import Console

    from spa_compiler.bench.profile import NodeTime, Profiled, Row, Shape

#: what a cell shows: nodes of a row, nodes of the original that one of them stands for. --json has them all
_MOST_NODES, _MOST_ORIGINALS = 6, 3


def show(result: Profiled) -> None:
    """A table for each shape."""
    console = screen()
    threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
    console.print(f"{result.machine}, {threads}, medians of {result.runs} runs", highlight=False, markup=False)
    for shape in result.shapes:
        console.print()
        _table(shape, console)


def _table(shape: Shape, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    theirs, ours = shape.theirs, shape.ours
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in (f"{theirs.model}, at {shape.shape}", "ms", f"{ours.model}", "ms", "ratio"):
        right = name in ("ms", "ratio")
        table.add_column(Text(name), justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in shape.rows:
        table.add_row(*map(Text, _cells(row)))
    for name, one, other in (
        ("all nodes", theirs.nodes_ms, ours.nodes_ms),
        ("whole run, with what lies between nodes", theirs.wall_ms, ours.wall_ms),
    ):
        table.add_row(name, f"{one:.3f}", "", f"{other:.3f}", f"{one / other:.2f}" if other else "", style="bold")
    console.print(table)
    console.print(
        f"onnxruntime {ours.onnxruntime}. Ratios above 1: {ours.model} is the faster. The profiler counts whole "
        "microseconds and slows both down; for the speed as it is, leave out --profile.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    return (
        f"ONNX Runtime's own: {row.own}" if row.own else _nodes(row.theirs) or "no such node",
        f"{row.theirs_ms:.3f}" if row.theirs else "",
        f"{row.own}, {len(row.ours)} times" if row.own and row.ours else _nodes(row.ours, own_names=True),
        f"{row.ours_ms:.3f}" if row.ours else "",
        "" if row.ratio is None else f"{row.ratio:.2f}",
    )


def _nodes(nodes: Sequence[NodeTime], own_names: bool = False) -> str:
    """A line for each node, those that take longest; times only where there are several."""
    if len(nodes) == 1:
        return _name(nodes[0], own_names)
    ranked = sorted(nodes, key=lambda node: -node.ms)
    shown = ranked[:_MOST_NODES] if len(ranked) > _MOST_NODES + 1 else ranked
    lines = [f"{node.ms:.3f}  {_name(node, own_names)}" for node in shown]
    if rest := ranked[len(shown) :]:
        lines.append(f"{sum(node.ms for node in rest):.3f}  {len(rest)} more nodes")
    return "\n".join(lines)


def _name(node: NodeTime, own_names: bool) -> str:
    """Its operator, and the original's nodes that it stands for; or its own name."""
    if own_names or not node.originals:
        return node.name if node.name.startswith("ai.spa/") else f"{node.op} {node.name}"
    shown = node.originals
    more = ""
    if len(shown) > _MOST_ORIGINALS + 1:
        shown, more = shown[:_MOST_ORIGINALS], f" + {len(shown) - _MOST_ORIGINALS} more"
    return f"{node.op} {' + '.join(shown)}{more}"
