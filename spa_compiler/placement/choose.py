"""The best form of every class of sites, by time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from spa_compiler.kernels.form import Form
from spa_compiler.kernels.forms import FULL
from spa_compiler.placement import variants
from spa_compiler.placement.candidates import (
    DENSE,
    LOW_RANK,
    ChainClass,
    Layout,
    SiteClass,
    Stored,
)
from spa_compiler.placement.chains import Chain
from spa_compiler.placement.contests import Contest, Referee
from spa_compiler.placement.measure import CLOSE, Timing
from spa_compiler.placement.regions import single
from spa_compiler.placement.sites import Site

#: A layer that is slower than this as a kernel of its own is not tried in larger regions either, where it saves the way
#: into panels and back, and lets others save theirs. MiniLM with half of its parameters left: layers at 0.72 of dense
#: speed by themselves (8 x 128 tokens), the model as one region 1.17x as fast as dense.
WORTH_JOINING = 0.6
#: What a weight reaches in the form FULL, with nothing left out: 0.95 to 1.03 at 384 to 1536 features and 128
#: tokens, by itself. Zeros that make a kernel slower than that are no use between kernels either.
_NOTHING_LEFT_OUT = 0.95


@dataclass(frozen=True)
class Choice:
    """What one site got. `form` is None for dense; `timings` per candidate and shape are of one site, or of all of
    the low-rank layer that it is a part of. `candidate` is the name of its form among them. `joined` is the form where
    it is no gain by itself, but stands between kernels. `expected` is its speed over dense where nothing was timed."""

    site: Site
    form: Form | None
    reason: str
    would_help: str = ""
    timings: tuple[dict[str, Timing], ...] = ()
    tokens: tuple[int, ...] = field(default=())
    candidate: str = DENSE
    joined: Form = FULL
    expected: float = 1.0

    @property
    def kind(self) -> str:
        """dense, sparse, low rank, sparse + low rank."""
        if self.form is None:
            return DENSE
        if LOW_RANK not in self.candidate:
            return "sparse"
        return LOW_RANK if self.candidate == LOW_RANK else f"sparse + {LOW_RANK}"

    @property
    def gain(self) -> float:
        """Speed over dense of the form that was chosen, geometric mean over shapes; 1 for dense."""
        if self.form is None or not self.timings:
            return self.expected
        return _mean_ratio(self.timings, self.candidate)


@dataclass(frozen=True)
class ChainChoice:
    """The best way to run a low-rank layer as one node, and how it compares with ONNX Runtime's dense operators."""

    chain: Chain
    layout: Layout
    timings: tuple[dict[str, Timing], ...]
    tokens: tuple[int, ...]

    @property
    def gain(self) -> float:
        return _mean_ratio(self.timings, self.layout.name)

    @property
    def wins(self) -> bool:
        return self.gain >= 1 + CLOSE

    @property
    def forms(self) -> dict[str, Form]:
        return self.layout.of(self.chain)


def choose(classes: Sequence[SiteClass], referee: Referee) -> list[Choice]:
    """Times every class in every form its weights have, and picks the fastest; dense wins ties.

    Several shapes are weighed by the geometric mean of their speed-ups.
    """
    timed = [c for c in classes if c.stored]
    known = [variants.winners(referee.mcpu, referee.records.all()), variants.shipped()] if referee.trials else []
    tiles = [variants.ranked(c, referee.mcpu, referee.threads, known) if referee.trials else [] for c in timed]
    contests = [
        Contest(
            single(c.sites),
            c.shapes,
            _candidates(c, c.stored),
            [c.question(shape, referee.threads, referee.trials) for shape in c.shapes],
            _candidates(c, more),
            {s.name: s.form.cut(None, None).name for s in more},
        )
        for c, more in zip(timed, tiles, strict=True)
    ]
    found = iter(referee.timings("timing sites", contests))
    choices: list[Choice] = []
    for each in classes:
        timings = next(found) if each.stored else []
        form, reason, would_help = _decide(each, timings)
        tokens = tuple(each.sites[0].pixels(s) for s in each.shapes)
        name = DENSE if form is None else form.name
        joined = _joined(each, timings)
        choices += [Choice(site, form, reason, would_help, tuple(timings), tokens, name, joined) for site in each.sites]
    return choices


def _candidates(each: SiteClass, stored: Iterable[Stored]) -> dict[str, dict[str, Form]]:
    return {s.name: {site.name: s.form for site in each.sites} for s in stored}


def choose_chains(classes: Sequence[ChainClass], referee: Referee) -> list[ChainChoice]:
    """The same for low-rank layers as one node: the best way of each, whether it wins or not."""
    contests = [
        Contest(
            [chain.group for chain in c.chains],
            c.shapes,
            {way.name: {n: form for chain in c.chains for n, form in way.of(chain).items()} for way in c.layouts},
            [c.question(shape, referee.threads) for shape in c.shapes],
        )
        for c in classes
    ]
    found = referee.timings("timing low-rank layers", contests)
    choices = []
    for each, timings in zip(classes, found, strict=True):
        best = max(each.layouts, key=lambda way: _mean_ratio(timings, way.name))
        tokens = tuple(each.chains[0].down.pixels(s) for s in each.shapes)
        choices += [ChainChoice(chain, best, tuple(timings), tokens) for chain in each.chains]
    return choices


def explain(choices: Sequence[Choice], chains: Sequence[ChainChoice], used: Mapping[str, Form]) -> list[Choice]:
    """The choices of all sites, those of low-rank layers among them.

    Args:
        used: the form of every site that became a kernel in the plan that won, by name.
    """
    of_chain = {site.name: c for c in chains for site in c.chain.products}
    out = []
    for choice in choices:
        name, chain = choice.site.name, of_chain.get(choice.site.name)
        if chain is not None:
            joined = all(site.name in used for site in chain.chain.products)
            if joined or chain.wins or not choice.timings:
                choice = _as_chain(choice, chain, joined)
        elif choice.form is None and name in used:
            choice = _as_neighbour(choice, used[name])
        out.append(choice)
    return out


def _as_neighbour(choice: Choice, form: Form) -> Choice:
    timed = any(form.name in t for t in choice.timings)  # else all of the weight is in the kernel, which is still dense
    return dataclasses.replace(
        choice,
        form=form if timed else None,
        reason=f"{choice.reason}; between its neighbours in one region the model gains",
        would_help="",
        candidate=form.name if timed else DENSE,
    )


def _as_chain(choice: Choice, found: ChainChoice, joined: bool) -> Choice:
    names = ", ".join(s.name for s in found.chain.products)
    name, gain = found.layout.name, found.gain
    if found.wins:
        reason = f"{gain:.2f}x over dense as {name}, {names} together"
    elif joined:
        reason = f"{gain:.2f}x over dense as {name}, {names} together; joined with its neighbours the model gains"
    else:
        reason = f"dense is faster or as fast: {names} together as {name} reach {gain:.2f}x"
    kernel = found.wins or joined
    return dataclasses.replace(
        choice,
        form=found.forms[choice.site.name] if kernel else None,
        reason=reason,
        would_help="" if kernel else choice.would_help,
        timings=found.timings,
        tokens=found.tokens,
        candidate=name if kernel else DENSE,
    )


def nothing_to_leave_out(site: Site) -> str:
    """Why a site has no form but dense."""
    return "it has no zeros" if site.density == 1 else f"its zeros ({1 - site.density:.0%}) leave no block out"


def _decide(each: SiteClass, timings: Sequence[dict[str, Timing]]) -> tuple[Form | None, str, str]:
    """(the form or None, reason, what would help)."""
    site = each.sites[0]
    if not each.stored:
        recipe = f"sparsify{{sparsity=0.8,pattern=block:4x1,targets={site.name}}}"
        return None, nothing_to_leave_out(site), f'zeros, for instance --passes "{recipe}"'
    best, gain = _best(each, timings)
    if gain > 1 + CLOSE:
        return best.form, f"{gain:.2f}x over dense as {best.name}", ""
    need = max(0.05, best.share * gain / 1.2)
    return (
        None,
        f"dense is faster or as fast: {best.name} reaches {gain:.2f}x",
        f"about {1 - need:.0%} zeros in 4x1 blocks would gain at this size, or more tokens at once",
    )


def _joined(each: SiteClass, timings: Sequence[dict[str, Timing]]) -> Form:
    """For the neighbours' sake: the fastest that leaves something out, unless all of the weight is faster still."""
    best, gain = _best(each, timings) if each.stored else (None, 0.0)
    return best.form if best and gain >= _NOTHING_LEFT_OUT else FULL


def _best(each: SiteClass, timings: Sequence[dict[str, Timing]]) -> tuple[Stored, float]:
    """The fastest form, and its speed over dense; in the usual tiles, unless others are faster by more than chance."""
    site, own = each.sites[0], [(s, _mean_ratio(timings, s.name)) for s in each.stored]
    cut = [
        (s, _mean_ratio(timings, s.name) / (1 + CLOSE))
        for stored in each.stored
        for s in variants.tiles(stored, site.n, site.k)
        if all(s.name in t for t in timings)
    ]
    best = max([*own, *cut], key=lambda found: found[1])[0]
    return best, _mean_ratio(timings, best.name)


def _mean_ratio(timings: Sequence[dict[str, Timing]], name: str) -> float:
    return math.exp(sum(math.log(t[DENSE].median_us / t[name].median_us) for t in timings) / len(timings))
