"""What can be shown of an artifact for GPUs: on a CPU everything but its kernels' code, on a GPU all of it.

On a CPU, `model.onnx` with every node of ours in standard operators again (`placement/gpu_check.py`) must compute what
`portable.onnx` does, both rounded as a GPU rounds. The two round at different places, so the tolerance starts from what
rounding does to this model: max(1e-4, 4 * noise, 4 * eps), with noise the difference between portable.onnx with and
without rounding of activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from spa_compiler.artifact import verify
from spa_compiler.errors import SpaError, VerificationError
from spa_compiler.graph import shapes
from spa_compiler.graph.difference import difference
from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from spa_compiler.graph.precision import widened
from spa_compiler.graph.rounding import in_types, outputs
from spa_compiler.graph.session import Feeds
from spa_compiler.kernels.cuda.form import Dtype
from spa_compiler.placement.gpu_check import expanded
from spa_compiler.placement.gpu_choose import GpuChoice
from spa_compiler.report.report import Check, shape_text

TOLERANCE = 1e-4
NOISE_FACTOR = EPS_FACTOR = 4
_EPS = {
    "fp32": 2.0**-23,
    "fp16": 2.0**-10,
    "bf16": 2.0**-7,
}

Runner = Callable[[Path, Path | None, Feeds], Feeds]
"""(model, library, feeds in the types of its inputs) -> outputs, on a GPU."""


def compare(
    folder: Path, choices: Sequence[GpuChoice], dtype: Dtype, feeds: Sequence[Feeds], on_gpu: Runner | None = None
) -> list[Check]:
    """Compares `model.onnx` with `portable.onnx`.

    Args:
        folder: the artifact.
        choices: of all sites.
        feeds: one entry for each shape, floats in any type.
        on_gpu: runs a model on a GPU; None: there is none.

    Returns:
        One check for each output and feed, for each way that they were run; none where no node is ours.

    Raises:
        Mismatch: an output is beyond its tolerance; the message names the worst.
        VerificationError: a model does not run.
        EnvironmentFault: the GPU, or the machine that has it, cannot be used.
    """
    if all(choice.form is None for choice in choices):
        return []
    portable, model = _loaded(folder / "portable.onnx"), _loaded(folder / "model.onnx")
    try:
        want, plain = outputs(portable, feeds), outputs(widened(portable), feeds)
        runs = [(want, outputs(expanded(model, choices), feeds))]
        if on_gpu is not None:
            library = folder / "kernels.so"
            there = [
                [on_gpu(folder / name, own, in_types(portable, feed)) for feed in feeds]
                for name, own in (("portable.onnx", None), ("model.onnx", library))
            ]
            runs.append((there[0], there[1]))
    except SpaError:
        raise
    except Exception as error:  # ONNX Runtime's errors have no common class of their own
        raise VerificationError(f"the model does not run: {error}", where=str(folder)) from error
    checks = []
    for expected, got in runs:
        for feed, first, second, rounded, exact in zip(feeds, expected, got, want, plain, strict=True):
            shape = shape_text({name: value.shape for name, value in feed.items()})
            for name, value in first.items():
                own = verify.noise(rounded[name], exact[name])
                floats = value.dtype.kind in "fc"
                allowed = max(TOLERANCE, NOISE_FACTOR * own, EPS_FACTOR * _EPS[dtype]) if floats else 0.0
                steady = verify.same(rounded[name], exact[name])
                apart = difference(value, second[name], steady) if name in second else None
                checks.append(Check(output=name, shape=shape, threads=1, error=apart, tolerance=allowed, noise=own))
    verify.refuse(checks, folder / "model.onnx")
    return checks


def _loaded(path: Path) -> Model:
    model = load(path)
    shapes.infer(model)
    return model
