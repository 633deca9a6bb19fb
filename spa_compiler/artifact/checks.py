"""The stage that verifies: what is compared with what, at which feeds, on which machine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from spa_compiler import targets
from spa_compiler.artifact import verify, verify_gpu
from spa_compiler.calibration import examples
from spa_compiler.errors import VerificationError
from spa_compiler.graph.model import Model
from spa_compiler.graph.session import Feeds, open_model, run
from spa_compiler.placement.gpu_choose import GpuChoice
from spa_compiler.placement.place import Placed
from spa_compiler.placement.timer import Contender, Timer
from spa_compiler.report.report import Report

_log = logging.getLogger(__name__)


def odd_feeds(model: Model, feed: Feeds, rng: np.random.Generator) -> list[Feeds]:
    """A shape that was not asked for: every symbolic dimension another odd number, if the model runs so."""
    sizes: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for value in model.signature.inputs:
        own = []
        for axis, dim in enumerate(value.shape):
            now = feed[value.name].shape[axis]
            if isinstance(dim, int):
                own.append(dim)
            else:
                own.append(sizes.setdefault(dim or f"{value.name}.{axis}", 3 if now == 1 else max(1, now // 4) | 1))
        shapes[value.name] = tuple(own)
    if all(feed[n].shape == s for n, s in shapes.items()):
        return []
    odd = examples.example_feeds(model, shapes, rng)
    try:
        run(open_model(model, optimize="basic", prepack=False), odd)
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors have no common root
        _log.info("not verified at %s, the model does not run there: %s", shapes, str(error).splitlines()[0])
        return []
    return [odd]


def on_cpu(
    report: Report,
    folder: Path,
    library: Path,
    source: Path,
    feeds: Sequence[Feeds],
    *,
    exact: bool,
    goal: targets.Target,
    timer: Timer,
) -> None:
    """The artifact, with a library of its regions, against portable.onnx; that against the source when nothing lossy
    was asked for."""

    def there(model: Path, library: Path | None, feed: Feeds, threads: int) -> Feeds:
        return timer.run(Contender(model, library), feed, threads)

    here = targets.host().runs(goal.mcpu) or not goal.host_runs
    try:
        with nullcontext() if here else timer.held():
            report.checks += verify.compare(
                folder / "portable.onnx",
                folder / "model.onnx",
                library,
                feeds,
                elsewhere=None if here else there,
            )
        if exact:
            verify.compare(source, folder / "portable.onnx", None, feeds, threads=(1,))
    except VerificationError as error:
        report.checks += getattr(error, "checks", [])
        raise


def on_gpu(
    report: Report,
    folder: Path,
    source: Path,
    placed: Placed,
    feeds: Sequence[Feeds],
    exact: bool,
    timer: Timer | None,
) -> None:
    """The artifact against portable.onnx, as far as this machine can; that against the source where nothing was
    changed."""
    used = placed.plan.gpu_forms  # none, where the race went to the dense model
    choices = [c for c in placed.choices if isinstance(c, GpuChoice) and c.site.name in used]

    def there(model: Path, library: Path | None, feed: Feeds) -> Feeds:
        assert timer is not None
        return timer.run(Contender(model, library), feed, 1)

    try:
        with nullcontext() if timer is None else timer.held():
            report.checks += verify_gpu.compare(folder, choices, placed.dtype, feeds, None if timer is None else there)
        if exact:
            verify.compare(source, folder / "portable.onnx", None, feeds, threads=(1,))
    except VerificationError as error:
        report.checks += getattr(error, "checks", [])
        raise
    if timer is None:
        report.notes.append(
            "there was no GPU: nothing was timed and no kernel was run. On this CPU the packed weights and the graph "
            "around them were checked, in standard operators; kernels were compiled, without running them"
            if placed.plan.has_kernels
            else "there was no GPU: nothing was timed or run there"
        )
