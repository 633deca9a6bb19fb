"""Times of a GPU elsewhere: what is sent, run and refused, over a tracker on loopback with a stand-in for the GPU there."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import onnx
import pytest

from spa_compiler.compiler import compile
from spa_compiler.errors import EnvironmentFault, UsageError, VerificationError
from spa_compiler.graph.session import Feeds
from spa_compiler.placement import gpu_choose, gpu_place, serve, timer
from spa_compiler.placement.gpu_timer import CudaTimer
from spa_compiler.placement.remote import RemoteTimer
from spa_compiler.placement.timer import Contender, Machine
from spa_compiler.targets import cuda
from tests.networks import mlp
from tests.placement import gpu_stand_in
from tests.placement.gpu_forms import Rows
from tests.placement.gpu_stand_in import StandIn, Wrong
from tests.placement.rpc import Session, server, talking_to, tracker

KEY, WIDTH = "gpu", 64
pytestmark = [
    pytest.mark.filterwarnings("ignore:Duplicate provider"),
    pytest.mark.filterwarnings("ignore:Specified provider"),
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One form, short races, and this machine has no GPU."""
    monkeypatch.setattr(gpu_choose, "FORMS", (Rows(),))
    monkeypatch.setattr(gpu_place, "_RACE_S", 0.05)
    monkeypatch.setattr(cuda, "device", lambda: None)


@pytest.fixture(scope="module")
def loopback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    with tracker() as port, server(port, KEY, log, "tests.placement.gpu_stand_in"):
        yield f"127.0.0.1:{port},{KEY}"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A server with a GPU, in this process."""
    monkeypatch.setattr(serve, "CudaTimer", StandIn)
    (tmp_path / "session").mkdir()
    return Session(tmp_path / "session", describe=_described)


def _described() -> str:
    return msgspec.json.encode(gpu_stand_in.machine()).decode()


def test_a_compilation_is_timed_and_verified_by_the_gpu_there(
    loopback: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timer, "interleave", lambda *_: pytest.fail("timed here"))
    onnx.save(mlp(0.3, WIDTH), tmp_path / "model.onnx")
    asked: list[str] = []
    ask = RemoteTimer._ask
    monkeypatch.setattr(
        RemoteTimer, "_ask", lambda self, function, *a: (asked.append(function), ask(self, function, *a))[1]
    )

    def compiled() -> Any:
        result = compile(
            tmp_path / "model.onnx",
            tmp_path / "out",
            target="cuda",
            precision="fp16",
            shapes=["x=2,3,64"],
            tune_rpc=loopback,
            records=tmp_path / "records.sqlite",
        )
        report = result.report
        assert (report.asked.target, report.machine.gpu) == ("cuda:sm_90", "Stand-in")
        assert [p.form for p in report.placements] == ["sparse"] * 2
        assert all("x over dense as unstructured rows" in p.reason for p in report.placements)
        assert {p.plan for p in report.race} == {"source", "portable", "single sites"}
        assert result.ratio is not None
        assert result.ratio > 1
        assert len(report.checks) == 4  # two shapes, in standard operators here and as they are there
        assert all(check.passed for check in report.checks)
        assert not any("no GPU" in note for note in report.notes)
        return result

    compiled()
    assert asked == ["time"] * 3 + ["run"] * 4
    asked.clear()
    compiled()
    assert asked == ["run"] * 4


def test_an_architecture_that_is_not_the_one_there(here: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    talking_to(here, monkeypatch)
    with pytest.raises(UsageError, match=r"does not run cuda:sm_120, it is an sm_90 \(Stand-in\)"):
        compile(mlp(0.3, WIDTH), dry_run=True, target="cuda:sm_120", tune_rpc="there:1,key")
    older = compile(mlp(0.3, WIDTH), dry_run=True, target="cuda:sm_80", tune_rpc="there:1,key").report
    assert older.asked.target == "cuda:sm_80"  # runs there from its PTX
    both = compile(mlp(0.3, WIDTH), dry_run=True, target="cpu", tune_rpc="there:1,key").report
    assert both.asked.target.startswith("cpu:")


def test_a_server_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so before any work, and does not take the CPU in silence when it is asked all the same."""

    class Absent(CudaTimer):
        provider = "NoSuchExecutionProvider"

    monkeypatch.setattr(serve, "CudaTimer", Absent)
    there = talking_to(Session(tmp_path), monkeypatch, gpu=True)
    for target in ("cuda", "cuda:sm_90"):
        with pytest.raises(UsageError, match="has no NVIDIA GPU that ONNX Runtime uses") as caught:
            compile(mlp(0.3, WIDTH), tmp_path / "out", target=target, tune_rpc="there:1,key")
        assert caught.value.where == "--tune-rpc there:1,key"
    model = mlp(0.3, WIDTH).SerializeToString()
    with there.held():
        for doing, ask in (
            ("timing", lambda: there.time({"a": Contender(model)}, feeds(), 1, 0.0)),
            ("running a model", lambda: there.run(Contender(model), feeds(), 1)),
        ):
            with pytest.raises(
                EnvironmentFault, match=f"{doing} failed there: ONNX Runtime does not use the GPU"
            ) as no:
                ask()
            assert "onnxruntime-gpu" in str(no.value)


def feeds() -> Feeds:
    return {"x": np.random.default_rng(0).standard_normal((2, 3, WIDTH), np.float32)}


def test_what_goes_wrong_while_the_kernels_there_are_compared(
    here: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They compute something else; or the server is lost, which is no fault of theirs."""

    def lost(question: str) -> str:
        raise ConnectionError("gone")

    for number, (functions, expected, words) in enumerate(
        (({}, VerificationError, "is wrong at"), ({"run": lost}, EnvironmentFault, "while running a model: gone"))
    ):
        sessions = (Session(tmp_path / f"{number}{i}", describe=_described, **functions) for i in itertools.count())
        monkeypatch.setattr(RemoteTimer, "_connect", lambda self, each=sessions: next(each))
        monkeypatch.setattr(serve, "CudaTimer", Wrong)
        with pytest.raises(expected, match=words):
            compile(mlp(0.3, WIDTH), tmp_path / "out", target="cuda", precision="fp16", tune_rpc="there:1,key")
        assert not (tmp_path / "out").exists()


def test_models_and_libraries_arrive_as_they_are(
    here: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the data beside a model; and one that its library does not fit is refused there."""
    there = talking_to(here, monkeypatch, gpu=True)
    result = compile(mlp(0.3, WIDTH), tmp_path / "out", target="cuda:sm_90", precision="fp16")
    other = compile(mlp(0.3, WIDTH), tmp_path / "other", target="cuda:sm_90", precision="f32")
    assert result.folder and other.folder  # noqa: PT018
    ours = Contender(result.folder / "model.onnx", result.folder / "kernels.so")
    with there.held():
        y = there.run(ours, feeds(), 1)["y"]
        times = there.time({"ours": ours, "dense": Contender(result.folder / "portable.onnx")}, feeds(), 1, 0.0)
        with pytest.raises(EnvironmentFault, match=r"running a model failed there: .*CUDAExecutionProvider"):
            there.run(Contender(ours.model, other.folder / "kernels.so"), feeds(), 1)
    sent = {hashlib.sha256(p.read_bytes()).digest() for p in here.root.rglob("*") if p.is_file()}
    files = [p for p in result.folder.iterdir() if p.suffix in (".onnx", ".so", ".data")]
    assert {hashlib.sha256(p.read_bytes()).digest() for p in files} <= sent
    assert times.keys() == {"ours", "dense"}
    np.testing.assert_array_equal(y, StandIn().run(ours, feeds(), 1)["y"])


def test_bfloat16_travels(here: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    there = talking_to(here, monkeypatch, gpu=True)
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (bfloat16[N] x) => (bfloat16[N] y) { y = Identity(x) }'
    )
    x = np.linspace(-3, 3, 7).astype(ml_dtypes.bfloat16)
    with there.held():
        y = there.run(Contender(proto.SerializeToString()), {"x": x}, 1)["y"]
        assert there.time({"a": Contender(proto.SerializeToString())}, {"x": x}, 1, 0.0)["a"].median_us > 0
    np.testing.assert_array_equal(y, x.astype(np.float32))


def test_questions_to_the_cpu_stay_with_the_cpu(here: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "CudaTimer", lambda: pytest.fail("asked the GPU"))
    there = talking_to(here, monkeypatch)
    assert isinstance(there.machine, Machine)
    with there.held():
        assert there.run(Contender(mlp(0.3, WIDTH).SerializeToString()), feeds(), 1).keys() == {"y"}
