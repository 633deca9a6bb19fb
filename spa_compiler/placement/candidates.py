"""Which forms a site's weight already has, and which of them each class of like sites is timed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spa_compiler.kernels import rx1
from spa_compiler.placement.sites import Site

DENSE = "dense"
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
            "n": site.n,
            "k": site.k,
            "act": site.act,
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
        key = (site.layout, site.n, site.k, site.act, own, tuple((s.rows, round(s.share, 2)) for s in stored))
        found.setdefault(key, SiteClass([], own, stored)).sites.append(site)
    return list(found.values())
