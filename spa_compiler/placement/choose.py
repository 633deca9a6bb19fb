"""The best form of every class of sites, by time: ONNX Runtime's dense op and every sparse kernel take turns."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from spa_compiler.graph.session import open_session
from spa_compiler.placement.candidates import DENSE, SiteClass, candidate_name
from spa_compiler.placement.measure import CLOSE, Timing, interleave
from spa_compiler.placement.nodes import Packer
from spa_compiler.placement.records import Records
from spa_compiler.placement.sites import Site
from spa_compiler.placement.trial import dense_model, pick, region_of, sparse_model
from spa_compiler.runtime.link import link

Progress = Callable[[str, int, int], None]

_BUDGET_S = 0.25  # of one class at one shape


@dataclass(frozen=True)
class Choice:
    """What one site got. `rows` is R, None for dense; `timings` per candidate and shape are of one site."""

    site: Site
    rows: int | None
    reason: str
    would_help: str = ""
    timings: tuple[dict[str, Timing], ...] = ()
    tokens: tuple[int, ...] = field(default=())

    @property
    def gain(self) -> float:
        """Speed over dense of the form that was chosen, geometric mean over shapes; 1 for dense."""
        return 1.0 if self.rows is None else _mean_ratio(self.timings, candidate_name(self.rows))


def choose(
    classes: Sequence[SiteClass],
    mcpu: str,
    threads: int,
    records: Records,
    packer: Packer,
    workspace: Path,
    progress: Progress,
    rng: np.random.Generator,
) -> list[Choice]:
    """Times every class in every form its weights have, and picks the fastest; dense wins ties.

    Several shapes are weighed by the geometric mean of their speed-ups.

    Args:
        workspace: a folder for the trials' library, which is removed again.
    """
    choices: list[Choice] = []
    timed = [c for c in classes if c.stored]
    done = 0
    with tempfile.TemporaryDirectory(prefix="trial-", dir=workspace) as folder:
        library = Path(folder) / "kernels.so"
        questions = {id(c): [records.get(c.question(s, threads)) for s in c.shapes] for c in timed}
        missing = [c for c in timed if any(known is None for known in questions[id(c)])]
        if missing:
            regions = [region_of(site, packer, s.rows) for c in missing for s in c.stored for site in pick(c.sites)]
            link(regions, mcpu, library)
        for each in classes:
            timings: list[dict[str, Timing]] = []
            if each.stored:
                for shape, known in zip(each.shapes, questions[id(each)], strict=True):
                    if known is None:
                        known = _time(each, shape, threads, library, packer, rng)
                        records.put(each.question(shape, threads), known)
                    timings.append(known)
                done += 1
                progress("timing sites", done, len(timed))
            rows, reason, would_help = _decide(each, timings)
            tokens = tuple(_tokens(each.sites[0], s) for s in each.shapes)
            choices += [Choice(site, rows, reason, would_help, tuple(timings), tokens) for site in each.sites]
    return choices


def _time(
    each: SiteClass, shape: Sequence[int], threads: int, library: Path, packer: Packer, rng: np.random.Generator
) -> dict[str, Timing]:
    sites = pick(each.sites)
    feeds = {"x": rng.standard_normal(tuple(shape), np.float32)}
    models = {DENSE: dense_model(sites, shape)}
    models |= {s.name: sparse_model(sites, shape, packer, s.rows) for s in each.stored}
    sessions = {name: open_session(model, threads=threads, library=library) for name, model in models.items()}
    calls = {name: (lambda s=session: s.run(None, feeds)) for name, session in sessions.items()}
    count = len(sites)
    return {
        name: Timing(t.median_us / count, t.p10_us / count, t.p90_us / count, t.runs)
        for name, t in interleave(calls, _BUDGET_S).items()
    }


def nothing_to_leave_out(site: Site) -> str:
    """Why a site has no form but dense."""
    return "it has no zeros" if site.density == 1 else f"its zeros ({1 - site.density:.0%}) leave no block out"


def _decide(each: SiteClass, timings: Sequence[dict[str, Timing]]) -> tuple[int | None, str, str]:
    """(R or None, reason, what would help)."""
    site = each.sites[0]
    if not each.stored:
        recipe = f"sparsify{{sparsity=0.8,pattern=block:4x1,targets={site.name}}}"
        return None, nothing_to_leave_out(site), f'zeros, for instance --passes "{recipe}"'
    means = {s.rows: _mean_ratio(timings, s.name) for s in each.stored}
    rows = max(means, key=lambda r: means[r])
    if means[rows] > 1 + CLOSE:
        return rows, f"{means[rows]:.2f}x over dense as block:{rows}x1", ""
    share = next(s.share for s in each.stored if s.rows == rows)
    need = max(0.05, share * means[rows] / 1.2)
    return (
        None,
        f"dense is faster or as fast: block:{rows}x1 reaches {means[rows]:.2f}x",
        f"about {1 - need:.0%} zeros in 4x1 blocks would gain at this size, or more tokens at once",
    )


def _mean_ratio(timings: Sequence[dict[str, Timing]], name: str) -> float:
    return math.exp(sum(math.log(t[DENSE].median_us / t[name].median_us) for t in timings) / len(timings))


def _tokens(site: Site, shape: Sequence[int]) -> int:
    return math.prod(shape) // site.k if site.k else 0
