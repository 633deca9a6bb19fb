"""The first half of the flow: load, canonicalize, analyze, and the recipe's passes. `compiler.py` goes on from here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import onnx

from spa_compiler import __version__, analysis, targets
from spa_compiler.artifact import cuts
from spa_compiler.calibration import data, examples, samples
from spa_compiler.calibration.estimate import output_change
from spa_compiler.calibration.progress import Progress, no_progress
from spa_compiler.calibration.samples import Samples
from spa_compiler.calibration.shapes import default_shapes, parse_shapes
from spa_compiler.errors import ModelError
from spa_compiler.graph import shapes as graph_shapes
from spa_compiler.graph.canonicalize import canonicalize
from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model, constants
from spa_compiler.graph.precision import Converted, halves, widened
from spa_compiler.graph.rounding import fitted
from spa_compiler.graph.save import to_proto
from spa_compiler.graph.session import Feeds
from spa_compiler.kernels.cuda.form import Dtype
from spa_compiler.passes.pass_ import Context
from spa_compiler.passes.recipe import Recipe
from spa_compiler.placement.timer import Machine, this_machine
from spa_compiler.report import assemble
from spa_compiler.report.console import plural
from spa_compiler.report.removed import InSource
from spa_compiler.report.report import Report
from spa_compiler.targets import Target

_log = logging.getLogger(__name__)

Watcher = Callable[[Report], None]
Precision = Literal["f32", "fp16", "bf16"]


@dataclass(frozen=True)
class Request:
    """What to compress, and with what. See `compiler.compile` for the words.

    `workers` is how many layers are solved at a time, None one for each core. `precision` is for GPUs: the floats of
    the result, None those of the file.
    """

    recipe: Recipe
    target: Target
    shapes: Sequence[str] = ()
    samples: str | None = None
    calib: str | None = None
    threads: int = 1
    seed: int = 0
    progress: Progress = no_progress
    started: Watcher = lambda report: None
    workers: int | None = None
    precision: Precision | None = None


@dataclass
class Compressed:
    """A model before and after the recipe's passes.

    Attributes:
        given: as the file has it.
        loaded: the same, for GPUs in float32 if it has 16-bit floats: passes work on float32.
        canonical: the same, in canonical form: what the passes started from.
        model: what they made of it.
        feeds: one for each shape to measure at.
        report: what was done.
        calibration: the samples, if there are any.
        workers: how many layers are solved at a time.
    """

    given: Model
    loaded: Model
    canonical: Model
    model: Model
    feeds: list[Feeds]
    report: Report
    rng: np.random.Generator = field(repr=False)
    calibration: Samples | None
    workers: int

    def estimate(self) -> None:
        """Puts into the report how far the outputs are off, on the samples held out, if there are any."""
        if self.calibration is not None and self.report.passes:
            self.report.output_change = output_change(
                self.canonical, self.model, self.calibration, threads=self.workers
            )

    def dtype(self, precision: Precision | None) -> Dtype:
        """For GPUs: the floats of the result, where `precision` is asked for; None: those of the file."""
        asked = floats(self.given, precision)
        return "fp32" if asked == "f32" else asked

    def narrowed(self, dtype: Dtype) -> Converted:
        """The compressed model in other floats, with the inputs and outputs of the file.

        Raises:
            ModelError: outputs become infinite or NaN.
        """
        return fitted(self.model, None if dtype == "fp32" else dtype, self.given, self.feeds)

    def proto(self) -> onnx.ModelProto:
        """The compressed model in standard ops. Raises ModelError above 2 GB."""
        return to_proto(self.model)


def floats(given: Model, precision: Precision | None) -> Precision:
    """For GPUs: the floats of the result, where `precision` is asked for; None: those of the file."""
    found = sorted(halves(given))
    return precision or (found[0] if found else "f32")


def compress(
    model: str | Path | onnx.ModelProto,
    recipe: Recipe,
    *,
    calib: str | None = None,
    shapes: Sequence[str] = (),
    target: str = "cpu",
    threads: int | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Compressed:
    """Runs a recipe and stops there: nothing is timed or written.

    Args:
        calib: DATA that passes take statistics from, or `synthetic` for noise.
        threads: layers that are solved at a time; default: physical cores. The result does not depend on it.

    Raises:
        UsageError, ModelError, VerificationError, BudgetError, EnvironmentFault: see `errors`.
    """
    goal, cores = targets.parse(target), targets.host().cores_physical
    request = Request(recipe, goal, shapes, None, calib, threads or cores, seed, progress, workers=threads)
    name = Path(model).name if isinstance(model, str | Path) else model.graph.name or "model"
    report = new_report(request, name, msgspec.to_builtins(recipe), {})
    return run_passes(model, request, report, Stages(report, progress))


def new_report(
    request: Request, source: str, recipe: object, options: dict[str, object], machine: Machine | None = None
) -> Report:
    """A report with what is known before any work; `machine` takes the times, None: this one."""
    return assemble.new(
        __version__,
        source=source,
        target=str(request.target),
        threads=request.threads,
        seed=request.seed,
        recipe=recipe,
        options={
            "shapes": list(request.shapes),
            "samples": request.samples,
            "calib": request.calib,
            **options,
        },
        isa=request.target.arch,
        machine=machine or this_machine(),
    )


def run_passes(model: str | Path | onnx.ModelProto, request: Request, report: Report, stages: Stages) -> Compressed:
    """Stages 1 to 4."""
    rng = np.random.default_rng(request.seed)
    passes = request.recipe.build()  # options are checked before any work
    with stages("load"):
        given = load(model)
        report.notes += given.source.notes
        loaded = given
        if request.target.kind == "cuda" and (found := sorted(halves(given))):
            loaded = widened(given)
            report.notes.append(f"the model has floats of 16 bits ({', '.join(found)}): passes work on them as float32")
        bindings = parse_shapes(request.shapes, loaded) if request.shapes else [default_shapes(loaded)]
        feeds = _feeds(loaded, bindings, request.samples or None, rng)
        report.shapes = [assemble.shape_of(f) for f in feeds]
    request.started(report)
    calibration = None
    if request.calib is not None:
        with stages("read samples"):
            calibration = samples.load(request.calib, loaded, bindings[0], request.seed)
            report.notes.append(_told(calibration, len(passes)))
    with stages("canonicalize"):
        canonical = canonicalize(loaded, feeds)
        report.notes += canonical.notes
        current = canonical.model
        graph_shapes.infer(current)
    start = current.copy()
    with stages("analyze"):
        groups = analysis.analyze(current, bindings[0])
        _require_weights(current)
    with stages("passes"):
        workers = request.workers or targets.host().cores_physical
        precision = floats(given, request.precision)
        context = Context(request.target, rng, groups, loaded, feeds, calibration, workers, request.progress, precision)
        removed = InSource(loaded)
        for each in passes:
            before = current.copy()
            change = each.run(current, replace(context, analysis=groups))
            report.passes.append(assemble.pass_change(change, removed.tell(groups, change)))
            graph_shapes.infer(current)
            if change.removed or change.exact:
                report.notes.append(cuts.check(before, current, groups, change, feeds))
            if each is not passes[-1] and not change.zeros_alone:
                groups = analysis.analyze(current, bindings[0])
    done = Compressed(given, loaded, start, current, feeds, report, rng, calibration, workers)
    if calibration is not None and passes:
        with stages("estimate"):
            done.estimate()
    return done


class Stages:
    """Times the stages, for the report and the log, and shows which one is at work."""

    def __init__(self, report: Report, progress: Progress) -> None:
        self._report, self._progress = report, progress

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        _log.info("%s", name)
        self._progress(name, 0, 1)
        yield
        self._progress(name, 1, 1)
        seconds = time.perf_counter() - begin
        _log.info("%s: %.1f s", name, seconds)
        self._report.stages.append(assemble.stage(name, seconds))


def _told(calibration: Samples, passes: int) -> str:
    """What the samples are, for the report."""
    if not passes:
        return "the samples were read for nothing: there is no pass that could learn from them (--sparsity, --passes)"
    if calibration.synthetic:
        return (
            f"calibrated on synthetic noise ({calibration.rows} samples): statistics of deep layers are off, and the "
            "estimate of the output change is of noise"
        )
    held = sum(calibration.holds_out(number) for number in range(calibration.count))
    rows, feeds = plural(calibration.rows, "sample"), plural(calibration.count, "feed")
    return f"calibrated on {rows} in {feeds}, {held} of them held out"


def _feeds(
    model: Model, bindings: Sequence[dict[str, tuple[int, ...]]], source: str | None, rng: np.random.Generator
) -> list[Feeds]:
    """One feed for each shape: the user's samples where one has that shape, else drawn within the graph's bounds."""
    feeds = [examples.example_feeds(model, shapes, rng) for shapes in bindings]
    if source is None:
        return feeds
    wanted = [{n: a.shape for n, a in f.items()} for f in feeds]
    for sample in data.read(source, model)():
        for i, want in enumerate(wanted):
            stacked = _stack(sample, want)
            if stacked is not None:
                feeds[i] = stacked
    return feeds


def _stack(sample: Feeds, want: dict[str, tuple[int, ...]]) -> Feeds | None:
    """A sample repeated along the first axis to the shape wanted, if all else agrees."""
    if all(sample[n].shape == s for n, s in want.items() if n in sample) and set(sample) == set(want):
        return sample
    if set(sample) != set(want) or any(not sample[n].shape or sample[n].shape[1:] != s[1:] for n, s in want.items()):
        return None
    return {n: np.resize(sample[n], s) for n, s in want.items()}


def _require_weights(model: Model) -> None:
    if not any(np.prod(c.shape) > 1 for c in constants(model.graph)):
        raise ModelError(
            "the model has no constant weights",
            where=model.source.name,
            fix="Export it with its parameters stored in the file (as initializers), not as inputs",
        )
