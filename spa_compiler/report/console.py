"""The report as tables and lines for a terminal. rich is imported when something is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spa_compiler.report.report import ARTIFACT_RUNTIME, Placement, Report

if TYPE_CHECKING:
    from rich.console import Console

#: p90 - p10 over the median. Races on a virtual machine that shares its processor (docs/measured.json) reach a half.
_BUSY = 0.55
#: of sites that are one line
_MOST_NAMES = 3
#: contenders of the whole-model race that have no kernels
_DENSE = ("source", "portable")


def header(report: Report, console: Console) -> None:
    """The first lines: versions, target, ISA, threads, ONNX Runtime and its providers."""
    versions, machine = report.versions, report.machine
    isa = f" ({report.isa})" if report.isa else ""
    providers = ", ".join(machine.providers)
    _line(console, f"spa-compiler {report.spa_compiler} | {report.asked.source} -> {report.asked.target}{isa}")
    gpu = f" | {machine.gpu}" if machine.gpu else ""
    _line(console, f"{machine.cpu}, {machine.isa}, {machine.cores} cores | {plural(machine.threads, 'thread')}{gpu}")
    _line(
        console,
        f"ONNX Runtime {versions.onnxruntime} ({providers}) | onnx {versions.onnx} | TVM {versions.tvm} | "
        f"Python {versions.python}",
    )


def changes(report: Report, console: Console) -> None:
    """What the canonicalization noted and what each pass did, one line each."""
    for note in report.notes:
        _line(console, f"note: {note}")
    for change in report.passes:
        _line(console, f"{change.name}: {change.summary}")
        for warning in change.warnings:
            _line(console, f"{change.name}: warning: {warning}")
    if report.output_change is not None:
        _line(console, f"outputs changed by {report.output_change:.2%} on calibration samples that no pass has seen")


def layers(report: Report, console: Console) -> None:
    """A table of `--explain`: every layer that a pass changed, how, and what that cost."""
    from rich.table import Table

    changed = [(change.name, site) for change in report.passes for site in change.sites]
    if not changed:
        return
    of = "outputs" if report.asked.options.get("calib") else "weights"
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("pass", "layer", "pattern", "method"):
        table.add_column(name, overflow="fold")
    for name in ("kept", f"error of its {of}"):
        table.add_column(name, justify="right")
    for name, site in changed:
        method = f"{site.method}, then restored" if site.restored else site.method
        numbers = (f"{site.density_after:.1%}", f"{site.error:.2%}")
        table.add_row(*map(_text, (name, site.node, site.pattern, method)), *numbers)
    console.print(table)


def sites(report: Report, console: Console) -> None:
    """The table of `--explain`: which form each site got, what was measured, and why.

    Sites that differ in nothing but their names are one line; report.json has each.
    """
    from rich.table import Table

    if not report.placements:
        _line(console, "no sites: no MatMul, Gemm or Conv with a constant weight")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("site", "op", "n x k"):
        table.add_column(name, overflow="fold")
    table.add_column("tokens", justify="right")
    table.add_column("zeros", justify="right")
    for name in ("pattern", "measured, us (p10-p90)", "form", "why"):
        table.add_column(name, overflow="fold")
    members: dict[str, set[str]] = {}
    for place in report.placements:
        members.setdefault(place.region, set()).add(place.node)
    for alike in _folded(report.placements, members):
        place = alike[0]
        zeros = "" if math.isnan(place.density) else f"{1 - place.density:.0%}"
        tokens = str(place.tokens) if place.tokens else ""
        row = (_names(alike), place.op, f"{place.n} x {place.k}", tokens, zeros, place.pattern)
        table.add_row(*map(_text, (*row, _candidates(place), _form(place, members), _why(place))))
    console.print(table)


def race(report: Report, console: Console) -> None:
    """The whole model at each shape: the source, the artifact, and every plan that lost to it."""
    from rich.table import Table

    if not report.race:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("shape", "model", "runtime"):
        table.add_column(name, overflow="fold")
    for name in ("median ms", "p10", "p90", "over dense"):
        table.add_column(name, justify="right")
    for row in report.race:
        times = (f"{value:.3f}" for value in (row.median_ms, row.p10_ms, row.p90_ms))
        dense = [r.median_ms for r in report.race if r.shape == row.shape and r.plan in _DENSE]
        ratio = f"{min(dense) / row.median_ms:.2f}" if dense and row.plan not in _DENSE else ""
        name = f"{row.runtime} ({row.plan})" if row.runtime == ARTIFACT_RUNTIME and row.plan else row.runtime
        table.add_row(_text(row.shape), _text(row.model), _text(name), *times, ratio)
    console.print(table)


def summary(report: Report, folder: Path | None, console: Console) -> None:
    """The last lines: ratio, size, error, path, and how to load the result.

    Args:
        folder: where the artifact lies; None in a dry run.
    """
    for hint in report.hints:
        _line(console, f"hint: {hint}")
    for ratio in report.ratios:
        _line(console, f"{ratio.ratio:.2f}x as fast as {ratio.over} at {ratio.shape}", style="bold")
    if noise := _noise(report):
        _line(console, f"warning: {noise}")
    if report.sizes:
        sizes = report.sizes
        now = sizes.model + sizes.kernels
        share = f" ({now / sizes.source:.0%})" if sizes.source else ""
        _line(console, f"size: {bytes_text(sizes.source)} -> {bytes_text(now)}{share}")
    worst = report.worst_check()
    if worst:
        error = "not comparable" if worst.error is None else f"{worst.error:.1e}"
        _line(
            console,
            f"error: {error} of the largest output, {worst.tolerance:.0e} allowed "
            f"({plural(len(report.checks), 'check')} against portable.onnx)",
        )
    if report.failure:
        _line(console, f"failed: {report.failure}", style="bold red")
    elif folder:
        _line(console, f"wrote {folder}")
        console.print()
        console.print(
            snippet(folder, gpu=report.asked.target.startswith("cuda")), markup=False, highlight=False, soft_wrap=True
        )


def snippet(folder: Path, gpu: bool = False) -> str:
    """Python that runs the artifact in stock ONNX Runtime, with its CUDA provider if it was compiled for a GPU."""
    providers = ", providers=['CUDAExecutionProvider', 'CPUExecutionProvider']" if gpu else ""
    return (
        "import onnxruntime as ort\n"
        "options = ort.SessionOptions()\n"
        f"options.register_custom_ops_library({str(folder / 'kernels.so')!r})\n"
        f"session = ort.InferenceSession({str(folder / 'model.onnx')!r}, options{providers})"
    )


def bytes_text(count: int) -> str:
    """A size as people write it: "90.4 MB"."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("the loop returns at its last unit")


def plural(count: int, noun: str) -> str:
    """A number with its noun: "1 check", "2 checks"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _noise(report: Report) -> str:
    """Why the ratios are rough, and what to do; empty where the machine was quiet."""
    raced = {ARTIFACT_RUNTIME, *(ratio.over for ratio in report.ratios)}
    worst = max((row for row in report.race if row.runtime in raced), key=lambda row: row.spread, default=None)
    if worst is None or worst.spread <= _BUSY:
        return ""
    return (
        f"the machine was busy during the race (p10 and p90 of {worst.runtime} at {worst.shape} are {worst.spread:.0%} "
        "of the median apart), so the speed is a rough figure. Run the same again when nothing else runs, with "
        "--records NEW_FILE, so that forms are chosen anew, too"
    )


def _folded(places: Sequence[Placement], members: Mapping[str, set[str]]) -> list[list[Placement]]:
    """The placements of sites that have been told the same, together; in order of first appearance."""
    found: dict[object, list[Placement]] = {}
    for place in places:
        zeros = None if math.isnan(place.density) else round(place.density, 2)
        told = (place.op, place.n, place.k, place.tokens, zeros, place.pattern, place.candidates, place.reason)
        found.setdefault((*told, place.would_help, _form(place, members)), []).append(place)
    return list(found.values())


def _names(alike: Sequence[Placement]) -> str:
    names = [place.node for place in alike]
    if len(names) <= _MOST_NAMES + 1:
        return "\n".join(names)
    return "\n".join([*names[:_MOST_NAMES], f"and {len(names) - _MOST_NAMES} more like them"])


def _form(place: Placement, members: Mapping[str, set[str]]) -> str:
    if not place.region:
        return place.form
    count = len(members[place.region])
    form = f"{place.form} as a kernel" if place.form == "dense" else place.form  # for its neighbours' sake
    return f"{form}, a node of its own" if count == 1 else f"{form}, in a region of {count} sites"


def _candidates(place: Placement) -> str:
    ranked = sorted(place.candidates, key=lambda c: c.median_us)
    return "\n".join(
        f"{'*' if c.chosen else ' '} {c.name} {c.median_us:.1f} ({c.p10_us:.1f}-{c.p90_us:.1f})" for c in ranked
    )


def _why(place: Placement) -> str:
    return f"{place.reason}\nwould help: {place.would_help}" if place.would_help else place.reason


def _text(value: str) -> str:
    """Names from a model are text, never markup."""
    from rich.markup import escape

    return escape(value)


def _line(console: Console, text: str, *, style: str | None = None) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True, style=style)
