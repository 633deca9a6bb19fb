"""Low-rank layers on GPUs: two products with nothing in between, as one node for few tokens.

What one node takes is compared with what both products take as two nodes, each in the form that it got by itself, and
with cuBLAS, twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from spa_compiler.kernels.cuda.form import Dtype, Epilogue
from spa_compiler.kernels.cuda.lowrank import BINS, RANKS, LowRank
from spa_compiler.placement.candidates import DENSE
from spa_compiler.placement.gpu_choose import (
    MARGIN,
    Candidate,
    GpuChoice,
    GpuForm,
    costs_of,
    dense_us,
    in_words,
    mean,
    node_layout,
    variants_of,
)
from spa_compiler.placement.gpu_sites import Pair
from spa_compiler.placement.measure import CLOSE, Timing
from spa_compiler.targets.cuda import Architecture

APART = "apart"
"""Both products by themselves, of which one at least has a form: a candidate among times."""

Sizes = Sequence[tuple[int, int]]
Halves = tuple[GpuChoice, GpuChoice]
Ask = Callable[[Pair, Candidate, Halves], Sequence[dict[str, Timing]]]
"""Times of a layer for each measured shape: dense, as one node, and apart where that is something else than dense."""


def candidate(pair: Pair, archs: Sequence[Architecture], dtype: Dtype, sizes: Sizes) -> Candidate | None:
    """The layer as one node, its factors as they are; None where there is no kernel for its rank or so many tokens."""
    up, down = pair.up, pair.down
    layout = node_layout(up)
    if pair.rank > RANKS[-1] or layout == "planes" or any(tokens > BINS[-1] for tokens, _ in sizes):
        return None
    form = LowRank(next(rank for rank in RANKS if rank >= pair.rank))
    epilogue = Epilogue(up.act, up.residual is not None)
    arrays = form.pack_factors(up.weight, down.weight, dtype)
    variants = variants_of(form, arrays, archs, dtype, "rows", epilogue, (pair.n, pair.k))
    if not variants:
        return None
    own = GpuForm(form, dtype, layout, epilogue, variants)
    return Candidate(own, arrays, costs_of(own, arrays, archs, (pair.n, pair.k), sizes))


def joined(
    choices: Sequence[GpuChoice],
    pairs: Sequence[Pair],
    archs: Sequence[Architecture],
    dtype: Dtype,
    sizes_of: Callable[[Pair], Sizes],
    ask: Ask | None = None,
) -> list[GpuChoice]:
    """The choices of all sites, those of low-rank layers among them.

    Args:
        choices: of every site by itself.
        sizes_of: (tokens, images) of a layer at each measured shape.
        ask: takes times; None: there is no GPU, and the model decides.
    """
    found, place = list(choices), {id(choice.site): i for i, choice in enumerate(choices)}
    for pair in pairs:
        sizes = sizes_of(pair)
        one = candidate(pair, archs, dtype, sizes)
        if one is None:
            continue
        first, second = place[id(pair.down)], place[id(pair.up)]
        halves = found[first], found[second]
        if ask is None:
            found[first], found[second] = calculated(pair, one, halves, archs, dtype, sizes)
        else:
            found[first], found[second] = timed(pair, one, halves, ask(pair, one, halves))
    return found


def calculated(
    pair: Pair, one: Candidate, halves: Halves, archs: Sequence[Architecture], dtype: Dtype, sizes: Sizes
) -> Halves:
    """One node if it should beat cuBLAS by the margin, and both products by themselves at all."""
    down, up = (
        [mean([dense_us(a, dtype, s.n, s.k, t, images) for a in archs]) for t, images in sizes]
        for s in (pair.down, pair.up)
    )
    twice = [a + b for a, b in zip(down, up, strict=True)]
    apart = [a + b for a, b in zip(halves[0].expected_us, halves[1].expected_us, strict=True)]
    speed = mean([d / s for d, s in zip(twice, one.expected_us, strict=True)])
    told = f"by the model {_names(pair)} together as {one.form.name} take {in_words(one.expected_us)}, "
    told += f"cuBLAS {in_words(twice)}"
    if any(half.form is not None for half in halves):
        told += f", by themselves {in_words(apart)}"
    told = f"{told}: {speed:.1f}x"
    if speed < MARGIN:
        return _apart(halves, f"{told}; {MARGIN} is asked for", "not measured: ")
    if mean(apart) < mean(one.expected_us):
        return _apart(halves, told, "not measured: ")
    return _together(pair, one, halves, GpuChoice(pair.up, one.form, f"not measured: {told}", expected=speed))


def timed(pair: Pair, one: Candidate, halves: Halves, timings: Sequence[dict[str, Timing]]) -> Halves:
    """The fastest by the clock; dense wins ties, and one node those with two."""
    gains = {name: mean([t[DENSE].median_us / t[name].median_us for t in timings]) for name in timings[0]}
    name = one.form.name
    if gains[name] <= 1 + CLOSE:
        told = f"dense is faster or as fast: {_names(pair)} together as {name} reach {gains[name]:.2f}x"
        return _apart(halves, told)
    if gains.get(APART, 0) > gains[name]:
        return _apart(halves, f"{_names(pair)} together as {name} reach {gains[name]:.2f}x, apart {gains[APART]:.2f}x")
    told = f"{gains[name]:.2f}x over dense as {name}, {_names(pair)} together"
    return _together(pair, one, halves, GpuChoice(pair.up, one.form, told, timings=tuple(timings)))


def _names(pair: Pair) -> str:
    return f"{pair.down.name}, {pair.up.name}"


def _together(pair: Pair, one: Candidate, halves: Halves, choice: GpuChoice) -> Halves:
    whole = dataclasses.replace(choice, tokens=halves[1].tokens, candidate=one.form.name, pair=pair)
    return dataclasses.replace(whole, site=pair.down), dataclasses.replace(whole, arrays=one.arrays)


def _apart(halves: Halves, told: str, head: str = "") -> Halves:
    """Both as they were, and why they are not one node; `head` is what a reason by itself begins with."""
    first, second = (
        dataclasses.replace(h, reason=f"{head}{told}" if h.form is None else f"{h.reason}; {told}") for h in halves
    )
    return first, second
