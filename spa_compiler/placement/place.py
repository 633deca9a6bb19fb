"""Placement: list the sites, time their forms, join neighbours, race whole models, keep the fastest."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from spa_compiler.calibration.progress import Progress
from spa_compiler.graph import shapes as graph_shapes
from spa_compiler.graph.model import Model
from spa_compiler.graph.save import save, settle
from spa_compiler.graph.session import Feeds
from spa_compiler.kernels.cuda.form import Dtype
from spa_compiler.kernels.form import Form
from spa_compiler.placement.attention import find_attention
from spa_compiler.placement.between import find_between
from spa_compiler.placement.candidates import DENSE, chain_classes, classes, stored_forms
from spa_compiler.placement.chains import Chain, find_chains
from spa_compiler.placement.choose import WORTH_JOINING, ChainChoice, Choice, choose, choose_chains, explain
from spa_compiler.placement.contests import Referee
from spa_compiler.placement.depthwise import find_depthwise
from spa_compiler.placement.gpu_choose import GpuChoice, GpuForm
from spa_compiler.placement.guard import Guard, guard
from spa_compiler.placement.heads import Shapes
from spa_compiler.placement.measure import CLOSE, Timing
from spa_compiler.placement.nodes import Packer, insert, node_name
from spa_compiler.placement.norms import find_norms
from spa_compiler.placement.race import Race, compete, worth
from spa_compiler.placement.records import Records
from spa_compiler.placement.regions import Group, join, single
from spa_compiler.placement.sites import Refusal, find_sites, held
from spa_compiler.placement.timer import Contender, LocalTimer, Timer
from spa_compiler.placement.unmeasured import choose_unmeasured, why
from spa_compiler.runtime.generate import Region
from spa_compiler.runtime.gpu import GpuOp
from spa_compiler.runtime.link import link
from spa_compiler.targets import Target
from spa_compiler.targets.machine import give_back

PORTABLE, SINGLE, REGIONS, WHOLE = "portable", "single sites", "regions", "regions with attention"
STRONG, FACTORS = "regions of strong sites", "regions with all low-rank layers"
EVERY = "regions with all layers"
SOURCE = "source"
_RACE_S = 2.0  # of the whole-model race, at one shape
_RACE_ROUNDS = 12
#: ONNX Runtime keeps the activations of convolutions in a blocked layout; each of our nodes between them costs two
#: conversions that no site sees when it is timed by itself. A plan of the sites that gain most is worth a try, too. The
#: bound was set by looking at MobileNetV2; a poor one costs a plan that loses its race, never a slower result.
STRONG_GAIN = 1.8
#: What a handful of nodes of ONNX Runtime take for the little work between small layers. A Llama of 260,000 parameters
#: at one token: layers of 2 us that gain nothing by themselves, and the model as one node takes a fifth of the time.
FEW_NODES_US = 20.0


@dataclass(eq=False)
class Plan:
    """One way to run the whole model: a folder with model.onnx and kernels.so."""

    name: str
    folder: Path
    regions: list[Region]
    forms: dict[str, Form] = field(default_factory=dict)  # of the sites that are kernels, by name
    nodes: dict[str, str] = field(default_factory=dict)  # and the name of the node that has them
    gpu_forms: dict[str, GpuForm] = field(default_factory=dict)  # `forms` of GPUs
    operators: list[GpuOp] = field(default_factory=list)  # `regions` of GPUs

    @property
    def has_kernels(self) -> bool:
        """Whether any node is ours."""
        return bool(self.regions or self.operators)

    @property
    def file(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def library(self) -> Path | None:
        path = self.folder / "kernels.so"
        return path if path.exists() else None


@dataclass
class Placed:
    """The winner, why every site got its form, and the race: runtime -> timing, for each shape."""

    plan: Plan
    choices: Sequence[Choice | GpuChoice] = ()
    refusals: list[Refusal] = field(default_factory=list)
    race: list[dict[str, Timing]] = field(default_factory=list)
    heats: int = 1  # of the race
    reason: str = ""
    guard: Guard | None = None  # None: not asked for, or the winner has no kernels
    dtype: Dtype = "fp32"  # of what was placed
    notes: tuple[str, ...] = ()  # on that

    @property
    def gaining(self) -> list[str]:
        """Names of the sites that became kernels for their own sake, and not for that of their neighbours."""
        used = self.plan.forms.keys() | self.plan.gpu_forms.keys()
        return [c.site.name for c in self.choices if c.site.name in used and c.gain > 1]


def place(
    model: Model,
    source: Path,
    feeds: Sequence[Feeds],
    target: Target,
    threads: int,
    records: Records,
    workspace: Path,
    progress: Progress,
    rng: np.random.Generator,
    *,
    odd: Sequence[Feeds] = (),
    replay: bool = False,
    original: Model | None = None,
    timer: Timer | None = None,
    guarded: bool = False,
    max_size: int | None = None,
    trials: int = 0,
) -> Placed:
    """Decides every site's form on a CPU; `gpu_place` is for GPUs.

    Args:
        model: after the passes; not changed, but what its weights take in memory: they lie in the dense plan's file.
        source: the file that the user gave, the reference of the race.
        feeds: one entry for each shape to measure.
        workspace: an empty folder for the plans; the winner's stays.
        odd: feeds of further shapes that the result must run at, for what holds at some shapes only.
        replay: take whole-model races from the records too, and keep them there.
        original: the model as it was loaded, if it may stand in for a `model` that came out slower.
        timer: the machine that decides; None: this one.
        guarded: race the winner at shapes that were not asked for, too; it may get the dense form as well.
        max_size: the most bytes that such a plan may take.
        trials: the most tiles that each class of sites is timed in, besides the usual ones.

    Returns:
        The winning plan. With kernels it is slower than the source or `model` in ONNX Runtime at none of the shapes,
        unless nothing could be timed, as this machine does not run the target.
    """
    portable = _write(Plan(PORTABLE, workspace / "portable", []), model, target, lasting=True)
    give_back()
    sites, refusals = find_sites(model)
    placed = Placed(portable, refusals=refusals)
    plans = [portable]
    timer = timer or LocalTimer()
    known: Shapes = graph_shapes.fixed_at(model, [*feeds, *odd])
    if not target.host_runs:
        choices = choose_unmeasured(sites, target)
        chosen = _chosen(choices, [], 0, 0)
        if chosen:
            name = WHOLE if find_attention(model, known) else REGIONS
            placed.plan = _sparse_plan(name, model, chosen, known, Packer(), target, workspace)
        placed.choices, placed.reason = choices, f"{placed.plan.name}, {why(target)}"
        return placed
    measured, packer = known[: len(feeds)], Packer()
    referee = Referee(target.mcpu, threads, records, workspace, progress, rng, timer, trials)
    choices = choose(classes(sites, measured), referee)
    alone = {c.site.name: c.form for c in choices if c.form is not None}
    chains = choose_chains(chain_classes(chains_of(model, known), alone, measured), referee)
    give_back()
    for name, chosen in _worth_a_race(model, choices, chains, known).items():
        plans.append(_sparse_plan(name, model, chosen, known, packer, target, workspace))
    if between := _between(model, choices, chains, known):
        plans.append(_sparse_plan(EVERY, model, between, known, packer, target, workspace))
    del packer  # packed weights: as large as a model
    give_back()
    progress("racing whole models", 0, len(feeds))
    race = Race(timer, threads, records if replay else None)
    result = compete(race, contenders(source, plans), SOURCE, PORTABLE, feeds, _RACE_S, _RACE_ROUNDS)
    progress("racing whole models", len(feeds), len(feeds))
    placed.race, placed.heats = result.table, result.heats
    placed.plan, placed.reason = winner(plans, placed.race, result.finalists)
    placed.choices = explain(choices, chains, placed.plan.forms)
    if placed.plan is portable and original is not None and _worse_than_source(placed.race):
        placed.plan = _write(Plan(SOURCE, workspace / "as-given", []), original, target)
        placed.reason = "the model as it was given: rewriting it made it no faster"
    if guarded and placed.plan.regions:
        progress("racing at other shapes", 0, 1)
        dense_us = placed.race[0][PORTABLE].median_us
        placed.guard = guard(placed.plan, portable, model, feeds, dense_us, race, workspace, max_size)
        placed.plan = placed.guard.plan
        progress("racing at other shapes", 1, 1)
    for plan in plans:
        if plan is not placed.plan and plan is not portable:
            shutil.rmtree(plan.folder)
    return placed


def _worth_a_race(
    model: Model, choices: Sequence[Choice], chains: Sequence[ChainChoice], known: Shapes
) -> dict[str, dict[str, Form]]:
    """The plans by name, each with the forms of the sites that become kernels."""
    chosen, strong = _chosen(choices, chains, 0, 1 + CLOSE), _chosen(choices, chains, STRONG_GAIN, STRONG_GAIN)
    every = _chosen(choices, chains, 0, WORTH_JOINING)
    plans: dict[str, dict[str, Form]] = {}
    if chosen:
        plans |= {SINGLE: chosen, REGIONS: chosen}
        if find_attention(model, known):
            plans[WHOLE] = chosen
    if 0 < len(strong) < len(chosen) and any(c.site.layout == "planes" for c in choices):
        plans[STRONG] = strong
    if len(every) > len(chosen):
        plans[FACTORS] = every
    return plans


def _chosen(
    choices: Sequence[Choice], chains: Sequence[ChainChoice], least: float, least_of_chains: float
) -> dict[str, Form]:
    alone = {c.site.name: c.form for c in choices if c.form is not None and c.gain >= least}
    return alone | {n: form for c in chains if c.gain >= least_of_chains for n, form in c.forms.items()}


def _between(model: Model, choices: Sequence[Choice], chains: Sequence[ChainChoice], known: Shapes) -> dict[str, Form]:
    """The forms of all layers that share regions with what becomes kernels anyway; empty if those are the same.

    A layer without zeros that stays ONNX Runtime's cuts a region in two, and every panel around it goes out and comes
    back; as a kernel of full blocks it is next to as fast. Layers that stand alone are left as they are. Where no layer
    gains by itself, those that take no longer than a few nodes may do so together.
    """
    gaining = _chosen(choices, chains, 0, WORTH_JOINING)
    own = gaining or {c.site.name: c.joined for c in choices if _takes_no_longer_than_nodes(c)}
    others = {c.site.name: c.joined for c in choices}
    forms = others | _chosen(choices, chains, 0, 0)
    if not own or len(forms) == len(gaining):
        return {}
    kept: dict[str, Form] = {}
    for group in _joined(model, forms, known, attention=True)[1]:
        names = [site.name for site in group.products]
        if not own.keys().isdisjoint(names) and (gaining or len(names) > 1):
            kept |= {name: forms[name] for name in names}
    return kept if len(kept) > len(gaining) else {}


def _takes_no_longer_than_nodes(choice: Choice) -> bool:
    """Whether a layer was timed, and takes as little time as the nodes around it that a region saves."""
    dense = [t[DENSE].median_us for t in choice.timings]
    return choice.site.layout == "rows" and bool(dense) and max(dense) < FEW_NODES_US


def _joined(model: Model, forms: Mapping[str, Form], known: Shapes, attention: bool) -> tuple[Model, list[Group]]:
    """A copy of the model, and the sites of `forms` in it joined with their neighbours."""
    twin = model.copy()
    sites = [s for s in find_sites(twin)[0] if s.name in forms]
    attentions = find_attention(twin, known) if attention else []
    images = any(s.layout == "planes" for s in sites)
    between = [*find_depthwise(twin), *find_between(twin, known)] if images else []
    return twin, join(twin, sites, find_norms(twin), attentions, between, known)


def _sparse_plan(
    name: str,
    model: Model,
    forms: dict[str, Form],
    known: Shapes,
    packer: Packer,
    target: Target,
    workspace: Path,
) -> Plan:
    """The sites of `forms` as kernels: each, and each low-rank layer, by itself, or joined with their neighbours,
    attention cores among them."""
    if name == SINGLE:
        twin = model.copy()
        sites = [s for s in find_sites(twin)[0] if s.name in forms]
        chains = [c for c in chains_of(twin, known) if all(s.name in forms for s in c.products)]
        joined = {s.name for c in chains for s in c.products}
        groups = [*single([s for s in sites if s.name not in joined]), *(c.group for c in chains)]
    else:
        twin, groups = _joined(model, forms, known, attention=name in (WHOLE, FACTORS, EVERY))
    nodes = {site.name: node_name(group) for group in groups for site in group.products}
    regions = insert(twin, groups, forms, packer)
    return _write(Plan(name, workspace / name.replace(" ", "-"), regions, forms, nodes), twin, target)


def chains_of(model: Model, known: Shapes) -> list[Chain]:
    """The low-rank layers of a model, of sites of their own."""
    sites = find_sites(model)[0]
    return find_chains(sites, {s.name for s in sites if stored_forms(s)}, held(model.graph), known)


def _write(plan: Plan, model: Model, target: Target, *, lasting: bool = False) -> Plan:
    """Fills a plan's folder. With `lasting`, the model's weights are read from there from then on."""
    plan.folder.mkdir(parents=True)
    (settle if lasting else save)(model, plan.file)
    # Without regions too: it is loaded wherever the artifact is, and it turns off a slow fusion of ONNX Runtime.
    link(plan.regions, target.archs, plan.folder / "kernels.so")
    return plan


def contenders(source: Path, plans: Sequence[Plan]) -> dict[str, Contender]:
    """The source and the plans by name."""
    return {SOURCE: Contender(source)} | {p.name: Contender(p.file, p.library) for p in plans}


def _worse_than_source(race: Sequence[dict[str, Timing]]) -> bool:
    return any(t[SOURCE].median_us < t[PORTABLE].median_us * (1 - CLOSE) for t in race)


def winner(plans: Sequence[Plan], race: Sequence[dict[str, Timing]], finalists: Sequence[str]) -> tuple[Plan, str]:
    """The finalist with the best geometric mean over shapes among those that lose at no shape; dense wins ties."""
    portable = plans[0]
    best, best_ratio = portable, 0.0
    for plan in (plan for plan in plans if plan.name in finalists):
        ratios = [min(t[PORTABLE].median_us, t[SOURCE].median_us) / t[plan.name].median_us for t in race]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        if worth(ratios) and mean > best_ratio:
            best, best_ratio = plan, mean
    if best is not portable:
        return best, f"{best.name}: {best_ratio:.2f}x over the faster of the source and the model in standard ops"
    if len(plans) == 1:
        return best, "no site gains from a sparse kernel"
    return best, "as a whole model no sparse plan was faster than ONNX Runtime's dense ops"
