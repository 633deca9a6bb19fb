"""Placement on GPUs: every site by itself as a node, dense or in a form; the whole model races where there is a GPU.

Without one, forms are chosen by a stated model (`gpu_choose`), and the report says of each that it was not measured.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from spa_compiler.calibration.progress import Progress
from spa_compiler.graph import shapes as graph_shapes
from spa_compiler.graph.model import Model
from spa_compiler.graph.precision import Converted
from spa_compiler.graph.save import save, settle
from spa_compiler.graph.session import Feeds
from spa_compiler.kernels.cuda.form import Dtype
from spa_compiler.placement import gpu_nodes
from spa_compiler.placement.gpu_choose import Candidate, GpuChoice, calculated, candidates, check_packed, timed
from spa_compiler.placement.gpu_low_rank import Halves, joined
from spa_compiler.placement.gpu_sites import Pair, find_gpu_sites, find_pairs, tokens_of
from spa_compiler.placement.gpu_sums import handed_over
from spa_compiler.placement.gpu_trial import GpuReferee
from spa_compiler.placement.measure import Timing
from spa_compiler.placement.place import PORTABLE, SINGLE, SOURCE, Placed, Plan, contenders, winner
from spa_compiler.placement.race import Race, compete
from spa_compiler.placement.records import Records
from spa_compiler.placement.sites import Site, held
from spa_compiler.placement.timer import Timer
from spa_compiler.runtime.gpu import GpuLibrary, build
from spa_compiler.runtime.link import link
from spa_compiler.targets import LEVELS, Target
from spa_compiler.targets.cuda import architecture
from spa_compiler.targets.machine import give_back

_RACE_S = 1.0  # of the whole-model race, at one shape
_ROUNDS = 12


def place_on_gpu(
    model: Model,
    twin: Converted,
    dtype: Dtype,
    source: Path,
    feeds: Sequence[Feeds],
    target: Target,
    records: Records,
    workspace: Path,
    progress: Progress,
    *,
    timer: Timer | None = None,
    replay: bool = False,
) -> Placed:
    """Decides every site's form.

    Args:
        model: float32, after the passes.
        twin: the same in `dtype`, what the dense plan is; its weights lie in that plan's file from then on.
        source: the file that the user gave.
        feeds: one entry for each shape to measure, in the types of the twin's inputs.
        workspace: an empty folder for the plans; the winner's stays.
        timer: takes times on the GPU; None: nothing is timed.
        replay: take whole-model races from the records too, and keep them there.

    Returns:
        The winning plan. With a timer it is slower than the source or the dense twin at none of the shapes.

    Raises:
        EnvironmentFault: there is no compiler for CUDA, and something to compile.
    """
    portable = _write(Plan(PORTABLE, workspace / "portable", []), twin.model, target, lasting=True)
    give_back()
    known = graph_shapes.fixed_at(model, feeds)
    sites, refusals = find_gpu_sites(model, {} if dtype == "fp32" else twin.kept, known)
    placed = Placed(portable, refusals=refusals, dtype=dtype, notes=twin.notes)
    archs = [architecture(name) for name in target.archs]
    choices: list[GpuChoice] = []
    referee = None if timer is None else GpuReferee(timer, records, target, dtype, workspace)
    for i, site in enumerate(sites):
        sizes = [tokens_of(site, shapes) for shapes in known]
        found = candidates(site, archs, dtype, sizes)
        if referee is None:
            choices.append(calculated(site, found, archs, dtype, sizes))
        else:
            choices.append(_timed(referee, site, found, [shapes[site.source.name] for shapes in known], sizes))
        progress("choosing forms" if referee is None else "timing sites", i + 1, len(sites))

    def ask(pair: Pair, one: Candidate, halves: Halves) -> Sequence[dict[str, Timing]]:
        assert referee is not None
        return referee.timings_of_pair(pair, one, halves, [shapes[pair.down.source.name] for shapes in known])

    outputs = held(model.graph)
    choices = joined(
        choices,
        find_pairs(sites, outputs),
        archs,
        dtype,
        lambda pair: [tokens_of(pair.down, shapes) for shapes in known],
        None if referee is None else ask,
    )
    choices = handed_over(choices, archs, outputs, known)
    for choice in choices:
        check_packed(choice)
    placed.choices = choices
    plans = [portable]
    if any(choice.form is not None for choice in choices):
        plans.append(_sparse(twin.model, choices, target, workspace))
    if timer is None:
        placed.plan = plans[-1]
        placed.reason = f"{placed.plan.name}, not measured: forms are calculated, there was no GPU to time them on"
        return placed
    progress("racing whole models", 0, len(feeds))
    race = Race(timer, 1, records if replay else None)
    result = compete(race, contenders(source, plans), SOURCE, PORTABLE, feeds, _RACE_S, _ROUNDS)
    progress("racing whole models", len(feeds), len(feeds))
    placed.race, placed.heats = result.table, result.heats
    placed.plan, placed.reason = winner(plans, placed.race, result.finalists)
    for plan in plans:
        if plan is not placed.plan and plan is not portable:
            shutil.rmtree(plan.folder)
    return placed


def _timed(
    referee: GpuReferee,
    site: Site,
    found: Sequence[Candidate],
    shapes: Sequence[tuple[int, ...]],
    sizes: Sequence[tuple[int, int]],
) -> GpuChoice:
    leading = referee.leading(found)
    return timed(site, leading, referee.timings(site, leading, shapes) if leading else [], sizes)


def _sparse(twin: Model, choices: Sequence[GpuChoice], target: Target, workspace: Path) -> Plan:
    own = twin.copy()
    operators = gpu_nodes.insert(own, choices)
    used = {c.site.name: c.form for c in choices if c.form is not None}
    nodes = {c.site.name: gpu_nodes.node_name(c) for c in choices if c.form is not None}
    plan = Plan(SINGLE, workspace / SINGLE.replace(" ", "-"), [], {}, nodes, used, operators)
    return _write(plan, own, target)


def _write(plan: Plan, model: Model, target: Target, *, lasting: bool = False) -> Plan:
    plan.folder.mkdir(parents=True)
    (settle if lasting else save)(model, plan.file)
    gpu = build(plan.operators, target.archs) if plan.operators else GpuLibrary((), target.archs, {})
    link([], (LEVELS[0],), plan.folder / "kernels.so", gpu)  # any machine's code: there are no kernels for the CPU
    return plan
