"""The flow, top to bottom: load, canonicalize, analyze, passes, place, generate and link, verify, report, write.

The first four stages are `compression.py`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import onnx

import spa_compiler
from spa_compiler import analysis, targets
from spa_compiler.artifact import checks, manifest, write
from spa_compiler.artifact.collect import collect
from spa_compiler.artifact.origin import Origin
from spa_compiler.calibration.progress import Progress, no_progress
from spa_compiler.compression import Precision, Request, Stages, Watcher, new_report, run_passes
from spa_compiler.errors import BudgetError, SpaError, UsageError, VerificationError
from spa_compiler.graph import shapes as graph_shapes
from spa_compiler.graph.load import load as load_model
from spa_compiler.graph.rounding import in_types
from spa_compiler.graph.save import save
from spa_compiler.graph.session import CPU, CUDA, open_session, runtime
from spa_compiler.passes.recipe import Recipe
from spa_compiler.passes.restore import restore
from spa_compiler.placement.gpu_place import place_on_gpu
from spa_compiler.placement.gpu_timer import CudaTimer
from spa_compiler.placement.place import Placed, place
from spa_compiler.placement.records import Records
from spa_compiler.placement.timer import LocalTimer, Timer
from spa_compiler.report import assemble, console
from spa_compiler.report.report import Report
from spa_compiler.runtime.link import link
from spa_compiler.targets import nvrtc
from spa_compiler.targets.machine import cache_dir

if TYPE_CHECKING:
    import onnxruntime as ort

_log = logging.getLogger(__name__)

_CALIBRATED = "# Calibrated: to repeat it, give --calib again. Without samples these options mean something else.\n"


@dataclass(frozen=True)
class Result:
    """What `compile` hands back. `folder` is None for a dry run; `ratios` are over the source in ONNX Runtime."""

    folder: Path | None
    report: Report

    @property
    def ratio(self) -> float | None:
        """Speed over the source file in ONNX Runtime, geometric mean over the shapes; None if nothing was measured."""
        ratios = [r.ratio for r in self.report.ratios]
        return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def compile(
    model: str | Path | onnx.ModelProto,
    output: str | Path | None = None,
    *,
    target: str = "cpu",
    precision: Precision | None = None,
    recipe: Recipe | None = None,
    shapes: Sequence[str] = (),
    samples: str | None = None,
    calib: str | None = None,
    threads: int | None = None,
    seed: int = 0,
    restore_unused: bool = False,
    records: str | Path | None = None,
    tune_trials: int = 6,
    tune_rpc: str | None = None,
    max_size: int | None = None,
    guard: bool = True,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
    started: Watcher = lambda report: None,
) -> Result:
    """Compiles a model into a folder that stock ONNX Runtime loads.

    Args:
        model: an ONNX file, a ModelProto, or an artifact folder (which is placed anew on this machine).
        output: the folder to write; default `<model>-spa` in the current folder, or the artifact itself.
        target: `cpu`, `cpu:x86-64-v4`, `cpu:aarch64`, `cuda`, `cuda:sm_80,sm_90`, ...
        precision: floats of the result, `f32`, `fp16` or `bf16`, for CUDA alone; None: those of the model. Inputs and
            outputs keep their types.
        recipe: passes to run; None: exact rewrites only, and zeros that are already there become time.
        shapes: as `--shape`, e.g. `["input_ids=1,128", "attention_mask=1,128"]`.
        samples: DATA to time and verify with, see docs/recipes.md.
        calib: DATA that passes take statistics from, or `synthetic` for noise.
        threads: intra-op threads to measure with; default: physical cores.
        restore_unused: give sites whose sparse form is not faster their dense weights back.
        records: SQLite file of earlier measurements, whole-model races included, to replay and to extend.
        tune_trials: tile sizes that each kind of layer is timed in besides the usual ones; 0: no search.
        tune_rpc: `HOST:PORT,KEY` of an RPC tracker and of a `spa-tune-server` there, whose machine takes all times.
        max_size: the most bytes that model.onnx and kernels.so may take.
        guard: race the result at shapes that were not asked for, too, and let the dense form run where it is faster.
        force: replace a folder that this tool did not write.
        dry_run: stop before anything is timed, linked or written.
        progress: called with (what, done, total).
        started: called with the report when its header is known.

    Raises:
        UsageError, ModelError, VerificationError, BudgetError, EnvironmentFault: see `errors`.
    """
    recipe = recipe or Recipe()
    timer = _timer(tune_rpc, target)
    goal = _goal(target, timer, tune_rpc, precision, dry_run)
    origin = Origin.of(model, recipe, output)
    write.check_target(origin.output, force, origin.files)  # before any work: `staging` asks again
    cores = timer.machine.cores
    if origin.before is not None:  # an artifact is measured as it was, where nothing else is asked for
        shapes = shapes or origin.before.asked.options.get("shapes", ())
        threads = threads or min(origin.before.machine.threads, cores)
    threads = threads or cores
    request = Request(recipe, goal, shapes, samples, calib, threads, seed, progress, started, precision=precision)
    told = msgspec.to_builtins(recipe) if origin.before is None else origin.before.asked.recipe
    options: dict[str, object] = {
        "restore_unused": restore_unused,
        "max_size": max_size,
        "tune_rpc": tune_rpc,
        "precision": precision,
    }
    report = new_report(request, origin.name, told, options, timer.machine)
    stages = Stages(report, progress)
    with nullcontext() if dry_run else _report_of_failure(report, origin.output):
        done = run_passes(origin.model, request, report, stages)
    loaded, current, feeds, rng, passes = done.loaded, done.model, done.feeds, done.rng, recipe.passes
    dtype = done.dtype(precision)
    if dry_run:
        assemble.plan(report, current, goal, feeds, dtype)
        return Result(None, report)

    odd = checks.odd_feeds(current, feeds[0], rng)
    with (
        _report_of_failure(report, origin.output),
        write.staging(origin.output, force, inputs=origin.files) as folder,
        _scratch(folder) as workspace,
    ):
        with stages("place"), timer.held():
            source = origin.path or save(done.given, workspace / "source.onnx")[0]
            book = Records(Path(records) if records else cache_dir() / "records.sqlite", assemble.machine_key(report))

            def placed_in(folder: Path) -> Placed:
                folder.mkdir()
                if goal.kind == "cuda":
                    twin = done.narrowed(dtype)
                    return place_on_gpu(
                        current,
                        twin,
                        dtype,
                        source,
                        [in_types(twin.model, feed) for feed in feeds],
                        goal,
                        book,
                        folder,
                        progress,
                        timer=timer if goal.host_runs else None,
                        replay=records is not None,
                    )
                return place(
                    current,
                    source,
                    feeds,
                    goal,
                    threads,
                    book,
                    folder,
                    progress,
                    rng,
                    odd=odd,
                    replay=records is not None,
                    original=None if passes else loaded,
                    timer=timer,
                    guarded=guard,
                    max_size=max_size,
                    trials=tune_trials,
                )

            plans = workspace / "plans"
            placed = placed_in(plans)
            if restore_unused:
                names = restore(current, done.canonical, placed.gaining)
                assemble.restored(report, names)
                if names:
                    done.estimate()
                    shutil.rmtree(plans)
                    placed = placed_in(plans)
            book.close()
        report.notes += placed.notes
        assemble.placed(report, placed)
        with stages("generate, link"):
            collect(placed.plan.folder, plans / "portable", folder)
            (folder / "recipe.yaml").write_text((_CALIBRATED if calib is not None and passes else "") + origin.recipe)
        with stages("verify"):
            library, others = folder / "kernels.so", placed.guard.others if placed.guard else []
            if goal.kind == "cpu" and not goal.host_runs:
                # the same regions with kernels for this machine: all but the target's own instructions is checked
                library, ours = workspace / "ours.so", targets.parse("cpu").mcpu
                link(placed.plan.regions, (ours,), library)
                report.notes.append(
                    f"this machine does not run {goal.arch}: nothing was timed, and model.onnx was verified with "
                    f"kernels of the same regions for {ours}"
                )
            every = [*feeds, *odd, *others]
            if goal.kind == "cpu":
                checks.on_cpu(report, folder, library, source, every, exact=not passes, goal=goal, timer=timer)
            else:
                exact = not passes and placed.dtype == "fp32" and done.given is loaded
                checks.on_gpu(report, folder, source, placed, every, exact, timer if goal.host_runs else None)
        assemble.sizes(report, origin.bytes or loaded.source.bytes, folder)
        if max_size is not None and (report.sizes.model + report.sizes.kernels) > max_size:  # type: ignore[union-attr]
            raise BudgetError(
                f"the artifact takes {console.bytes_text(report.sizes.model + report.sizes.kernels)}, "  # type: ignore[union-attr]
                f"more than the {console.bytes_text(max_size)} of --max-size",
                fix="Ask for more zeros, or for a larger size; nothing was written",
            )
        assemble.hints(report, placed, bool(passes))
        report.write(folder)
        manifest.seal(
            folder,
            version=spa_compiler.__version__,
            target=str(goal),
            isa=goal.arch if placed.plan.has_kernels else goal.isa,
            measured=goal.host_runs,
            source=origin.source,
            fallback=_fallback(placed),
        )
    return Result(origin.output, report)


def _fallback(placed: Placed) -> manifest.Fallback | None:
    bounds = placed.guard.bounds if placed.guard else None
    return None if bounds is None else manifest.Fallback(bounds.input, bounds.below, bounds.above)


def analyze(model: str | Path | onnx.ModelProto) -> analysis.Analysis:
    """Groups of coupled channels, and what pins the rest. Pure: nothing is written."""
    loaded = load_model(model)
    graph_shapes.infer(loaded)
    return analysis.analyze(loaded)


def load(folder: str | Path, *, threads: int = 0, check: bool = True) -> ort.InferenceSession:
    """An artifact as an ONNX Runtime session.

    Args:
        threads: intra-op threads; 0 leaves the number to ONNX Runtime.
        check: compare every file with its SHA-256 in the manifest first.

    Raises:
        ModelError: the folder is no artifact, or damaged.
    """
    folder = Path(folder).resolve()
    told = manifest.check(folder) if check else manifest.read(folder)
    wanted = (CUDA, CPU) if told.target.startswith("cuda") else (CPU,)
    providers = [name for name in wanted if name in runtime().get_available_providers()]
    return open_session(folder / "model.onnx", threads=threads, library=folder / "kernels.so", providers=providers)


@contextmanager
def _report_of_failure(report: Report, output: Path) -> Iterator[None]:
    """After a failed verification nothing is written but the report, beside the folder: an older result stays whole."""
    try:
        yield
    except VerificationError as error:
        report.failure = str(error)
        path = output.with_name(f"{output.name}.failed-report.json")
        path.parent.mkdir(parents=True, exist_ok=True)  # `staging` has removed what it made
        path.write_bytes(report.to_json())
        raise VerificationError(error.what, where=error.where, fix=f"{error.fix or ''} ({path})".strip()) from error


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder for plans, beside the one being filled: on the same disk, and removed with it when a run is killed."""
    with tempfile.TemporaryDirectory(prefix="plans-", dir=folder.parent) as path:
        yield Path(path)


def _timer(tune_rpc: str | None, target: str) -> Timer:
    """What takes the times. The module that opens connections is not even loaded unless they are asked for."""
    gpu = _wants_gpu(target)
    if not tune_rpc:
        return CudaTimer() if gpu else LocalTimer()
    from spa_compiler.placement.remote import RemoteTimer

    return RemoteTimer(tune_rpc, gpu=gpu)


def _wants_gpu(target: str) -> bool:
    return target.strip().lower().startswith("cuda")


def _goal(
    target: str, timer: Timer, tune_rpc: str | None, precision: Precision | None, dry_run: bool
) -> targets.Target:
    """What to compile for, which the machine that takes the times has to run."""
    machine = timer.machine
    if tune_rpc and _wants_gpu(target) and not machine.gpu_arch:
        raise UsageError(
            "the machine that is to take the times has no NVIDIA GPU that ONNX Runtime uses",
            where=f"--tune-rpc {tune_rpc}",
            fix="spa-tune-server wants onnxruntime-gpu and NVIDIA's driver there. Without --tune-rpc, nothing is "
            "timed, and an architecture such as cuda:sm_90 needs no GPU",
        )
    goal = targets.parse(target, machine.isa, machine.gpu_arch if tune_rpc else None)
    if goal.kind == "cuda":
        # A GPU that ONNX Runtime cannot use takes no times.
        goal = dataclasses.replace(goal, host_runs=goal.host_runs and bool(machine.gpu_arch))
    if tune_rpc and not goal.host_runs:
        raise UsageError(
            f"the machine that is to take the times does not run {goal}, it is an "
            + (machine.isa if goal.kind == "cpu" else f"{machine.gpu_arch} ({machine.gpu})"),
            where=f"--tune-rpc {tune_rpc}",
            fix="Leave --target out to compile for that machine"
            if goal.kind == "cpu"
            else "Write --target cuda to compile for its GPU",
        )
    if goal.kind == "cpu" and precision not in (None, "f32"):
        raise UsageError(
            f"kernels for {goal} are float32",
            where=f"--precision {precision}",
            fix="Leave it out, or name --target cuda",
        )
    if goal.kind == "cuda" and not dry_run:
        nvrtc.find()  # before any work
    return goal


__all__ = ["Result", "SpaError", "analyze", "compile", "load"]
