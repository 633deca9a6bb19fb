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
from spa_compiler.errors import EnvironmentFault, UsageError, VerificationError
from spa_compiler.passes.recipe import from_command_line
from spa_compiler.placement import gpu_choose, gpu_place
from spa_compiler.report.console import sites
from spa_compiler.report.report import read as read_report
from spa_compiler.targets import cuda, nvrtc
from tests.cli.command import invoke
from tests.folders import ARTIFACT, names
from tests.networks import mlp, network, weight
from tests.placement.gpu_forms import Rows
from tests.placement.gpu_stand_in import SlowTogether, StandIn, Wrong, device

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


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_where_there_is_a_gpu_an_artifact_is_placed_anew_by_time(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `spa-compile out --target cuda` does it, from its own folder; what was not measured is, now."""
    compile(mlp(0.3, WIDTH), here / "out", target="cuda:sm_80", precision="fp16", shapes=["x=2,3,64"])
    first, source = onnx.load(here / "out" / "portable.onnx"), json.loads((here / "out" / "manifest.json").read_text())
    monkeypatch.setattr(compiler, "CudaTimer", StandIn)
    monkeypatch.setattr(cuda, "device", device)
    monkeypatch.setattr(gpu_place, "_RACE_S", 0.05)
    done = invoke(main, "out", "--target", "cuda")
    assert done.exit_code == 0, done.stderr
    target = here / "out"
    assert names(target) == ARTIFACT
    told = json.loads((target / "manifest.json").read_text())
    assert (told["target"], told["isa"], told["measured"]) == ("cuda:sm_90", "sm_90", True)
    assert told["source"] == source["source"]
    again = read_report(target)
    assert (again.machine.gpu, again.shapes, again.asked.target) == ("Stand-in", ["2x3x64"], "cuda:sm_90")
    assert [(p.form, "x over dense as unstructured rows" in p.reason) for p in again.placements] == [
        ("sparse", True)
    ] * 2
    assert {p.runtime for p in again.race} == {"onnxruntime", "portable", "spa"}
    assert again.ratios[0].ratio > 1
    assert not any("no kernel was run" in note for note in again.notes)
    assert len(again.checks) == 2 * len(first.graph.output) * 2  # on the CPU and on the GPU, at two shapes
    assert all(check.passed for check in again.checks)
    after = onnx.load(target / "portable.onnx")
    assert [t.raw_data for t in after.graph.initializer] == [t.raw_data for t in first.graph.initializer]
    assert sum(node.domain == "ai.spa" for node in onnx.load(target / "model.onnx").graph.node) == 2


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_a_gpu_that_computes_something_else_leaves_the_artifact_as_it_was(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile(mlp(0.3, WIDTH), here / "out", target="cuda:sm_80", precision="fp16")
    before = {p.name: p.read_bytes() for p in (here / "out").iterdir()}
    monkeypatch.setattr(compiler, "CudaTimer", Wrong)
    monkeypatch.setattr(cuda, "device", device)
    monkeypatch.setattr(gpu_place, "_RACE_S", 0.05)
    with pytest.raises(VerificationError, match="is wrong at"):
        compile(here / "out", target="cuda")
    assert {p.name: p.read_bytes() for p in (here / "out").iterdir()} == before


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_dense_stays_where_whole_models_lose_though_sites_gain(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "CudaTimer", SlowTogether)
    monkeypatch.setattr(cuda, "device", device)
    monkeypatch.setattr(gpu_place, "_RACE_S", 0.05)
    report = compile(mlp(0.3, WIDTH), here / "out", target="cuda", precision="fp16").report
    assert [p.form for p in report.placements] == ["dense"] * 2
    assert all("x over dense as unstructured rows" in p.reason for p in report.placements)
    assert (here / "out" / "model.onnx").read_bytes() == (here / "out" / "portable.onnx").read_bytes()


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_a_model_of_16_bits_is_verified_on_a_gpu(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its inputs are of 16 bits, too, where passes saw float32."""
    monkeypatch.setattr(compiler, "CudaTimer", StandIn)
    monkeypatch.setattr(cuda, "device", device)
    monkeypatch.setattr(gpu_place, "_RACE_S", 0.05)
    recipe = from_command_line(sparsity=0.75, pattern="unstructured")
    done = compile(half_mlp(), here / "out", target="cuda", recipe=recipe)
    assert [check.passed for check in done.report.checks] == [True] * 4
    assert done.ratio is not None


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


def test_weights_of_four_bits_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_choose, "MARGIN", 0.9)  # such a small layer is mostly its launch
    onnx.save(mlp(1.0, 512), "m.onnx")
    passes = "sparsify{sparsity=0.5} quantize{bits=4,group=128}"
    wanted = ["--target", "cuda:sm_90", "--precision", "fp16", "--shape", "x=1,1,512", "--json"]
    result = invoke(main, "m.onnx", *wanted, "--passes", passes, "-o", "out")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert [p["name"] for p in report["passes"]] == ["sparsify", "quantize"]
    assert [p["warnings"] for p in report["passes"]] == [[], []]
    assert [(p["form"], p["pattern"]) for p in report["placements"]] == [("4-bit", "4-bit"), ("dense", "dense")]
    assert report["checks"]
    assert all(check["error"] <= check["tolerance"] for check in report["checks"])
    source = {t.name: numpy_helper.to_array(t) for t in onnx.load("m.onnx").graph.initializer}
    weight = numpy_helper.to_array(next(t for t in onnx.load("out/portable.onnx").graph.initializer if t.name == "w0"))
    assert np.count_nonzero(weight) <= weight.size // 2
    groups = weight.T.reshape(512, 4, 128)
    assert max(len(np.unique(group)) for group in groups.reshape(-1, 128)) <= 16
    off = weight - np.where(weight == 0, 0, source["w0"])
    assert 0 < np.linalg.norm(off) < 0.15 * np.linalg.norm(weight)
    (node,) = (n for n in onnx.load("out/model.onnx").graph.node if n.domain == "ai.spa")
    codes = next(t for t in onnx.load("out/model.onnx").graph.initializer if t.name == node.input[1])
    assert list(codes.dims) == [512 // 16 * (512 // 128), 64, 4]
    # an artifact's weights have been rounded to 16 bits: they are on grids all the same
    again = compile(tmp_path / "out", tmp_path / "again", target="cuda:sm_90", threads=1).report
    assert [p.form for p in again.placements] == ["4-bit", "dense"]
