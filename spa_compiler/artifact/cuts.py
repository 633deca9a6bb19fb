"""The proof of a cut: the cut model against the model before it, with what was removed masked wherever it is read.

An output's error is max|a - b| / max|b| with b the masked model's; max(1e-4, 10 * noise) is allowed, with noise the
same error between the masked model at two of ONNX Runtime's optimization levels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from spa_compiler.analysis import Analysis
from spa_compiler.analysis.mask import mask
from spa_compiler.artifact.verify import noise, same
from spa_compiler.errors import SpaError, VerificationError
from spa_compiler.graph.difference import difference
from spa_compiler.graph.model import Model
from spa_compiler.graph.session import Feeds, flatten, open_model, run
from spa_compiler.passes.pass_ import Change

_log = logging.getLogger(__name__)

TOLERANCE = 1e-4
NOISE_FACTOR = 10
EPS_FACTOR = 4
"""Float16 outputs come in steps that are above TOLERANCE."""

_SHOWN = 5
"""Groups that a message names."""

Outputs = dict[str, np.ndarray]


def check(before: Model, after: Model, analysis: Analysis, change: Change, feeds: Sequence[Feeds]) -> str:
    """Runs both models on the feeds.

    Args:
        before: the model as the pass got it.
        analysis: of `before`.

    Returns:
        What came out, or why nothing could be compared, in words.

    Raises:
        VerificationError: the cut model does not run, or an output is beyond its tolerance.
    """
    reference = before
    if not change.exact:
        gone, facts = _gone(change), analysis.facts  # the facts know sizes behind operators that inference does not
        sizes = {name: [facts.algebra.size(axis) for axis in facts.axes[name]] for name, _ in gone}
        reference = mask(before, gone, sizes)
    try:
        wanted = _outputs(reference, feeds, "all")
        plain = _outputs(reference, feeds, "none")
    except SpaError:
        raise
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors have no common root
        return f"{change.pass_name} is not verified, the model before it does not run: {_first_line(error)}"
    try:
        got = _outputs(after, feeds, "all")
    except SpaError:
        raise
    except Exception as error:
        raise _failure(change, f"the cut model does not run: {_first_line(error)}") from error
    if change.unlike:
        return f"{change.pass_name} is not verified: {change.unlike}"
    worst = (0.0, TOLERANCE)
    for want, other, have in zip(wanted, plain, got, strict=True):
        for name, value in want.items():
            allowed = _allowed(value, noise(value, other[name]))
            apart = difference(value, have[name], same(value, other[name])) if name in have else None
            if apart is None or apart > allowed:
                text = "its shape, type or NaNs differ" if apart is None else f"its error is {apart:.1e}"
                what = f"output {name!r} of the cut model is wrong: {text}, {allowed:.1e} is allowed"
                raise _failure(change, what)
            worst = max(worst, (apart, allowed))
    against = "the model before it" if change.exact else "the model with what was removed masked"
    return f"{change.pass_name}: verified against {against}: error {worst[0]:.1e}, {worst[1]:.1e} allowed"


def _gone(change: Change) -> dict[tuple[str, int], list[int]]:
    """Indices by axis; two groups may have factors of one axis."""
    out: dict[tuple[str, int], set[int]] = {}
    for removal in change.removed:
        for slab in removal.activations:
            out.setdefault((slab.name, slab.axis), set()).update(slab.indices)
    return {key: sorted(indices) for key, indices in out.items()}


def _outputs(model: Model, feeds: Sequence[Feeds], optimize: str) -> list[Outputs]:
    session = open_model(model, optimize=optimize, prepack=False)
    return [dict(flatten(run(session, feed))) for feed in feeds]


def _allowed(want: np.ndarray, own: float) -> float:
    if want.dtype.kind not in "fc":
        return 0.0
    return max(TOLERANCE, NOISE_FACTOR * own, EPS_FACTOR * float(np.finfo(want.dtype).eps))


def _failure(change: Change, what: str) -> VerificationError:
    groups = ", ".join(str(one.group) for one in change.removed[:_SHOWN])
    more = ", ..." if len(change.removed) > _SHOWN else ""
    cut = f" (groups {groups}{more} were cut)" if groups else ""
    return VerificationError(
        what,
        where=f"pass {change.pass_name}",
        fix=f"Please report this with the model{cut}; nothing was kept",
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
