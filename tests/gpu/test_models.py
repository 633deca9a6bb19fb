"""Whole models in onnxruntime-gpu, on the GPU at hand: `make test-cuda`. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import spa_compiler
from spa_compiler.compiler import compile
from spa_compiler.graph.session import CPU, CUDA, open_session, runtime
from spa_compiler.graph.session import run as run_session
from spa_compiler.passes.recipe import from_command_line
from spa_compiler.placement.gpu_timer import CudaTimer
from spa_compiler.placement.timer import Contender
from spa_compiler.targets import cuda
from tests.networks import mlp

MODELS = Path(__file__).parents[2] / "models"
NAMES = ("mlp", "digits_convnet", "digits_transformer")


@pytest.fixture(autouse=True)
def gpu() -> None:
    if CUDA not in runtime().get_available_providers():
        pytest.skip("this onnxruntime has no CUDAExecutionProvider: pip install onnxruntime-gpu in onnxruntime's place")
    if cuda.device() is None:
        pytest.skip("there is no NVIDIA GPU here, or its driver is not passed in")


def model(name: str) -> onnx.ModelProto:
    return mlp(0.1, 512) if name == "mlp" else onnx.load(MODELS / f"{name}.onnx")


pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["f32", "fp16", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_an_artifact_computes_what_portable_onnx_does(name: str, precision: str, tmp_path: Path) -> None:
    """By ordinary calls, and as times are taken: with bound inputs and outputs, in a CUDA graph where there is one."""
    recipe = from_command_line(sparsity=0.8, pattern="unstructured")
    result = compile(model(name), tmp_path / "out", target="cuda", precision=precision, recipe=recipe)  # type: ignore[arg-type]
    session = spa_compiler.load(tmp_path / "out")
    assert CUDA in session.get_providers()
    rng = np.random.default_rng(0)
    feeds = {}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else 4 for size in value.shape]
        if value.type not in ("tensor(float)", "tensor(float16)"):
            pytest.fail(f"{value.name} is {value.type}: say what it may be")
        kind = np.float16 if "16" in value.type else np.float32
        feeds[value.name] = rng.standard_normal(shape).astype(kind)
    dense = open_session(tmp_path / "out" / "portable.onnx", providers=(CUDA, CPU))
    want, got = run_session(dense, feeds), run_session(session, feeds)
    contender = Contender(model=tmp_path / "out" / "model.onnx", library=tmp_path / "out" / "kernels.so")
    bound = CudaTimer().run(contender, feeds, 1)
    allowed = 2e-2 if precision != "bf16" else 8e-2
    for key, value in want.items():
        for other in (got[key], bound[key]):
            off = np.linalg.norm(other.astype(np.float64) - value) / max(np.linalg.norm(value.astype(np.float64)), 1e-9)
            assert off <= allowed, f"{key} is off by {off:.2g}"
    forms = sorted({placement.form for placement in result.report.placements})
    print(f"\n{name} {precision}: {', '.join(forms)}; {result.ratio or float('nan'):.2f}x of ONNX Runtime CUDA")
