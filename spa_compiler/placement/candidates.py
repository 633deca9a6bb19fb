"""Which forms the weight of a site or of a low-rank layer already has, and which of them like ones are timed in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spa_compiler.kernels.form import Form
from spa_compiler.kernels.forms import FULL, forms_of
from spa_compiler.placement.chains import Chain
from spa_compiler.placement.sites import Site

DENSE = "dense"
LOW_RANK = "low rank"
MANY = 64  # tokens: as many as a panel tile has lanes
WORTH_BESIDE = 2.5  # times what the smallest form stores: no kernel is that much faster than another
WORTH_TIMING = 0.95  # of the weight's elements stored: above that a sparse kernel does all of the dense work
#: Groups of a few channels are slow in ONNX Runtime, and a kernel that does all of their work may win: 1.5x and 1.2x at
#: 4 and 8 channels a group, 0.5x at 16 (3 x 3, one thread of a Zen 4).
WORTH_TIMING_OF_GROUPS = 1.05


@dataclass(frozen=True)
class Stored:
    """A form of the weight, and the share of its elements that would be stored."""

    form: Form
    share: float

    @property
    def name(self) -> str:
        return self.form.name


@dataclass(eq=False)
class SiteClass:
    """Sites that differ in nothing that time depends on; they are timed once, together."""

    sites: list[Site]
    shapes: tuple[tuple[int, ...], ...]  # of the input, one for each measured shape of the model
    stored: tuple[Stored, ...]

    def question(self, shape: Sequence[int], threads: int, trials: int = 0) -> dict[str, object]:
        """The key of a record: everything that the timings of this class depend on, but the machine.

        Args:
            trials: how many tiles are tried besides the usual ones. Which they are is no part of the question, since
                that depends on what is in the records.
        """
        site = self.sites[0]
        return {
            "layout": site.layout,
            **({} if site.window is None else {"window": dataclasses.astuple(site.window)}),
            **({} if site.op.group == 1 else {"groups": site.op.group}),
            **({} if site.op.kind != "ConvTranspose" else {"transposed": site.grow}),
            "n": site.n,
            "k": site.k,
            "act": site.act,
            "bias": site.bias is not None,
            "shape": list(shape),
            "tokens": site.pixels(shape),
            "threads": threads,
            **({"trials": trials} if trials else {}),
            "stored": {s.name: round(s.share, 2) for s in self.stored},
        }


def stored_forms(site: Site, tokens: int = MANY) -> tuple[Stored, ...]:
    """The forms that leave something out, each with what it stores; none that stores far more than another.

    Args:
        tokens: the fewest that the site meets.
    """
    weight = site.weight
    possible = [form for form in forms_of(weight, tokens) if site.layout == "rows" or form.windowed]
    found = [Stored(form, form.stored(weight) / site.own.size) for form in possible]
    worth = WORTH_TIMING if site.op.group == 1 else WORTH_TIMING_OF_GROUPS
    most = min(worth, WORTH_BESIDE * min((s.share for s in found), default=0.0))
    return tuple(s for s in found if s.share <= most)


def classes(sites: Sequence[Site], shapes: Sequence[dict[str, tuple[int, ...]]]) -> list[SiteClass]:
    """Sites grouped by what their time depends on, in order of first appearance."""
    found: dict[object, SiteClass] = {}
    for site in sites:
        own = tuple(known[site.source.name] for known in shapes)
        stored = stored_forms(site, min((site.pixels(shape) for shape in own), default=MANY))
        key = (*_size(site), site.bias is not None, own, tuple((s.form, round(s.share, 2)) for s in stored))
        found.setdefault(key, SiteClass([], own, stored)).sites.append(site)
    return list(found.values())


@dataclass(frozen=True)
class Layout:
    """One way to run a low-rank layer as one node: the form of each of its products."""

    name: str
    forms: tuple[Form, ...]

    def of(self, chain: Chain) -> dict[str, Form]:
        """The forms by the names of the sites."""
        return {site.name: form for site, form in zip(chain.products, self.forms, strict=True)}


@dataclass(eq=False)
class ChainClass:
    """Low-rank layers that differ in nothing that time depends on."""

    chains: list[Chain]
    shapes: tuple[tuple[int, ...], ...]
    layouts: tuple[Layout, ...]
    key: tuple[object, ...]

    def question(self, shape: Sequence[int], threads: int) -> dict[str, object]:
        """The key of a record."""
        forms = [[form.name for form in way.forms] for way in self.layouts]
        return {"chain": self.key, "shape": list(shape), "threads": threads, "forms": forms}


def layouts(chain: Chain, own: Mapping[str, Form]) -> tuple[Layout, ...]:
    """The candidates of a low-rank layer: a sparse weight beside it may have any form that leaves something out.

    Args:
        own: forms of sites that gain from a kernel by themselves, by name: factors with zeros of their own keep it.
    """
    sparse = {s.name for s in chain.sparse}
    found = [[f.form for f in stored_forms(s)] for s in chain.sparse]
    shared = [form for form in found[0] if all(form in other for other in found)] if found else [None]
    return tuple(
        Layout(
            f"{form.name} + {LOW_RANK}" if form else LOW_RANK,
            tuple(form if form and s.name in sparse else own.get(s.name, FULL) for s in chain.products),
        )
        for form in shared
    )


def chain_classes(
    chains: Sequence[Chain], own: Mapping[str, Form], shapes: Sequence[dict[str, tuple[int, ...]]]
) -> list[ChainClass]:
    """Low-rank layers grouped by what their time depends on, in order of first appearance."""
    found: dict[object, ChainClass] = {}
    for chain in chains:
        seen = tuple(known[chain.down.source.name] for known in shapes)
        ways = layouts(chain, own)
        parts = [
            (*_size(s), s.bias is not None, s.term is not None, [round(f.share, 2) for f in stored_forms(s)])
            for s in chain.products
        ]
        if ways:
            key = repr((parts, seen, ways))
            found.setdefault(key, ChainClass([], seen, ways, tuple(parts))).chains.append(chain)
    return list(found.values())


def _size(site: Site) -> tuple[object, ...]:
    how = (site.op.kind == "ConvTranspose", site.grow, site.op.group)
    return site.layout, site.n, site.k, how, site.act, site.window
