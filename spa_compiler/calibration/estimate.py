"""What a run did to the model's outputs, on samples that no pass has seen."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spa_compiler.calibration.samples import Samples
from spa_compiler.graph.model import Model
from spa_compiler.graph.session import Feeds, open_model, run


def output_change(before: Model, after: Model, samples: Samples, *, threads: int = 1) -> float | None:
    """Relative change of the outputs on the samples held out: sqrt(sum |y' - y|^2 / sum |y|^2) over all float outputs.

    Padding does not count. None where no sample is held out, or no output is a float tensor of the same shape.
    """
    sessions = [open_model(model, threads=threads) for model in (before, after)]
    change = whole = 0.0
    for sample in samples.feeds():
        if not sample.held:
            continue
        was, now = (run(session, sample.feed) for session in sessions)
        changed, all_of_it = squares(was, now, sample.mask)
        change, whole = change + changed, whole + all_of_it
    return float(np.sqrt(change / whole)) if whole > 0 else None


def squares(was: Feeds, now: Feeds, mask: NDArray[np.bool_] | None) -> tuple[float, float]:
    """Sums of squares over all float outputs of one feed: of what changed, and of what was.

    Args:
        mask: what is False in it does not count, where an output's leading axes are the mask's.
    """
    change = whole = 0.0
    for name, old in was.items():
        new = now[name]
        if not isinstance(old, np.ndarray) or old.dtype.kind != "f" or old.shape != new.shape:
            continue
        if mask is not None and old.shape[: mask.ndim] == mask.shape:
            old, new = old[mask], new[mask]
        change += float(np.square(np.subtract(new, old, dtype=np.float64)).sum())
        whole += float(np.square(old, dtype=np.float64).sum())
    return change, whole
