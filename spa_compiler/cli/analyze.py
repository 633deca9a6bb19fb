"""`spa-analyze`: which channels of a model hang together, and what keeps the others where they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spa_compiler import __version__
from spa_compiler.cli.errors import exit_codes, logging_to

if TYPE_CHECKING:
    from rich.console import Console

    from spa_compiler.analysis import Analysis, Member
    from spa_compiler.analysis.schema import Pin

_EPILOG = """\b
Examples:
  spa-analyze model.onnx                       groups and pins as tables
  spa-analyze model.onnx --json > groups.json  with every unit and its indices, for programs

\b
A group holds units that can be removed one by one, each from all of its members at once. A pin names an axis
that has to stay, and why. Exit codes: 0 done, 1 internal, 2 usage, 3 unusable model, 6 environment.
Shell completion: eval "$(_SPA_ANALYZE_COMPLETE=bash_source spa-analyze)"
"""
_MEMBERS_SHOWN = 4


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.argument("model", metavar="MODEL.onnx", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else to stdout")
@click.option("-v", "--verbose", is_flag=True, help="Log to stderr what is done")
@click.version_option(__version__, prog_name="spa-analyze")
@exit_codes
def main(model: Path, as_json: bool, verbose: bool) -> None:
    """Show the groups of coupled channels of MODEL.onnx, and what pins the rest. Nothing is written."""
    logging_to(verbose, False, None)
    # Here and not above: --help must not wait for onnx and numpy.
    from spa_compiler.analysis import analyze
    from spa_compiler.graph.load import load

    analysis = analyze(load(model))
    if as_json:
        click.echo(analysis.to_json())
        return
    from rich.console import Console

    console = Console(highlight=False)
    _groups(analysis, console)
    _pins(analysis.pins, console)
    _summary(analysis, console)


def _groups(analysis: Analysis, console: Console) -> None:
    if not analysis.groups:
        console.print("no groups: nothing can be removed")
        return
    rows = [
        (
            str(group.id),
            f"{group.size:,}",
            group.granularity,
            f"{group.params:,}",
            "unknown" if group.macs is None else f"{group.macs:,}",
            _members(group.parameters),
        )
        for group in analysis.groups
    ]
    _table(console, ("group", "size", "granularity", "params", "MACs", "members"), rows, right=(0, 1, 3, 4))


def _members(members: Sequence[Member]) -> str:
    shown = ", ".join(f"{member.tensor}[{member.axis}]" for member in members[:_MEMBERS_SHOWN])
    return f"{shown} and {len(members) - _MEMBERS_SHOWN} more" if len(members) > _MEMBERS_SHOWN else shown


def _pins(pins: Iterable[Pin], console: Console) -> None:
    """One row per operator type and reason on the same parameters, the largest first."""
    rows: dict[tuple[str, str, int], list[Pin]] = {}
    for pin in pins:
        if pin.params:
            rows.setdefault((pin.op, pin.reason, pin.params), []).append(pin)
    if not rows:
        return
    console.print()
    ordered = sorted(rows.items(), key=lambda item: -item[0][2])
    cells = [
        (
            found[0].tensor + (f" and {len(found) - 1} more" if len(found) > 1 else ""),
            str(found[0].axis),
            op,
            reason,
            f"{params:,}",
        )
        for (op, reason, params), found in ordered
    ]
    _table(console, ("pinned tensor", "axis", "op", "reason", "params"), cells, right=(1, 4))


def _summary(analysis: Analysis, console: Console) -> None:
    units = sum(group.size for group in analysis.groups)
    share = analysis.prunable / analysis.params if analysis.params else 0.0
    silent = sum(1 for pin in analysis.pins if not pin.params)
    console.print()
    console.print(
        f"prunable: {analysis.prunable:,} of {analysis.params:,} parameters ({share:.1%}), "
        f"in {units:,} units of {len(analysis.groups):,} groups"
    )
    if silent:
        console.print(f"{silent:,} more pinned axes hold no parameters of their own; --json lists them")


def _table(console: Console, names: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate(names):
        table.add_column(name, overflow="fold", justify="right" if place in right else "left", no_wrap=place in right)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a name is no markup
    console.print(table)
