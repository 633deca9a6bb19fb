"""Forms for machines that nothing can be timed on from here: by counting multiply-adds, and said to be no measurement.

    speed over dense = efficiency of the kernel / share of the weight that is stored

A dense product makes n k multiply-adds a token near the peak of the machine, a sparse kernel those of what is stored,
at a part of the peak that depends on how many of them share a load. That holds for many tokens; with few, the time is
that of reading the weight, of which the share is stored as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from spa_compiler.kernels.form import Form
from spa_compiler.placement.candidates import stored_forms
from spa_compiler.placement.choose import Choice, nothing_to_leave_out
from spa_compiler.placement.sites import Site
from spa_compiler.targets import Target

#: Of the peak: what the project asks of its kernels where it can measure them, with one output to a load and with more.
EFFICIENCY, EFFICIENCY_OF_ONE = 0.85, 0.45
#: A kernel must come out this much faster than dense, since another machine's balance of loads and arithmetic is not
#: known; between convolutions it pays for two changes of ONNX Runtime's layout besides.
MARGIN, MARGIN_OF_PLANES = 1.4, 1.8


def why(target: Target) -> str:
    """Why nothing can be timed for a target; empty if this machine runs it."""
    return "" if target.host_runs else f"not measured, this machine does not run {target.arch}"


def estimate(form: Form, share: float) -> float:
    """Speed over dense of a kernel that stores `share` of the weight, by the formula above."""
    shared = form.pattern.startswith("block:") and form.rows > 1
    return (EFFICIENCY if shared else EFFICIENCY_OF_ONE) / max(share, 1e-3)


def choose_unmeasured(sites: Sequence[Site], target: Target) -> list[Choice]:
    """For each site the form that should be the fastest, if it should win by the margin; else dense."""
    return [_choose(site, why(target)) for site in sites]


def _choose(site: Site, words: str) -> Choice:
    dense = Choice(site, None, f"{words}: {nothing_to_leave_out(site)}")
    speeds = {s.form: (estimate(s.form, s.share), s.share) for s in stored_forms(site)}
    if not speeds:
        return dense
    form = max(speeds, key=lambda f: speeds[f])
    speed, share = speeds[form]
    need = MARGIN_OF_PLANES if site.layout == "planes" else MARGIN
    told = f"{words}: {form.name} stores {share:.0%}, which should be {speed:.1f}x as fast as dense"
    if speed < need:
        return dataclasses.replace(dense, reason=f"{told}; {need} is asked for")
    return Choice(site, form, told, candidate=form.name, expected=speed)
