"""Whole models in onnxruntime-gpu, on the GPU at hand: `make test-cuda`. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import spa_compiler
from spa_compiler import compiler
from spa_compiler.compiler import compile
from spa_compiler.graph.session import CPU, CUDA, Feeds, open_session, runtime
from spa_compiler.graph.session import run as run_session
from spa_compiler.passes.recipe import from_command_line
from spa_compiler.placement.gpu_timer import CudaTimer
from spa_compiler.placement.timer import Contender
from spa_compiler.targets import cuda
from tests.gpu.amdahl import EndToEnd, table
from tests.gpu.bert import bert, feeds, measure
from tests.gpu.replay import replayed
from tests.networks import mlp
from tests.placement.gpu_stand_in import Favouring

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


def contender(folder: Path) -> Contender:
    return Contender(folder / "model.onnx", folder / "kernels.so")


def drawn(session: Any, seed: int) -> Feeds:
    """Inputs of a session."""
    rng, given = np.random.default_rng(seed), {}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else 4 for size in value.shape]
        if value.type not in ("tensor(float)", "tensor(float16)"):
            pytest.fail(f"{value.name} is {value.type}: say what it may be")
        given[value.name] = rng.standard_normal(shape).astype(np.float16 if "16" in value.type else np.float32)
    return given


def off(want: Feeds, got: Feeds) -> float:
    """The largest relative error of an output, as norms."""
    assert want.keys() == got.keys()
    wide = {name: value.astype(np.float64) for name, value in want.items()}
    return max(
        float(np.linalg.norm(got[name].astype(np.float64) - value) / max(np.linalg.norm(value), 1e-9))
        for name, value in wide.items()
    )


def assert_near(want: Feeds, got: Feeds, allowed: float) -> None:
    assert all(np.isfinite(value).all() for value in got.values())
    assert off(want, got) <= allowed


@pytest.mark.parametrize("precision", ["f32", "fp16", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_an_artifact_computes_what_portable_onnx_does(name: str, precision: str, tmp_path: Path) -> None:
    """By ordinary calls, and with bound inputs and outputs."""
    recipe = from_command_line(sparsity=0.8, pattern="unstructured")
    result = compile(model(name), tmp_path / "out", target="cuda", precision=precision, recipe=recipe)  # type: ignore[arg-type]
    session = spa_compiler.load(tmp_path / "out")
    assert CUDA in session.get_providers()
    given = drawn(session, 0)
    dense = open_session(tmp_path / "out" / "portable.onnx", providers=(CUDA, CPU))
    want, got, timer = run_session(dense, given), run_session(session, given), CudaTimer()
    call = timer.bound(timer.open(contender(tmp_path / "out"), graph=False), given)
    bound = dict(zip(want, (value.numpy() for value in call()), strict=True))
    allowed = 2e-2 if precision != "bf16" else 8e-2
    for other in (got, bound):
        assert_near(want, other, allowed)
    forms = sorted({placement.form for placement in result.report.placements})
    print(f"\n{name} {precision}: {', '.join(forms)}; {result.ratio or float('nan'):.2f}x of ONNX Runtime CUDA")


@pytest.mark.parametrize("precision", ["f32", "fp16", "bf16"])
def test_an_artifact_runs_from_a_cuda_graph(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded once, launched again on inputs that changed in their place; and it is the graph that runs."""
    monkeypatch.setattr(compiler, "CudaTimer", Favouring)
    recipe = from_command_line(sparsity=0.8, pattern="unstructured")
    folder = tmp_path / "out"
    result = compile(mlp(0.1, 512), folder, target="cuda", precision=precision, recipe=recipe)  # type: ignore[arg-type]
    assert any(p.form == "sparse" for p in result.report.placements)
    timer, dense = CudaTimer(), open_session(folder / "portable.onnx", providers=(CUDA, CPU))
    options = timer.open(contender(folder)).get_provider_options()[CUDA]
    assert options["enable_cuda_graph"] == "1"
    first, second = drawn(dense, 1), drawn(dense, 2)
    before, after, last = replayed(timer, contender(folder), first, second)
    allowed = 2e-2 if precision != "bf16" else 8e-2
    wanted = [run_session(dense, given) for given in (first, second)]
    assert off(wanted[0], wanted[1]) > 0.5
    assert_near(wanted[0], before, allowed)
    assert_near(wanted[1], after, allowed)
    assert off(after, last) == 0, "the graph was not launched: what was bound at another place was read"


@pytest.fixture(scope="module")
def rows() -> Iterator[list[tuple[str, EndToEnd]]]:
    """What was measured; printed when all is."""
    found: list[tuple[str, EndToEnd]] = []
    yield found
    if found:
        print(
            f"\nBERT-base, fp16, 90 % in 32 x 32 blocks, against ONNX Runtime CUDA fp16, in CUDA graphs\n\n{table(found)}"
        )


@pytest.mark.parametrize("batch", [1, 32])
def test_bert_end_to_end(batch: int, tmp_path: Path, rows: list[tuple[str, EndToEnd]]) -> None:
    """At least 0.9 of what the linear layers' share of the time allows, and the outputs of portable.onnx."""
    given, folder = feeds(batch, 128), tmp_path / "out"
    recipe = from_command_line(sparsity=0.9, pattern="block:32x32")
    shape = [f"{name}={batch},128" for name in given]
    compile(bert(), folder, target="cuda", precision="fp16", recipe=recipe, shapes=shape)
    dense = open_session(folder / "portable.onnx", providers=(CUDA, CPU))
    timer = CudaTimer()
    want = run_session(dense, given)
    call = timer.bound(timer.open(contender(folder)), given)
    assert_near(want, dict(zip(want, (value.numpy() for value in call()), strict=True)), 2e-2)
    found = measure(folder, given, timer, tmp_path)
    rows.append((f"{batch}x128", found))
    print(f"\nBERT-base {batch}x128: Amdahl's limit {found.limit:.2f}x, end to end {found.speed:.2f}x")
    assert found.reached >= 0.9
