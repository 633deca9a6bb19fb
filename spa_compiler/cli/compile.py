"""`spa-compile`: an ONNX model in, a folder out that stock ONNX Runtime runs faster."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spa_compiler import __version__
from spa_compiler.cli.errors import exit_codes, logging_to
from spa_compiler.cli.progress import bars
from spa_compiler.cli.screen import screen

if TYPE_CHECKING:
    from spa_compiler.compression import Precision
    from spa_compiler.report.report import Report

_EPILOG = """\b
Examples:
  spa-compile model.onnx                                       zeros that are there become time, exactly
  spa-compile model.onnx --sparsity 0.8 --pattern block:4x1    set weights to zero first (lossy: measure your accuracy)
  spa-compile model.onnx --calib data.npz --sparsity 0.6       the same, and what stays makes up for what goes
  spa-compile model.onnx --prune 0.3                           cut channels away, with 30 % of the MACs (lossy, too)
  spa-compile model.onnx --passes "prune-groups{masks=m.npz}"  cut what a trainer has masked
  spa-compile model.onnx --shape ids=1,128 --threads 1         time at this shape, with one thread
  spa-compile model.onnx --recipe recipe.yaml -o out           passes from a file
  spa-compile out                                              place an artifact anew on this machine
  spa-compile model.onnx --target cuda:sm_80,sm_90 --precision fp16     for NVIDIA GPUs; compiling needs none
  spa-compile out --target cuda                                place that artifact by times of the GPU here
  spa-compile model.onnx --tune-rpc 10.0.0.5:9190,zen5         times are taken on another machine
  spa-compile model.onnx --dry-run --explain                   what would be done, and why

\b
Exit codes: 0 done, 1 internal, 2 usage, 3 unusable model, 4 verification failed, 5 budget not met,
6 environment (linker, disk, platform, ONNX Runtime), 130 interrupted.
Shell completion: eval "$(_SPA_COMPILE_COMPLETE=bash_source spa-compile)"
"""


def _size(text: str) -> int:
    """Bytes, of `500MB`, `1.5GB`, `300MiB` or a plain number."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMG]?)(I?)B?)\s*", text.upper())
    if found is None:
        raise click.BadParameter(f"{text!r} is no size: write 500MB, 1.5GB or 300MiB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMG".index(found[2] or " "))


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.argument("model", required=False, type=click.Path())
@click.option("-o", "--output", metavar="DIR", type=click.Path(), help="Folder to write  [default: MODEL-spa]")
@click.option("--force", is_flag=True, help="Replace a non-empty folder that spa-compile did not write")
@click.option(
    "--target",
    default="cpu",
    show_default=True,
    help="cpu, cpu:avx512, cpu:avx2, cpu:avx512,avx2, cuda (the GPU here), cuda:sm_90, cuda:sm_80,sm_90",
)
@click.option(
    "--precision",
    type=click.Choice(["f32", "fp16", "bf16"]),
    help="Floats of the result, for cuda  [default: those of the model]",
)
@click.option("--sparsity", type=float, metavar="S", help="Share of zeros to prune to; short for the pass sparsify")
@click.option(
    "--pattern",
    metavar="P",
    help="Which zeros: unstructured, block:4x1, ...; goes with --sparsity  [default: unstructured; cuda: block:32x32]",
)
@click.option("--prune", type=float, metavar="F", help="Share of the MACs to cut away; short for the pass prune-groups")
@click.option("--passes", metavar="TEXT", help="Passes in order, e.g. 'sparsify{sparsity=0.8,pattern=block:4x1}'")
@click.option("--recipe", "recipe_file", metavar="FILE", type=click.Path(), help="Passes from a YAML file")
@click.option("--calib", metavar="DATA", help="Samples that passes learn from, as --samples; or synthetic, for noise")
@click.option("--samples", metavar="DATA", help="Inputs to time and verify with: .npz, folder, or file.py:function")
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="INPUT=1,128",
    help="Shape to time at; repeatable  [default: batch 1, sequences 128]",
)
@click.option("--threads", type=click.IntRange(1), help="Threads to time with  [default: physical cores]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--restore-unused", is_flag=True, help="Dense weights back where zeros make no layer faster")
@click.option("--max-size", type=_size, metavar="SIZE", help="Fail (exit 5) when the result is larger, e.g. 50MB")
@click.option("--no-guard", is_flag=True, help="Race at the shapes asked for alone; no dense form for others")
@click.option("--records", metavar="FILE", type=click.Path(), help="Replay the measurements of this file, add new ones")
@click.option(
    "--tune-trials",
    type=click.IntRange(0),
    default=6,
    show_default=True,
    metavar="N",
    help="Tile sizes to time each kind of layer in, besides the usual ones",
)
@click.option("--tune-rpc", metavar="HOST:PORT,KEY", help="Take times on a machine that runs spa-tune-server")
@click.option("--dry-run", is_flag=True, help="Analysis and plan only; nothing is timed or written")
@click.option("--explain", is_flag=True, help="Show what passes did to each layer, what was timed, and why")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout, nothing else there")
@click.option("--list-passes", is_flag=True, help="Show every pass with its options and exit")
@click.option("--check-hardware", is_flag=True, help="Show what this machine can compile for and exit")
@click.option("-v", "--verbose", is_flag=True, help="More log on stderr")
@click.option("-q", "--quiet", is_flag=True, help="Errors alone on stderr")
@click.option("--log-file", metavar="FILE", type=click.Path(), help="The whole log, into a file")
@click.version_option(__version__, prog_name="spa-compile")
@exit_codes
def main(
    model: str | None,
    output: str | None,
    force: bool,
    target: str,
    precision: Precision | None,
    sparsity: float | None,
    pattern: str | None,
    prune: float | None,
    passes: str | None,
    recipe_file: str | None,
    calib: str | None,
    samples: str | None,
    shapes: tuple[str, ...],
    threads: int | None,
    seed: int,
    restore_unused: bool,
    max_size: int | None,
    no_guard: bool,
    records: str | None,
    tune_trials: int,
    tune_rpc: str | None,
    dry_run: bool,
    explain: bool,
    as_json: bool,
    list_passes: bool,
    check_hardware: bool,
    verbose: bool,
    quiet: bool,
    log_file: str | None,
) -> None:
    """Compile MODEL (an ONNX file, or a folder that spa-compile wrote) for stock ONNX Runtime.

    Without a recipe the result computes exactly what the model does; zeros that it already has become time. With one,
    it is pruned first, without training.
    """
    if verbose and quiet:
        raise click.UsageError("--verbose and --quiet contradict each other")
    logging_to(verbose, quiet, log_file)
    if list_passes:
        from spa_compiler.passes.catalogue import catalogue

        for entry in catalogue():
            click.echo(f"{entry.name}\n\n{entry.rewrite}\n\n{entry.text}\n")
            for option in entry.options:
                click.echo(f"  {option.name}  ({option.type}, {_default(option.default)})  {option.text}")
            click.echo()
        return
    if check_hardware:
        from spa_compiler.cli.hardware import show

        show(as_json)
        return
    if model is None:
        raise click.UsageError("MODEL is missing. Name an ONNX file, for instance: spa-compile model.onnx")

    from rich.console import Console

    from spa_compiler import compiler
    from spa_compiler.passes.recipe import from_command_line
    from spa_compiler.report import console as draw

    stderr = Console(stderr=True, quiet=quiet)
    stdout = screen()
    recipe = from_command_line(
        sparsity=sparsity,
        pattern=pattern,
        prune=prune,
        passes=passes,
        recipe=Path(recipe_file) if recipe_file else None,
        target=target,
    )

    def started(report: Report) -> None:
        if not as_json:
            draw.header(report, stdout)

    with bars(stderr, quiet) as progress:
        result = compiler.compile(
            model,
            output,
            target=target,
            precision=precision,
            recipe=recipe,
            shapes=shapes,
            samples=samples,
            calib=calib,
            threads=threads,
            seed=seed,
            restore_unused=restore_unused,
            records=records,
            tune_trials=tune_trials,
            tune_rpc=tune_rpc,
            max_size=max_size,
            guard=not no_guard,
            force=force,
            dry_run=dry_run,
            progress=progress,
            started=started,
        )
    if as_json:
        sys.stdout.write(result.report.to_json().decode())
        return
    draw.changes(result.report, stdout)
    if explain:
        draw.layers(result.report, stdout)
    if explain or dry_run:
        draw.sites(result.report, stdout)
    draw.race(result.report, stdout)
    draw.summary(result.report, result.folder, stdout)


def _default(text: str) -> str:
    return text if text == "required" else f"default {text}"


if __name__ == "__main__":
    main()
