"""`spa-compile --target cuda` from end to end on a machine without a GPU."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from rich.console import Console

import spa_compiler
from spa_compiler import compiler
from spa_compiler.cli.compile import main
from spa_compiler.compiler import compile
from spa_compiler.errors import EnvironmentFault, UsageError
from spa_compiler.graph.session import CPU, Feeds
from spa_compiler.passes.recipe import from_command_line
from spa_compiler.placement import gpu_choose
from spa_compiler.placement.timer import Contender, CudaTimer
from spa_compiler.report.console import sites
from spa_compiler.targets import cuda, nvrtc
from tests.cli.command import invoke
from tests.folders import ARTIFACT, names
from tests.networks import mlp, network, weight
from tests.placement.gpu_forms import Rows

WIDTH = 64


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_choose, "FORMS", (Rows(),))
    return tmp_path


def half_mlp() -> onnx.ModelProto:
    """`mlp` in float16, signature and all."""
    proto = mlp(1.0, WIDTH)
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return proto


def test_a_float32_model_in_16_bits(here: Path) -> None:
    result = compile(mlp(0.3, WIDTH), here / "out", target="cuda:sm_80,sm_90", precision="fp16", threads=1)
    report = result.report
    assert names(here / "out") == ARTIFACT
    assert [(p.form, p.reason.startswith("not measured: by the model")) for p in report.placements] == [
        ("sparse", True)
    ] * 2
    assert any(note.startswith("fp16: 5 of 5 nodes run on 16 bits") for note in report.notes)
    assert any("no kernel was run" in note for note in report.notes)
    assert report.checks
    assert all(check.passed for check in report.checks)
    assert (report.race, result.ratio) == ([], None)
    told = json.loads((here / "out" / "manifest.json").read_text())
    assert (told["target"], told["isa"], told["measured"]) == ("cuda:sm_80,sm_90", "sm_80,sm_90", False)
    portable = onnx.load(here / "out" / "portable.onnx")
    assert {t.data_type for t in portable.graph.initializer} == {TensorProto.FLOAT16}
    assert portable.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    with pytest.raises(Exception, match=r"compiled for NVIDIA GPUs \(sm_80, sm_90 and newer\)"):
        spa_compiler.load(here / "out")


def test_a_model_of_16_bits_is_pruned_in_float32_and_stays_what_it_was(here: Path) -> None:
    given = half_mlp()
    recipe = from_command_line(sparsity=0.75, pattern="unstructured")
    report = compile(given, here / "out", target="cuda:sm_90", recipe=recipe, threads=1).report
    assert any("passes work on them as float32" in note for note in report.notes)
    portable = onnx.load(here / "out" / "portable.onnx")
    before = {t.name: numpy_helper.to_array(t) for t in given.graph.initializer}
    for tensor in portable.graph.initializer:
        values = numpy_helper.to_array(tensor)
        assert values.dtype == np.float16
        kept = values != 0
        np.testing.assert_array_equal(values[kept], before[tensor.name][kept])
        assert kept.mean() == (0.25 if tensor.name == "w0" else 1)  # sparsify spares what gives the output
    assert portable.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    assert {n.op_type for n in portable.graph.node} == {"MatMul", "Add", "Relu"}
    assert [p.form for p in report.placements] == ["sparse", "dense"]


def test_an_artifact_is_placed_anew_as_it_is(here: Path) -> None:
    compile(mlp(0.3, WIDTH), here / "out", target="cuda:sm_80", precision="fp16", threads=1)
    before = onnx.load(here / "out" / "portable.onnx")
    report = compile(here / "out", here / "again", target="cuda:sm_90", threads=1).report
    assert {p.form for p in report.placements} == {"sparse"}
    after = onnx.load(here / "again" / "portable.onnx")
    assert [t.raw_data for t in after.graph.initializer] == [t.raw_data for t in before.graph.initializer]
    assert [n.op_type for n in after.graph.node] == [n.op_type for n in before.graph.node]


def test_what_cannot_be_asked_for(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"kernels for cpu:.* are float32"):
        compile(mlp(0.3, WIDTH), here / "out", precision="fp16")
    monkeypatch.setattr(cuda, "device", lambda: None)
    onnx.save(mlp(0.3, WIDTH), "m.onnx")
    result = invoke(main, "m.onnx", "--target", "cuda")
    assert result.exit_code == 2
    assert "Name an architecture, which needs no GPU: cuda:sm_80" in result.stderr


def test_without_a_compiler_nothing_is_begun(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise EnvironmentFault("there is nothing to compile CUDA kernels with", fix="pip install nvidia-cuda-nvrtc")

    monkeypatch.setattr(nvrtc, "find", missing)
    monkeypatch.setattr(compiler, "run_passes", lambda *_: pytest.fail("work was begun"))
    onnx.save(mlp(0.3, WIDTH), "m.onnx")
    result = invoke(main, "m.onnx", "--target", "cuda:sm_90", "-o", "out")
    assert result.exit_code == 6
    assert "pip install nvidia-cuda-nvrtc" in result.stderr
    assert names(here) == {"m.onnx"}


def test_a_dry_run_says_what_is_calculated(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "find", lambda: pytest.fail("nothing is compiled"))
    report = compile(mlp(0.3, WIDTH), here / "out", target="cuda:sm_90", dry_run=True).report
    assert all(p.reason.startswith("would be unstructured rows, not measured") for p in report.placements)
    assert names(here) == set()


def test_a_low_rank_layer_is_one_node_of_two_sites(here: Path) -> None:
    rng = np.random.default_rng(0)
    text = "g (float[3, 64] x) => (float[3, 64] y) { z = MatMul(x, v)  m = MatMul(z, u)  y = Relu(m) }"
    given = network(text, v=weight(rng, WIDTH, 20), u=weight(rng, 20, WIDTH))
    dry = compile(given, here / "out", target="cuda:sm_90", precision="fp16", dry_run=True).report
    told = "not measured: by the model z, m together as low rank 32 take "
    assert [p.reason.startswith(f"would be low rank 32, {told}") for p in dry.placements] == [True, True]
    report = compile(given, here / "out", target="cuda:sm_90", precision="fp16", threads=1).report
    assert [(p.node, p.n, p.k, p.form, p.pattern, p.region) for p in report.placements] == [
        ("z", 20, WIDTH, "low rank", "dense", "ai.spa/m"),
        ("m", WIDTH, 20, "low rank", "dense", "ai.spa/m"),
    ]
    assert all(p.reason.startswith(told) for p in report.placements)
    assert report.checks
    assert all(check.passed for check in report.checks)
    console = Console(width=200, record=True, file=io.StringIO())
    sites(report, console)
    assert "low rank, in a region of 2 sites" in console.export_text()


class HereTimer(CudaTimer):
    """The same calls, with a CPU in the place of the GPU: bound inputs and outputs, run again and again."""

    provider, device = CPU, "cpu"


@pytest.mark.filterwarnings("ignore:Duplicate provider")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_bound_calls_compute_what_sessions_do(tmp_path: Path, dtype: type) -> None:
    proto = mlp(1.0, WIDTH) if dtype is np.float32 else half_mlp()
    onnx.save(proto, tmp_path / "m.onnx")
    contender, timer = Contender(tmp_path / "m.onnx"), HereTimer()
    feeds: Feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, WIDTH)).astype(dtype)}
    want = timer.run(contender, feeds, 1)["y"]
    session = timer._session(contender, 1)
    call = timer._call(session, feeds)
    for _ in range(3):
        call()
    times = timer.time({"m": contender}, feeds, 1, 0.01)
    assert times["m"].median_us > 0
    np.testing.assert_array_equal(call()[0].numpy(), want)
    timer.rest()
