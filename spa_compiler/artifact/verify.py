"""The proof that the kernels compute the right thing: the artifact against the same arithmetic in standard ops.

An output's error is max|a - b| / max|b| with b the portable model's. ONNX Runtime's own fusions move the last bits too,
so the tolerance starts from what they do to this model: max(1e-5, 4 * noise), with noise the same error between the
portable graph at two of ONNX Runtime's optimization levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from spa_compiler.errors import SpaError, VerificationError
from spa_compiler.graph.difference import difference, relative
from spa_compiler.graph.session import Feeds, flatten, open_session, run
from spa_compiler.report.report import Check, shape_text
from spa_compiler.targets.machine import give_back

#: relative to an output's largest magnitude
TOLERANCE = 1e-5
#: how much further than ONNX Runtime's own fusions ours may move a result
NOISE_FACTOR = 4
#: the smallest step of float16 outputs alone is above TOLERANCE
EPS_FACTOR = 2

Outputs = dict[str, np.ndarray]
Elsewhere = Callable[[Path, Path | None, Feeds, int], Feeds]
"""(model, library, feeds, threads) -> outputs, on another machine."""


class Mismatch(VerificationError):
    """An output lies beyond its tolerance. `checks` has all of them, for the report."""

    def __init__(self, what: str, checks: list[Check], *, where: str, fix: str) -> None:
        super().__init__(what, where=where, fix=fix)
        self.checks = checks


def compare(
    portable: Path,
    model: Path,
    library: Path | None,
    feeds: Sequence[Feeds],
    threads: Sequence[int] = (1, 2),
    *,
    tolerance: float = TOLERANCE,
    elsewhere: Elsewhere | None = None,
) -> list[Check]:
    """Runs both models on every feed and compares every output, at each number of threads.

    Args:
        portable: the reference, run with one thread.
        model: the artifact's model.onnx (or any model with the same signature, without a library).
        library: its kernels.so.
        feeds: one entry for each shape.
        tolerance: the least error that is not allowed, before the model's own noise.
        elsewhere: runs the artifact, if this machine does not.

    Returns:
        One check for each output, feed and number of threads.

    Raises:
        Mismatch: an output is beyond its tolerance; the message names the worst.
        VerificationError: a model does not run.
    """
    expected = _outputs(portable, None, feeds, threads=1, optimize="all")
    # As far from "all" as ONNX Runtime goes: nothing but the ops as they are written.
    plain = _outputs(portable, None, feeds, threads=1, optimize=False)
    noises = [
        {name: noise(want[name], other[name]) for name in want} for want, other in zip(expected, plain, strict=True)
    ]
    checks: list[Check] = []
    for count in threads:
        if elsewhere is None:
            got = _outputs(model, library, feeds, threads=count, optimize="all")
        else:
            got = [elsewhere(model, library, feed, count) for feed in feeds]
        for index, feed in enumerate(feeds):
            shape = shape_text({name: value.shape for name, value in feed.items()})
            for name, want in expected[index].items():
                steady = same(want, plain[index][name])
                error = difference(want, got[index][name], steady) if name in got[index] else None
                own = noises[index][name]
                allowed = _tolerance(want, tolerance, own)
                checks.append(Check(output=name, shape=shape, threads=count, error=error, tolerance=allowed, noise=own))
    refuse(checks, model)
    return checks


def refuse(checks: list[Check], model: Path) -> None:
    """Raises Mismatch, which names the worst of `checks`, if any failed."""
    failed = [check for check in checks if not check.passed]
    if failed:
        worst = max(failed, key=Check.badness)
        error_text = "its shape, type or NaNs differ" if worst.error is None else f"its error is {worst.error:.1e}"
        raise Mismatch(
            f"output {worst.output!r} is wrong at {worst.shape} with {worst.threads} thread(s): {error_text}, "
            f"{worst.tolerance:.1e} is allowed ({len(failed)} of {len(checks)} checks failed)",
            checks,
            where=str(model),
            fix="Please report this with report.json; the compiled model was not kept",
        )


def noise(want: np.ndarray, other: np.ndarray) -> float:
    """The error between two runs of one model, over the places where both are finite; 0 for integers."""
    if want.shape != other.shape or want.dtype.kind not in "fc":
        return 0.0
    both = np.isfinite(want) & np.isfinite(other)
    return relative(want[both], other[both])


def same(want: np.ndarray, other: np.ndarray) -> np.ndarray | None:
    """Where two outputs are equal, `[shape]` of bool; None when they cannot be compared."""
    return np.asarray(want == other) if want.shape == other.shape else None


def _tolerance(want: np.ndarray, least: float, own: float) -> float:
    if want.dtype.kind not in "fc":
        return 0.0
    return max(least, NOISE_FACTOR * own, EPS_FACTOR * float(np.finfo(want.dtype).eps))


def _outputs(
    path: Path, library: Path | None, feeds: Sequence[Feeds], *, threads: int, optimize: bool | str
) -> list[Outputs]:
    """Every feed through one session, which is closed after: of large models only one is in memory at a time."""
    results: list[Outputs] = []
    shape = "loading"
    try:
        session = open_session(path, threads=threads, library=library, optimize=optimize, prepack=optimize is not False)
        for feed in feeds:
            shape = shape_text({name: value.shape for name, value in feed.items()})
            results.append(dict(flatten(run(session, feed))))
        del session
        give_back()
    except SpaError:
        raise
    except Exception as error:  # ONNX Runtime's errors have no common class of their own
        raise VerificationError(f"the model does not run at {shape}: {error}", where=str(path)) from error
    return results
