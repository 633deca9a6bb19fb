"""`spa-analyze`: which channels of a model hang together, and what keeps the others where they are."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spa_compiler import __version__
from spa_compiler.cli.errors import exit_codes, logging_to
from spa_compiler.cli.progress import bars
from spa_compiler.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from spa_compiler.analysis import Analysis, Member
    from spa_compiler.analysis.summary import Reason
    from spa_compiler.graph.model import Model

_EPILOG = """\b
Examples:
  spa-analyze model.onnx                       groups and pins as tables
  spa-analyze model.onnx --json > groups.json  with every unit and its indices, for programs
  spa-analyze model.onnx --html model.html     the graph, coloured by group, beside the tables
  spa-analyze bert.onnx --shape input_ids=1,128 --shape attention_mask=1,128

\b
A group holds units that can be removed one by one, each from all of its members at once. A pin names an axis
that has to stay, and why. Exit codes: 0 done, 1 internal, 2 usage, 3 unusable model, 6 environment (a file cannot
be written), 130 interrupted.
Shell completion: eval "$(_SPA_ANALYZE_COMPLETE=bash_source spa-analyze)"
"""
_MEMBERS_SHOWN = 4
_ROWS_SHOWN = 40
_REASONS_SHOWN = 5
_WIDTH = 200  # of tables where stdout is no terminal
_NAME = 160  # characters of a name that are shown


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.argument("model", metavar="MODEL.onnx", type=click.Path(path_type=Path))
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="INPUT=1,128",
    help="Sizes to count MACs with, where the model leaves them open; repeatable  [default: small ones that fit]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else to stdout")
@click.option("--html", metavar="FILE", type=click.Path(path_type=Path), help="Write a page: the graph and the tables")
@click.option("--svg", metavar="FILE", type=click.Path(path_type=Path), help="Write the drawing of the graph alone")
@click.option("--all", "everything", is_flag=True, help=f"Print all rows of the tables, not the {_ROWS_SHOWN} largest")
@click.option("-v", "--verbose", is_flag=True, help="Log to stderr what is done")
@click.version_option(__version__, prog_name="spa-analyze")
@exit_codes
def main(
    model: Path,
    shapes: tuple[str, ...],
    as_json: bool,
    html: Path | None,
    svg: Path | None,
    everything: bool,
    verbose: bool,
) -> None:
    """Show the groups of coupled channels of MODEL.onnx, and what pins the rest.

    Nothing is written but the files of --html and --svg, which are replaced if they exist.
    """
    logging_to(verbose, False, None)
    _writable(model, html, svg)
    # Here and not above: --help must not wait for onnx and numpy.
    from rich.console import Console

    from spa_compiler.analysis import analyze, draw
    from spa_compiler.analysis.summary import reasons
    from spa_compiler.calibration.shapes import parse_shapes
    from spa_compiler.graph.load import load

    drawings: list[tuple[Path | None, Callable[[Model, Analysis], str]]] = [(html, draw.page), (svg, draw.svg)]
    with bars(Console(stderr=True), quiet=False) as progress:
        progress("reading", 0, 1)
        loaded = load(model)
        progress("reading", 1, 1)
        progress("analyzing", 0, 1)
        analysis = analyze(loaded, parse_shapes(shapes, loaded)[0] if shapes else None)
        progress("analyzing", 1, 1)
        for path, drawing in drawings:
            if path is not None:
                progress(f"drawing {path.name}", 0, 1)
                _write(path, drawing(loaded, analysis))
                progress(f"drawing {path.name}", 1, 1)
    if as_json:
        click.echo(analysis.to_json())
        return
    console = Console(highlight=False) if sys.stdout.isatty() else _log()
    _groups(analysis, console, everything)
    held_by = reasons(analysis)
    _pins(held_by, console, everything)
    _summary(analysis, held_by, console)
    _sizes(loaded, analysis, console)
    for path, _ in drawings:
        if path is not None:
            console.print(f"written: {path}", markup=False, soft_wrap=True)


def _sizes(model: Model, analysis: Analysis, console: Console) -> None:
    """Which sizes the MACs were counted with, where the model leaves some open."""
    settled = analysis.facts.settled
    opened = [value.name for value in model.signature.inputs if any(not isinstance(dim, int) for dim in value.shape)]
    sizes = [f"{name}={','.join(map(str, settled.shapes[name]))}" for name in opened if name in settled.shapes]
    if sizes:
        console.print(
            f"MACs are those of one sample, counted with {' '.join(sizes)} (--shape counts with others)",
            markup=False,
            soft_wrap=True,
        )


def _log() -> Console:
    """A console without an edge to fold at, unless COLUMNS says where it is."""
    from rich.console import Console

    return Console(highlight=False, width=None if "COLUMNS" in os.environ else _WIDTH)


def _writable(model: Path, html: Path | None, svg: Path | None) -> None:
    """Refuses what cannot be meant, before any work."""
    for path, option in ((html, "--html"), (svg, "--svg")):
        if path is None:
            continue
        if path.is_dir():
            raise UsageError(f"{option} {path} is a folder", fix="Name a file")
        if not path.parent.is_dir():
            raise UsageError(f"{option} {path}: there is no folder {path.parent}", fix="Create it, or name another one")
        if path.resolve() == model.resolve():
            raise UsageError(f"{option} {path} is the model itself", fix="Name another file")
    if html is not None and svg is not None and html.resolve() == svg.resolve():
        raise UsageError("--html and --svg name the same file", fix="Name two files")


def _write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    target = path.resolve()  # a symbolic link stays one
    twin = target.with_name(f".{target.name[:100]}.{os.getpid()}.tmp")
    try:
        if target.exists() and not target.is_file():  # a pipe or a device
            target.write_text(text, "utf-8")
            return
        try:
            twin.write_text(text, "utf-8")
            twin.replace(target)
        finally:
            twin.unlink(missing_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot be written: {error.strerror}", where=str(path), fix="Name a file in a folder that you may write to"
        ) from error


def _groups(analysis: Analysis, console: Console, everything: bool) -> None:
    if not analysis.groups:
        console.print("no groups: nothing can be removed")
        return
    ordered = sorted(analysis.groups, key=lambda group: -group.params)
    shown = ordered if everything else ordered[:_ROWS_SHOWN]
    rows = [
        (
            str(group.id),
            f"{group.size:,}",
            _plain(group.granularity),
            f"{group.params:,}",
            "unknown" if group.macs is None else f"{group.macs:,}",
            _members(group.parameters),
        )
        for group in shown
    ]
    _table(console, ("group", "size", "granularity", "params", "MACs", "members"), rows, right=(0, 1, 3, 4))
    _rest(console, "smaller groups", len(ordered) - len(shown))


def _members(members: Sequence[Member]) -> str:
    shown = ", ".join(f"{_plain(member.tensor)}[{member.axis}]" for member in members[:_MEMBERS_SHOWN])
    return f"{shown} and {len(members) - _MEMBERS_SHOWN} more" if len(members) > _MEMBERS_SHOWN else shown


def _pins(found: Sequence[Reason], console: Console, everything: bool) -> None:
    """One row per operator type and reason; those that hold no parameters are only counted."""
    holding = found if everything else [reason for reason in found if reason.params]
    shown = holding if everything else holding[:_ROWS_SHOWN]
    silent = sum(reason.axes for reason in found) - sum(reason.axes for reason in holding)
    if shown:
        rows = [(_plain(r.op), _plain(r.reason), f"{r.axes:,}", f"{r.params:,}", _plain(r.example)) for r in shown]
        console.print()
        _table(console, ("pinned by", "reason", "axes", "params", "for example"), rows, right=(2, 3))
        _rest(console, "reasons", len(holding) - len(shown))
    if silent:
        console.print(f"{silent:,} more pinned axes hold no parameters of their own; --all shows their reasons")


def _summary(analysis: Analysis, found: Sequence[Reason], console: Console) -> None:
    units = sum(group.size for group in analysis.groups)
    total = analysis.params or 1
    console.print()
    console.print(
        f"prunable: {analysis.prunable:,} of {analysis.params:,} parameters ({analysis.prunable / total:.1%}), "
        f"in {units:,} units of {len(analysis.groups):,} groups"
    )
    pinned = analysis.params - analysis.prunable
    holding = [reason for reason in found if reason.params]
    told = [f"{_plain(r.reason)} ({_plain(r.op)}) {_share(r.params, total)}" for r in holding[:_REASONS_SHOWN]]
    more = f", and {len(holding) - len(told)} more reasons" if len(holding) > len(told) else ""
    both = "; a parameter may have several" if len(holding) > 1 else ""
    by = f", held by: {', '.join(told)}{more}{both}" if pinned and told else ""
    console.print(f"pinned: {_share(pinned, total)} of parameters{by}", markup=False)


def _share(part: int, whole: int) -> str:
    """A percentage that is 0.0% for nothing alone."""
    return "<0.1%" if 0 < part < 0.0005 * whole else f"{part / whole:.1%}"


def _plain(text: str) -> str:
    """Text of the file, without what a terminal would act on, and cut where it has no end."""
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in text[: _NAME + 1])
    return shown if len(shown) <= _NAME else shown[: _NAME - 1] + "\u2026"


def _rest(console: Console, what: str, count: int) -> None:
    if count:
        console.print(f"and {count:,} more {what}; --all shows them")


def _table(console: Console, names: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate(names):
        table.add_column(name, overflow="fold", justify="right" if place in right else "left", no_wrap=place in right)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a name is no markup
    console.print(table)


if __name__ == "__main__":
    main()
