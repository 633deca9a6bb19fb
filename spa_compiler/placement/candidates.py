"""Which forms the weight of a site or of a low-rank layer already has, and which of them like ones are timed in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spa_compiler.kernels import rx1
from spa_compiler.kernels.window import Window
from spa_compiler.placement.chains import Chain
from spa_compiler.placement.sites import Site

DENSE = "dense"
LOW_RANK = "low rank"
FACTOR_ROWS = 4  # R of a weight without zeros in a panel: with 4, the kernel runs at the peak of dense products
WORTH_TIMING = 0.95  # of the weight's elements stored: above that a sparse kernel does all of the dense work


@dataclass(frozen=True)
class Stored:
    """The weight as R x 1 blocks: share of its elements that would be stored."""

    rows: int
    share: float

    @property
    def name(self) -> str:
        return candidate_name(self.rows)


def candidate_name(rows: int) -> str:
    return f"block:{rows}x1"


@dataclass(eq=False)
class SiteClass:
    """Sites that differ in nothing that time depends on; they are timed once, together."""

    sites: list[Site]
    shapes: tuple[tuple[int, ...], ...]  # of the input, one for each measured shape of the model
    stored: tuple[Stored, ...]

    def question(self, shape: Sequence[int], threads: int) -> dict[str, object]:
        """The key of a record: everything that the timings of this class depend on, but the machine."""
        site = self.sites[0]
        return {
            "layout": site.layout,
            **({} if site.window is None else {"window": dataclasses.astuple(site.window)}),
            "n": site.n,
            "k": site.k,
            "act": site.act,
            "bias": site.bias is not None,
            "shape": list(shape),
            "threads": threads,
            "stored": {s.name: round(s.share, 2) for s in self.stored},
        }


def forms(site: Site) -> tuple[Stored, ...]:
    """The block heights that leave something out, each with what it stores."""
    total = site.n * site.k
    shares = [Stored(rows, rx1.stored_entries(site.weight, rows) / total) for rows in rx1.BLOCK_ROWS if rows <= site.n]
    return tuple(s for s in shares if s.share <= WORTH_TIMING)


def classes(sites: Sequence[Site], shapes: Sequence[dict[str, tuple[int, ...]]]) -> list[SiteClass]:
    """Sites grouped by what their time depends on, in order of first appearance."""
    found: dict[object, SiteClass] = {}
    for site in sites:
        own = tuple(known[site.source.name] for known in shapes)
        stored = forms(site)
        key = (*_size(site), site.bias is not None, own, tuple((s.rows, round(s.share, 2)) for s in stored))
        found.setdefault(key, SiteClass([], own, stored)).sites.append(site)
    return list(found.values())


@dataclass(frozen=True)
class Layout:
    """One way to run a low-rank layer as one node: R of each of its products."""

    name: str
    rows: tuple[int, ...]

    def of(self, chain: Chain) -> dict[str, int]:
        """R by the names of the sites."""
        return {site.name: rows for site, rows in zip(chain.products, self.rows, strict=True)}


@dataclass(eq=False)
class ChainClass:
    """Low-rank layers that differ in nothing that time depends on."""

    chains: list[Chain]
    shapes: tuple[tuple[int, ...], ...]
    layouts: tuple[Layout, ...]
    key: tuple[object, ...]

    def question(self, shape: Sequence[int], threads: int) -> dict[str, object]:
        """The key of a record."""
        return {"chain": self.key, "shape": list(shape), "threads": threads, "forms": [f.rows for f in self.layouts]}


def layouts(chain: Chain, rows: Mapping[str, int]) -> tuple[Layout, ...]:
    """The candidates of a low-rank layer: a sparse weight beside it may have any height that leaves something out.

    Args:
        rows: R of sites that gain from a kernel by themselves, by name: factors with zeros of their own keep it.
    """
    sparse = {s.name for s in chain.sparse}
    heights = [{f.rows for f in forms(s)} for s in chain.sparse]
    return tuple(
        Layout(
            f"{candidate_name(height)} + {LOW_RANK}" if height else LOW_RANK,
            tuple(height if s.name in sparse else rows.get(s.name, FACTOR_ROWS) for s in chain.products),
        )
        for height in (sorted(set.intersection(*heights)) if heights else (0,))
    )


def chain_classes(
    chains: Sequence[Chain], rows: Mapping[str, int], shapes: Sequence[dict[str, tuple[int, ...]]]
) -> list[ChainClass]:
    """Low-rank layers grouped by what their time depends on, in order of first appearance."""
    found: dict[object, ChainClass] = {}
    for chain in chains:
        own = tuple(known[chain.down.source.name] for known in shapes)
        ways = layouts(chain, rows)
        parts = [
            (*_size(s), s.bias is not None, s.term is not None, [round(f.share, 2) for f in forms(s)])
            for s in chain.products
        ]
        if ways:
            key = repr((parts, own, ways))
            found.setdefault(key, ChainClass([], own, ways, tuple(parts))).chains.append(chain)
    return list(found.values())


def _size(site: Site) -> tuple[str, int, int, str, Window | None]:
    return site.layout, site.n, site.k, site.act, site.window
