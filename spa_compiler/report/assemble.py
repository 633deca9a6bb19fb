"""What the stages of a compilation found, turned into the report's structures."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from spa_compiler.graph import shapes as graph_shapes
from spa_compiler.graph.model import Model
from spa_compiler.graph.session import Feeds
from spa_compiler.kernels.cuda.form import Dtype
from spa_compiler.kernels.form import Form
from spa_compiler.passes.pass_ import Change
from spa_compiler.placement import timer
from spa_compiler.placement.candidates import DENSE, layouts, stored_forms
from spa_compiler.placement.choose import Choice, nothing_to_leave_out
from spa_compiler.placement.gpu_choose import GpuChoice, GpuForm, calculated, candidates
from spa_compiler.placement.gpu_low_rank import joined
from spa_compiler.placement.gpu_sites import find_gpu_sites, find_pairs, tokens_of
from spa_compiler.placement.guard import DENSE as GUARD_DENSE
from spa_compiler.placement.guard import SPARSE as GUARD_SPARSE
from spa_compiler.placement.guard import Guard
from spa_compiler.placement.place import PORTABLE, SOURCE, Placed, chains_of
from spa_compiler.placement.sites import Refusal, find_sites, held
from spa_compiler.placement.unmeasured import choose_unmeasured
from spa_compiler.report.report import (
    ARTIFACT_RUNTIME,
    Asked,
    Candidate,
    Machine,
    OtherShape,
    PassChange,
    Placement,
    RaceRow,
    Ratio,
    Removed,
    Report,
    SiteChange,
    Sizes,
    SkippedSite,
    Stage,
    Versions,
    shape_text,
)
from spa_compiler.targets import Target
from spa_compiler.targets.cuda import architecture

BASELINE = "onnxruntime"
_SNUG = 1.02  # stored elements over those of the smallest form


def new(
    version: str,
    *,
    source: str,
    target: str,
    threads: int,
    seed: int,
    recipe: Any,
    options: Mapping[str, Any],
    isa: str,
    machine: timer.Machine,
) -> Report:
    """A report with what is known before any work."""
    return Report(
        spa_compiler=version,
        asked=Asked(
            source=source,
            target=target,
            seed=seed,
            recipe=recipe,
            options={name: value for name, value in options.items() if value},
        ),
        versions=Versions(
            spa_compiler=version,
            python=platform.python_version(),
            onnx=importlib.metadata.version("onnx"),
            onnxruntime=machine.onnxruntime,
            tvm=importlib.metadata.version("apache-tvm"),
            numpy=importlib.metadata.version("numpy"),
        ),
        machine=Machine(
            cpu=machine.cpu,
            isa=machine.isa,
            cores=machine.cores,
            threads=threads,
            platform=machine.platform,
            providers=machine.providers,
            gpu=machine.gpu,
        ),
        isa=isa,
    )


def machine_key(report: Report) -> dict[str, str]:
    """What a record of times depends on besides the question."""
    return {
        "cpu": report.machine.cpu,
        "onnxruntime": report.versions.onnxruntime,
        "spa_compiler": report.versions.spa_compiler,
        "isa": report.isa,
        **({"gpu": report.machine.gpu} if report.machine.gpu else {}),
    }


def stage(name: str, seconds: float) -> Stage:
    return Stage(name=name, seconds=round(seconds, 3))


def shape_of(feeds: Feeds) -> str:
    """A feed's shapes as one word."""
    return shape_text({name: value.shape for name, value in feeds.items()})


def pass_change(change: Change, removed: tuple[Removed, ...] = ()) -> PassChange:
    """A pass's own words, as the report keeps them.

    Args:
        removed: what it cut, in the words of the source file.
    """
    return PassChange(
        name=change.pass_name,
        summary=change.summary,
        removed=removed,
        asked=change.asked,
        got={name: round(share, 6) for name, share in change.got.items()},
        warnings=change.warnings,
        sites=tuple(
            SiteChange(
                node=s.node,
                op=s.op,
                weight=s.weight,
                pattern=s.pattern,
                n=s.n,
                k=s.k,
                density_before=float(s.density_before),
                density_after=float(s.density_after),
                error=float(s.error),
                method=s.method,
                seconds=round(s.seconds, 3),
            )
            for s in change.sites
        ),
        skipped=tuple(SkippedSite(node=s.node, reason=s.reason) for s in change.skipped),
    )


def restored(report: Report, names: Collection[str]) -> None:
    """What `--restore-unused` came to; `names` are the layers that have their dense weights back."""
    if not names:
        report.notes.append("nothing to restore: no layer has zeros of the passes that make it no faster")
        return
    report.notes.append(
        "1 layer that zeros make no faster has its dense weights back"
        if len(names) == 1
        else f"{len(names)} layers that zeros make no faster have their dense weights back"
    )
    report.passes = [
        msgspec.structs.replace(
            change, sites=tuple(msgspec.structs.replace(s, restored=s.node in names) for s in change.sites)
        )
        for change in report.passes
    ]


def plan(report: Report, model: Model, target: Target, feeds: Sequence[Feeds], dtype: Dtype = "fp32") -> None:
    """A dry run's view: every site with the forms that would be timed.

    Args:
        dtype: of the result on a GPU.
    """
    shapes = graph_shapes.fixed(model, feeds[0])
    if target.kind == "cuda":
        refusals = _plan_for_gpu(report, model, target, shapes, dtype)
    else:
        refusals = _plan_for_cpu(report, model, target, shapes)
    for refusal in refusals:
        op = refusal.op
        report.placements.append(_row(op.name, op.kind, op.n, op.k, 0, -1.0, f"stays dense: {refusal.reason}"))


def _plan_for_gpu(
    report: Report, model: Model, target: Target, shapes: graph_shapes.Shapes, dtype: Dtype
) -> list[Refusal]:
    """What stays float32 in a model of 16 bits shows in a compilation alone."""
    sites, refusals = find_gpu_sites(model, {}, [shapes])
    archs = [architecture(name) for name in target.archs]
    choices = []
    for site in sites:
        sizes = [tokens_of(site, shapes)]
        choices.append(calculated(site, candidates(site, archs, dtype, sizes), archs, dtype, sizes))
    pairs = find_pairs(sites, held(model.graph))
    for choice in joined(choices, pairs, archs, dtype, lambda pair: [tokens_of(pair.down, shapes)]):
        site = choice.site
        reason = f"would be {choice.candidate}, {choice.reason}"
        row = _row(site.name, site.op.kind, site.n, site.op.k, choice.tokens[0], site.density, reason)
        report.placements.append(msgspec.structs.replace(row, pattern=_pattern(site.density, choice.form)))
    return refusals


def _plan_for_cpu(report: Report, model: Model, target: Target, shapes: graph_shapes.Shapes) -> list[Refusal]:
    sites, refusals = find_sites(model)
    layers = {s.name: layouts(c, {}) for c in chains_of(model, [shapes]) for s in c.products}
    for site in sites:
        stored = stored_forms(site)
        names = ", ".join(
            [*(f"{s.name} ({s.share:.0%} stored)" for s in stored), *(way.name for way in layers.get(site.name, ()))]
        )
        if not names:
            reason = f"would stay dense: {nothing_to_leave_out(site)}"
        elif not target.host_runs:
            (choice,) = choose_unmeasured([site], target)
            reason = f"would be {choice.candidate}, {choice.reason}"
        else:
            reason = f"would be timed dense and as {names}"
        # the tallest blocks that store next to nothing in vain
        tallest = next((s.form for s in reversed(stored) if s.share <= _SNUG * stored[0].share), None)
        known = shapes.get(site.source.name)
        tokens = 0 if known is None else site.pixels(known)
        row = _row(site.name, site.op.kind, site.n, site.op.k, tokens, site.density, reason)
        report.placements.append(msgspec.structs.replace(row, pattern=_pattern(site.density, tallest)))
    return refusals


def placed(report: Report, result: Placed) -> None:
    """Placements, the race and its ratios."""
    for choice in result.choices:
        region = result.plan.nodes.get(choice.site.name, "")
        report.placements += _placements(choice, region, result.reason)
    for refusal in result.refusals:
        op = refusal.op
        report.placements.append(_row(op.name, op.kind, op.n, op.k, 0, -1.0, refusal.reason))
    name = report.asked.source
    for shape, timings in zip(report.shapes, result.race, strict=False):
        for runtime_name, timing in timings.items():
            shown = [BASELINE] if runtime_name == SOURCE else []
            if runtime_name == result.plan.name:  # both, when the model as it was given is what came out
                shown.append(ARTIFACT_RUNTIME)
            report.race += [
                RaceRow(
                    model=name,
                    runtime=each,
                    plan=runtime_name,
                    shape=shape,
                    median_ms=timing.median_us / 1e3,
                    p10_ms=timing.p10_us / 1e3,
                    p90_ms=timing.p90_us / 1e3,
                )
                for each in shown or [runtime_name]
            ]
        ratio = timings[SOURCE].median_us / timings[result.plan.name].median_us
        report.ratios.append(Ratio(model=name, over=BASELINE, shape=shape, ratio=ratio))
    report.notes.append(f"placement: {result.reason}")
    if result.heats > 1:
        report.notes.append(
            f"the race took {result.heats} heats, since all models at once would take too much memory. {BASELINE}, "
            f"{PORTABLE} and what came out were all in the last one; others ran beside {PORTABLE} before, and their "
            f"times are given as if {PORTABLE} had taken as long then"
        )
    if result.guard is not None:
        _others(report, result.guard)


def _others(report: Report, guard: Guard) -> None:
    """How the artifact does at shapes that nobody asked for."""
    for each in guard.raced:
        dense, sparse = each.timings[GUARD_DENSE].median_us / 1e3, each.timings[GUARD_SPARSE].median_us / 1e3
        form = DENSE if guard.falls_back(each) else "sparse"
        report.others.append(OtherShape(shape=shape_of(each.feeds), dense_ms=dense, sparse_ms=sparse, form=form))
    report.others += [OtherShape(shape=shape_text(s), form="", reason=why) for s, why in guard.left_out]
    if guard.reason:
        told = [
            f"{row.shape}: {'dense' if row.form == DENSE else f'{row.dense_ms / row.sparse_ms:.2f}x'}"
            if row.dense_ms and row.sparse_ms
            else f"{row.shape}: not raced, {row.reason}"
            for row in report.others
        ]
        report.notes.append(f"other shapes: {guard.reason} ({'; '.join(told)})")


def sizes(report: Report, source: int, folder: Path) -> None:
    """Bytes of what came in and what goes out; external data counts."""

    def of(stem: str) -> int:
        return sum(p.stat().st_size for p in folder.glob(f"{stem}*"))

    report.sizes = Sizes(
        source=source,
        model=of("model.onnx"),
        portable=of("portable.onnx"),
        kernels=(folder / "kernels.so").stat().st_size,
    )


def hints(report: Report, result: Placed, asked: bool) -> None:
    """What the user could ask for, when what came out gained nothing."""
    if result.plan.has_kernels:
        return
    helpful = [c for c in result.choices if c.would_help]  # none where nothing can be a kernel
    if not asked and helpful and all(c.site.density > 0.9 for c in result.choices):
        report.hints.append(
            "the model has next to no zeros, so there was nothing to turn into time. Ask for some: "
            "--sparsity 0.8 --pattern block:4x1 (measure the accuracy: this recipe does not train)"
        )
    report.hints += sorted({c.would_help for c in helpful if c.timings})[:2]


def _placements(choice: Choice | GpuChoice, region: str, plan_reason: str) -> list[Placement]:
    """`region`: the node that has the site as a kernel in what came out."""
    site, used = choice.site, bool(region)
    reason = choice.reason if used or choice.form is None else f"{choice.reason}; but {plan_reason}"
    if not choice.timings:
        tokens = choice.tokens[0] if choice.tokens else 0
        row = _row(site.name, site.op.kind, site.n, site.op.k, tokens, site.density, reason, choice.would_help)
        kind, pattern = choice.kind if used else DENSE, _pattern(site.density, choice.form if used else None)
        return [msgspec.structs.replace(row, region=region, form=kind, pattern=pattern)]
    out = []
    for tokens, timings in zip(choice.tokens, choice.timings, strict=True):
        chosen = choice.candidate if used else DENSE
        candidates = tuple(
            Candidate(name=n, median_us=t.median_us, p10_us=t.p10_us, p90_us=t.p90_us, chosen=n == chosen)
            for n, t in timings.items()
        )
        out.append(
            Placement(
                node=site.name,
                op=site.op.kind,
                n=site.n,
                k=site.op.k,
                tokens=tokens,
                form=choice.kind if used else DENSE,
                pattern=_pattern(site.density, choice.form),
                density=site.density,
                candidates=candidates,
                reason=reason,
                would_help=choice.would_help,
                region=region,
            )
        )
    return out


def _row(
    node: str, op: str, n: int, k: int, tokens: int, density: float, reason: str, would_help: str = ""
) -> Placement:
    return Placement(
        node=node,
        op=op,
        n=n,
        k=k,
        tokens=tokens,
        form="dense",
        pattern=_pattern(density, None),
        density=density if density >= 0 else math.nan,
        candidates=(),
        reason=reason,
        would_help=would_help,
    )


def _pattern(density: float, form: Form | GpuForm | None) -> str:
    if density < 0 or (density == 1 and not isinstance(form, GpuForm)):
        return DENSE
    return "unstructured" if form is None else form.pattern
