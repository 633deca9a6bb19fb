"""The Python API from end to end: a model in, a folder out that computes the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from elftools.elf.elffile import ELFFile

import spa_compiler
from spa_compiler import compiler, compression
from spa_compiler.artifact import checks, manifest
from spa_compiler.compiler import Result, compile, load
from spa_compiler.errors import BudgetError, ModelError, UsageError, VerificationError
from spa_compiler.graph.session import open_session, run
from spa_compiler.passes.recipe import Recipe, from_command_line
from spa_compiler.report import report as reports
from tests.folders import ARTIFACT, names
from tests.networks import mlp, network, weight

WIDTH = 256
ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("short_races")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A model with 90 % zeros, compiled without flags; the source lies beside the result."""
    folder = tmp_path_factory.mktemp("sparse")
    onnx.save(mlp(0.1, WIDTH), folder / "zeros.onnx")
    return folder, compile(folder / "zeros.onnx", folder / "out", threads=1, records=folder / "records.sqlite")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A model without zeros, compiled without flags, from a ModelProto."""
    folder = tmp_path_factory.mktemp("dense")
    proto = mlp(1.0, 64)
    onnx.save(proto, folder / "dense.onnx")
    return folder, compile(proto, folder / "out", threads=1)


def assert_same(source: Path, folder: Path, width: int, batch: int, seq: int, tolerance: float = 1e-5) -> None:
    feeds = {"x": np.random.default_rng(seq).standard_normal((batch, seq, width)).astype(np.float32)}
    want = run(open_session(source), feeds)["y"]
    for threads in (1, 2):
        got = run(load(folder, threads=threads), feeds)["y"]
        assert got.shape == want.shape
        assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("made", ["sparse", "dense"])
class TestFolder:
    @pytest.fixture
    def folder(self, made: str, request: pytest.FixtureRequest) -> Path:
        return Path(request.getfixturevalue(made)[0])

    def test_what_it_holds(self, folder: Path) -> None:
        assert names(folder / "out") == ARTIFACT
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]

    def test_the_manifest(self, folder: Path) -> None:
        found = manifest.check(folder / "out")
        assert set(found.files) == ARTIFACT - {"manifest.json", "report.json"}
        assert found.artifact_version == manifest.ARTIFACT_VERSION

    def test_the_report(self, folder: Path, made: str) -> None:
        report = reports.read(folder / "out")
        assert report.shapes == [f"1x128x{WIDTH if made == 'sparse' else 64}"]
        assert {r.runtime for r in report.race} >= {"onnxruntime", "spa"}
        assert [r.over for r in report.ratios] == ["onnxruntime"]
        assert report.checks
        assert all(check.passed for check in report.checks)
        assert {check.threads for check in report.checks} == {1, 2}
        assert len({check.shape for check in report.checks}) == 2, "an odd shape besides the measured one"
        assert [s.name for s in report.stages][:4] == ["load", "canonicalize", "analyze", "passes"]
        assert report.sizes is not None
        size = next(folder.glob("*.onnx")).stat().st_size
        assert report.sizes.source == pytest.approx(size, rel=0.02) if made == "dense" else size  # a proto has no file

    def test_the_signature_is_the_sources(self, folder: Path) -> None:
        source = onnx.load(next(folder.glob("*.onnx"))).graph
        for file in ("model.onnx", "portable.onnx"):
            made = onnx.load(folder / "out" / file).graph
            for before, after in ((source.input, made.input), (source.output, made.output)):
                assert [v.SerializeToString() for v in before] == [v.SerializeToString() for v in after]

    def test_ir_version_that_old_runtimes_read(self, folder: Path) -> None:
        for file in ("model.onnx", "portable.onnx"):
            assert onnx.load(folder / "out" / file).ir_version <= 10

    @pytest.mark.parametrize("batch,seq", [(1, 1), (1, 7), (1, 128), (3, 33)])
    def test_it_is_exact_at_every_shape(self, folder: Path, batch: int, seq: int) -> None:
        width = WIDTH if (folder / "zeros.onnx").exists() else 64
        assert_same(next(folder.glob("*.onnx")), folder / "out", width, batch, seq)


def test_zeros_become_time(sparse: tuple[Path, Result]) -> None:
    folder, result = sparse
    assert result.folder == folder / "out"
    assert {p.form for p in result.report.placements} == {"sparse"}
    nodes = onnx.load(folder / "out" / "model.onnx").graph.node
    assert [n.domain for n in nodes] == ["ai.spa"]
    assert {p.region for p in result.report.placements} == {n.name for n in nodes}
    plans = {r.runtime: r.plan for r in result.report.race}
    assert (plans["onnxruntime"], plans["portable"]) == ("source", "portable")
    assert f"placement: {plans['spa']}: " in " ".join(result.report.notes)
    assert result.ratio is not None
    assert result.ratio > 1


def test_one_artifact_for_several_levels(here: Path) -> None:
    source = mlp(0.1, WIDTH)
    result = compile(source, here / "out", target="cpu:avx512,avx2,x86-64", threads=1)
    assert {p.form for p in result.report.placements} == {"sparse"}
    assert json.loads((here / "out" / "manifest.json").read_text())["isa"] == "x86-64-v4,x86-64-v3,x86-64"
    onnx.save(source, here / "source.onnx")
    check = "import sys; from tests.test_compiler import assert_same, Path, WIDTH; "
    check += "assert_same(Path(sys.argv[1]), Path(sys.argv[2]), WIDTH, 3, 33)"
    for level in ("1", "3", "4"):
        command = [sys.executable, "-c", check, str(here / "source.onnx"), str(here / "out")]
        subprocess.run(command, check=True, env=os.environ | {"SPA_ISA_LEVEL": level}, cwd=ROOT)


def test_without_zeros_nothing_is_lost_and_a_hint_is_given(dense: tuple[Path, Result]) -> None:
    folder, result = dense
    assert {p.form for p in result.report.placements} == {"dense"}
    assert {n.domain for n in onnx.load(folder / "out" / "model.onnx").graph.node} == {""}
    assert any("--sparsity 0.8 --pattern block:4x1" in hint for hint in result.report.hints)
    assert all("it has no zeros" in p.reason and p.region == "" for p in result.report.placements)
    assert (folder / "out" / "model.onnx").read_bytes() == (folder / "out" / "portable.onnx").read_bytes()


def test_the_library_loads_even_when_nothing_gained(dense: tuple[Path, Result]) -> None:
    session = load(dense[0] / "out")
    assert [i.name for i in session.get_inputs()] == ["x"]


def test_load_checks_the_manifest(sparse: tuple[Path, Result], tmp_path: Path) -> None:
    folder = shutil.copytree(sparse[0] / "out", tmp_path / "copy")
    load(folder)
    with (folder / "portable.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelError, match="not what was written"):
        load(folder)
    load(folder, check=False)
    (folder / "manifest.json").unlink()
    for check in (True, False):
        with pytest.raises(ModelError):
            load(folder, check=check)


def test_the_same_request_gives_the_same_bytes(sparse: tuple[Path, Result], tmp_path: Path) -> None:
    folder, first = sparse
    again = compile(folder / "zeros.onnx", tmp_path / "out", threads=1, records=folder / "records.sqlite")
    for name in ARTIFACT - {"report.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (folder / "out" / name).read_bytes(), name
    assert again.report.race == first.report.race, "the records were replayed"


def test_an_artifact_is_placed_anew(sparse: tuple[Path, Result], tmp_path: Path) -> None:
    folder = shutil.copytree(sparse[0] / "out", tmp_path / "out")
    before = manifest.read(folder)
    result = compile(folder, threads=1, records=sparse[0] / "records.sqlite")
    assert result.folder == folder
    assert names(folder) == ARTIFACT
    assert names(tmp_path) == {"out"}
    after = manifest.check(folder)
    assert after.files["portable.onnx"] == before.files["portable.onnx"]
    assert after.files["recipe.yaml"] == before.files["recipe.yaml"], "how the weights came about is kept"
    assert after.source == before.source
    assert_same(sparse[0] / "zeros.onnx", folder, WIDTH, 2, 5)


def test_no_passes_on_an_artifact(dense: tuple[Path, Result]) -> None:
    recipe = from_command_line(sparsity=0.5)
    with pytest.raises(UsageError, match="no passes can run on it"):
        compile(dense[0] / "out", recipe=recipe)


def test_the_recipe_is_kept(here: Path) -> None:
    recipe = from_command_line(sparsity=0.5, pattern="block:4x1")
    onnx.save(mlp(1.0, 64, depth=3), here / "net.onnx")
    result = compile("net.onnx", recipe=recipe, target="cpu:x86-64", threads=1)
    assert result.folder == here / "net-spa"
    assert from_command_line(recipe=here / "net-spa" / "recipe.yaml") == recipe
    assert [p.name for p in result.report.passes] == ["sparsify"]
    weights = [onnx.numpy_helper.to_array(i) for i in onnx.load(here / "net-spa" / "model.onnx").graph.initializer]
    zeros = [float((w == 0).mean()) for w in weights if w.ndim == 2]
    assert max(zeros) > 0.4


def test_several_shapes(here: Path) -> None:
    shapes = ["x=1,4,64", "x=2,9,64"]
    result = compile(mlp(1.0, 64), here / "out", shapes=shapes, threads=1)
    assert result.report.shapes == ["1x4x64", "2x9x64"]
    assert [r.shape for r in result.report.ratios] == result.report.shapes


def test_samples_are_what_is_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.full((5, 3, 64), 0.25, np.float32)
    np.savez(here / "samples.npz", x=values)
    seen: list[dict[str, np.ndarray]] = []
    real = compiler.place

    def spy(*args: object, **options: object) -> object:
        seen.extend(args[2])  # type: ignore[arg-type]
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(compiler, "place", spy)
    compile(mlp(1.0, 64), here / "out", shapes=["x=2,3,64"], samples="samples.npz", threads=1)
    assert [f["x"].shape for f in seen] == [(2, 3, 64)]
    assert (seen[0]["x"] == 0.25).all()


@pytest.mark.parametrize("recipe", [None, from_command_line(sparsity=0.5)], ids=["as it is", "sparsify"])
def test_the_model_as_given_may_come_out_of_exact_runs_alone(
    here: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe | None
) -> None:
    given: list[object] = []
    real = compiler.place

    def spy(*args: object, original: object, **options: object) -> object:
        given.append(original)
        return real(*args, original=original, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(compiler, "place", spy)
    compile(mlp(1.0, 64, depth=3), here / "out", recipe=recipe, target="cpu:aarch64", threads=1)
    assert [model is None for model in given] == [recipe is not None]


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_another_architecture_is_compiled_for_without_measuring(here: Path, density: float) -> None:
    source = mlp(density, 64)
    result = compile(source, here / "out", target="cpu:neon", threads=1)
    words = "not measured, this machine does not run aarch64"
    assert result.ratio is None
    assert (result.report.race, result.report.hints) == ([], [])
    assert {p.form for p in result.report.placements} == {"sparse" if density < 1 else "dense"}
    assert all(p.reason.startswith(words) and not p.candidates for p in result.report.placements)
    assert any("nothing was timed, and model.onnx was verified with kernels" in n for n in result.report.notes)
    assert result.report.checks, "the same regions, with kernels for this machine"
    assert all(check.passed for check in result.report.checks)
    assert names(here / "out") == ARTIFACT
    domains = {n.domain for n in onnx.load(here / "out" / "model.onnx").graph.node}
    assert domains == ({"ai.spa"} if density < 1 else {""})
    told = json.loads((here / "out" / "manifest.json").read_text())
    assert (told["target"], told["isa"], told["measured"]) == ("cpu:aarch64", "aarch64", False)
    with (here / "out" / "kernels.so").open("rb") as file:
        assert ELFFile(file).get_machine_arch() == "AArch64"


def test_regions_of_another_architecture_that_compute_something_else_are_seen(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, machines = checks.verify.compare, []

    def spy(portable: Path, model: Path, library: Path, feeds: list, **options: Any) -> Any:
        if library is None:
            return real(portable, model, library, feeds, **options)
        with library.open("rb") as file:
            machines.append(ELFFile(file).get_machine_arch())
        proto = onnx.load(model)
        values = next(i for i in proto.graph.initializer if i.name.endswith("values"))
        values.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(values), values.name))
        onnx.save(proto, model)
        return real(portable, model, library, feeds, **options)

    monkeypatch.setattr(checks.verify, "compare", spy)
    with pytest.raises(VerificationError, match="is wrong at"):
        compile(mlp(0.1, 64), here / "out", target="cpu:neon", threads=1)
    assert machines == ["x64"]


def assert_same_as_proto(proto: onnx.ModelProto, folder: Path) -> None:
    onnx.save(proto, folder.parent / "source.onnx")
    assert_same(folder.parent / "source.onnx", folder, 64, 2, 5)


def test_a_dry_run_writes_and_times_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "place", lambda *_, **__: pytest.fail("timed"))
    monkeypatch.setattr(compiler, "link", lambda *_: pytest.fail("linked"))
    result = compile(mlp(0.1, 64), here / "out", dry_run=True)
    assert result.folder is None
    assert result.ratio is None
    assert names(here) == set()
    assert [p.node for p in result.report.placements]
    assert all("would be timed dense and as unstructured" in p.reason for p in result.report.placements)


@pytest.mark.parametrize(
    "density, words",
    [(0.1, "would be block:4x1, not measured, this machine does not run aarch64: block:4x1 stores"),
     (0.9, "would be dense, not measured, this machine does not run aarch64: block:4x1 stores 9"),
     (1.0, "would stay dense: it has no zeros")],
)  # fmt: skip
def test_a_dry_run_says_what_is_calculated(here: Path, density: float, words: str) -> None:
    result = compile(mlp(density, 64), here / "out", target="cpu:aarch64", dry_run=True)
    assert all(p.reason.startswith(words) for p in result.report.placements), result.report.placements[0].reason


def test_a_dry_run_knows_low_rank_layers(here: Path) -> None:
    rng = np.random.default_rng(0)
    text = 'g (float["b", 64] x) => (float["b", 64] y) { z = MatMul(x, d) y = MatMul(z, u) }'
    proto = network(text, d=weight(rng, 64, 8), u=weight(rng, 8, 64))
    result = compile(proto, here / "out", dry_run=True)
    assert {p.node: p.reason for p in result.report.placements} == dict.fromkeys(
        "zy", "would be timed dense and as low rank"
    )


def test_too_large(here: Path) -> None:
    with pytest.raises(BudgetError, match=r"the artifact takes .*, more than the 1.0 kB of --max-size"):
        compile(mlp(1.0, 64), here / "out", max_size=1000, threads=1)
    assert names(here) == set()
    compile(mlp(1.0, 64), here / "out", max_size=10**7, threads=1)


@pytest.mark.parametrize("output", ["out", "deep/down/out"])
def test_a_failed_verification_keeps_the_report_alone(here: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise VerificationError("output 'y' is wrong", where="model.onnx", fix="Please report it")

    monkeypatch.setattr(checks.verify, "compare", fail)
    with pytest.raises(VerificationError, match=r"output 'y' is wrong.*failed-report\.json"):
        compile(mlp(1.0, 64), here / output, threads=1)
    parent = (here / output).parent
    assert names(parent) == {"out.failed-report.json"}
    report = json.loads((parent / "out.failed-report.json").read_bytes())
    assert "output 'y' is wrong" in report["failure"]


def test_a_pass_that_fails_its_check_is_named_in_the_report(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise VerificationError("output 'y' is another one", where="pass remove-dead-channels")

    monkeypatch.setattr(compression.cuts, "check", fail)
    with pytest.raises(VerificationError, match=r"output 'y' is another one.*failed-report\.json"):
        compile(mlp(1.0, 64), here / "out", recipe=from_command_line(passes="remove-dead-channels"), threads=1)
    assert names(here) == {"out.failed-report.json"}
    report = json.loads((here / "out.failed-report.json").read_bytes())
    assert report["failure"] == "pass remove-dead-channels: output 'y' is another one"
    assert [each["name"] for each in report["passes"]] == ["remove-dead-channels"]


def test_no_zeros_are_asked_for_where_there_are_no_kernels(here: Path) -> None:
    assert compile(mlp(1.0, 64), here / "out", target="cuda:sm_90", threads=1).report.hints == []


def test_a_failed_verification_leaves_an_older_result(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile(mlp(1.0, 64), here / "out", threads=1)
    before = (here / "out" / "manifest.json").read_bytes()
    monkeypatch.setattr(
        checks.verify, "compare", lambda *_, **__: (_ for _ in ()).throw(VerificationError("it is wrong"))
    )
    with pytest.raises(VerificationError):
        compile(mlp(1.0, 64), here / "out", threads=1)
    assert (here / "out" / "manifest.json").read_bytes() == before
    manifest.check(here / "out")


@pytest.mark.parametrize(
    "room, stage",
    [
        (compression, "load"),
        (compression, "canonicalize"),
        (compiler, "place"),
        (compiler, "collect"),
        (checks, "on_cpu"),
    ],
)
def test_an_error_anywhere_leaves_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, room: ModuleType, stage: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(stage)

    monkeypatch.setattr(room, stage, fail)
    with pytest.raises(RuntimeError, match=stage):
        compile(mlp(1.0, 64), here / "out", threads=1)
    assert names(here) == set()


def test_progress_and_header(here: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    headers: list[reports.Report] = []
    compile(mlp(1.0, 64), here / "out", threads=1, progress=lambda *args: seen.append(args), started=headers.append)
    assert ("racing whole models", 1, 1) in seen
    assert headers[0].machine.threads == 1
    assert headers[0].shapes == ["1x128x64"]


def test_the_public_names() -> None:
    assert {"compile", "compress", "analyze", "load", "Result", "__version__"} == set(spa_compiler.__all__)
    public: list[Callable[..., object]] = [
        spa_compiler.compile,
        spa_compiler.compress,
        spa_compiler.load,
        spa_compiler.analyze,
    ]
    assert all(f.__doc__ for f in public)
    with pytest.raises(AttributeError):
        _ = spa_compiler.nonsense


def test_analyze_takes_a_proto_and_a_path(here: Path) -> None:
    proto = mlp(1.0, 64)
    onnx.save(proto, here / "net.onnx")
    before = names(here)
    assert spa_compiler.analyze(proto).to_json() == spa_compiler.analyze("net.onnx").to_json()
    assert names(here) == before


def test_onnx_runtimes_telemetry_is_off(tmp_path: Path) -> None:
    """Loaded with it on, it leaves the file of a session in the temporary folder at once."""
    code = "from spa_compiler.graph.session import onnxruntime_version as v; v()"
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert names(tmp_path) == set()


def test_nothing_here_opens_connections() -> None:
    """But for the two ends of --tune-rpc, which nothing loads unless it is asked for."""
    root = Path(spa_compiler.__file__).parent
    for path in root.rglob("*.py"):
        text = path.read_text()
        if path.relative_to(root).as_posix() in ("placement/remote.py", "placement/serve.py"):
            continue
        assert "\nfrom spa_compiler.placement.remote" not in text, path
        assert "import socket" not in text, path
        assert "urllib.request" not in text, path
        assert "import requests" not in text, path


def test_an_artifact_is_placed_anew_as_it_was_measured(tmp_path: Path) -> None:
    source, proto = tmp_path / "m.onnx", mlp(0.1)
    onnx.save(proto, source)
    name, dims = proto.graph.input[0].name, proto.graph.input[0].type.tensor_type.shape.dim
    shape = ",".join(str(d.dim_value or 6) for d in dims)
    first = spa_compiler.compile(source, tmp_path / "out", shapes=[f"{name}={shape}"], threads=1)
    again = spa_compiler.compile(tmp_path / "out")
    assert again.folder == first.folder
    assert again.report.shapes == first.report.shapes
    assert again.report.machine.threads == 1
    assert again.report.asked.source == "m.onnx"
    assert reports.read(tmp_path / "out").asked.recipe == {"version": 1, "passes": []}
