"""spa-bench: models and artifacts against other runtimes. Options in, one call, a table or JSON out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spa_compiler import __version__
from spa_compiler.cli.errors import exit_codes, logging_to
from spa_compiler.cli.profiled import show
from spa_compiler.cli.progress import bars
from spa_compiler.cli.screen import screen

if TYPE_CHECKING:
    from spa_compiler.bench.compare import Result

_EPILOG = """\b
Examples:
  spa-bench model.onnx model-spa                                     the artifact against its source
  spa-bench model.onnx model-spa --against onnxruntime,onnxruntime-int8 --threads 1
  spa-bench model.onnx --shape ids=1,128 --shape ids=8,64 --json     two shapes, machine-readable
  spa-bench --profile model.onnx model-spa --threads 1               the time of each node, side by side
"""


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.argument("models", nargs=-1, required=True, metavar="A [B ...]", type=click.Path(path_type=Path))
@click.option(
    "--against",
    default="onnxruntime",
    show_default=True,
    metavar="ENGINES",
    help="Runtimes, separated by commas: onnxruntime, onnxruntime-best, onnxruntime-int8, openvino, openvino-bf16, "
    "openvino-int8, openvino-int8-vnni, deepsparse.",
)
@click.option("--python", "pythons", multiple=True, metavar="ENGINE=PATH", help="The interpreter an engine runs in.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of each engine.  [default: the physical cores]")
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="INPUT=1,128",
    help="The shape of an input; one that comes again starts the next set of shapes to measure.",
)
@click.option(
    "--runs", type=click.IntRange(min=1), default=50, show_default=True, help="Timed calls of each contender."
)
@click.option(
    "--profile",
    "profiled",
    is_flag=True,
    help="The time of each node in ONNX Runtime, of an original and its artifact, by the original's names.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else to stdout.")
@click.version_option(__version__, prog_name="spa-bench")
@exit_codes
def main(
    models: tuple[Path, ...],
    against: str,
    pythons: tuple[str, ...],
    threads: int | None,
    shapes: tuple[str, ...],
    runs: int,
    profiled: bool,
    as_json: bool,
) -> None:
    """Time models side by side, in turns, on the same inputs.

    A and B are .onnx files, or folders that spa-compile wrote. A folder runs as it is ("spa" in the table) and as its
    portable.onnx; name the original file too, to compare with it. Ratios above 1 mean that the folder is faster.

    --profile takes two of them (or a folder alone, whose portable.onnx is then the original).
    """
    if profiled and against != "onnxruntime":
        raise click.UsageError("--profile runs in ONNX Runtime alone, and has nothing to do --against other engines")

    # Here and not above: --help must not wait for onnx and numpy.
    from rich.console import Console

    from spa_compiler.bench import compare, engines, profile
    from spa_compiler.targets import host

    logging_to(verbose=False, quiet=False, log_file=None)
    machine = host()
    named = compare.entries(models)
    cpu = f"{machine.model or machine.name} ({machine.level}, {machine.cores_physical} cores)"
    pairs = compare.parse_pythons(pythons)
    with bars(Console(stderr=True), quiet=False) as progress:
        measure = profile.profile if profiled else partial(compare.compare, engines=engines.parse(against))
        result = measure(
            named,
            machine=cpu,
            threads=threads or machine.cores_physical,
            runs=runs,
            shapes=shapes,
            pythons=pairs,
            progress=progress,
        )
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(result), indent=2))
    elif isinstance(result, profile.Profiled):
        show(result)
    else:
        _show(result)


def _show(result: Result) -> None:
    from rich.table import Table
    from rich.text import Text

    console = screen()
    threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
    console.print(f"{result.machine}, {threads}, {result.runs} runs", highlight=False, markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("model", "runtime", "shape"):
        table.add_column(name, overflow="fold")
    for name in ("median ms", "p10", "p90", "error"):
        table.add_column(name, justify="right")
    for row in result.rows:
        times = (f"{value:.3f}" for value in (row.median_ms, row.p10_ms, row.p90_ms))
        error = "-" if row.error is None else f"{row.error:.0e}"
        table.add_row(*map(Text, (row.model, row.runtime, row.shape, *times, error)))
    console.print(table)
    for skip in result.skipped:
        line = f"left out: {skip.model} in {skip.runtime} at {skip.shape}: {skip.reason}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for ratio in result.ratios:
        line = f"{ratio.model}: {ratio.ratio:.2f}x as fast as {ratio.over} at {ratio.shape}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
